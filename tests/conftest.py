"""What all tests share. A marker says what a test needs: nothing, several processes (`ranks`), `mpi`, `torch`."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What is chosen must not depend on how fast the machine is today, and nothing is to be left in the user's cache.
os.environ["ABCCL_TUNER"] = "built-in"
os.environ.setdefault("ABCCL_FLIGHT_DIR", "off")

# Odd and even, and few enough for a small machine. ABCCL_TEST_RANKS=4 or 2,5 says otherwise.
RANKS = [int(word) for word in os.environ.get("ABCCL_TEST_RANKS", "2,3").split(",")]


# Files whose tests start no rank and time nothing.
PURE = """
    algorithms bucket_parts candidates catalogue commands composed cost cubins families figures fit forms goal
    hierarchical model mutants parameters plan radix replay rules simulate simulator survivors toml_file topology
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `ranks`, and does not set it itself, runs for each number of ranks."""
    marks = list(metafunc.definition.iter_markers("parametrize"))
    own = [mark.args[0] if mark.args else mark.kwargs["argnames"] for mark in marks]
    names = {name.strip() for arg in own for name in (arg.split(",") if isinstance(arg, str) else arg)}
    if "ranks" in metafunc.fixturenames and "ranks" not in names:
        metafunc.parametrize("ranks", RANKS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes `ranks` or `mpirun`, and skip what this environment lacks the packages for."""
    without_torch = importlib.util.find_spec("torch") is None
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if item.path.stem.removeprefix("test_") in PURE.split():
            item.add_marker("pure")
        if "ranks" in fixtures:
            item.add_marker("ranks")
        if "mpirun" in fixtures:
            item.add_marker("mpi")
        if without_torch and item.get_closest_marker("torch"):
            item.add_marker(pytest.mark.skip(reason="torch is not installed"))
        if item.get_closest_marker("mpi") and not _mpirun():
            item.add_marker(pytest.mark.skip(reason="mpi4py or mpirun is not installed"))


def pytest_sessionfinish() -> None:
    """End the processes that a failed test of this run left behind."""
    for child in multiprocessing.active_children():
        child.kill()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root, which is the package."""
    return ROOT


@pytest.fixture
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The test's file as a module that a process started by `abccl.spawn` can import: `spawn(here.body, 2)`."""
    monkeypatch.syspath_prepend(str(request.path.parent))
    return importlib.import_module(request.path.stem)


@pytest.fixture
def mpirun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How to start MPI processes: `[*mpirun, "-n", "2", sys.executable, ...]`."""
    if os.geteuid() == 0:  # Open MPI refuses to run as root unless told twice
        monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
        monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    # More ranks than cores: Open MPI wants leave for it, MPICH does not.
    monkeypatch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    return [_mpirun()]


def _mpirun() -> str:
    """The mpirun of this environment, else of the machine; empty if there is none, or no mpi4py."""
    if importlib.util.find_spec("mpi4py") is None:
        return ""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun") or ""
