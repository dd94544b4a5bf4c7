"""What simulations found: as a table, and as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..algorithms import Algorithm, Collective
from ..algorithms.simulator import SYMMETRY, Level, Rank, Simulation, Topology
from ..algorithms.words import in_words, ranges
from ..bench.table import bandwidth, microseconds


@dataclass(frozen=True)
class Outcome:
    """An algorithm among so many ranks on so many bytes: what a simulation found, or the error why there is none.

    Without both, the algorithm does not run on so many ranks.
    """

    algorithm: Algorithm
    ranks: int
    nbytes: int
    found: Simulation | None = None
    error: str | None = None

    @property
    def why(self) -> str:
        """Why there is no simulation."""
        refusal = self.algorithm.refusal(self.ranks)
        return self.error or f"{self.algorithm.name} wants {refusal}, and there are {self.ranks:,}"


_FOUND = ("protocol", "segments", "method", "simulated", "seconds", "algbw", "busbw", "utilisation")
_WALKED = ("events", "messages", "took")


@dataclass
class Study:
    """Several simulations on one machine.

    Attributes:
        topology: the machine, with `overrides`, the constants that were set.
        protocol: what was asked for.
        took: seconds in all.
    """

    collective: Collective
    topology: Topology
    overrides: Mapping[str, Any]
    root: int
    protocol: str | None
    outcomes: list[Outcome] = field(default_factory=list)
    took: float = 0.0

    @property
    def done(self) -> list[Simulation]:
        """What was simulated."""
        return [one.found for one in self.outcomes if one.found]

    def records(self) -> list[dict[str, Any]]:
        """All of it as JSON has it, in seconds, bytes, and bytes per second."""
        return [self._record(one) for one in self.outcomes]

    def _record(self, one: Outcome) -> dict[str, Any]:
        found = one.found
        return {
            "topology": self.topology.name,
            "overrides": {place: str(value) if value == inf else value for place, value in self.overrides.items()},
            "collective": self.collective.value,
            "algorithm": one.algorithm.name,
            "ranks": one.ranks,
            "bytes": one.nbytes,
            "root": self.root,
            "segment_bytes": found.segment if found else None,
            "lanes": found.lanes if found else None,
            **{name: getattr(found, name, None) for name in (*_FOUND, *_WALKED)},
            "refused": None if found else one.why,
        }


def show(study: Study, output: Console) -> None:
    """Print the machine, the table, what could not be simulated, and how much was walked over."""
    machine = study.topology
    output.print(Text(f"{study.collective.value} on {machine.name}: {machine.about}", "bold"), soft_wrap=True)
    for line in _model(machine, study.protocol):
        output.print(Text(line, "dim"), soft_wrap=True)
    if study.overrides:
        changed = ", ".join(f"{place} = {value}" for place, value in study.overrides.items())
        output.print(Text(f"set: {changed}", "dim"), soft_wrap=True)
    print_whole(_table(study))
    for line in _refused(study.outcomes):
        output.print(Text(line, "yellow"), soft_wrap=True)
    for one in study.done:
        if one.untried:
            lengths = ", ".join(map(in_words, one.untried))
            told = f"{one.algorithm.name}, {one.ranks:,} ranks: not tried, as too many events: --segment {lengths}"
            output.print(Text(told, "dim"), soft_wrap=True)
    events, took = sum(one.events for one in study.done), sum(one.took for one in study.done)
    if events:
        speed = f": {events / took / 1e6:.1f} million a second" if took else ""
        whole = f"; {study.took:.3g} s in all, with writing the schedules down"
        output.print(Text(f"{events:,} events in {took:.3g} s{speed}{whole}", "dim"), soft_wrap=True)


def print_whole(table: Table) -> None:
    """Print a table as wide as it must be, also where the terminal is narrower."""
    Console(highlight=False, width=100_000).print(table)


def _table(study: Study) -> Table:
    cut = any(one.segments > 1 for one in study.done)
    heads = ["", "algorithm", "ranks", "size", "time us", "algbw", "busbw"]
    heads += ["protocol"] * bool(study.topology.protocols) + ["cut into"] * cut + ["method", "busiest"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, justify="right" if head in ("ranks", "size", "time us", "algbw", "busbw") else "left")
    groups = _groups(study.done)
    for group in groups:
        for place, one in enumerate(group):
            wins = place == 0 and len(group) > 1
            cells = [">" if wins else "", one.algorithm.name, f"{one.ranks:,}", in_words(one.nbytes)]
            cells += [microseconds(one.seconds), _bandwidth(one.algbw), _bandwidth(one.busbw)]
            cells += [one.protocol or ""] * bool(study.topology.protocols) + [_cut(one)] * cut
            cells += [_method(one), _busiest(one, study.topology)]
            last = one is group[-1] and len(groups) < len(study.done)
            table.add_row(*map(Text, cells), style="bold green" if wins else "", end_section=last)
    return table


def _bandwidth(per_second: float) -> str:
    """In GB/s; two digits at least."""
    return bandwidth(per_second / 1e9) if per_second >= 1e7 or not per_second else f"{per_second / 1e9:.2g}"


def _groups(done: Iterable[Simulation]) -> list[list[Simulation]]:
    """Those of the same ranks and size together, the fastest first."""
    found: dict[tuple[int, int], list[Simulation]] = {}
    for one in done:
        found.setdefault((one.ranks, one.nbytes), []).append(one)
    return [sorted(group, key=lambda one: one.seconds) for group in found.values()]


def _cut(one: Simulation) -> str:
    lanes = f", {one.lanes} lanes" if one.lanes > 1 else ""
    return f"{one.segments} segments{lanes}" if one.segments > 1 else "-"


def _method(one: Simulation) -> str:
    return f"events of {one.simulated:,} of {one.ranks:,} ranks" if one.method == SYMMETRY else one.method


def _busiest(one: Simulation, topology: Topology) -> str:
    name, part = max((one.utilisation or {"": 0.0}).items(), key=lambda item: item[1])
    if not part:
        return "-"
    return f"{name}{'' if name == topology.rank.name else ' links'} {part:.0%}"


def _refused(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """A line for each algorithm that could not be simulated: on how many ranks not, and why."""
    found: dict[tuple[str, str], set[int]] = {}
    for one in outcomes:
        if one.found is None:
            wants = one.error or f"it wants {one.algorithm.refusal(one.ranks)}"
            found.setdefault((one.algorithm.name, wants), set()).add(one.ranks)
    for (name, why), ranks in found.items():
        yield f"{name} not on {ranges(sorted(ranks))} ranks: {why}"


# ---- the machine


def machines(topologies: Mapping[str, Topology]) -> Table:
    """A line for each."""
    table = Table("topology", "what it is", "levels", "protocols", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, one in topologies.items():
        levels = [f"{level.name} of {level.size:,}" if level.size else level.name for level in one.levels]
        table.add_row(name, one.about, " < ".join([one.rank.name, *levels]), ", ".join(one.protocols))
    return table


def _model(machine: Topology, protocol: str | None) -> Iterator[str]:
    """Its constants, a line for the rank and for each level; of several protocols, or sizes, the least and the most."""
    ways = [way for name, way in machine.protocols.items() if protocol in (None, name)]
    ways = ways or [(machine.rank, machine.levels)]
    yield f"{machine.rank.name}: {_costs([rank for rank, _ in ways])}"
    below = machine.rank.name
    for number, level in enumerate(machine.levels):
        size = f" of {level.size:,} {below}s" if level.size else f" of {below}s"
        yield f"{level.name}{size}: {_costs(alike := [levels[number] for _, levels in ways])}{_links(alike)}"
        below = level.name
    if machine.protocols:
        yield f"protocol: {protocol or ' or '.join(machine.protocols) + ', the fastest'}"


_COSTS = {
    "launch": "us",
    "alpha": "us",
    "overhead": "us",
    "beta": "ps/B",
    "send": "ps/B",
    "receive": "ps/B",
    "copy": "ps/B",
    "fold": "ps/B",
}


def _costs(parts: Sequence[Rank | Level]) -> str:
    """Those that are not 0."""
    said = []
    for name, unit in _COSTS.items():
        values: list[float] = []
        for part in parts:
            value = getattr(part, name, 0.0)
            values += value if isinstance(value, tuple) else [value]
        if any(values):
            said.append(f"{name} {_span(values, 1e6 if unit == 'us' else 1e12)} {unit}")
    return ", ".join(said) or "no latency"


def _links(levels: Sequence[Level]) -> str:
    """Those of a level, as several protocols use it."""
    links = [level.links for level in levels if level.links]
    if not links:
        return ""
    many = f"{links[0].number} links" if links[0].number > 1 else "a link"
    return f"; {many} of {_span([one.capacity for one in links], 1e-9)} GB/s per {links[0].per}"


def _span(values: Sequence[float], factor: float) -> str:
    least, most = (f"{value * factor:.3g}" for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"
