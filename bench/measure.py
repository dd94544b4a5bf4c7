"""Time per call, of several subjects in turn.

The subjects take turns in short slices (A B, B A, A B, ...), so that whatever else the machine does meets all alike. In
a slice the ranks leave a barrier together and make the calls back to back. A round's time is that of the slowest rank,
divided by the calls; the result is the median of the rounds.

Where calls do not wait for each other (a loop of broadcasts is a pipeline: the root runs ahead) there are three loops:

    latency     the root changes at random from call to call, so that each waits for the one before (as in IMB)
    isolated    a barrier before each call; the slowest rank's time from its leaving the barrier, averaged
    throughput  calls back to back with one root: what a pipeline delivers
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDS, FEWEST_ROUNDS = 40, 5
WARM_CALLS, WARM_LONGEST = 16, 1.0
"""Untimed calls for each root: libraries map memory and find out how to move it in the first few (OSU makes 10). Fewer
where they would take more than so many seconds."""
LONGEST_BATCH = 1000
WARM, TRIED = 0.002, 5
"""Seconds of calls in one try, and how often a fast subject is tried, to know how many calls fit its slice."""

Call = Callable[[], object]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Budget:
    """How long to measure each subject: so many seconds or, if given, so many calls."""

    seconds: float
    calls: int | None = None


@dataclass
class Subject:
    """A call to be timed.

    Attributes:
        calls: it, for each root that the loop goes through.
        refill: restores the input, untimed.
        limit: how often it may be called before it must be restored; None if it need not be.
    """

    calls: Sequence[Call]
    refill: Call
    limit: int | None


@dataclass(frozen=True)
class Timing:
    """What came of it, in seconds per call.

    Attributes:
        rounds: of the slowest rank, in each round.
        by_rank: each rank's own median.
        calls: made by each rank in all rounds.
    """

    rounds: tuple[float, ...]
    by_rank: tuple[float, ...]
    calls: int

    @property
    def seconds(self) -> float:
        """The median round."""
        return float(np.median(self.rounds))

    def divided(self, parts: int) -> Timing:
        """Of one of so many parts of a call."""
        return Timing(
            tuple(time / parts for time in self.rounds), tuple(time / parts for time in self.by_rank), self.calls
        )


class Meter:
    """Measures; all ranks alike.

    Args:
        barrier: of all ranks.
        slowest: the largest of a number that each rank gives.
        gather: the arrays of all ranks.
        isolated: whether a barrier goes before each call.
    """

    def __init__(
        self,
        barrier: Call,
        slowest: Callable[[float], float],
        gather: Callable[[Floats], Floats],
        isolated: bool = False,
    ) -> None:
        self.barrier, self.slowest, self.gather, self.isolated = barrier, slowest, gather, isolated

    def measure(self, subjects: Sequence[Subject], budget: Budget) -> list[Timing]:
        """Time the subjects, which have been called once, in turn."""
        orders = [roots(len(subject.calls)) for subject in subjects]
        collecting = gc.isenabled()
        gc.disable()
        try:
            estimates = [self._estimate(subject, order) for subject, order in zip(subjects, orders)]
            rounds, calls = plan(estimates, budget)
            times = np.empty((len(subjects), rounds))
            for number in range(rounds):
                turn = range(len(subjects)) if number % 2 == 0 else reversed(range(len(subjects)))
                for which in turn:
                    elapsed = self._slice(subjects[which], orders[which], calls[which])
                    times[which, number] = elapsed / calls[which]
        finally:
            if collecting:
                gc.enable()
        everyone = self.gather(times)
        slowest, medians = everyone.max(axis=0), np.median(everyone, axis=2)
        return [
            Timing(tuple(slowest[which].tolist()), tuple(medians[:, which].tolist()), rounds * calls[which])
            for which in range(len(subjects))
        ]

    def _estimate(self, subject: Subject, order: Iterator[int]) -> float:
        """The seconds of a call: of a few tries the fastest, since one that was interrupted would say too much."""
        calls, ways = 1, len(subject.calls)
        warm = max(self.slowest(self._slice(subject, order, ways)), 1e-9)
        if warm < WARM_LONGEST:
            self._slice(subject, order, ways * min(WARM_CALLS - 1, int(WARM_LONGEST / warm)))
        while (elapsed := self.slowest(self._slice(subject, order, calls))) < WARM and calls < LONGEST_BATCH:
            calls *= 4
        spent, fastest = elapsed, elapsed
        while spent < TRIED * WARM:
            elapsed = self.slowest(self._slice(subject, order, calls))
            spent, fastest = spent + elapsed, min(fastest, elapsed)
        return fastest / calls

    def _slice(self, subject: Subject, order: Iterator[int], calls: int) -> float:
        """This rank's seconds for so many calls."""
        total, clock = 0.0, time.perf_counter
        longest = 1 if self.isolated else min(subject.limit or LONGEST_BATCH, LONGEST_BATCH)
        while calls:
            number = min(calls, longest)
            batch = [subject.calls[root] for root in itertools.islice(order, number)]
            if subject.limit:
                subject.refill()
            self.barrier()
            start = clock()
            for call in batch:
                call()
            total += clock() - start
            calls -= number
        return total


def plan(estimates: Sequence[float], budget: Budget) -> tuple[int, list[int]]:
    """How many rounds, and how many calls of each subject in a round, for these estimates of a call's seconds."""
    if budget.calls is not None:
        rounds = min(ROUNDS, budget.calls)
        return rounds, [-(-budget.calls // rounds)] * len(estimates)
    slices = [max(estimate, budget.seconds / ROUNDS) for estimate in estimates]
    rounds = int(budget.seconds * len(estimates) / sum(slices))
    return min(max(rounds, FEWEST_ROUNDS), ROUNDS), [round(s / estimate) for s, estimate in zip(slices, estimates)]


def roots(number: int) -> Iterator[int]:
    """Indices below `number` in random order, the same on all ranks, none twice in a row."""
    if number == 1:
        return itertools.repeat(0)
    return _wander(number)


def _wander(number: int) -> Iterator[int]:
    draw, root = random.Random(number), 0
    while True:
        yield root
        root = (root + draw.randrange(1, number)) % number
