"""What is ordered behind what when torch's process group is given CUDA tensors, over stand-ins: see `stream_order`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

import abccl

torch = pytest.importorskip("torch")
c10d: Any = torch.distributed.distributed_c10d

from stream_order import DEVICE, Copies, Order, StandInCommunicator  # noqa: E402

from abccl.buckets import GradientBuckets  # noqa: E402
from abccl.collectives.buckets.averages import Averages, Halved  # noqa: E402
from abccl.collectives.torch import futures, process_group, streams  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[Order]:
    order = Order()
    for name in ("device_of", "here", "wait", "another", "future", "host_memory"):
        monkeypatch.setattr(streams, name, getattr(order, name))
    monkeypatch.setattr(torch.cuda, "current_stream", order.current_stream)
    with Copies(order):
        yield order


@pytest.fixture
def group(order: Order) -> Iterator[Any]:
    group = process_group.ProcessGroup(StandInCommunicator(order), None)  # type: ignore[arg-type]
    yield group
    group.shutdown()


def strided(rows: int = 2) -> Any:
    """A tensor that must be copied to be flat."""
    return torch.ones(3, rows).t()


def later(options: Any) -> Any:
    options.asyncOp = True
    return options


def now(options: Any) -> Any:
    options.asyncOp = False
    return options


CALLS: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "all_reduce": (c10d.AllreduceOptions, lambda g, o: g.allreduce([strided()], o)),
    "all_reduce of several": (
        c10d.AllreduceCoalescedOptions,
        lambda g, o: g.allreduce_coalesced([strided(), strided()], o),
    ),
    "broadcast": (lambda: root(c10d.BroadcastOptions(), 1), lambda g, o: g.broadcast([strided()], o)),
    "reduce": (c10d.ReduceOptions, lambda g, o: g.reduce([strided()], o)),
    "all_gather": (c10d.AllgatherOptions, lambda g, o: g.allgather([[strided(), strided()]], [strided()], o)),
    "all_gather_single": (c10d.AllgatherOptions, lambda g, o: g.all_gather_single(strided(4), strided(), o)),
    "all_gather_single of several": (
        c10d.AllgatherOptions,
        lambda g, o: g.all_gather_single_coalesced([strided(4)], [strided()], o),
    ),
    "reduce_scatter": (
        c10d.ReduceScatterOptions,
        lambda g, o: g.reduce_scatter([strided()], [[strided(), strided()]], o),
    ),
    "reduce_scatter_single": (
        c10d.ReduceScatterOptions,
        lambda g, o: g.reduce_scatter_single(strided(), strided(4), o),
    ),
    "reduce_scatter_single of several": (
        c10d.ReduceScatterOptions,
        lambda g, o: g.reduce_scatter_single_coalesced([strided()], [strided(4)], o),
    ),
    "gather": (c10d.GatherOptions, lambda g, o: g.gather([[strided(), strided()]], [strided()], o)),
    "scatter": (c10d.ScatterOptions, lambda g, o: g.scatter([strided()], [[strided(), strided()]], o)),
    "all_to_all": (
        c10d.AllToAllOptions,
        lambda g, o: g.alltoall([strided(), strided()], [strided(), strided()], o),
    ),
    "all_to_all_single": (c10d.AllToAllOptions, lambda g, o: g.all_to_all_single(strided(), strided(), [], [], o)),
}


def root(options: Any, rank: int) -> Any:
    options.rootRank = rank
    return options


def check_order(order: Order, collective: str, side: str, back: str) -> None:
    """Copies to flat buffers by the caller's stream, then the operation, then copies back by the stream `back`."""
    operations, there, home = order.named(collective), order.named("to"), order.named("back")
    assert operations and home
    for operation in operations:
        assert order.stream_of[operation] == side
        assert order.before[operation] >= set(there)
    assert {order.stream_of[copy] for copy in there} <= {"caller"}
    for copy in home:
        assert order.stream_of[copy] == back and order.before[copy] >= set(operations)


@pytest.mark.parametrize("name", CALLS)
def test_synchronous(order: Order, group: Any, name: str) -> None:
    """All of it is enqueued on the current stream, and the call returns no Work."""
    options, call = CALLS[name]
    with order.on("caller"):
        assert call(group, now(options())) is None
    check_order(order, name.split(" of ")[0].removesuffix("_single"), "caller", "caller")


@pytest.mark.parametrize("name", CALLS)
def test_asynchronous(order: Order, group: Any, name: str) -> None:
    """The operation is on the side stream, behind the caller's; what waits comes behind it, and the host does not."""
    options, call = CALLS[name]
    with order.on("caller"):
        before = order.enqueue("earlier")
        work = call(group, later(options()))
        works = group._communicator.works
        assert all(before in order.before[each.name] for each in works)
        assert before in order.before[works[0].name] and not order.named("back")
        unordered = order.enqueue("meanwhile")
        assert not {each.name for each in works} & order.before[unordered]
        assert work.wait() is True
        ordered = order.enqueue("afterwards")
    check_order(order, name.split(" of ")[0].removesuffix("_single"), "side", "caller")
    assert order.before[ordered] >= {*order.named("back"), *(each.name for each in works)}
    assert not any(each.host_waits for each in works)


@pytest.mark.parametrize("name", CALLS)
def test_copies_back_by_another_stream_are_recorded(order: Order, group: Any, name: str) -> None:
    """Of each, the tensor and the flat buffer that was made on the caller's stream; nothing else is."""
    options, call = CALLS[name]
    with order.on("caller"):
        work = call(group, later(options()))
    assert not order.kept
    with order.on("another"):
        work.wait()
    assert {stream for stream, _ in order.kept} == {"another"}
    assert len(order.kept) == 2 * len(order.named("back"))


def issue(group: Any, tensor: Any) -> Any:
    return group.allreduce([tensor], later(c10d.AllreduceOptions()))


def test_waits_of_several_streams(order: Order, group: Any) -> None:
    """The first wait copies back; a wait by another stream comes behind that copy, which happens once."""
    x = strided()
    with order.on("caller"):
        work = issue(group, x)
    for stream in ("first", "second"):
        with order.on(stream):
            work.block_current_stream() if stream == "first" else work.synchronize()
            after = order.enqueue("after")
            assert set(order.named("back")) <= order.before[after]
    (back,) = order.named("back")
    assert order.stream_of[back] == "first" and torch.equal(x, 2 * strided())
    # The flat buffer was made on the caller's stream, and is read on another: the allocator has been told.
    assert {stream for stream, _ in order.kept} == {"first"} and len(order.kept) == 2


def test_a_wait_with_a_timeout(order: Order, group: Any) -> None:
    """The host waits, as with NCCL's; what was not finished goes on."""
    work = issue(group, x := strided())
    (part,) = group._communicator.works
    with pytest.raises(RuntimeError, match="not finished after 0.5 s") as caught:
        work.wait(timedelta(seconds=0.5))
    assert isinstance(caught.value, abccl.DeadlineExceeded)
    assert part.host_waits == 1 and not order.named("back")
    part.completed = True
    assert work.wait(timedelta(seconds=0.5)) and part.host_waits == 2
    assert torch.equal(x, 2 * strided())


def test_is_completed(order: Order, group: Any) -> None:
    """Asks the device. Copies back are part of the operation: the first question after it starts them."""
    work = issue(group, strided())
    (part,) = group._communicator.works
    assert not work.is_completed() and work.exception() is None and not order.named("back")
    part.completed, order.device_is_done = True, False
    assert not work.is_completed() and len(order.named("back")) == 1
    order.device_is_done = True
    assert work.is_completed() and work.is_success() and len(order.named("back")) == 1
    assert part.host_waits == 0


def test_a_future(order: Order, group: Any) -> None:
    """It is set at once; callbacks come behind the operation and the copies back, the caller's stream does not."""
    seen: list[Any] = []

    def callback(future: Any) -> Any:
        seen.append(order.enqueue("callback"))
        return future.value()

    with order.on("caller"):
        work = issue(group, x := strided())
        (part,) = group._communicator.works
        future = work.get_future()
        assert future.done() and work.get_future() is future
        then = future.then(callback)
        unordered = order.enqueue("meanwhile")
        assert part.name not in order.before[unordered]
        (back,) = order.named("back")
        assert {part.name, back} <= order.before[seen[0]] and order.stream_of[back] != "caller"
        assert then.wait()[0] is x
        ordered = order.enqueue("afterwards")
        assert {part.name, back, seen[0]} <= order.before[ordered]
        # The future has copied back: a wait does not, and comes behind it all the same.
        with order.on("another"):
            work.wait()
            assert back in order.before[order.enqueue("last")]
    assert order.named("back") == [back] and part.host_waits == 0


def test_a_future_of_what_the_host_drives(order: Order, group: Any) -> None:
    """As long as the host has a part to do, a thread waits for that; nobody who asks for a future does."""
    group._communicator.host_driven = True
    work = issue(group, torch.ones(3))
    future = work.get_future()
    assert not future.done() and not work.is_completed()
    group._communicator.works[0].come.set()
    assert future.wait()[0].tolist() == [2.0] * 3


def test_a_failure(order: Order, group: Any) -> None:
    work = issue(group, strided())
    (part,) = group._communicator.works
    part.error, part.completed = abccl.PeerLost("rank 1 is gone"), True
    assert work.is_completed() and not work.is_success() and "rank 1" in str(work.exception())
    with pytest.raises(RuntimeError, match="rank 1 is gone") as caught:
        work.wait()
    assert isinstance(caught.value, abccl.PeerLost)
    seen: list[Any] = []

    def callback(future: Any) -> None:
        with pytest.raises(abccl.PeerLost, match="rank 1 is gone"):
            future.value()
        seen.append(future)

    work.get_future().then(callback).wait()
    assert seen and not order.named("back")


@pytest.mark.parametrize("count", [3, 3000])
def test_messages(order: Order, group: Any, count: int) -> None:
    """They go through host memory. Who waits first copies to the device; others that wait come behind that copy."""
    x = torch.zeros(2, count).t()
    received = group.recv([x], 1)
    (message,) = group._communicator.works
    with order.on("first"):
        assert not received.is_completed()
        message.come.set()
        assert received.is_completed() and received._source_rank() == 7
    with order.on("second"):
        received.wait()
        after = order.enqueue("after")
    (back,) = order.named("back")
    assert order.stream_of[back] == "first" and back in order.before[after]
    assert [stream for stream, _ in order.kept] == ["first"]
    with order.on("caller"):
        before = order.enqueue("before")
        sent = group.send([torch.ones(count)], 1)
    (copy,) = order.named("to")
    assert before in order.before[copy] and type(sent) is futures.StreamWork
    group._communicator.works[1].come.set()
    sent.wait()
    assert [id(x) for x in group._communicator.moved] == [id(x) for x in order.on_host]


def test_barriers(order: Order, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the host, unless they name a device: then the host waits for what its current stream was given."""
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(*shape))
    on_device, options = c10d.BarrierOptions(), c10d.BarrierOptions
    on_device.device = DEVICE
    assert group.barrier(now(options())) is None and order.named("barrier")
    before = order.enqueue("before")
    assert group.barrier(now(on_device)) is None
    (part,) = group._communicator.works
    assert part.host_waits == 1 and before in order.before[part.name]
    work = group.barrier(later(on_device))
    assert group._communicator.works[1].host_waits == 0 and not work.is_completed()
    work.wait()
    assert group._communicator.works[1].host_waits == 1 and work.is_completed()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_timeout_of_one_call(order: Order, group: Any, asynchronous: bool) -> None:
    options = c10d.AllreduceOptions()
    options.asyncOp, options.timeout = asynchronous, timedelta(seconds=3)
    with order.on("caller"):
        work = group.allreduce([torch.ones(2)], options)
        assert (work is not None) is asynchronous
        if work is not None:
            work.wait()
        (part,) = group._communicator.works
        assert part.name in order.before[order.enqueue("after")]
    assert group._communicator.timeouts == [3.0] and group._communicator.timeout == 60.0


def test_several_devices() -> None:
    """Tensors of several devices in one call are refused with nothing sent; meta stands for CUDA."""
    order = Order()
    group = process_group.ProcessGroup(StandInCommunicator(order), None)  # type: ignore[arg-type]
    host, other = torch.ones(4), torch.ones(4, device="meta")
    calls: list[Callable[[], Any]] = [
        lambda: group.allreduce_coalesced([host, other]),
        lambda: group.allgather([[host, other]], [host]),
        lambda: group.allgather_coalesced([[host, other]] * 2, [host, other]),
        lambda: group.all_gather_single_coalesced([host], [other]),
        lambda: group.reduce_scatter([host], [[host, other]]),
        lambda: group.reduce_scatter_single_coalesced([host, other], [host, other]),
        lambda: group.gather([[host, other]], [host]),
        lambda: group.scatter([host], [[host, other]]),
        lambda: group.alltoall([host, other], [host, host]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="tensors on cpu and meta in one call: all must be on one device"):
            call()
    assert not order.before
    with pytest.raises(abccl.ArgumentError, match="cuda.*torch.empty"):
        group._get_backend(DEVICE).allocate_tensor(4, dtype=torch.float32, device=DEVICE)
    group.shutdown()


def test_which_works_are_of_a_stream() -> None:
    assert streams.device_of([[torch.ones(1)]]) is None is streams.device_of([[]])
    assert type(futures.work_of([], [[]], None, None)) is futures.GroupWork


def test_buckets_on_a_device() -> None:
    """DDP's hook keeps 16-bit copies where the gradients are, and refuses 8 bits there; GradientBuckets refuses all."""
    with abccl.init() as alone:
        averages = Averages(alone, "int8")
        with pytest.raises(abccl.ArgumentError, match=r'quantises on the CPU.*meta: take "bf16"'):
            averages.make(8, torch.float32, torch.device("meta"))
        averages.close()
    with abccl.init() as alone:
        halved = Halved(alone, 8, torch.float32, torch.bfloat16, torch.device("meta"))
        assert halved._half.device.type == "meta"
        with pytest.raises(abccl.ArgumentError, match="on meta, and GradientBuckets serves the CPU.*hook"):
            GradientBuckets(torch.nn.Linear(2, 2, device="meta"), alone)
