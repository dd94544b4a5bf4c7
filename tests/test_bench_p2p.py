"""Messages between two ranks: what the patterns do, that they are checked, and that they run by each launcher."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
from bench_runs import ALONE, started

from abccl.bench.data import count_wrong, fill, poison
from abccl.bench.measure import Timing
from abccl.bench.messages import WINDOW, Endpoint, Exchange, Pattern, exchange, exchanges
from abccl.bench.options import Options
from abccl.errors import ArgumentError


def exchange_of(pattern: Pattern, count: int = 250) -> Exchange:
    return Exchange(pattern, "float32", count, 4, (3, 1))


def calls_of(pattern: Pattern, rank: int) -> list[str]:
    """What the rank's part calls, in order."""
    log: list[str] = []

    def logged(name: str) -> Any:
        return lambda message, tag: log.append(f"{name} {message} {tag}") or f"{name} {message}"

    verbs = (logged(name) for name in ("send", "receive", "post_send", "post_receive"))
    end = Endpoint("x", "out", ("done", "was done"), *verbs, lambda requests: log.append(" ".join(requests)))
    exchange(exchange_of(pattern), rank, end)()
    return log


def test_latency_is_of_a_message_there_and_back() -> None:
    assert calls_of(Pattern.LATENCY, 3) == ["send x 1", "receive out 1"]
    assert calls_of(Pattern.LATENCY, 1) == ["receive out 1", "send x 1"]
    assert exchange_of(Pattern.LATENCY).messages == 2


def test_bandwidth_is_of_a_window_and_its_answer() -> None:
    waits = [" ".join([f"post_{what}"] * WINDOW) for what in ("send x", "receive out")]
    assert calls_of(Pattern.BANDWIDTH, 3) == [*["post_send x 1"] * WINDOW, waits[0], "receive was done 2"]
    assert calls_of(Pattern.BANDWIDTH, 1) == [*["post_receive out 1"] * WINDOW, waits[1], "send done 2"]


@pytest.mark.parametrize("rank", [1, 3])
def test_bidirectional_is_of_a_window_each_way(rank: int) -> None:
    *posts, wait = calls_of(Pattern.BIDIRECTIONAL, rank)
    assert posts == ["post_receive out 1"] * WINDOW + ["post_send x 1"] * WINDOW
    assert wait.split().count("post_send") == wait.split().count("post_receive") == WINDOW


def test_bandwidth_counts_both_ways() -> None:
    assert exchange_of(Pattern.BANDWIDTH).algbw(1e-6) == pytest.approx(1)
    assert exchange_of(Pattern.BIDIRECTIONAL).algbw(1e-6) == pytest.approx(2)
    assert Timing((6.0, 4.0), (2.0,), 7).divided(2) == Timing((3.0, 2.0), (1.0,), 7)


@pytest.mark.parametrize("pattern", Pattern)
def test_what_has_come_is_checked(pattern: Pattern) -> None:
    case, got = exchange_of(pattern), np.empty(250, "float32")
    fill(case, got, 7, 3)
    assert count_wrong(case, got, 7, 1, 0) == 0
    assert count_wrong(case, got, 8, 1, 0) > 200
    got[[3, 100]] = 0
    assert count_wrong(case, got, 7, 1, 0) == 2
    poison(got)
    answered = 0 if pattern is Pattern.BANDWIDTH else 250
    assert count_wrong(case, got, 7, 3, 0) == answered
    assert count_wrong(case, got, 7, 0, 0) == count_wrong(case, got, 7, 2, 0) == 0


def test_each_pattern_goes_through_the_sizes() -> None:
    found = list(exchanges(2, (0, 1), (4, 64, 4), "float64"))
    assert [case.size for case in found] == [8, 16, 64] * 3
    assert [case.pattern for case in found[::3]] == list(Pattern)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"op": "max"}, "--op is for collectives"),
        ({"root": 0}, "--root is for collectives"),
        ({"algorithms": ("ring",)}, "--algorithm is for collectives"),
        ({"persistent": True}, "--persistent is for collectives"),
        ({"in_place": False}, "--in-place is for collectives"),
        ({"pair": (1, 1)}, "two different ones of 3 ranks"),
        ({"pair": (0, 3)}, "two different ones of 3 ranks, 0 to 2"),
        ({"dtype": "float12"}, "no element type 'float12'"),
    ],
)
def test_contradictions_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Options(None, **wrong).settled(3)


def test_a_message_needs_two_ranks() -> None:
    with pytest.raises(ArgumentError, match="two different ones of 1 rank,"):
        Options(None).settled(1)


def rows_of(shown: str) -> list[dict[str, Any]]:
    kept = json.loads(shown)
    assert (kept["collective"], kept["wrong"]) == ("p2p", 0)
    rows: list[dict[str, Any]] = kept["rows"]
    assert [row["pattern"] for row in rows] == [pattern.value for pattern in Pattern for _ in range(2)]
    return rows


FEW = ["p2p", "--max", "16", "--iterations", "5", "--format", "json"]


@pytest.mark.ranks
@pytest.mark.parametrize("array", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def test_two_of_three_ranks(array: str) -> None:
    rows = rows_of(started(ALONE, *FEW, "--ranks", "3", "--pair", "2,0", "--array", array))
    for row in rows:
        (ours,) = row["measured"]
        ways = 2 if row["pattern"] == "bidirectional" else 1
        assert ours["algbw"] == pytest.approx(ways * row["size"] / ours["time_us"] / 1e3)


@pytest.mark.ranks
@pytest.mark.torch
def test_against_gloo() -> None:
    for row in rows_of(started(ALONE, *FEW, "--vs", "gloo")):
        assert [(m["library"], m["through"]) for m in row["measured"]] == [("abccl", "torch"), ("gloo", None)]
        assert row["ratios"][0]["ratio"] > 0


def test_against_mpi(mpirun: list[str]) -> None:
    for row in rows_of(started([*mpirun, "-n", "3", sys.executable, *ALONE[1:]], *FEW, "--vs", "mpi")):
        assert [m["library"] for m in row["measured"]] == ["abccl", "mpi"]
