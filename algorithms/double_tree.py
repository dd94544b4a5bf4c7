"""Two binary trees at once, each for half of the vector (Sanders, Speck & Traeff 2009).

A rank is an inner node of at most one of the trees and a leaf of the other, so every link carries in both
directions: a tree's few steps at nearly full bandwidth, once segments and lanes fill the pipeline.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from .binary import ceil_log2, floor_log2
from .collective import Collective
from .registry import Counts, algorithm
from .schedule import Program, mirror, recv, send


class _Node(NamedTuple):
    block: int
    parent: int
    children: list[int]


def _family(place: int, count: int) -> tuple[int, list[int]]:
    """Parent and children in the binary tree whose in-order numbering is 1, ..., count; odd places are leaves.

    Place 0, the root of the whole, has the tree's top as its only child.
    """
    if place == 0:
        return 0, [1 << floor_log2(count)]
    low = place & -place
    upper = (place ^ low) | 2 * low
    children = [place - low // 2] if low > 1 else []
    right = next((place + (low >> k) for k in range(1, low.bit_length()) if place + (low >> k) <= count), None)
    return upper if upper <= count else place ^ low, children + ([right] if right else [])


def _nodes(rank: int, size: int) -> list[_Node]:
    """The rank in both trees. The second is the first turned round, or moved on by one, so that inner meets leaf."""
    count = size - 1

    def turned(place: int) -> int:
        """The rank at a place of the second tree; odd ranks at even places, but for the last rank of an odd count."""
        return place and (size - place if size % 2 else place % count + 1)

    place = rank and (size - rank if size % 2 else (rank - 2) % count + 1)
    parent, children = _family(rank, count)
    second_parent, second_children = _family(place, count)
    return [_Node(0, parent, children), _Node(1, turned(second_parent), list(map(turned, second_children)))]


@algorithm(
    Collective.BROADCAST,
    blocks=2,
    counts=lambda p: Counts(ceil_log2(p), Fraction(min(1, p - 1)), Fraction(0)),
)
def double_tree_broadcast(rank: int, size: int) -> Program:
    """Each half of the vector down its own tree; a rank serves its children, then waits for the half it is a leaf of.

    ceil(log2 size) steps, at most two per rank; no rank sends more than one vector. An inner node needs only
    inner nodes above it, so no two ranks wait for each other. Sanders, Speck & Traeff 2009.
    """
    if size == 1:
        return
    nodes = _nodes(rank, size)
    inner, leaves = [n for n in nodes if n.children], [n for n in nodes if not n.children]
    if rank:
        yield [recv(n.parent, n.block) for n in inner]
    serve = [send(child, n.block) for n in inner for child in n.children]
    yield [*serve, *(recv(n.parent, n.block) for n in leaves)]


@algorithm(
    Collective.REDUCE,
    blocks=2,
    counts=lambda p: Counts(ceil_log2(p), Fraction(min(1, p - 1)), Fraction(min(1, p - 1))),
)
def double_tree_reduce(rank: int, size: int) -> Program:
    """The mirror image of the broadcast; inner nodes fold both children in one pass.

    ceil(log2 size) steps, at most two per rank; no rank sends or folds more than one vector. Sanders,
    Speck & Traeff 2009.
    """
    yield from mirror(double_tree_broadcast(rank, size), reduce=True)


@algorithm(
    Collective.ALL_REDUCE,
    blocks=2,
    counts=lambda p: Counts(
        2 * ceil_log2(p), Fraction(min(p, 4), 2) if p > 1 else Fraction(0), Fraction(min(1, p - 1))
    ),
)
def double_tree_all_reduce(rank: int, size: int) -> Program:
    """Reduce up both trees to rank 0, then broadcast down them.

    2 ceil(log2 size) steps, at most four per rank; no rank sends more than two vectors or folds more than
    one. Sanders, Speck & Traeff 2009.
    """
    yield from double_tree_reduce(rank, size)
    yield from double_tree_broadcast(rank, size)
