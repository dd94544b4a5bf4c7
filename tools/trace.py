"""`abccl trace`: what ranks have recorded, as one timeline for ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from ..algorithms.words import count
from ..errors import ArgumentError
from ..transports.flight import Operation, Snapshot, parse_call, to_snapshot, together
from . import timeline
from .flight import slices_of

PATH = click.Path(exists=True, path_type=Path)
OUTPUT = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command()
@click.argument("records", nargs=-1, type=PATH)
@click.option("--pid", type=click.IntRange(1), help="Of the running job of this process, instead of from files.")
@click.option("-o", "--output", type=OUTPUT, default=Path("trace.json"), show_default=True, help="The file to write.")
def trace(records: tuple[Path, ...], pid: int | None, output: Path) -> None:
    """Merge the flight records of ranks to one timeline, to be opened in ui.perfetto.dev or chrome://tracing.

    RECORDS are files that ranks have written, or folders of them: ABCCL_FLIGHT_DIR has those of failures. A process of
    the picture is a host. A rank has a row of its collectives, one for the steps of each lane, and one of its messages.
    What had not finished when the record was taken ends there, and says so.

    Ranks of one host have one clock. Of several hosts the wall clocks are taken, unless collectives show them to be
    wrong, since none ends anywhere before all have begun it: then they are moved to where these allow it. How far they
    may still be apart is printed.

    \b
    abccl trace /tmp/abccl-1000/default-0123456789abcdef-failed -o trace.json
    abccl trace --pid 4711
    """
    if bool(records) == (pid is not None):
        raise click.UsageError("wanted are files or folders of flight records, or --pid with the number of a process")
    found = together(pid) if pid is not None else newest(read(records))
    hosts = clocks(found)
    slices, rows = slices_of(found, {host: clock.offset for host, clock in hosts.items()})
    if len(slices) > timeline.MOST:
        raise ArgumentError(f"{len(slices):,} slices are too many for a browser, {timeline.MOST:,} are the most")
    about = {name: clock.words for name, clock in hosts.items()}
    with output.open("w") as file:
        timeline.write(file, slices, rows, {"clocks": about})
    operations = sum(len(one["operations"]) for one in found)
    click.echo(
        f"{output}: {count(len(found), 'record')} of {count(len(hosts), 'host')}, {count(operations, 'collective')}, "
        f"{count(sum(len(one['steps']) for one in found), 'step')}: open it in ui.perfetto.dev"
    )
    for name, words in list(about.items())[1:]:
        click.echo(f"host {name}: {words}")


# ---- what there is


def read(paths: Iterable[Path]) -> list[Snapshot]:
    """The records in these files, and in all below these folders.

    Raises:
        ArgumentError: a file is no record, or there is none.
    """
    found = []
    for path in paths:
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not files:
            raise ArgumentError(f"there are no flight records in {path}: files that end in .json")
        for file in files:
            try:
                found.append(to_snapshot(json.loads(file.read_text(encoding="utf-8"))))
            except (ValueError, RecursionError) as error:
                raise ArgumentError(f"{file} is no flight record: {error}") from error
    return found


def newest(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Of each rank of a communicator the last record: it holds what the others do."""
    found: dict[tuple[str, int, int], Snapshot] = {}
    for one in sorted(snapshots, key=lambda one: one["wall"]):
        found[one["host"], one["token"], one["rank"]] = one
    return sorted(found.values(), key=lambda one: (one["host"], one["group"], one["token"], one["rank"]))


# ---- clocks


class Clock(NamedTuple):
    """What is added to a host's monotonic clock for the common one, and how good that is, in words."""

    offset: float
    words: str


_MEETINGS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "barrier")
"""Collectives that end nowhere before all ranks have begun them."""


def clocks(snapshots: Sequence[Snapshot]) -> dict[str, Clock]:
    """Each host's clock, that of the first as it is."""
    hosts: dict[str, list[Snapshot]] = defaultdict(list)
    for one in snapshots:
        hosts[one["host"]].append(one)
    found: dict[str, Clock] = {}
    first, *_ = hosts
    walls = {host: ranks[-1]["wall"] - ranks[-1]["monotonic"] for host, ranks in hosts.items()}
    for host, ranks in hosts.items():
        offset, words = walls[host], "its wall clock"
        if host != first:
            least, most, meetings = _ahead(hosts[first], walls[first], ranks, walls[host])
            evidence = count(meetings, "collective")
            if not meetings:
                words += f"; no collective shows how far it is from that of {first}"
            elif least <= 0.0 <= most:
                within = _milliseconds(max(-least, most))
                words += f"; {evidence} agree{'s' * (meetings == 1)} if {first}'s is within {within}"
            else:
                middle, half = (least + most) / 2, abs(most - least) / 2
                side = "ahead of" if middle > 0 else "behind"
                words += f", {_milliseconds(middle)} {side} {first}'s by {evidence}, was moved by that"
                words += f"; within {_milliseconds(half)}"
                offset -= middle
        found[host] = Clock(offset, words)
    return found


def _milliseconds(seconds: float) -> str:
    return f"{abs(seconds) * 1e3:.4g} ms"


def _ahead(
    ours: Sequence[Snapshot], our_wall: float, theirs: Sequence[Snapshot], their_wall: float
) -> tuple[float, float, int]:
    """By how many seconds their clock may be ahead of ours, at least and at most, and how many collectives say so."""
    least, most, meetings = float("-inf"), float("inf"), 0
    here, there = _spans(ours, our_wall), _spans(theirs, their_wall)
    for key in here.keys() & there.keys():
        (our_start, our_end), (their_start, their_end) = here[key], there[key]
        least, most, meetings = max(least, their_start - our_end), min(most, their_end - our_start), meetings + 1
    return least, most, meetings


def _spans(snapshots: Sequence[Snapshot], wall: float) -> dict[tuple[object, ...], tuple[float, float]]:
    """Collectives that all have finished here: when the last one began and the first one ended."""
    spans: dict[tuple[object, ...], list[Operation]] = defaultdict(list)
    tokens: dict[tuple[str, int], set[int]] = defaultdict(set)
    for one in snapshots:
        tokens[one["group"], one["size"]].add(one["token"])
        for operation in one["operations"]:
            call = parse_call(operation["call"])
            if call.kind in _MEETINGS and operation["state"] == "finished":
                words = call.kind if call.kind == "all_to_all" else operation["call"]
                spans[one["group"], one["size"], operation["number"], words].append(operation)
    # Tokens tell communicators of one name apart on a host, not on several.
    return {
        key: (wall + max(one["start"] for one in found), wall + min(one["end"] or 0.0 for one in found))
        for key, found in spans.items()
        if len(tokens[key[0], key[1]]) == 1  # type: ignore[index]
    }
