"""Snapshots of flight recorders made by hand, for tests of what reads them."""

from __future__ import annotations

from typing import Any

NOW = 1000.0
RING = "all_reduce(float32, sum, 1048576 elements, ring)"


def operation(number: int, start: float, end: float | None = None, call: str = RING, **other: Any) -> dict[str, Any]:
    """A collective that began and ended so many seconds ago; it runs if it has no end."""
    state = "running" if end is None else "finished"
    found = {"number": number, "call": call, "bytes": 4 << 20, "start": NOW - start, "state": state}
    return {**found, "end": None if end is None else NOW - end, **other}


def message(call: str, peer: int | None, start: float, end: float | None = None, **other: Any) -> dict[str, Any]:
    """A message that began and ended so many seconds ago."""
    found = {"call": call, "peer": peer, "tag": 0, "bytes": 8, "start": NOW - start}
    state = "running" if end is None else "finished"
    return {**found, "end": None if end is None else NOW - end, "state": state, **other}


def step(
    number: int, step: int, end: float, lane: int = 0, segment: int = 0, peer: int | None = None
) -> dict[str, Any]:
    """A step that ended so many seconds ago."""
    return {"number": number, "lane": lane, "segment": segment, "step": step, "peer": peer, "end": NOW - end}


def waiting(number: int, since: float, peer: int | None, text: str, step: int = 3, **other: Any) -> dict[str, Any]:
    """A wait that began so many seconds ago."""
    return {"number": number, "since": NOW - since, "step": step, "peer": peer, "text": text, **other}


def snapshot(rank: int, operations: list[dict[str, Any]] | None = None, size: int = 4, **other: Any) -> dict[str, Any]:
    """A rank's, of process 4710 + rank. Of what it has called the numbers are taken from the operations."""
    operations = operations or []
    found: dict[str, Any] = {
        "version": 1,
        "host": "a",
        "group": "default",
        "token": 77,
        "rank": rank,
        "size": size,
        "pid": 4710 + rank,
        "closed": False,
        "error": None,
        "entered": max((one["number"] for one in operations), default=0),
        "finished": max((one["number"] for one in operations if one["end"] is not None), default=0),
        "monotonic": NOW,
        "wall": 1.7e9 + NOW,
        "waiting": None,
        "operations": operations,
        "steps": [],
        "messages": [],
        "peers": [],
    }
    return found | other


def peer(rank: int, entered: int, finished: int, closed: bool = False, gone: bool = False) -> dict[str, Any]:
    """What a rank sees of another."""
    found = {"rank": rank, "pid": 4710 + rank, "entered": entered, "finished": finished}
    return {**found, "closed": closed, "gone": gone}
