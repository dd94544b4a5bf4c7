"""A schedule on a machine that need not be there: how long it takes, and what is busy meanwhile.

The event engine (`native/events.hpp`) walks the lowered code of every rank, the same code that the engines run, in the
order of time: messages take the links that they share in the order in which they come to them. Where all ranks do
alike, some stand for all, which is as exact. Where that is too much, a closed form is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError, ScheduleError
from ..collective import Collective
from ..plan import ALIGNMENT, lower
from ..registry import Algorithm
from ..words import count, did_you_mean
from ._events import Engine
from .closed_form import STEPS, closed_form
from .costs import costs_of, levels_of
from .symmetry import Symmetry, find, tile
from .topology import Topology

EVENTS, SYMMETRY, CLOSED_FORM = METHODS = ("events", "symmetry", "closed form")
"""All ranks, in the order of events; some that stand for all, alike; a formula."""

KINDS = ("send", "wait", "receive", "fold", "copy", "message")
"""Of slices of a timeline. A message's is from when it takes a link until it is there."""

MOST = 100_000_000
"""Operations that are walked over unless one asks for it: half a minute or so."""

CHUNK = 200_000
"""Events between two reports of progress."""


@dataclass(frozen=True)
class Timeline:
    """What ranks did when: arrays of one length, an entry for each slice of time, in seconds.

    Attributes:
        kind: an index into `KINDS`.
        peer: the rank at the other end; -1 where there is none.
        nbytes: that were sent, received, folded or copied; 0 for what does not depend on them.
    """

    rank: npt.NDArray[np.int32]
    lane: npt.NDArray[np.int32]
    segment: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int32]
    peer: npt.NDArray[np.int32]
    start: npt.NDArray[np.float64]
    end: npt.NDArray[np.float64]
    nbytes: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Simulation:
    """What a simulation found.

    Attributes:
        nbytes: of the whole vector, as everywhere.
        protocol: which of the topology's was used, None if it has none.
        segments, lanes: into how many segments the blocks are cut, and how many are under way at once.
        method: how it was found, of `METHODS`.
        simulated: how many ranks were walked over.
        seconds: from when all ranks begin until the last one ends.
        events: operations of ranks and arrivals of messages that were walked over.
        messages: that were walked over.
        took: seconds in the event engine.
        utilisation: for each level with links, for which part of the time its busiest link was; and by the rank's name
            the busiest rank, waits left out.
        timeline: if it was asked for; only the ranks that were walked over.
    """

    algorithm: Algorithm
    ranks: int
    nbytes: int
    protocol: str | None
    segments: int
    lanes: int
    method: str
    simulated: int
    seconds: float
    events: int = 0
    messages: int = 0
    took: float = 0.0
    utilisation: dict[str, float] | None = None
    timeline: Timeline | None = None

    @property
    def algbw(self) -> float:
        """Algorithm bandwidth, bytes per second."""
        return self.nbytes / self.seconds if self.seconds else 0.0

    @property
    def busbw(self) -> float:
        """Bus bandwidth, bytes per second: see `Collective.bus_factor`."""
        return self.algbw * self.algorithm.collective.bus_factor(self.ranks)


def simulate(
    algorithm: Algorithm,
    ranks: int,
    topology: Topology,
    nbytes: int,
    *,
    root: int = 0,
    protocol: str | None = None,
    segment: int | None = None,
    lanes: int = 1,
    method: str = "auto",
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
        segment: bytes of the longest message; None for messages that are not cut.
        lanes: segments that are under way at once.
        method: "auto", or one of `METHODS`. Auto takes symmetry where there is one, else events, up to `MOST` of them,
            else the closed form.
        in_place: whether input and output are one, so that nothing need be copied from one to the other.
        record: whether to keep a timeline.
        progress: called from time to time with the part that is done.

    Raises:
        ArgumentError: the topology has not so many ranks, or the algorithm does not run on them; no such protocol, root
            or method; no timeline or symmetry of what was asked for.
        ScheduleError: the schedule never ends, or it is wrong.
    """
    _check(algorithm, ranks, topology, nbytes, root, protocol, segment, lanes, method)
    known = [protocol] if protocol or not topology.protocols else list(topology.protocols)
    task = _Task(algorithm, ranks, nbytes, root, segment, lanes, in_place)
    task.choose(method, topology, record)

    def run(number: int, name: str | None, record: bool) -> Simulation:
        def part(done: float) -> None:
            if progress:
                progress((number + done) / runs)

        return task.run(topology, name, record, part)

    runs = len(known) + (record and len(known) > 1)
    found = [run(number, name, record and len(known) == 1) for number, name in enumerate(known)]
    best = min(found, key=lambda one: one.seconds)
    return run(len(known), best.protocol, True) if runs > len(known) else best


class _Task:
    """A collective that is to be simulated: what does not depend on the protocol is found once."""

    def __init__(
        self, algorithm: Algorithm, ranks: int, nbytes: int, root: int, segment: int | None, lanes: int, in_place: bool
    ) -> None:
        self.algorithm, self.ranks, self.nbytes, self.root = algorithm, ranks, nbytes, root
        self.in_place = in_place
        blocks = algorithm.blocks(ranks) if algorithm.collective.cut else ranks
        block = 0.0 if algorithm.collective is Collective.BARRIER else nbytes / blocks
        self.segments = 1
        if segment is not None and block:
            longest = segment / max(1, algorithm.largest(ranks))
            longest = longest - longest % ALIGNMENT if longest > ALIGNMENT else longest
            self.segments = max(1, int(-(-block // longest)))
        self.lanes = min(lanes, self.segments)
        self.block = block / self.segments
        self.symmetry = Symmetry(ranks)
        self.method = EVENTS
        self.code: list[npt.NDArray[np.int32]] = []

    def choose(self, method: str, topology: Topology, record: bool) -> None:
        """How it is to be found.

        Raises:
            ArgumentError: not as was asked for.
        """
        counts = self.algorithm.counts(self.ranks) if self.algorithm.counts else None
        if method == CLOSED_FORM:
            self.method = CLOSED_FORM
        if counts is not None and counts.steps > STEPS and method == "auto":
            self.method = CLOSED_FORM
        elif method != EVENTS and self.root == 0:
            found = find(self.algorithm, self.ranks, topology)
            if found:
                self.symmetry = found
                self.method = CLOSED_FORM if method == CLOSED_FORM else SYMMETRY
        if method == SYMMETRY and self.method != SYMMETRY:
            raise ArgumentError(
                f"{self.algorithm.name} shows no symmetry on {count(self.ranks, 'rank')} of {topology.name}: "
                f'leave the method out, or take "{EVENTS}"'
            )
        if method == "auto" and self.method != CLOSED_FORM and self.operations() > MOST:
            self.method = CLOSED_FORM
        if record and self.method == CLOSED_FORM:
            why = (
                ""
                if method == CLOSED_FORM
                else f", and {self.algorithm.name} on {count(self.ranks, 'rank')} is too much for events"
            )
            raise ArgumentError(
                f'a closed form has no timeline{why}: take fewer ranks or segments, or the method "{EVENTS}"'
            )

    def operations(self) -> int:
        """About how many operations the ranks have that would be walked over, by some of them."""
        some = [0] if self.method == SYMMETRY else sorted({0, self.ranks // 2, self.ranks - 1})
        messages = sum(
            len(step) for rank in some for step in self.algorithm.program(rank, self.ranks, self.root)
        ) / len(some)
        return int(3 * messages * self.symmetry.period * self.segments)

    def run(
        self, topology: Topology, protocol: str | None, record: bool, progress: Callable[[float], None]
    ) -> Simulation:
        """Simulate it with one protocol."""
        flat = topology.without_protocols(protocol, self.nbytes)
        common = Simulation(
            self.algorithm, self.ranks, self.nbytes, protocol, self.segments, self.lanes, self.method, 0, 0.0
        )
        if self.method == CLOSED_FORM:
            alike = self.symmetry.period < self.ranks
            seconds = closed_form(
                self.algorithm, self.ranks, self.root, flat, self.block, self.segments, self.lanes, alike
            )
            return replace(common, seconds=seconds)
        engine = Engine(
            (self.ranks, self.symmetry.period, self.symmetry.mirrored),
            list(levels_of(flat, self.ranks)),
            costs_of(flat),
            (self.block, self.segments, self.lanes, tile(flat, self.ranks)),
            self.in_place,
            record,
        )
        # Writing the schedules down and walking over them take about as long as each other.
        for code in self.lowered(lambda done: progress(done / 2)):
            engine.add(code)
        start = time.perf_counter()
        while not engine.run(CHUNK):
            progress((1 + engine.progress) / 2)
        took = time.perf_counter() - start
        if engine.stuck:
            raise ScheduleError(
                f"{self.algorithm.collective.value} {self.algorithm.name} never ends on {count(self.ranks, 'rank')}: "
                f"{engine.stuck}; `abccl verify` names the step"
            )
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

    def lowered(self, progress: Callable[[float], None]) -> list[npt.NDArray[np.int32]]:
        """The code of the ranks that are walked over; kept, since each protocol wants it."""
        while len(self.code) < self.symmetry.period:
            self.code.append(lower(self.algorithm, len(self.code), self.ranks, self.root).code)
            progress(len(self.code) / self.symmetry.period)
        return self.code


def _check(
    algorithm: Algorithm,
    ranks: int,
    topology: Topology,
    nbytes: int,
    root: int,
    protocol: str | None,
    segment: int | None,
    lanes: int,
    method: str,
) -> None:
    for what, value, least in (
        ("ranks", ranks, 1),
        ("nbytes", nbytes, 0),
        ("lanes", lanes, 1),
        ("segment", segment, 1),
    ):
        if value is not None and value < least:
            raise ArgumentError(f"{what} is {value}: wanted is {least} or more")
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
    if method not in ("auto", *METHODS):
        raise ArgumentError(f"no method is called {method!r}: {did_you_mean(method, ('auto', *METHODS))}")
