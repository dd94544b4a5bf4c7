"""Calibration among real ranks: one table on all of them, kept for the next ones, whatever happens to the file."""

from __future__ import annotations

import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import abccl
from abccl.algorithms import Collective
from abccl.collectives import tuning
from abccl.collectives.bootstrap import find
from abccl.collectives.communicator import connect
from abccl.collectives.tuner import store
from abccl.collectives.tuner.calibrate import SIZES
from abccl.collectives.tuner.candidates import Place
from abccl.collectives.tuner.table import Table, built_in
from abccl.collectives.tuner.tuner import Tuner
from abccl.errors import ArgumentError
from abccl.transports.shm import NEVER, ShmTransport

C = Collective
FIVE = (C.ALL_REDUCE, C.REDUCE_SCATTER, C.ALL_GATHER, C.BROADCAST, C.ALL_TO_ALL)
TIMEOUT = 120.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tables of a test's ranks are kept, none yet; the ranks choose by them."""
    monkeypatch.setenv("ABCCL_TUNER", "auto")
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuner"


def prepare(budget: float | None = 0.2) -> None:
    """In a rank: less time to measure in; and what others do to the machine, the hypervisor too, changes nothing."""
    ShmTransport._calibrate = lambda self: NEVER  # type: ignore[method-assign]
    tuning.POOR = math.inf
    if budget is not None:
        tuning.BUDGET = budget


def state(c: abccl.Communicator) -> dict[str, Any]:
    """What a rank knows, and a hundred decisions of its tuner; few for more ranks, which take turns on the cores."""
    sizes = [int(2.4**power) for power in range(1, 21)] if c.size == 2 else [40, 4000, 400_000, 40_000_000]
    return {
        "table": json.dumps(c.tuner.table.to_json()),
        "place": repr(c.tuner.place),
        "link": c.tuner.link,
        "rules": [(rule.collective.value, rule.choice.name, rule.source) for rule in c.tuner.rules],
        "decisions": [(d.choice.name, d.source) for k in FIVE for n in sizes for d in [c.tuner.decide(k, n)]],
    }


def joins(budget: float | None = 0.2) -> tuple[dict[str, Any], list[str]]:
    """A rank that joins the others and calls something; and what was warned of."""
    prepare(budget)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with abccl.init(timeout=60) as c:
            for count in (1, 1000, 100_000):
                x = np.full(count, c.rank, "float32")
                c.all_reduce(x)
                assert (x == sum(range(c.size))).all()
            return state(c), [str(warning.message) for warning in caught]


def joins_without_measuring() -> dict[str, Any]:
    def refused(*_: Any) -> Table:
        raise AssertionError("measured, though there is a table")

    prepare()
    tuning.calibrate = refused
    with abccl.init(timeout=60) as c:
        return state(c)


def error() -> str:
    prepare()
    try:
        abccl.init(timeout=60).close()
    except ArgumentError as wrong:
        return str(wrong)
    return "none"


def the_file(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


def test_all_ranks_know_and_choose_the_same(ranks: int, here: ModuleType, cache: Path) -> None:
    first = [found for found, heard in abccl.spawn(here.joins, ranks, (None,), timeout=TIMEOUT) if not heard]
    assert len(first) == ranks
    assert all(found == first[0] for found in first)
    table = json.loads(first[0]["table"])
    assert table["origin"].startswith("measured on ")
    key, kept = store.read(the_file(cache))
    assert kept == table
    assert key["ranks"] == [ranks] and key["link"] == first[0]["link"] == "near"
    # A restart: the table is read, nothing measured, the file as it was.
    before = the_file(cache).stat().st_mtime_ns, the_file(cache).read_bytes()
    assert abccl.spawn(here.joins_without_measuring, ranks, timeout=TIMEOUT) == first
    assert (the_file(cache).stat().st_mtime_ns, the_file(cache).read_bytes()) == before


@pytest.mark.ranks
def test_a_damaged_file_is_measured_anew(here: ModuleType, cache: Path) -> None:
    abccl.spawn(here.joins, 2, timeout=TIMEOUT)
    file = the_file(cache)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    (first, heard), (second, nothing) = abccl.spawn(here.joins, 2, timeout=TIMEOUT)
    assert len(heard) == 1 and "is damaged" in heard[0] and str(file) in heard[0]
    assert nothing == []  # rank 0 reads for all
    assert first == second
    _, kept = store.read(the_file(cache))
    assert kept == json.loads(first["table"])
    assert abccl.spawn(here.joins_without_measuring, 2, timeout=TIMEOUT) == [first, second]


@pytest.mark.ranks
def test_a_directory_that_can_not_be_written(here: ModuleType, cache: Path) -> None:
    cache.parent.mkdir(mode=0o777)
    cache.parent.chmod(0o777)
    (first, heard), (second, nothing) = abccl.spawn(here.joins, 2, timeout=TIMEOUT)
    assert first == second
    assert any("can be written by others" in message for message in heard) and nothing == []
    assert not list(cache.glob("*"))


@pytest.mark.ranks
def test_two_groups_at_once(here: ModuleType, cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: abccl.spawn(here.joins, 2, timeout=TIMEOUT), range(2)))
    tables = [found["table"] for group in both for found, heard in group if not heard]
    assert len(tables) == 4 and tables[0] == tables[1] and tables[2] == tables[3]
    _, kept = store.read(the_file(cache))  # nothing else lies there, nothing is half written
    assert json.dumps(kept) in tables
    assert [found["table"] for found in abccl.spawn(here.joins_without_measuring, 2, timeout=TIMEOUT)] == [
        json.dumps(kept)
    ] * 2


@pytest.mark.ranks
def test_built_in_touches_nothing(here: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_TUNER", "built-in")
    found = abccl.spawn(here.joins_without_measuring, 2, timeout=TIMEOUT)
    assert found[0] == found[1]
    assert Table.from_json(json.loads(found[0]["table"])) == built_in("near")
    assert not cache.parent.exists()


def split_in_two() -> tuple[dict[str, Any], str]:
    prepare()
    with abccl.init(timeout=60) as c:
        part = c.split(c.rank // 2)
        assert part is not None
        with part:
            x = np.full(5000, c.rank + 1, "float32")
            part.all_reduce(x)
            assert x[0] == 3
            return state(part), part.tuner.table.origin


@pytest.mark.ranks
def test_splits_have_tables_of_their_own(here: ModuleType, cache: Path) -> None:
    """Two ranks of three measure among themselves; one alone has nothing to choose."""
    (first, origin), (second, _), (_, alone) = abccl.spawn(here.split_in_two, 3, timeout=TIMEOUT)
    assert first == second
    assert origin.startswith("measured on") and alone == built_in("near").origin
    assert sorted(store.read(file)[0]["ranks"] for file in cache.iterdir()) == [[2], [3]]


# ---- what is wrong is told on all ranks


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ABCCL_TUNER", "fast", "rank 0: ABCCL_TUNER must be auto or built-in, and is 'fast'"),
        ("ABCCL_RULES", "no/such/file.toml", "rank 0: ABCCL_RULES: the rule file no/such/file.toml can not be read"),
        ("ABCCL_RULES", None, "no field is called 'algoritm': did you mean algorithm?"),
    ],
)
def test_what_is_wrong_is_told_on_all_ranks(
    name: str, text: str | None, words: str, here: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = cache.parent.parent / "rules.toml"
    rules.write_text('[[rule]]\ncollective = "all_reduce"\nalgoritm = "ring"\n')
    monkeypatch.setenv(name, text or str(rules))
    found = abccl.spawn(here.error, 3, timeout=TIMEOUT)
    assert len(set(found)) == 1 and words in found[0]
    assert not cache.parent.exists()


def one_rank_has(named: int, name: str, value: str) -> tuple[dict[str, Any], str]:
    """The environment of one rank says something that that of the others does not."""
    prepare()
    bootstrap = find()
    if bootstrap.rank == named:
        os.environ[name] = value
    with connect(bootstrap, timeout=60) as c:
        c.all_reduce(np.ones(10, "float32"))
        return state(c), c.tuner.decide(C.ALL_REDUCE, 4096).source


@pytest.mark.ranks
def test_rank_0_has_the_rules(here: ModuleType, cache: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\ncollective = "all_reduce"\nalgorithm = "tree"\n')
    first, second = abccl.spawn(here.one_rank_has, 2, (0, "ABCCL_RULES", str(rules)), timeout=TIMEOUT)
    assert first == second
    assert first[1] == "rule"
    assert first[0]["rules"] == [("all_reduce", "tree", f"{rules}, rule 1 (line 1)")]
    first, second = abccl.spawn(here.one_rank_has, 2, (1, "ABCCL_RULES", str(rules)), timeout=TIMEOUT)
    assert first == second
    assert first[1] == "predicted"


@pytest.mark.ranks
def test_rank_0_says_whether_tables_are_read(here: ModuleType, cache: Path) -> None:
    first, second = abccl.spawn(here.one_rank_has, 2, (0, "ABCCL_TUNER", "built-in"), timeout=TIMEOUT)
    assert first == second and not cache.parent.exists()
    first, second = abccl.spawn(here.one_rank_has, 2, (1, "ABCCL_TUNER", "built-in"), timeout=TIMEOUT)
    assert first == second and the_file(cache)


# ---- time


@pytest.mark.ranks
def test_little_time_gives_a_table_all_the_same(here: ModuleType, cache: Path) -> None:
    (first, _), (second, _) = abccl.spawn(here.joins, 2, (1e-6,), timeout=TIMEOUT)
    assert first == second
    table = Table.from_json(json.loads(first["table"]))
    assert len(table.sizes) == 1 and table.sizes[0] in SIZES[:2]
    assert all(name for name, _ in first["decisions"])
    tuner = Tuner(Place(((0, 1),), 2, 128 << 10, 4), table)
    assert all(one.predicted > 0 for one in tuner.candidates(C.ALL_REDUCE, 1 << 20))
