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

    A period is believed when some ranks of it, the first and the last among them, do as their images at its next
    occurrence, in the middle and at the end: some ranks are looked at, not all.
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
            symmetry = Symmetry(period, mirrored)
            if all(_alike(program, rank, image, ranks, mirrored) for rank, image in _samples(period, ranks)):
                return symmetry
    return None


on_redefinition.append(_find.cache_clear)


def _periods(least: int, ranks: int) -> Iterator[int]:
    """Multiples that divide the number of ranks, at most half of them."""
    found = (least * factor for factor in range(1, ranks // (2 * least) + 1) if ranks % (least * factor) == 0)
    for period, _ in zip(found, range(TRIED)):
        yield period


def _samples(period: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Ranks and their images."""
    times = ranks // period
    middle = max(1, times // 2)
    for rank, image in (
        (0, 1),
        (period - 1, times - 1),
        (period // 2, middle),
        (min(1, period - 1), middle),
        (0, times - 1),
    ):
        yield rank, rank + image * period


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
