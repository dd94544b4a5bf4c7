"""The measuring of a validation: all candidates of a case in turn, on a communicator whose link class stays.

Cores of virtual machines may be near at one moment and far at the next. So each case has a communicator of its own,
which finds out its link class and takes the table of that; if the one after it finds another, the case is measured
anew.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..algorithms import Collective, to_collective
from ..collectives import Communicator
from ..collectives.tuner import calibrate
from ..collectives.tuner.candidates import Candidate
from ..collectives.tuner.stopwatch import Stopwatch, Subject
from ..errors import ArgumentError
from .accuracy import Case, Timed
from .world import World

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")
K, M = 1 << 10, 1 << 20
SIZES = (
    *(4, 48, 160, 400, 1000, 1400, 3 * K, 5 * K, 7 * K, 10 * K, 24 * K, 40 * K, 60 * K, 150 * K, 200 * K, 300 * K),
    *(700 * K, 1 * M, 3 * M // 2, 2 * M, 6 * M, 10 * M, 24 * M, 40 * M, 48 * M),
)
FEW = (48, 1000, 10 * K, 60 * K, 300 * K, 3 * M // 2)
APART = 0.15
"""By how much a size must differ from those of the calibration."""

PROMISING = 1.5
"""Segments and lanes other than the transport's own are timed where they are predicted to be no slower than that."""

SCREENING, FINALISTS, FINAL = 3, 8, 12
"""Rounds of all candidates; the fastest of them; and their rounds, which take turns in two halves."""

SLICE, LONGEST = 0.002, 20000
"""Seconds of calls in a round, and how many calls at most."""

WARM, WARM_CALLS, WARM_LONGEST = 0.02, 16, 1.0
"""Of the chosen as users run it, whose plan tries protocols: untimed seconds, and calls if they take no longer than
the last."""

BUDGET = 6.0
"""Seconds for a case; slow ones have fewer rounds."""

TRIES = 5
"""How often a case is measured in which the link class changes."""

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What is to be measured: the collectives, sizes (none: SIZES), ranks and the seconds for a case."""

    collectives: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: int
    budget: float
    command: str


def cases(asked_for: Asked, ranks: int) -> list[tuple[Collective, int]]:
    """The collectives and sizes; none that the calibration uses, as vectors of whole float32 elements for each rank."""
    found = []
    for collective in map(to_collective, asked_for.collectives):
        unit = 4 if collective.cut else 4 * ranks
        for nbytes in asked_for.sizes:
            nbytes = -(-nbytes // unit) * unit
            if (collective, nbytes) not in found and all(abs(nbytes / n - 1) > APART for n in calibrate.SIZES):
                found.append((collective, nbytes))
    if not found:
        raise ArgumentError(f"no size is left: the calibration uses {calibrate.SIZES}, give others")
    return found


def contenders(found: Sequence[Candidate], chosen: Candidate) -> list[Candidate]:
    """Those candidates that are timed: every algorithm by every protocol, whatever is predicted of it; the others if
    they look promising; and the chosen one, which may be one of the size that stands for this one only."""
    limit = PROMISING * min(one.seconds for one in found)
    timed = [
        one
        for one in found
        if (one.choice.segment is None and one.choice.lanes is None)
        or one.seconds <= limit
        or one.choice == chosen.choice
    ]
    return timed if any(one.choice == chosen.choice for one in timed) else [*timed, chosen]


class Steady:
    """Measures while the link class stays what it is.

    Args:
        renew: makes a communicator, which finds out the link class.

    Attributes:
        discarded: how often the link class had changed.
    """

    def __init__(self, renew: Callable[[], Any]) -> None:
        self._renew, self.comm, self.discarded = renew, renew(), 0

    def measure(self, once: Callable[[Any], T]) -> T | None:
        """What `once` finds on a communicator whose link class is the same before and after; None if there is none."""
        for _ in range(TRIES):
            before, found = self.comm, once(self.comm)
            self.comm = self._renew()
            before.close()
            if self.comm.tuner.link == before.tuner.link:
                return found
            self.discarded += 1
        return None


class Rounds:
    """Times subjects in turn, in rounds; all ranks alike."""

    def __init__(self, world: World, stopwatch: Stopwatch, order: random.Random) -> None:
        self._world, self._stopwatch, self._order = world, stopwatch, order

    def estimate(self, subject: Subject) -> float:
        """Seconds of a call, roughly: of a few tries the fastest."""
        seconds = math.inf
        for tried in range(3):  # a call that was interrupted would say too much
            if tried == 2 and calls_in(seconds) == 1:
                break
            seconds = min(seconds, self._world.slowest(self._stopwatch.seconds(subject, calls_in(seconds))))
        return seconds

    def warm(self, subject: Subject) -> None:
        """Untimed calls, until a plan knows how to move its messages."""
        took = self._world.slowest(self._stopwatch.seconds(subject, 1))
        self._stopwatch.seconds(subject, warm_calls(took))

    def measure(self, subjects: Sequence[tuple[Subject, float]], rounds: int) -> list[list[float]]:
        """The slowest rank's seconds for a call, of each subject and round.

        Args:
            subjects: each with an estimate.
        """
        times = np.empty((len(subjects), rounds))
        turn = list(range(len(subjects)))
        for number in range(rounds):
            self._order.shuffle(turn)
            for which in turn:
                subject, estimate = subjects[which]
                times[which, number] = self._stopwatch.seconds(subject, calls_in(estimate))
        return [list(map(float, row)) for row in self._world.all(times).max(axis=0)]


def calls_in(seconds: float) -> int:
    """How many calls of so many seconds fill a slice."""
    return int(min(max(SLICE / seconds, 1), LONGEST))


def warm_calls(seconds: float) -> int:
    """How many calls of so many seconds run a plan in."""
    fewest = min(WARM_CALLS, WARM_LONGEST / seconds)
    return int(max(1, fewest, min(WARM / seconds, 5 * LONGEST)))


def rounds_for(estimates: Sequence[float], budget: float, most: int, fewest: int) -> int:
    """How many rounds of subjects that take so long fit so many seconds; an even number if the fewest are."""
    # The stopwatch makes a call that does not count, before those that do.
    one = sum(estimate * (1 + calls_in(estimate)) for estimate in estimates)
    return max(fewest, min(most, int(budget / one) // 2 * 2 if fewest % 2 == 0 else int(budget / one)))


def measure_case(
    comm: Communicator, world: World, collective: Collective, nbytes: int, number: int, budget: float
) -> Case:
    """Time the candidates of a case. All ranks call it; `number` is the case's."""
    if comm.tuner.table.measured:
        raise ArgumentError("the tuner has measured times, and predictions are to be validated: remove its table")
    decision = comm.tuner.decide(collective, nbytes)
    if decision.candidate is None:
        raise ArgumentError(f"{decision.reason}, and what the tuner chooses is to be validated: let it choose")
    chosen = decision.choice.name
    found = contenders(comm.tuner.candidates(collective, nbytes), decision.candidate)
    stopwatch = Stopwatch(comm._transport, comm._binder.bind)
    rounds = Rounds(world, stopwatch, random.Random(number))

    subjects = [stopwatch.subject(collective, nbytes, one.choice) for one in found]
    screened = [(subject, rounds.estimate(subject)) for subject in subjects]
    times = rounds.measure(screened, rounds_for([seconds for _, seconds in screened], budget / 2, SCREENING, 1))
    seconds = [float(np.median(row)) for row in times]

    names = [one.choice.name for one in found]
    fastest = sorted(range(len(found)), key=lambda which: seconds[which])[:FINALISTS]
    which_chosen = names.index(chosen)
    finalists = list(dict.fromkeys([which_chosen, *fastest]))
    forced, estimate = screened[which_chosen]
    users = Subject(
        comm._binder.bind(collective, forced.x, forced.out, "sum", 0, None), collective, forced.x, forced.out
    )
    rounds.warm(users)
    again = stopwatch.subject(collective, nbytes, decision.choice)
    rounds.estimate(again)
    final = [(users, estimate), (again, estimate), *(screened[which] for which in finalists)]
    repeated = rounds_for([estimate for _, estimate in final], budget / 2, FINAL, min(8, FINAL))
    of_users, of_again, *of_finalists = rounds.measure(final, repeated)

    late = dict(zip(finalists, of_finalists))
    timed = [
        Timed(name, one.predicted, float(np.median(times[which] + late.get(which, []))), tuple(late.get(which, ())))
        for which, (name, one) in enumerate(zip(names, found))
    ]
    return Case(collective.value, nbytes, comm.tuner.link, chosen, tuple(timed), tuple(of_users), tuple(of_again))
