"""`make validate-simulator`: do collectives take as long as the simulator says, on the machine as it was calibrated?

The ranks calibrate anew, in a cache directory of their own. Their table is what the simulator gets for a machine, and
what the tuner's own model predicts from. Then collectives are timed that the calibration has not seen: other sizes,
by algorithms, protocols, segments and lanes drawn by lot.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import click

from ..algorithms import Algorithm, Collective
from ..algorithms.words import in_words
from ..collectives import Communicator, bootstrap
from ..collectives.tuner import store
from ..collectives.tuner.as_topology import simulated, topology_of
from ..collectives.tuner.candidates import Candidate, is_composed
from ..collectives.tuner.stopwatch import Stopwatch
from ..errors import AbcclError
from . import accuracy_report, predicted_report
from .__main__ import FILE, Failure, a_size, check_writable, words
from .accuracy_run import COLLECTIVES, Asked, Rounds, Steady, cases, rounds_for
from .machine import machine
from .predicted_report import Case, Run
from .run import geometric_mean
from .world import World, joined, launcher, on_ranks

K, M = 1 << 10, 1 << 20
SIZES = (48, 6 * K, 60 * K, 700 * K, 6 * M)
ROUNDS, FEWEST = 9, 3
"""Of all that is timed of a collective and a size; slow ones have fewer."""

BUDGET = 1.0
"""Seconds for the rounds of a collective and a size, unless the fewest take longer."""

LONGEST = 0.1
"""What is predicted to take more seconds is left out."""

WAYS = 6
"""Of a collective and a size, at most."""


def drawn(found: Sequence[Candidate], order: random.Random) -> list[Candidate]:
    """One way each of running some algorithms, drawn by lot, whatever is predicted of them; no compositions."""
    ways: dict[str, list[Candidate]] = {}
    for one in sorted(found, key=lambda one: one.choice.name):
        algorithm = one.choice.algorithm
        if isinstance(algorithm, Algorithm) and not is_composed(algorithm) and one.predicted <= LONGEST:
            ways.setdefault(algorithm.name.partition("(")[0], []).append(one)
    names = order.sample(sorted(ways), min(WAYS, len(ways)))
    return [order.choice(ways[name]) for name in names]


def measure_case(
    comm: Communicator, world: World, collective: Collective, nbytes: int, number: int, budget: float
) -> list[Case]:
    """Time ways of doing a collective, and predict them. All ranks call it; `number` makes the draw. The simulator's
    predictions are made on rank 0 only, which alone returns cases."""
    tuner, order = comm.tuner, random.Random(number)
    stopwatch = Stopwatch(comm._transport, comm._binder.bind)
    rounds = Rounds(world, stopwatch, order)
    found = drawn(tuner.candidates(collective, nbytes), order)
    subjects = [stopwatch.subject(collective, nbytes, one.choice) for one in found]
    estimated = [(subject, rounds.estimate(subject)) for subject in subjects]
    repeated = rounds_for([seconds for _, seconds in estimated], budget, ROUNDS, FEWEST)
    times = rounds.measure(estimated, repeated)
    if world.rank:
        return []
    topology = topology_of(tuner.table, tuner.place)
    return [
        Case(
            collective.value,
            nbytes,
            tuner.link,
            one.choice.name,
            tuple(took),
            simulated(one.choice, nbytes, tuner.place, topology).seconds,
            one.predicted,
        )
        for one, took in zip(found, times, strict=True)
    ]


def on_rank(own: bootstrap.Bootstrap, asked_for: Asked, transport: str | None) -> Run:
    """Compare; all ranks call it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[store.ENVIRONMENT] = folder
        with joined(own, transport) as world:
            return _measure(asked_for, world)


def _measure(asked_for: Asked, world: World) -> Run:
    start, facts = time.monotonic(), machine()
    date = datetime.now(timezone.utc).isoformat(timespec="minutes")
    tables: dict[str, str] = {}

    def renew() -> Communicator:
        comm = world.comm.split(0, world.rank)
        assert comm is not None
        tables.setdefault(comm.tuner.link, comm.tuner.table.told)
        return comm

    steady = Steady(renew)
    found: list[Case] = []
    for number, (collective, nbytes) in enumerate(cases(asked_for, world.size)):
        once = partial(measure_case, world=world, collective=collective, nbytes=nbytes, number=number)
        measured = steady.measure(partial(once, budget=asked_for.budget))
        found += measured or []
        if world.rank == 0:
            click.echo(line(collective, nbytes, measured))
            sys.stdout.flush()
    steady.comm.close()
    hosts = tuple(len(host.ranks) for host in world.hosts)
    took = time.monotonic() - start
    return Run(date, facts, asked_for.command, hosts, world.transport, tables, tuple(found), steady.discarded, took)


def line(collective: Collective, nbytes: int, measured: Sequence[Case] | None) -> str:
    """What is printed of a collective and a size."""
    head = f"{collective.value:14} {in_words(nbytes):>9}"
    if not measured:
        return f"{head}  nothing: " + ("the link class changed every time" if measured is None else "all is too slow")
    by_simulator, by_tuner = [one.ratio for one in measured], [one.tuner_ratio for one in measured]
    mean = geometric_mean(by_simulator)
    return (
        f"{head} {measured[0].link:4} {len(measured)} ways; predicted / measured: {mean:5.2f} "
        f"({min(by_simulator):.2f} to {max(by_simulator):.2f}); tuner's {geometric_mean(by_tuner):5.2f}"
    )


def measure(asked_for: Asked, transport: str | None) -> Run | None:
    """Compare among the ranks that were started, or among new ones; None on ranks that have nothing to tell.

    Raises:
        AbcclError: no size is left, or a rank failed.
    """
    own = bootstrap.find()
    cases(asked_for, own.size if launcher(own) else asked_for.ranks)  # or an error, before anything starts
    run, error = on_ranks(own, on_rank, (asked_for, transport), asked_for.ranks)
    if error is not None:
        raise error
    return run


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True, help="Processes to start.")
@click.option("--transport", type=click.Choice(["mpi", "gloo"]), help="What carries messages, also on one host.")
@click.option("--collectives", type=words, metavar="NAMES", default=",".join(COLLECTIVES), help="With commas.")
@click.option("--sizes", type=words, metavar="SIZES", default=",".join(map(str, SIZES)), help="With commas: 40K,6M.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=BUDGET, help="For a collective and a size.")
@click.option("--json", "json_file", type=FILE, help="Keep what was measured there.")
@click.option("--write", "document", type=FILE, help="Write the part of a document, and a picture.")
def predicted(
    files: tuple[Path, ...],
    ranks: int,
    transport: str | None,
    collectives: tuple[str, ...],
    sizes: tuple[str, ...],
    seconds: float,
    json_file: Path | None,
    document: Path | None,
) -> None:
    """Time collectives, and compare with what the simulator and the tuner's model predict from one calibration.

    Alone it starts --ranks processes; under mpirun, torchrun or srun it uses theirs. With FILES, which --json wrote,
    nothing is measured: they are summed up, and --write makes one part of docs/model.md of them.
    """
    try:
        for path in filter(None, (json_file, document)):
            check_writable(path)
        if document:
            accuracy_report.check()
        runs = [predicted_report.read(path) for path in files]
        if not files:
            command = f"python -m abccl.bench.predicted {shlex.join(sys.argv[1:])}".rstrip()
            run = measure(Asked(collectives, tuple(map(a_size, sizes)), ranks, seconds, command), transport)
            if run is None:
                return
            runs = [run]
            if json_file:
                json_file.write_text(json.dumps(run.to_json()) + "\n", encoding="utf-8")
        for run in runs:
            click.echo(predicted_report.summary(run))
        if document:
            predicted_report.write(runs, document)
    except AbcclError as error:
        raise Failure(str(error)) from error


if __name__ == "__main__":
    predicted(prog_name="python -m abccl.bench.predicted")
