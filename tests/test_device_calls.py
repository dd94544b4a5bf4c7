"""Communicators with arrays on a device, over the fake driver: collectives, streams, graphs, and what is refused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from device_arrays import Rank, on_devices
from fake_cuda import FakeDriver

import abccl
from abccl.collectives.pinned import PinnedBuffer, PinnedMemory
from abccl.errors import AbcclError, Aborted, ArgumentError, CollectiveError, DeadlineExceeded, Mismatch, TransportError

SIZES = [1, 2, 3]


def values(rank: int, count: int, dtype: str = "float32") -> np.ndarray:
    return ((np.arange(count) * 7 + rank * 3) % 5 + 1).astype(dtype)


@pytest.fixture(params=["cuda_ipc", "staged"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ABCCL_CUDA_TRANSPORT", request.param)
    return str(request.param)


@pytest.mark.parametrize("size", SIZES)
def test_every_collective(monkeypatch: pytest.MonkeyPatch, transport: str, size: int) -> None:
    count = 35

    def body(me: Rank) -> None:
        comm, rank = me.communicator, me.rank
        every = [values(r, count) for r in range(size)]
        x, out = me.array(every[rank]), me.array(np.zeros(count, "float32"))
        comm.all_reduce(x, out=out)
        assert (out.get() == sum(every)).all() and (x.get() == every[rank]).all()
        comm.all_reduce(x, "max")
        assert (x.get() == np.maximum.reduce(every)).all()
        x.put(every[rank])
        comm.all_reduce(x, "avg")
        assert np.allclose(x.get(), sum(every) / size)
        whole = [values(r, count * size, "int64") for r in range(size)]
        part = me.array(np.zeros(count, "int64"))
        comm.reduce_scatter(part, me.array(whole[rank]))
        assert (part.get() == sum(whole)[rank * count : (rank + 1) * count]).all()
        gathered = me.array(np.zeros(count * size, "float32"))
        comm.all_gather(gathered, me.array(every[rank]))
        assert (gathered.get() == np.concatenate(every)).all()
        counts = [count + r for r in range(size)]
        uneven = me.array(np.zeros(sum(counts), "float32"))
        comm.all_gather(uneven, me.array(values(rank, counts[rank])), counts=counts)
        assert (uneven.get() == np.concatenate([values(r, n) for r, n in enumerate(counts)])).all()
        root = size - 1
        x.put(every[rank])
        comm.broadcast(x, root)
        assert (x.get() == every[root]).all()
        x.put(every[rank])
        comm.reduce(x, "sum", root, out=out)
        assert rank != root or (out.get() == sum(every)).all()
        comm.gather(gathered if rank == root else None, x, root)
        assert rank != root or (gathered.get() == np.concatenate(every)).all()
        comm.scatter(part, me.array(whole[root]) if rank == root else None, root)
        assert (part.get() == whole[root][rank * count : (rank + 1) * count]).all()
        exchanged = me.array(np.zeros(count * size, "int64"))
        comm.all_to_all(exchanged, me.array(whole[rank]))
        assert (exchanged.get() == np.concatenate([w[rank * count : (rank + 1) * count] for w in whole])).all()
        assert comm.devices is not None and transport in str(comm.devices)
        assert "estimated" in str(comm.devices.explain("all_reduce", "25MB"))

    on_devices(monkeypatch, size, body)


def test_work_follows_the_stream_of_the_array(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    def body(me: Rank) -> None:
        driver, count = me.driver, 1000
        stream, other = driver.create_stream(), driver.create_stream()
        x = me.array(np.zeros(count, "float32"), stream=stream)
        me.communicator.all_reduce(x)  # meets
        source, result = me.array(values(me.rank, count)), me.array(np.zeros(count, "float32"))
        for asynchronous in (False, True):
            driver.copy(x.address, source.address, x.nbytes, stream)
            work = me.communicator.all_reduce(x, async_op=asynchronous)
            if asynchronous:
                work.wait()
            driver.copy(result.address, x.address, x.nbytes, stream)
            assert (result.get() == sum(values(r, count) for r in range(me.size))).all()
        for one in (stream, other) * 3:  # runs on different streams follow each other
            x.stream = one
            driver.copy(x.address, source.address, x.nbytes, one)
            me.communicator.all_reduce(x)
            driver.copy(result.address, x.address, x.nbytes, one)
            driver.synchronize(one)
        assert (result.get() == sum(values(r, count) for r in range(me.size))).all()

    on_devices(monkeypatch, 2, body)


def test_asynchronous_work(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    def body(me: Rank) -> None:
        comm, wanted = me.communicator, sum(values(r, 5000) for r in range(me.size))
        arrays = [me.array(values(me.rank, 5000)) for _ in range(4)]
        works = [comm.all_reduce(x, async_op=True) for x in arrays]
        assert all(work.finishes_within(60.0) for work in works)
        assert all(work.is_completed() for work in works)
        assert all((x.get() == wanted).all() for x in arrays)
        if transport == "cuda_ipc":
            work = comm.all_reduce(arrays[0], async_op=True)
            work.synchronize()

    on_devices(monkeypatch, 3, body)


def test_a_work_outlives_its_communicator(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    works = []

    def body(me: Rank) -> None:
        x = me.array(values(me.rank, 10))
        works.append(me.communicator.all_reduce(x, async_op=True))
        works[-1].wait()
        me.driver.synchronize_device()

    on_devices(monkeypatch, 2, body)
    assert all(work.is_completed() for work in works)


def test_persistent_and_warm_calls(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    def body(me: Rank) -> None:
        x = me.array(values(me.rank, 300))
        step = me.communicator.all_reduce_init(x)
        for turn in range(5):
            x.put(values(me.rank + turn, 300))
            step()
            assert (x.get() == sum(values(r + turn, 300) for r in range(me.size))).all()
        for turn in range(30):  # more pairs of arrays than a plan keeps commands for
            y = me.array(values(me.rank + turn, 300))
            me.communicator.all_reduce(y)
            assert (y.get() == sum(values(r + turn, 300) for r in range(me.size))).all()

    on_devices(monkeypatch, 2, body)


def test_messages(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    def body(me: Rank) -> None:
        comm, rank, peer = me.communicator, me.rank, 1 - me.rank
        sent, received = me.array(values(rank, 70_000)), me.array(np.zeros(70_000, "float32"))
        work = comm.send(sent, peer, tag=7, async_op=True)
        assert comm.recv(received, tag=7) == peer
        work.wait()
        assert (received.get() == values(peer, 70_000)).all()
        later = comm.recv(received, peer, async_op=True)
        comm.send(me.array(values(rank + 5, 70_000)), peer)
        later.wait()
        assert later.source == peer and (received.get() == values(peer + 5, 70_000)).all()
        host = np.zeros(3, "float32")  # to host memory from a device
        work = comm.send(me.array([1, 2, 3], "float32"), peer, async_op=True)
        comm.recv(host, peer)
        work.wait()
        assert host.tolist() == [1, 2, 3]

    on_devices(monkeypatch, 2, body)


def test_graphs_are_replayed_on_changing_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(me: Rank) -> None:
        comm, driver, count = me.communicator, me.driver, 200
        stream = driver.create_stream()
        x, y = me.array(np.zeros(count, "int32"), stream=stream), me.array(np.zeros(count, "int32"), stream=stream)
        comm.all_reduce(x)
        comm.all_reduce(x, out=y, algorithm="ring")
        driver.synchronize_device()
        comm.barrier()
        driver.begin_capture(stream)
        comm.all_reduce(x)
        comm.all_reduce(x, out=y, algorithm="ring")
        graph = driver.end_capture(stream)
        for turn in range(1000):
            if turn % 100 == 0:
                driver.synchronize_device()
                x.put(np.arange(count) + me.rank + turn)
                driver.launch_graph(graph, stream)
                once = sum(np.arange(count) + r + turn for r in range(me.size))
                assert (x.get() == once).all() and (y.get() == once * me.size).all()
                x.put(np.zeros(count))
            else:
                driver.launch_graph(graph, stream)
        comm.all_reduce(x)  # and between replays an ordinary call
        assert (x.get() == 0).all()

    on_devices(monkeypatch, 3, body)


def test_asynchronous_calls_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(me: Rank) -> None:
        comm, driver = me.communicator, me.driver
        stream = driver.create_stream()
        arrays = [me.array(np.zeros(100, "int32"), stream=stream) for _ in range(2)]
        result = me.array(np.zeros(100, "int32"))
        for x in arrays:
            comm.all_reduce(x, async_op=True).synchronize()
        comm.barrier()
        driver.begin_capture(stream)
        works = [comm.all_reduce(x, async_op=True) for x in arrays]
        for work in works:
            work.wait()
        driver.copy(result.address, arrays[1].address, result.nbytes, stream)
        graph = driver.end_capture(stream)  # refuses what has not joined
        for turn in range(20):
            for x in arrays:
                x.put(np.full(100, turn + me.rank))
            driver.launch_graph(graph, stream)
            assert (result.get() == sum(turn + r for r in range(me.size))).all()

    on_devices(monkeypatch, 2, body)


def test_a_message_needs_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(me: Rank) -> None:
        x = me.array(np.full(5, me.rank, "int64"))
        if me.rank == 0:
            me.communicator.send(x, 1)
        elif me.rank == 1:
            me.communicator.recv(x, 0)
            assert (x.get() == 0).all()
        assert me.communicator.devices is None

    on_devices(monkeypatch, 3, body)


def test_a_capture_leaves_the_order_of_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(me: Rank) -> None:
        comm, driver = me.communicator, me.driver
        streams = [driver.create_stream() for _ in range(3)]
        first, captured, last = (me.array(np.ones(100, "float32"), stream=stream) for stream in streams)
        for x in (first, captured, last):
            comm.all_reduce(x)
        driver.synchronize_device()
        comm.barrier()
        for _ in range(20):
            comm.all_reduce(first, "max")
            driver.begin_capture(streams[1])
            comm.all_reduce(captured, "max")
            driver.destroy_graph(driver.end_capture(streams[1]))
            comm.all_reduce(last, "max")
        assert (first.get() == me.size).all() and (last.get() == me.size).all()

    on_devices(monkeypatch, 2, body, timeout=20.0)


def test_a_graph_that_a_peer_does_not_launch_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = threading.Event()

    def body(me: Rank) -> None:
        comm, driver, stream = me.communicator, me.driver, me.driver.create_stream()
        x = me.array(np.ones(100, "float32"), stream=stream)
        comm.all_reduce(x)
        driver.synchronize_device()
        comm.barrier()
        driver.begin_capture(stream)
        comm.all_reduce(x)
        graph = driver.end_capture(stream)
        comm.set_timeout(0.2)
        comm.barrier()
        if me.rank == 0:
            driver.launch_graph(graph, stream)
            comm.close()  # waits, and lets go what would wait for ever
            driver.synchronize(stream)
            waited.set()
        else:
            assert waited.wait(60)

    with pytest.raises(AbcclError):  # the barrier at the end
        on_devices(monkeypatch, 2, body)


def test_a_broken_device_is_closed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(me: Rank) -> None:
        comm = me.communicator
        x = me.array(np.ones(10, "float32"))
        comm.all_reduce(x)
        me.driver.synchronize_device()
        comm.barrier()
        if me.rank == 0:
            freed = me.driver.allocate(64)
            me.driver.free(freed)
            with pytest.raises(TransportError):
                me.driver.fill(freed, 0, 64, 0)  # an error that stays
            comm.close()
        else:
            with pytest.raises(CollectiveError):
                comm.barrier()

    before = set(threading.enumerate())
    with pytest.raises(AbcclError):  # the barrier at the end
        on_devices(monkeypatch, 2, body)
    assert not [thread for thread in set(threading.enumerate()) - before if "watch" in thread.name]


def test_what_one_rank_has_done_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(me: Rank) -> None:
        x = me.array(np.ones(10, "float32"))
        made: list[int] = []
        create = me.driver.create_event
        me.driver.create_event = lambda timing=False: made.append(create(timing)) or made[-1]
        for _ in range(100):
            me.communicator.all_reduce(x)
        assert len(made) < 10 and not me.communicator.devices._transport.watch._entries

    on_devices(monkeypatch, 1, body)


def test_pinned_buffers_of_threads_are_their_own() -> None:
    driver = FakeDriver(same_process=True)
    driver.make_current()
    memory = PinnedMemory(driver)
    kept = [memory.take(100) for _ in range(4)]
    free = {buffer.address for buffer in kept}
    del kept

    asked = threading.Barrier(2)
    is_done = driver.is_done

    def slow(event: int) -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):
            asked.wait(0.2)  # where both could be in `take`, if they could
        return is_done(event)

    def take(_: int) -> PinnedBuffer:
        driver.make_current()
        return memory.take(100)

    driver.is_done = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(take, range(2))
    assert first.address != second.address and {first.address, second.address} <= free
    driver.is_done = is_done  # type: ignore[method-assign]
    del first, second
    memory.close()
    driver.close_all()


def test_a_first_run_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(me: Rank) -> None:
        stream = me.driver.create_stream()
        x = me.array(np.zeros(10, "float32"), stream=stream)
        me.communicator.all_reduce(x)
        me.driver.synchronize_device()
        me.communicator.barrier()
        me.driver.begin_capture(stream)
        with pytest.raises(ArgumentError, match="run it once on such arrays before the capture"):
            me.communicator.all_reduce(x, "max", algorithm="ring")
        me.driver.end_capture(stream)
        me.communicator.all_reduce(x)
        me.driver.synchronize_device()

    on_devices(monkeypatch, 2, body)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(me: Rank) -> None:
        comm = me.communicator
        x, host = me.array(np.zeros(10, "float32")), np.zeros(10, "float32")
        with pytest.raises(ArgumentError, match="out is on cpu, and this rank's device is cuda:0"):
            comm.all_reduce(x, out=host)
        strided = me.array(np.zeros((4, 4), "float32"))
        strided.strides, strided.shape = (16, 8), (4, 2)
        with pytest.raises(ArgumentError, match=r"not contiguous: pass cupy.ascontiguousarray\(x\)"):
            comm.all_reduce(strided)
        x.read_only = True
        with pytest.raises(ArgumentError, match="read-only"):
            comm.all_reduce(x)
        x.read_only = False
        comm.all_reduce(x)

    on_devices(monkeypatch, 2, body)


def test_ranks_that_call_different_things(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    def body(me: Rank) -> str:
        x = me.array(np.zeros(1000, "float32"))
        me.communicator.all_reduce(x)
        work = me.communicator.all_reduce(x, "max" if me.rank else "min", async_op=True)
        with pytest.raises(Mismatch) as caught:
            work.finishes_within(60.0)
        with pytest.raises(CollectiveError):  # it is broken
            me.communicator.all_reduce(x)
        return str(caught.value)

    def outcome(me: Rank) -> str:
        try:
            return body(me)
        finally:
            me.driver.synchronize_device()  # nothing waits for ever

    with pytest.raises(Mismatch):
        on_devices(monkeypatch, 2, lambda me: (outcome(me), me.communicator.all_reduce(me.array([1.0])))[0])


def told(call: Callable[[], object]) -> Exception:
    """What the call raises at last; peers tell it when they can."""
    while True:
        try:
            call()
        except CollectiveError as error:
            return error


@pytest.mark.parametrize("how", ["deadline", "abort"])
def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch, transport: str, how: str) -> None:
    kind = DeadlineExceeded if how == "deadline" else Aborted

    def body(me: Rank) -> None:
        comm = me.communicator
        x = me.array(np.zeros(1000, "float32"))
        comm.all_reduce(x)
        me.driver.synchronize_device()
        comm.barrier()
        if how == "deadline":
            comm.set_timeout(0.05)
        if me.rank == 0:
            work = comm.all_reduce(x, async_op=True)
            with pytest.raises(kind):
                work.finishes_within(60.0)
        elif how == "abort":
            comm.abort("enough")
        else:
            assert isinstance(told(comm.devices._transport.progress), kind)
        assert isinstance(told(lambda: comm.all_reduce(x)), CollectiveError)
        me.driver.synchronize_device()

    with pytest.raises(CollectiveError):  # the barrier at the end
        on_devices(monkeypatch, 2, body)


def test_the_choice_tells_what_was_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABCCL_CUDA_TRANSPORT", raising=False)
    monkeypatch.setenv("ABCCL_CUDA_SYNC", "spin")

    def body(me: Rank) -> str:
        x = me.array(values(me.rank, 10))
        me.communicator.all_reduce(x)
        assert (x.get() == sum(values(r, 10) for r in range(me.size))).all()
        return str(me.communicator.devices)

    told = on_devices(monkeypatch, 2, body)[0]
    assert "over shm_staged; not cuda_ipc" in told and "share a GPU" in told and "not nccl" in told


def test_what_is_asked_for_is_had_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_CUDA_TRANSPORT", "nvlink")

    def body(me: Rank) -> None:
        with pytest.raises(TransportError, match="there are cuda_ipc"):
            me.communicator.all_reduce(me.array([1.0]))

    on_devices(monkeypatch, 2, body)


def test_without_a_driver_the_error_says_what_is_missing() -> None:
    class Array:
        dtype = np.dtype("float32")
        __cuda_array_interface__ = {"shape": (1,), "typestr": "<f4", "data": (64, False), "version": 3}

    with abccl.init() as comm, pytest.raises(TransportError, match="driver"):
        comm.all_reduce(Array())
