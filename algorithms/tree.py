"""The binomial tree: rank r hangs below r without its lowest set bit. Few steps; the root does the most.

A subtree is a range of ranks, so whatever gathers and scatters by it moves ranges of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from .binary import ceil_log2, floor_log2, widest
from .collective import Block, Collective
from .registry import Counts, algorithm
from .schedule import Program, mirror, recv, send

Cargo = Callable[[Sequence[int]], Iterable[Block]]
"""What a message carries, from the ranks of the subtree that it is for."""


def down(rank: int, size: int, cargo: Cargo, radix: int = 2) -> Program:
    """Every rank receives its subtree's cargo from its parent, then serves its children, the largest first.

    The tree is k-nomial, of that radix: rank r hangs below r without its lowest digit other than 0, and serves the
    children that differ in the same digit in one step.
    """
    reach = 1
    while reach < size and rank % (reach * radix) == 0:
        reach *= radix
    if rank:
        yield recv(rank - rank % (reach * radix), *cargo(range(rank, min(rank + reach, size))))
    while reach > 1:
        reach //= radix
        children = range(rank + reach, min(rank + reach * radix, size), reach)
        yield [send(child, *cargo(range(child, min(child + reach, size)))) for child in children]


def up(rank: int, size: int, cargo: Cargo, radix: int = 2, reduce: bool = False) -> Program:
    """The way back: every rank hands its subtree's cargo to its parent, once its children have handed it theirs."""
    return mirror(down(rank, size, cargo, radix), reduce)


def whole(blocks: int) -> Cargo:
    """All blocks, to everyone."""
    return lambda subtree: range(blocks)


def own(subtree: Sequence[int]) -> Sequence[int]:
    """The blocks of the subtree's ranks."""
    return subtree


@algorithm(
    Collective.BROADCAST,
    counts=lambda p: Counts(ceil_log2(p), Fraction(ceil_log2(p)), Fraction(0)),
)
def tree_broadcast(rank: int, size: int) -> Program:
    """Down a binomial tree, whole vector.

    ceil(log2 size) steps; the root sends the vector that many times. Thakur, Rabenseifner & Gropp 2005.
    """
    yield from down(rank, size, whole(1))


@algorithm(
    Collective.REDUCE,
    counts=lambda p: Counts(floor_log2(p), Fraction(min(1, p - 1)), Fraction(ceil_log2(p))),
)
def tree_reduce(rank: int, size: int) -> Program:
    """Up a binomial tree, whole vector.

    floor(log2 size) steps; every rank but the root sends the vector once, the root folds ceil(log2 size)
    of them. Thakur, Rabenseifner & Gropp 2005.
    """
    yield from up(rank, size, whole(1), reduce=True)


@algorithm(
    Collective.ALL_REDUCE,
    counts=lambda p: Counts(floor_log2(p) + ceil_log2(p), Fraction(ceil_log2(p)), Fraction(ceil_log2(p))),
)
def tree_all_reduce(rank: int, size: int) -> Program:
    """Reduce to rank 0, then broadcast.

    floor(log2 size) + ceil(log2 size) steps; the root sends and folds ceil(log2 size) vectors.
    """
    yield from tree_reduce(rank, size)
    yield from tree_broadcast(rank, size)


@algorithm(
    Collective.SCATTER,
    largest=widest,
    counts=lambda p: Counts(ceil_log2(p), Fraction(p - 1, p), Fraction(0)),
)
def tree_scatter(rank: int, size: int) -> Program:
    """Down a binomial tree, to each child what its subtree needs.

    ceil(log2 size) steps; the root sends (size - 1)/size of its vector. Chan et al. 2007.
    """
    yield from down(rank, size, own)


@algorithm(
    Collective.GATHER,
    largest=widest,
    counts=lambda p: Counts(floor_log2(p), Fraction(widest(p), p) if p > 1 else Fraction(0), Fraction(0)),
)
def tree_gather(rank: int, size: int) -> Program:
    """Up a binomial tree, from each child what its subtree holds.

    floor(log2 size) steps; the root's largest child sends up to half of the result. Chan et al. 2007.
    """
    yield from up(rank, size, own)


@algorithm(
    Collective.REDUCE_SCATTER,
    largest=lambda p: p if p > 1 else 1,
    counts=lambda p: Counts(
        floor_log2(p) + ceil_log2(p),
        1 + Fraction(widest(p) - 1, p) if p > 1 else Fraction(0),
        Fraction(ceil_log2(p)),
    ),
)
def tree_reduce_scatter(rank: int, size: int) -> Program:
    """Reduce to rank 0, then scatter.

    floor(log2 size) + ceil(log2 size) steps; less than 3/2 of the vector sent, ceil(log2 size) vectors
    folded by the root.
    """
    yield from up(rank, size, whole(size), reduce=True)
    yield from tree_scatter(rank, size)


@algorithm(
    Collective.ALL_GATHER,
    largest=lambda p: p,
    counts=lambda p: Counts(floor_log2(p) + ceil_log2(p), Fraction(ceil_log2(p)), Fraction(0)),
)
def tree_all_gather(rank: int, size: int) -> Program:
    """Gather to rank 0, then broadcast.

    floor(log2 size) + ceil(log2 size) steps; the root sends the result ceil(log2 size) times.
    """
    yield from tree_gather(rank, size)
    yield from down(rank, size, whole(size))


@algorithm(
    Collective.BARRIER,
    largest=lambda p: p,
    counts=lambda p: Counts(floor_log2(p) + ceil_log2(p), Fraction(0), Fraction(0)),
)
def tree_barrier(rank: int, size: int) -> Program:
    """The word that all have come goes up the tree, the word that all may go comes down.

    floor(log2 size) + ceil(log2 size) steps, 2 (size - 1) messages in all, nothing in them.
    """
    yield from tree_all_gather(rank, size)


def _all_to_all_sent(size: int) -> Fraction:
    half = 1 << ceil_log2(size) >> 1
    full_subtrees = size * (half - 1) - (half * half - 1) // 3
    return Fraction(full_subtrees + (size - half) * half, size) if size > 1 else Fraction(0)


@algorithm(
    Collective.ALL_TO_ALL,
    largest=lambda p: max(1, widest(p) * (p - widest(p))),
    counts=lambda p: Counts(floor_log2(p) + ceil_log2(p), _all_to_all_sent(p), Fraction(0)),
)
def tree_all_to_all(rank: int, size: int) -> Program:
    """Gather up the tree, scatter down it; a block turns round at the first rank above both of its ends.

    floor(log2 size) + ceil(log2 size) steps; about 2/3 size send buffers pass through the root, so only for
    tiny blocks on networks where messages are dear.
    """
    everyone = range(size)
    yield from up(rank, size, lambda subtree: [(s, d) for s in subtree for d in everyone if d not in subtree])
    yield from down(rank, size, lambda subtree: [(s, d) for d in subtree for s in everyone if s not in subtree])
