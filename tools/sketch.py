"""A schedule as a small picture: ranks below each other, time to the right, a line for each message."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from ..algorithms import Block, Replay
from .frames import summary
from .svg import COLOURS, FAINT, INK, LINE, picture_of, shade, text

LEFT, TOP, RIGHT, BOTTOM = 62, 30, 20, 16
ROW, DOT = 26, 6.5
CROWD = 4  # where more lines meet at a dot, all are thin


def sketch(run: Replay) -> str:
    """The picture as the text of an SVG file; a few kilobytes for 8 ranks.

    A dot is what a rank holds of its result, the darker the more, green when complete. Lines are messages, orange
    where they are folded in and blue where they are copied, the thicker the larger their part of the vector.
    """
    column = 140 if run.steps <= 2 else 72 if run.steps <= 8 else 56
    width, height = LEFT + run.steps * column + RIGHT, TOP + (run.size - 1) * ROW + BOTTOM
    parts = [f"<title>{summary(run)}</title>", *_axes(run, column), *_lines(run, column), *_dots(run, column)]
    return picture_of(width, height, parts)


def _axes(run: Replay, column: int) -> Iterator[str]:
    for rank in range(run.size):
        y = TOP + rank * ROW
        yield text(10, y + 4, f"rank {rank}", size=11, anchor="start", colour=INK)
        yield f"<path d='M{LEFT} {y}h{run.steps * column}' stroke='{LINE}' stroke-dasharray='1 3'/>"
    for step in range(run.steps):
        label = f"step {step + 1}" if step == 0 else str(step + 1)
        yield text(LEFT + (step + 0.5) * column, 14, label, size=10.5, colour=FAINT)


def _lines(run: Replay, column: int) -> Iterator[str]:
    """The messages; those of one colour and width are a group, which keeps the file small."""
    groups: dict[tuple[str, float], list[str]] = defaultdict(list)
    meeting = Counter((t.destination, t.destination_step, "to") for t in run.transfers)
    meeting.update((t.source, t.source_step, "from") for t in run.transfers)
    crowded = max(meeting.values(), default=0) > CROWD
    for t in run.transfers:
        x1, y1 = LEFT + run.starts[t.source][t.source_step] * column + DOT, TOP + t.source * ROW
        x2 = LEFT + run.ends[t.destination][t.destination_step] * column - DOT
        y2 = TOP + t.destination * ROW
        bend = min((0.15 if crowded else 0.4) * column, (x2 - x1) / 2)
        thickness = 0.8 if crowded else round(1 + 2.5 * min(1, len(t.blocks) / run.blocks), 1)
        line = f"<path d='M{x1:g} {y1}C{x1 + bend:g} {y1} {x2 - bend:g} {y2} {x2:g} {y2}'/>"
        groups["fold" if t.reduce else "copy", thickness].append(line)
    for (kind, thickness), lines in groups.items():
        style = f"fill='none' stroke='{COLOURS[kind]}' stroke-width='{thickness}' marker-end='url(#{kind})'"
        yield f"<g {style}>{''.join(lines)}</g>"


def _dots(run: Replay, column: int) -> Iterator[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for time, held in enumerate(run.history()):
        for rank in range(run.size):
            part = _part(run, rank, held[rank])
            colour = LINE if part is None else shade(part)
            groups[colour].append(f"<circle cx='{LEFT + time * column}' cy='{TOP + rank * ROW}' r='{DOT - 1}'/>")
    for colour, dots in groups.items():
        yield f"<g fill='{colour}' stroke='{INK}'>{''.join(dots)}</g>"


def _part(run: Replay, rank: int, held: dict[Block, int]) -> float | None:
    """How much of its result a rank holds, 0 to 1; None if it is to have none."""
    collective = run.algorithm.collective
    wanted = collective.after(rank, run.size, run.blocks, run.root)
    found = sum(
        run.expressions.contributors[held[block]].bit_count() / len(collective.contributors(block, run.size, run.root))
        for block in wanted
        if block in held
    )
    return round(found / len(wanted), 3) if len(wanted) else None
