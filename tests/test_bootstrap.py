"""How a process finds its ranks: launchers told apart, blobs exchanged, errors that say who is missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from abccl.collectives import bootstrap
from abccl.collectives.bootstrap import Alone, StoreBootstrap, find, first_host
from abccl.errors import DeadlineExceeded, TransportError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "h"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}

# Two rounds of one bootstrap, and a second bootstrap of the same process: sizes differ, bytes need not be text.
PROGRAM = """
import json, os
from abccl.collectives.bootstrap import find
first = find(timeout=60)
blob = bytes([first.rank, 0, 255]) * first.rank
rounds = [first.exchange(blob), first.exchange(b"second")]
rounds.append(find(timeout=60).exchange(b"other"))
print(json.dumps([first.rank, first.size, [[b.hex() for b in r] for r in rounds]]) + "\\n", end="", flush=True)
first.exchange(b"")  # rank 0 keeps the store: it stays until all have read
"""


def expected(rank: int, size: int) -> list[object]:
    blobs = [(bytes([other, 0, 255]) * other).hex() for other in range(size)]
    return [rank, size, [blobs, [b"second".hex()] * size, [b"other".hex()] * size]]


def run_all(commands: list[list[str]], environments: list[dict[str, str]]) -> list[object]:
    """The JSON lines that the processes print, sorted."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_COMM_", "PMI"))}
    processes = [
        subprocess.Popen(command, env=inherited | environment, stdout=subprocess.PIPE, text=True)
        for command, environment in zip(commands, environments)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return sorted(json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("["))


@pytest.fixture
def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (TORCHRUN, "_torchrun"),
        (TORCHRUN | SRUN, "_torchrun"),
        (OPEN_MPI, "Open MPI"),
        (OPEN_MPI | SRUN, "Open MPI"),
        (HYDRA, "MPICH"),
        (HYDRA | SRUN, "MPICH"),
        ({"PMIX_RANK": "1"}, "PMI"),
        (SRUN, "_slurm"),
        (SRUN | {"PMI_RANK": "1"}, "_slurm"),
    ],
)
def test_launchers_are_told_apart(environment: dict[str, str], launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(bootstrap, "_torchrun", lambda *_: "_torchrun")
    monkeypatch.setattr(bootstrap, "_slurm", lambda *_: "_slurm")
    monkeypatch.setattr(bootstrap, "_mpirun", lambda name, *_: name)
    assert find(environment) == launcher


def test_slurm_with_pmi_and_no_torch_goes_by_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(bootstrap, "_mpirun", lambda name, *_: name)
    assert find(SRUN | {"PMI_RANK": "1"}) == "PMI"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script is one process, whatever it asked for
        SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_alone(environment: dict[str, str]) -> None:
    own = find(environment)
    assert isinstance(own, Alone)
    assert (own.rank, own.size, own.exchange(b"x")) == (0, 1, [b"x"])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not MASTER_ADDR and MASTER_PORT: start the processes by torchrun"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is not a number"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 and WORLD_SIZE=4: ranks are 0 to size - 1"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_JOB_NODELIST"}, "start it by srun"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS"}, "SLURM_NTASKS is not set"),
    ],
)
def test_variables_that_make_no_sense(environment: dict[str, str], message: str) -> None:
    with pytest.raises(TransportError, match=message):
        find(environment)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with pytest.raises(TransportError, match=r"Open MPI started this process.*pip install mpi4py"):
        find(OPEN_MPI)
    with pytest.raises(TransportError, match="pip install torch"):
        find(TORCHRUN)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("node[007-010,12],other", "node007"),
        ("node[3,5-7]", "node3"),
        ("rack[1-2]n[05-08]-ib,x[1-2]", "rack1n05-ib"),
        ("gpu-a-[01-02].cluster", "gpu-a-01.cluster"),
        ("10.0.0.[1-4]", "10.0.0.1"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.torch
def test_a_store_is_left_as_it_was_but_for_the_last_round() -> None:
    import torch.distributed as dist

    store, size, rounds = dist.HashStore(), 3, 5
    own = [StoreBootstrap(store, rank, size, "p", timeout=60) for rank in range(size)]
    got: dict[int, list[list[bytes]]] = {}

    def rank_main(rank: int) -> None:
        got[rank] = [own[rank].exchange(bytes([rank, turn, 0, 255]) * turn) for turn in range(rounds)]

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {
        rank: [[bytes([other, turn, 0, 255]) * turn for other in range(size)] for turn in range(rounds)]
        for rank in range(size)
    }
    assert store.num_keys() == size


@pytest.mark.torch
def test_the_missing_ranks_are_named() -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    with pytest.raises(DeadlineExceeded, match=r"rank 2 of 4 waited 0.01 s for ranks 0, 1, 3"):
        StoreBootstrap(store, 2, 4, "p", timeout=0.01).exchange(b"")
    with pytest.raises(DeadlineExceeded, match=r"rank 1 of 4 waited 0.01 s for ranks 0, 3"):
        StoreBootstrap(store, 1, 4, "p", timeout=0.01).exchange(b"")


@pytest.mark.torch
def test_a_store_that_is_not_there(free_port: str) -> None:
    with pytest.raises(TransportError, match=f"can not reach the store at 127.0.0.1:{free_port}"):
        find(TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}, timeout=0.5)


@pytest.mark.torch
def test_torchrun(program: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program[1]]
    assert run_all([torchrun], [{}]) == [expected(rank, 2) for rank in range(2)]


@pytest.mark.torch
def test_rank_variables_by_hand_share_the_port_with_torch(tmp_path: Path, free_port: str) -> None:
    path = tmp_path / "program.py"
    path.write_text("import torch.distributed as dist\ndist.init_process_group('gloo')\n" + PROGRAM)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    got = run_all([[sys.executable, str(path)]] * 2, [common | {"RANK": str(rank)} for rank in range(2)])
    assert got == [expected(rank, 2) for rank in range(2)]


@pytest.mark.torch
def test_slurm(program: list[str]) -> None:
    ranks = 3
    common = {
        "SLURM_JOB_ID": str(os.getpid()),  # the port follows from it: runs at the same time must not meet
        "SLURM_STEP_ID": "3",
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_NODELIST": "localhost,elsewhere[1-3]",
    }
    got = run_all([program] * ranks, [common | {"SLURM_PROCID": str(rank)} for rank in range(ranks)])
    assert got == [expected(rank, ranks) for rank in range(ranks)]


def test_mpirun(mpirun: list[str], program: list[str], ranks: int) -> None:
    assert run_all([[*mpirun, "-n", str(ranks), *program]], [{}]) == [expected(rank, ranks) for rank in range(ranks)]


def test_an_mpi4py_of_another_mpi_is_told(mpirun: list[str]) -> None:
    # A process that this MPI did not start is alone to it, whatever another launcher's variables say.
    code = (
        "from abccl.collectives.bootstrap import find; find({'OMPI_COMM_WORLD_RANK': '0', 'OMPI_COMM_WORLD_SIZE': '4'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "Open MPI started 4 processes, and mpi4py sees 1: it uses another MPI (" in done.stderr
