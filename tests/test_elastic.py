"""Training that outlives its ranks: the example as a user starts it, and a job that torchrun starts anew."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import abccl

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(170)]

PROOF = r"""steps 1 to 30 finished, each once: yes
the same parameters on {left} ranks?: yes
loss 2\.\d+ in the first step, [01]\.\d+ in the last
one process that nothing happens to gets the same parameters to \d\.\de-\d\d
"""

LAUNCHED = re.compile("OMPI_|PMIX?_|SLURM_|TORCHELASTIC_|(RANK|WORLD_SIZE)$")


def example(
    root: Path, *arguments: str, start: tuple[str, ...] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("sklearn")
    environment = {name: value for name, value in os.environ.items() if not LAUNCHED.match(name) or "ALLOW_RUN" in name}
    command = [*start, str(root / "examples" / "elastic.py"), "--steps", "30", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)


def test_no_finished_step_is_lost_with_a_rank(root: Path) -> None:
    done = example(root, "--ranks", "4", "--lose", "2", "--at", "17")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"rank 2 of 4 was lost in step 17; 3 ranks go on from step 1[78]: no finished step was lost\n"
        + PROOF.format(left=3)
        + "rank 2 of 4 was ended by SIGKILL without returning\n",
        done.stdout,
    ), done.stdout


def test_ranks_are_lost_one_after_the_other_until_one_is_left(root: Path) -> None:
    done = example(root, "--ranks", "3", "--lose", "0", "--at", "1", "--lose", "2", "--at", "30")
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 3 was lost in step 1; 2 ranks go on from step" in done.stdout
    assert "rank 2 of 3 was lost in step 30; 1 rank goes on from step" in done.stdout
    assert re.search(PROOF.format(left=1), done.stdout), done.stdout


@pytest.mark.parametrize(
    ("lost", "transport", "option"),
    [(["1"], "shm", "--enable-recovery"), (["0", "3"], "shm", "--enable-recovery"), (["2"], "mpi", "--with-ft=ulfm")],
    ids=str,
)
def test_under_mpirun(
    root: Path, mpirun: list[str], lost: list[str], transport: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes end, although MPI_Finalize may wait for two that died at once."""
    monkeypatch.setenv("ABCCL_TRANSPORT", transport)
    start = (*mpirun, *option.split("="), "-n", "4", sys.executable)
    done = example(root, *(word for rank in lost for word in ("--lose", rank, "--at", "17")), start=start)
    assert done.returncode == 0, done.stderr
    assert re.search(PROOF.format(left=4 - len(lost)), done.stdout), done.stdout + done.stderr


# ---- the step that some have finished


def at_different_steps() -> tuple[int, int, list[int], float]:
    """Rank 1 has finished a step more than the others."""
    elastic = importlib.import_module("elastic")
    communicator = abccl.init(timeout=60)
    state = elastic.State()
    data = elastic.digits()
    for _ in range(3 + (communicator.rank == 1)):
        elastic.finish(state, elastic.gradients(state.values, *elastic.batch_of(state.step + 1, data, 10)), 10)
    shrunk, left, lost_in = elastic.recover(communicator, communicator.rank, state)
    assert list(left) == [0, 1, 2]
    shrunk.barrier()
    return lost_in, state.step, [step for step, _ in state.finished], float(np.sum(state.values + 10 * state.momentum))


def test_a_step_that_one_has_finished_is_taken_over(
    here: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(root / "examples"))
    results = abccl.spawn(here.at_different_steps, 3, timeout=120)
    assert results == [results[1]] * 3
    assert results[1][:3] == (4, 4, [1, 2, 3, 4])


# ---- torchrun starts all ranks anew

PROGRAM = """
import os, signal, sys
import numpy as np
import abccl
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
communicator = abccl.init(timeout=60)
x = np.ones(1)
communicator.all_reduce(x)
if attempt == 0:
    if communicator.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(3):
            communicator.all_reduce(x)
    except abccl.PeerLost:
        print("lost", flush=True)
        sys.exit(1)
communicator.barrier()
sys.stdout.write(f"attempt {attempt}: {int(x[0])} ranks\\n")  # at once: two ranks write there
sys.stdout.flush()
"""


@pytest.mark.torch
def test_torchrun_starts_a_job_anew(tmp_path: Path) -> None:
    """The second attempt meets on the same store, beside what the first has left there."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--max-restarts", "1", "--monitor-interval", "0.1", str(program)],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("attempt")) == ["attempt 1: 2 ranks"] * 2
