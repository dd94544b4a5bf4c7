"""A schedule in the terminal: what arrives where, step by step."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from ..algorithms import Block, Replay
from ..algorithms.words import ranges
from .frames import cargo

SHOWN = 2  # more different arrivals in one step are put together


def console() -> Console:
    """Where to print; a table that goes to a file or a pipe is as wide as it must be."""
    return Console(highlight=False) if Console().is_terminal else Console(highlight=False, width=100_000)


def arrivals(run: Replay) -> Table:
    """A row per step and a column per rank: +a←3 folds block a from rank 3 in, a←3 copies it."""
    cells: dict[tuple[int, int], dict[tuple[bool, tuple[Block, ...]], list[int]]] = defaultdict(dict)
    for t in run.transfers:
        cell = cells[run.ends[t.destination][t.destination_step], t.destination]
        cell.setdefault((t.reduce, t.blocks), []).append(t.source)
    drawn = Table("step", *(f"rank {rank}" for rank in range(run.size)))
    for time in range(1, run.steps + 1):
        drawn.add_row(str(time), *(_arrived(cells[time, rank]) for rank in range(run.size)))
    return drawn


def _arrived(cell: dict[tuple[bool, tuple[Block, ...]], list[int]]) -> str:
    if len(cell) > SHOWN:
        together: dict[tuple[bool, tuple[Block, ...]], list[int]] = {}
        for reduce in (True, False):
            alike = {blocks: sources for (folded, blocks), sources in cell.items() if folded is reduce}
            if alike:
                every = tuple(dict.fromkeys(block for blocks in alike for block in blocks))
                together[reduce, every] = [source for sources in alike.values() for source in sources]
        cell = together
    return "\n".join(
        f"{'+' * reduce}{cargo(blocks)}←{ranges(sorted(sources), comma=',')}"
        for (reduce, blocks), sources in cell.items()
    )
