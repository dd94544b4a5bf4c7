"""Parallel aggregated trees: every rank's block goes down a binomial tree of its own, all of them at once.

The far edges come first, while messages are small; in recursive doubling they come last and carry half of everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from .binary import ceil_log2, floor_log2
from .collective import Collective
from .parameters import Parameter
from .registry import Counts, algorithm
from .schedule import Program, mirror, recv, send

SPAN = {"span": Parameter(2, "a power of two from 2 on", lambda span: span >= 2 and span & (span - 1) == 0)}


def _walk(start: int, span: int) -> Iterator[tuple[int, int]]:
    """The edges of a binomial tree of `span` ranks, depth first: where each begins, and its length."""
    if span > 1:
        half = span // 2
        yield start, half
        yield from _walk(start + half, half)
        yield from _walk(start, half)


def _steps(size: int, span: int) -> Iterator[tuple[int, list[int]]]:
    """Step by step the length of the edges taken, and where they begin, as distances from the blocks' owners."""
    length = 1 << ceil_log2(size) >> 1
    while length >= span:
        yield length, list(range(0, size - length, 2 * length))
        length //= 2
    for start, near in _walk(0, span):
        yield near, list(range(start, size - near, span))


def _counts(size: int, span: int, folds: bool = False) -> Counts:
    steps = max(0, ceil_log2(size) - floor_log2(span)) + min(size, span) - 1
    part = Fraction(size - 1, size)
    return Counts(steps, part, part if folds else Fraction(0))


def _largest(size: int, span: int) -> int:
    return max(1, -(-(size - 1) // span))


@algorithm(Collective.ALL_GATHER, parameters=SPAN, largest=_largest, counts=_counts)
def pat_all_gather(rank: int, size: int, span: int) -> Program:
    """Blocks go together where their trees have edges of the same length: far ones few, near ones many.

    ceil(log2 size) steps and up to half of the blocks in a message with span 2. A larger span keeps messages to
    size/span blocks: the trees are walked edge by edge within groups of that many ranks, ceil(log2(size/span)) +
    span - 1 steps. (size - 1)/size of the result sent per rank. Jeaugey 2025.
    """
    for length, starts in _steps(size, span):
        ahead, behind = (rank + length) % size, (rank - length) % size
        if starts:
            yield (
                send(ahead, *((rank - start) % size for start in starts)),
                recv(behind, *((behind - start) % size for start in starts)),
            )


@algorithm(
    Collective.REDUCE_SCATTER,
    parameters=SPAN,
    largest=_largest,
    counts=lambda p, span: _counts(p, span, folds=True),
)
def pat_reduce_scatter(rank: int, size: int, span: int) -> Program:
    """The mirror image of the all_gather: near edges first, up the trees.

    ceil(log2 size) steps with span 2, as many as the all_gather with another; (size - 1)/size of the vector sent and
    folded per rank. Jeaugey 2025.
    """
    yield from mirror(pat_all_gather(rank, size, span), reduce=True)
