"""`abccl show`: the partial sums of every rank after every step, as a lecture's table."""

from __future__ import annotations

import inspect
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from ..algorithms import Collective, Replay
from .arguments import replayed, schedule_arguments
from .frames import WRITTEN_OUT, Cell, frames, rows, summary
from .terminal import console


@click.command()
@schedule_arguments
def show(collective: str, algorithm: str, file: Path | None, ranks: int, root: int) -> None:
    """Print what every rank holds after every step.

    `abccl show all_reduce ring --ranks 5` is the table of a lecture: a column per rank, a row per block, a section
    per step. a0 is rank 0's part of block a, a0+a1 a partial sum, Σa0-4 a longer one. New values are bold, finished
    ones green. FILE is a Python file that registers the algorithm, if it is your own.
    """
    run = replayed(collective, algorithm, file, ranks, root)
    output = console()
    output.print(summary(run), style="bold")
    documentation = inspect.getdoc(run.algorithm.function)
    if documentation:
        output.print(documentation.splitlines()[0])
    output.print(table(run))
    output.print(_legend(run), style="dim")


def table(run: Replay) -> Table:
    """The frames as one table."""
    layout = rows(run)
    single = len(layout) == 1
    drawn = Table(title_justify="left")
    drawn.add_column("after")
    if not single:
        drawn.add_column("")
    for rank in range(run.size):
        drawn.add_column(f"rank {rank}" + (" (root)" if run.algorithm.collective.rooted and rank == run.root else ""))
    for time, frame in enumerate(frames(run)):
        for index, (row, cells) in enumerate(zip(layout, frame)):
            when = "" if index else f"step {time}" if time else "start"
            heads = [when] if single else [when, row.label]
            drawn.add_row(*heads, *map(_styled, cells), end_section=not single and index == len(layout) - 1)
    return drawn


def _styled(cell: Cell) -> Text:
    return Text(cell.text, ("bold " if cell.new else "") + ("green" if cell.part == 1 else ""))


def _legend(run: Replay) -> str:
    if run.algorithm.collective is Collective.ALL_TO_ALL:
        return "In row `to d` stand the ranks whose block for rank d is here, be it in passing."
    if not run.algorithm.collective.reduces:
        return "Blocks are a, b, c, ...; a rank holds those that are named in its column."
    longest = f"; Σa0-{run.size - 1} is the sum over ranks 0 to {run.size - 1}" if run.size > WRITTEN_OUT else ""
    return f"a0 is rank 0's part of block a{longest}."
