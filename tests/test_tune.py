"""`abccl tune`: what it measures, keeps and leaves alone, and that communicators go by it. No test looks at a time."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from tuner_cache import empty_cache

import abccl
from abccl.algorithms import Collective
from abccl.bench import openmpi_tuning
from abccl.collectives.offline import offline_tuner
from abccl.collectives.tuner import store
from abccl.collectives.tuner.candidates import Candidate, candidates
from abccl.collectives.tuner.choice import Choice
from abccl.collectives.tuner.stopwatch import Stopwatch
from abccl.collectives.tuner.table import LINKS, Measured, Table, built_in
from abccl.collectives.tuner.tune import WAYS, Trial, Wish, trials, with_trials
from abccl.collectives.tuner.tuner import Tuner
from abccl.collectives.tuning import key_of
from abccl.tools import blocks
from abccl.tools.arguments import ladder
from abccl.tools.cli import main

C = Collective
ABCCL = Path(sys.executable).parent / "abccl"
MOVED = "the cores have moved meanwhile"
QUICK = ("--sizes", "4K:16K:4", "--seconds", "0.002", "--best", "2")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return empty_cache(monkeypatch, tmp_path)


def tuned(*arguments: str, starter: Sequence[str] = ()) -> str:
    """What `abccl tune` prints; it must do well. Once more, from the same cache, if a hypervisor has moved cores."""
    command = [*starter, str(ABCCL), "tune", *arguments]
    kept = Path(os.environ[store.ENVIRONMENT])
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        if kept.exists():
            shutil.copytree(kept, before)
        for _ in range(8):
            done = subprocess.run(command, capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, done.stdout + done.stderr
            if MOVED not in done.stdout:
                return done.stdout
            shutil.rmtree(kept, ignore_errors=True)
            if before.exists():
                shutil.copytree(before, kept)
    pytest.fail("the cores moved eight times in a row")


def kept(cache: Path) -> Table:
    """The only table."""
    (file,) = (cache / "tuner").iterdir()
    return Table.from_json(store.read(file)[1])


# ---- end to end


def explanations() -> list[dict[str, Any]]:
    with abccl.init() as comm:
        return [comm.explain("all_reduce", size).to_json() for size in ("8K", "8M")]


@pytest.mark.ranks
def test_communicators_go_by_what_was_measured(cache: Path, here: ModuleType) -> None:
    printed = tuned("--ranks", "2", "--collective", "all_reduce", *QUICK)
    lines = printed.splitlines()
    assert lines[0].startswith("2 ranks on 1 host over shm") and lines[1].split()[:3] == [
        "collective",
        "size",
        "measured",
    ]
    assert [re.match(r"all_reduce +(\d+ KiB) +[\d.]+ us", line)[1] for line in lines[2:4]] == ["4 KiB", "16 KiB"]  # type: ignore[index]
    (file,) = (cache / "tuner").iterdir()
    assert lines[-1] in [f"kept for {link} cores in {file}" for link in LINKS]
    table = kept(cache)
    assert {one.nbytes for one in table.measured["all_reduce"]} == {4096, 16384}
    for link in LINKS:  # when the ranks meet again their cores may be of the other class
        store.save(key_of(offline_tuner(2).place, link, "shm"), table.to_json())
    found = abccl.spawn(here.explanations, 2)
    assert found[0] == found[1]
    between, beyond = found[0]
    assert between["origin"] == beyond["origin"] == table.told
    assert between["source"] == "measured" and beyond["source"] == "predicted"
    assert between["choice"] in [one["choice"] for one in between["candidates"] if one["measured"] is not None]


@pytest.mark.ranks
def test_what_was_measured_of_others_is_kept(cache: Path) -> None:
    tuner = offline_tuner(2)
    own = Measured(4096, "ring", "cached", None, None, 1e-6)
    for link in LINKS:
        before = replace(
            built_in(link), measured={"broadcast": (own,), "all_reduce": (own, replace(own, nbytes=1 << 20))}
        )
        store.save(key_of(tuner.place, link, "shm"), before.to_json())
    tuned("--ranks", "2", "--collective", "all_reduce,all_gather", *QUICK)
    tables = [Table.from_json(store.read(file)[1]) for file in (cache / "tuner").iterdir()]
    (table,) = [one for one in tables if one.origin.startswith("measured")]
    assert table.measured["broadcast"] == (own,)
    assert {one.nbytes for one in table.measured["all_reduce"]} == {4096, 16384, 1 << 20}
    assert own not in table.measured["all_reduce"]
    assert table.measured["all_gather"]


@pytest.mark.ranks
def test_a_dry_run_keeps_nothing(cache: Path) -> None:
    printed = tuned("--ranks", "2", "--collective", "broadcast", "--dry-run", *QUICK)
    assert printed.splitlines()[-1] == "not kept"
    assert not cache.exists()


@pytest.mark.ranks
def test_an_interrupt_leaves_no_table(cache: Path) -> None:
    command = [str(ABCCL), "tune", "--ranks", "2", "--sizes", "4:16M", "--seconds", "0.5"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if line.startswith("all_reduce"))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) != 0 and line
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
    assert not list(cache.glob("**/*"))


def test_under_mpirun_rank_0_keeps_the_table(cache: Path, mpirun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_TRANSPORT", "mpi")
    printed = tuned("--collective", "all_reduce", *QUICK, starter=[*mpirun, "-n", "2"])
    assert "2 ranks on 1 host over mpi" in printed and printed.count("kept for") == 1
    assert {size for size, _ in kept(cache).natives["all_reduce"]} >= {4096, 16384}
    assert offline_tuner(2).table == kept(cache)


def test_under_mpirun_ranks_are_given_already(mpirun: list[str]) -> None:
    command = [*mpirun, "-n", "2", str(ABCCL), "tune", "--ranks", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "2 ranks were started, and --ranks says 3: leave it out" in done.stderr


# ---- what is measured


class Clock(Stopwatch):
    """Says what it is told to, and notes who was asked."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.says, self.asked = seconds, list[tuple[Collective, int, Choice]]()

    def subject(self, collective: Collective, nbytes: int, choice: Choice) -> Any:
        self.asked.append((collective, nbytes, choice))
        return choice

    def seconds(self, subject: Any, calls: int) -> float:
        return self.says.get(subject.algorithm_name, 1.0)


def measured(wish: Wish, seconds: dict[str, float], natives: frozenset[Collective] = frozenset()) -> list[Trial]:
    place = replace(offline_tuner(3).place, natives=natives)
    return list(trials(Clock(seconds), place, lambda blob: [blob, blob, blob], built_in("near"), wish))


def test_the_best_are_measured_and_those_of_the_sizes_beside() -> None:
    wish = Wish((C.ALL_REDUCE,), ladder(4, 1 << 20, 4), 1e-6, 3)
    found = measured(wish, {})
    place, table = offline_tuner(3).place, built_in("near")
    assert [trial.nbytes for trial in found] == [4 << 2 * step for step in range(10)]
    for trial, beside in itertools.pairwise(found):
        for one, other in ((trial, beside), (beside, trial)):
            ranked = sorted(candidates(C.ALL_REDUCE, one.nbytes, place, table), key=lambda c: c.predicted)
            assert ranked[0].choice in {c.choice for c in one.candidates}
            possible = {c.choice for c in candidates(C.ALL_REDUCE, other.nbytes, place, table)}
            assert ranked[0].choice not in possible or ranked[0].choice in {c.choice for c in other.candidates}
    alone = measured(replace(wish, sizes=(64 << 10,), best=8), {})[0]
    names = [one.choice.algorithm_name for one in alone.candidates]
    assert len(names) == 8 and max(map(names.count, names)) == WAYS


def test_the_fastest_wins_and_its_time_overrides_what_was_predicted() -> None:
    wish = Wish((C.BROADCAST,), (4096, 16384), 1e-6, 4)
    place, table = offline_tuner(3).place, built_in("near")
    predicted = Tuner(place, table).decide(C.BROADCAST, 8192).choice
    smaller, larger = ({c.choice for c in trial.candidates} for trial in measured(wish, {}))
    other = min({c.algorithm_name for c in smaller & larger} - {predicted.algorithm_name})
    found = measured(wish, {other: 0.5})
    assert {trial.winner.choice.algorithm_name for trial in found} == {other}
    tuner = Tuner(place, Table.from_json(json.loads(json.dumps(with_trials(table, found).to_json()))))
    decision = tuner.decide(C.BROADCAST, 8192)
    assert (decision.choice.algorithm_name, decision.source) == (other, "measured")
    assert decision.candidate is not None and decision.candidate.seconds == 0.5
    # Others are predicted to take some microseconds, and were not measured.
    assert min(one.predicted for one in tuner.candidates(C.BROADCAST, 8192)) < 0.5
    assert tuner.explain(C.BROADCAST, 8192).choice == decision.choice
    assert tuner.decide(C.BROADCAST, 1 << 20).source == "predicted"


def test_the_engines_own_collective_is_measured_too() -> None:
    wish = Wish((C.ALL_REDUCE, C.BROADCAST), (4096, 16384), 1e-6, 1)
    found = measured(wish, {"native": 0.25}, frozenset({C.ALL_REDUCE}))
    assert [trial.winner.choice.algorithm_name == "native" for trial in found] == [True, True, False, False]
    table = with_trials(replace(built_in("near"), natives={"all_reduce": ((8, 1e-6), (4096, 1.0))}), found)
    assert table.natives == {"all_reduce": ((8, 1e-6), (4096, 0.25), (16384, 0.25))}
    assert all(one.algorithm != "native" for one in table.measured["all_reduce"])


def test_new_times_replace_those_of_the_same_size() -> None:
    def trial(nbytes: int, seconds: float) -> Trial:
        one = Candidate(Choice("ring", "cached", 65536, 2), 0.0, 0.0, 0.0, (), seconds)
        return Trial(C.SCATTER, nbytes, (one,))

    before = with_trials(built_in("near"), [trial(4, 1.0), trial(16, 2.0)])
    table = with_trials(built_in("near"), [trial(16, 3.0)], before)
    assert table.measured["scatter"] == (
        Measured(4, "ring", "cached", 65536, 2, 1.0),
        Measured(16, "ring", "cached", 65536, 2, 3.0),
    )


# ---- what makes no sense


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "4X"], "wanted is FROM:TO:FACTOR"),
        (["--sizes", "4:16:8"], "a factor from 2 to 4"),
        (["--sizes", "16:4"], "wanted is FROM:TO:FACTOR"),
        (["--sizes", "4:16:2:2"], "wanted is FROM:TO:FACTOR"),
        (["--collective", "all_reduc"], "did you mean all_reduce"),
        (["--collective", "barrier"], "a barrier has no size"),
        (["--ranks", "1"], "x>=2"),
        (["--seconds", "0"], "x>0"),
        (["-o", "rules.conf"], "for --peer openmpi"),
        (["--", "--bind-to", "core"], "for --peer openmpi"),
        (["--peer", "openmpi", "--dry-run"], "leave out --dry-run"),
        (["--peer", "gloo"], "openmpi"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["tune", *arguments])
    assert result.exit_code != 0 and words in result.output


def test_sizes_go_from_one_to_the_other() -> None:
    assert (ladder(4, 100, 4), ladder(8, 8, 2), ladder(1, 4, 2)) == ((4, 16, 64), (8,), (1, 2, 4))


def test_a_peer_is_tuned_by_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def tune_openmpi(output: Path, ranks: int, **options: Any) -> Any:
        asked.update(options, output=output, ranks=ranks)
        options["progress"](1, 2, "all_reduce 4 B")
        return openmpi_tuning.Report("5.0", ranks, {}, [], output)

    monkeypatch.setattr(openmpi_tuning, "tune_openmpi", tune_openmpi)
    arguments = ["--peer", "openmpi", "--ranks", "3", "-o", str(tmp_path / "r.conf"), "--sizes", "4:64:2"]
    result = CliRunner().invoke(main, ["tune", *arguments, "--collective", "broadcast", "--", "--bind-to", "core"])
    assert result.exit_code == 0, result.output
    assert "Open MPI 5.0" in result.output and f"wrote {tmp_path / 'r.conf'}" in result.output
    asked.pop("progress")
    assert asked == {
        "output": tmp_path / "r.conf",
        "ranks": 3,
        "collectives": (C.BROADCAST,),
        "sizes": (4, 64, 2),
        "seconds": 0.1,
        "arguments": ("--bind-to", "core"),
    }


# ---- the document


def form(text: str) -> list[str]:
    """The first lines of a command's output, without what differs from run to run."""
    masked = re.sub(r"\b(near|far|predicted|measured)\b", "X", re.sub(r"\d[\d.:-]*", "0", text))
    return [" ".join(line.split()) for line in masked.splitlines() if not line.startswith(("all_reduce ", ">"))][:2]


@pytest.mark.ranks
@pytest.mark.slow
def test_the_commands_of_the_document_print_what_it_shows(root: Path, tmp_path: Path) -> None:
    shown = (root / "docs" / "tuning.md").read_text()
    folder = tmp_path / "folder"
    folder.mkdir()
    now = blocks.rewritten(shown, folder)
    commands = re.compile(r"^\$ (.*)\n((?:(?!```|\$ ).*\n)*)", re.MULTILINE)
    before, after = commands.findall(shown), commands.findall(now)
    assert [command for command, _ in before] == [command for command, _ in after] and len(before) >= 6
    for (command, old), (_, new) in zip(before, after):
        assert form(new) == form(old), command
    assert commands.sub("", now) == commands.sub("", shown)


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        blocks.rewritten("```\n$ abccl explain nothing 4\n```\n", tmp_path)


def test_blocks_that_are_files_and_blocks_that_are_neither(tmp_path: Path) -> None:
    text = "a\n```python\n# p.py\nprint(6 * 7)\n```\n```\n$ python p.py\nold\n$ echo x  \n```\n```\nkept\n```\n"
    assert blocks.rewritten(text, tmp_path) == text.replace("old\n", "42\n").replace(
        "$ echo x  \n", "\n$ echo x  \nx\n"
    )
