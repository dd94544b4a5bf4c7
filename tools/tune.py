"""`abccl tune`: measure at leisure what the tuner chooses by."""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from ..algorithms import Collective, to_collective
from ..algorithms.words import count, in_words, to_bytes
from ..collectives import bootstrap
from ..collectives.retuning import Listener, retune
from ..collectives.tuner.table import Table
from ..collectives.tuner.tune import FACTOR, Trial, Wish
from ..collectives.tuning import ENVIRONMENT
from ..errors import ArgumentError
from .arguments import ladder
from .terminal import console

COLLECTIVES = (
    Collective.ALL_REDUCE,
    Collective.REDUCE_SCATTER,
    Collective.ALL_GATHER,
    Collective.BROADCAST,
    Collective.ALL_TO_ALL,
)
"""Tuned by default."""


HEAD = f"{'collective':<15}{'size':>9}  {'measured':>12}{'predicted':>12} ratio  choice"


class Printer(Listener):
    """Prints a line for each size when it is done; on a terminal a bar shows what is being measured.

    Args:
        where: the ranks, in words.
        total: how many sizes there are.
        plain: whether to leave the bar out.
    """

    def __init__(self, where: str, total: int, plain: bool) -> None:
        self.console = Console(highlight=False, force_terminal=False if plain else None)
        self.console.print(Text(f"{where}; a time is the median of rounds, of the slowest rank", "dim"), soft_wrap=True)
        # Redrawn between sizes only: a thread that draws would be measured.
        shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(
            *shown, console=self.console, transient=True, auto_refresh=False, disable=not self.console.is_terminal
        )
        self.task = self.bar.add_task("", total=total)
        self.bar.start()
        self.begun = False

    def calibrates(self, doing: str) -> None:
        """See `Listener`."""
        self.bar.update(self.task, description=f"calibration, {doing}", refresh=True)

    def works_on(self, collective: Collective, nbytes: int) -> None:
        """See `Listener`."""
        if not self.begun:
            self.console.print(Text(HEAD, "bold"), soft_wrap=True)
            self.begun = True
        self.bar.update(self.task, description=f"{collective.value} {in_words(nbytes)}", refresh=True)

    def has(self, trial: Trial) -> None:
        """See `Listener`."""
        self.console.print(Text(row(trial)), soft_wrap=True)
        self.bar.advance(self.task)

    def drops(self, trial: Trial) -> None:
        """See `Listener`."""
        said = f"{trial.collective.value} {in_words(trial.nbytes)}: not kept, the cores have moved meanwhile"
        self.console.print(Text(said, "dim"), soft_wrap=True)
        self.bar.advance(self.task)

    def ends(self, table: Table, link: str, file: Path | None) -> None:
        """See `Listener`."""
        self.bar.stop()
        self.console.print(f"constants: {table.told}", soft_wrap=True)
        self.console.print(f"kept for {link} cores in {file}" if file else "not kept", soft_wrap=True)


def row(trial: Trial) -> str:
    """The fastest candidate of a size in a line."""
    winner, predicted, ratio = trial.winner, "", ""
    if winner.predicted:
        predicted, ratio = f"{winner.predicted * 1e6:.2f} us", f"{winner.seconds / winner.predicted:.2f}"
    times = f"{winner.seconds * 1e6:>9.2f} us{predicted:>12}{ratio:>6}"
    return f"{trial.collective.value:<15}{in_words(trial.nbytes):>9}  {times}  {winner.choice.name}"


def sizes(text: str) -> tuple[int, int, int]:
    """Sizes written as FROM:TO:FACTOR, FROM:TO, or one.

    Raises:
        click.BadParameter: they are not.
    """
    words = text.split(":")
    try:
        first, last = to_bytes(words[0]), to_bytes(words[1] if len(words) > 1 else words[0])
        factor = int(words[2]) if len(words) > 2 else FACTOR
    except (ArgumentError, ValueError) as error:
        raise click.BadParameter(f"{error}: wanted is FROM:TO:FACTOR, as in 4K:1M:4") from error
    if len(words) > 3 or first > last or not 2 <= factor <= FACTOR:
        raise click.BadParameter(f"{text}: wanted is FROM:TO:FACTOR, as in 4K:1M:4, with a factor from 2 to {FACTOR}")
    return first, last, factor


def collectives(text: str) -> tuple[Collective, ...]:
    """Collectives with commas between.

    Raises:
        click.BadParameter: one is none that can be tuned.
    """
    try:
        found = tuple(dict.fromkeys(to_collective(word) for word in text.split(",")))
    except ArgumentError as error:
        raise click.BadParameter(str(error)) from error
    if Collective.BARRIER in found:
        raise click.BadParameter("a barrier has no size: it is not tuned")
    return found


@click.command()
@click.option("--ranks", type=click.IntRange(2), help="Processes to start; one per core by default. Not under mpirun.")
@click.option("--collective", "kinds", type=collectives, metavar="NAMES", help="With commas; five by default.")
@click.option("--sizes", "span", type=sizes, metavar="FROM:TO:FACTOR", help="4:64M:4 by default; 4:4M:4 with --peer.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="For each candidate and size.",
)
@click.option("--best", type=click.IntRange(1), default=4, show_default=True, help="Candidates at each size.")
@click.option("--dry-run", is_flag=True, help="Print what is found, and keep nothing.")
@click.option("--peer", type=click.Choice(["openmpi"]), help="Tune another library: see above.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="The peer's file of rules; openmpi-rules.conf by default.",
)
@click.argument("arguments", nargs=-1, metavar="[-- MPIRUN'S ARGUMENTS]")
def tune(
    ranks: int | None,
    kinds: tuple[Collective, ...] | None,
    span: tuple[int, int, int] | None,
    seconds: float,
    best: int,
    dry_run: bool,
    peer: str | None,
    output: Path | None,
    arguments: tuple[str, ...],
) -> None:
    """Measure what algorithms are chosen by, more thoroughly than a communicator does at first use.

    First the model's constants; then, for all_reduce, reduce_scatter, all_gather, broadcast and all_to_all, size by
    size, the candidates that are predicted to be the best, in turn, and the engine's own collective where there is one.
    A line tells who won. The times are kept for all communicators of as many ranks on as many hosts on such a machine:
    they take the fastest of those that were measured, and predict for sizes outside of these.

    Alone, it starts --ranks processes; under mpirun, torchrun or srun it uses theirs, on one host or many. Nothing else
    should run meanwhile. What was measured before of other collectives and sizes is kept.

    With --peer openmpi it measures Open MPI's own algorithms instead, and writes the file of dynamic rules by which
    Open MPI takes the best of them. It starts mpirun itself; arguments for it come after --.

    \b
    abccl tune --ranks 4
    mpirun -n 8 --host node1:4,node2:4 abccl tune --collective all_reduce --sizes 64K:64M:2
    abccl tune --peer openmpi --ranks 4 -o rules.conf -- --bind-to core
    """
    if peer:
        if dry_run:
            raise ArgumentError("--peer writes a file and keeps nothing else: leave out --dry-run")
        _tune_openmpi(ranks, kinds, span, seconds, output or Path("openmpi-rules.conf"), arguments)
        return
    if output or arguments:
        raise ArgumentError("-o and arguments of mpirun are for --peer openmpi: leave them out")
    from ..bench.world import launcher, on_ranks

    own = bootstrap.find()
    if launcher(own) and ranks not in (None, own.size):
        raise ArgumentError(f"{own.size} ranks were started, and --ranks says {ranks}: leave it out")
    if launcher(own) and own.size < 2:
        raise ArgumentError("one rank has nothing to choose: start two or more")
    wish = Wish(kinds or COLLECTIVES, ladder(*(span or (4, 64 << 20, 4))), seconds, best)
    _, error = on_ranks(own, on_rank, (wish, not dry_run), ranks or _cores())
    if error is not None:
        raise error


def on_rank(own: bootstrap.Bootstrap, wish: Wish, keeps: bool) -> None:
    """Tune; all ranks call it."""
    from ..bench.world import joined

    os.environ[ENVIRONMENT] = "built-in"  # else the communicator would calibrate, and keep that
    with joined(own) as world:
        listener = Listener()
        if own.rank == 0:
            where = f"{count(own.size, 'rank')} on {count(len(world.hosts), 'host')} over {world.transport}"
            # Open MPI gives its ranks a terminal even where its own output is a file.
            plain = world.launcher == "mpirun"
            listener = Printer(where, len(wish.collectives) * len(wish.sizes), plain)
        retune(world.comm._transport, world.comm.tuner.place, own.exchange, wish, listener, keeps)


def _tune_openmpi(
    ranks: int | None,
    kinds: tuple[Collective, ...] | None,
    span: tuple[int, int, int] | None,
    seconds: float,
    output: Path,
    arguments: tuple[str, ...],
) -> None:
    from ..bench.openmpi_tuning import tune_openmpi

    shown_on = console()
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    plain = not shown_on.is_terminal
    with Progress(*shown, console=shown_on, transient=True, auto_refresh=False, disable=plain) as bar:
        task = bar.add_task("")
        report = tune_openmpi(
            output,
            ranks or _cores(),
            collectives=kinds or COLLECTIVES,
            sizes=span or (4, 4 << 20, 4),
            seconds=seconds,
            arguments=arguments,
            progress=lambda done, total, what: bar.update(
                task, completed=done, total=total, description=what, refresh=True
            ),
        )
    for line in report.lines():
        shown_on.print(Text(line), soft_wrap=True)


def _cores() -> int:
    return max(2, len(os.sched_getaffinity(0)))
