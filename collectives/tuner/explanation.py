"""Why a call is done as it is done, as data and in words."""

from __future__ import annotations

from dataclasses import dataclass

from ...algorithms import Collective
from ...algorithms.words import count, in_words
from .candidates import Candidate
from .choice import Choice

PLAIN = 1.02
"""A composition, or segments and lanes other than the transport's own, must be so many times as fast."""


@dataclass(frozen=True)
class Explanation:
    """Every candidate for a call, and why one was chosen. Print it: the best of each algorithm, the fastest first.

    Attributes:
        collective, nbytes, hosts: the call: what, on how many bytes, among which ranks.
        cores: of a host, for its ranks.
        choice: what runs it.
        source: "argument", "environment", "rule", "chooser", "measured" or "predicted".
        reason: the same in words.
        candidates: all with their prices, the fastest first.
        origin: of the table with the constants.
        link: the class of the links on a host.
    """

    collective: Collective
    nbytes: int
    hosts: tuple[tuple[int, ...], ...]
    cores: int
    choice: Choice
    source: str
    reason: str
    candidates: tuple[Candidate, ...]
    origin: str
    link: str

    @property
    def best(self) -> tuple[Candidate, ...]:
        """The best candidate of each algorithm, the fastest first."""
        found: dict[str, Candidate] = {}
        for candidate in self.candidates:
            found.setdefault(candidate.choice.algorithm_name, candidate)
        return tuple(found.values())

    def to_json(self) -> dict[str, object]:
        """It as JSON has it, times in seconds."""
        return {
            "collective": self.collective.value,
            "bytes": self.nbytes,
            "hosts": [list(host) for host in self.hosts],
            "cores": self.cores,
            "choice": self.choice.name,
            "source": self.source,
            "reason": self.reason,
            "origin": self.origin,
            "link": self.link,
            "candidates": [
                {
                    "choice": one.choice.name,
                    "same": list(one.same),
                    "alpha": one.alpha,
                    "beta": one.beta,
                    "gamma": one.gamma,
                    "predicted": one.predicted,
                    "measured": one.measured,
                }
                for one in self.candidates
            ],
        }

    def lines(self, every: bool = False) -> list[str]:
        """The table in lines; `every` candidate, or the best of each algorithm."""
        best = self.best
        shown = [one for one in self.candidates if every or one in best or one.choice == self.choice]
        ranks = count(sum(map(len, self.hosts)), "rank")
        where = f"{ranks} on {count(len(self.hosts), 'host')}"
        near = f" {self.link}" if max(map(len, self.hosts)) > 1 else ""
        cores = f"{self.cores}{near} core{'s' * (self.cores != 1)} for those of a host"
        lines = [
            f"{self.collective.value} of {in_words(self.nbytes)} among {where}, {cores}",
            f"constants: {self.origin}",
            "",
            f"{'':2}{'predicted':>12} = {'alpha':>10} + {'beta':>10} + {'gamma':>10}  {'measured':>10}  candidate",
        ]
        for one in shown:
            took = "" if one.measured is None else _time(one.measured)
            wins = "> " if one.choice == self.choice else "  "
            said = (
                f"{_time(one.predicted):>12} = {_time(one.alpha):>10} + {_time(one.beta):>10} + {_time(one.gamma):>10}"
            )
            if one.choice.algorithm_name == "native":
                said = f"{'':>12}   {'':>10}   {'':>10}   {'':>10}"
            also = f" (the same: {', '.join(one.same)})" if one.same and not every else ""
            lines.append(f"{wins}{said}  {took:>10}  {one.choice.name}{also}")
        return [*lines, "", self._why()]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _why(self) -> str:
        why = f"{self.choice.name}: {self.reason}"
        if self.source not in ("measured", "predicted"):
            return why
        mine = next((one for one in self.candidates if one.choice == self.choice), None)
        others = [one for one in self.best if one.choice.algorithm_name != self.choice.algorithm_name]
        if mine is not None and mine.measured is not None:
            others = [one for one in others if one.measured is not None]
        if mine is None or not others:
            return why
        next_best = min(others, key=lambda one: one.seconds)
        if next_best.seconds < mine.seconds:
            slower = mine.seconds / next_best.seconds
            plain = f"; {next_best.choice.name} promises {slower:.3f} times as much and is less plain"
            return f"{why} for sizes near this one" if slower > PLAIN else why + plain
        gain = next_best.seconds / mine.seconds if mine.seconds else 1.0
        if gain < 1.005:
            return f"{why}, with {next_best.choice.name}"
        why = f"{why}; {next_best.choice.name} comes next, {gain:.2f} times as long"
        if mine.measured is not None or next_best.measured is not None:
            return why
        parts = {word: getattr(next_best, word) - getattr(mine, word) for word in ("alpha", "beta", "gamma")}
        return f"{why}, most of it {max(parts, key=parts.__getitem__)}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    raise AssertionError
