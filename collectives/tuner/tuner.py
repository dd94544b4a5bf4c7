"""The tuner: which candidate runs a call, why, and whether it took as long as was predicted.

Every rank chooses for itself and all come to the same choice: they have one table and one text of rules, rank 0's, and
price the same candidates by the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...algorithms import Algorithm, Collective
from ...errors import ArgumentError, UnknownAlgorithm
from . import asked
from .candidates import Candidate, Place, candidates, is_composed, native, on_hosts, priced
from .choice import Choice
from .explanation import PLAIN, Explanation
from .report import Drift, Report
from .rules import Rule
from .table import Measured, Table

AlgorithmLike = Algorithm | Choice | str | None
"""An algorithm, its name, a Choice with all that can be chosen, or None: let the tuner choose."""


@dataclass(frozen=True)
class Call:
    """What a chooser is asked about. The same on all ranks, and so must be its answer.

    Attributes:
        collective: what is called.
        nbytes: of the whole vector: the concatenation, for a collective that gathers or scatters.
        hosts: the ranks by host.
    """

    collective: Collective
    nbytes: int
    hosts: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> int:
        """How many take part."""
        return sum(map(len, self.hosts))


Chooser = Callable[[Call], AlgorithmLike]

Median = Callable[[], "float | None"]
"""The running median of a plan's runs in seconds, None if none was timed."""

_choosers: list[Chooser] = []


def register_chooser(chooser: Chooser) -> Chooser:
    """Ask this function about every call whose algorithm nobody has forced, before the tuner chooses.

    It gets a `Call` and returns an algorithm, its name, a `Choice`, or None to pass. It is asked once for arguments of
    a kind, on every rank, and must answer alike everywhere. The last one registered is asked first. May be used as a
    decorator; communicators that exist ask it about kinds of calls that they have not seen.
    """
    if not callable(chooser):
        raise ArgumentError(f"register_chooser wants a function of a Call, and got {chooser!r}")
    _choosers.append(chooser)
    return chooser


def unregister_chooser(chooser: Chooser) -> None:
    """Ask it no more."""
    if chooser not in _choosers:
        raise ArgumentError(f"unregister_chooser: {chooser!r} is no chooser that was registered")
    _choosers.remove(chooser)


@dataclass(frozen=True)
class Decision:
    """What runs a call, and who said so.

    Attributes:
        choice: what runs.
        source: "argument", "environment", "rule", "chooser", "measured" or "predicted".
        reason: the same in words.
        candidate: its price, where the tuner chose.
    """

    choice: Choice
    source: str
    reason: str
    candidate: Candidate | None = None

    @property
    def forced(self) -> bool:
        """Whether somebody wants just this, and not what the library thinks the fastest."""
        return self.candidate is None


def size_class(nbytes: int) -> int:
    """The size that stands for sizes like this, the largest of them: four in every octave, powers of two among them."""
    shift = max(0, (nbytes - 1).bit_length() - 3)
    return -(-nbytes >> shift) << shift if nbytes > 0 else 0


class Tuner:
    """Chooses for the ranks of one communicator.

    Args:
        place: where they are.
        table: what is known of them.
        rules: of the rule file.
        link: the class of the links on a host, "near" or "far".
        how: how it came by its table, in words.
    """

    def __init__(
        self, place: Place, table: Table, rules: Sequence[Rule] = (), link: str = "near", how: str = "built-in"
    ) -> None:
        self.place, self.table, self.rules, self.link, self.how = place, table, tuple(rules), link, how
        self._watched: dict[tuple[Collective, int], tuple[Candidate, Median]] = {}

    def decide(self, collective: Collective, nbytes: int, wanted: AlgorithmLike = None) -> Decision:
        """What runs a call on a vector of so many bytes; the concatenation, for what gathers or scatters.

        Args:
            wanted: by the caller.

        Raises:
            UnknownAlgorithm: there is none of that name.
            ArgumentError: what was asked for does not run on so many ranks, or is for another collective.
        """
        if wanted is not None:
            return Decision(self._choice(collective, wanted), "argument", "the caller asked for it")
        for source, who, answer in self._wishes(collective, nbytes):
            # Who wishes in general passes over what this engine lacks.
            if answer is None or (answer == asked.NATIVE and not self._has_native(collective)):
                continue
            try:
                return Decision(self._choice(collective, answer), source, f"{who} asks for it")
            except UnknownAlgorithm as error:
                raise UnknownAlgorithm(f"{who}: {error}") from None
            except ArgumentError as error:
                raise ArgumentError(f"{who}: {error}") from None
        best = self._fastest(collective, size_class(nbytes))
        source = "predicted" if best.measured is None else "measured"
        return Decision(best.choice, source, f"it is {source} to be the fastest", best)

    def _wishes(self, collective: Collective, nbytes: int) -> Iterator[tuple[str, str, AlgorithmLike]]:
        """What others than the caller want, by falling precedence: the kind of source, who it is, and the wish."""
        yield "environment", asked.ENVIRONMENT, asked.by_environment(collective)
        for rule in self.rules:
            if rule.holds(collective, nbytes, self.place.size, len(self.place.hosts)):
                native = rule.choice.algorithm == asked.NATIVE
                yield "rule", rule.source, asked.NATIVE if native else rule.choice
        for chooser in reversed(_choosers):
            name = getattr(chooser, "__qualname__", repr(chooser))
            yield "chooser", f"the chooser {name}", chooser(Call(collective, nbytes, self.place.hosts))

    def _has_native(self, collective: Collective) -> bool:
        return collective in self.place.natives and not self.place.reproducible

    def candidates(self, collective: Collective, nbytes: int) -> list[Candidate]:
        """All candidates with their times, the fastest first; where some were measured, these before all others."""
        known = self.table.measured.get(collective.value, ())
        found = [
            replace(one, measured=_measured(known, one.choice, nbytes))
            for one in candidates(collective, nbytes, self.place, self.table)
        ]
        # The engine's own collective is always measured.
        tuned = any(one.measured is not None for one in found)
        found += native(collective, nbytes, self.place, self.table)
        return sorted(found, key=lambda one: (tuned and one.measured is None, one.seconds))

    def explain(self, collective: Collective, nbytes: int, wanted: AlgorithmLike = None) -> Explanation:
        """Every candidate for a call, with its parts, and why the winner won: see `Explanation`."""
        decision = self.decide(collective, nbytes, wanted)
        if decision.choice.algorithm == asked.NATIVE and not self._has_native(collective):
            raise ArgumentError(f"{collective.value}: what carries messages here has none of its own: leave out native")
        found = self.candidates(collective, nbytes)
        forced, algorithm = decision.choice, decision.choice.algorithm
        if isinstance(algorithm, Algorithm) and all(one.choice != forced for one in found):
            found += priced(algorithm, [forced], nbytes, self.place, self.table)
        return Explanation(
            collective, nbytes, self.place.hosts, self.place.cores, forced, decision.source, decision.reason,
            tuple(found), self.table.told, self.link,
        )  # fmt: skip

    def watch(self, collective: Collective, nbytes: int, decision: Decision, median: Median) -> None:
        """From now on compare what a plan takes with what was said of it."""
        if decision.candidate is not None:
            self._watched[collective, size_class(nbytes)] = (decision.candidate, median)

    def report(self) -> Report:
        """Predictions and running medians of the calls that this rank made: see `Report`."""
        drifts = []
        for (collective, nbytes), (candidate, median) in list(self._watched.items()):
            took = median()
            if took is not None:
                drifts.append(Drift(collective, nbytes, candidate.choice.name, candidate.seconds, took))
        return Report(tuple(sorted(drifts, key=lambda d: (d.collective.value, d.nbytes))), self.table.told)

    def _fastest(self, collective: Collective, nbytes: int) -> Candidate:
        key = (self.place, collective, nbytes)
        if key not in self.table.chosen:
            everyone = self.candidates(collective, nbytes)
            # Where some were measured, those that were not do not count.
            alike = [one for one in everyone if (one.measured is None) == (everyone[0].measured is None)]
            self.table.chosen[key] = min(alike, key=_worth)
        found: Candidate = self.table.chosen[key]
        return found

    def _choice(self, collective: Collective, wanted: Any) -> Choice:
        if isinstance(wanted, Choice):
            if (wanted.lanes or 0) > self.place.lanes:
                raise ArgumentError(f"{wanted.lanes} lanes are asked for, and this transport has {self.place.lanes}")
            return replace(wanted, algorithm=self._algorithm(collective, wanted.algorithm))
        return Choice(self._algorithm(collective, wanted))

    def _algorithm(self, collective: Collective, wanted: Any) -> Algorithm | str:
        found = asked.algorithm(collective, wanted, self.place.size)
        return found if isinstance(found, str) else on_hosts(found, self.place.hosts)


def _worth(candidate: Candidate) -> float:
    """Seconds, and something for each departure from what is plain."""
    choice = candidate.choice
    composed = isinstance(choice.algorithm, Algorithm) and is_composed(choice.algorithm)
    worth = candidate.seconds
    for departs in (composed, choice.segment is not None, choice.lanes is not None):
        worth = worth * PLAIN if departs else worth
    return worth


def _measured(known: Sequence[Measured], choice: Choice, nbytes: int) -> float | None:
    """The candidate's measured time: between the two sizes around this one, if they are not far apart."""
    how = (choice.algorithm_name, choice.protocol, choice.segment, choice.lanes)
    times = {m.nbytes: m.seconds for m in known if (m.algorithm, m.protocol, m.segment, m.lanes) == how}
    below = max((size for size in times if size <= nbytes), default=None)
    above = min((size for size in times if size >= nbytes), default=None)
    if below is None or above is None or above > 4 * below:
        return None
    share = (nbytes - below) / (above - below) if above > below else 0.0
    return times[below] + share * (times[above] - times[below])
