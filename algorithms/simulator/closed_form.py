"""The closed form of a simulation, for what is too much to be walked over.

    first segment    launch, and the most of: steps (alpha + 2 overhead) + sent * beta + folded * gamma, along a path;
                     what the busiest link needs; what the busiest rank needs
    every further    the most of: what the busiest link needs; the busiest rank; for how long a rank holds a lane

Steps, sent and folded are what the algorithm declares (`Counts`). A step is taken over the level of some ranks'
average message, or, where no rank can be looked at, over the slowest. Links and ranks are those that some ranks show.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import NamedTuple

import numpy as np

from ...errors import ArgumentError
from ..collective import Collective
from ..registry import Algorithm
from ..schedule import Send
from .costs import Costs, LevelCosts, costs_of, level_of, levels_of
from .symmetry import tile
from .topology import Topology

LOOKED_AT = 64
"""Ranks that are looked at, at most, in each of three places."""

FOLDING = {Collective.REDUCE: 1.0, Collective.REDUCE_SCATTER: 1.0, Collective.ALL_REDUCE: 0.5}
"""Which part of the steps of a path fold what they receive."""

STEPS = 200_000
"""Steps of a rank that can be looked at: writing a program down takes a microsecond for each."""


class _Seen(NamedTuple):
    """What some ranks show.

    Attributes:
        busiest: seconds that the busiest link or rank needs for a segment.
        steps: the most steps of a rank.
        sent: blocks of the longest message of each step, of the rank that has the most.
        latency, per_byte: the average message's alpha and overheads, and its beta.
    """

    busiest: float
    steps: int
    sent: float
    latency: float
    per_byte: float


def closed_form(
    algorithm: Algorithm,
    ranks: int,
    root: int,
    topology: Topology,
    block: float,
    segments: int,
    lanes: int,
    alike: bool,
) -> float:
    """Seconds by the closed form.

    Args:
        block: bytes of a block in a segment.
        alike: whether all ranks do alike: then a path is as the average of their messages; else as that of the rank
            whose messages are the slowest.

    Raises:
        ArgumentError: the algorithm declares no counts for so many ranks.
    """
    if ranks == 1:
        return costs_of(topology).launch
    counts = algorithm.counts(ranks) if algorithm.counts else None
    if counts is None:
        raise ArgumentError(
            f"{algorithm.collective.value} {algorithm.name} declares no counts for {ranks} ranks, which a closed form "
            f"is made of: declare them (counts=), or take few enough ranks and segments to walk over all events"
        )
    if not counts.steps:
        return costs_of(topology).launch
    levels, costs = levels_of(topology, ranks), costs_of(topology)
    blocks = algorithm.blocks(ranks) if algorithm.collective.cut else ranks
    if counts.steps <= STEPS:
        seen = _look(algorithm, ranks, root, tile(topology, ranks), alike, levels, costs, block, lanes)
    else:
        latency = max(level.alpha + 2 * level.overhead for level in levels)
        per_byte = max(max(level.beta, level.per_byte) for level in levels)
        seen = _Seen(0.0, counts.steps, float(counts.sent) * blocks, latency, per_byte)
    sent = block * max(seen.sent, counts.steps)
    folded = block * max(float(counts.folded) * blocks, counts.steps * FOLDING.get(algorithm.collective, 0.0))
    beta = seen.per_byte + costs.send + (0.0 if folded else costs.receive)
    path = counts.steps * seen.latency + sent * beta + folded * costs.fold
    first = max(path, seen.busiest)
    # In an all_reduce a rank gives at the beginning of the path and gets at its end, and holds its lane meanwhile.
    own = 1 if algorithm.collective is Collective.ALL_REDUCE else seen.steps / counts.steps
    every = max(seen.busiest, path * own / lanes)
    return costs.launch + first + (segments - 1) * every


def _look(
    algorithm: Algorithm,
    ranks: int,
    root: int,
    unit: int,
    alike: bool,
    levels: list[LevelCosts],
    costs: Costs,
    block: float,
    lanes: int,
) -> _Seen:
    """What the ranks of the first unit, one in the middle and the last show."""
    links: defaultdict[tuple[int, int, bool], float] = defaultdict(float)
    busy, steps, sent = [0.0], [1], [0]
    processors = min(costs.processors or lanes, lanes)
    ways: list[list[tuple[float, float]]] = []
    for rank in _places(ranks, unit):
        program = algorithm.program(rank, ranks, root)
        steps.append(len(program))
        sent.append(sum(max(len(message.blocks) for message in step) for step in program))
        ways.append([])
        busy.append(0.0)
        for message in (message for step in program for message in step):
            nbytes, number = len(message.blocks) * block, level_of(rank, message.peer, levels)
            level = levels[number]
            passed = [n for n in range(number + 1) if levels[n].links and (levels[n].through or n == number)]
            for n in passed:
                one = levels[n]
                links[n, rank // one.per, isinstance(message, Send)] += nbytes * one.per_byte / one.links
            cost = costs.send if isinstance(message, Send) else costs.fold if message.reduce else costs.receive
            busy[-1] += (level.overhead + nbytes * cost) / processors
            ways[-1].append(
                (level.alpha + 2 * level.overhead, max([level.beta, *(levels[n].per_byte for n in passed)]))
            )
    means = [np.mean(way, axis=0) for way in ([list(chain(*ways))] if alike else ways) if way]
    latency, per_byte = np.max(means, axis=0) if means else (0.0, 0.0)
    return _Seen(max(*busy, *links.values()), max(steps), max(sent), float(latency), float(per_byte))


def _places(ranks: int, unit: int) -> list[int]:
    """The first unit, one in the middle, and the last."""
    units = ranks // unit
    some = range(min(unit, LOOKED_AT))
    return sorted({number * unit + rank for number in (0, units // 2, units - 1) for rank in some})
