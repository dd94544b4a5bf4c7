"""`abccl draw`: a schedule as a picture, ranks across and time downwards, and in the terminal."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from ..algorithms import Replay
from ..algorithms.replay import Transfer
from ..errors import ArgumentError
from .arguments import replayed, schedule_arguments
from .frames import Cell, Row, cargo, frames, rows, summary
from .svg import COLOURS, FAINT, INK, LINE, picture_of, shade, text
from .terminal import arrivals, console

MARGIN, GUTTER, HEAD, FOOT = 24, 62, 78, 56
CELL, BETWEEN = 20, 24

MOST_RANKS = 64
"""The most ranks whose picture can be read, and written in some seconds."""


@click.command()
@schedule_arguments
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The file to write.")
def draw(collective: str, algorithm: str, file: Path | None, ranks: int, root: int, output: Path | None) -> None:
    """Draw a schedule as an SVG picture, and in the terminal.

    Ranks stand across, time runs downwards. Boxes are what a rank holds, the darker the more complete, green when
    finished; arrows are messages with the blocks they carry. In the terminal +a←3 is a message from rank 3 whose
    block a is folded in, and a←3 one that is copied. FILE is a Python file that registers the algorithm, if it is
    your own. Without -o the picture is called COLLECTIVE-ALGORITHM-RANKS.svg.
    """
    if ranks > MOST_RANKS:
        raise ArgumentError(f"{ranks} ranks do not fit a picture: draw {MOST_RANKS} at most; `abccl verify` takes more")
    run = replayed(collective, algorithm, file, ranks, root)
    name = re.sub(r"\W+", "-", run.algorithm.name).strip("-")
    path = output or Path(f"{run.algorithm.collective.value}-{name}-{ranks}.svg")
    try:
        path.write_text(picture(run), encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"{path} can not be written ({error.strerror}): name another file by -o") from error
    console().print(arrivals(run))
    click.echo(f"{summary(run)}: {path}")


class Layout(NamedTuple):
    """Where things are, in pixels."""

    rows: list[Row]
    box: float
    gap: float

    def x(self, rank: int) -> float:
        """The left edge of a rank's boxes."""
        return MARGIN + GUTTER + 6.5 * max(len(row.label) for row in self.rows) + rank * (self.box + BETWEEN)

    def y(self, time: int) -> float:
        """The upper edge of the boxes of that time."""
        return HEAD + time * (self.height + self.gap)

    @property
    def height(self) -> float:
        """The height of a rank's boxes at one time."""
        return CELL * len(self.rows)


def picture(run: Replay) -> str:
    """The picture as the text of an SVG file."""
    cells = frames(run)
    longest = max(len(cell.text) for frame in cells for row in frame for cell in row)
    crowd = Counter((t.destination, run.ends[t.destination][t.destination_step]) for t in run.transfers)
    layout = Layout(rows(run), max(64, 7.4 * longest + 18), min(140, 52 + 5 * max(crowd.values(), default=0)))
    width = max(layout.x(run.size) - BETWEEN + MARGIN, 660, 2 * MARGIN + 8 * len(summary(run)))
    height = layout.y(run.steps) + layout.height + FOOT
    parts = [*_axes(run, layout), *_arrows(run, layout), *_boxes(layout, cells), *_legend(MARGIN, height - 20)]
    title = text(MARGIN, 28, summary(run), size=15, anchor="start", weight="bold")
    return picture_of(width, height, [title, *parts])


def _axes(run: Replay, layout: Layout) -> Iterator[str]:
    """Names of ranks, times and rows."""
    for rank in range(run.size):
        root = " (root)" if run.algorithm.collective.rooted and rank == run.root else ""
        yield text(layout.x(rank) + layout.box / 2, HEAD - 12, f"rank {rank}{root}", size=12, weight="bold")
    for time in range(run.steps + 1):
        middle = layout.y(time) + layout.height / 2 + 4
        yield text(MARGIN, middle, f"step {time}" if time else "start", size=12, anchor="start", weight="bold")
        if len(layout.rows) > 1:
            for index, row in enumerate(layout.rows):
                y = layout.y(time) + CELL * (index + 0.5) + 4
                yield text(layout.x(0) - 7, y, row.label, size=10.5, anchor="end", colour=FAINT)


def _boxes(layout: Layout, cells: list[list[list[Cell]]]) -> Iterator[str]:
    """What each rank holds; what is new stands out."""
    for time, frame in enumerate(cells):
        for index, row in enumerate(frame):
            for rank, cell in enumerate(row):
                x, y = layout.x(rank), layout.y(time) + CELL * index
                fresh = cell.new or time == 0
                fill = shade(cell.part)
                yield (
                    f"<rect x='{x:.1f}' y='{y:.1f}' width='{layout.box:.1f}' height='{CELL}' fill='{fill}' "
                    f"stroke='{LINE}'/>"
                )
                if cell.new:
                    yield f"<rect x='{x:.1f}' y='{y + 1:.1f}' width='3' height='{CELL - 2}' fill='{INK}'/>"
                ink = "white" if cell.part == 1 else INK
                weight = "bold" if cell.new else "normal"
                opacity = 1 if fresh else 0.75
                if cell.text:
                    middle = x + layout.box / 2
                    yield text(middle, y + CELL / 2 + 4, cell.text, 11, weight=weight, colour=ink, opacity=opacity)


def _arrows(run: Replay, layout: Layout) -> Iterator[str]:
    """The messages; those that meet at a box are spread over its width, in the order of where they come from."""
    leaving, arriving = defaultdict(list), defaultdict(list)
    for t in run.transfers:
        leaving[t.source, run.starts[t.source][t.source_step]].append(t)
        arriving[t.destination, run.ends[t.destination][t.destination_step]].append(t)
    from_x = {id(t): x for (rank, _), group in leaving.items() for t, x in _spread(group, rank, "destination", layout)}
    to_x = {id(t): x for (rank, _), group in arriving.items() for t, x in _spread(group, rank, "source", layout)}
    labels = []
    for t in run.transfers:
        kind = "fold" if t.reduce else "copy"
        x1, y1 = from_x[id(t)], layout.y(run.starts[t.source][t.source_step]) + layout.height
        x2, y2 = to_x[id(t)], layout.y(run.ends[t.destination][t.destination_step]) - 3
        bend = (y2 - y1) * 0.35
        yield (
            f"<path d='M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}' "
            f"fill='none' stroke='{COLOURS[kind]}' stroke-width='1.6' marker-end='url(#{kind})'/>"
        )
        labels.append((x2, y2 - 16, cargo(t.blocks), COLOURS[kind]))
    for x, y, label, colour in labels if len(layout.rows) > 1 else []:
        half = 3.2 * len(label) + 4
        yield f"<rect x='{x - half:.1f}' y='{y - 8:.1f}' width='{2 * half:.1f}' height='13' rx='6' fill='white'/>"
        yield text(x, y + 2.5, label, size=10, colour=colour, weight="bold")


def _spread(group: list[Transfer], rank: int, by: str, layout: Layout) -> Iterator[tuple[Transfer, float]]:
    for index, t in enumerate(sorted(group, key=lambda t: (getattr(t, by), t.blocks[:1]))):
        yield t, layout.x(rank) + layout.box * (index + 1) / (len(group) + 1)


def _legend(x: float, y: float) -> Iterator[str]:
    for kind, meaning in (("fold", "message, folded in"), ("copy", "message, copied")):
        yield (
            f"<path d='M{x:.1f} {y - 4:.1f}h26' stroke='{COLOURS[kind]}' stroke-width='1.6' marker-end='url(#{kind})'/>"
        )
        yield text(x + 36, y, meaning, size=11, anchor="start")
        x += 165
    for part, meaning in ((0.1, "begun"), (0.9, "nearly there"), (1.0, "complete")):
        yield f"<rect x='{x:.1f}' y='{y - 12:.1f}' width='22' height='15' fill='{shade(part)}' stroke='{LINE}'/>"
        yield text(x + 29, y, meaning, size=11, anchor="start")
        x += 45 + 6 * len(meaning)
