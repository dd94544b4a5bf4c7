"""What makes docs/performance.md: claims held against figures, the text, runs that fail. Nothing is measured here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click import BadParameter

from abccl.bench import performance
from abccl.bench.performance import chosen, execute, keep, kept
from abccl.bench.record import replace_file
from abccl.bench.report import CLAIMS, Claim, judge, plot, render, summary
from abccl.bench.runs import RUNS, Outcome, Run

SIZES = (4, 64, 1 << 20)


def outcome_of(name: str, *ratios: float, regimes: tuple[str, str] = ("near", "near"), error: str = "") -> Outcome:
    rows = [
        {
            "size": size,
            "ratios": [{"ratio": ratio}],
            "least_bytes": 4 * size,
            "memory_bandwidth": 10.0,
            "measured": [{"time_us": 1.0}, {"time_us": ratio}],
        }
        for size, ratio in zip(SIZES, ratios)
    ]
    machine = {"cpu": "a processor", "cores": 2, "system": "Linux", "python": "3.11", "numpy": "2"}
    data = {"rows": rows, "regimes": [{"name": name} for name in regimes], "machine": machine} if ratios else None
    return Outcome(name, f"mpirun {name}", "2026-11-21T10:00+00:00", 1.0, f"table of {name}", error, data)


CLAIM = Claim("all_reduce", "both", ("a", "b"), (3.0, 2.0), 1.0)


def judged(*outcomes: Outcome) -> Any:
    return judge(CLAIM, {outcome.name: outcome for outcome in outcomes})


def test_runs_have_names_of_their_own_and_claims_are_about_them() -> None:
    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names)
    assert {name for claim in CLAIMS for name in claim.runs} <= set(names)


def test_the_better_library_counts_at_each_size() -> None:
    verdict = judged(outcome_of("a", 2.0, 8.0, 4.0), outcome_of("b", 4.0, 2.0, 16.0))
    assert verdict.mean == pytest.approx((2 * 2 * 4) ** (1 / 3))
    assert (verdict.smallest, verdict.smallest_at, verdict.holds) == (2.0, 4, True)


def test_a_ratio_counts_ten_at_most() -> None:
    huge = 1e6
    verdict = judged(outcome_of("a", huge, 1.0, 1.0), outcome_of("b", huge, 1.0, 1.0))
    assert verdict.mean == pytest.approx(10 ** (1 / 3))
    assert verdict.holds


def test_far_cores_are_held_to_more() -> None:
    far, mixed = ("far", "far"), ("near", "far")
    both = [outcome_of(name, 2.5, 2.5, 2.5, regimes=far) for name in "ab"]
    assert (judged(*both).wanted, judged(*both).holds, judged(*both).regimes) == (3.0, False, "far")
    verdict = judged(both[0], outcome_of("b", 2.5, 2.5, 2.5, regimes=mixed))
    assert (verdict.wanted, verdict.holds, verdict.regimes) == (2.0, True, "far and near")


def test_one_slow_size_is_enough_to_fail() -> None:
    assert not judged(outcome_of("a", 9.0, 0.99, 9.0), outcome_of("b", 9.0, 9.0, 9.0)).holds


def test_what_failed_or_is_missing_does_not_hold() -> None:
    good = outcome_of("a", 9.0, 9.0, 9.0)
    assert judged(good).problem == "b was not run"
    assert judged(good, outcome_of("b")).problem == "b failed"
    assert judged(good, outcome_of("b", 9.0, 9.0, 9.0, error="exit code 1")).problem == "b failed"
    assert not judged(good).holds


def test_the_document_has_tables_failures_and_notes() -> None:
    first, second = RUNS[0].name, RUNS[1].name
    text = render(
        {first: outcome_of(first, 2.0, 2.0, 0.5), second: outcome_of(second, error="exit code 2, no such thing")},
        ["all_reduce"],
        "## What did not work\n\nThis.\n",
    )
    assert f"`mpirun {first}`" in text and f"table of {first}" in text
    assert "**Failed: exit code 2, no such thing.**" in text and f"{second} failed" in text
    assert "| 0.50 at 1 MiB | 1.0 | **not reached** |" in text
    assert "(performance/all_reduce.png)" in text and "(performance/broadcast.png)" not in text
    assert f"ONLY={RUNS[2].name}" in text
    assert text.endswith("## What did not work\n\nThis.\n")
    assert "make performance" in text.splitlines()[2]


def test_a_summary_names_regime_mean_and_smallest() -> None:
    text = summary(outcome_of("a", 4.0, 1.0, 16.0, regimes=("near", "far")))
    assert text == f"near to far: mean {(4 * 10) ** (1 / 3):.2f} (capped at 10), smallest 1.00 at 64 B"


def test_plots() -> None:
    pytest.importorskip("matplotlib")
    name = RUNS[0].name
    assert plot("all_reduce", {name: outcome_of(name, 1.0, 2.0, 3.0)}).startswith(b"\x89PNG")
    assert plot("all_reduce", {name: outcome_of(name, error="failed")}) == b""
    assert plot("broadcast", {name: outcome_of(name, 1.0)}) == b""


# ---- running


def test_ranks_that_share_cores_are_told_to_yield(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert "mpi_yield_when_idle" not in Run("all_reduce", 2, "openmpi").command(0.1)
    assert "--mca mpi_yield_when_idle 1" in Run("all_reduce", 4, "openmpi").command(0.1)
    assert "-bind-to core" in Run("all_reduce", 2, "mpich").command(0.1)
    assert "-bind-to core" not in Run("all_reduce", 4, "mpich").command(0.1)
    assert Run("all_reduce", 4, "gloo").arguments(0.1)[-4:] == ["--ranks", "4", "--vs", "gloo"]


RUN = Run("all_reduce", 2, "gloo")


@pytest.fixture
def pretend(tmp_path: Path) -> Any:
    """A checkout whose python is a script."""

    def make(script: str) -> Path:
        program = tmp_path / ".venv" / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)
        return tmp_path

    return make


def test_a_run_keeps_what_it_printed_and_measured(pretend: Any, tmp_path: Path) -> None:
    root = pretend("""printf "in $PWD\\r\\n$OMP_NUM_THREADS\\n"; echo '{"rows": []}' > "${@: -1}" """)
    outcome = execute(RUN, 0.1, root)
    assert (outcome.output, outcome.error, outcome.data) == ("in .\n1", "", {"rows": []})
    assert outcome.command == RUN.command(0.1)
    keep(outcome, tmp_path / "kept")
    assert kept(tmp_path / "kept") == {RUN.name: outcome}


def test_a_run_that_fails_says_why(pretend: Any) -> None:
    outcome = execute(RUN, 0.1, pretend("echo table; echo 'Error: no such thing' >&2; exit 2"))
    assert (outcome.error, outcome.data) == ("exit code 2, no such thing", None)
    assert outcome.output == "table\nError: no such thing"


def test_a_run_without_figures_has_failed(pretend: Any) -> None:
    assert execute(RUN, 0.1, pretend("exit 0")).error == "it ended without figures"


def test_a_run_that_hangs_is_ended(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "LIMIT", 0.5)
    outcome = execute(RUN, 0.1, pretend("echo begun; sleep 100 & wait"))
    assert (outcome.error, outcome.output) == ("ended after 0.5 s", "begun")


def test_an_environment_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no environment .venv: make performance makes it" in execute(RUN, 0.1, tmp_path).error


def test_runs_are_chosen_by_words() -> None:
    assert chosen("") == list(RUNS)
    assert {run.library for run in chosen("mpich, impi")} == {"mpich", "impi"}
    with pytest.raises(BadParameter, match="no run is called 'mpch'"):
        chosen("mpich,mpch")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    replace_file(path, b"old")
    replace_file(path, json.dumps("new").encode())
    assert path.read_bytes() == b'"new"'

    def refuse(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"half")
    assert path.read_bytes() == b'"new"' and list(tmp_path.iterdir()) == [path]
