"""Flight records as slices of a timeline: what ranks have called, the steps in it, and their messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..algorithms.words import in_words
from ..transports.flight import Snapshot, parse_call
from .timeline import Rows, Slice

Row = tuple[int, int]
"""A row of a rank: what stands in it, and the number of the row among these."""

CALLS, STEPS, MESSAGES = range(3)


class Span(NamedTuple):
    """A slice in the row of a rank. Times are of the host's monotonic clock."""

    row: Row
    kind: str
    name: str
    start: float
    end: float
    arguments: Mapping[str, object]


def slices_of(snapshots: Sequence[Snapshot], offsets: Mapping[str, float]) -> tuple[list[Slice], Rows]:
    """The slices of all records, as a writer wants them, from the first one's start on; and their rows.

    Args:
        offsets: what is added to a host's clock for the common one, by its name.
    """
    spans = [list(_spans(one)) for one in snapshots]
    # Offsets are seconds since 1970, which a float has to a quarter of a microsecond; their differences are exact.
    base = next(iter(offsets.values()))
    shifts = {host: offset - base for host, offset in offsets.items()}
    begin = min((shifts[one["host"]] + span.start for one, own in zip(snapshots, spans) for span in own), default=0.0)
    several = len({(one["host"], one["token"]) for one in snapshots}) > len({one["host"] for one in snapshots})
    found: list[Slice] = []
    names: dict[tuple[int, int], str] = {}
    for place, (one, own) in enumerate(zip(snapshots, spans)):
        rows = {row: lane for lane, row in enumerate(sorted({span.row for span in own}))}
        who = f"rank {one['rank']}" + f" of {one['group']}" * several
        names |= {(place, lane): who + _suffix(row) for row, lane in rows.items()}
        shift = shifts[one["host"]] - begin
        found += [
            Slice(place, rows[span.row], span.kind, span.name, span.start + shift, span.end + shift, span.arguments)
            for span in own
        ]
    hosts = list(offsets)
    return sorted(found, key=lambda one: (one.start, -one.end)), Rows(
        "host",
        lambda place: hosts.index(snapshots[place]["host"]),
        max((lane + 1 for _, lane in names), default=1),
        {unit: f"host {host}" for unit, host in enumerate(hosts)},
        names,
    )


def _suffix(row: Row) -> str:
    what, number = row
    return {CALLS: ", meanwhile" * bool(number), STEPS: f", lane {number}", MESSAGES: ", messages"}[what]


def _spans(one: Snapshot) -> Iterator[Span]:
    yield from _calls(one)
    yield from _steps(one)
    yield from _messages(one)


def _calls(one: Snapshot) -> Iterator[Span]:
    now, waiting = one["monotonic"], one["waiting"]
    operations = one["operations"]
    ends = [now if operation["end"] is None else operation["end"] for operation in operations]
    rows = _apart([(operation["start"], end) for operation, end in zip(operations, ends)])
    for operation, end, row in zip(operations, ends, rows):
        call, number = parse_call(operation["call"]), operation["number"]
        about = {"call": operation["call"], "size": in_words(operation["bytes"]), "state": _state(operation["state"])}
        if one["error"] and operation["state"] != "finished":
            about["error"] = one["error"]
        name = f"{call.kind} #{number}" + _mark(operation["state"])
        yield Span((CALLS, row), "collective", name, operation["start"], end, about)
        if waiting and waiting["number"] == number and operation["start"] <= waiting["since"] < end:
            words = "; ".join(filter(None, (waiting["text"], waiting.get("note"))))
            wait = {"step": waiting["step"], "peer": waiting["peer"]}
            yield Span((CALLS, row), "wait", words, waiting["since"], end, wait)


def _steps(one: Snapshot) -> Iterator[Span]:
    """A step begins where the one before it in its lane has ended, or the collective begins."""
    calls = {operation["number"]: operation for operation in one["operations"]}
    before: dict[int, float] = {}
    for step in one["steps"]:
        call = calls.get(step["number"])
        known = [time for time in (before.get(step["lane"]), call and call["start"]) if time is not None]
        before[step["lane"]] = step["end"]
        if known and max(known) <= step["end"]:
            name = f"step {step['step']}" + f", segment {step['segment']}" * bool(step["segment"])
            kind = parse_call(call["call"]).kind if call else ""
            about = {"of": f"{kind} #{step['number']}", "segment": step["segment"], "peer": step["peer"]}
            yield Span((STEPS, step["lane"]), "step", name, max(known), step["end"], about)


def _messages(one: Snapshot) -> Iterator[Span]:
    messages = one["messages"]
    ends = [one["monotonic"] if message["end"] is None else message["end"] for message in messages]
    rows = _apart([(message["start"], end) for message, end in zip(messages, ends)])
    for message, end, row in zip(messages, ends, rows):
        peer = "any rank" if message["peer"] is None else message["peer"]
        name = f"{message['call']} {'to' if message['call'] == 'send' else 'from'} {peer}" + _mark(message["state"])
        about = {"tag": message["tag"], "size": in_words(message["bytes"]), "state": _state(message["state"])}
        yield Span((MESSAGES, row), "message", name, message["start"], end, about)


def _state(state: str) -> str:
    return "unfinished" if state == "running" else state


def _mark(state: str) -> str:
    return "" if state == "finished" else f" ({_state(state)})"


def _apart(spans: Sequence[tuple[float, float]]) -> list[int]:
    """A row for each span, the first that is free: what overlaps in one row is not drawn."""
    ends: list[float] = []
    rows = [0] * len(spans)
    for place in sorted(range(len(spans)), key=lambda place: spans[place]):
        start, end = spans[place]
        row = next((row for row, free in enumerate(ends) if free <= start), len(ends))
        ends[row : row + 1] = [end]
        rows[place] = row
    return rows
