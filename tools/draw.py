"""`abccl draw`: a schedule as a picture, ranks across and time downwards (SVG, written by hand)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import click

from ..algorithms import Block, Collective, Replay
from ..algorithms.replay import Transfer
from .arguments import ranges, replayed, schedule_arguments
from .frames import Cell, Row, frames, letters, rows, summary

FONT = "font-family='Helvetica, Arial, DejaVu Sans, sans-serif'"
INK, FAINT, LINE = "#22303c", "#8a97a3", "#ccd5dd"
FOLD, COPY = "#c2571a", "#3d6fa5"
PALE, DEEP, DONE = (236, 242, 250), (122, 170, 222), "#3f9b63"

MARGIN, GUTTER, HEAD, FOOT = 24, 64, 76, 44
CELL, LABEL_SIZE, TEXT_SIZE = 20, 10.5, 11


@click.command()
@schedule_arguments
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The file to write.")
def draw(collective: str, algorithm: str, file: Path | None, ranks: int, root: int, output: Path | None) -> None:
    """Draw a schedule as an SVG picture.

    Ranks stand across, time runs downwards. Boxes are what a rank holds, the darker the more complete, green when
    finished; arrows are messages with the blocks they carry. FILE is a Python file that registers the algorithm,
    if it is your own. Without -o the file is called COLLECTIVE-ALGORITHM-RANKS.svg.
    """
    run = replayed(collective, algorithm, file, ranks, root)
    path = output or Path(f"{run.algorithm.collective.value}-{run.algorithm.name}-{ranks}.svg")
    path.write_text(picture(run), encoding="utf-8")
    click.echo(f"{summary(run)}: {path}")


class Layout(NamedTuple):
    """Where things are, in pixels."""

    rows: list[Row]
    box: float
    gap_across: float
    gap_down: float

    def x(self, rank: int) -> float:
        """The left edge of a rank's boxes."""
        return MARGIN + GUTTER + self.label_width + rank * (self.box + self.gap_across)

    def y(self, time: int) -> float:
        """The upper edge of the boxes of that time."""
        return HEAD + 24 + time * (self.height + self.gap_down)

    @property
    def height(self) -> float:
        return CELL * len(self.rows)

    @property
    def label_width(self) -> float:
        return max(10, 6.5 * max(len(row.label) for row in self.rows)) + 6


def picture(run: Replay) -> str:
    """The picture as the text of an SVG file."""
    cells = frames(run)
    text = max((len(cell.text) for frame in cells for row in frame for cell in row), default=1)
    layout = Layout(rows(run), max(64, 6.6 * text + 14), 26, _gap(run))
    width = max(layout.x(run.size) + MARGIN, 560)
    height = layout.y(run.steps) + layout.height + FOOT
    body = "\n".join((*_background(run, layout), *_arrows(run, layout), *_boxes(run, layout, cells), *_labels(run, layout)))
    legend = "\n".join(_legend(run, height - 18))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' height='{height:.0f}' "
        f"viewBox='0 0 {width:.0f} {height:.0f}' {FONT}>\n"
        f"<title>{escape(summary(run))}</title>\n"
        f"<defs>{_head('fold', FOLD)}{_head('copy', COPY)}</defs>\n"
        f"<rect width='100%' height='100%' fill='white'/>\n{body}\n{legend}\n</svg>\n"
    )
