"""The short form of tests/soak.py, whole by `make soak`: random collectives and messages, and nothing that grows."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import resources
import soak

import abccl

RANKS = 3
MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children import the module anew: what is shorter there is told by the environment."""
    monkeypatch.setenv("ABCCL_SOAK_MOST", str(MEBIBYTE))


@pytest.mark.ranks
def test_random_calls_and_messages_and_nothing_grows(capfd: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"python tests/soak.py --calls 320 --ranks {RANKS} --seed {seed}")
    summaries = abccl.spawn(soak.soak, RANKS, (320, seed, None, 40, 16.0), timeout=100)
    for summary in summaries:
        assert summary.calls > 200
    assert len({(summary.calls, summary.parts) for summary in summaries}) == 1
    assert "320 of 320" in capfd.readouterr().out


@pytest.mark.ranks
def test_communicators_are_closed_without_a_trace() -> None:
    for summary in abccl.spawn(soak.lifecycles, 2, (40, None, 5), timeout=100):
        assert summary.calls == 160


@pytest.mark.mpi
def test_random_calls_over_mpi(mpirun: list[str], root: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    command = [*mpirun, "-n", str(RANKS), sys.executable, root / "tests" / "soak.py", "--seed", str(seed)]
    command += ["--transport", "mpi", "--ranks", str(RANKS), "--calls", "160", "--every", "20", "--slack", "64"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100, env=os.environ)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"on each of {RANKS} ranks" in done.stdout and "all right" in done.stdout


def test_what_grows_is_found() -> None:
    """One file lost, and 100 bytes with each call; a sample that is out of line is none of both."""
    calls = [100 * number for number in range(1, 11)]
    usual = [resources.Held(1 << 20, 1 << 20, 0, 1000, 10, 3, 300) for _ in calls]
    usual[4] = resources.Held(9 << 20, 1 << 20, 0, 1000, 10, 3, 300)
    soak.check(0, resources.growth(calls, usual), soak.LIMITS, usual, "")
    for name, step in {"files": 1, "heap": 10_000, "threads": 1}.items():
        grows = [
            resources.Held(**{**vars(held), name: getattr(held, name) + step * number})
            for number, held in enumerate(usual)
        ]
        with pytest.raises(AssertionError, match=f"rank 0: {name} grows by"):
            soak.check(0, resources.growth(calls, grows), soak.LIMITS, grows, "")


def holds() -> None:
    before = resources.held()
    kept = bytearray(b"x") * MEBIBYTE
    read, write = os.pipe()
    after = resources.held()
    os.close(read)
    os.close(write)
    assert after.files == before.files + 2
    assert after.heap >= before.heap + len(kept) or not before.heap  # a C library that does not tell
    assert after.resident >= before.resident + len(kept) // 2


def test_what_a_process_holds_is_seen(here: ModuleType) -> None:
    abccl.spawn(here.holds, 1, timeout=60)
