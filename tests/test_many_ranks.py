"""64 ranks on one machine, many more than it has cores: everything works, and what fails names its rank."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import many_ranks
import pytest
import random_runs

from abccl import Collective
from abccl.transports.shm import shm_threads

RANKS = 64
PROGRAM = Path(many_ranks.__file__)

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(int(many_ranks.SECONDS) + 20)]


def run(*arguments: Any) -> list[Any]:
    """What each rank returned."""
    done = subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[Any] = json.loads(done.stdout.splitlines()[-1])["results"]
    return results


def test_all_collectives_among_processes() -> None:
    results = run("collectives", RANKS)
    assert len(results) == RANKS
    assert len({result["calls"] for result in results}) == 1
    # One file for each rank's memory and one to see it end, and what the first ranks leave open for the later ones.
    assert results[0]["files"] < 3 * RANKS


def test_a_report_names_the_one_that_is_missing() -> None:
    told = run("missing", RANKS, 37)
    assert told.pop(37) == "was missing"
    assert len(told) == RANKS - 1
    for text in told:
        assert text.startswith("DeadlineExceeded: all_reduce #3 (float32, sum, 4 elements"), text
        assert re.search(r"rank 37(, which|) has not entered #3 \(last: barrier #2, finished ", text), text


def test_a_death_is_seen_by_all_others() -> None:
    results = run("killed", RANKS, 41)
    assert results.pop(41) is None
    assert len(results) == RANKS - 1
    for text, seconds in results:
        assert text.startswith("PeerLost: rank 41 ended"), text
        assert seconds < 10  # one second is promised, where ranks have cores of their own


@pytest.mark.torch
def test_eight_ranks_over_torch(tmp_path: Path) -> None:
    size = 8
    total = size * (size - 1) / 2
    for rank, result in enumerate(run("torch", size, tmp_path / "store")):
        assert result == [total, total, size - 1, total, 1 + (size // 2 - 1) * (rank % 2 == 0)]


def test_threads() -> None:
    group = random_runs.Group([random_runs.Communicator(t, timeout=60) for t in shm_threads(RANKS)])
    try:
        for collective in (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.BARRIER):
            for nbytes in (many_ranks.SMALL, many_ranks.LARGE):
                group.run(lambda c, what=collective, nbytes=nbytes: many_ranks.checked(c, what, "tree", nbytes))
    finally:
        group.close()
