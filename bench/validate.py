"""`make validate-model`: is what the tuner chooses the fastest, and does it take as long as is predicted?

The ranks calibrate anew, in a cache directory of their own, so that no time that was measured before overrides a
prediction. Then every candidate is timed, on sizes that the calibration has not seen.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..algorithms.words import in_words
from ..collectives import Communicator, bootstrap
from ..collectives.tuner import asked, rules, store
from ..errors import AbcclError, ArgumentError
from . import accuracy_report
from .__main__ import FILE, Failure, a_size, check_writable, words
from .accuracy import Case, Run, figures, holds
from .accuracy_run import BUDGET, COLLECTIVES, FEW, SIZES, TRIES, Asked, Steady, cases, measure_case
from .machine import machine
from .world import World, joined, launcher, on_ranks


def measure(asked_for: Asked) -> Run | None:
    """Validate among the ranks that were started, or among new ones; None on ranks that have nothing to tell.

    Raises:
        AbcclError: something forces choices, no size is left, or a rank failed.
    """
    for name in (asked.ENVIRONMENT, rules.ENVIRONMENT, "ABCCL_PROTOCOL"):
        if os.environ.get(name):
            raise ArgumentError(f"{name} is set and forces choices: unset it, to see what the tuner chooses by itself")
    own = bootstrap.find()
    cases(asked_for, own.size if launcher(own) else asked_for.ranks)  # or an error, before anything starts
    run, error = on_ranks(own, on_rank, (asked_for,), asked_for.ranks)
    if error is not None:
        raise error
    return run


def on_rank(own: bootstrap.Bootstrap, asked_for: Asked) -> Run:
    """Validate; all ranks call it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[store.ENVIRONMENT] = folder
        with joined(own) as world:
            return _measure(asked_for, world)


def _measure(asked_for: Asked, world: World) -> Run:
    start, date = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="minutes")
    tables: dict[str, dict[str, Any]] = {}

    def renew() -> Communicator:
        comm = world.comm.split(0, world.rank)
        assert comm is not None
        table = comm.tuner.table
        tables.setdefault(comm.tuner.link, {"origin": table.origin, "residual": table.residual})
        return comm

    if world.rank == 0:
        click.echo(HEAD)
    facts = machine()
    steady = Steady(renew)
    found: list[Case] = []
    missing: list[str] = []
    for number, (collective, nbytes) in enumerate(cases(asked_for, world.size)):
        case = steady.measure(
            partial(
                measure_case, world=world, collective=collective, nbytes=nbytes, number=number, budget=asked_for.budget
            )
        )
        if case is None:
            missing.append(f"{collective.value}, {in_words(nbytes)}")
        else:
            found.append(case)
        if world.rank == 0:
            click.echo(line(case) if case else f"{missing[-1]}: given up, the link class changed {TRIES} times")
            sys.stdout.flush()
    steady.comm.close()
    return Run(
        date,
        facts,
        asked_for.command,
        tuple(len(host.ranks) for host in world.hosts),
        world.transport,
        tables,
        tuple(found),
        steady.discarded,
        tuple(missing),
        time.monotonic() - start,
    )


HEAD = "collective          size link  ratio  plain  plan itself  pred.         us  chosen; best"


def line(case: Case) -> str:
    """What is printed of a case."""
    return (
        f"{case.collective:14} {in_words(case.nbytes):>9} {case.link:4} {case.ratio:6.2f} {case.plain_ratio:6.2f} "
        f"{case.adapted:5.2f} {case.spread:6.2f} {case.predicted:6.2f} {case.seconds * 1e6:10.2f}  {case.chosen}"
        + ("" if case.best.name == case.chosen else f"; {case.best.name}")
    )


def summary(run: Run) -> list[str]:
    """The lines at the end."""
    links = ", ".join(f"{len([c for c in run.cases if c.link == link])} {link}" for link in run.tables)
    lines = [f"{run.title}: {len(run.cases)} cases ({links}) in {run.took:.0f} s"]
    lines += [f"  {link}: {table['origin']}, residual {table['residual']:.0%}" for link, table in run.tables.items()]
    lines.append(f"  measured anew, since the link class had changed meanwhile: {run.discarded} times")
    lines += [f"  given up: {name}" for name in run.missing]
    if not run.cases:
        return [*lines, "  no case was measured"]
    return lines + [f"  {figure.line}" for figure in figures(run.cases, run.judged, len(run.missing))]


def read(path: Path) -> Run:
    """The run that was kept there.

    Raises:
        ArgumentError: there is none.
    """
    try:
        return Run.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ArgumentError) as error:
        raise ArgumentError(f"{path} can not be used: {error}") from error


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True, help="Processes to start.")
@click.option("--collectives", type=words, metavar="NAMES", default=",".join(COLLECTIVES), help="With commas.")
@click.option("--sizes", metavar="SIZES", default="", help=f"With commas, as in 40K,6M. {len(SIZES)} by default.")
@click.option("--few", is_flag=True, help=f"Only {len(FEW)} sizes, up to {in_words(FEW[-1])}.")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=BUDGET, show_default=True, help="For a slow case."
)
@click.option("--json", "json_file", type=FILE, help="Keep everything there, the time of every round included.")
@click.option("--write", "document", type=FILE, help="Write a document with a plot.")
def validate(
    files: tuple[Path, ...],
    ranks: int,
    collectives: tuple[str, ...],
    sizes: str,
    few: bool,
    seconds: float,
    json_file: Path | None,
    document: Path | None,
) -> None:
    """Time what the tuner chooses against every candidate, on sizes that its calibration has not seen.

    Alone it starts --ranks processes; under mpirun, torchrun or srun it uses theirs. With FILES, which --json wrote,
    nothing is measured: they are summed up, and --write makes one document of them.

    A line has: the time of the chosen one by that of the best candidate, the best picked by one half of the rounds and
    timed by the other; the same by all rounds; the chosen one as users run it, its plan trying protocols, by the same
    forced; the chosen candidate against itself, as two subjects; its predicted time by its time; its time. But for the
    candidate against itself, the chosen one is as users run it.

    Exits with 1 if two ranks on cores of their own miss a bar, with 2 after an error.
    """
    try:
        for path in filter(None, (json_file, document)):
            check_writable(path)
        if document:
            accuracy_report.check()
        if files:
            runs = [read(path) for path in files]
        else:
            wanted = tuple(map(a_size, filter(None, sizes.split(",")))) or (FEW if few else SIZES)
            command = f"python -m abccl.bench.validate {shlex.join(sys.argv[1:])}".rstrip()
            run = measure(Asked(collectives, wanted, ranks, seconds, command))
            if run is None:
                return
            runs = [run]
            if json_file:
                json_file.write_text(json.dumps(run.to_json()) + "\n", encoding="utf-8")
        for run in runs:
            click.echo("\n".join(summary(run)))
        if document:
            accuracy_report.write(runs, document)
    except AbcclError as error:
        raise Failure(str(error)) from error
    if not all(map(holds, runs)):
        raise SystemExit(1)


if __name__ == "__main__":
    validate(prog_name="python -m abccl.bench.validate")
