"""What the benchmark prints: the tables of OSU's benchmarks, CSV and JSON with nothing else, means of several ways."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from bench_runs import case_of, measured, report
from click.testing import CliRunner, Result

from abccl.algorithms import Collective
from abccl.bench import world
from abccl.bench.__main__ import bench, words
from abccl.bench.messages import Exchange, Pattern
from abccl.bench.options import Options
from abccl.bench.osu import TITLES, head, line, tables
from abccl.bench.record import among, as_data, means
from abccl.bench.run import Row
from abccl.bench.table import columns, footer, header
from abccl.transports.topology import Host

# Lines of the benchmarks themselves, of OSU 7.
LATENCY = "# Size       Avg Latency(us)   Min Latency(us)   Max Latency(us)  Iterations"
LATENCIES = "1                      53.34             24.80            158.96        1000"
BARRIER = "# Avg Latency(us)   Min Latency(us)   Max Latency(us)  Iterations"
BANDWIDTH = "# Size      Bandwidth (MB/s)"
BANDWIDTHS = "4194304             23012.88"


def ends(text: str) -> list[int]:
    """Where the columns end, which are all aligned to the right but the first."""
    return [i for i in range(1, len(text) + 1) if text[i - 1] != " " and (i == len(text) or text[i : i + 2] == "  ")]


# ---- OSU


def test_osu_heads_are_those_of_its_benchmarks() -> None:
    assert head(Collective.ALL_REDUCE) == LATENCY
    assert head(Collective.BARRIER) == BARRIER
    assert head(Pattern.LATENCY) == "# Size       Avg Latency(us)"
    assert head(Pattern.BANDWIDTH) == head(Pattern.BIDIRECTIONAL) == BANDWIDTH
    assert TITLES.keys() == {*Collective, *Pattern}


def test_osu_lines_have_the_columns_of_its_benchmarks() -> None:
    of_ranks = measured("abccl", 1.0, by_rank=[24.8e-6, 158.96e-6, 30e-6])
    shown = line(case_of(Collective.ALL_REDUCE, count=1, dtype="int8"), of_ranks)
    assert shown.split() == ["1", "71.25", "24.80", "158.96", "1"]
    assert ends(shown)[1:] == ends(LATENCIES)[1:]
    barrier = line(case_of(Collective.BARRIER, count=0), of_ranks)
    assert barrier.split() == ["71.25", "24.80", "158.96", "1"] and len(barrier) == len(BARRIER)


def test_osu_sizes_are_of_a_part_where_its_are() -> None:
    sizes = {}
    for collective in Collective:
        if collective is not Collective.BARRIER:
            sizes[collective.value] = line(case_of(collective, count=4, ranks=3), measured("abccl", 1.0)).split()[0]
    whole = {"all_reduce": "16", "broadcast": "16", "reduce": "16", "reduce_scatter": "48"}
    assert sizes == whole | dict.fromkeys(("all_gather", "all_to_all", "gather", "scatter"), "16")


def test_osu_bandwidth_is_in_millions_of_bytes() -> None:
    case = Exchange(Pattern.BANDWIDTH, "uint8", 4194304, 2, (0, 1))
    assert line(case, measured("abccl", 4194304 / 23012.88e6)) == BANDWIDTHS
    both = Exchange(Pattern.BIDIRECTIONAL, "uint8", 1000, 2, (0, 1))
    assert line(both, measured("abccl", 1e-6)).split() == ["1000", "2000.00"]
    latency = Exchange(Pattern.LATENCY, "uint8", 1000, 2, (0, 1))
    assert line(latency, measured("abccl", 1.5e-6)).split() == ["1000", "1.50"]


def test_osu_has_a_table_for_each_way_of_each_library() -> None:
    rows = [
        Row(case_of(Collective.ALL_REDUCE, count), (measured("abccl", 1e-6), measured("abccl", 2e-6, "ring")), (slow,))
        for count, slow in ((1, measured("mpi", 4e-6)), (4, measured("mpi", 5e-6)))
    ]
    shown = list(tables(report(rows, Options(Collective.ALL_REDUCE).settled(3))))
    assert [text for text in shown if "Test" in text] == [
        "# OSU-like Allreduce Latency Test: abccl (direct, auto)",
        "# OSU-like Allreduce Latency Test: abccl (direct, ring)",
        "# OSU-like Allreduce Latency Test: mpi",
    ]
    values = [text.split()[:2] for text in shown if text[:1].isdigit()]
    assert values == [["4", "1.00"], ["16", "1.00"], ["4", "2.00"], ["16", "2.00"], ["4", "4.00"], ["16", "5.00"]]


# ---- nothing else on standard output


@pytest.fixture
def bench_here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command with one rank, in this process."""
    monkeypatch.setattr(world, "spawn", lambda fn, ranks, args: [fn(*args)])

    def call(*arguments: str) -> Result:
        options = ["all_reduce", "--ranks", "1", "--max", "64", "--iterations", "2", *arguments]
        result = CliRunner().invoke(bench, options, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return call


def test_json_is_all_of_standard_output(bench_here: Any) -> None:
    result = bench_here("--format", "json")
    assert [row["size"] for row in json.loads(result.stdout)["rows"]] == [4, 16, 64]
    assert "all results right" in result.stderr


def test_csv_is_all_of_standard_output(bench_here: Any) -> None:
    result = bench_here("--format", "csv")
    assert [row["size"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["4", "16", "64"]
    assert "all results right" in result.stderr


def test_osu_is_all_of_standard_output(bench_here: Any) -> None:
    result = bench_here("--format", "osu")
    assert [text.split()[0] for text in result.stdout.splitlines() if text] == ["#", "#", "#", "4", "16", "64"]
    assert "all results right" in result.stderr


def test_a_table_is_on_standard_output_with_its_notes(bench_here: Any) -> None:
    result = bench_here()
    assert "busbw" in result.stdout and "all results right" in result.stdout and not result.stderr


# ---- several algorithms, several hosts


def test_commas_in_parentheses_belong_to_a_name() -> None:
    text = "auto, knomial(radix=8) ,hierarchical(inner=ring,outer=knomial(radix=2)),auto"
    assert words(text) == ("auto", "knomial(radix=8)", "hierarchical(inner=ring,outer=knomial(radix=2))")


def test_algorithms_are_held_against_the_automatic_choice() -> None:
    ways = [measured("abccl", 1e-6, "ring"), measured("abccl", 2e-6), measured("abccl", 6e-6, "native")]
    row = Row(case_of(Collective.ALL_REDUCE), tuple(ways), ())
    found = report([row], Options(Collective.ALL_REDUCE, algorithms=("ring", "auto", "native")).settled(3))
    assert [(mean["algorithm"], mean["geometric_mean"]) for mean in among(found)] == [
        ("ring", pytest.approx(0.5)),
        ("native", pytest.approx(3)),
    ]
    assert any(text.startswith("native/auto: geometric mean 3.00") for text in footer(found))
    assert as_data(found)["algorithms"] == among(found)
    without = report([Row(row.case, (ways[0], ways[2]), ())], found.options)
    assert among(without) == []


def test_each_pattern_has_its_mean() -> None:
    rows = [
        Row(Exchange(pattern, "float32", 1, 2, (0, 1)), (measured("abccl", 1e-6),), (measured("mpi", ratio * 1e-6),))
        for pattern, ratio in ((Pattern.LATENCY, 2), (Pattern.LATENCY, 8), (Pattern.BANDWIDTH, 5))
    ]
    found = report(rows, Options(None, rivals=("mpi",)).settled(2))
    assert [(mean["pattern"], mean["geometric_mean"]) for mean in means(found)] == [
        ("latency", pytest.approx(4)),
        ("bandwidth", pytest.approx(5)),
    ]
    assert any(text.startswith("mpi/abccl (latency): geometric mean 4.00") for text in footer(found))


def test_all_algorithms_include_the_engines_own() -> None:
    asked = Options(Collective.ALL_REDUCE, algorithms=("all",))
    assert "native" not in asked.settled(3).algorithms
    assert "native" in asked.settled(3, {Collective.ALL_REDUCE}).algorithms
    assert "native" not in asked.settled(3, {Collective.BARRIER}).algorithms
    assert Options(Collective.BARRIER, algorithms=("native",)).settled(3).algorithms == ("native",)


def test_abccl_by_its_own_calls_is_held_against_gloo() -> None:
    settled = Options(
        Collective.ALL_REDUCE, algorithms=("auto", "ring", "native"), rivals=("gloo",), through="direct"
    ).settled(4)
    assert (settled.doors(), settled.door("gloo"), settled.library) == (["direct"], "direct", "torch")
    row = Row(case_of(Collective.ALL_REDUCE), (measured("abccl", 1e-6),), (measured("gloo", 3e-6),))
    cells = {column.name: column.cell(row, row.ours[0]) for column in columns(report([row], settled), False)}
    assert (cells["gloo us"], cells["gloo/abccl"]) == ("3.000", "3.00")


def test_long_names_of_algorithms_have_room() -> None:
    name = "hierarchical(inner=recursive_doubling)"
    found = replace(report([], Options(Collective.ALL_REDUCE)), names=frozenset({"ring", name}))
    (width,) = (column.width for column in columns(found, False) if column.name == "algorithm")
    assert width >= len(name)


def test_a_table_tells_the_hosts() -> None:
    row = Row(case_of(Collective.ALL_REDUCE), (measured("abccl", 1e-6),), ())
    settled = Options(Collective.ALL_REDUCE).settled(4)
    hosts = (Host("left", (0, 2), ((0, 2),)), Host("right", (1, 3), ((1, 3),)))
    found = report([row], settled, hosts=hosts)
    assert any("2 hosts" in text and "left: 0,2; right: 1,3" in text for text in header(found))
    assert any("not measured: they are on different hosts" in text for text in header(found))
    assert as_data(found)["hosts"] == [{"name": "left", "ranks": (0, 2)}, {"name": "right", "ranks": (1, 3)}]
    together = report([row], settled, hosts=(Host("left", (0, 1), ((0, 1),)), Host("right", (2, 3), ((2, 3),))))
    assert not any("different hosts" in text for text in header(together))
