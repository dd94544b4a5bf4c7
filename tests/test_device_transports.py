"""What carries messages between devices, over the fake driver: NCCL, kernels that wait, and what all have in common."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import kernels_on_cpu
import numpy as np
import pytest
import spin_on_cpu
from device_arrays import DeviceArray, Rank, on_devices
from fake_cuda import FakeDriver
from fake_nccl import FakeNccl, Network

from abccl.cuda.driver import WAIT
from abccl.errors import ArgumentError, ClosedError, CollectiveError, DeadlineExceeded
from abccl.transports import cuda_ipc, device, nccl_meeting


def values(rank: int, count: int, dtype: str = "float32") -> np.ndarray:
    return ((np.arange(count) * 7 + rank * 3) % 5 + 1).astype(dtype)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Network:
    """NCCL, one for each rank's device."""
    network = Network()
    monkeypatch.setenv("ABCCL_CUDA_TRANSPORT", "nccl")
    monkeypatch.setattr(nccl_meeting, "find_nccl", lambda: FakeNccl(network, device.driver_of(0)))
    return network


@pytest.fixture(scope="module")
def all_kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels that do not wait for each other, and those that do."""
    libraries = kernels_on_cpu.library(), spin_on_cpu.library(tmp_path_factory.mktemp("spin"))

    def run_kernel(*launch: Any) -> int:
        return min(library.run_kernel(*launch) for library in libraries)

    return SimpleNamespace(run_kernel=run_kernel)


@pytest.fixture
def spin(monkeypatch: pytest.MonkeyPatch, all_kernels: Any) -> None:
    monkeypatch.setenv("ABCCL_CUDA_TRANSPORT", "cuda_ipc")
    monkeypatch.setenv("ABCCL_CUDA_SYNC", "spin")
    monkeypatch.setattr(cuda_ipc.compiler, "compile", spin_on_cpu.no_image)
    make = FakeDriver.__init__
    monkeypatch.setattr(FakeDriver, "__init__", lambda *args, **more: make(*args, **more, kernels=all_kernels))


@pytest.mark.parametrize("algorithm", [None, "ring", "native"])
def test_nccl(monkeypatch: pytest.MonkeyPatch, nccl: Network, algorithm: str | None) -> None:
    def body(me: Rank) -> None:
        for count in (1, 1000):
            every = [values(rank, count) for rank in range(me.size)]
            x, out = me.array(every[me.rank]), me.array(np.zeros(count, "float32"))
            for op, wanted in (("sum", sum(every)), ("avg", sum(every) / me.size), ("max", np.maximum(*every))):
                me.communicator.all_reduce(x, op, out=out, algorithm=algorithm)
                assert (out.get() == wanted).all(), op
                assert (x.get() == every[me.rank]).all(), op
        assert "over nccl" in str(me.communicator.devices)

    on_devices(monkeypatch, 2, body, shared=False)
    assert [one.ended for one in nccl.communicators] == [["destroyed"]] * 2


@pytest.mark.parametrize("count", [10, 100_000])
def test_kernels_that_wait(monkeypatch: pytest.MonkeyPatch, spin: None, count: int) -> None:
    def body(me: Rank) -> None:
        comm, every = me.communicator, [values(rank, count) for rank in range(me.size)]
        x, out = me.array(every[me.rank]), me.array(np.zeros(count, "float32"))
        for algorithm in (None, "ring", "two_shot"):
            for _ in range(2):
                out.put(np.zeros(count))
                comm.all_reduce(x, out=out, algorithm=algorithm)
                assert (out.get() == sum(every)).all(), algorithm
        gathered = me.array(np.zeros(count * me.size, "float32"))
        comm.all_gather(gathered, x)
        assert (gathered.get() == np.concatenate(every)).all()
        assert comm.devices._transport.sync == "spin"

    on_devices(monkeypatch, 2, body, shared=False)


def failing(call: Callable[[], object]) -> CollectiveError:
    """What the call raises at last."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            call()
        except CollectiveError as error:
            return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("algorithm", ["two_shot", "ring"])
def test_kernels_that_wait_in_vain(monkeypatch: pytest.MonkeyPatch, spin: None, algorithm: str) -> None:
    def body(me: Rank) -> None:
        comm, x = me.communicator, me.array(np.zeros(1000, "float32"))
        comm.all_reduce(x, algorithm=algorithm)
        me.driver.synchronize_device()
        comm.barrier()
        comm.set_timeout(0.2)
        if me.rank == 0:
            work = comm.all_reduce(x, algorithm=algorithm, async_op=True)
            end = me.driver.create_event()
            me.driver.record(end, work.stream)
            error = failing(lambda: work.finishes_within(60.0))
            until = time.monotonic() + 30  # long before the kernels give up
            while not me.driver.is_done(end):
                assert time.monotonic() < until, "a kernel still waits"
                time.sleep(0.001)
        else:
            error = failing(comm.devices._transport.progress)
        seen.append(error)

    seen: list[CollectiveError] = []
    with pytest.raises(CollectiveError):  # the barrier at the end
        on_devices(monkeypatch, 2, body, shared=False)
    assert [type(error) for error in seen] == [DeadlineExceeded] * 2


def test_a_kernel_that_gives_up_says_for_whom_it_waited(monkeypatch: pytest.MonkeyPatch, spin: None) -> None:
    whole = cuda_ipc.Spin
    monkeypatch.setattr(cuda_ipc, "Spin", lambda *args: whole(*args[:4], 0.1, *args[5:]))

    def body(me: Rank) -> None:
        comm, x = me.communicator, me.array(np.zeros(1000, "float32"))
        side = comm._device_side(x, "all_reduce")  # meets, and runs nothing
        if me.rank == 0:
            comm.all_reduce(x, algorithm="ring")
        error = failing(side._transport.progress)
        assert isinstance(error, DeadlineExceeded) and "waited 0.1 s for a message from rank 1, in vain" in str(error)
        me.driver.synchronize_device()
        seen.append(me.rank)

    seen: list[int] = []
    with pytest.raises(CollectiveError):  # the barrier at the end
        on_devices(monkeypatch, 2, body, shared=False)
    assert sorted(seen) == [0, 1]


def test_runs_on_different_streams_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_CUDA_TRANSPORT", "cuda_ipc")

    def body(me: Rank) -> None:
        comm, driver, count = me.communicator, me.driver, 1000
        first, second, third = (driver.create_stream() for _ in range(3))
        held = DeviceArray(driver, np.zeros(1, "int32"))
        x, y, z = (me.array(values(me.rank, count)) for _ in range(3))
        x.stream = y.stream = first
        comm.all_reduce(x, out=y)
        z.stream = second
        comm.all_reduce(y, out=z)
        y.put(np.zeros(count))
        z.put(np.zeros(count))
        driver.synchronize_device()
        comm.barrier()

        ends = [driver.create_event() for _ in range(2)]
        driver.operate(first, [(WAIT, held.address, 1)])
        x.stream = y.stream = first
        comm.all_reduce(x, out=y)
        driver.record(ends[0], first)
        y.stream = z.stream = second  # and nothing in it waits for the first stream
        comm.all_reduce(y, out=z)
        driver.record(ends[1], second)
        comm.barrier()  # all ranks have both enqueued
        until = time.monotonic() + 0.3  # for the wrong one to come to an end
        while time.monotonic() < until and not driver.is_done(ends[1]):
            time.sleep(0.01)
        early = driver.is_done(ends[1])
        driver.write(third, held.address, 1)
        for end in ends:
            driver.synchronize_event(end)
        assert not early
        total = sum(values(rank, count) for rank in range(me.size))
        assert (y.get() == total).all() and (z.get() == total * me.size).all()

    on_devices(monkeypatch, 2, body)


def test_a_workspace_outlives_its_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_CUDA_TRANSPORT", "cuda_ipc")
    closed = threading.Barrier(2)
    freed: list[int] = []
    free = FakeDriver.free

    def noting(driver: FakeDriver, address: int) -> None:
        freed.append(address)
        free(driver, address)

    def body(me: Rank) -> None:
        comm = me.communicator
        x = me.array(values(me.rank, 100))
        comm.all_reduce(x)
        me.driver.synchronize_device()
        comm.barrier()
        own.append(workspace := comm.devices._transport.wire.workspaces[me.rank])
        if me.rank == 0:
            comm.close()
            early = workspace in freed
            closed.wait(60)
            assert not early
        else:
            closed.wait(60)
            assert not set(own) & set(freed)
            comm.close()
            assert set(own) <= set(freed)

    own: list[int] = []
    monkeypatch.setattr(FakeDriver, "free", noting)
    with pytest.raises(ClosedError):  # the barrier at the end
        on_devices(monkeypatch, 2, body)
    assert len(own) == 2 and all(freed.count(address) == 1 for address in own)


def test_messages_from_every_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    drivers: dict[tuple[int, int], FakeDriver] = {}

    def body(me: Rank) -> None:
        comm, rank, count = me.communicator, me.rank, 5000
        other = FakeDriver(1, same_process=True, uuid=b"another  %07d" % rank)
        other.make_current()
        thread = threading.get_ident()
        drivers[thread, 0], drivers[thread, 1] = me.driver, other
        comm.barrier()
        if rank == 0:
            monkeypatch.setattr(device, "driver_of", lambda ordinal: drivers[threading.get_ident(), ordinal])
        comm.barrier()
        arrays = [DeviceArray(driver, np.zeros(count, "float32")) for driver in (me.driver, other)]
        for source in (0, 1, 0):
            for to in (0, 1):
                if rank == 0:
                    arrays[source].put(values(source * 2 + to, count))
                    comm.send(arrays[source], 1)
                else:
                    comm.recv(arrays[to], 0)
                    assert (arrays[to].get() == values(source * 2 + to, count)).all()
        assert sorted(comm._device_messages) == [0, 1] and comm.devices is None
        comm.barrier()
        comm.close()
        other.close_all()

    with pytest.raises(ClosedError):  # the barrier at the end
        on_devices(monkeypatch, 2, body)


def test_a_transport_that_the_host_drives_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_CUDA_TRANSPORT", "staged")

    def body(me: Rank) -> None:
        comm, driver, stream = me.communicator, me.driver, me.driver.create_stream()
        every = [values(rank, 100) for rank in range(me.size)]
        x, out = me.array(every[me.rank], stream=stream), me.array(np.zeros(100, "float32"), stream=stream)
        comm.all_reduce(x, out=out)
        driver.synchronize_device()
        comm.barrier()
        for asynchronous in (False, True):
            driver.begin_capture(stream)
            with pytest.raises(ArgumentError, match="driven by the host, and can not be in a graph"):
                comm.all_reduce(x, out=out, async_op=asynchronous)
            driver.copy(out.address, x.address, x.nbytes, stream)
            graph = driver.end_capture(stream)  # is as good as before
            driver.launch_graph(graph, stream)
            assert (out.get() == every[me.rank]).all()
            comm.all_reduce(x, out=out)
            assert (out.get() == sum(every)).all()

    on_devices(monkeypatch, 2, body)
