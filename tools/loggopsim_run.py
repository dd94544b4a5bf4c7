"""The same schedules and constants for LogGOPSim and for the simulator, and what both say.

Hoefler, Schneider & Lumsdaine 2010.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from ..algorithms import Algorithm, lookup, to_collective
from ..algorithms.schedule import Send
from ..algorithms.simulator import EVENTS, Level, Links, Rank, Simulation, Topology, simulate
from ..algorithms.simulator import cut as cut_of
from ..errors import TransportError
from .goal import goal

PICO = 1e-12
"""A unit of LogGOPSim's time: its constants are integers."""

RANKS = (4, 16, 64, 256, 1024)
SIZES = (8, 64 << 10, 16 << 20)
SEGMENT, LANES = 64 << 10, 8

MESSAGES = 600_000
"""A case with more is left out: GOAL is text, and LogGOPSim looks for a message in a list."""

PATIENCE = 600
"""Seconds for a run of LogGOPSim."""

IN_TURN = (
    "all_reduce ring",
    "all_reduce tree",
    "all_reduce recursive_doubling",
    "all_reduce rabenseifner",
    "broadcast chain",
    "broadcast tree",
    "reduce_scatter ring",
    "all_gather recursive_doubling",
    "all_to_all pairwise",
)
"""Whose ranks send a message, wait for one, and go on, all at the same pace."""

AT_ONCE = (
    "all_reduce double_tree",
    "all_reduce knomial",
    "all_reduce two_shot",
    "all_reduce direct",
    "broadcast scatter_all_gather",
    "all_to_all bruck",
    "all_to_all direct",
)
"""Whose ranks send and receive several messages in a step, or come to their steps at different times."""


@dataclass(frozen=True)
class Constants:
    """LogGP, in picoseconds: latency, overhead, gap per byte; and what it takes to fold a byte."""

    L: int
    o: int
    G: int
    fold: int

    def topology(self) -> Topology:
        """The machine in the words of abccl: every rank has a link in and one out, and a processor for each lane."""
        links = Links("rank", capacity=1 / (self.G * PICO)) if self.G else Links("rank")
        network = Level("network", 0, alpha=self.L * PICO, overhead=self.o * PICO, beta=self.G * PICO, links=links)
        return Topology("LogGP", "", Rank(fold=self.fold * PICO, processors=0), (network,))


@dataclass(frozen=True)
class Cut:
    """What is asked of an algorithm."""

    nbytes: int
    segment: int | None = None
    lanes: int = 1


@dataclass(frozen=True)
class Pair:
    """What both simulators say of a case, and how long it took them.

    Attributes:
        theirs: seconds that LogGOPSim predicts.
        events: that it counts.
        took: seconds of its process.
        converted: seconds of txt2bin.
        ours: what abccl says.
        whole: seconds of `simulate`, the schedule included.
    """

    theirs: float
    events: int
    took: float
    converted: float
    ours: Simulation
    whole: float

    @property
    def difference(self) -> float:
        """Of ours, as a part of theirs."""
        return self.ours.seconds / self.theirs - 1


@dataclass(frozen=True)
class Programs:
    """LogGOPSim and its txt2bin."""

    simulator: Path
    txt2bin: Path

    def pair(self, algorithm: Algorithm, ranks: int, cut: Cut, constants: Constants) -> Pair:
        """Ask both simulators.

        Raises:
            TransportError: one of the programs failed.
        """
        start = time.perf_counter()
        ours = simulate(
            algorithm,
            ranks,
            constants.topology(),
            cut.nbytes,
            segment=cut.segment,
            lanes=cut.lanes,
            method=EVENTS,
        )
        whole = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            text, binary = Path(folder, "schedule.goal"), Path(folder, "schedule.bin")
            with text.open("w", encoding="ascii") as file:
                file.writelines(
                    goal(
                        algorithm,
                        ranks,
                        cut.nbytes,
                        segment=cut.segment,
                        lanes=cut.lanes,
                        processors=0,
                        fold=constants.fold * PICO,
                        unit=PICO,
                    )
                )
            _, converted = _output([self.txt2bin, "-i", text, "-o", binary])
            named = {"-L": constants.L, "-o": constants.o, "-g": 0, "-G": constants.G, "-O": 0, "-S": 2**31 - 1}
            options = [str(word) for option in named.items() for word in option]
            said, took = _output([self.simulator, "-f", binary, "-b", *options])
        end = re.search(r"finishing time at host \d+: (\d+)", said)
        events = re.search(r"Events: (\d+)", said)
        if end is None or events is None:
            raise TransportError(f"{self.simulator} did not end all messages: {said.strip()[-200:]!r}")
        return Pair(int(end[1]) * PICO, int(events[1]), took, converted, ours, whole)


def _output(command: Sequence[str | Path]) -> tuple[str, float]:
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TransportError(f"{command[0]} can not be run: {error}") from error
    if done.returncode:
        raise TransportError(
            f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-200:]}"
        )
    return done.stdout, time.perf_counter() - start


@dataclass(frozen=True)
class Row:
    """An algorithm on so many ranks, with the pairs of all loads; None where there are too many messages."""

    name: str
    ranks: int
    pairs: tuple[Pair | None, ...]


Case = tuple[Cut, Constants]
"""A column of a table."""


def rows(programs: Programs, names: Sequence[str], most: int, cases: Sequence[Case]) -> Iterator[Row]:
    """The rows of a table, of up to `most` ranks; those with nothing in them are left out."""
    for name in names:
        collective, _, short = name.partition(" ")
        algorithm = lookup(to_collective(collective), short)
        for ranks in (number for number in RANKS if number <= most):
            messages = _messages(algorithm, ranks)
            pairs = tuple(
                programs.pair(algorithm, ranks, cut, constants) if _is_asked(algorithm, ranks, cut, messages) else None
                for cut, constants in cases
            )
            if any(pairs):
                yield Row(name, ranks, pairs)


def _is_asked(algorithm: Algorithm, ranks: int, cut: Cut, messages: int) -> bool:
    """Whether there are not too many messages, and several segments where they are asked for."""
    _, segments = cut_of(algorithm, ranks, cut.nbytes, cut.segment)
    return messages * segments <= MESSAGES and (cut.segment is None or segments > 1)


def _messages(algorithm: Algorithm, ranks: int) -> int:
    """How many the ranks send in a segment; counted no further than too many."""
    messages = 0
    for rank in range(ranks):
        messages += sum(isinstance(m, Send) for step in algorithm.program(rank, ranks) for m in step)
        if messages > MESSAGES:
            break
    return messages


@dataclass(frozen=True)
class Comparison:
    """All tables.

    Attributes:
        in_turn, at_once: whole vectors, of the algorithms of these names; `at_once` also without latency and overhead.
        segments: a vector cut in segments, with one lane and with several.
    """

    constants: Constants
    day: str
    in_turn: tuple[Row, ...]
    at_once: tuple[Row, ...]
    segments: tuple[Row, ...]


def compare(programs: Programs, constants: Constants, most: int, told: Callable[[Row], None]) -> Comparison:
    """Ask both simulators everything.

    Args:
        most: ranks.
        told: called with each row when it is there.

    Raises:
        TransportError: one of the programs failed.
    """
    whole = [(Cut(nbytes), constants) for nbytes in SIZES]
    free = replace(constants, L=0, o=0)
    cut = [(Cut(SIZES[-1], SEGMENT, lanes), constants) for lanes in (1, LANES)]
    tables = []
    for names, cases in ((IN_TURN, whole), (AT_ONCE, [*whole, (Cut(SIZES[-1]), free)]), (IN_TURN + AT_ONCE, cut)):
        found = []
        for row in rows(programs, names, most, cases):
            told(row)
            found.append(row)
        tables.append(tuple(found))
    return Comparison(constants, date.today().isoformat(), *tables)
