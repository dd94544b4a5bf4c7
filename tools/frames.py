"""A replayed schedule as frames of cells: what each rank holds of each row after each unit of time."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import NamedTuple

from ..algorithms import Block, Collective, Replay, measured
from ..algorithms.words import count, ranges

WRITTEN_OUT = 3  # longer sums are abbreviated


class Cell(NamedTuple):
    """What one rank holds of one row.

    Attributes:
        text: the partial sum ("a0+a1", "Σa0-3") or the name of what is held; empty if nothing is.
        part: how much of what the row's blocks must become is there, 0 to 1.
        new: whether the last step changed it.
    """

    text: str
    part: float
    new: bool


class Row(NamedTuple):
    """A row of a frame: one block, or for all_to_all those of one destination."""

    label: str
    blocks: list[Block]


def letters(block: int) -> str:
    """A block's name in writing: a, ..., z, aa, ab, ..."""
    name = string.ascii_lowercase[block % 26]
    return name if block < 26 else letters(block // 26 - 1) + name


def cargo(blocks: Sequence[Block]) -> str:
    """The blocks of a message in few characters."""
    pairs = [block for block in blocks if isinstance(block, tuple)]
    numbers = sorted(block for block in blocks if isinstance(block, int))
    if len(blocks) > 2 and (pairs or numbers[-1] - numbers[0] >= len(numbers)):
        return f"{len(blocks)} blocks"
    if pairs:
        return ", ".join(f"{source}→{destination}" for source, destination in pairs)
    if len(numbers) > 2:
        return f"{letters(numbers[0])}-{letters(numbers[-1])}"
    return ", ".join(map(letters, numbers))


def rows(run: Replay) -> list[Row]:
    """The rows of every frame."""
    if run.algorithm.collective is Collective.ALL_TO_ALL:
        return [Row(f"to {d}", [(s, d) for s in range(run.size)]) for d in range(run.size)]
    return [Row(letters(block), [block]) for block in range(run.blocks)]


def frames(run: Replay) -> list[list[list[Cell]]]:
    """The cells by time, row and rank; time 0 is the start."""
    layout = rows(run)
    found = []
    before: list[dict[Block, int]] = []
    for held in run.history():
        # At the start there is nothing before, and nothing new.
        pairs = list(zip(before or held, held))
        found.append([[_cell(run, row, new, _differs(row, old, new)) for old, new in pairs] for row in layout])
        before = held
    return found


def _differs(row: Row, before: dict[Block, int], held: dict[Block, int]) -> bool:
    return any(before.get(block) != held.get(block) for block in row.blocks)


def _cell(run: Replay, row: Row, held: dict[Block, int], new: bool) -> Cell:
    if run.algorithm.collective is Collective.ALL_TO_ALL:
        sources = [block[0] for block in row.blocks if isinstance(block, tuple) and block in held]
        return Cell(ranges(sources, comma=","), len(sources) / run.size, new)
    block = row.blocks[0]
    if block not in held:
        return Cell("", 0.0, new)
    if not run.algorithm.collective.reduces:
        return Cell(row.label, 1.0, new)
    ranks = run.expressions.ranks(held[block])
    if len(ranks) <= WRITTEN_OUT:
        text = "+".join(f"{row.label}{rank}" for rank in ranks)
    else:
        text = f"Σ{row.label}{ranges(ranks, comma=',')}"
    return Cell(text, len(ranks) / run.size, new)


def summary(run: Replay) -> str:
    """The schedule and its counts in a line."""
    counts = measured(run)
    a = run.algorithm
    root = f", root {run.root}" if a.collective.rooted else ""
    folded = f", {counts.folded} folded" if a.collective.reduces else ""
    whole = "send buffer" if a.collective is Collective.ALL_TO_ALL else "vector"
    ranks, steps = count(run.size, "rank"), count(counts.steps, "step")
    return f"{a.collective.value} {a.name}, {ranks}{root}: {steps}, {counts.sent} of the {whole} sent{folded}"
