"""Calls of torch.distributed on the device, for test_torch_cuda.py: what each makes of CUDA tensors, and of CPU ones.

What a call makes of CUDA tensors is held against what it makes of the same tensors on the CPU, over the same group:
test_torch.py holds that against Gloo. With the fake driver both are CPU tensors: that tries these functions, no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu.device import FAKE
from torch_ranks import Checks, Groups, dist, here, raises, torch

import abccl

DEVICE = "cpu" if FAKE else "cuda:0"
CALLS = Checks()

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool]
COUNTS = (0, 1, 5, 100_003) if FAKE else (0, 1, 5, 1_000_003, 8_000_000)

Make = Callable[..., Any]
"""Makes a tensor: `values` on a device."""


def values(count: int, dtype: Any = torch.float32, shift: int = 0) -> Any:
    """Small integers, so that sums are exact in any order; others on each rank, and for each shift."""
    rank, _ = here()
    return ((torch.arange(count) * 7 + 3 * rank + shift) % 5).to(dtype)


def alike(call: Callable[[Make, bool], list[Any]]) -> Callable[[], None]:
    """A check that a call gives the same on the device as on the host, synchronous or not."""

    def check() -> None:
        for later in (False, True):
            wanted = call(values, later)
            found = call(lambda *words: values(*words).to(DEVICE), later)
            for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
                assert str(one.device) == DEVICE and torch.equal(one.cpu(), other), (later, number, one, other)

    check.__name__ = call.__name__
    CALLS.add(check)
    return check


def run(work: Any) -> None:
    """Wait, if the call was asynchronous."""
    if work is not None:
        work.wait()


def parts(make: Make, count: int, dtype: Any = torch.float32) -> list[Any]:
    """A tensor for each rank."""
    return [make(count, dtype, 10 * number) for number in range(here()[1])]


@alike
def all_reduce(make: Make, later: bool) -> list[Any]:
    found = []
    for dtype in TYPES:
        for name in ("SUM", "PRODUCT", "MIN", "MAX", *(["AVG"] if dtype.is_floating_point else [])):
            found.append(x := make(1000, dtype))
            run(dist.all_reduce(x, getattr(dist.ReduceOp, name), async_op=later))
    for name in ("BAND", "BOR", "BXOR"):
        found.append(x := make(100, torch.int32))
        run(dist.all_reduce(x, getattr(dist.ReduceOp, name), async_op=later))
    for count in COUNTS:
        found.append(x := make(count))
        run(dist.all_reduce(x, async_op=later))
    return found


@alike
def rooted(make: Make, later: bool) -> list[Any]:
    rank, size = here()
    found = []
    for root in range(size):
        x, y, mine = make(1000), make(1000), make(100)
        outs = parts(make, 100) if rank == root else None
        run(dist.broadcast(x, root, async_op=later))
        run(dist.reduce(y, root, async_op=later))
        run(dist.gather(mine, outs, root, async_op=later))
        run(dist.scatter(mine, parts(make, 100) if rank == root else None, root, async_op=later))
        found += [x, y, mine, *(outs or [])]
    return found


@alike
def gathered_and_scattered(make: Make, later: bool) -> list[Any]:
    _, size = here()
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for count in (0, 1, 1000):
            x, whole, out = make(count, dtype), make(size * count, dtype), make(count, dtype)
            outs, lists = parts(make, count, dtype), parts(make, count, dtype)
            run(dist.all_gather(outs, x, async_op=later))
            run(dist.all_gather_into_tensor(whole, x, async_op=later))
            run(dist.reduce_scatter(x, lists, async_op=later))
            run(dist.reduce_scatter_tensor(out, whole, async_op=later))
            found += [x, whole, out, *outs]
    return found


@alike
def exchanged(make: Make, later: bool) -> list[Any]:
    rank, size = here()
    outs, out = parts(make, 50), make(size * 10)
    run(dist.all_to_all(outs, parts(make, 50), async_op=later))
    run(dist.all_to_all_single(out, make(size * 10), async_op=later))
    splits = [rank + peer + 1 for peer in range(size)]  # rows from one rank to another are as many as back
    rows, more = (make(sum(splits) * 3).view(-1, 3) for _ in range(2))
    run(dist.all_to_all_single(rows, more, splits, splits, async_op=later))
    return [*outs, out, rows]


@alike
def uneven_lists(make: Make, later: bool) -> list[Any]:
    rank, size = here()
    outs, out = [make(peer + 1) for peer in range(size)], make(rank + 1)
    run(dist.all_gather(outs, make(rank + 1), async_op=later))
    run(dist.reduce_scatter(out, [make(peer + 1) for peer in range(size)], async_op=later))
    return [*outs, out]


@alike
def coalesced(make: Make, later: bool) -> list[Any]:
    manager: Any = dist.distributed_c10d._coalescing_manager
    xs, outs, wholes = ([make(count * each) for count in (10, 1000)] for each in (1, 1, here()[1]))
    steps: list[tuple[Callable[..., Any], Any]] = [
        (dist.all_reduce, [[x] for x in xs]),
        (dist.all_gather_into_tensor, list(zip(wholes, outs))),
        (dist.reduce_scatter_tensor, list(zip(outs, wholes))),
    ]
    for call, tensors in steps:
        with manager(async_ops=later) as works:
            for each in tensors:
                call(*each)
        if later:
            works.wait()
    return [*xs, *outs, *wholes]


@alike
def layouts(make: Make, later: bool) -> list[Any]:
    """Transposed tensors and columns, which go through flat buffers, by the streams that are current."""
    _, size = here()
    x, columns, out = make(60).view(6, 10).t(), make(60 * size).view(60, size), make(60).view(6, 10).t()
    run(dist.all_reduce(x, async_op=later))
    run(dist.all_gather([columns[:, rank] for rank in range(size)], make(60), async_op=later))
    run(dist.reduce_scatter(out, [columns[:, rank].view(10, 6) for rank in range(size)], async_op=later))
    return [x, columns, out]


@alike
def sparse(make: Make, later: bool) -> list[Any]:
    rank, _ = here()
    where = torch.tensor([[rank, rank + 1, 7]]).to(make(1).device)
    x = torch.sparse_coo_tensor(where, make(3), (8,), check_invariants=False)
    run(dist.all_reduce(x, async_op=later))
    return [x.to_dense()]


@alike
def functional(make: Make, later: bool) -> list[Any]:
    import torch.distributed._functional_collectives as functional

    x, group = make(40 * here()[1]), Groups.world
    found = [
        functional.all_reduce(x, "sum", group),
        functional.all_gather_tensor(x, 0, group),
        functional.reduce_scatter_tensor(x, "sum", 0, group),
    ]
    return [functional.wait_tensor(each) * 2 if later else each + 1 for each in found]


@alike
def messages(make: Make, later: bool) -> list[Any]:
    rank, size = here()
    right, left = (rank + 1) % size, (rank - 1) % size
    found = []
    for count in (1, 1000, 1_000_000):
        x, y, z = make(count), make(count), make(count)
        sent, received = dist.isend(x, right), dist.irecv(y, left)
        received.wait()
        sent.wait()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, z, right), dist.P2POp(dist.isend, y, left)]):
            work.wait()
        if rank == 0:
            dist.send(z, 1, tag=3)
        elif rank == 1:
            assert dist.recv(x, tag=3) == 0
        found += [x, y, z]
    return found


@CALLS.add
def objects() -> None:
    """They go as CPU tensors."""
    rank, size = here()
    found: list[Any] = [None] * size
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": each} for each in range(size)]
    kinds = ["cpu"] if FAKE else ["cpu", "cuda"]
    assert dist.distributed_c10d._device_capability(Groups.world) == kinds
    assert dist.distributed_c10d._get_object_coll_device(Groups.world) == "cpu"


@CALLS.add
def both_kinds_of_tensors() -> None:
    """CPU and CUDA tensors by turns, synchronous or not; in one call they are refused, and the group goes on."""
    rank, size = here()
    total = size * (size + 1) / 2
    for number in range(20):
        host, there = (torch.full((1000,), rank + 1.0, device=device) for device in ("cpu", DEVICE))
        for work in [dist.all_reduce(x, async_op=number % 2 == 0) for x in (there, host)]:
            run(work)
        assert (there.cpu() == total).all() and (host == total).all()
    if not FAKE:
        with raises(abccl.ArgumentError, "one device"):
            Groups.world.allreduce_coalesced([host, there])
        with raises(abccl.ArgumentError):
            dist.all_gather_into_tensor(torch.zeros(1000 * size), there)
    dist.barrier()


@CALLS.add
def a_message_first() -> None:
    """Two ranks of a group may talk before all have met."""
    rank, _ = here()
    group = dist.new_group(backend="abccl")
    x = torch.full((10,), rank + 1.0, device=DEVICE)
    if rank == 0:
        dist.send(x, 1, group=group)
    elif rank == 1:
        dist.recv(x, 0, group=group)
        assert (x.cpu() == 1).all()
    dist.barrier(group)


@CALLS.add
def groups() -> None:
    rank, size = here()
    pair = dist.new_group([1, 0], backend="abccl")
    if rank < 2:
        x = torch.full((10,), rank + 1.0, device=DEVICE)
        dist.all_reduce(x, group=pair)
        assert (x.cpu() == 3).all()
    both = dist.new_group(backend="cpu:abccl,cuda:abccl")
    for device in ("cpu", DEVICE):
        x = torch.ones(10, device=device)
        dist.all_reduce(x, group=both)
        assert (x.cpu() == size).all()
    dist.barrier()
