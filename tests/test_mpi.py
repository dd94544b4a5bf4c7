"""The mpi transport: the conformance suite by processes, how a job ends, and what is said where MPI is not as wanted.

With the MPI of this environment, and with MPICH in .venv-mpich if `make test-mpich` has put it there.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mpi_program
import pytest

from abccl.errors import ArgumentError, TransportError
from abccl.transports import conformance
from abccl.transports.mpi import find_mpi
from abccl.transports.mpi_collectives import mpi_operator, mpi_type

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = str(ROOT / "tests" / "mpi_program.py")
MPICH = ROOT / ".venv-mpich"
LIMIT = 100.0
"""Seconds that a job may take: on a loaded machine, ten times what it needs."""

LIBRARIES = ("own", "mpich")

pytestmark = pytest.mark.mpi


class Job:
    """What a job of one of the MPI libraries has printed, and how it ended."""

    def __init__(self, library: str, mpirun: str, package: str, ranks: int, what: str) -> None:
        python = sys.executable if library == "own" else str(MPICH / "bin" / "python")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_COMM_", "PMI"))}
        # The other environment has no abccl: it finds this one through a link, and needs nothing else of it.
        environment = inherited if library == "own" else inherited | {"PYTHONPATH": package}
        process = subprocess.Popen(
            [mpirun, "-n", str(ranks), python, PROGRAM, what],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        begun = time.monotonic()
        try:
            self.output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # which the launcher passes on to its ranks
            self.output, _ = process.communicate(timeout=20)
            self.output += f"\nended after {LIMIT:g} s"
        self.code, self.seconds = process.returncode, time.monotonic() - begun


@pytest.fixture
def run(library: str, mpirun: list[str], package: str) -> Any:
    """Runs the program: `run(3, "raises")` is a Job."""
    if library == "mpich":
        if not (MPICH / ".installed").exists():
            pytest.skip("MPICH is not in .venv-mpich: make test-mpich puts it there")
        mpirun = [str(MPICH / "bin" / "mpirun")]
    return functools.partial(started, library, mpirun[0], package)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in which the root is called abccl."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "abccl").symlink_to(ROOT)
    return str(folder)


started = functools.cache(Job)  # all checks are one job
CHECKS = [check.__name__ for check in (*conformance.CHECKS, *mpi_program.CHECKS)]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("check", CHECKS)
def test_checks(check: str, run: Any) -> None:
    job = run(5, "checks")
    found = [json.loads(line) for line in job.output.splitlines() if line.startswith('{"check"')]
    faults = {each["check"]: each["fault"] for each in found}
    assert check in faults, f"the job ended before (exit code {job.code}):\n{job.output[-4000:]}"
    assert not faults[check]
    assert job.code == 0


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", ["rank 1 has a fault", "PeerLost: mpi: rank ", "waits for rank 1, which has closed or ended"]),
        (
            "stuck",
            ["DeadlineExceeded: mpi: rank ", "waited in vain for 1 of 1"],
        ),
        ("absent", ["DeadlineExceeded: mpi: rank ", "made its transport and waited 0.1 s"]),
        ("killed", []),
    ],
)
def test_a_job_whose_rank_fails_ends(how: str, words: list[str], run: Any) -> None:
    job = run(3, how)
    assert job.code != 0, job.output
    assert "ended after" not in job.output
    for each in words:
        assert each in job.output, job.output


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    with pytest.raises(TransportError, match="the mpi transport needs mpi4py and an MPI library.*pip install mpi4py"):
        find_mpi()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "mpi4py.rc.thread_level = 'funneled'",
            "needs MPI_THREAD_MULTIPLE, and this process has MPI_THREAD_FUNNELED: set",
        ),
        ("mpi4py.rc.initialize = False", "MPI is not running in this process: let mpi4py initialise it"),
    ],
)
def test_an_mpi_that_does_not_serve_is_refused(code: str, words: str) -> None:
    program = f"import mpi4py; {code}; from abccl.transports.mpi import find_mpi; find_mpi()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert words in done.stderr


def test_abccl_does_not_import_mpi4py() -> None:
    program = "import sys, abccl, abccl.transports, abccl.transports.mpi; assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


class Names:
    """An MPI whose types and operators are their names."""

    def __getattr__(self, name: str) -> str:
        return name


def test_types_and_operators() -> None:
    mpi = Names()
    types = [mpi_type(mpi, name) for name in ("float32", "int8", "uint64", "bool", "complex128")]
    assert types == ["FLOAT", "INT8_T", "UINT64_T", "C_BOOL", "C_DOUBLE_COMPLEX"]
    assert [mpi_type(mpi, name, reduces=False) for name in ("bfloat16", "float16")] == ["UINT16_T"] * 2
    assert [mpi_operator(mpi, op, "int32") for op in ("sum", "bxor")] == ["SUM", "BXOR"]
    assert [mpi_operator(mpi, op, "bool") for op in ("sum", "prod", "bxor")] == ["LOR", "LAND", "LXOR"]
    with pytest.raises(ArgumentError, match="MPI does not reduce bfloat16: take another algorithm"):
        mpi_type(mpi, "bfloat16")
    for op, dtype in (("avg", "float32"), ("avg", "bool"), ("lor", "int32")):
        with pytest.raises(ArgumentError, match=f"MPI has no operator {op}"):
            mpi_operator(mpi, op, dtype)


@pytest.mark.parametrize("library", ["mpich"])  # beside the own one: test_bench.py, test_bench_p2p.py
@pytest.mark.parametrize("what", ["all_reduce", "p2p"])
def test_the_benchmark_beside_the_library(what: str, library: str, run: Any, package: str) -> None:
    mpirun = run.args[1]
    python = Path(mpirun).with_name("python")
    few = ["--vs", "mpi", "--max", "16", "--iterations", "5", "--format", "json"]
    command = [mpirun, "-n", "2", str(python), "-m", "abccl.bench", what, *few]
    environment = os.environ | {"PYTHONPATH": package}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]
