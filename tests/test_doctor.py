"""`abccl doctor`: what it finds on this machine, and what it says of machines that lack something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from abccl.tools import doctor, doctor_checks, doctor_gpu, doctor_machine, doctor_memory, doctor_run
from abccl.tools.cli import main
from abccl.tools.doctor_checks import FAIL, OK, WARN, Ended, Finding, ask, belongs, run

# What is only looked for must stay outside: a broken install would take the doctor down.
HEAVY = ("torch", "mpi4py.MPI", "cupy", "cuda.bindings", "abccl.transports._native")

LOOK = """
import json, sys
from abccl.tools.doctor import CHECKS, examine
found = [vars(one) for one in examine(CHECKS, 2)]
print("\\n" + json.dumps([found, [name for name in HEAVY if name in sys.modules]]))
"""


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a module in the place of an installed one, for processes that are started."""

    def put(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    return put


def only(findings: Iterator[Finding], part: str) -> Finding:
    """The one line about a part."""
    (found,) = [one for one in findings if one.part == part]
    return found


# ---- here


def test_it_looks_at_all_and_imports_nothing_that_may_be_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ABCCL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ABCCL_TUNER")
    program = LOOK.replace("HEAVY", repr(HEAVY))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found, imported = json.loads(done.stdout.splitlines()[-1])
    assert imported == []
    lines = {one["part"]: one for one in found}
    wanted = {"Python", "native core", "numpy", "compiler", "torch", "MPI", "CUDA", "memory", "pull", "/dev/shm"}
    wanted |= {"files", "processes", "locked", "threads", "cores", "cache", "table"}
    assert wanted <= lines.keys()
    assert re.fullmatch(r"kernels for (baseline|avx2|avx512)", lines["native core"]["text"])
    assert lines["cache"]["text"] == str(tmp_path / "cache")
    assert lines["table"]["remedy"] == "run `abccl tune --ranks 2`, or let the first program measure"
    # It runs here: these tests could not, otherwise.
    assert not [one for one in found if one["state"] == FAIL]
    assert not [one for one in found if "report it" in one["remedy"]]


@pytest.mark.parametrize("transport", ["shm", pytest.param("gloo", marks=pytest.mark.torch)])
def test_two_ranks_run(transport: str) -> None:
    program = [sys.executable, "-m", "abccl.tools.doctor_run", transport]
    line = doctor.judge(f"run {transport}", run(program, 100.0, doctor.environment()), FAIL)
    assert line.state == OK, line
    assert re.fullmatch(r"2 ranks all_reduce 4 B in [\d.,]+ us, 1 MiB in [\d.,]+ us; the bits are right", line.text)


def test_two_ranks_run_over_mpi(mpirun: list[str]) -> None:
    program = [*mpirun, "-n", "2", sys.executable, "-m", "abccl.tools.doctor_run", "mpi"]
    assert doctor.judge("run mpi", run(program, 100.0, doctor.environment()), WARN).state == OK


def test_wrong_bits_are_told() -> None:
    reduces_nothing = SimpleNamespace(rank=0, size=2, all_reduce=lambda x, out: None)
    with pytest.raises(ValueError, match=r"element 0 of 4 came as 0.0, and should be 1.0"):
        doctor_run._one(reduces_nothing, 4, device=False)


def test_what_runs_is_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    ended = Ended("", '{"ranks": 2, "small": 3.1e-7, "large": 5.28e-3, "transport": "shm"}', "")

    def start(command: list[str], *_: Any) -> Ended:
        commands.append(command)
        return ended

    monkeypatch.setattr(doctor, "run", start)
    monkeypatch.setattr(doctor, "version_of", lambda *names: None)
    monkeypatch.setattr(doctor, "mpirun", lambda: None)
    (line,) = doctor.runs(2)
    assert line == Finding(OK, "run shm", "2 ranks all_reduce 4 B in 0.31 us, 1 MiB in 5,280 us; the bits are right")
    monkeypatch.setattr(doctor, "version_of", lambda *names: ("it", "1") if names[0] in ("torch", "mpi4py") else None)
    monkeypatch.setattr(doctor, "mpirun", lambda: "/opt/mpirun")
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    commands.clear()
    assert [line.part for line in doctor.runs(8)] == ["run shm", "run shm x 8", "run gloo", "run mpi"]
    assert commands[1][-2:] == ["shm", "8"]
    assert commands[3][:3] == ["/opt/mpirun", "-n", "2"]
    monkeypatch.setenv("PMIX_RANK", "0")
    assert [line.state for line in doctor.runs(2)] == [OK, OK, WARN]


def test_the_command_prints_remedies_and_its_code_says_whether_abccl_works(monkeypatch: pytest.MonkeyPatch) -> None:
    good, missing = Finding(OK, "good", "is there"), Finding(WARN, "torch", "missing", "pip install it")
    broken = Finding(FAIL, "native core", "can not be imported", "build it")

    def breaks(ranks: int) -> Iterator[Finding]:
        yield good
        raise KeyError("oops")

    monkeypatch.setattr(doctor, "CHECKS", (lambda ranks: iter([good, missing]),))
    result = CliRunner().invoke(main, ["doctor", "--no-run"])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "ok   good          is there",
        "warn torch         missing",
        "                   -> pip install it",
    ]
    monkeypatch.setattr(doctor, "CHECKS", (breaks, lambda ranks: iter([broken])))
    result = CliRunner().invoke(main, ["doctor", "--no-run", "--json", "--ranks", "3"])
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert (told["ranks"], told["state"]) == (3, FAIL)
    assert [(one["part"], one["state"]) for one in told["findings"]] == [
        ("good", OK), ("breaks", WARN), ("native core", FAIL)
    ]  # fmt: skip
    assert "KeyError: 'oops'" in told["findings"][1]["text"]


# ---- ranks that do badly


def test_ranks_that_fail_are_told_with_their_error() -> None:
    lines = (
        "noise",
        "Traceback (most recent call last):",
        "abccl.errors.TransportError: shm: no memory",
        "-----",
        "more",
    )
    line = doctor.judge("run shm", Ended("exited with code 1", "", "\n".join(lines)), FAIL)
    assert (line.state, line.text) == (FAIL, "the ranks failed: abccl.errors.TransportError: shm: no memory")
    late = doctor.judge("run gloo", Ended("had not ended after 90 s", "", ""), WARN)
    assert (late.state, late.text) == (WARN, "the ranks failed: had not ended after 90 s")
    alone = Ended("", '{"ranks": 1, "small": 1e-6, "large": 1e-3}', "")
    assert "another MPI" in doctor.judge("run mpi", alone, WARN).text
    assert doctor.judge("run shm", Ended("", "", ""), FAIL).state == FAIL


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    ended = run(["sh", "-c", f"sleep 600 & echo $! >{note}; wait"], 3.0)
    assert ended.how == "had not ended after 3 s"
    state = Path(f"/proc/{note.read_text()}/stat")
    assert not state.exists() or state.read_text().split(")")[-1].split()[0] == "Z"
    assert run(["/nowhere/at/all"]).how == "can not be started: No such file or directory"


def test_a_broken_install_is_a_line(shadow: Callable[[str, str], None]) -> None:
    shadow("mpi4py", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert ask(doctor_checks.MPI)["error"] == "was ended by SIGSEGV"
    line = only(doctor_checks.check_mpi(2), "MPI") if doctor_checks.version_of("mpi4py") else None
    assert line is None or (line.state == WARN and "was ended by SIGSEGV" in line.text and line.remedy)
    shadow("numpy", "raise ImportError('libopenblas.so: wrong ELF class')")
    line = only(doctor_checks.check_python(2), "numpy")
    assert line.state == FAIL
    assert line.text == "can not be imported: ImportError: libopenblas.so: wrong ELF class"


def test_noise_does_not_hide_what_a_program_tells() -> None:
    assert ask("print('hello'); tell(number=int(sys.argv[1]))", "7") == {"number": 7}
    assert ask("print('hello')")["error"]
    assert ask("import time; time.sleep(600)", seconds=1.0) == {"error": "had not ended after 1 s"}


# ---- what may be missing


def test_without_torch_mpi_and_cuda_it_says_what_they_would_be_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "version_of", lambda *names: None)
    monkeypatch.setattr(doctor_checks, "mpirun", lambda: None)
    monkeypatch.setattr(doctor_gpu, "ask", lambda *_: {"error": "OSError: libcuda.so.1: no such file"})
    monkeypatch.setattr(doctor_gpu.glob, "glob", lambda pattern: [])
    for check in (doctor_checks.check_torch, doctor_checks.check_mpi, doctor_gpu.check_gpu):
        (line,) = check(2)
        assert line.state == OK, line
    assert "pip install" in next(doctor_checks.check_torch(2)).remedy
    monkeypatch.setattr(doctor_gpu.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    (line,) = doctor_gpu.check_gpu(2)
    assert line.state == WARN and "--gpus all" in line.remedy
    monkeypatch.setenv("CXX", "no-such-compiler")
    (line,) = doctor_checks.check_compiler(2)
    assert line.state == OK and "no-such-compiler" in line.text


def test_torch_that_does_not_know_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = {"version": "2.13.0+cpu", "cuda": None, "distributed": True, "gloo": True, "mpi": False}
    monkeypatch.setattr(doctor_checks, "version_of", lambda *names: (names[0], "2.13.0"))
    monkeypatch.setattr(doctor_checks, "ask", lambda *_: torch | {"registered": False})
    assert "AUTOLOAD" in only(doctor_checks.check_torch(2), "backend").text
    monkeypatch.setattr(doctor_checks, "ask", lambda *_: torch | {"registered": True})
    assert only(doctor_checks.check_torch(2), "backend").state == OK
    monkeypatch.setattr(doctor_checks, "ask", lambda *_: torch | {"registered": True, "gloo": False})
    assert only(doctor_checks.check_torch(2), "torch").state == WARN
    monkeypatch.setattr(doctor_checks, "ask", lambda *_: torch | {"registered": True, "version": "2.1.0"})
    assert "2.11" in only(doctor_checks.check_torch(2), "torch").remedy
    monkeypatch.setattr(doctor_checks.importlib.metadata, "entry_points", lambda group: [])
    assert "entry point" in only(doctor_checks.check_torch(2), "backend").text


@pytest.mark.parametrize(
    ("vendor", "version", "said", "same"),
    [
        ("Open MPI", (5, 0, 11), "mpirun (Open MPI) 5.0.11", True),
        ("Open MPI", (5, 0, 11), "mpirun (Open MPI) 4.1.4", False),
        ("Open MPI", (5, 0, 11), "HYDRA build details:\n    Version: 4.3.0", False),
        ("MPICH", (4, 3, 0), "HYDRA build details:\n    Version: 4.3.0", True),
        ("MPICH", (5, 0, 0), "HYDRA build details:\n    Version: 4.3.0", False),
        ("MPICH", (4, 3, 0), "mpirun (Open MPI) 5.0.11", False),
        ("Intel MPI", (2021, 13, 0), "Intel(R) MPI Library for Linux* OS, Version 2021.13", True),
    ],
)
def test_whether_a_launcher_belongs_to_the_library(vendor: str, version: Any, said: str, same: bool) -> None:
    assert belongs(vendor, version, said) is same


def test_variables_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_TRANSPROT", "shm")
    monkeypatch.setenv("ABCCL_PROTOCOL", "cached")
    wrong, known = doctor_checks.check_variables()
    assert wrong.state == WARN and "ABCCL_TRANSPORT" in wrong.remedy
    assert "ABCCL_PROTOCOL=cached" in known.text and "ABCCL_TUNER=built-in" in known.text


def test_all_variables_that_are_read_are_known(root: Path) -> None:
    rooms = ("algorithms", "collectives", "cuda", "transports", "tools", "bench")
    files = [root / "setup.py", *(file for room in rooms for file in (root / room).rglob("*.py"))]
    named = {name for file in files for name in re.findall(r'"(ABCCL_[A-Z_]*[A-Z])"', file.read_text())}
    assert named == doctor_checks.VARIABLES


# ---- the machine


def test_memory_that_is_not_shared() -> None:
    fine = dict.fromkeys(("open", "pull", "pidfd", "membarrier", "futex"), "")
    assert {line.state for line in doctor_memory.judge_sharing(fine)} == {OK}
    lines = {line.part: line for line in doctor_memory.judge_sharing(fine | {"open": "EACCES (Permission denied)"})}
    assert lines["memory"].state == WARN and "/dev/shm is used" in lines["memory"].text
    lines = {
        line.part: line for line in doctor_memory.judge_sharing(fine | {"pull": "EPERM (Operation not permitted)"})
    }
    assert lines["pull"].state == WARN and lines["pull"].remedy
    lines = {line.part: line for line in doctor_memory.judge_sharing(fine | {"futex": "EPERM (no)"})}
    assert lines["futex"].state == FAIL


def test_what_dead_programs_left(tmp_path: Path) -> None:
    assert doctor_memory.leftovers(tmp_path) == []
    left, used = tmp_path / "abccl-dead", tmp_path / "abccl-used"
    for path in (left, used, tmp_path / "other"):
        path.write_bytes(bytes(4096))
    import mmap

    with used.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert doctor_memory.leftovers(tmp_path) == [left]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files of /proc and /sys, in the place of this machine's."""
    found: dict[str, str] = {}
    monkeypatch.setattr(doctor_machine, "read", lambda path: found.get(str(path), ""))
    monkeypatch.setattr(doctor_machine.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(doctor_machine.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return found


def test_the_time_that_a_control_group_allows(files: dict[str, str]) -> None:
    assert doctor_machine.quota() is None
    files["/proc/self/cgroup"] = "0::/job/step"
    files["/sys/fs/cgroup/job/step/cpu.max"] = "max 100000"
    assert doctor_machine.quota() is None
    assert only(doctor_machine.check_cores(8), "cores") == Finding(OK, "cores", "8 cores for 8 ranks")
    files["/sys/fs/cgroup/job/cpu.max"] = "250000 100000"
    files["/sys/fs/cgroup/job/step/cpu.max"] = "800000 100000"  # the least of those around it counts
    assert doctor_machine.quota() == 2.5
    throttled, crowded = (line for line in doctor_machine.check_cores(8) if line.part == "cores")
    assert throttled.state == WARN and "the time of 2.5" in throttled.text
    assert crowded.state == WARN and "8 ranks on 2.5 cores" in crowded.text
    files["/proc/self/cgroup"] = "3:cpu,cpuacct:/old\n1:memory:/old"
    files["/sys/fs/cgroup/cpu/old/cpu.cfs_quota_us"] = "-1"
    files["/sys/fs/cgroup/cpu/old/cpu.cfs_period_us"] = "100000"
    assert doctor_machine.quota() is None
    files["/sys/fs/cgroup/cpu/old/cpu.cfs_quota_us"] = "400000"
    assert doctor_machine.quota() == 4.0


def test_limits_against_what_the_ranks_want(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {doctor_machine.resource.RLIMIT_NOFILE: (1024, 4096)}
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda kind: limits.get(kind, (-1, -1)))
    files["/proc/self/cgroup"] = "0::/"
    lines = {line.part: line for line in doctor_machine.check_limits(8)}
    assert {line.state for line in lines.values()} == {OK}
    files["/sys/fs/cgroup/pids.max"] = "100"
    files["/sys/fs/cgroup/memory.max"] = str(1 << 30)
    lines = {line.part: line for line in doctor_machine.check_limits(256)}
    assert lines["files"].state == WARN and lines["files"].remedy.startswith("ulimit -n 2")
    assert lines["processes"].state == WARN and lines["processes"].text.startswith("100 ")
    assert lines["memory limit"].state == WARN and "1 GiB of" in lines["memory limit"].text


def test_clocks_and_threads(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    files["/sys/devices/system/clocksource/clocksource0/current_clocksource"] = "hpet"
    assert only(doctor_machine.check_cores(8), "clock").state == WARN
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    line = only(doctor_machine.check_cores(4), "threads")
    assert (line.state, line.remedy) == (WARN, "export OMP_NUM_THREADS=2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert only(doctor_machine.check_cores(4), "threads").state == OK


def test_a_cache_that_can_not_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_machine, "ask", lambda *_: {"told": "measured on 2020-01-01 10:00 in 1.1 s"})
    monkeypatch.setenv("ABCCL_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    line = only(doctor_machine.check_tables(2), "cache")
    assert line.state == WARN and "0777" in line.text
    tmp_path.chmod(0o700)
    assert only(doctor_machine.check_tables(2), "cache").state == OK
    assert re.search(r"\(2\d{3} days old\)", only(doctor_machine.check_tables(2), "table").text)
    (tmp_path / "file").touch()
    monkeypatch.setenv("ABCCL_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert only(doctor_machine.check_tables(2), "cache").state == WARN


# ---- CUDA


def judged(monkeypatch: pytest.MonkeyPatch, **driver: Any) -> dict[str, Finding]:
    monkeypatch.setattr(doctor_gpu.shutil, "which", lambda name: None)
    given = {"code": 0, "version": 12040, "names": ["NVIDIA H100"] * 2, "apart": []} | driver
    return {line.part: line for line in doctor_gpu.judge_driver(given)}


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = judged(monkeypatch)
    assert lines["CUDA"].text == "CUDA 12.4, no nvidia-smi: 2 x NVIDIA H100"
    assert lines["peers"].state == OK
    assert "0-1" in judged(monkeypatch, apart=[[0, 1], [1, 0]])["peers"].text
    assert judged(monkeypatch, code=100, names=[])["CUDA"].state == WARN


def test_packages_must_fit_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {
        "cuda-bindings": ("cuda-bindings 13.1.0", 13),
        "cupy": ("cupy-cuda13x 14.0", 13),
        "nvrtc": ("nvidia-cuda-nvrtc 13.0", 13),
        "NCCL": ("nvidia-nccl-cu13 2.28", 13),
    }
    monkeypatch.setattr(doctor_gpu, "installed", lambda: there)
    monkeypatch.setattr(doctor_gpu, "ask", lambda program: {"code": 0, "version": 22809})
    assert {line.state for line in doctor_gpu.check_packages(13)} == {OK}
    assert "cupy calls 2.28.9" in [line.text for line in doctor_gpu.check_packages(13)]
    old = [line for line in doctor_gpu.check_packages(12) if line.state == WARN]
    assert len(old) == 4 and all("abccl[cuda12]" in line.remedy for line in old)
    there["cupy"] = ("cupy-cuda12x 14.0", 12)
    assert only(doctor_gpu.check_packages(13), "CUDA packages").state == WARN
    there.clear()
    assert {line.state for line in doctor_gpu.check_packages(13)} == {WARN}
