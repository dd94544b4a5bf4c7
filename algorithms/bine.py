"""Bine trees: binomial trees whose edges swing to both sides, so that each edge is shorter (De Sensi et al. 2025).

Where the binomial tree's first edge leads half of the ranks away, this one's leads a third. The paper's butterflies
meet the partners of Swing: all_gather, reduce_scatter and all_reduce are in `swing.py`.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import NamedTuple

from .binary import floor_log2
from .collective import Collective
from .registry import Counts, algorithm
from .schedule import Program, mirror, recv, send
from .swing import edges, even, rounds
from .tree import Cargo, own, whole


class _Node(NamedTuple):
    """A rank in the tree: its parent, itself with all below it, and its children, step by step."""

    parent: int
    subtree: tuple[int, ...]
    served: tuple[tuple[int, ...], ...]


@cache
def _tree(size: int) -> tuple[_Node, ...]:
    """All ranks; an odd last one hangs below the root, which serves it together with its first child."""
    parent = [0] * size
    below = [{rank} for rank in range(size)]
    served: list[list[tuple[int, ...]]] = [[] for _ in range(size)]
    steps = list(edges(even(size)))
    if size > 1 and size % 2:
        steps[0] += ((0, size - 1),)
    for step in steps:
        for rank in dict(step):
            served[rank].append(tuple(child for source, child in step if source == rank))
    for rank, child in (edge for step in reversed(steps) for edge in step):
        parent[child] = rank
        below[rank] |= below[child]
    return tuple(_Node(parent[r], tuple(sorted(below[r])), tuple(served[r])) for r in range(size))


def _down(rank: int, size: int, cargo: Cargo) -> Program:
    tree = _tree(size)
    if rank:
        yield recv(tree[rank].parent, *cargo(tree[rank].subtree))
    for children in tree[rank].served:
        yield [send(child, *cargo(tree[child].subtree)) for child in children]


def _up(rank: int, size: int, cargo: Cargo, reduce: bool = False) -> Program:
    return mirror(_down(rank, size, cargo), reduce)


def _children(size: int) -> int:
    """How many children the root has; no rank has more."""
    return floor_log2(3 * even(size) // 2) + size % 2 if size > 1 else 0


def _height(size: int) -> int:
    return floor_log2(even(size)) if size > 1 else 0


def _half(size: int) -> int:
    """The ranks below the root's first child, itself included."""
    return max(1, size // 2)


@algorithm(
    Collective.BROADCAST,
    counts=lambda p: Counts(rounds(p), Fraction(_children(p)), Fraction(0)),
)
def bine_broadcast(rank: int, size: int) -> Program:
    """Down a Bine tree, whole vector, the farthest children first.

    ceil(log2 size) steps; the root sends floor(log2(3/2 size)) vectors. The last of an odd number of ranks is another
    child of the root, and these numbers are for the ranks without it. De Sensi et al. 2025.
    """
    yield from _down(rank, size, whole(1))


@algorithm(
    Collective.REDUCE,
    counts=lambda p: Counts(_height(p), Fraction(min(1, p - 1)), Fraction(_children(p))),
)
def bine_reduce(rank: int, size: int) -> Program:
    """Up a Bine tree, whole vector, the nearest children first.

    floor(log2 size) steps; every rank but the root sends the vector once, the root folds those of its children.
    De Sensi et al. 2025.
    """
    yield from _up(rank, size, whole(1), reduce=True)


@algorithm(
    Collective.SCATTER,
    largest=_half,
    counts=lambda p: Counts(rounds(p), Fraction(p - 1, p), Fraction(0)),
)
def bine_scatter(rank: int, size: int) -> Program:
    """Down a Bine tree, to each child what its subtree needs, the farthest child first with half of all.

    As many steps as the broadcast; the root sends (size - 1)/size of its vector. De Sensi et al. 2025.
    """
    yield from _down(rank, size, own)


@algorithm(
    Collective.GATHER,
    largest=_half,
    counts=lambda p: Counts(_height(p), Fraction(_half(p) if p > 1 else 0, p), Fraction(0)),
)
def bine_gather(rank: int, size: int) -> Program:
    """Up a Bine tree, from each child what its subtree holds.

    floor(log2 size) steps; the root's largest child sends half of the result. De Sensi et al. 2025.
    """
    yield from _up(rank, size, own)
