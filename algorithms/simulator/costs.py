"""A topology as the event engine takes it: numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from typing import NamedTuple, cast

from .topology import Level, Topology


class LevelCosts(NamedTuple):
    """A level: the ranks in a unit (0: all); of its links, how many ranks share how many, what a byte costs there, and
    whether what goes further passes them."""

    unit: int
    alpha: float
    overhead: float
    beta: float
    per: int
    links: int
    per_byte: float
    through: bool


class Costs(NamedTuple):
    """A rank, and how many ranks share how many cores (0: each has its own)."""

    launch: float
    send: float
    receive: float
    copy: float
    fold: float
    lent: float
    lent_fold: float
    lends: bool
    slots: int
    processors: int
    crowd: int
    cores: int


def levels_of(topology: Topology, ranks: int) -> list[LevelCosts]:
    """The levels, as so many ranks use them.

    Args:
        topology: with one way to move messages, its constants numbers.
    """
    found = []
    for level, unit in zip(topology.levels, topology.units):
        links = level.links
        found.append(
            LevelCosts(
                unit if unit and unit < ranks else 0,
                cast(float, level.alpha),
                cast(float, level.overhead),
                cast(float, level.beta),
                topology.unit_ranks(links.per) if links else 1,
                links.number if links else 0,
                _per_byte(level),
                links.through if links else False,
            )
        )
    return found


def _per_byte(level: Level) -> float:
    if level.links is None:
        return 0.0
    return cast(float, level.beta) if isinf(level.links.capacity) else 1.0 / level.links.capacity


def costs_of(topology: Topology) -> Costs:
    """What a rank costs. A topology has cores on one level at most, whose units have a size."""
    rank = topology.rank
    crowds = ((unit, level.cores) for level, unit in zip(topology.levels, topology.units) if level.cores)
    crowd, cores = next(crowds, (0, 0))
    constants = {name: cast(float, value) for name, value in vars(rank).items() if name in Costs._fields}
    return Costs(**constants, crowd=crowd, cores=cores)  # type: ignore[arg-type]


def level_of(rank: int, peer: int, levels: Sequence[LevelCosts]) -> int:
    """The level by which two ranks talk."""
    return next(n for n, one in enumerate(levels) if not one.unit or rank // one.unit == peer // one.unit)
