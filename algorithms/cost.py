"""What a schedule costs: its counts, measured, and the time they take on a link."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from ..errors import ScheduleError
from .collective import Collective
from .registry import Algorithm, Counts
from .replay import Replay, replay
from .schedule import Recv, Send, Step
from .words import count


@dataclass(frozen=True)
class Link:
    """The alpha-beta-gamma model of the way between two ranks.

    Hockney 1994; gamma from Thakur, Rabenseifner & Gropp 2005.

    Attributes:
        alpha: seconds per message, whatever its length.
        beta: seconds per byte sent.
        gamma: seconds per byte folded.
    """

    alpha: float
    beta: float
    gamma: float

    def seconds(self, counts: Counts, size_in_bytes: int) -> float:
        """The time of a collective over a vector of `size_in_bytes`, its messages neither cut nor overlapped."""
        sent, folded = size_in_bytes * float(counts.sent), size_in_bytes * float(counts.folded)
        return counts.steps * self.alpha + sent * self.beta + folded * self.gamma


def counts(algorithm: Algorithm, size: int) -> Counts:
    """The counts of the schedule itself, to be held against its closed form `algorithm.counts(size)`.

    A k-way fold counts as k - 1 additions of a block. A barrier's blocks are empty and count nothing.

    Raises:
        ScheduleError: the schedule is wrong.
        ArgumentError: the algorithm does not run on `size` ranks.
    """
    return measured(replay(algorithm, size))


def measured(run: Replay) -> Counts:
    """The counts of a replayed schedule."""
    empty = run.algorithm.collective is Collective.BARRIER
    block = Fraction(0) if empty else Fraction(1, run.blocks)
    return Counts(
        run.steps,
        block * max(map(_sent, run.programs)),
        block * max(map(_folded, run.programs)),
    )


def check_counts(run: Replay) -> None:
    """Hold the closed form that an algorithm declares, if it does, against its schedule.

    Raises:
        ScheduleError: they differ.
    """
    declared = run.algorithm.counts(run.size) if run.algorithm.counts else None
    if declared is not None and declared != measured(run):
        name = f"{run.algorithm.collective.value} {run.algorithm.name}, {count(run.size, 'rank')}"
        raise ScheduleError(f"{name}: the schedule has {_say(measured(run))}; declared are {_say(declared)}")


def is_balanced(algorithm: Algorithm, size: int, steps: int) -> bool:
    """Whether all ranks send and fold as much, and send in each of so many steps, so that they end together."""
    programs = [algorithm.program(rank, size) for rank in range(size)]
    sends = all(any(isinstance(m, Send) for m in step) for program in programs for step in program)
    sent = {sum(len(m.blocks) for step in program for m in step if isinstance(m, Send)) for program in programs}
    folded = {sum(len(m.blocks) for step in program for m in step if isinstance(m, Recv)) for program in programs}
    return sends and {len(program) for program in programs} == {steps} and len(sent) == len(folded) == 1


def _say(counts: Counts) -> str:
    return f"{count(counts.steps, 'step')}, {counts.sent} sent, {counts.folded} folded"


def _sent(program: list[Step]) -> int:
    return sum(len(m.blocks) for step in program for m in step if isinstance(m, Send))


def _folded(program: list[Step]) -> int:
    return sum(len(m.blocks) for step in program for m in step if isinstance(m, Recv) and m.reduce)
