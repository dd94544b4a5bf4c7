"""The cuda_ipc transport among processes that share the one device: what CUDA IPC and stream waits really do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import ranks
from gpu.device import FAKE

import abccl
from abccl.transports import conformance

pytestmark = [pytest.mark.timeout(600), pytest.mark.ranks]


# ---- the conformance suite


@pytest.fixture(scope="module")
def conformed() -> dict[str, str]:
    """What each check found, among 2, 3 and 4 of 4 processes."""
    return abccl.spawn(ranks.conform, 4, args=((3,) if FAKE else (1, 2, 3, 4),), timeout=550)[0]


@pytest.mark.parametrize("check", [check.__name__ for check in conformance.CHECKS])
def test_conformance(conformed: dict[str, str], check: str) -> None:
    assert not conformed[check], conformed[check]


# ---- graphs


# A fake driver replays one graph as often as a GPU does, and others a few times.
REPLAYS = [(2, 1000, 1000), (3, 1000, 20), (4, 50_003, 4), (2, 50_000, 2)]
if not FAKE:
    REPLAYS = [(2, 1000, 1000), (3, 1000, 1000), (4, 1_000_003, 100), (2, 5_000_000, 50)]


@pytest.mark.parametrize(("size", "count", "times"), REPLAYS)
def test_a_graph_is_replayed_on_changing_data(size: int, count: int, times: int) -> None:
    assert abccl.spawn(ranks.replay, size, args=(count, times), timeout=300) == [""] * size


# ---- lost peers


@pytest.mark.parametrize("when", ["waiting", "running"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_peer_is_told_and_no_stream_hangs(tmp_path: Path, size: int, when: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed: the processes meet by its FileStore")
    victim = 1
    programs = [
        subprocess.Popen(
            [sys.executable, str(ranks.__file__), str(tmp_path), str(rank), str(size), str(victim), when],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [program.communicate(timeout=240) for program in programs]
    finally:
        for program in programs:
            program.kill()
            program.wait()
    assert programs[victim].returncode == -signal.SIGKILL, said[victim][1]
    for rank, (output, errors) in enumerate(said):
        if rank != victim:
            assert programs[rank].returncode == 0, f"rank {rank}: {errors}"
            told = json.loads(output.splitlines()[-1])
            assert told["error"] == "PeerLost", f"rank {rank}: {told}"
            assert told["seconds"] < 30, f"rank {rank} was told after {told['seconds']} s"
