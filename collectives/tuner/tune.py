"""Tuning at leisure: the candidates that are predicted to be the best are measured, and their times kept in the table.

A candidate is measured at the size where it is among the best and at the sizes beside it, so that between two sizes
the best of both are known. Candidates take turns, so that whatever else the machine does meets all alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ...algorithms import Collective
from ...transports.topology import Exchange
from .candidates import Candidate, Place, candidates
from .choice import Choice
from .stopwatch import Stopwatch, Subject
from .table import Measured, Table

ROUNDS, FEWEST_ROUNDS = 15, 5
LONGEST = 1000
"""Calls in a row, at most."""

WAYS = 2
"""Of running one algorithm, among the best candidates of a size."""

FACTOR = 4
"""Of two sizes, at most: no time is taken for known between sizes that are further apart."""


@dataclass(frozen=True)
class Wish:
    """What is to be measured.

    Attributes:
        sizes: bytes of the whole vector, ascending.
        seconds: for each candidate at each size.
        best: how many candidates at each size.
    """

    collectives: tuple[Collective, ...]
    sizes: tuple[int, ...]
    seconds: float
    best: int


@dataclass(frozen=True)
class Trial:
    """What the candidates took at a size, the fastest first."""

    collective: Collective
    nbytes: int
    candidates: tuple[Candidate, ...]

    @property
    def winner(self) -> Candidate:
        """The fastest."""
        return self.candidates[0]


def trials(
    stopwatch: Stopwatch,
    place: Place,
    exchange: Exchange,
    table: Table,
    wish: Wish,
    works_on: Callable[[Collective, int], None] = lambda collective, nbytes: None,
) -> Iterator[Trial]:
    """Measure, size by size. Collective: the same on all ranks.

    Args:
        exchange: an all-gather of blobs among the ranks.
        table: says which candidates are predicted to be the best.
        works_on: told what is measured next.
    """
    for collective in wish.collectives:
        for nbytes, found in _best(collective, wish, place, table).items():
            works_on(collective, nbytes)
            subjects = [stopwatch.subject(collective, nbytes, one.choice) for one in found]
            took = _times(stopwatch, subjects, wish.seconds, exchange)
            measured = [replace(one, measured=seconds) for one, seconds in zip(found, took)]
            yield Trial(collective, nbytes, tuple(sorted(measured, key=lambda one: one.seconds)))


def with_trials(table: Table, found: Sequence[Trial], before: Table | None = None) -> Table:
    """The table with what was measured.

    Args:
        before: its measured times are kept where there are no new ones.
    """
    measured = dict(before.measured) if before else {}
    natives = dict(table.natives)
    for collective in {trial.collective for trial in found}:
        here = [trial for trial in found if trial.collective is collective]
        new, points = [], dict(natives.get(collective.value, ()))
        for trial in here:
            for one in trial.candidates:
                if one.choice.algorithm == "native":
                    points[trial.nbytes] = one.seconds
                else:
                    new.append(_kept(trial.nbytes, one))
        sizes = {trial.nbytes for trial in here}
        old = [one for one in measured.get(collective.value, ()) if one.nbytes not in sizes]
        measured[collective.value] = tuple(sorted([*old, *new], key=lambda one: (one.nbytes, one.seconds)))
        if points:
            natives[collective.value] = tuple(sorted(points.items()))
    return replace(table, measured=measured, natives=natives)


def _kept(nbytes: int, one: Candidate) -> Measured:
    choice = one.choice
    return Measured(nbytes, choice.algorithm_name, choice.protocol, choice.segment, choice.lanes, one.seconds)


def _best(collective: Collective, wish: Wish, place: Place, table: Table) -> dict[int, list[Candidate]]:
    """What is measured at each size: the best there and at the sizes beside it, and the engine's own collective."""
    known = {nbytes: _by_choice(collective, nbytes, place, table) for nbytes in wish.sizes}
    best = [_top(known[nbytes], wish.best) for nbytes in wish.sizes]
    own = [Candidate(Choice("native"), 0.0, 0.0, 0.0)] if collective in place.natives else []
    found = {}
    for index, nbytes in enumerate(wish.sizes):
        near = [choice for some in (best[index], *best[max(0, index - 1) : index + 2]) for choice in some]
        found[nbytes] = [known[nbytes][choice] for choice in dict.fromkeys(near) if choice in known[nbytes]] + own
    return found


def _top(ranked: Iterable[Choice], best: int) -> list[Choice]:
    """The first of them, none of whose algorithms comes more than WAYS times."""
    ways: Counter[str] = Counter()
    found = []
    for choice in ranked:
        ways[choice.algorithm_name] += 1
        if ways[choice.algorithm_name] <= WAYS:
            found.append(choice)
    return found[:best]


def _by_choice(collective: Collective, nbytes: int, place: Place, table: Table) -> dict[Choice, Candidate]:
    """All candidates, the best first."""
    found = sorted(candidates(collective, nbytes, place, table), key=lambda one: one.predicted)
    return {one.choice: one for one in found}


def _times(stopwatch: Stopwatch, subjects: Sequence[Subject], seconds: float, exchange: Exchange) -> list[float]:
    """The seconds of a call of each: the median of rounds, each of the slowest rank."""
    tried = [[stopwatch.seconds(subject, 1) for _ in range(3)] for subject in subjects]
    estimates = [max(1e-6, max(map(min, theirs))) for theirs in zip(*_told(exchange, tried))]
    slices = [max(estimate, seconds / ROUNDS) for estimate in estimates]
    rounds = min(max(int(seconds * len(subjects) / sum(slices)), FEWEST_ROUNDS), ROUNDS)
    calls = [min(LONGEST, round(slice / estimate)) for slice, estimate in zip(slices, estimates)]
    took: list[list[float]] = [[] for _ in subjects]
    for number in range(rounds):
        turn = range(len(subjects)) if number % 2 == 0 else reversed(range(len(subjects)))
        for which in turn:
            took[which].append(stopwatch.seconds(subjects[which], calls[which]))
    return [median(map(max, zip(*theirs))) for theirs in zip(*_told(exchange, took))]


def _told(exchange: Exchange, own: list[list[float]]) -> list[list[list[float]]]:
    """What every rank tells."""
    return [json.loads(blob) for blob in exchange(json.dumps(own).encode())]
