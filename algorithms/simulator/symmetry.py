"""Ranks that stand for others: where all do alike, some are enough to walk over.

A rotation moves every rank on by the same distance; an exclusive or with the same number mirrors them. Where neither
changes the schedule nor the topology, rank r and its image do the same things at the same times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import lcm

from ..registry import Algorithm, on_redefinition
from ..schedule import Send, Step
from .topology import Topology


@dataclass(frozen=True)
class Symmetry:
    """The first `period` ranks stand for all: rank r for r + period, r + 2 period, and so on.

    Attributes:
        mirrored: the images of a rank have their peers at the same exclusive or; else at the same distance.
    """

    period: int
    mirrored: bool = False


TRIED = 16
"""Periods that are tried."""

COMPARED = 150_000
"""Messages that are compared, about: half a second. Some ranks are in any case."""


def tile(topology: Topology, ranks: int) -> int:
    """By how many ranks a rotation must move them to change nothing in the topology; all, if there is none."""
    found = 1
    for level, unit in zip(topology.levels, topology.units):
        if unit and (unit < ranks or level.cores):
            found = lcm(found, unit)
        if level.links:
            found = lcm(found, topology.unit_ranks(level.links.per))
    return found if ranks % found == 0 else ranks


def find(algorithm: Algorithm, ranks: int, topology: Topology) -> Symmetry | None:
    """The smallest symmetry that the schedule shows, among `TRIED` periods; None if there is none.

    All ranks are compared with those that would stand for them, where they have few enough messages together
    (`COMPARED`); else some: the first, the last, and others that are scattered among them.
    """
    return _find(algorithm, ranks, tile(topology, ranks))


@lru_cache(64)
def _find(algorithm: Algorithm, ranks: int, least: int) -> Symmetry | None:
    programs: dict[int, list[Step]] = {}

    def program(rank: int) -> list[Step]:
        if rank not in programs:
            programs[rank] = algorithm.program(rank, ranks)
        return programs[rank]

    for period in _periods(least, ranks):
        for mirrored in (False, True):
            if mirrored and (ranks & (ranks - 1) or period & (period - 1)):
                continue
            if all(_alike(program, rank, rank % period, ranks, mirrored) for rank in _compared(period, ranks, program)):
                return Symmetry(period, mirrored)
    return None


def is_rotated(algorithm: Algorithm, ranks: int) -> bool:
    """Whether all ranks do alike, wherever they are."""
    found = _find(algorithm, ranks, 1)
    return found is not None and found.period == 1


on_redefinition.append(_find.cache_clear)


def _periods(least: int, ranks: int) -> Iterator[int]:
    """Multiples that divide the number of ranks, at most half of them."""
    found = (least * factor for factor in range(1, ranks // (2 * least) + 1) if ranks % (least * factor) == 0)
    for period, _ in zip(found, range(TRIED)):
        yield period


def _compared(period: int, ranks: int, program: Callable[[int], list[Step]]) -> Iterator[int]:
    """Ranks to be compared with those that stand for them, likely ones to differ first."""
    yield from {period, ranks - 1, ranks - period, ranks // 2 // period * period + min(1, period - 1)}
    some = max(4, COMPARED // (1 + sum(len(step) for step in program(0))))
    if some >= ranks:
        yield from range(period, ranks)
    else:
        yield from (int(number * 0.618034 * ranks) % ranks for number in range(1, some))


def _alike(program: Callable[[int], list[Step]], rank: int, image: int, ranks: int, mirrored: bool) -> bool:
    one, other = program(rank), program(image)
    if len(one) != len(other):
        return False

    def place(peer: int, of: int) -> int:
        return peer ^ of if mirrored else (peer - of) % ranks

    def says(step: Step, of: int) -> list[tuple[bool, int, int, bool]]:
        return [
            (isinstance(m, Send), place(m.peer, of), len(m.blocks), not isinstance(m, Send) and m.reduce) for m in step
        ]

    return all(says(a, rank) == says(b, image) for a, b in zip(one, other))
