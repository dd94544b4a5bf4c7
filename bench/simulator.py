"""How fast the simulator is: events a second, and how long a simulation takes in all.

python -m abccl.bench.simulator --write docs/model.md
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click

from ..algorithms import Collective, lookup
from ..algorithms.registry import on_redefinition
from ..algorithms.simulator import Simulation, Topology, read, simulate
from ..algorithms.words import count
from .document import write_part
from .machine import machine

RUNS = 3
"""Of which medians are taken."""

BARS = {"events": 1e6, "seconds": 10.0}
"""At least so many events a second for each case; at most so many seconds for the first one, in all."""


@dataclass(frozen=True)
class Case:
    """What is simulated: an all_reduce of 64 MB on Summit, with one protocol."""

    algorithm: str
    ranks: int
    segments: int
    lanes: int
    method: str

    def run(self, topology: Topology) -> Simulation:
        """Simulate it."""
        algorithm = lookup(Collective.ALL_REDUCE, self.algorithm)
        vector = 64 << 20
        segment = vector // algorithm.blocks(self.ranks) * algorithm.largest(self.ranks) // self.segments
        return simulate(
            algorithm,
            self.ranks,
            topology,
            vector,
            protocol="Simple",
            segment=segment if self.segments > 1 else None,
            lanes=self.lanes,
            method=self.method,
        )


CASES = (
    Case("double_tree", 4096, 64, 1, "events"),
    Case("double_tree", 4096, 64, 16, "events"),
    Case("double_tree", 24576, 64, 16, "events"),
    Case("recursive_doubling", 4096, 4, 4, "events"),
    Case("ring", 768, 1, 1, "events"),
    Case("ring", 24576, 1, 1, "symmetry"),
)

HEAD = (
    "| | ranks | walked over | segments, lanes | messages | events | engine s | events/s | in all s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def line(case: Case, topology: Topology) -> tuple[str, float, float]:
    """A row of the table, the events a second, and the seconds in all."""
    found, whole = [], []
    for _ in range(RUNS):
        for forget in on_redefinition:  # no run finds what the one before has kept
            forget()
        start = time.perf_counter()
        found.append(case.run(topology))
        whole.append(time.perf_counter() - start)
    one, engine, seconds = found[0], median(run.took for run in found), median(whole)
    rate = one.events / engine
    text = (
        f"| {case.algorithm} | {case.ranks:,} | {one.simulated:,} | {one.segments}, {one.lanes} | {one.messages:,} | "
        f"{one.events:,} | {engine:.2f} | {rate / 1e6:.1f} million | {seconds:.2f} |"
    )
    return text, rate, seconds


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--write", "document", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The document.")
def main(document: Path | None) -> None:
    """Time the simulator: the event engine by itself, and a call in all, with what it takes to lower the schedules.

    Exits with 1 if a case has less than a million events a second, or the first one takes more than ten seconds.
    """
    topology = read("summit")
    facts = machine()
    lines = [
        f"`python -m abccl.bench.simulator`, medians of {RUNS}, one process on {facts['cpu']}, "
        f"{count(facts['cores'], 'core')}, Python {facts['python']}. All_reduce of 64 MB on Summit.",
        "",
        HEAD,
    ]
    click.echo("\n".join(lines))
    passed = True
    for number, case in enumerate(CASES):
        text, rate, seconds = line(case, topology)
        passed = passed and rate >= BARS["events"] and (number > 0 or seconds <= BARS["seconds"])
        click.echo(text)
        lines.append(text)
    if document:
        write_part(document, "speed", "\n".join(lines))
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m abccl.bench.simulator")
