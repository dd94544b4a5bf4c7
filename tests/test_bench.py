"""The benchmark: conventions, data and reference; and that it runs, by each launcher. No test looks at a time."""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_runs import ALONE, case_of, ended, started
from click.testing import CliRunner

from abccl.algorithms import Collective
from abccl.algorithms.words import in_words, to_bytes
from abccl.bench import run, world
from abccl.bench.__main__ import bench
from abccl.bench.collectives import Case, cases
from abccl.bench.data import calls_until_overflow, count_wrong, fill, pieces, poison, values
from abccl.bench.machine import cores_of_this_rank, machine
from abccl.bench.measure import FEWEST_ROUNDS, ROUNDS, Budget, Meter, Subject, plan, roots
from abccl.bench.options import Options
from abccl.bench.run import geometric_mean
from abccl.errors import ArgumentError, UnknownAlgorithm
from abccl.transports.types import numpy_dtype, numpy_operator

MOVING = [c for c in Collective if c is not Collective.BARRIER]


# ---- conventions


def test_bus_factors_are_those_of_nccl_tests() -> None:
    expected = {
        Collective.ALL_REDUCE: 1.5,
        Collective.REDUCE_SCATTER: 0.75,
        Collective.ALL_GATHER: 0.75,
        Collective.ALL_TO_ALL: 0.75,
        Collective.GATHER: 0.75,
        Collective.SCATTER: 0.75,
        Collective.BROADCAST: 1,
        Collective.REDUCE: 1,
        Collective.BARRIER: 0,
    }
    assert {collective: collective.bus_factor(4) for collective in Collective} == expected


def test_bandwidths() -> None:
    case = case_of(Collective.ALL_REDUCE, count=250_000_000, ranks=4)
    assert case.size == 1e9
    assert case.algbw(0.5) == 2
    assert case.busbw(0.5) == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [("4", 4), ("64M", 64 << 20), ("1KiB", 1024), ("1k", 1024), ("1KB", 1024), ("1.5M", 3 << 19), ("2G", 2 << 30)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert to_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-4", "4X", "1.3", "K", "4 4", "1e3", "4\N{KELVIN SIGN}", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="is no size"):
        to_bytes(text)


def test_sizes_in_words() -> None:
    assert [in_words(size) for size in (0, 4, 1024, 1536, 64 << 20)] == ["0 B", "4 B", "1 KiB", "1536 B", "64 MiB"]


def test_sizes_run_from_min_to_max() -> None:
    found = list(cases(Collective.ALL_REDUCE, 2, (4, 64 << 20, 4), "float32", "sum", True))
    assert [case.size for case in found] == [4 << 2 * step for step in range(13)]
    assert [case.count for case in found[:3]] == [1, 4, 16]


def test_a_size_is_shared_by_the_ranks_in_whole_elements() -> None:
    found = list(cases(Collective.ALL_GATHER, 3, (4, 1000, 4), "float32", "sum", False))
    assert [case.count for case in found] == [1, 5, 21]  # 4 and 16 bytes come to the same
    assert [case.size for case in found] == [12, 60, 252]
    assert all(case.op == "" for case in found)


def test_a_barrier_has_one_case() -> None:
    (case,) = cases(Collective.BARRIER, 3, (4, 64 << 20, 4), "float32", "", False)
    assert case.size == 0


# ---- the reference


def results(case: Case, seed: int, root: int) -> list[np.ndarray[Any, Any]]:
    """What a right implementation leaves on each rank, written another way than the benchmark's reference."""
    inputs = [np.empty(case.x_count, numpy_dtype(case.dtype)) for _ in range(case.ranks)]
    for rank, x in enumerate(inputs):
        fill(case, x, seed, rank)
    whole = np.stack(inputs)
    if case.op:
        folded = whole[0].copy()
        for x in whole[1:]:
            folded = numpy_operator(case.op, case.dtype)(folded, x).astype(folded.dtype)
        if case.op == "avg":
            folded = folded / folded.dtype.type(case.ranks)
    parts = whole.reshape(case.ranks, -1, case.count)
    match case.collective:
        case Collective.ALL_REDUCE | Collective.REDUCE:
            return [folded.copy() for _ in inputs]
        case Collective.REDUCE_SCATTER:
            return list(folded.reshape(case.ranks, -1).copy())
        case Collective.ALL_GATHER | Collective.GATHER:
            return [whole.reshape(-1).copy() for _ in inputs]
        case Collective.BROADCAST:
            return [whole[root].copy() for _ in inputs]
        case Collective.SCATTER:
            return list(parts[root].copy())
        case _:
            return [parts[:, rank].reshape(-1).copy() for rank in range(case.ranks)]


@pytest.mark.parametrize("collective", MOVING, ids=lambda collective: collective.value)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_reference_accepts_the_right_and_finds_each_wrong_element(
    collective: Collective, ranks: int, dtype: str
) -> None:
    case, root = case_of(collective, ranks=ranks, dtype=dtype), ranks - 1
    for rank, result in enumerate(results(case, 7, root)):
        assert count_wrong(case, result, 7, rank, root) == 0
        if not pieces(case, rank, root):
            continue
        result[-1] += 1
        assert count_wrong(case, result, 7, rank, root) == 1
        result[0] = -result[0]
        assert count_wrong(case, result, 7, rank, root) == 2
        poison(result)
        assert count_wrong(case, result, 7, rank, root) == result.size
        assert count_wrong(case, results(case, 8, root)[rank], 7, rank, root) > 0


@pytest.mark.parametrize(
    ("dtype", "op"),
    [
        *itertools.product(["float16", "bfloat16", "float32", "float64"], ["sum", "prod", "min", "max", "avg"]),
        *itertools.product(["int8", "uint64"], ["sum", "prod", "min", "max", "band", "bor", "bxor"]),
        *itertools.product(["bool"], ["sum", "prod", "band", "bxor"]),
        *itertools.product(["complex64", "complex128"], ["sum", "prod", "avg"]),
    ],
)
def test_reference_for_types_and_operators(dtype: str, op: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    case = case_of(Collective.ALL_REDUCE, count=1000, ranks=5, dtype=dtype, op=op)
    result = results(case, 3, 0)[0]
    assert count_wrong(case, result, 3, 0, 0) == 0
    without_one_rank = results(case_of(Collective.ALL_REDUCE, 1000, 4, dtype, op), 3, 0)[0]
    assert count_wrong(case, without_one_rank, 3, 0, 0) > 10


def test_parts_of_a_vector_are_the_same_however_they_are_asked_for() -> None:
    case = case_of(Collective.ALL_REDUCE)
    whole = values(case, 1, 0, 0, 600_000)
    assert np.array_equal(values(case, 1, 0, 262_100, 524_300), whole[262_100:524_300])
    assert not np.array_equal(values(case, 1, 1, 0, 10), whole[:10])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("ranks", [2, 3, 7, 32])
def test_sums_in_place_stay_normal_until_the_refill(dtype: str, ranks: int) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    case = case_of(Collective.ALL_REDUCE, ranks=ranks, dtype=dtype)
    limit = calls_until_overflow(case)
    assert limit is not None and limit >= (3 if dtype == "float16" else 20)
    vectors = [np.empty(10_000, numpy_dtype(dtype)) for _ in range(ranks)]
    for rank, vector in enumerate(vectors):
        fill(case, vector, 5, rank, timing=True)
    for _ in range(limit):
        total = vectors[0]
        for vector in vectors[1:]:
            total = total + vector
        vectors = [total] * ranks
    reals = (total.view(total.real.dtype) if dtype == "complex64" else total).astype(np.float64)
    assert np.isfinite(reals).all()
    smallest = {"float16": 2.0**-14, "float64": 2.0**-1022}.get(dtype, 2.0**-126)
    assert np.abs(reals[reals != 0]).min() >= smallest


def test_what_does_not_grow_needs_no_refill() -> None:
    assert calls_until_overflow(case_of(Collective.ALL_REDUCE, op="max")) is None
    assert calls_until_overflow(case_of(Collective.ALL_REDUCE, dtype="int32")) is None
    assert calls_until_overflow(case_of(Collective.REDUCE_SCATTER)) is None
    assert calls_until_overflow(case_of(Collective.BROADCAST)) is None


# ---- measuring


def test_plan_shares_the_time() -> None:
    rounds, calls = plan([1e-6, 100e-6], Budget(0.4))
    assert rounds == ROUNDS
    assert calls == [10_000, 100]
    assert plan([1.0, 1.0], Budget(0.4)) == (FEWEST_ROUNDS, [1, 1])
    assert plan([1.0, 1.0], Budget(0.4, calls=3)) == (3, [1, 1])
    assert plan([1.0], Budget(0.4, calls=1000)) == (ROUNDS, [25])


def test_roots_change_with_every_call() -> None:
    assert list(itertools.islice(roots(1), 3)) == [0, 0, 0]
    assert list(itertools.islice(roots(2), 4)) == [0, 1, 0, 1]
    found = list(itertools.islice(roots(5), 2000))
    assert set(itertools.pairwise(found)) == set(itertools.permutations(range(5), 2))
    assert found == list(itertools.islice(roots(5), 2000))


@pytest.mark.parametrize("isolated", [False, True])
def test_subjects_take_turns(isolated: bool) -> None:
    log: list[str] = []

    def logged(name: str) -> Callable[[], None]:
        return lambda: log.append(name)

    meter = Meter(logged("|"), lambda seconds: 1.0, lambda own: own[None], isolated)
    subjects = [Subject([logged("a")], logged("A"), 2), Subject([logged("b")], logged("B"), None)]
    timings = meter.measure(subjects, Budget(1, calls=120))
    assert [timing.calls for timing in timings] == [120, 120]
    assert [len(timing.rounds) for timing in timings] == [ROUNDS, ROUNDS]
    a, b = ("A|aA|aA|a", "|b|b|b") if isolated else ("A|aaA|a", "|bbb")
    assert "".join(log).endswith((a + b + b + a) * 3)


def test_geometric_mean() -> None:
    assert math.isclose(geometric_mean([2, 8]), 4)
    assert math.isclose(geometric_mean([1, 1000], cap=100), 10)


def test_machine() -> None:
    assert {"cpu", "cores", "load_average"} <= machine().keys()
    assert cores_of_this_rank()


# ---- options


def test_defaults_are_filled_in() -> None:
    settled = Options(Collective.BROADCAST).settled(3)
    assert (settled.op, settled.loop, settled.in_place, settled.roots) == ("", "latency", True, [0, 1, 2])
    settled = Options(Collective.BROADCAST, root=2).settled(3)
    assert (settled.loop, settled.roots) == ("isolated", [2])
    settled = Options(Collective.ALL_REDUCE, rivals=("gloo", "mpi"), algorithms=("auto",)).settled(3)
    assert (settled.op, settled.doors(), settled.library) == ("sum", ["torch", "direct"], "torch")


def test_all_algorithms_are_those_that_run() -> None:
    named = Options(Collective.ALL_REDUCE, algorithms=("all",)).settled(3).algorithms
    assert {"ring", "tree", "recursive_doubling"} <= set(named)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ranks": 4}, "3 ranks were started"),
        ({"op": "bxor"}, "bxor is defined for"),
        ({"dtype": "float12"}, "no element type 'float12'"),
        ({"root": 1}, "all_reduce has no root"),
        ({"collective": Collective.BROADCAST, "root": 3}, "a rank from 0 to 2"),
        ({"collective": Collective.BROADCAST, "op": "sum"}, "no operator"),
        ({"collective": Collective.BROADCAST, "in_place": False}, "in place only"),
        ({"collective": Collective.REDUCE, "root": 0, "loop": "latency"}, "--loop isolated"),
        ({"sizes": (8, 4, 2)}, "must not be less"),
        ({"algorithms": ("all",), "rivals": ("gloo",)}, "do not name an algorithm"),
        ({"persistent": True, "rivals": ("gloo",)}, "gloo with it, has no persistent collectives"),
        ({"persistent": True, "through": "torch"}, "no persistent collectives"),
        ({"persistent": True, "collective": Collective.GATHER}, "gather has no persistent form"),
        ({"roofline": True, "collective": Collective.BARRIER}, "a barrier moves no data"),
    ],
)
def test_contradictions_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Options(**({"collective": Collective.ALL_REDUCE} | wrong)).settled(3)


def test_unknown_algorithm() -> None:
    with pytest.raises(UnknownAlgorithm, match="did you mean ring"):
        Options(Collective.ALL_REDUCE, algorithms=("rong",)).settled(2)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the one rank here instead of in a new process."""
    monkeypatch.setattr(world, "spawn", lambda fn, ranks, args: [fn(*args)])


@pytest.mark.usefixtures("in_this_process")
def test_exit_code_is_1_if_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["all_reduce", "--ranks", "1", "--max", "4", "--iterations", "1"]
    assert CliRunner().invoke(bench, arguments).exit_code == 0
    monkeypatch.setattr(run, "count_wrong", lambda *_: 3)
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 1
    assert "WRONG: 6 elements" in result.output
    assert CliRunner().invoke(bench, [*arguments, "--no-check"]).exit_code == 0


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("collective", Collective, ids=lambda collective: collective.value)
@pytest.mark.parametrize("array", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def test_one_rank_runs_everything(collective: Collective, array: str) -> None:
    arguments = [collective.value, "--ranks", "1", "--max", "1K", "--iterations", "2", "--array", array]
    result = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "all results right" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all_redcue"], "did you mean all_reduce"),
        (["all_reduce", "--vs", "mpi"], "mpirun -n 2 python -m abccl.bench"),
        (["all_reduce", "--vs", "nccl"], "there are gloo and mpi"),
        (["all_reduce", "--min", "4Q"], "is no size"),
        (["all_reduce", "--json", "/nowhere/x.json"], "/nowhere/x.json can not be written (No such file"),
        (["all_reduce", "--csv", "/proc/x.csv"], "/proc/x.csv can not be written"),
        (["all_reduce", "--algorithm", "rong"], "did you mean ring"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


# ---- several processes


@pytest.mark.ranks
@pytest.mark.parametrize("collective", ["all_reduce", "broadcast", "all_to_all"])
def test_alone_it_spawns(collective: str, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "x.json"), "--csv", str(tmp_path / "x.csv")]
    shown = started(ALONE, collective, "--ranks", "2", "--max", "1K", "--iterations", "20", *files)
    assert "started by spawn" in shown and "all results right" in shown
    kept = json.loads((tmp_path / "x.json").read_text())
    assert (kept["collective"], kept["ranks"], kept["wrong"]) == (collective, 2, 0)
    assert collective in kept["command"] and kept["machine"]["cpu"]
    assert [row["size"] for row in kept["rows"]] == (
        [8, 16, 64, 256, 1024] if collective == "all_to_all" else [4, 16, 64, 256, 1024]
    )
    for row in kept["rows"]:
        (measured,) = row["measured"]
        assert len(measured["rounds_us"]) == 20 and len(measured["medians_of_ranks_us"]) == 2
        assert measured["time_us"] == np.median(measured["rounds_us"]) > 0
    with (tmp_path / "x.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["size"]) for line in lines] == [row["size"] for row in kept["rows"]]


@pytest.mark.ranks
def test_all_algorithms_side_by_side() -> None:
    shown = started(
        ALONE, "all_reduce", "--ranks", "3", "--min", "1K", "--max", "1K", "--algorithm", "all", "--iterations", "5"
    )
    assert {"ring", "tree"} <= set(shown.split())
    assert shown.count(" *") == 1  # the fastest


@pytest.mark.ranks
@pytest.mark.parametrize("loop", ["latency", "isolated", "throughput"])
def test_loops(loop: str) -> None:
    shown = started(ALONE, "reduce", "--ranks", "3", "--max", "64", "--loop", loop, "--iterations", "20")
    assert f"loop: {loop}" in shown


@pytest.mark.ranks
@pytest.mark.torch
def test_against_gloo_by_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "abccl.bench"]
    kept = tmp_path / "x.json"
    shown = started(torchrun, "all_reduce", "--max", "64", "--vs", "gloo", "--iterations", "10", "--json", str(kept))
    assert "started by torchrun" in shown and "gloo/abccl: geometric mean" in shown
    data = json.loads(kept.read_text())
    assert [m["library"] for m in data["rows"][0]["measured"]] == ["abccl", "gloo"]
    assert data["rows"][0]["measured"][0]["through"] == "torch"
    assert data["rows"][0]["ratios"][0]["ratio"] > 0


@pytest.mark.ranks
@pytest.mark.torch
def test_gloo_refuses_in_one_line() -> None:
    done = ended(ALONE, "all_reduce", "--max", "4", "--vs", "gloo", "--dtype", "int16")
    assert done.returncode == 2
    assert "gloo refuses all_reduce" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("collective", ["all_reduce", "gather"])
def test_against_mpi_by_mpirun(collective: str, mpirun: list[str]) -> None:
    shown = started([*mpirun, "-n", "2", *ALONE], collective, "--max", "1K", "--vs", "mpi", "--iterations", "10")
    assert "started by mpirun" in shown and "mpi/abccl: geometric mean" in shown
    assert "all results right" in shown
