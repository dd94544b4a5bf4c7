"""The benchmark among ranks of several hosts, where one rank fails, and on buffers of a GPU (a pretended one)."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from bench_runs import ALONE, case_of, ended, started
from click.testing import CliRunner

from abccl.algorithms import Collective
from abccl.bench import world
from abccl.bench.__main__ import bench
from abccl.bench.buffers import Buffers, take_gpu
from abccl.bench.options import Options
from abccl.bench.peers import MPI
from abccl.collectives import rendezvous
from abccl.collectives.bootstrap import Bootstrap
from abccl.collectives.rendezvous import addresses, first_that_answers, make_store
from abccl.errors import ArgumentError, TransportError

FEW = ["--max", "16", "--iterations", "5"]


# ---- a store for ranks that have none


@contextmanager
def listening(address: str) -> Iterator[int]:
    """A port of the address where somebody listens."""
    with socket.create_server((address, 0)) as server:
        yield server.getsockname()[1]


def test_the_first_address_that_answers_is_taken() -> None:
    with listening("127.0.0.2") as port:
        assert first_that_answers(["127.0.0.1", "127.0.0.2", "127.0.0.3"], port) == "127.0.0.2"


def test_no_address_answers() -> None:
    with listening("127.0.0.2") as port, pytest.raises(TransportError, match=r"127.0.0.1: .*GLOO_SOCKET_IFNAME"):
        first_that_answers(["127.0.0.1"], port)


def test_addresses_that_others_reach_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"lo": "127.0.0.1", "none": "", "eth0": "10.0.0.1", "eth1": "10.0.0.2"}
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(known)))
    monkeypatch.setattr(rendezvous, "_address", known.get)
    assert addresses({}) == ["10.0.0.1", "10.0.0.2", "127.0.0.1"]
    assert addresses({"GLOO_SOCKET_IFNAME": "eth1"}) == ["10.0.0.2", "10.0.0.1", "127.0.0.1"]
    assert addresses({"GLOO_SOCKET_IFNAME": "lo"}) == ["127.0.0.1", "10.0.0.1", "10.0.0.2"]


def test_this_host_has_addresses() -> None:
    assert "127.0.0.1" in addresses({})


class Threads(Bootstrap):
    """Ranks as threads."""

    def __init__(self, rank: int, blobs: list[bytes], meeting: threading.Barrier) -> None:
        self.rank, self.size, self.blobs, self.meeting = rank, len(blobs), blobs, meeting

    def exchange(self, data: bytes) -> list[bytes]:
        self.blobs[self.rank] = data
        self.meeting.wait(60)
        found = list(self.blobs)
        self.meeting.wait(60)
        return found


@pytest.mark.torch
def test_ranks_share_a_store() -> None:

    blobs, meeting, got = [b""] * 3, threading.Barrier(3), {}

    def rank(number: int) -> None:
        own = Threads(number, blobs, meeting)
        store = make_store(own.rank, own.exchange)
        store.set(f"from {number}", f"hello {number}")
        got[number] = [store.get(f"from {other}") for other in range(3)]
        own.exchange(b"")  # rank 0 keeps the store

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert list(got.values()) == [[b"hello 0", b"hello 1", b"hello 2"]] * 3


@pytest.mark.torch
def test_gloo_under_mpirun(mpirun: list[str]) -> None:
    options = ["all_reduce", *FEW, "--through", "direct", "--algorithm", "auto,ring", "--vs", "gloo"]
    shown = started([*mpirun, "-n", "2", *ALONE], *options)
    assert "gloo through torch.distributed" in shown and "gloo/abccl (direct, ring): geometric mean" in shown
    assert "ring/auto: geometric mean" in shown and "all results right" in shown


# ---- hosts and transports


@pytest.mark.parametrize("call", ["all_reduce", "p2p"])
def test_ranks_on_different_hosts(call: str, mpirun: list[str]) -> None:
    one, other = ([sys.executable, "-m", "abccl.bench", call, *FEW, "--vs", "mpi"] for _ in range(2))
    named = ["env", "ABCCL_HOST=one", *one], ["env", "ABCCL_HOST=other", *other]
    shown = started([*mpirun, "-n", "1", *named[0], ":", "-n", "1", *named[1]])
    assert "2 hosts and their ranks" in shown and "not measured: they are on different hosts" in shown
    assert "copied at" not in shown and "all results right" in shown


@pytest.mark.parametrize("collective", ["all_reduce", "gather"])
def test_the_engines_own_collective(collective: str, mpirun: list[str]) -> None:
    options = [collective, *FEW, "--transport", "mpi", "--algorithm", "all", "--vs", "mpi"]
    shown = started([*mpirun, "-n", "2", *ALONE], *options)
    assert "transport: mpi" in shown and "mpi/abccl (direct, native)" in shown and "all results right" in shown


@pytest.mark.ranks
@pytest.mark.torch
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--algorithm", "auto,native"], "native/auto: geometric mean"),
        (["--through", "torch"], "abccl through torch.distributed"),
    ],
)
def test_gloo_as_a_transport(options: list[str], wanted: str) -> None:
    shown = started(ALONE, "all_reduce", *FEW, "--transport", "gloo", *options)
    assert "transport: gloo" in shown and "ABCCL_TRANSPORT=gloo" in shown
    assert wanted in shown and "all results right" in shown


@pytest.mark.ranks
def test_shared_memory_has_no_collective_of_its_own() -> None:
    done = ended(ALONE, "all_reduce", *FEW, "--algorithm", "native")
    assert done.returncode == 2 and "no all_reduce of its own" in done.stderr and "Traceback" not in done.stderr


def test_mpi_as_a_transport_wants_mpirun() -> None:
    done = ended(ALONE, "all_reduce", *FEW, "--transport", "mpi")
    assert done.returncode == 2 and "mpirun -n 2 python -m abccl.bench" in done.stderr


# ---- a rank that fails

# The last rank refuses; the first has no part in that, and goes on to a call of MPI's own, which no abort ends.
FAILS = """
from abccl.bench import run, world
from abccl.bench.__main__ import bench
from abccl.bench.peers import MPI, Peer
from abccl.errors import ArgumentError

world.PATIENCE = 1.0
first = Peer.first


def fails(self, call, case):
    if isinstance(self, MPI) and self.rank == {rank} and case.size == 16:
        raise {error}("this rank has had enough")
    first(self, call, case)


Peer.first = fails
bench(["all_reduce", "--max", "64", "--iterations", "3", "--vs", "mpi"])
"""


@pytest.mark.parametrize(("rank", "error"), [(0, "KeyError"), (2, "ArgumentError")])
def test_all_ranks_end_if_one_fails(rank: int, error: str, mpirun: list[str], tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(rank=rank, error=error))
    done = ended([*mpirun, "-n", "3", sys.executable, str(script)])
    assert done.returncode != 0 and "this rank has had enough" in done.stderr


def test_a_refusal_by_all_ranks_is_one_line(mpirun: list[str]) -> None:
    done = ended([*mpirun, "-n", "2", *ALONE], "all_reduce", "--dtype", "bfloat16", "--vs", "mpi", *FEW)
    assert done.returncode == 2 and done.stderr.count("MPI has no type bfloat16") == 1


# ---- a GPU


class OnDevice:
    """An array of the pretended GPU."""

    def __init__(self, content: np.ndarray[Any, Any], log: list[str]) -> None:
        self.content, self.log = content, log

    def set(self, array: np.ndarray[Any, Any]) -> None:
        self.log.append("set")
        self.content[...] = array

    def get(self, out: np.ndarray[Any, Any]) -> None:
        self.log.append("get")
        out[...] = self.content

    def copy(self) -> OnDevice:
        return OnDevice(self.content.copy(), self.log)

    def __setitem__(self, where: Any, source: OnDevice) -> None:
        self.log.append("copy")
        self.content[where] = source.content


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for cupy, with so many GPUs as it is told."""
    log: list[str] = []

    def use(number: int) -> Any:
        return SimpleNamespace(use=lambda: log.append(f"use {number}"))

    stream = SimpleNamespace(synchronize=lambda: log.append("synchronize"))
    pretended = SimpleNamespace(
        log=log,
        gpus=2,
        empty=lambda count, dtype: OnDevice(np.zeros(count, dtype), log),
        cuda=SimpleNamespace(Device=use, get_current_stream=lambda: stream),
    )
    pretended.cuda.runtime = SimpleNamespace(getDeviceCount=lambda: pretended.gpus)
    monkeypatch.setitem(sys.modules, "cupy", pretended)
    return pretended


def test_what_a_gpu_holds_is_brought_there_and_back(cupy: Any) -> None:
    buffers = Buffers(case_of(Collective.ALL_REDUCE, count=3), "cupy", cast(Any, None))
    x, _ = buffers.of("cupy")
    buffers.x[:] = (1, 2, 3)
    buffers.to_device()
    assert list(x.content) == [1, 2, 3] and cupy.log[-1] == "synchronize"
    restore: Callable[[], object] = buffers.keep()
    x.content[:] = 7
    del cupy.log[:]
    buffers.to_host()
    assert list(buffers.result) == [7, 7, 7] and cupy.log[:2] == ["synchronize", "get"]
    restore()
    assert list(x.content) == [1, 2, 3] and cupy.log[-2:] == ["copy", "synchronize"]


def test_ranks_share_the_gpus(cupy: Any) -> None:
    take_gpu(1)
    take_gpu(2)
    assert cupy.log == ["use 1", "use 0"]
    cupy.gpus = 0
    with pytest.raises(ArgumentError, match="cupy finds no GPU"):
        take_gpu(0)


@pytest.mark.usefixtures("cupy")
def test_cupy_has_no_bfloat16() -> None:
    pytest.importorskip("ml_dtypes")
    with pytest.raises(ArgumentError, match="cupy has no bfloat16"):
        Buffers(case_of(Collective.ALL_REDUCE, dtype="bfloat16"), "cupy", cast(Any, None))


@pytest.mark.usefixtures("cupy")
def test_abccl_refuses_what_does_not_say_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "spawn", lambda fn, ranks, args: [fn(*args)])
    result = CliRunner().invoke(bench, ["all_reduce", "--ranks", "1", "--array", "cupy", *FEW])
    assert result.exit_code == 2 and "x must be a numpy array, torch tensor or CuPy array" in result.stderr


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TransportError, match="leave out --array cupy"):
        take_gpu(0)


def test_an_mpi_that_is_not_cuda_aware_is_refused(mpirun: list[str]) -> None:
    script = """
import types
from mpi4py import MPI
from abccl.bench import peers
peers.MPI(types.SimpleNamespace(mpi=lambda: MPI, rank=0))
aware = peers._cuda_aware(MPI)
try:
    peers.MPI(types.SimpleNamespace(mpi=lambda: MPI, rank=0), "cupy")
except peers.ArgumentError as error:
    print("refused:", error)
else:
    assert aware
    print("taken: it is CUDA-aware")
"""
    shown = started([*mpirun, "-n", "1", sys.executable, "-c", script])
    assert "is not CUDA-aware" in shown or "taken" in shown


def test_a_library_without_the_function_is_not_cuda_aware() -> None:
    silent = SimpleNamespace(__file__="/nowhere/mpi.so", COMM_WORLD=None, Get_library_version=lambda: "An MPI 1.0")
    with pytest.raises(ArgumentError, match="An MPI 1.0 is not CUDA-aware"):
        MPI(cast(Any, SimpleNamespace(mpi=lambda: silent, rank=0)), "cupy")


@pytest.mark.parametrize("wrong", [{"registered": True}, {"rivals": ("gloo",)}, {"through": "torch"}])
def test_where_cupy_arrays_do_not_go(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="cupy arrays are passed"):
        Options(Collective.ALL_REDUCE, array="cupy", **wrong).settled(2)
