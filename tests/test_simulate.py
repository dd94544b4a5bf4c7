"""`abccl simulate`: its table, its data, its pictures, its traces, and what it refuses."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from abccl.algorithms import Collective, lookup, registry
from abccl.algorithms.simulator import Level, Links, Rank, Topology, read, shipped, simulate
from abccl.tools import timeline
from abccl.tools.arguments import rank_numbers
from abccl.tools.cli import main

MACHINE = """\
name = "Pairs"
about = "hosts of two cores"

[rank]
name = "core"
fold = 1e-10
slots = 2

[[level]]
name = "host"
size = 2
alpha = 1e-6
overhead = 0.3e-6
beta = 1e-10

[[level]]
name = "cluster"
size = 4
alpha = 20e-6
overhead = 2e-6
links = { per = "host", capacity = 1.25e9 }
"""

PROTOCOLS = """
[[protocol]]
name = "eager"
[protocol.level.cluster]
alpha = 1e-6

[[protocol]]
name = "rendezvous"
[protocol.level.cluster]
links = { capacity = 10e9 }
"""

FUSSY = """
from abccl import Collective, algorithm, power_of_two, recv, send

@algorithm(Collective.ALL_REDUCE, restrictions=[power_of_two])
def fussy_all_reduce(rank, size):
    distance = 1
    while distance < size:
        yield send(rank ^ distance, 0), recv(rank ^ distance, 0, reduce=True)
        distance *= 2
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder with a topology; what a test registers is gone when it ends."""
    copies = {collective: dict(known) for collective, known in registry._registry.items()}
    monkeypatch.setattr(registry, "_registry", copies)
    monkeypatch.chdir(tmp_path)
    Path("pairs.toml").write_text(MACHINE)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)], prog_name="abccl")


def said(*arguments: object) -> str:
    """What it prints; it must do well."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def records(*arguments: object) -> list[dict[str, Any]]:
    found = json.loads(said(*arguments, "--json", "-"))
    assert isinstance(found, list)
    return found


PAIRS = ("--topology", "pairs.toml")


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its head; of simulations the first is the mark of the fastest."""
    lines = text.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith(" ──"))
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[rule + 1 :] if line.startswith(" ") and line.strip()]
    marked = lines[rule - 1].split()[0] == "algorithm"
    return [row if row[0] == ">" or not marked else ["", *row] for row in cells]


def test_the_table_has_the_fastest_of_each_number_of_ranks_on_top() -> None:
    text = said(
        "all_reduce",
        "--algorithm",
        "ring,tree,double_tree",
        "--ranks",
        "6-12x2",
        *PAIRS[:1],
        "summit.toml",
        "--size",
        "64MB",
    )
    assert text.startswith("all_reduce on Summit: ")
    found = rows(text)
    assert [row[2] for row in found] == ["6"] * 3 + ["12"] * 3
    assert [row[0] for row in found] == [">", "", ""] * 2
    assert {row[1] for row in found} == {"ring", "tree", "double_tree"}
    assert {row[3] for row in found} == {"64 MiB"}
    times = [float(row[4]) for row in found]
    assert times[:3] == sorted(times[:3]) and times[3:] == sorted(times[3:])
    assert re.fullmatch(
        r"[\d,]+ events in \S+ s(: \d+\.\d million a second)?; \S+ s in all, with writing the schedules down",
        text.splitlines()[-1],
    )


def test_numbers_of_ranks_may_double() -> None:
    assert rank_numbers("6-100x2, 5-6,64") == [5, 6, 12, 24, 48, 64, 96]
    assert rank_numbers("3-27x3") == [3, 9, 27]


def test_the_lines_above_the_table_are_the_machine() -> None:
    lines = said("all_reduce", "--algorithm", "ring", "--ranks", 4, *PAIRS, "--size", "1K").splitlines()
    assert lines[:4] == [
        "all_reduce on Pairs: hosts of two cores",
        "core: fold 100 ps/B",
        "host of 2 cores: alpha 1 us, overhead 0.3 us, beta 100 ps/B",
        "cluster of 4 hosts: alpha 20 us, overhead 2 us; a link of 1.25 GB/s per host",
    ]


def test_a_range_stands_for_the_constants_of_several_protocols() -> None:
    Path("pairs.toml").write_text(MACHINE + PROTOCOLS)
    asked = ("all_reduce", "--algorithm", "ring", "--ranks", 4, *PAIRS, "--size", "1K,1G")
    text = said(*asked)
    assert "alpha 1 to 20 us, overhead 2 us; a link of 1.25 to 10 GB/s per host" in text
    assert [row[7] for row in rows(text)] == ["eager", "rendezvous"]
    text = said(*asked, "--protocol", "eager")
    assert "alpha 1 us, overhead 2 us; a link of 1.25 GB/s per host" in text
    assert [row[7] for row in rows(text)] == ["eager", "eager"]


def test_all_algorithms_are_simulated_and_those_that_refuse_are_named() -> None:
    Path("fussy.py").write_text(FUSSY)
    text = said("all_reduce", "fussy.py", "--ranks", "4-6", *PAIRS, "--size", 100)
    known = set(registry._registry[Collective.ALL_REDUCE])
    families = {(row[2], row[1].partition("(")[0]) for row in rows(text)}
    assert {name for ranks, name in families if ranks == "4"} == known
    assert {name for ranks, name in families if ranks == "5"} == known - {"fussy"}
    assert "hierarchical(levels=2x2)" in text and "hierarchical(levels=2x2+1)" in text
    assert "fussy not on 5-6 ranks: it wants a power of two ranks" in text.splitlines()
    found = records("all_reduce", "fussy.py", "--algorithm", "fussy", "--ranks", "4,5", *PAIRS, "--size", 100)
    assert [one["refused"] for one in found] == [None, "fussy wants a power of two ranks, and there are 5"]
    assert found[1]["seconds"] is None and found[1].keys() == found[0].keys()


def test_the_example_of_the_readme_by_its_name(root: Path) -> None:
    Path("star.py").write_text(re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)[0])
    text = said("all_reduce", "star.py", "--algorithm", "star,ring", "--ranks", 4, *PAIRS, "--size", "1M")
    assert {row[1] for row in rows(text)} == {"star", "ring"}


def test_parameters_may_hold_commas() -> None:
    names = "composed(reduce_scatter=ring,all_gather=ring),knomial(radix=3)"
    found = records("all_reduce", "--algorithm", names, "--ranks", 6, *PAIRS, "--size", 64)
    assert [one["algorithm"] for one in found] == ["composed(all_gather=ring)", "knomial(radix=3)"]


def test_the_data_is_what_simulate_finds() -> None:
    options = ("--segment", "64K", "--lanes", 2, "--set", "host.alpha=2e-6", "--set", "cluster.links.capacity=inf")
    (one,) = records("broadcast", "--algorithm", "chain", "--ranks", 5, *PAIRS, "--size", "1M", "--root", 2, *options)
    topology = read("pairs.toml").with_value("host.alpha", 2e-6).with_value("cluster.links.capacity", float("inf"))
    chain = lookup(Collective.BROADCAST, "chain")
    found = simulate(chain, 5, topology, 1 << 20, root=2, segment=64 << 10, lanes=2)
    assert one.pop("took") >= 0
    assert one == {
        "topology": "Pairs",
        "overrides": {"host.alpha": 2e-6, "cluster.links.capacity": "inf"},
        "collective": "broadcast",
        "algorithm": "chain",
        "ranks": 5,
        "bytes": 1 << 20,
        "root": 2,
        "segment_bytes": 64 << 10,
        "lanes": 2,
        "protocol": None,
        "segments": 16,
        "method": "events",
        "simulated": 5,
        "seconds": found.seconds,
        "algbw": found.algbw,
        "busbw": found.busbw,
        "utilisation": found.utilisation,
        "events": found.events,
        "messages": found.messages,
        "refused": None,
    }


def test_data_in_a_file_beside_the_table() -> None:
    text = said("barrier", "--algorithm", "tree", "--ranks", 4, *PAIRS, "--json", "out.json")
    assert len(rows(text)) == 1
    (one,) = json.loads(Path("out.json").read_text())
    assert (one["collective"], one["bytes"], one["algbw"]) == ("barrier", 0, 0.0)
    assert sorted(path.name for path in Path().iterdir()) == ["out.json", "pairs.toml"]


def test_the_method_is_told() -> None:
    asked = ("all_reduce", "--algorithm", "ring", "--ranks", 24, "--topology", "summit", "--size", "1M")
    assert "events of 6 of 24 ranks" in said(*asked)
    assert rows(said(*asked, "--method", "events"))[0][8] == "events"
    assert rows(said(*asked, "--method", "closed-form"))[0][8] == "closed form"


def test_the_shipped_topologies_are_listed() -> None:
    listed = {row[0]: row for row in rows(said("--topologies"))}
    assert tuple(listed) == shipped()
    assert listed["summit"][1] == read("summit").about
    assert listed["summit"][2].startswith("GPU < ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all_redcue", "--ranks", 4, "--size", 4], "did you mean all_reduce"),
        (["all_reduce", "--ranks", 9, "--size", 4], "Pairs has 8 ranks"),
        (["all_reduce", "--ranks", "4-6x1", "--size", 4], "'4-6x1' is no number of ranks"),
        (["all_reduce", "--ranks", 4], "all_reduce wants a size: --size 64MB"),
        (["all_reduce", "--ranks", 4, "--size", "4,x"], "'x' is no size"),
        (["barrier", "--ranks", 4, "--size", 4], "a barrier has no data: leave out --size"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--algorithm", "rong"], "did you mean ring?"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--algorithm", "ring)"], "parentheses of 'ring)' do not match"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--root", 1], "all_reduce has no root: leave out --root 1"),
        (["broadcast", "--ranks", "2-4", "--size", 4, "--root", 2], "--root 2 is none of 2 ranks"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--protocol", "LL"], "no protocol 'LL'"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--set", "host.alpah=1"], "did you mean host.alpha"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--set", "host.alpha"], "wanted is PLACE=VALUE"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--set", "host.alpha=fast"], "'fast' is no TOML"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--set", "host.alpha=-1"], "host.alpha: wanted is seconds"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--plot", "x.pdf"], "ends in .png or .svg"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--json", "no/x.json"], "no/x.json can not be written"),
        (["all_reduce", "--ranks", 4, "--size", 4, "--trace", "x.json"], "--trace is of one schedule"),
        (
            ["all_reduce", "--ranks", "2,4", "--size", 4, "--algorithm", "ring", "--goal", "x"],
            "--goal is of one schedule",
        ),
        (["all_reduce", "no.py", "--ranks", 4, "--size", 4], "no.py"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_simulated(
    monkeypatch: pytest.MonkeyPatch, arguments: list[object], message: str
) -> None:
    monkeypatch.setattr("abccl.tools.simulate.simulate", None)
    result = run(*arguments, *PAIRS)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
    assert message in result.output.splitlines()[-1]
    assert [path.name for path in Path().iterdir()] == ["pairs.toml"]


def test_the_topology_is_named_when_it_is_not_known() -> None:
    result = run("all_reduce", "--ranks", 4, "--size", 4, "--topology", "sumit")
    assert result.exit_code == 1 and "did you mean summit?" in result.output


def test_what_nothing_runs_on_is_an_error() -> None:
    Path("fussy.py").write_text(FUSSY)
    result = run("all_reduce", "fussy.py", "--algorithm", "fussy", "--ranks", 5, *PAIRS, "--size", 4)
    assert (result.exit_code, result.output) == (
        1,
        "Error: nothing can be simulated\nfussy wants a power of two ranks, and there are 5\n",
    )


def test_a_wrong_schedule_is_an_error_that_names_the_rank() -> None:
    Path("broken.py").write_text(
        FUSSY.replace("restrictions=[power_of_two]", "").replace("send(rank ^ distance, 0), ", "")
    )
    result = run("all_reduce", "broken.py", "--algorithm", "fussy", "--ranks", 2, *PAIRS, "--size", 4)
    assert result.exit_code == 1 and "fussy, 2 ranks: deadlock when a send waits" in result.output


def test_goal_is_that_of_the_schedule() -> None:
    said("all_reduce", "--algorithm", "ring", "--ranks", 4, *PAIRS, "--size", "64K", "--goal", "ring.goal")
    lines = Path("ring.goal").read_text().splitlines()
    assert lines[0] == "num_ranks 4"
    assert sum(": send 16384b to " in line for line in lines) == 4 * 6
    assert sum(": calc " in line for line in lines) == 4 * 3


# ---- pictures


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.parametrize(
    ("ranks", "sizes", "told"),
    [
        ("2-8x2", "64K", ["all_reduce of 64 KiB on Pairs", "ranks", "ring", "tree"]),
        ("4", "1K,64K", ["all_reduce on Pairs, 4 ranks", "64 KiB", "size"]),
        ("2,4", "1K,64K", ["all_reduce on Pairs", "ring, 1 KiB", "tree, 64 KiB"]),
        ("4", "64K", ["all_reduce of 64 KiB on Pairs, 4 ranks", "ring", "tree"]),
    ],
)
def test_pictures(monkeypatch: pytest.MonkeyPatch, ranks: str, sizes: str, told: list[str]) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    asked = ("all_reduce", "--algorithm", "ring,tree", "--ranks", ranks, *PAIRS, "--size", sizes)
    said(*asked, "--plot", "x.svg")
    drawn = Path("x.svg").read_text()
    texts = [re.sub(r"<[^>]*>", "", text).strip() for text in re.findall(r"<text.*?</text>", drawn, re.DOTALL)]
    assert {*told, "time, us", "bus bandwidth, GB/s"} <= set(texts)
    said(*asked, "--plot", "x.png")
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = run("all_reduce", "--ranks", 4, *PAIRS, "--size", 4, "--plot", "x.png")
    assert result.exit_code == 1 and "pip install 'abccl[plot]'" in result.output


# ---- traces

FREE = Topology("free", "", Rank(fold=1e-10), (Level("host", 2, 1e-6, 0.0, 1e-10), Level("all", 0, 5e-6, 0.0, 1e-9)))
SHARED = Topology(
    "shared",
    "",
    Rank(send=1e-10, receive=1e-10, fold=1e-10, slots=2),
    (Level("host", 2, 1e-6, 3e-7, 1e-10), Level("all", 0, 5e-6, 1e-6, 0.0, Links("host", 2, 1e9))),
)


def events(*arguments: object) -> list[dict[str, Any]]:
    said(*arguments, "--trace", "trace.json")
    return trace_events(Path("trace.json").read_text())


def trace_events(text: str) -> list[dict[str, Any]]:
    document = json.loads(text)
    assert document["displayTimeUnit"] == "ns"
    found = document["traceEvents"]
    assert isinstance(found, list)
    return found


def of(events: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == phase]


def nanoseconds(event: dict[str, Any]) -> tuple[int, int]:
    """Start and end as Perfetto reads them: whole nanoseconds, the rest cut off."""
    start = int(event["ts"] * 1000)
    return start, start + int(event.get("dur", 0.0) * 1000)


def test_a_trace_names_nodes_ranks_and_lanes() -> None:
    found = events(
        "all_reduce",
        "--algorithm",
        "ring",
        "--ranks",
        4,
        *PAIRS,
        "--size",
        1 << 20,
        "--segment",
        "64K",
        "--lanes",
        2,
        "--method",
        "events",
    )
    names = {
        (e["name"], e["pid"], e["tid"] if e["name"] == "thread_name" else 0): e["args"]["name"]
        for e in of(found, "M")
        if "name" in e["args"]
    }
    assert names == {
        ("process_name", 1, 0): "host 0",
        ("process_name", 2, 0): "host 1",
        **{
            ("thread_name", 1 + rank // 2, 1 + 2 * rank + lane): f"rank {rank}, lane {lane}"
            for rank in range(4)
            for lane in range(2)
        },
    }
    assert {event["name"] for event in of(found, "X")} == {
        *(f"{what} {(rank + by) % 4}" for rank in range(4) for what, by in (("send to", 1), ("receive from", -1))),
        *(f"wait for {rank}" for rank in range(4)),
        "fold",
    }
    sends = [event for event in of(found, "X") if event["cat"] == "send"]
    assert {event["args"]["bytes"] for event in sends} == {64 << 10}
    assert {event["args"]["segment"] for event in sends} == {0, 1, 2, 3}


@pytest.mark.parametrize("topology", [SHARED, FREE], ids=lambda topology: topology.name)
@pytest.mark.parametrize(("algorithm", "ranks", "lanes"), [("double_tree", 7, 3), ("ring", 4, 1), ("direct", 5, 2)])
def test_a_trace_is_the_timeline(topology: Topology, algorithm: str, ranks: int, lanes: int) -> None:
    options: dict[str, Any] = {"segment": 8 << 10, "lanes": lanes, "method": "events", "record": True}
    found = simulate(lookup(Collective.ALL_REDUCE, algorithm), ranks, topology, 200_000, **options)
    assert found.timeline is not None
    file = io.StringIO()
    timeline.write(file, timeline.slices_of(found.timeline), timeline.rows_of(topology, found.lanes))
    written = trace_events(file.getvalue())

    threads: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for event in of(written, "X"):
        threads[event["tid"]].append(nanoseconds(event))
    for spans in threads.values():
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "Perfetto drops what overlaps"

    busy = found.timeline.kind != timeline.KINDS.index("message")
    wanted = (found.timeline.end - found.timeline.start)[busy].sum() * 1e6
    assert sum(event["dur"] for event in of(written, "X")) == pytest.approx(wanted, abs=2e-3 * busy.sum())
    assert max(nanoseconds(event)[1] for event in of(written, "X")) == pytest.approx(found.seconds * 1e9, abs=2)

    # An arrow is bound to the slice of its thread that stands before it.
    ends: dict[str, dict[int, dict[str, Any]]] = {"s": {}, "f": {}}
    latest: dict[int, dict[str, Any]] = {}
    for event in written:
        if event["ph"] == "X":
            latest[event["tid"]] = event
        elif event["ph"] in ends:
            assert latest[event["tid"]]["ts"] == event["ts"] and event["id"] not in ends[event["ph"]]
            ends[event["ph"]][event["id"]] = latest[event["tid"]]
    assert len(ends["s"]) == found.messages and ends["s"].keys() == ends["f"].keys()
    ways = {phase: {event["id"]: event for event in of(written, phase)} for phase in "be"}
    assert len(ways["b"]) == found.messages and ways["b"].keys() == ways["e"].keys()
    assert all(event["ts"] < ways["e"][number]["ts"] for number, event in ways["b"].items())
    assert sum(event["args"]["bytes"] for event in of(written, "b")) == sum(
        sent["args"]["bytes"] for sent in ends["s"].values()
    )
    for number, sent in ends["s"].items():
        taken = ends["f"][number]
        sender, receiver = ((event["tid"] - 1) // found.lanes for event in (sent, taken))
        assert (sent["name"], taken["name"]) == (f"send to {receiver}", f"receive from {sender}")
        assert sent["args"] == taken["args"] and nanoseconds(sent)[1] <= nanoseconds(taken)[0]


def test_where_some_ranks_stand_for_all_only_they_are_in_the_trace() -> None:
    found = events("all_reduce", "--algorithm", "ring", "--ranks", 8, *PAIRS, "--size", "64K")
    assert {event["tid"] for event in of(found, "X")} == {1, 2}
    assert {event["name"] for event in of(found, "X")} >= {"send to 2", "receive from 7"}
    assert [event["id"] for event in of(found, "s")] == [event["id"] for event in of(found, "f")] != []


def test_a_trace_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("all_reduce", "--algorithm", "ring", "--ranks", 4, *PAIRS, "--size", "64K", "--trace", "trace.json")
    monkeypatch.setattr(timeline, "MOST", 47)
    result = run(*asked, "--method", "events")
    assert result.exit_code == 1
    assert "a trace of 72 slices is too much for a browser, 47 are the most: take fewer ranks" in result.output
    assert len(rows(result.output)) == 1
    monkeypatch.setattr(timeline, "MOST", 80)
    assert "slices is too much" in run(*asked, "--method", "events").output
    assert Path("trace.json").read_text() == ""


def test_a_closed_form_has_no_trace() -> None:
    asked = ("all_reduce", "--algorithm", "ring", "--ranks", 4, *PAIRS, "--size", "64K", "--trace", "trace.json")
    assert "a closed form has no timeline" in run(*asked, "--method", "closed-form").output
