"""What is shipped: the wheel's contents, the public names, the version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOMS = ["algorithms", "bench", "collectives", "cuda", "tools", "transports"]

PUBLIC_NAMES = {
    # errors
    "AbcclError",
    "Aborted",
    "ArgumentError",
    "ClosedError",
    "CollectiveError",
    "DeadlineExceeded",
    "Mismatch",
    "PeerLost",
    "RankFailed",
    "ScheduleError",
    "TransportError",
    "UnknownAlgorithm",
    # to communicate
    "Communicator",
    "Work",
    "init",
    "premul_sum",
    "spawn",
    # to choose algorithms
    "Call",
    "Choice",
    "register_chooser",
    "unregister_chooser",
    # to write an algorithm
    "Collective",
    "algorithm",
    "at_least",
    "mirror",
    "per_rank",
    "power_of_two",
    "recv",
    "relabel",
    "send",
    "replay",
    # the rest
    "report",
    "__version__",
}


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from a copy of the checkout (without the native core, which takes a minute)."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".venv*", ".git", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    shutil.copytree(root, folder / "checkout", ignore=ignored)
    # A stray conftest.py is what somebody will put there one day.
    (folder / "checkout" / "conftest.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "wheels", "./checkout"]
    env = os.environ | {"ABCCL_SKIP_NATIVE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "wheels").glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


@pytest.mark.slow
def test_the_wheel_holds_every_module(root: Path, wheel: set[str]) -> None:
    paths = [*root.glob("__init__.py"), root / "errors.py", *root.glob("py.typed")]
    for room in ROOMS:
        for pattern in ("*.py", "*.json", "*.toml", "*.cu", "*.cuh"):
            paths += (root / room).rglob(pattern)
    missing = {f"abccl/{path.relative_to(root)}" for path in paths} - wheel
    assert not missing, f"not in the wheel (is its folder in ROOMS of setup.py?): {sorted(missing)}"


@pytest.mark.slow
def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    own = re.compile(rf"abccl/(__init__\.py|__main__\.py|buckets\.py|errors\.py|py\.typed|({'|'.join(ROOMS)})/.*)")
    strays = {name for name in wheel if not own.fullmatch(name) and ".dist-info/" not in name}
    assert not strays, f"in the wheel, and should not be: {sorted(strays)}"


def test_public_names() -> None:
    """The names that users write. Add one here when it is meant to stay."""
    import abccl

    assert set(abccl.__all__) == PUBLIC_NAMES
    assert [name for name in abccl.__all__ if not hasattr(abccl, name)] == []


def test_version(root: Path) -> None:
    import abccl

    stated = re.search(r'^version = "(.*)"$', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated and abccl.__version__ == stated[1]
