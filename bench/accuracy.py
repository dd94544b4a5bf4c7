"""How well the tuner chooses and predicts: the figures of a validation, and the bars that they are held against.

A case is a collective on a vector of some size. All of its candidates are timed in a few rounds, the fastest in more:
there they take turns with the chosen one as users run it, and with the chosen candidate a second time.

The time of the chosen one is divided by that of the best candidate twice. The least of many medians is too low, since
noise helps to be the least: `plain_ratio` is too high. `ratio` picks the best by every other round and takes its time
from the rounds between, both ways round: what whoever measured all candidates and took the best would find afterwards.
Noise may make it pick a wrong one, so that it is rather too low. It is the one that is held against the bar, as it
tells what measuring would have gained; with many rounds both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .run import geometric_mean

MEAN, NINETIETH, ERROR, COVERED = 1.10, 1.25, 0.30, 0.9
"""The bars: of the ratio's geometric mean and 90th percentile, of the median error; and the part of the cases that must
have been measured for the others to tell anything."""

FORMAT = 1


@dataclass(frozen=True)
class Timed:
    """A candidate; times are in seconds.

    Attributes:
        seconds: the median of all its rounds.
        rounds: where it took turns with the chosen one; none if it was too slow for that.
    """

    name: str
    predicted: float
    seconds: float
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Case:
    """A collective on a vector of some size.

    Attributes:
        link: the class of the links while it was measured.
        chosen: the name of the candidate that the tuner chose.
        candidates: all that were timed.
        users: the rounds of the chosen one, as users run it.
        again: the rounds of the chosen candidate as a second subject.
    """

    collective: str
    nbytes: int
    link: str
    chosen: str
    candidates: tuple[Timed, ...]
    users: tuple[float, ...]
    again: tuple[float, ...]

    @property
    def choice(self) -> Timed:
        """The chosen candidate."""
        return next(one for one in self.candidates if one.name == self.chosen)

    @property
    def finalists(self) -> list[Timed]:
        """The candidates that took turns with the chosen one."""
        return [one for one in self.candidates if one.rounds]

    @property
    def seconds(self) -> float:
        """The chosen one's, as users run it."""
        return median(self.users)

    @property
    def best(self) -> Timed:
        """The fastest candidate."""
        return min(self.finalists, key=lambda one: median(one.rounds))

    @property
    def plain_ratio(self) -> float:
        """The chosen one's time by the best candidate's, both of all rounds."""
        return self.seconds / median(self.best.rounds)

    @property
    def ratio(self) -> float:
        """The same, the best picked by half of the rounds and timed by the other half: see above."""
        return math.sqrt(self._ratio(0) * self._ratio(1))

    def _ratio(self, first: int) -> float:
        best = min(self.finalists, key=lambda one: median(one.rounds[1 - first :: 2]))
        return median(self.users[first::2]) / median(best.rounds[first::2])

    @property
    def spread(self) -> float:
        """The chosen candidate against itself, the slower of the two by the faster."""
        ratio = median(self.again) / median(self.choice.rounds)
        return max(ratio, 1 / ratio)

    @property
    def adapted(self) -> float:
        """The chosen one's time as users run it, by that of the same candidate forced: what its plan's trials of other
        protocols cost, or gain."""
        return self.seconds / median(self.choice.rounds)

    @property
    def predicted(self) -> float:
        """The predicted time of the chosen one by its time."""
        return self.choice.predicted / self.seconds

    @property
    def error(self) -> float:
        """How far the chosen one's prediction was off, as a part of its time."""
        return abs(self.predicted - 1)


@dataclass(frozen=True)
class Run:
    """A validation among some ranks.

    Attributes:
        date, machine, command: when, where and how.
        hosts: the numbers of ranks on each.
        tables: for each link class that was met, the origin and the residual of its table.
        cases: what was measured.
        discarded: how often the link class changed while a case was measured, so that it was measured anew.
        missing: cases that were given up, for the link class changed every time.
        took: seconds.
    """

    date: str
    machine: dict[str, Any]
    command: str
    hosts: tuple[int, ...]
    transport: str
    tables: dict[str, dict[str, Any]]
    cases: tuple[Case, ...]
    discarded: int = 0
    missing: tuple[str, ...] = ()
    took: float = 0.0
    format: int = field(default=FORMAT)

    @property
    def ranks(self) -> int:
        """How many took part."""
        return sum(self.hosts)

    @property
    def judged(self) -> bool:
        """Whether the bars hold for it: two ranks of one host, each with a core."""
        return self.hosts == (2,) and self.machine["cores"] >= 2

    @property
    def title(self) -> str:
        """It in words."""
        several = len(self.hosts) > 1
        return f"{self.ranks} ranks" + (f" on {len(self.hosts)} hosts, over {self.transport}" if several else "")

    def to_json(self) -> dict[str, Any]:
        """It as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Run:
        """The run that `to_json` gave.

        Raises:
            ArgumentError: it is none.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']}, and {FORMAT} is read: measure again")
            hosts, missing, cases = (tuple(data[name]) for name in ("hosts", "missing", "cases"))
            return cls(**{**data, "hosts": hosts, "missing": missing, "cases": tuple(map(_case, cases))})
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"this is no validation of `bench.validate`: {error}") from error


def _case(data: dict[str, Any]) -> Case:
    candidates = tuple(Timed(**{**one, "rounds": tuple(one["rounds"])}) for one in data["candidates"])
    return Case(**{**data, "candidates": candidates, "users": tuple(data["users"]), "again": tuple(data["again"])})


@dataclass(frozen=True)
class Figure:
    """A figure of a run, and its bar: None where none is wanted."""

    what: str
    value: float
    bar: float | None = None
    percent: bool = False
    least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the bar is reached."""
        return self.bar is None or (self.value >= self.bar if self.least else self.value <= self.bar)

    def written(self, value: float) -> str:
        """The value or the bar, as it is printed."""
        return f"{value:.0%}" if self.percent else f"{value:.3f}"

    @property
    def line(self) -> str:
        """It in words."""
        text = f"{self.what}: {self.written(self.value)}"
        if self.bar is None:
            return text
        wanted = f"at {'least' if self.least else 'most'} {self.written(self.bar)}"
        return f"{text} (wanted {wanted}: {'pass' if self.holds else 'FAIL'})"


def figures(cases: Sequence[Case], judged: bool = False, missing: int = 0) -> list[Figure]:
    """The figures of some cases; `judged`: with their bars."""

    def bar(value: float) -> float | None:
        return value if judged else None

    ratios, plain = [case.ratio for case in cases], [case.plain_ratio for case in cases]
    spreads, adapted = [case.spread for case in cases], [case.adapted for case in cases]
    return [
        Figure("chosen / best, geometric mean", geometric_mean(ratios), bar(MEAN)),
        Figure("chosen / best, 90th percentile", ninetieth(ratios), bar(NINETIETH)),
        Figure("chosen / best, not split, geometric mean", geometric_mean(plain), bar(MEAN)),
        Figure("chosen / best, not split, 90th percentile", ninetieth(plain), bar(NINETIETH)),
        Figure("chosen as users run it / forced, geometric mean", geometric_mean(adapted)),
        Figure("chosen as users run it / forced, 90th percentile", ninetieth(adapted)),
        Figure("a candidate / itself, geometric mean", geometric_mean(spreads)),
        Figure("a candidate / itself, 90th percentile", ninetieth(spreads)),
        Figure("error of the prediction of the chosen, median", median(c.error for c in cases), bar(ERROR), True),
        Figure("error of the prediction of all candidates, median", median(errors(cases)), bar(ERROR), True),
        Figure("cases measured", len(cases) / (len(cases) + missing), bar(COVERED), True, True),
    ]


def holds(run: Run) -> bool:
    """Whether all bars that are set for it are reached."""
    return bool(run.cases) and all(figure.holds for figure in figures(run.cases, run.judged, len(run.missing)))


def errors(cases: Sequence[Case]) -> list[float]:
    """How far the predictions of all candidates were off, as parts of their times."""
    return [abs(one.predicted / one.seconds - 1) for case in cases for one in case.candidates]


def ninetieth(values: Sequence[float]) -> float:
    """The 90th percentile, between the values next to it."""
    return float(np.percentile(values, 90))


def by(cases: Sequence[Case], what: Callable[[Case], str]) -> dict[str, list[Case]]:
    """The cases in groups, each by what they have in common, in the order in which they come."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(what(case), []).append(case)
    return found
