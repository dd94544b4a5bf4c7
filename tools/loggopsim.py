"""`python -m abccl.tools.loggopsim`: the simulator against LogGOPSim, an independent one that reads schedules in GOAL.

It is no part of abccl: build it and its txt2bin elsewhere, and name both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import click

from ..algorithms.words import in_words
from ..bench.__main__ import FILE, Failure, check_writable
from ..bench.document import write_part
from ..bench.machine import machine
from ..errors import AbcclError
from .loggopsim_run import LANES, MESSAGES, RANKS, SEGMENT, SIZES, Comparison, Constants, Pair, Programs, Row, compare
from .markdown import table, wrapped

PROGRAM = click.Path(exists=True, dir_okay=False, path_type=Path)
PICOSECONDS = click.IntRange(0, 2**31 - 1)

PART = "another-simulator"
SOURCE = "https://github.com/spcl/LogGOPSim"

_RULES = (
    "A message of s bytes takes (s - 1) G; here it takes s G. Times are whole picoseconds, messages whole bytes.",
    "A message keeps its receiver's processor busy while it comes in, for o + (s - 1) G. Here it keeps a link busy for "
    "s G, then the processor for o.",
    "A message is taken when it is there and the processor is free, wherever the program is. Here it waits until the "
    "program comes to it.",
    "A send begins when the processor and the link are both free. Here the processor is busy for o, then the message "
    "waits for the link by itself.",
    "Of two that want something at the same time the older one is first. Here it is the one that is less far in its "
    "program, then the lower rank, counted so that rotating the ranks changes nothing.",
)


def section(found: Comparison, command: str, revision: str) -> str:
    """The section of the document."""
    c = found.constants
    which = f"{SOURCE}, revision {revision}" if revision else SOURCE
    turn, at_once = [f"{in_words(size)}, us" for size in SIZES], f"{in_words(SIZES[-1])}, L = o = 0, us"
    cut = ["1 lane, us", f"{LANES} lanes, us"]
    segmented = f"{in_words(SIZES[-1])} in segments of {in_words(SEGMENT)}"
    several = [row.pairs[1] for row in found.segments]
    parts = [
        f"Written by `{command}`, {found.day}; do not edit it.",
        wrapped(
            f"""`abccl simulate --goal FILE` writes a schedule in GOAL, which other simulators read. LogGOPSim
            ({which}; Hoefler, Schneider & Lumsdaine 2010) runs the same schedules as abccl's event engine, with the
            same LogGP constants: L = {_us(c.L)} us, o = {_us(c.o)} us, G = {c.G} ps per byte, {c.fold} ps to fold a
            byte; g = 0 and O = 0, and all messages are eager. In a topology file that is one level with alpha = L,
            overhead = o, beta = G, a link into each rank and one out of it of capacity 1/G, a processor for each lane
            and any number of slots. A cell has the time by LogGOPSim, the time by abccl, and how much longer that is.
            Left out, or a dash, is what has more than {MESSAGES:,} messages, or but one segment below."""
        ),
        "### One message at a time",
        wrapped(
            f"""Each rank of these algorithms sends a message, waits for one, and goes on. LogGP says all about it, and
            both simulators must agree: the largest difference is {_largest(found.in_turn):.3%}. It is the byte of
            the first rule below."""
        ),
        _table(found.in_turn, turn),
        "### Several messages at once",
        wrapped(
            f"""Ranks of these algorithms send and receive several messages in a step, or come to their steps at
            different times. LogGOPSim's ranks can not begin to send while they receive, by the second and the fourth
            rule, so that messages come one after the other that overlap here: it is the slower where L and o are long
            beside s G. Short messages to and from everybody are faster there, by the third rule: a rank takes them
            between its sends, and here it has o to pay for all of them when it comes to them in its program. Without L
            and o nothing of that is left: the largest difference is {_largest(found.at_once, 3):.3%} (last column)."""
        ),
        _table(found.at_once, [*turn, at_once]),
        "### Segments",
        wrapped(
            f"""{segmented}, one after the other (1 lane) and up to {LANES} at a time, each with a processor of its own.
            With {LANES} lanes the processors have time for what the rules charge them with, and the links decide: the
            median difference is {_median(several):.2%}, the largest {_largest(found.segments, 1):.1%}. What is
            left: double_tree and scatter_all_gather still overlap more here (the second and the fourth rule); in tree
            and knomial it matters who is first at a link at the same time (the last); ranks of direct and two_shot ask
            first for what comes last, and pay o for each message that waits meanwhile (the third). With one lane the
            chain shows the third rule at its worst: while messages come in faster than the processor can take them
            LogGOPSim's ranks pass none on, so that nothing overlaps; abccl's ranks, like its engines, keep the order of
            their program."""
        ),
        _table(found.segments, cut),
        "### What LogGOPSim does otherwise",
        "\n".join(f"{number}. {rule}" for number, rule in enumerate(map(_indented, _RULES), 1)),
        "### Speed",
        "\n".join(speeds(found)),
    ]
    return "\n\n".join(parts) + "\n"


def speeds(found: Comparison) -> list[str]:
    """How long both simulators took, as a table: of all cases, and of the one with the most events."""
    pairs = [pair for row in (*found.in_turn, *found.at_once, *found.segments) for pair in row.pairs if pair]
    largest = max(pairs, key=lambda pair: pair.events)
    name = f"{largest.ours.algorithm.collective.value} {largest.ours.algorithm.name}, {largest.ours.ranks} ranks"
    lines = []
    for what, some in ((f"all {len(pairs)} cases", pairs), (name, [largest])):
        theirs, took = sum(pair.events for pair in some), sum(pair.took for pair in some)
        events, engine = sum(pair.ours.events for pair in some), sum(pair.ours.took for pair in some)
        lines.append([what, "LogGOPSim, its process", f"{theirs:,}", f"{took:.2f}", f"{theirs / took / 1e6:.1f}"])
        lines.append([what, "abccl, its engine", f"{events:,}", f"{engine:.2f}", f"{events / engine / 1e6:.1f}"])
        whole, converted = sum(pair.whole for pair in some), sum(pair.converted for pair in some)
        lines.append([what, "abccl, schedules written down and engine", f"{events:,}", f"{whole:.2f}", ""])
        lines.append([what, "txt2bin", "", f"{converted:.2f}", ""])
    return [
        table(["", "", "events", "seconds", "million events a second"], lines),
        "",
        f"{machine()['cpu']}, one core.",
    ]


def line(row: Row) -> str:
    """What is printed of a row."""
    return f"{row.name:30}{row.ranks:5}  {'; '.join(' '.join(_cell(pair)) for pair in row.pairs)}"


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    head = ["", "ranks", *(word for column in columns for word in (column, ""))]
    return table(head, [[row.name, str(row.ranks), *(word for p in row.pairs for word in _cell(p))] for row in rows])


def _cell(pair: Pair | None) -> tuple[str, str]:
    """The times of both in microseconds, and the difference."""
    if pair is None:
        return "-", ""
    return f"{pair.theirs * 1e6:.2f} / {pair.ours.seconds * 1e6:.2f}", f"{pair.difference:+.2%}"


def _largest(rows: Sequence[Row], column: int | None = None) -> float:
    """The largest difference, of all columns or of one."""
    pairs = [pair for row in rows for pair in (row.pairs if column is None else row.pairs[column : column + 1])]
    return max(abs(pair.difference) for pair in pairs if pair)


def _median(pairs: Sequence[Pair | None]) -> float:
    return median(abs(pair.difference) for pair in pairs if pair)


def _indented(words: str) -> str:
    return wrapped(words).replace("\n", "\n   ")


def _us(picoseconds: int) -> str:
    return f"{picoseconds / 1e6:g}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--simulator", type=PROGRAM, required=True, help="LogGOPSim.")
@click.option("--txt2bin", type=PROGRAM, required=True, help="Its converter.")
@click.option("--revision", default="", help="Of LogGOPSim, for the document.")
@click.option("--latency", type=PICOSECONDS, default=2_500_000, show_default=True, help="L, in picoseconds.")
@click.option("--overhead", type=PICOSECONDS, default=1_500_000, show_default=True, help="o, in picoseconds.")
@click.option("--gap", type=PICOSECONDS, default=80, show_default=True, help="G, in picoseconds per byte.")
@click.option("--fold", type=PICOSECONDS, default=10, show_default=True, help="Picoseconds to fold a byte.")
@click.option("--ranks", "most", type=click.IntRange(4), default=RANKS[-1], show_default=True, help="The most.")
@click.option("--write", "document", type=FILE, help="Write its part there.")
def command(
    simulator: Path,
    txt2bin: Path,
    revision: str,
    latency: int,
    overhead: int,
    gap: int,
    fold: int,
    most: int,
    document: Path | None,
) -> None:
    """Give LogGOPSim and abccl's simulator the same schedules and the same constants, and compare their times.

    A line has for each case: microseconds by LogGOPSim, by abccl, and the difference. Cases with too many messages are
    left out, shown as -.
    """
    try:
        if document:
            check_writable(document)
        programs = Programs(simulator.resolve(), txt2bin.resolve())
        found = compare(programs, Constants(latency, overhead, gap, fold), most, lambda row: click.echo(line(row)))
        click.echo("\n".join(speeds(found)))
        if document:
            options = f"--latency {latency} --overhead {overhead} --gap {gap} --fold {fold} --ranks {most}"
            said = f"python -m abccl.tools.loggopsim --simulator LogGOPSim --txt2bin txt2bin {options}"
            write_part(document, PART, section(found, said, revision))
    except AbcclError as error:
        raise Failure(str(error)) from error


if __name__ == "__main__":
    command(prog_name="python -m abccl.tools.loggopsim")
