"""A tuner's table as a machine of the simulator, its file, and the comparison with measured times."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from abccl.algorithms import Collective, lookup
from abccl.algorithms.model import NAMES
from abccl.algorithms.plan import bind, cut, lower
from abccl.algorithms.simulator import Level, Links, Rank, Topology, parse, read, shipped
from abccl.algorithms.simulator.toml_writer import to_toml
from abccl.bench import predicted, predicted_report
from abccl.bench.predicted_report import Case, Run
from abccl.collectives.offline import offline_tuner
from abccl.collectives.tuner.as_topology import simulated, topology_of
from abccl.collectives.tuner.candidates import Place, candidates, priced
from abccl.collectives.tuner.choice import Choice
from abccl.collectives.tuner.table import built_in
from abccl.errors import ArgumentError
from abccl.tools.cli import main

KINDS = [Collective(name) for name in predicted.COLLECTIVES]


def place_of(*hosts: int, cores: int | None = None, shared: bool = True, protocol: str | None = None) -> Place:
    """So many ranks on each host, in order."""
    starts = [sum(hosts[:number]) for number in range(len(hosts))]
    ranks = tuple(tuple(range(start, start + size)) for start, size in zip(starts, hosts))
    return Place(ranks, cores or max(hosts), 128 << 10, 4, shared, protocol=protocol)


# ---- the topology of a table


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("nbytes", [3 << 10, 48 << 10])
@pytest.mark.parametrize("collective", KINDS)
def test_the_simulator_says_what_the_tuner_says_where_nothing_is_shared(
    collective: Collective, nbytes: int, ranks: int
) -> None:
    place, table = place_of(ranks), built_in("near")
    topology = topology_of(table, place)
    nbytes = nbytes // (64 * 12) * 64 * 12  # blocks of whole cache lines, for any number of ranks
    choices = [one for one in candidates(collective, nbytes, place, table) if one.choice.segment is None]
    assert choices
    for one in choices:
        found = simulated(one.choice, nbytes, place, topology)
        assert found.segments == 1
        assert found.seconds == pytest.approx(one.predicted, rel=1e-9), one.choice.name


def test_messages_to_another_host_have_the_constants_of_the_network() -> None:
    place, table = place_of(1, 1, shared=False), built_in("near")
    topology = topology_of(table, place)
    assert [level.name for level in topology.levels] == ["host", "system"]
    assert topology.levels[1].links == Links("host")
    assert topology.rank.slots == 0
    assert not topology.protocols
    for nbytes in (128, 64 << 10):
        choice = Choice(lookup(Collective.ALL_REDUCE, "ring"))
        (said,) = priced(choice.algorithm, [choice], nbytes, place, table)  # type: ignore[arg-type]
        assert simulated(choice, nbytes, place, topology).seconds == pytest.approx(said.predicted, rel=1e-9)


def test_ranks_share_cores_where_a_host_has_fewer() -> None:
    table = built_in("near")
    choice = Choice(lookup(Collective.ALL_TO_ALL, "pairwise"), "cached")
    own, crowded = place_of(4), place_of(4, cores=2)
    assert topology_of(table, own).levels[0].cores == 0
    assert topology_of(table, crowded).levels[0].cores == 2
    alone, shared = (simulated(choice, 1 << 20, place, topology_of(table, place)).seconds for place in (own, crowded))
    assert 1.8 * alone < shared < 2.2 * alone


def test_protocols_are_those_of_the_table() -> None:
    table = built_in("far")
    topology = topology_of(table, place_of(2))
    assert list(topology.protocols) == list(table.constants)
    assert [rank.lends for rank, _ in topology.protocols.values()] == [False, False, True, True]
    for name in topology.protocols:
        rank = topology.without_protocols(name, 100 << 10).rank
        constants = dict(zip(NAMES, table.at(name, 100 << 10)))
        assert {field: getattr(rank, field) for field in constants if field in vars(rank)} == pytest.approx(
            {field: value for field, value in constants.items() if field in vars(rank)}
        )
    assert list(topology_of(table, place_of(2, protocol="streaming")).protocols) == ["streaming"]


@pytest.mark.parametrize("hosts", [((0, 2), (1, 3)), ((0,), (1, 2)), ((0, 1), (2,), (3, 4))])
def test_ranks_that_no_topology_has(hosts: tuple[tuple[int, ...], ...]) -> None:
    place = replace(place_of(2), hosts=hosts)
    with pytest.raises(ArgumentError, match="as many ranks on every host, in order, .* host by host"):
        topology_of(built_in("near"), place)


def test_the_last_host_may_have_fewer_ranks() -> None:
    assert topology_of(built_in("near"), place_of(2, 1)).levels[0].size == 2


@pytest.mark.parametrize("name", ["ring", "tree", "direct", "recursive_doubling", "rabenseifner", "double_tree"])
@pytest.mark.parametrize("segment", [None, 10_000, 128 << 10])
@pytest.mark.parametrize("lanes", [None, 2])
def test_segments_and_lanes_are_the_plans(name: str, segment: int | None, lanes: int | None) -> None:
    place, count = place_of(4), 250_000
    algorithm = lookup(Collective.ALL_REDUCE, name)
    choice = Choice(algorithm, "cached", segment, lanes)
    plan = bind(
        lower(algorithm, 0, 4),
        cut(count, algorithm.blocks(4), 4),
        4,
        slot_bytes=place.slot_bytes,
        segment_bytes=segment,
        lanes=lanes or place.lanes,
    )
    found = simulated(choice, 4 * count, place, topology_of(built_in("near"), place))
    assert (found.segments, found.lanes) == (plan.segments, min(plan.lanes, plan.segments))


def test_an_engines_own_collective_is_no_schedule() -> None:
    place = place_of(2)
    with pytest.raises(ArgumentError, match="native is no schedule"):
        simulated(Choice("native"), 100, place, topology_of(built_in("near"), place))


# ---- its file


@pytest.mark.parametrize("name", shipped())
def test_shipped_topologies_are_written_and_read_back(name: str) -> None:
    topology = read(name)
    assert parse(to_toml(topology), "it.toml") == topology


@pytest.mark.parametrize("place", [place_of(2), place_of(8, cores=2), place_of(2, 2), place_of(1, 1, shared=False)])
def test_topologies_of_tables_are_written_and_read_back(place: Place) -> None:
    topology = topology_of(built_in("far"), place)
    assert parse(to_toml(topology), "it.toml") == topology


ODD = Topology(
    'a "machine" \\ of ours',
    "two\nlines, \x7f and \N{SNOWMAN}",
    Rank("a GPU", fold=(1e-12, 2), lends=True, slots=3, processors=0),
    (
        Level("a node", 4, alpha=1e-300, links=Links("a GPU", 2, 1e9, True)),
        Level("rack", 8, overhead=3, cores=2),
        Level("all", 0, beta=(0.1, 0.2)),
    ),
    sizes=(100, 2**50),
    sources={"rank.fold": "a text", "rank.send": "left out, and still known", "a node.links.capacity": 'the "sheet"'},
)


def test_all_that_a_topology_can_say_is_written() -> None:
    rank, levels = ODD.rank, ODD.levels
    other = (levels[0], replace(levels[1], cores=0), replace(levels[2], alpha=1e-6, links=Links("rack")))
    ways = {"plain": (rank, levels), "an LL": (replace(rank, fold=1.5, lends=False), other)}
    sources = {**ODD.sources, "an LL.rank.fold": "x", "an LL.all.alpha": "y", "an LL.all.links": "z"}
    topology = replace(ODD, protocols=ways, sources=sources)
    assert parse(to_toml(topology), "it.toml") == topology


def test_what_a_file_can_not_say_is_refused() -> None:
    rank, levels = ODD.rank, ODD.levels
    with pytest.raises(ArgumentError, match="LL calls a rank 'CPU', and in a file .* 'a GPU'"):
        to_toml(replace(ODD, protocols={"LL": (replace(rank, name="CPU"), levels)}, sources={}))
    without = (replace(levels[0], links=None), *levels[1:])
    with pytest.raises(ArgumentError, match="LL has no links at a node"):
        to_toml(replace(ODD, protocols={"LL": (rank, without)}))


# ---- the command


@pytest.fixture
def nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ABCCL_TUNER", raising=False)


def simulate(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["simulate", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("nothing_measured")
def test_this_machine_is_simulated_and_kept(tmp_path: Path) -> None:
    kept = tmp_path / "here.toml"
    call = ("all_reduce", "--algorithm", "ring,tree", "--ranks", "4", "--size", "64K", "--json", "-")
    told = json.loads(simulate(*call, "--topology", "this-machine", "--write-topology", str(kept)))
    tuner = offline_tuner(4)
    assert read(str(kept)) == topology_of(tuner.table, tuner.place, "this-machine")
    again = json.loads(simulate(*call, "--topology", str(kept)))
    assert [one["seconds"] for one in told] == [one["seconds"] for one in again]
    assert {one["topology"] for one in told} == {"this-machine"}


@pytest.mark.usefixtures("nothing_measured")
def test_the_origin_of_the_table_is_told() -> None:
    out = simulate("all_reduce", "--ranks", "3", "--size", "1M", "--algorithm", "ring", "--topology", "this-machine")
    assert "all_reduce on this-machine: 3 ranks on 1 host by the tuner's table, built in; nothing was measured" in out


@pytest.mark.usefixtures("nothing_measured")
def test_what_is_written_has_the_constants_that_were_set(tmp_path: Path) -> None:
    kept = tmp_path / "fast.toml"
    call = ("all_reduce", "--ranks", "4", "--size", "1K", "--algorithm", "ring", "--topology", "ethernet")
    simulate(*call, "--set", "system.alpha=1e-7", "--write-topology", str(kept))
    assert read(str(kept)) == read("ethernet").with_value("system.alpha", 1e-7)


def test_this_machine_is_one_number_of_ranks() -> None:
    arguments = ["simulate", "all_reduce", "--ranks", "2-4", "--size", "1K", "--topology", "this-machine"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code != 0
    assert "this-machine has a table for each number of ranks, and got 3: ask for one" in " ".join(done.output.split())


# ---- the comparison


def case_of(ratio: float, tuner: float = 1.0, nbytes: int = 100, choice: str = "ring, cached") -> Case:
    """It took 2 us, and noise did not change that."""
    return Case("all_reduce", nbytes, "near", choice, (1e-6, 2e-6, 2e-6, 9e-6), 2e-6 * ratio, 2e-6 * tuner)


def run_of(*cases: Case, hosts: tuple[int, ...] = (2,), transport: str = "shm") -> Run:
    machine: dict[str, Any] = {"cpu": "a processor", "cores": 2, "system": "Linux", "load_average": 0.0}
    return Run("2026-11-22", machine, "a command", hosts, transport, {"near": "measured"}, cases, 0, 60.0)


def test_ratios() -> None:
    case = case_of(0.5, 3.0)
    assert (case.seconds, case.ratio, case.tuner_ratio) == pytest.approx((2e-6, 0.5, 3.0))
    assert case.own_ratio == pytest.approx(1.5 / 5.5)
    assert predicted_report.error([0.5, 1.0, 1.2, 3.0, 0.9]) == pytest.approx(0.2)


def test_runs_are_kept_as_json(tmp_path: Path) -> None:
    run, kept = run_of(case_of(1.2), hosts=(2, 2)), tmp_path / "run.json"
    kept.write_text(json.dumps(run.to_json()))
    assert predicted_report.read(kept) == run
    for broken in ({**run.to_json(), "format": 0}, {**run.to_json(), "cases": 3}, []):
        kept.write_text(json.dumps(broken))
        with pytest.raises(ArgumentError, match=r"run\.json is no file of `bench\.predicted --json`: "):
            predicted_report.read(kept)


@pytest.mark.parametrize(
    ("run", "title", "crowded"),
    [
        (run_of(), "2 ranks", False),
        (run_of(hosts=(4,)), "4 ranks", True),
        (run_of(transport="mpi"), "2 ranks over mpi", False),
        (run_of(hosts=(2, 2), transport="joint"), "4 ranks on 2 hosts", True),
    ],
)
def test_titles(run: Run, title: str, crowded: bool) -> None:
    assert (run.title, run.crowded) == (title, crowded)


def test_one_way_of_some_algorithms_is_drawn() -> None:
    found = candidates(Collective.ALL_REDUCE, 1 << 20, place_of(4), built_in("near"))
    draws = [predicted.drawn(found, random.Random(seed)) for seed in range(40)]
    for draw in draws:
        names = [one.choice.algorithm_name.partition("(")[0] for one in draw]
        assert len(set(names)) == len(names) == predicted.WAYS
    every = {one.choice for draw in draws for one in draw}
    assert {choice.protocol for choice in every} == {one.choice.protocol for one in found}
    assert {choice.lanes for choice in every} == {None, 1}
    assert draws[0] == predicted.drawn(list(reversed(found)), random.Random(0))


def test_what_is_predicted_to_take_too_long_is_not_drawn() -> None:
    found = candidates(Collective.ALL_REDUCE, 1 << 20, place_of(2), built_in("near"))
    slow = [replace(one, alpha=math.inf) for one in found]
    assert predicted.drawn(slow, random.Random(0)) == []


DOCUMENT = (
    "before\n<!-- part: predicted-and-measured -->\nwhat was there\n<!-- end of predicted-and-measured -->\nafter\n"
)


def test_the_part_of_the_document(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = []
    roomy = run_of(case_of(1.0, 2.0), case_of(1.2, 1.1), case_of(2.0, 3.0, 1 << 20, "tree"))
    crowded = run_of(case_of(0.25), hosts=(8,))
    for number, run in enumerate((roomy, crowded)):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(run.to_json()))
    document = tmp_path / "model.md"
    document.write_text(DOCUMENT)
    done = CliRunner().invoke(predicted.predicted, [*map(str, files), "--write", str(document)])
    assert done.exit_code == 0, done.output
    assert "2 ranks: 3 cases in 60 s; median error: simulator 20%, tuner's model 100%" in done.output
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "what was there" not in text
    assert "Of 4 cases **50%** are predicted within 30%" in text
    assert "median error is **20%** (the tuner's 100%" in text
    assert "| 2 ranks | 3 | 20% | 84% | 1.34 | 100% | 180% | 1.88 | 73% |" in text
    assert "| 8 ranks | 1 | 75% | 75% | 0.25 | 0% | 0% | 1.00 | 73% |" in text
    assert "|  | 100 B | 1 MiB |" in text
    assert "| 2 ranks | 1.10 | 2.00 |" in text
    assert "| ring | 2 | 10% | 1.10 | 1 | 75% | 0.25 |" in text
    assert "| tree | 1 | 100% | 2.00 |  |  |  |" in text
    furthest = text[text.index("Furthest off") :]
    assert furthest.index("| 8 ranks | all_reduce | 100 B | ring, cached | 2 | 0.5 | 2 | 0.25 |") < furthest.index(
        "tree"
    )
    assert (tmp_path / "model" / "predicted-and-measured.png").read_bytes().startswith(b"\x89PNG")


def test_a_document_of_nothing_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "model.md"
    document.write_text(DOCUMENT)
    with pytest.raises(ArgumentError, match="nothing was measured"):
        predicted_report.write([run_of()], document)
    assert document.read_text() == DOCUMENT


@pytest.mark.ranks
def test_two_ranks_are_measured(tmp_path: Path) -> None:
    kept = tmp_path / "run.json"
    arguments = ["--collectives", "all_reduce", "--sizes", "48", "--seconds", "0.01", "--json", str(kept)]
    done = CliRunner().invoke(predicted.predicted, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    run = predicted_report.read(kept)
    assert run.hosts == (2,)
    for case in run.cases:
        assert case.nbytes == 48
        assert len(case.rounds) >= predicted.FEWEST
        assert min(*case.rounds, case.simulated, case.walked) > 0
