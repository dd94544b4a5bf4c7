"""Timelines as Chrome trace events, the JSON that Perfetto (ui.perfetto.dev) and chrome://tracing show.

A process of the picture is a unit of ranks, a node say; a thread is a lane of a rank; an arrow is a message.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

import numpy as np

from ..algorithms.simulator import KINDS, Timeline, Topology
from ..errors import ArgumentError

MOST = 1_000_000
"""Slices of a trace: some 300 MB, as much as a browser takes."""

_SEND, _RECEIVE, _MESSAGE = map(KINDS.index, ("send", "receive", "message"))
Channel = tuple[int, ...]
"""A sender, a receiver and a lane, whose messages stay in order."""

_TOWARDS = {"send": "to", "wait": "for", "receive": "from", "message": "to"}


class Slice(NamedTuple):
    """What a lane of a rank does from `start` to `end`, in seconds.

    Attributes:
        kind: what sort of thing that is, to filter by: "wait".
        name: what stands in the picture: "wait for 3".
        arguments: what is told of it when it is clicked on.
        sends, takes: the number of the message that leaves with it, or that it takes. Each number stands at two slices.
        under_way: the number of the message whose way it is, from when it takes a link until it is there. These may
            overlap, and stand in rows of their own.
    """

    rank: int
    lane: int
    kind: str
    name: str
    start: float
    end: float
    arguments: Mapping[str, object]
    sends: int | None = None
    takes: int | None = None
    under_way: int | None = None


@dataclass(frozen=True)
class Rows:
    """Where lanes stand in the picture.

    Attributes:
        unit: what a unit of ranks is called: "node".
        unit_of: the number of a rank's unit.
        lanes: of each rank.
        unit_names: what units are called that have names: "host a".
        lane_names: what lanes of ranks are called that have names.
    """

    unit: str
    unit_of: Callable[[int], int]
    lanes: int
    unit_names: Mapping[int, str] = field(default_factory=dict)
    lane_names: Mapping[tuple[int, int], str] = field(default_factory=dict)


def write(file: TextIO, slices: Iterable[Slice], rows: Rows, about: Mapping[str, object] | None = None) -> None:
    """Write a trace as it comes.

    Args:
        slices: by ascending start, of those that start together the longest first; those of a lane must not overlap,
            but may lie within each other.
        about: what else is told of the trace.
    """
    begun: set[tuple[str, int]] = set()
    head: dict[str, object] = {"displayTimeUnit": "ns"} | ({"otherData": dict(about)} if about else {})
    file.write(json.dumps(head, separators=(",", ":"))[:-1] + ',"traceEvents":[')
    separator = "\n"
    for one in slices:
        for event in _events(one, rows, begun):
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
    file.write("\n]}\n")


def _events(one: Slice, rows: Rows, begun: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    # Perfetto gives 0 a meaning of its own, and wants threads of different processes to have different numbers.
    unit = rows.unit_of(one.rank)
    place = {"pid": unit + 1, "tid": one.rank * rows.lanes + one.lane + 1}
    yield from _names(one, rows, unit, place, begun)
    # Perfetto keeps whole nanoseconds and cuts off the rest, and drops slices that overlap then. The tenth of one keeps
    # a start from being cut off to the nanosecond before.
    start, end = round(one.start * 1e9), round(one.end * 1e9)
    shown = {**place, "ts": (start + 0.1) / 1e3}
    if one.under_way is not None:
        about = {"name": one.name, "cat": "way", "id": one.under_way, **place}
        yield {"ph": "b", **about, "ts": shown["ts"], "args": dict(one.arguments)}
        yield {"ph": "e", **about, "ts": max(end, start + 1) / 1e3}
        return
    yield {
        "ph": "X",
        "name": one.name,
        "cat": one.kind,
        **shown,
        "dur": (end - start) / 1e3,
        "args": dict(one.arguments),
    }
    # An arrow belongs to the last slice of its thread before it, in the order of time and of the file.
    for phase, number in (("s", one.sends), ("f", one.takes)):
        if number is not None:
            yield {"ph": phase, "name": "message", "cat": "message", "id": number, **shown, "bp": "e"}


def _names(
    one: Slice, rows: Rows, unit: int, place: Mapping[str, int], begun: set[tuple[str, int]]
) -> Iterator[dict[str, Any]]:
    """What a process and a thread are called, when they come for the first time."""
    lane = f", lane {one.lane}" if rows.lanes > 1 else ""
    for what, number, name in (
        ("process", place["pid"], rows.unit_names.get(unit, f"{rows.unit} {unit}")),
        ("thread", place["tid"], rows.lane_names.get((one.rank, one.lane), f"rank {one.rank}{lane}")),
    ):
        if (what, number) not in begun:
            begun.add((what, number))
            yield {"ph": "M", "name": f"{what}_name", **place, "args": {"name": name}}
            yield {"ph": "M", "name": f"{what}_sort_index", **place, "args": {"sort_index": number}}


# ---- of a simulation


def rows_of(topology: Topology, lanes: int) -> Rows:
    """Rows by the units below the last level: nodes, where nodes make a cluster."""
    index = max(0, len(topology.levels) - 2)
    ranks = topology.units[index]
    return Rows(topology.levels[index].name, lambda rank: rank // ranks if ranks else 0, lanes)


def slices_of(timeline: Timeline) -> Iterator[Slice]:
    """The slices of a simulation; a message that both ends of are there has an arrow.

    Raises:
        ArgumentError: there are more than `MOST`.
    """
    number = len(timeline.kind)
    if number > MOST:
        raise ArgumentError(too_many(number))
    return _in_order(timeline)


def too_many(slices: int) -> str:
    """What to say where a trace would have so many slices."""
    return (
        f"a trace of {slices:,} slices is too much for a browser, {MOST:,} are the most: take fewer ranks, or fewer "
        f"segments (a smaller --size, a larger --segment)"
    )


def _in_order(timeline: Timeline) -> Iterator[Slice]:
    leaving, arriving = _messages(timeline), _messages(timeline)
    under_way: dict[Channel, deque[int]] = defaultdict(deque)
    there = set(timeline.rank.tolist())
    sent = ways = 0
    for place in np.argsort(timeline.start, kind="stable").tolist():
        kind = int(timeline.kind[place])
        rank, lane, peer = (int(column[place]) for column in (timeline.rank, timeline.lane, timeline.peer))
        nbytes, sends, takes = float(timeline.nbytes[place]), None, None
        name = KINDS[kind]
        way: int | None = None
        if kind == _SEND and peer in there:
            nbytes, sends, sent = leaving[rank, peer, lane].popleft(), sent, sent + 1
            under_way[rank, peer, lane].append(sends)
        elif kind == _RECEIVE and peer in there:
            nbytes, takes = arriving[peer, rank, lane].popleft(), under_way[peer, rank, lane].popleft()
        elif kind == _MESSAGE:
            way, ways = ways, ways + 1
        yield Slice(
            rank,
            lane,
            name,
            f"{name} {_TOWARDS[name]} {peer}" if peer >= 0 else name,
            float(timeline.start[place]),
            float(timeline.end[place]),
            {"segment": int(timeline.segment[place])} | ({"bytes": round(nbytes)} if nbytes else {}),
            sends,
            takes,
            way,
        )


def _messages(timeline: Timeline) -> dict[Channel, deque[float]]:
    """The bytes of the messages of each channel, in their order."""
    found: dict[Channel, deque[float]] = defaultdict(deque)
    for place in np.flatnonzero(timeline.kind == _MESSAGE).tolist():
        channel = tuple(int(column[place]) for column in (timeline.rank, timeline.peer, timeline.lane))
        found[channel].append(float(timeline.nbytes[place]))
    return found
