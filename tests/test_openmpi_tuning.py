"""Open MPI's tuning: its algorithms as it names them, the file of rules, jobs that fail, and that Open MPI takes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from abccl.algorithms import Collective
from abccl.bench.openmpi_rules import CALLS, Choice, Figure, choices, crossovers, render, version
from abccl.bench.openmpi_tuning import Report, tune_openmpi
from abccl.errors import ArgumentError, TransportError

PROGRAM = str(Path(__file__).with_name("openmpi_program.py"))

INFORMATION = """\
mca:coll:tuned:version:"mca:2.1.0"
mca:coll:tuned:version:"component:5.0.11"
mca:coll:tuned:param:coll_tuned_bcast_algorithm_count:value:3
mca:coll:tuned:param:coll_tuned_bcast_algorithm:value:ignore
mca:coll:tuned:param:coll_tuned_bcast_algorithm:help:Which bcast algorithm is used. 0 ignore, 1 basic linear
mca:coll:tuned:param:coll_tuned_bcast_algorithm:enumerator:value:0:ignore
mca:coll:tuned:param:coll_tuned_bcast_algorithm:enumerator:value:1:basic_linear
mca:coll:tuned:param:coll_tuned_bcast_algorithm:enumerator:value:3:pipeline
mca:coll:tuned:param:coll_tuned_bcast_algorithm:enumerator:value:8:scatter_allgather
mca:coll:tuned:param:coll_tuned_reduce_scatter_algorithm:enumerator:value:1:non-overlapping
mca:coll:tuned:param:coll_tuned_reduce_scatter_block_algorithm:enumerator:value:1:basic_linear
mca:coll:tuned:param:coll_tuned_reduce_scatter_block_algorithm:enumerator:value:4:butterfly
"""
LINEAR, PIPELINE, CUT = Choice(1, "basic_linear"), Choice(3, "pipeline"), Choice(3, "pipeline", 1024)
SCATTER, UNKNOWN = Choice(8, "scatter_allgather"), Choice(99, "unknown")


def figure(size: int, best: Choice, gain: float = 2.0) -> Figure:
    """An algorithm so many times as fast as the default."""
    return Figure(size, gain * 1e-6, best, 1e-6, gain, 1.05)


def test_algorithms_are_those_that_open_mpi_names() -> None:
    assert version(INFORMATION) == "5.0.11"
    assert version("") == ""
    assert choices(INFORMATION, Collective.BROADCAST, 4096, (1024, 4096)) == [LINEAR, PIPELINE, CUT, SCATTER]
    assert choices(INFORMATION, Collective.BROADCAST, 1024, (1024, 4096)) == [LINEAR, PIPELINE, SCATTER]
    assert choices(INFORMATION, Collective.REDUCE_SCATTER, 64, ()) == [LINEAR, Choice(4, "butterfly")]
    assert choices(INFORMATION, Collective.ALL_GATHER, 64, ()) == []


def starts(figures: Sequence[Figure]) -> list[tuple[int, int]]:
    """Where the rules begin, and their algorithms."""
    return [(start, choice.number) for start, choice, _ in crossovers(figures, 4)]


def test_rules_are_crossovers() -> None:
    assert starts([figure(64, LINEAR), figure(256, LINEAR), figure(1024, CUT)]) == [(0, 1), (512, 3), (2048, 0)]
    assert starts([figure(64, PIPELINE), figure(256, CUT)]) == [(0, 3), (128, 3), (512, 0)]
    assert starts([figure(64, LINEAR, 1.04), figure(256, LINEAR)]) == [(0, 0), (128, 1), (512, 0)]
    assert starts([figure(64, LINEAR, 0.5)]) == [(0, 0)]
    # Sizes that are no powers: the first whole number that is not nearer to the lower one.
    assert starts([figure(12, LINEAR), figure(60, CUT)]) == [(0, 1), (27, 3), (120, 0)]
    assert starts([]) == []


EXPECTED = """\
# Measured on a Monday.
2 # collectives
7 # broadcast
3 # communicator sizes
0
1 # rule
0 0 0 0 # default
4 # ranks
3 # rules: bytes, algorithm, fanout, segment
0 1 4 0 # basic_linear, at 64 B 1.50 times as fast as the default or more
512 3 4 1024 # pipeline, segments of 1 KiB, at 1 KiB 2.00 times as fast as the default or more
2048 0 0 0 # default
5 # and more
1 # rule
0 0 0 0 # default
3 # all_to_all
3 # communicator sizes
0
1 # rule
0 0 0 0 # default
4 # ranks
3 # rules: bytes, algorithm, fanout, segment
0 0 0 0 # default
128 1 4 0 # basic_linear, at 256 B 2.00 times as fast as the default or more
512 0 0 0 # default
5 # and more
1 # rule
0 0 0 0 # default
"""


def test_the_file() -> None:
    figures = {
        Collective.BROADCAST: [figure(64, LINEAR, 1.5), figure(256, LINEAR), figure(1024, CUT)],
        Collective.ALL_GATHER: [figure(64, LINEAR, 0.9)],
        Collective.ALL_TO_ALL: [figure(64, LINEAR, 1.0), figure(256, LINEAR)],
    }
    assert render(figures, 4, 4, ["Measured on a Monday."]) == EXPECTED


def test_a_file_without_rules() -> None:
    assert render({Collective.BROADCAST: [figure(64, LINEAR, 0.9)]}, 4, 4, []) == "0 # collectives\n"


# ---- jobs that fail, by an mpirun that does what the test says

FAKE = """\
#!{python}
import json, signal, sys
say = lambda **what: print(json.dumps(what), flush=True)
tasks, runs = json.loads(sys.argv[-1]), {runs!r}
open(runs, "a").write(json.dumps([[task["size"], [c["number"] for c in task["choices"]]] for task in tasks]) + "\\n")
for task in tasks:
    standing = list(task["choices"])
    for choice in [{{"number": 0, "name": "default", "segment": 0}}, *task["choices"]]:
        say(tries=choice)
        match task["size"], choice["number"]:
            case 64, 1: signal.pause()
            case 256, 3: sys.exit(9)
            case 256, 8:
                say(fault="operation not supported")
                standing.remove(choice)
            case 4096, 0 if {broken}: sys.exit("it can not work")
    say(measures=True)
    if task["size"] == 1024:
        sys.exit(7)
    figures = {{"default": 2e-6, "seconds": 1e-6, "gain": 1.5}}
    say(done={{**figures, "best": standing[-1]}} if standing else None)
"""


def fake(folder: Path, broken: bool = False) -> Path:
    """An mpirun whose algorithms fail at some sizes, with its ompi_info; it keeps what it is asked in `runs`."""
    mpirun = folder / "mpirun"
    mpirun.write_text(FAKE.format(python=sys.executable, runs=str(folder / "runs"), broken=broken))
    (folder / "ompi_info").write_text(f"#!{sys.executable}\nprint({INFORMATION!r})\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    return mpirun


def test_what_hangs_or_ends_the_job_is_left_out(tmp_path: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    report = tune_openmpi(
        tmp_path / "rules",
        2,
        collectives=[Collective.BROADCAST],
        sizes=(64, 4096, 4),
        segments=(),
        patience=5.0,
        mpirun=fake(tmp_path),
        progress=lambda *what: heard.append(what),
    )
    assert [(fault.size, fault.choice, fault.reason) for fault in report.faults] == [
        (64, LINEAR, "no sign for 5 s, and is not tried at larger sizes"),
        (256, PIPELINE, "it ended the job with exit code 9, and is not tried at larger sizes"),
        (256, SCATTER, "operation not supported"),
        (1024, None, "it ended the job with exit code 7"),
    ]
    assert [(each.size, each.best) for each in report.figures[Collective.BROADCAST]] == [
        (64, SCATTER),
        (4096, SCATTER),
    ]
    runs = [json.loads(line) for line in (tmp_path / "runs").read_text().splitlines()]
    assert [run[0] for run in runs] == [[64, [1, 3, 8]], [64, [3, 8]], [256, [8]], [4096, [8]]]
    assert heard[0] == (0, 4, "broadcast 64 B") and heard[-1] == (4, 4, "")
    text = "\n".join(report.lines())
    assert "broadcast: scatter_allgather is left out (operation not supported) at 256 B" in text
    assert "broadcast: not measured (it ended the job with exit code 7) at 1 KiB" in text
    assert re.search(r"4 KiB +2.000 +1.000 +1.50  \+ scatter_allgather", text)


def test_a_job_that_can_not_work_is_an_error_with_its_words(tmp_path: Path) -> None:
    options: dict[str, Any] = {"collectives": [Collective.BROADCAST], "sizes": (4096, 4096, 4)}
    with pytest.raises(TransportError, match=r"(?s)job failed.*exit code 1.*it can not work"):
        tune_openmpi(tmp_path / "rules", 2, mpirun=fake(tmp_path, broken=True), **options)
    assert not (tmp_path / "rules").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ranks": 1}, "for 2 ranks or more, and this is 1"),
        ({"collectives": [Collective.BARRIER]}, "barrier of Open MPI is not tuned here: take all_reduce, reduce_scat"),
        ({"sizes": (64, 4, 4)}, "a factor of at least 2, and these are"),
        ({"sizes": (4, 64, 1)}, "a factor of at least 2, and these are"),
        ({"output": Path("not/there/rules")}, "there is no folder .*not/there: make it first"),
    ],
)
def test_what_can_not_be_tuned_is_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=words):
        tune_openmpi(**{"output": tmp_path / "rules", "mpirun": fake(tmp_path), **changed})
    assert not (tmp_path / "runs").exists()


def test_tuning_under_mpirun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(ArgumentError, match="starts mpirun itself"):
        tune_openmpi(tmp_path / "rules", 2)


def test_another_mpi_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="does not tell its algorithms.*wanted is Open MPI 4.1 or newer"):
        tune_openmpi(tmp_path / "rules", 2, mpirun=tmp_path / "mpirun")


# ---- Open MPI itself


@pytest.fixture
def open_mpi(mpirun: list[str]) -> Path:
    """Its mpirun."""
    found = Path(mpirun[0])
    if not found.with_name("ompi_info").exists():
        pytest.skip("the MPI library of this environment is not Open MPI")
    return found


def made(
    mpirun: Path, rules: Path, started: int, ranks: int, calls: Mapping[str, Sequence[int]], *variables: str
) -> str:
    """What the program prints where Open MPI has these rules."""
    report = Report("", ranks, {}, [], rules)
    flags = [*report.flags.split(), *(word for each in variables for word in ("--mca", *each.split("=")))]
    command = [str(mpirun), "-n", str(started), *flags, sys.executable, PROGRAM, str(ranks), json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def outcomes(printed: str) -> dict[str, tuple[str, ...]]:
    """What became of the calls."""
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    return {collective: tuple(each) for collective, each in found.items()}


def test_open_mpi_takes_rules_at_the_sizes_that_they_are_for(open_mpi: Path, tmp_path: Path) -> None:
    """An algorithm that Open MPI does not have tells by its refusal where the rule holds."""
    figures = [figure(256, UNKNOWN, 1.0), figure(1024, UNKNOWN), figure(4096, UNKNOWN, 1.0)]
    (tmp_path / "rules").write_text(render(dict.fromkeys(CALLS, figures), 2, 4, ["1 comment"]))
    names = [collective.value for collective in CALLS]
    of_two = made(open_mpi, tmp_path / "rules", 3, 2, dict.fromkeys(names, (504, 512, 2040, 2048)))
    assert outcomes(of_two) == dict.fromkeys(names, ("right", "refused", "refused", "right"))
    of_three = made(open_mpi, tmp_path / "rules", 3, 3, dict.fromkeys(names, (516, 2040)))
    assert outcomes(of_three) == dict.fromkeys(names, ("right", "right"))


def test_open_mpi_takes_the_algorithm_and_its_segments(open_mpi: Path, tmp_path: Path) -> None:
    """Its monitor counts messages: a pipeline passes each segment from rank to rank."""
    (tmp_path / "rules").write_text(render({Collective.BROADCAST: [figure(4096, CUT)]}, 3, 4, []))
    monitor = ("pml_monitoring_enable=2", "pml_monitoring_enable_output=1")
    printed = made(open_mpi, tmp_path / "rules", 3, 3, {"broadcast": [4096]}, *monitor)
    assert outcomes(printed) == {"broadcast": ("right",)}
    sent = re.findall(r"^I\t(\d)\t(\d)\t(\d+) bytes\t(\d+) msgs", printed, re.MULTILINE)
    assert sorted(sent) == [("0", "1", "4096", "4"), ("1", "2", "4096", "4")]


def test_what_was_tuned_is_what_open_mpi_takes(open_mpi: Path, tmp_path: Path) -> None:
    rules, broken = tmp_path / "rules", tmp_path / "broken"
    collectives = (Collective.ALL_GATHER, Collective.BROADCAST)
    report = tune_openmpi(
        rules, 3, collectives=collectives, sizes=(64, 4096, 64), segments=(), calls=2, least_gain=0, mpirun=open_mpi
    )
    # One algorithm is for two ranks only: it can not be taken, and that it was asked for shows that variables work.
    assert {fault.choice and fault.choice.name for fault in report.faults} == {"two_proc"}
    assert {fault.size for fault in report.faults} == {60, 4092}
    for figures in report.figures.values():
        assert all(each.default > 0 and each.seconds > 0 and each.chosen.number for each in figures)
    calls = {each.value: [*(figure.size for figure in report.figures[each]), 1 << 14, 3 << 14] for each in collectives}
    assert [sizes[:2] for sizes in calls.values()] == [[60, 4092], [64, 4096]]
    calls["all_gather"][2] -= 4  # as many bytes of each rank
    assert outcomes(made(open_mpi, rules, 3, 3, calls)) == dict.fromkeys(calls, ("right",) * 4)
    # The same rules with an algorithm that there is not: each is one that Open MPI looks at.
    broken.write_text(re.sub(r"^(\d+) [1-9]\d* (\d+) (\d+) #", r"\1 99 \2 \3 #", rules.read_text(), flags=re.MULTILINE))
    expected = dict.fromkeys(calls, ("refused", "refused", "refused", "right"))
    assert outcomes(made(open_mpi, broken, 3, 3, calls)) == expected
