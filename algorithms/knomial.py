"""The k-nomial tree: the binomial tree with another radix than 2. Fewer steps; the root sends more in each."""

from __future__ import annotations

from fractions import Fraction

from .binary import ceil_log, widest
from .collective import Collective
from .parameters import RADIX
from .registry import Counts, algorithm
from .schedule import Program
from .tree import down, own, up, whole


def _height(size: int, radix: int) -> int:
    """The most digits other than 0 that a rank has: 1, 11, 111, ... are the first ranks with so many."""
    digits, ones = 0, 1
    while ones < size:
        digits, ones = digits + 1, ones * radix + 1
    return digits


def _children(size: int, radix: int) -> int:
    """How many children the root has."""
    digits = ceil_log(size, radix)
    return (radix - 1) * (digits - 1) - (-size // radix ** (digits - 1)) - 1 if size > 1 else 0


def _there_and_back(size: int, radix: int) -> int:
    return _height(size, radix) + ceil_log(size, radix)


@algorithm(
    Collective.BROADCAST,
    parameters=RADIX,
    counts=lambda p, radix: Counts(ceil_log(p, radix), Fraction(_children(p, radix)), Fraction(0)),
)
def knomial_broadcast(rank: int, size: int, radix: int) -> Program:
    """Down a k-nomial tree, whole vector, to up to radix - 1 children at once.

    ceil(log_radix size) steps; the root sends the vector to its (radix - 1) log_radix size children, fewer if size is
    no power of the radix. Wilkins et al. 2023.
    """
    yield from down(rank, size, whole(1), radix)


@algorithm(
    Collective.REDUCE,
    parameters=RADIX,
    counts=lambda p, radix: Counts(_height(p, radix), Fraction(min(1, p - 1)), Fraction(_children(p, radix))),
)
def knomial_reduce(rank: int, size: int, radix: int) -> Program:
    """Up a k-nomial tree, whole vector; up to radix - 1 children are folded in one pass.

    Up to ceil(log_radix size) steps, as many as a rank has digits other than 0; every rank but the root sends the
    vector once, the root folds those of its children. Wilkins et al. 2023.
    """
    yield from up(rank, size, whole(1), radix, reduce=True)


@algorithm(
    Collective.ALL_REDUCE,
    parameters=RADIX,
    counts=lambda p, radix: Counts(
        _there_and_back(p, radix), Fraction(_children(p, radix)), Fraction(_children(p, radix))
    ),
)
def knomial_all_reduce(rank: int, size: int, radix: int) -> Program:
    """Reduce to rank 0, then broadcast, both along a k-nomial tree.

    Up to 2 ceil(log_radix size) steps; the root sends and folds a vector for each of its children.
    """
    yield from knomial_reduce(rank, size, radix)
    yield from knomial_broadcast(rank, size, radix)


@algorithm(
    Collective.SCATTER,
    parameters=RADIX,
    largest=widest,
    counts=lambda p, radix: Counts(ceil_log(p, radix), Fraction(p - 1, p), Fraction(0)),
)
def knomial_scatter(rank: int, size: int, radix: int) -> Program:
    """Down a k-nomial tree, to each child what its subtree needs.

    ceil(log_radix size) steps; the root sends (size - 1)/size of its vector. Wilkins et al. 2023.
    """
    yield from down(rank, size, own, radix)


@algorithm(
    Collective.GATHER,
    parameters=RADIX,
    largest=widest,
    counts=lambda p, radix: Counts(
        _height(p, radix), Fraction(widest(p, radix), p) if p > 1 else Fraction(0), Fraction(0)
    ),
)
def knomial_gather(rank: int, size: int, radix: int) -> Program:
    """Up a k-nomial tree, from each child what its subtree holds.

    Up to ceil(log_radix size) steps; the root's largest child sends 1/radix of the result if size is a power of the
    radix, and never more than half of it. Wilkins et al. 2023.
    """
    yield from up(rank, size, own, radix)


@algorithm(
    Collective.REDUCE_SCATTER,
    parameters=RADIX,
    largest=lambda p: p if p > 1 else 1,
    counts=lambda p, radix: Counts(
        _there_and_back(p, radix),
        1 + Fraction(widest(p, radix) - 1, p) if p > 1 else Fraction(0),
        Fraction(_children(p, radix)),
    ),
)
def knomial_reduce_scatter(rank: int, size: int, radix: int) -> Program:
    """Reduce to rank 0, then scatter, both along a k-nomial tree.

    Up to 2 ceil(log_radix size) steps; less than 3/2 of the vector sent, a vector folded by the root for each of
    its children.
    """
    yield from up(rank, size, whole(size), radix, reduce=True)
    yield from knomial_scatter(rank, size, radix)


@algorithm(
    Collective.ALL_GATHER,
    parameters=RADIX,
    largest=lambda p: p,
    counts=lambda p, radix: Counts(_there_and_back(p, radix), Fraction(_children(p, radix)), Fraction(0)),
)
def knomial_all_gather(rank: int, size: int, radix: int) -> Program:
    """Gather to rank 0, then broadcast, both along a k-nomial tree.

    Up to 2 ceil(log_radix size) steps; the root sends the result to each of its children.
    """
    yield from knomial_gather(rank, size, radix)
    yield from down(rank, size, whole(size), radix)


@algorithm(
    Collective.BARRIER,
    parameters=RADIX,
    largest=lambda p: p,
    counts=lambda p, radix: Counts(_there_and_back(p, radix), Fraction(0), Fraction(0)),
)
def knomial_barrier(rank: int, size: int, radix: int) -> Program:
    """The word that all have come goes up the k-nomial tree, the word that all may go comes down.

    Up to 2 ceil(log_radix size) steps, 2 (size - 1) messages in all, nothing in them.
    """
    yield from knomial_all_gather(rank, size, radix)
