"""The validation of the tuner: its arithmetic on made-up times, its document, and that it runs. No time is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_runs import ended
from click.testing import CliRunner

from abccl.algorithms import Collective
from abccl.bench import accuracy_report, accuracy_run, validate
from abccl.bench.accuracy import Case, Figure, Run, Timed, by, figures, holds, ninetieth
from abccl.collectives.tuner import calibrate
from abccl.collectives.tuner.candidates import Candidate
from abccl.collectives.tuner.choice import Choice
from abccl.errors import ArgumentError


def case_of(
    *finalists: tuple[float, ...],
    users: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
    again: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
    predicted: float = 1.0,
    collective: str = "all_reduce",
    link: str = "near",
) -> Case:
    """Candidates a, b, ... with these rounds, of which a is chosen, and a slow one that took no turns with them."""
    timed = [
        Timed(name, predicted, sorted(rounds)[len(rounds) // 2], rounds)
        for name, rounds in zip("abcdef", finalists or ((1.0,) * 4,))
    ]
    return Case(collective, 100, link, "a", (*timed, Timed("slow", predicted, 0.5)), users, again)


def run_of(*cases: Case, hosts: tuple[int, ...] = (2,), missing: tuple[str, ...] = (), cores: int = 2) -> Run:
    machine = {"cpu": "a processor", "cores": cores, "system": "Linux", "python": "3.11", "numpy": "2"}
    tables = {"near": {"origin": "measured today", "residual": 0.1}}
    return Run("2026-11-22", machine, "command", hosts, "shm", tables, cases, 3, missing, 60.0)


# ---- a case


def test_the_best_is_among_those_that_took_turns_with_the_chosen_one() -> None:
    case = case_of((2.0,) * 4, (1.0,) * 4, users=(3.0,) * 4)
    assert case.best.name == "b"
    assert case.plain_ratio == case.ratio == 3


def test_the_best_of_one_half_is_timed_by_the_other() -> None:
    # b is the faster of the two in rounds 0 and 2, a in the others: noise, and what it gains is not there again.
    case = case_of((4.0, 1.0, 4.0, 1.0), (1.0, 4.0, 1.0, 4.0), users=(2.0,) * 4)
    assert case.ratio == pytest.approx(2 / 4)
    lucky = case_of((2.0,) * 4, (1.0, 3.0, 1.0, 2.5), users=(2.0,) * 4)
    # Rounds 0 and 2 say b, which then takes 2.75; rounds 1 and 3 say a, which takes 2.
    assert lucky.ratio == pytest.approx((2 / 2.75 * 2 / 2) ** 0.5)
    assert lucky.plain_ratio == pytest.approx(2 / 1.75)


def test_both_halves_are_of_the_same_rounds() -> None:
    """What slows a round down slows all that is in it: the ratio does not see it."""
    case = case_of((1.0, 5.0, 1.0, 5.0), users=(2.0, 10.0, 2.0, 10.0))
    assert case.ratio == pytest.approx(2)


@pytest.mark.parametrize("again", [2.0, 0.5])
def test_spread_of_a_candidate_against_itself(again: float) -> None:
    assert case_of((1.0,) * 4, users=(9.0,) * 4, again=(again,) * 4).spread == 2


def test_what_the_plans_trials_cost() -> None:
    assert case_of((2.0,) * 4, (1.0,) * 4, users=(3.0,) * 4).adapted == 1.5


def test_errors_of_predictions() -> None:
    case = case_of(users=(2.0,) * 4, predicted=1.5)
    assert case.predicted == 0.75
    assert case.error == 0.25
    found = {figure.what: figure.value for figure in figures([case])}
    assert found["error of the prediction of the chosen, median"] == 0.25
    # Of a 0.5, of the slow one 2.
    assert found["error of the prediction of all candidates, median"] == 1.25


# ---- the figures of many


def test_means_and_percentiles() -> None:
    cases = [case_of(users=(ratio,) * 4) for ratio in (1.0, 1.0, 4.0)]
    found = {figure.what: figure.value for figure in figures(cases, missing=1)}
    assert found["chosen / best, geometric mean"] == pytest.approx(4 ** (1 / 3))
    assert found["chosen / best, 90th percentile"] == pytest.approx(3.4)
    assert found["cases measured"] == 0.75
    assert ninetieth([float(number) for number in range(11)]) == 9


def test_bars() -> None:
    assert Figure("x", 1.1, 1.1).holds
    assert not Figure("x", 1.11, 1.1).holds
    assert not Figure("x", 0.89, 0.9, least=True).holds
    assert Figure("x", 9.0).holds
    assert Figure("x", 1.2, 1.1).line == "x: 1.200 (wanted at most 1.100: FAIL)"
    assert Figure("x", 0.95, 0.9, percent=True, least=True).line == "x: 95% (wanted at least 90%: pass)"


def good(ratio: float = 1.0) -> Case:
    return Case("all_reduce", 100, "near", "a", (Timed("a", 1.0, 1.0, (1.0,) * 4),), (ratio,) * 4, (1.0,) * 4)


def test_two_ranks_on_cores_of_their_own_are_judged() -> None:
    assert holds(run_of(good()))
    assert not holds(run_of(good(1.2)))
    assert not holds(run_of(*[good()] * 8, good(1.3), good(1.3)))  # the mean holds, the percentile does not
    assert not holds(run_of(good(), missing=("one", "two")))
    assert not holds(run_of())


@pytest.mark.parametrize(("hosts", "cores"), [((4,), 2), ((1, 1), 2), ((2, 2), 2), ((2,), 1)])
def test_others_are_reported_only(hosts: tuple[int, ...], cores: int) -> None:
    run = run_of(good(2.0), hosts=hosts, cores=cores)
    assert holds(run)
    assert "wanted" not in "\n".join(validate.summary(run))


def test_cases_in_groups() -> None:
    cases = [case_of(collective="b"), case_of(collective="a"), case_of(collective="b")]
    assert {name: len(some) for name, some in by(cases, lambda case: case.collective).items()} == {"b": 2, "a": 1}


# ---- what is measured


def asked(*sizes: int, collectives: tuple[str, ...] = ("all_reduce",)) -> accuracy_run.Asked:
    return accuracy_run.Asked(collectives, sizes, 2, 1.0, "command")


@pytest.mark.parametrize("sizes", [accuracy_run.SIZES, accuracy_run.FEW])
@pytest.mark.parametrize("ranks", [2, 4])
def test_sizes_are_not_those_of_the_calibration(sizes: tuple[int, ...], ranks: int) -> None:
    found = accuracy_run.cases(asked(*sizes, collectives=accuracy_run.COLLECTIVES), ranks)
    assert {collective.value for collective, _ in found} == set(accuracy_run.COLLECTIVES)
    assert all(abs(nbytes / known - 1) > 0.15 for _, nbytes in found for known in calibrate.SIZES)
    assert len(set(found)) == len(found) >= 0.8 * len(sizes) * len(accuracy_run.COLLECTIVES)


def test_sizes_are_whole_elements_for_each_rank() -> None:
    found = accuracy_run.cases(asked(3, 45, collectives=("all_reduce", "all_gather")), 3)
    assert found == [
        *((Collective.ALL_REDUCE, nbytes) for nbytes in (4, 48)),
        *((Collective.ALL_GATHER, nbytes) for nbytes in (12, 48)),
    ]


def test_only_sizes_of_the_calibration_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no size is left"):
        accuracy_run.cases(asked(calibrate.SIZES[-1]), 2)


def test_contenders() -> None:
    def candidate(name: str, seconds: float, **how: Any) -> Candidate:
        return Candidate(Choice(name, **how), seconds, 0.0, 0.0)

    found = [
        candidate("best", 1.0),
        candidate("slow", 50.0, protocol="lent"),
        candidate("good", 1.4, segment=8192),
        candidate("poor", 1.6, lanes=1),
        candidate("chosen", 2.0, lanes=1),
    ]
    assert accuracy_run.contenders(found, found[-1]) == [*found[:3], found[-1]]
    # Of the size that stands for this one, and no candidate here.
    other = candidate("chosen", 2.0)
    assert accuracy_run.contenders(found, other) == [*found[:3], other]


@pytest.mark.parametrize(
    ("links", "found", "discarded"),
    [
        (["near", "near"], "1", 0),
        (["near", "far", "far"], "2", 1),
        (["near", "far", "near", "near"], "3", 2),
        (["near", "far"] * 3, None, accuracy_run.TRIES),
    ],
)
def test_a_case_whose_link_class_changes_is_measured_anew(links: list[str], found: str | None, discarded: int) -> None:
    made = [SimpleNamespace(tuner=SimpleNamespace(link=link), closed=0) for link in links]
    for comm in made:
        comm.close = lambda comm=comm: setattr(comm, "closed", comm.closed + 1)
    coming = iter(made)
    steady = accuracy_run.Steady(lambda: next(coming))
    assert steady.measure(lambda comm: str(made.index(comm) + 1)) == found
    assert steady.discarded == discarded
    assert [comm.closed for comm in made] == [1] * (len(made) - 1) + [0]
    assert steady.comm is made[-1]


def test_calls_fill_a_slice() -> None:
    assert accuracy_run.calls_in(float("inf")) == accuracy_run.calls_in(10.0) == 1
    assert accuracy_run.calls_in(accuracy_run.SLICE / 10) == 10
    assert accuracy_run.calls_in(1e-12) == accuracy_run.LONGEST
    assert accuracy_run.warm_calls(0.001) == 20
    assert accuracy_run.warm_calls(0.01) == accuracy_run.WARM_CALLS
    assert accuracy_run.warm_calls(0.25) == 4


def test_slow_cases_have_fewer_rounds() -> None:
    assert accuracy_run.rounds_for([1e-6], 1.0, 12, 8) == 12
    assert accuracy_run.rounds_for([0.05], 1.05, 12, 8) == 10  # two calls in each
    assert accuracy_run.rounds_for([1.0, 1.0], 1.0, 12, 8) == 8
    assert accuracy_run.rounds_for([1.0, 1.0], 1.0, 3, 1) == 1


# ---- what is written


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    run = run_of(case_of(), hosts=(2, 2), missing=("x",))
    kept = tmp_path / "a.json"
    kept.write_text(json.dumps(run.to_json()))
    assert validate.read(kept) == run
    kept.write_text(json.dumps({**run.to_json(), "format": 0}))
    with pytest.raises(ArgumentError, match=r"a.json can not be used: .*measure again"):
        validate.read(kept)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}'])
def test_what_is_no_validation_is_refused(tmp_path: Path, text: str) -> None:
    kept = tmp_path / "a.json"
    kept.write_text(text)
    done = CliRunner().invoke(validate.validate, [str(kept)])
    assert done.exit_code == 2
    assert f"{kept} can not be used" in done.output


@pytest.mark.parametrize(("ratio", "status"), [(1.0, 0), (1.3, 1)])
def test_exit_status(tmp_path: Path, ratio: float, status: int) -> None:
    files = []
    for number, run in enumerate((run_of(good(ratio)), run_of(good(3.0), hosts=(4,)))):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(run.to_json()))
    done = CliRunner().invoke(validate.validate, list(map(str, files)))
    assert done.exit_code == status, done.output
    assert "4 ranks: 1 cases" in done.output
    assert done.output.count("FAIL") == 4 * status


@pytest.mark.parametrize("name", ["ABCCL_ALGORITHM", "ABCCL_RULES", "ABCCL_PROTOCOL"])
def test_nothing_may_force_a_choice(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "something")
    done = CliRunner().invoke(validate.validate, ["--sizes", "48"])
    assert done.exit_code == 2
    assert f"{name} is set and forces choices" in done.output


def test_document(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [
        run_of(good(1.5), case_of(link="far", collective="broadcast"), missing=("all_gather, 4 B",)),
        run_of(good(3.0), hosts=(2, 2)),
        run_of(hosts=(4,)),
    ]
    accuracy_report.write(runs, tmp_path / "some.md")
    text = (tmp_path / "some.md").read_text()
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["2-2.png", "2.png"]
    assert "![predicted and measured times](some/2.png)" in text
    assert "## 4 ranks on 2 hosts, over shm" in text
    assert "| chosen / best, geometric mean | 3.000 |  |  |" in text
    assert text.count("**not reached**") == 5
    assert "| far cores | 1 |" in text
    assert "given up" in text.lower()


# ---- a run


def test_two_ranks(tmp_path: Path) -> None:
    kept = tmp_path / "a.json"
    arguments = ["--collectives", "all_reduce", "--sizes", "48,40K", "--seconds", "0.2", "--json", str(kept)]
    done = ended([sys.executable, "-m", "abccl.bench.validate"], *arguments)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    run = validate.read(kept)
    assert run.hosts == (2,)
    assert run.transport == "shm"
    assert len(run.cases) + len(run.missing) == 2
    for case in run.cases:
        assert case.nbytes in (48, 40 << 10)
        assert case.link in run.tables
        assert {one.name.split(",")[0] for one in case.candidates} >= {"ring", "direct"}
        assert {len(one.rounds) for one in case.finalists} == {len(case.users)} == {len(case.again)}
        assert case.choice in case.finalists
        assert min(one.seconds for one in case.candidates) > 0
    assert done.stdout.splitlines()[-len(validate.summary(run)) :] == validate.summary(run)
