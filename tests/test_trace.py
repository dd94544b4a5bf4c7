"""`abccl trace`: what ranks have recorded becomes a timeline that viewers take, on one clock."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from flight_records import NOW, message, operation, snapshot, step, waiting

from abccl.tools import timeline
from abccl.tools.cli import main
from abccl.tools.trace import clocks


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["trace", *map(str, arguments)], prog_name="abccl")


def written(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for record in records:
        (folder / f"{record['host']}-{record['token']}-{record['rank']}.json").write_text(json.dumps(record))
    return folder


def traced(tmp_path: Path, *records: dict[str, Any]) -> dict[str, Any]:
    """What `abccl trace` makes of the records, held to the rules of the format."""
    result = run(written(tmp_path / "records", *records), "-o", tmp_path / "trace.json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((tmp_path / "trace.json").read_text(), parse_constant=pytest.fail)
    check_rules(found["traceEvents"])
    return found


def check_rules(events: list[dict[str, Any]]) -> None:
    """Slices of a thread come by their start, and lie beside or within each other; threads belong to one process."""
    threads: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        assert event["ph"] in ("X", "M") and {"pid", "tid", "name"} <= event.keys()
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0 and isinstance(event["args"], dict)
            threads[event["tid"]].append(event)
    assert len({(event["pid"], event["tid"]) for event in events}) == len({event["tid"] for event in events})
    for slices in threads.values():
        assert all(one["ts"] <= other["ts"] for one, other in itertools.pairwise(slices))
        open_until: list[float] = []
        for one in slices:
            while open_until and open_until[-1] <= one["ts"]:
                open_until.pop()
            end = one["ts"] + one["dur"]
            assert not open_until or end <= open_until[-1] + 1e-3, f"{one} juts out of the slice before it"
            open_until.append(end)


def rows(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The slices by the names of their rows: "host a: rank 0"."""
    names = {
        (event["name"], event["pid"], event["tid"] * (event["name"] == "thread_name")): event["args"]["name"]
        for event in found["traceEvents"]
        if event["name"] in ("process_name", "thread_name")
    }
    by_row: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in found["traceEvents"]:
        if event["ph"] == "X":
            host, row = names["process_name", event["pid"], 0], names["thread_name", event["pid"], event["tid"]]
            by_row[f"{host}: {row}"].append(event)
    return by_row


def times(event: dict[str, Any]) -> tuple[float, float]:
    """Start and end in seconds."""
    return round(event["ts"] / 1e6, 6), round((event["ts"] + event["dur"]) / 1e6, 6)


def test_operations_steps_and_messages_have_rows(tmp_path: Path) -> None:
    calls = [operation(16, 6.0, 5.0), operation(17, 4.0)]
    ends = [step(16, 1, 5.75, peer=1), step(16, 2, 5.5), step(16, 1, 5.25, segment=1), step(17, 1, 3.0, lane=1)]
    sent = [message("send", 1, 2.0, 1.0), message("recv", None, 0.75)]
    stuck = waiting(17, 4.0, 1, "waits at step 3 for block 1 from rank 1", note="rank 1 has not entered #17")
    found = rows(traced(tmp_path, snapshot(0, calls, steps=ends, messages=sent, waiting=stuck)))
    assert {row: [(event["name"], times(event)) for event in events] for row, events in found.items()} == {
        "host a: rank 0": [
            ("all_reduce #16", (0.0, 1.0)),
            ("all_reduce #17 (unfinished)", (2.0, 6.0)),
            ("waits at step 3 for block 1 from rank 1; rank 1 has not entered #17", (2.0, 6.0)),
        ],
        "host a: rank 0, lane 0": [
            ("step 1", (0.0, 0.25)),
            ("step 2", (0.25, 0.5)),
            ("step 1, segment 1", (0.5, 0.75)),
        ],
        "host a: rank 0, lane 1": [("step 1", (2.0, 3.0))],
        "host a: rank 0, messages": [("send to 1", (4.0, 5.0)), ("recv from any rank (unfinished)", (5.25, 6.0))],
    }
    assert found["host a: rank 0"][0]["args"] == {"call": calls[0]["call"], "size": "4 MiB", "state": "finished"}
    assert found["host a: rank 0, lane 0"][0]["args"] == {"of": "all_reduce #16", "segment": 0, "peer": 1}


def test_what_failed_says_so(tmp_path: Path) -> None:
    record = snapshot(0, [operation(3, 2.0, 1.0, state="failed")], error="PeerLost: rank 1 is gone")
    (only,) = rows(traced(tmp_path, record))["host a: rank 0"]
    assert only["name"] == "all_reduce #3 (failed)" and only["args"]["error"] == "PeerLost: rank 1 is gone"


def test_what_overlaps_has_rows_of_its_own(tmp_path: Path) -> None:
    """Asynchronous calls are under way at the same time, and viewers drop what overlaps in a row."""
    calls = [operation(1, 5.0, 2.0), operation(2, 4.0, 1.0), operation(3, 1.5, 0.5)]
    found = rows(traced(tmp_path, snapshot(0, calls)))
    assert {row: [event["name"] for event in events] for row, events in found.items()} == {
        "host a: rank 0": ["all_reduce #1", "all_reduce #3"],
        "host a: rank 0, meanwhile": ["all_reduce #2"],
    }


def test_steps_whose_operation_is_forgotten_begin_where_the_last_one_ended(tmp_path: Path) -> None:
    ends = [step(1, 7, 5.0), step(1, 8, 4.0), step(2, 9, 3.5, lane=1), step(2, 1, 2.0)]
    found = rows(traced(tmp_path, snapshot(0, [operation(2, 3.0, 1.0)], steps=ends)))
    # The record does not tell when step 7 began; and step 8 began before all that it does tell.
    assert [times(event) for event in found["host a: rank 0, lane 0"]] == [(0.0, 1.0), (2.0, 3.0)]
    assert "host a: rank 0, lane 1" not in found, "a step that ended before its collective began is torn"


def test_ranks_communicators_and_hosts_are_told_apart(tmp_path: Path) -> None:
    call = [operation(1, 2.0, 1.0)]
    records = [
        snapshot(0, call),
        snapshot(1, call),
        snapshot(0, call, group="tp", token=78),
        snapshot(2, call, host="b", token=99),
    ]
    found = rows(traced(tmp_path, *records))
    assert sorted(found) == [
        "host a: rank 0 of default",
        "host a: rank 0 of tp",
        "host a: rank 1 of default",
        "host b: rank 2 of default",
    ]


def test_of_two_records_of_a_rank_the_newer_one_is_taken(tmp_path: Path) -> None:
    folder = written(tmp_path / "records", snapshot(0, [operation(1, 2.0, 1.0)]))
    (folder / "later.json").write_text(json.dumps(snapshot(0, [operation(2, 0.5, 0.1)], wall=1.7e9 + NOW + 1)))
    result = run(folder, "-o", tmp_path / "trace.json")
    assert f"{tmp_path / 'trace.json'}: 1 record of 1 host, 1 collective, 0 steps" in result.output
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "all_reduce #2" in names and "all_reduce #1" not in names


# ---- clocks of several hosts


def on_two_hosts(*pairs: tuple[dict[str, Any], dict[str, Any]], ahead: float = 0.0) -> list[dict[str, Any]]:
    """Ranks 0 on host a and 1 on b, whose wall clock is so many seconds ahead."""
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    later = {"monotonic": 5.0, "wall": 1.7e9 + NOW + ahead}
    moved = [one | {"start": one["start"] - NOW + 5.0, "end": one["end"] - NOW + 5.0} for one in theirs]
    return [snapshot(0, ours, size=2), snapshot(1, moved, size=2, host="b", token=5) | later]


MEETINGS = [(operation(1, 3.0, 2.0), operation(1, 2.1, 2.05)), (operation(2, 1.1, 1.0), operation(2, 1.08, 0.9))]
"""In the second b begins 0.08 s before a ends, and ends 0.2 s after a begins: b may be 0.08 s behind to 0.2 s ahead."""


@pytest.mark.parametrize(
    ("ahead", "moved", "words"),
    [
        (0.0, 0.0, "its wall clock; 2 collectives agree if a's is within 200 ms"),
        (0.5, -0.56, "its wall clock, 560 ms ahead of a's by 2 collectives, was moved by that; within 140 ms"),
        (-3.0, 2.94, "its wall clock, 2940 ms behind a's by 2 collectives, was moved by that; within 140 ms"),
    ],
)
def test_wall_clocks_that_collectives_contradict_are_moved(ahead: float, moved: float, words: str) -> None:
    found = clocks(on_two_hosts(*MEETINGS, ahead=ahead))
    assert found["a"] == (1.7e9, "its wall clock")
    assert found["b"].offset == pytest.approx(1.7e9 + NOW - 5.0 + ahead + moved, abs=1e-5)
    assert found["b"].words == words


def test_hosts_are_drawn_on_one_clock(tmp_path: Path) -> None:
    found = rows(traced(tmp_path, *on_two_hosts(*MEETINGS)))
    assert [times(event) for event in found["host a: rank 0"]] == [(0.0, 1.0), (1.9, 2.0)]
    assert [times(event) for event in found["host b: rank 1"]] == [(0.9, 0.95), (1.92, 2.1)]


def test_only_what_all_ranks_meet_in_tells_of_clocks() -> None:
    broadcast = "broadcast(float32, 4 elements, root 0, tree)"
    pair = (operation(1, 3.0, 2.9, broadcast), operation(1, 1.0, 0.9, broadcast))
    records = on_two_hosts(pair)
    assert clocks(records)["b"].words == "its wall clock; no collective shows how far it is from that of a"
    # Of two communicators of one name nobody knows which is which on the other host.
    twins = on_two_hosts(*MEETINGS, ahead=9.0)
    twins.append(twins[0] | {"token": 1234})
    assert "no collective shows" in clocks(twins)["b"].words


def test_the_residual_is_printed(tmp_path: Path) -> None:
    result = run(written(tmp_path / "records", *on_two_hosts(*MEETINGS, ahead=0.5)), "-o", tmp_path / "trace.json")
    assert "2 records of 2 hosts" in result.output and "host b: its wall clock, " in result.output
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["clocks"]["a"] == "its wall clock"


# ---- what is refused


def changed(**other: Any) -> str:
    return json.dumps(snapshot(0, [operation(1, 2.0, 1.0)]) | other)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "it is no snapshot: []"),
        ("{}", "it is no snapshot: {}"),
        (changed(version=2), "it is of version 2, and this abccl reads 1"),
        (changed(rank="0"), "rank is no int: '0'"),
        (changed(rank=True), "rank is no int: True"),
        (changed(operations=[{"number": 1}]), "operations is no operation: {'number': 1}"),
        (changed(operations={}), "operations is no list: {}"),
        (changed(operations=[operation(1, float("nan"))]), "start is no time: nan"),
        (changed(wall=float("inf")), "wall is no time: inf"),
        (changed(wall=10**400), "wall is no time: 1000"),
        (changed(waiting={}), "waiting is no waiting: {}"),
        ("[" * 100_000, "is no flight record: "),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    result = run(path, "-o", tmp_path / "trace.json")
    assert result.exit_code == 1 and f"{path} is no flight record: " in result.output and words in result.output
    assert not (tmp_path / "trace.json").exists()


def test_arguments(tmp_path: Path) -> None:
    assert "wanted are files or folders of flight records, or --pid" in run().output
    assert "wanted are files or folders of flight records, or --pid" in run(tmp_path, "--pid", 1).output
    assert f"there are no flight records in {tmp_path}: files that end in .json" in run(tmp_path).output


def test_a_trace_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST", 1)
    folder = written(tmp_path / "records", snapshot(0, [operation(1, 3.0, 2.0), operation(2, 1.0, 0.5)]))
    assert "2 slices are too many for a browser, 1 are the most" in run(folder, "-o", tmp_path / "trace.json").output
