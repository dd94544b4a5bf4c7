"""A schedule on a machine that need not be there: how long it takes, and what is busy meanwhile.

The event engine (`native/events.hpp`) walks the lowered code of every rank, the same code that the engines run, in the
order of time: messages take the links that they share in the order in which they come to them. Where all ranks do
alike, some stand for all, which is as exact. Where that is too much, a closed form is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from math import ceil
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError, ScheduleError
from ..collective import Collective
from ..hierarchical import among
from ..plan import ALIGNMENT, lower
from ..registry import Algorithm, on_redefinition
from ..words import count, did_you_mean
from ._events import Engine
from .checks import is_whole
from .closed_form import STEPS, closed_form
from .costs import costs_of, levels_of
from .simulation import CLOSED_FORM, EVENTS, METHODS, SYMMETRY, Simulation, Timeline
from .symmetry import Symmetry, find, is_rotated, tile
from .topology import Topology

AUTO = "auto"

CUTS: tuple[tuple[int | None, int], ...] = (
    (None, 1),
    *((length, 8) for length in (4 << 20, 1 << 20, 256 << 10, 64 << 10)),
)
"""Segments and lanes that are tried where the segment is "auto"."""

TRIED = 25_000_000
"""Operations of a cut that is tried; shorter segments are left out."""

MOST = 100_000_000
"""Operations that are walked over unless one asks for it: half a minute or so."""

LOWERED = 30_000_000
"""Messages and blocks that are lowered unless one asks for it, likewise: some microseconds for each, in Python."""

HELD = 200_000_000
"""Operations of one segment, in all lanes, that are walked over at all: some 16 bytes each, in memory."""

KEPT, SIMULATIONS = 3_000_000, 4
"""Messages and blocks whose code is kept for a further simulation, and of how many schedules."""

CHUNK = 200_000
"""Events between two reports of progress."""


def simulate(
    algorithm: Algorithm,
    ranks: int,
    topology: Topology,
    nbytes: int,
    *,
    root: int = 0,
    protocol: str | None = None,
    segment: int | str | None = None,
    lanes: int = 1,
    method: str = AUTO,
    in_place: bool = True,
    record: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Simulation:
    """Simulate a collective.

    Cost: linear in the operations of the ranks that are walked over, some ten million a second; writing their programs
    down comes on top, some 10 us for each step.

    Args:
        nbytes: of the whole vector: the concatenation, for what gathers or scatters.
        protocol: one of the topology's; the fastest of them, if None.
        segment: bytes of the longest message; None for messages that are not cut; "auto" for the fastest of `CUTS`,
            which have lanes of their own.
        lanes: segments that are under way at once.
        method: "auto", or one of `METHODS`. Auto takes symmetry where there is one, else events, and the closed form
            where that is more than `MOST` operations or `LOWERED` messages and blocks, or a rank has more than `STEPS`.
        in_place: whether input and output are one, so that nothing need be copied from one to the other.
        record: whether to keep a timeline.
        progress: called from time to time with the part that is done.

    Raises:
        ArgumentError: the topology has not so many ranks, or the algorithm does not run on them; no such protocol, root
            or method; no timeline or symmetry of what was asked for.
        ScheduleError: the schedule never ends, or it is wrong.
    """
    _check(algorithm, ranks, topology, nbytes, root, protocol, segment, lanes, method)
    algorithm = in_units(algorithm, ranks, topology)
    task = _Task(algorithm, ranks, nbytes, root, in_place)
    task.choose(method, topology)
    cuts = task.cuts() if isinstance(segment, str) else [task.cut(segment, lanes)]
    task.limit(method, cuts[0], record)
    ways = [
        (cut, name)
        for cut in cuts
        for name in ([protocol] if protocol or not topology.protocols else topology.protocols)
    ]

    def run(number: int, way: tuple[_Cut, str | None], record: bool) -> Simulation:
        def part(done: float) -> None:
            if progress:
                progress((number + done) / runs)

        return task.run(topology, *way, record, part)

    runs = len(ways) + (record and len(ways) > 1)
    found = [run(number, way, record and len(ways) == 1) for number, way in enumerate(ways)]
    best = min(range(len(ways)), key=lambda number: found[number].seconds)
    return run(len(ways), ways[best], True) if runs > len(ways) else found[best]


def in_units(algorithm: Algorithm, ranks: int, topology: Topology) -> Algorithm:
    """The algorithm among the topology's units, if it is one of groups and says nothing of them: among the largest that
    are several, as a communicator's is among its hosts."""
    unit = max((unit for unit in topology.units if 1 < unit < ranks), default=0)
    rest = f"+{ranks % unit}" if unit and ranks % unit else ""
    return among(algorithm, lambda: f"{ranks // unit}x{unit}{rest}") if unit else algorithm


def cut(algorithm: Algorithm, ranks: int, nbytes: int, segment: int | None) -> tuple[float, int]:
    """Bytes of a block in a segment, and how many segments there are: no message is longer than `segment` bytes.

    Blocks and segments are taken to be of equal length; as in `bind`, no segment is longer than whole cache lines.
    """
    blocks = algorithm.blocks(ranks) if algorithm.collective.cut else ranks
    block = 0.0 if algorithm.collective is Collective.BARRIER else nbytes / blocks
    if segment is None or not block:
        return block, 1
    longest = segment / max(1, algorithm.largest(ranks))
    longest = longest - longest % ALIGNMENT if longest > ALIGNMENT else longest
    segments = max(1, ceil(block / longest))
    return block / segments, segments


class _Cut(NamedTuple):
    """How blocks are cut: `segment` as asked for, bytes of a block in a segment."""

    segment: int | None
    segments: int
    lanes: int
    block: float


class _Task:
    """A collective that is to be simulated: what does not depend on cut and protocol is found once."""

    def __init__(self, algorithm: Algorithm, ranks: int, nbytes: int, root: int, in_place: bool) -> None:
        self.algorithm, self.ranks, self.nbytes, self.root = algorithm, ranks, nbytes, root
        self.in_place = in_place
        self.symmetry = Symmetry(ranks)
        self.method = EVENTS
        self.untried: tuple[int, ...] = ()

    def cut(self, segment: int | None, lanes: int) -> _Cut:
        """So that no message is longer than a segment."""
        block, segments = cut(self.algorithm, self.ranks, self.nbytes, segment)
        return _Cut(segment, segments, min(lanes, segments), block)

    def cuts(self) -> list[_Cut]:
        """Not cut, and cut in those of `CUTS` that shorten messages and are not too much."""
        whole, *several = (self.cut(segment, lanes) for segment, lanes in CUTS)
        several = [cut for cut in several if cut.segments > 1]
        tried = [cut for cut in several if self.operations * cut.segments <= TRIED]
        self.untried = tuple(cut.segment for cut in several[len(tried) :] if cut.segment)
        return [whole, *tried]

    def choose(self, method: str, topology: Topology) -> None:
        """How it is to be found.

        Raises:
            ArgumentError: there is no symmetry, and it was asked for.
        """
        if method == CLOSED_FORM or (method == AUTO and self.is_long):
            self.method = CLOSED_FORM
        if method != EVENTS and self.root == 0 and not self.is_long:
            found = find(self.algorithm, self.ranks, topology)
            if found:
                self.symmetry = found
                self.method = CLOSED_FORM if method == CLOSED_FORM else SYMMETRY
        if method == SYMMETRY and self.method != SYMMETRY:
            raise ArgumentError(
                f"{self.algorithm.name} shows no symmetry on {count(self.ranks, 'rank')} of {topology.name}: "
                f'leave the method out, or take "{EVENTS}"'
            )

    def limit(self, method: str, cut: _Cut, record: bool) -> None:
        """Leave what is too much for events to the closed form.

        Raises:
            ArgumentError: what was asked for is too much, or has no timeline.
        """
        walks = self.method != CLOSED_FORM
        if walks and method == AUTO and (self.operations * cut.segments > MOST or self.lowered_parts > LOWERED):
            self.method = CLOSED_FORM
        whose = f"{self.algorithm.name} on {count(self.ranks, 'rank')}"
        held = self.operations * cut.lanes
        if self.method != CLOSED_FORM and held > HELD:
            raise ArgumentError(
                f"{whose} has about {held:,} operations in all lanes, and {HELD:,} can be held in memory: "
                f'take fewer ranks or lanes, or the method "{CLOSED_FORM}"'
            )
        if record and self.method == CLOSED_FORM:
            why = "" if method == CLOSED_FORM else f", and {whose} is too much for events"
            raise ArgumentError(f"a closed form has no timeline{why}: take fewer ranks or segments")

    @cached_property
    def declared_steps(self) -> int:
        """The steps that are declared, 0 if none are."""
        counts = self.algorithm.counts(self.ranks) if self.algorithm.counts else None
        return counts.steps if counts else 0

    @property
    def is_long(self) -> bool:
        """Whether a rank has, by what is declared, more steps than one wants to write down."""
        return self.declared_steps > STEPS

    @property
    def operations(self) -> int:
        """About how many operations of a segment are walked over."""
        return 3 * self._size[0]

    @property
    def lowered_parts(self) -> int:
        """About how many messages and blocks are lowered."""
        return sum(self._size)

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Messages, and blocks in them and at the ends, of the ranks that are walked over: some are looked at, or what
        is declared."""
        kind, cut_into = self.algorithm.collective, self.algorithm.blocks(self.ranks)
        blocks = max(len(ends(0, self.ranks, cut_into)) for ends in (kind.before, kind.after))
        if self.is_long:
            return 2 * self.declared_steps * self.symmetry.period, (self.declared_steps + blocks) * self.symmetry.period
        # Round numbers are not typical of ranks: the root of a tree is one. The golden ratio scatters.
        scattered = {int(number * 0.618034 * self.ranks) % self.ranks for number in range(1, 10)}
        some = [0] if self.symmetry.period < self.ranks else sorted(scattered)
        messages = parts = 0
        for rank in some:
            for step in self.algorithm.program(rank, self.ranks, self.root):
                messages += len(step)
                parts += sum(len(message.blocks) for message in step)
        each = self.symmetry.period / len(some)
        return int(messages * each), int(parts * each) + blocks * self.symmetry.period

    def run(
        self,
        topology: Topology,
        cut: _Cut,
        protocol: str | None,
        record: bool,
        progress: Callable[[float], None],
    ) -> Simulation:
        """Simulate it in one way."""
        flat = topology.without_protocols(protocol, self.nbytes)
        common = Simulation(
            self.algorithm,
            self.ranks,
            self.nbytes,
            protocol,
            cut.segment,
            cut.segments,
            cut.lanes,
            self.method,
            0,
            0.0,
            untried=self.untried,
        )
        if self.method == CLOSED_FORM:
            alike = not self.is_long and is_rotated(self.algorithm, self.ranks)
            seconds = closed_form(
                self.algorithm, self.ranks, self.root, flat, cut.block, cut.segments, cut.lanes, alike
            )
            return replace(common, seconds=seconds)
        engine = Engine(
            (self.ranks, self.symmetry.period, self.symmetry.mirrored),
            list(levels_of(flat, self.ranks)),
            costs_of(flat),
            (cut.block, cut.segments, cut.lanes, tile(flat, self.ranks)),
            self.in_place,
            record,
        )
        # Writing the schedules down and walking over them take about as long as each other.
        for number, code in enumerate(self.lowered()):
            try:
                engine.add(code)
            except ValueError as error:
                raise self.wrong(f"rank {number}: {error}") from None
            progress((number + 1) / self.symmetry.period / 2)
        start = time.perf_counter()
        while not engine.run(CHUNK):
            progress((1 + engine.progress) / 2)
        took = time.perf_counter() - start
        if engine.problem:
            raise self.wrong(engine.problem)
        busy = dict(zip((level.name for level in flat.levels), engine.busiest_links))
        used = {level.name: busy[level.name] for level in flat.levels if level.links}
        used[flat.rank.name] = engine.busiest_rank
        return replace(
            common,
            simulated=self.symmetry.period,
            seconds=engine.seconds,
            events=engine.events,
            messages=engine.messages,
            took=took,
            utilisation={name: seconds / engine.seconds if engine.seconds else 0.0 for name, seconds in used.items()},
            timeline=Timeline(**engine.columns()) if record else None,
        )

    def wrong(self, why: str) -> ScheduleError:
        """What is raised of a schedule that can not be run."""
        whose = f"{self.algorithm.collective.value} {self.algorithm.name} on {count(self.ranks, 'rank')}"
        return ScheduleError(f"{whose} is wrong: {why}; `abccl verify` names the step")

    def lowered(self) -> Iterator[npt.NDArray[np.int32]]:
        """The code of the ranks that are walked over; if it is not much, it is kept for who simulates the same next."""
        key = (self.algorithm, self.ranks, self.root, self.symmetry.period)
        if key in _kept:
            yield from _kept[key]
            return
        kept: list[npt.NDArray[np.int32]] = []
        for rank in range(self.symmetry.period):
            code = lower(self.algorithm, rank, self.ranks, self.root).code
            if self.lowered_parts <= KEPT:
                kept.append(code)
            yield code
        if kept:
            _kept[key] = kept
            for oldest in list(_kept)[:-SIMULATIONS]:
                _kept.pop(oldest, None)


_kept: dict[tuple[Algorithm, int, int, int], list[npt.NDArray[np.int32]]] = {}
"""The code of the ranks that were walked over, of the schedules that were simulated last."""

on_redefinition.append(_kept.clear)


def _check(
    algorithm: Algorithm,
    ranks: int,
    topology: Topology,
    nbytes: int,
    root: int,
    protocol: str | None,
    segment: int | str | None,
    lanes: int,
    method: str,
) -> None:
    if isinstance(segment, str) and segment != AUTO:
        raise ArgumentError(f'segment is {segment!r}: wanted is a number of bytes, None, or "{AUTO}"')
    numbers: list[tuple[str, object, int]] = [("ranks", ranks, 1), ("nbytes", nbytes, 0), ("lanes", lanes, 1)]
    if segment is not None and segment != AUTO:
        numbers.append(("segment", segment, 1))
    for what, value, least in numbers:
        if not is_whole(value, least):
            raise ArgumentError(f"{what} is {value!r}: wanted is an integer, {least} or more")
    topology.check(ranks)
    wants = algorithm.refusal(ranks)
    if wants:
        raise ArgumentError(f"{algorithm.collective.value} {algorithm.name} wants {wants}, and there are {ranks}")
    if not 0 <= root < ranks or (root and not algorithm.collective.rooted):
        raise ArgumentError(
            f"{algorithm.collective.value} has no root {root} among {count(ranks, 'rank')}: leave it out"
        )
    if protocol is not None and protocol not in topology.protocols:
        there = did_you_mean(protocol, topology.protocols) if topology.protocols else "it has none, leave it out"
        raise ArgumentError(f"{topology.name} has no protocol {protocol!r}: {there}")
    if method not in (AUTO, *METHODS):
        raise ArgumentError(f"no method is called {method!r}: {did_you_mean(method, ('auto', *METHODS))}")
