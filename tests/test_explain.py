"""`abccl explain`, and the tuner that it asks: a communicator's, without the communicator."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tuner_cache import empty_cache

import abccl
from abccl.algorithms import Collective, registry
from abccl.collectives.offline import offline_tuner
from abccl.collectives.tuner import store
from abccl.collectives.tuner import tuner as choosers
from abccl.collectives.tuner.candidates import Place
from abccl.collectives.tuner.table import Table, built_in
from abccl.collectives.tuning import carriers, key_of, place_of
from abccl.errors import ArgumentError
from abccl.tools.cli import main
from abccl.transports.joint import joint_threads
from abccl.transports.topology import topology_of


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; what a test registers is gone when it ends."""
    monkeypatch.setattr(choosers, "_choosers", [])
    copies = {collective: dict(known) for collective, known in registry._registry.items()}
    monkeypatch.setattr(registry, "_registry", copies)
    return empty_cache(monkeypatch, tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)], prog_name="abccl")


def said(*arguments: object) -> str:
    """What it prints; it must do well."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def keep(tuner: choosers.Tuner, link: str, origin: str, since: float, transports: str = "shm") -> Path:
    """A table for the tuner's ranks, kept as if it had been measured then."""
    table = replace(built_in(link), origin=origin)
    file = store.save(key_of(tuner.place, link, transports), table.to_json())
    assert file is not None
    os.utime(file, (since, since))
    return file


def test_it_prints_what_a_communicator_would_say() -> None:
    text = said("all_reduce", "25MB", "--ranks", 8)
    assert text == f"{offline_tuner(8).explain(Collective.ALL_REDUCE, 25 << 20)}\n"
    assert sum(line.startswith("> ") for line in text.splitlines()) == 1
    assert "all_reduce of 25 MiB among 8 ranks on 1 host" in text
    assert "predicted to be the fastest" in text.splitlines()[-1]


def test_it_says_that_nothing_was_measured_and_what_to_do() -> None:
    assert "built in; nothing was measured here for 4 ranks on 1 host: run `abccl tune --ranks 4`" in said("scatter", 4)
    text = said("all_reduce", "1M", "--ranks", 5, "--hosts", 2)
    assert "nothing was measured here for 5 ranks on 2 hosts: run `mpirun -n 5 abccl tune`" in text
    assert "levels=3+2" in text


def test_it_says_that_the_environment_wants_the_built_in_table(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(offline_tuner(2), "near", "kept", 1e9)
    monkeypatch.setenv("ABCCL_TUNER", "built-in")
    assert "built in, as ABCCL_TUNER says" in said("all_reduce", 4, "--ranks", 2)


def test_the_newest_table_is_taken_or_that_of_the_link() -> None:
    keep(offline_tuner(2), "near", "the older one", 1e9)
    keep(offline_tuner(2), "far", "the newer one", 2e9)
    assert "constants: the newer one" in said("all_reduce", 4, "--ranks", 2)
    assert "far cores" in said("all_reduce", 4, "--ranks", 2)
    assert "constants: the older one" in said("all_reduce", 4, "--ranks", 2, "--link", "near")
    assert "built in" in said("all_reduce", 4, "--ranks", 3)


@pytest.mark.parametrize("network", ["mpi", "gloo"])
def test_between_hosts_the_network_that_was_measured_is_taken(network: str) -> None:
    keep(offline_tuner(4, 2), "near", "measured there", 1e9, f"joint {network}")
    tuner = offline_tuner(4, 2)
    assert tuner.table.origin == "measured there"
    assert Collective.ALL_REDUCE in tuner.place.natives


def test_all_by_one_network_every_rank_is_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_TRANSPORT", "mpi")
    place = offline_tuner(3).place
    assert (place.hosts, place.shared, place.cores) == (((0,), (1,), (2,)), False, 1)
    monkeypatch.setenv("ABCCL_TRANSPORT", "shm")
    with pytest.raises(ArgumentError, match="ABCCL_TRANSPORT=shm serves one host"):
        offline_tuner(3, 2)


# ---- the place is a communicator's


def place_here() -> Place:
    with abccl.init() as comm:
        return comm.tuner.place


def test_the_place_of_ranks_on_this_host(ranks: int, here: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_TUNER", "built-in")
    assert abccl.spawn(here.place_here, ranks) == [offline_tuner(ranks).place] * ranks  # type: ignore[attr-defined]


@pytest.mark.parametrize("hosts", [[[0, 1], [2]], [[0], [1]], [[0], [1, 2, 3]]], ids=str)
def test_the_place_of_ranks_on_hosts(hosts: list[list[int]]) -> None:
    transports = joint_threads(hosts)
    try:
        # Some of these ranks are alone on their host, and know as well as others that not all are.
        (place,) = {place_of(transport, topology_of(hosts), False) for transport in transports}
        assert {carriers(transport) for transport in transports} == {"joint inproc"}
    finally:
        for transport in transports:
            transport.close()
    assert place.shared is (max(map(len, hosts)) > 1)
    if len(hosts[0]) >= len(hosts[1]):
        expected = offline_tuner(sum(map(len, hosts)), len(hosts)).place
        assert replace(place, natives=frozenset()) == replace(expected, natives=frozenset())


# ---- what is asked for


def test_an_algorithm_that_is_asked_for() -> None:
    text = said("all_reduce", "64K", "--ranks", 3, "--algorithm", "ring")
    assert text.splitlines()[-1] == "ring: the caller asked for it"
    assert any(line.startswith("> ") and line.endswith("  ring") for line in text.splitlines())


def test_the_environment_and_the_rule_file_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rules = tmp_path / "mine.toml"
    rules.write_text('[[rule]]\ncollective = "all_reduce"\nfrom = "1K"\nalgorithm = "tree"\n')
    monkeypatch.setenv("ABCCL_RULES", str(rules))
    assert said("all_reduce", "64K").splitlines()[-1] == f"tree: {rules}, rule 1 (line 1) asks for it"
    assert "predicted" in said("all_reduce", 512).splitlines()[-1]
    monkeypatch.setenv("ABCCL_ALGORITHM", "all_reduce=chain")
    assert said("all_reduce", "64K").splitlines()[-1] == "chain: ABCCL_ALGORITHM asks for it"


OWN = """
import abccl
from abccl import Collective, algorithm, recv, send

@algorithm(Collective.ALL_REDUCE)
def star_all_reduce(rank, size):
    others = range(1, size)
    if rank == 0:
        yield [recv(peer, 0, reduce=True) for peer in others]
        yield [send(peer, 0) for peer in others]
    else:
        yield send(0, 0)
        yield recv(0, 0)

@abccl.register_chooser
def mine(call):
    return "star" if call.nbytes == 4096 * call.ranks else None
"""


def test_algorithms_and_choosers_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    text = said("all_reduce", "12K", "--ranks", 3, "--file", file)
    assert text.splitlines()[-1] == "star: the chooser mine asks for it"
    told = json.loads(said("all_reduce", 100, "--ranks", 3, "--file", file, "--algorithm", "star", "--json"))
    (star,) = [one for one in told["candidates"] if one["choice"] == "star"]
    assert star["predicted"] == pytest.approx(star["alpha"] + star["beta"] + star["gamma"]) and star["predicted"] > 0


def test_every_candidate_as_lines_and_as_data() -> None:
    short, long = said("all_gather", "1M"), said("all_gather", "1M", "--all")
    told = json.loads(said("all_gather", "1M", "--json"))
    assert len(short.splitlines()) < len(long.splitlines())
    assert [line.split("  ")[-1] for line in long.splitlines()[4:-2]] == [c["choice"] for c in told["candidates"]]
    assert told["choice"] == told["candidates"][0]["choice"]


# ---- a table from elsewhere


def test_a_table_tells_its_own_ranks_and_hosts(cache: Path, tmp_path: Path) -> None:
    place = replace(offline_tuner(5, 2).place, cores=2)
    content = replace(built_in("far"), origin="elsewhere").to_json()
    file = store.save({**key_of(place, "far", "joint gloo"), "cpu": "another"}, content)
    assert file is not None
    copied = tmp_path / "copied.json"
    file.rename(copied)
    text = said("all_reduce", "1M", "--table", copied)
    assert "among 5 ranks on 2 hosts, 2 far cores for those of a host" in text and "constants: elsewhere" in text
    assert offline_tuner(5, 2, file=copied).place.cores == 2
    assert "among 4 ranks on 1 host" in said("all_reduce", "1M", "--table", copied, "--ranks", 4)


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"key": {}, "checksum": "", "content": {}}', "cut"])
def test_a_file_that_is_no_table_is_refused(damage: str, tmp_path: Path) -> None:
    file = keep(offline_tuner(2), "near", "kept", 1e9)
    file.write_text(file.read_text()[:-100] if damage == "cut" else damage)
    result = run("all_reduce", 4, "--table", file)
    assert result.exit_code == 1 and f"{file} is no table of the tuner" in result.output


# ---- what makes no sense


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["all_reduc", "4"], "did you mean all_reduce"),
        (["all_reduce", "4X"], "'4X' is no size"),
        (["all_reduce", "4", "--ranks", "2", "--hosts", "3"], "2 ranks on 3 hosts: a host has one rank at least"),
        (["all_reduce", "4", "--algorithm", "rong"], "rong"),
        (["all_reduce", "4", "--ranks", "0"], "x>=1"),
        (["all_reduce", "4", "--link", "wide"], "near"),
        (["all_reduce", "4", "--table", "nowhere.json"], "does not exist"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0 and words in result.output
    assert "Traceback" not in result.output


def test_one_rank_has_nothing_to_choose() -> None:
    assert "built in; one rank has nothing to choose" in said("all_reduce", "1M", "--ranks", 1)
    assert isinstance(offline_tuner(1).table, Table)
