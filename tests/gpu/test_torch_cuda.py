"""torch.distributed over abccl with CUDA tensors, in processes that share the one device: calls, streams, training."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from gpu.device import FAKE
from gpu.torch_calls import CALLS, DEVICE
from torch_ranks import MARKS, Checks, Groups, a_group, dist, here, outcomes, raises, returned, torch

import abccl

pytestmark = MARKS
nn = torch.nn

STREAMS, TRAINING, FAILURES, GLOO = Checks(), Checks(), Checks(), Checks()
CHECKS = Checks()  # all of one world, in this order


# ---- streams


def staggered(first: Callable[[Any], Any]) -> Any:
    """Rank 0 runs `first` on a tensor before the others have begun their all_reduce: if its host waits, all hang."""
    rank, size = here()
    x = torch.full((100_000,), rank + 1.0, device=DEVICE)
    found = first(x) if rank == 0 else None
    dist.barrier(Groups.gloo)
    if rank:
        dist.all_reduce(x)
    assert (x.cpu() == size * (size + 1) / 2).all()
    return found


def a_call(x: Any) -> Any:
    dist.all_reduce(x)
    return x * 2


def a_wait(x: Any) -> Any:
    work = dist.all_reduce(x, async_op=True)
    assert not work.is_completed()
    work.wait()
    return x * 2


def a_future(x: Any) -> Any:
    future = dist.all_reduce(x, async_op=True).get_future()
    assert future.done()
    return future.then(lambda done: done.value()[0] * 2).wait()


def a_wait_elsewhere(x: Any) -> Any:
    """By another stream first, which copies back; then by the one that x is read on."""
    work = dist.all_reduce(x.view(100, 1000).t(), async_op=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        work.wait()
        y = x * 2
        event = torch.cuda.current_stream().record_event()
    work.wait()
    event.wait()
    return y


@STREAMS.add
def the_host_waits_for_nobody() -> None:
    rank, size = here()
    for first in (a_call, a_future, a_wait_elsewhere, a_wait):
        # Once together: ranks meet in the first call, and CUDA may load a kernel only when its device is idle.
        x = torch.ones(100_000, device=DEVICE)
        first(x) if first is not a_wait else dist.all_reduce(x, async_op=True).wait()
        torch.cuda.synchronize()
        found = staggered(first)
        if rank == 0:
            assert (found.cpu() == size * (size + 1)).all(), first.__name__


@STREAMS.add
def overlap() -> None:
    """Asynchronous calls from several streams, with computing meanwhile, and inputs that nobody else keeps."""
    rank, size = here()
    total, streams = size * (size + 1) / 2, [torch.cuda.Stream() for _ in range(3)]
    for number in range(30):
        with torch.cuda.stream(streams[number % 3]):
            x = torch.zeros(1_000_000, device=DEVICE)
            for _ in range(20):
                x += rank + 1
            out = torch.empty(size * x.numel(), device=DEVICE)
            reduced = dist.all_reduce(x, async_op=True)
            gathered = dist.all_gather_into_tensor(out, torch.full_like(x, rank), async_op=True)
            for _ in range(5):  # would get the memory of what is gathered
                torch.full_like(x, -1)
            reduced.wait()
            gathered.wait()
            wanted = torch.arange(size, device=DEVICE).repeat_interleave(x.numel())
            assert bool((x == 20 * total).all()) and bool((out == wanted).all()), number


@STREAMS.add
def barriers() -> None:
    """One that names a device ends when the device has done what its stream was given."""
    x, event = torch.zeros(1000, device=DEVICE), torch.cuda.Event()
    for _ in range(100):
        x += 1
    event.record()
    dist.barrier(device_ids=[0])
    assert event.query()
    work = dist.barrier(device_ids=[0], async_op=True)
    work.wait()
    assert work.is_completed()


@STREAMS.add
def graphs() -> None:
    """A CUDA graph with a synchronous all_reduce and two asynchronous ones, replayed on changing data."""
    rank, size = here()
    x, y, z = (torch.zeros(100_000, device=DEVICE) for _ in range(3))
    number, wrong = torch.zeros((), device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)

    def step() -> None:
        number.add_(1)
        x.copy_(number * (rank + 1))
        y.copy_(number + rank)
        z.copy_(number + rank)
        dist.all_reduce(x)
        works = [dist.all_reduce(y, dist.ReduceOp.MAX, async_op=True), dist.all_reduce(z, async_op=True)]
        wrong.add_((x != number * (size * (size + 1) / 2)).sum())
        works[0].wait()
        wrong.add_((y != number + size - 1).sum())
        works[1].wait()
        wrong.add_((z != number * size + size * (size - 1) / 2).sum())

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(200):
        graph.replay()
    torch.cuda.synchronize()
    assert (int(number), int(wrong)) == (203, 0)  # a capture runs nothing
    dist.barrier()


# ---- training


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)), nn.Linear(32, 4))

    def forward(self, x: Any) -> Any:
        return self.body(x)


def train(wrap: Callable[[Any], Any] | None) -> list[float]:
    """Losses on the batches of all ranks: on this rank's own, averaged, if the model is wrapped; else on all here."""
    rank, size = here()
    torch.manual_seed(3)
    net = Net().to(DEVICE)
    model = wrap(net) if wrap is not None else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    generator, losses = torch.Generator().manual_seed(4), []
    mine = slice(8 * rank, 8 * rank + 8) if wrap is not None else slice(None)
    for _ in range(5):
        x, y = (torch.randn(8 * size, width, generator=generator) for width in (32, 4))
        loss = nn.functional.mse_loss(model(x[mine].to(DEVICE)), y[mine].to(DEVICE))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if wrap is not None:
            dist.all_reduce(mean, dist.ReduceOp.AVG)
        losses.append(mean.item())
    return losses


def as_one_process(wrap: Callable[[Any], Any], tolerance: float = 1e-5) -> None:
    found, wanted = train(wrap), train(None)
    assert found == pytest.approx(wanted, rel=tolerance), (found, wanted)


def ddp(state: Any = None, hook: Any = None, **asked: Any) -> Callable[[Any], Any]:
    def wrap(net: Any) -> Any:
        model = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.01, **asked)
        if hook is not None:
            model.register_comm_hook(state, hook)
        return model

    return wrap


@TRAINING.add
def data_parallel() -> None:
    as_one_process(ddp())
    as_one_process(ddp(static_graph=True, gradient_as_bucket_view=True))


@TRAINING.add
def hooks() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    as_one_process(ddp(None, default_hooks.allreduce_hook))
    as_one_process(ddp(None, default_hooks.fp16_compress_hook), 1e-2)
    for compress, tolerance in ((None, 1e-5), ("bf16", 3e-2), ("fp16", 1e-2)):
        state = abccl.buckets.HookState(compress=compress)
        as_one_process(ddp(state, abccl.buckets.hook), tolerance)
        state.close()


@TRAINING.add
def fully_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(DEVICE).type, (here()[1],))

    def shard(net: Any) -> Any:
        for layer in net.body:
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    as_one_process(shard)


# ---- what goes wrong


@FAILURES.add
def a_missing_rank() -> None:
    """When the time is over the device is let go; who waits on the host learns of it, and the next call does."""
    rank, size = here()
    group = a_group(5.0)
    x = torch.ones(1000, device=DEVICE)
    dist.all_reduce(x, group=group)
    if rank == 0:
        work = dist.all_reduce(x, group=group, async_op=True)
        with raises(abccl.DeadlineExceeded):
            work.wait(timedelta(seconds=40))
        with raises(abccl.CollectiveError):
            dist.all_reduce(x, group=group)
    dist.barrier(Groups.gloo)
    y = torch.ones(10, device=DEVICE)
    dist.all_reduce(y)
    assert (y.cpu() == size).all()


# ---- Gloo was asked for on the CPU: abccl serves that, too


@GLOO.add
def gloo_by_name() -> None:
    _, size = here()
    assert dist.get_backend() == "cpu:gloo,cuda:abccl"
    for device in ("cpu", DEVICE):
        x = torch.ones(10, device=device)
        dist.all_reduce(x)
        assert (x.cpu() == size).all()


CHECKS.update({**CALLS, **({} if FAKE else STREAMS), **TRAINING, **FAILURES})


def check(name: str, ranks: int, backend: str, checks: str) -> None:
    if not (FAKE or torch.cuda.is_available()):
        pytest.skip("this build of torch has no CUDA")
    returned(outcomes("gpu.test_torch_cuda", ranks, **{backend: checks})[backend][name])


@pytest.mark.parametrize("ranks", [2] if FAKE else [2, 3])
@pytest.mark.parametrize("name", CHECKS)
def test_torch_cuda(name: str, ranks: int) -> None:
    check(name, ranks, "abccl", "CHECKS")


@pytest.mark.parametrize("ranks", [2])
@pytest.mark.parametrize("name", GLOO)
def test_beside_gloo(name: str, ranks: int) -> None:
    check(name, ranks, "cpu:gloo,cuda:abccl", "GLOO")
