"""`backend="abccl"` of torch.distributed: every call against the same call through Gloo, in the same processes.

Starting processes that import torch takes seconds, so all checks of one number of ranks run in one start.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import abccl

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
dist = torch.distributed

CHECKS: dict[str, Callable[[], None]] = {}

# What both backends reduce. Sums of small integers are exact in all of them, in any order.
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES += [torch.int8, torch.uint8, torch.int32, torch.int64]
OPS = [dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX]
BITWISE = [dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR]
SHAPES = [(), (1,), (7,), (3, 5), (0,), (1000, 33)]


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Runs on every rank, in a world of backend abccl with a Gloo group beside it."""
    CHECKS[function.__name__] = function
    return function


# ---- what the checks are made of


class Groups:
    """The groups that all checks share."""

    abccl: Any = None
    gloo: Any = None


def here() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def numbers(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    """Small integers, other ones on each rank."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    return torch.randint(1, 4, shape, generator=generator).to(dtype)


def both(call: Callable[[Any, bool], tuple[Any, Any]], result: bool = True) -> None:
    """Make a call through both backends, each at once and later, and compare what comes out.

    Args:
        call: takes a group and whether to be asynchronous; returns the work and the tensors it changes.
    """
    outcomes = []
    for group in (Groups.abccl, Groups.gloo):
        for later in (False, True):
            work, tensors = call(group, later)
            if later:
                work.wait()
                assert work.is_completed() or group is Groups.gloo
            outcomes.append([tensor.clone() for tensor in (tensors if isinstance(tensors, list) else [tensors])])
    for outcome in outcomes[:-1]:
        assert len(outcome) == len(outcomes[-1])
        for ours, theirs in zip(outcome, outcomes[-1]):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.to_dense(), theirs.to_dense()), f"{ours} is not {theirs}"


@contextmanager
def raises(kind: type[BaseException], words: str = "") -> Iterator[None]:
    """Like pytest.raises, and the error is one that torch's users expect."""
    with pytest.raises(kind, match=words) as caught:
        yield
    assert isinstance(caught.value, RuntimeError), type(caught.value).__mro__


def a_group(seconds: float = 2.0, ranks: list[int] | None = None) -> Any:
    return dist.new_group(ranks, backend="abccl", timeout=timedelta(seconds=seconds))


# ---- reducing


@check
def all_reduce() -> None:
    for dtype in DTYPES:
        for op in OPS + BITWISE * (not dtype.is_floating_point):
            for seed, shape in enumerate(SHAPES):

                def call(group: Any, later: bool, dtype=dtype, op=op, seed=seed, shape=shape) -> Any:
                    x = numbers(*shape, dtype=dtype, seed=seed)
                    return dist.all_reduce(x, op, group, later), x

                both(call)


@check
def all_reduce_of_other_types() -> None:
    _, size = here()
    flags = torch.tensor([True, False, dist.get_rank() == 0])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    assert flags.tolist() == [True, False, True]
    for dtype in (torch.complex64, torch.complex128):
        both(lambda g, later, d=dtype: (dist.all_reduce(x := numbers(5).to(d) * (1 + 2j), group=g, async_op=later), x))
    mean = numbers(100)
    total = mean.clone()
    dist.all_reduce(total, group=Groups.gloo)
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    assert torch.allclose(mean, total / size)
    weighted = numbers(100)
    dist.all_reduce(weighted, dist._make_nccl_premul_sum(0.5))
    assert torch.allclose(weighted, total / 2)


@check
def reduce() -> None:
    for root in range(dist.get_world_size()):
        for dtype in DTYPES:

            def call(group: Any, later: bool, root=root, dtype=dtype) -> Any:
                x = numbers(11, 3, dtype=dtype)
                work = dist.reduce(x, root, group=group, async_op=later)
                if later:
                    work.wait()
                return work, x if dist.get_rank() == root else []

            both(call)


@check
def reduce_scatter() -> None:
    _, size = here()

    def lists(group: Any, later: bool) -> Any:
        out = torch.zeros(4, 3)
        inputs = [numbers(4, 3, seed=r) for r in range(size)]
        return dist.reduce_scatter(out, inputs, group=group, async_op=later), out

    def single(group: Any, later: bool) -> Any:
        out = torch.zeros(5, dtype=torch.int64)
        x = numbers(5 * size, dtype=torch.int64)
        return dist.reduce_scatter_tensor(out, x, dist.ReduceOp.MAX, group, later), out

    both(lists)
    both(single)


@check
def reduce_scatter_of_uneven_parts() -> None:
    rank, size = here()
    inputs = [numbers(r + 1, seed=r) for r in range(size)]
    out = torch.zeros(rank + 1)
    dist.reduce_scatter(out, inputs)
    totals = [x.clone() for x in inputs]
    for total in totals:
        dist.all_reduce(total, group=Groups.gloo)
    assert torch.equal(out, totals[rank])


@check
def coalesced() -> None:
    rank, size = here()
    for later in (False, True):
        tensors = [numbers(n, seed=n) for n in (1, 5, 1000)]
        totals = [t.clone() for t in tensors]
        for total in totals:
            dist.all_reduce(total, group=Groups.gloo)
        with dist._coalescing_manager(Groups.abccl, async_ops=later) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor)
        if later:
            manager.wait()
        assert all(map(torch.equal, tensors, totals))
        wholes = [torch.zeros(n * size) for n in (2, 3)]
        with dist._coalescing_manager(Groups.abccl, async_ops=later) as manager:
            for whole in wholes:
                dist.all_gather_into_tensor(whole, torch.full((len(whole) // size,), float(rank)))
        if later:
            manager.wait()
        for whole in wholes:
            assert torch.equal(whole, torch.arange(size).repeat_interleave(len(whole) // size).float())
        parts = [torch.zeros(n) for n in (2, 3)]
        with dist._coalescing_manager(Groups.abccl, async_ops=later) as manager:
            for part in parts:
                dist.reduce_scatter_tensor(part, torch.ones(len(part) * size))
        if later:
            manager.wait()
        assert all(torch.equal(part, torch.full_like(part, size)) for part in parts)


@check
def sparse() -> None:
    def call(group: Any, later: bool) -> Any:
        indices = torch.tensor([[0, dist.get_rank() + 1, 7]])
        x = torch.sparse_coo_tensor(indices, numbers(3, 4), (9, 4))
        if dist.get_rank() == 1:
            x = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 4), (9, 4))
        return dist.all_reduce(x, group=group, async_op=later), x

    both(call)


# ---- moving


@check
def broadcast() -> None:
    for root in range(dist.get_world_size()):
        for dtype in [*DTYPES, torch.bool]:

            def call(group: Any, later: bool, root=root, dtype=dtype) -> Any:
                x = numbers(3, 5, dtype=dtype)
                return dist.broadcast(x, root, group, later), x

            both(call)


@check
def all_gather() -> None:
    _, size = here()
    for dtype in [*DTYPES, torch.bool]:
        for shape in SHAPES:

            def lists(group: Any, later: bool, dtype=dtype, shape=shape) -> Any:
                outs = [torch.zeros(shape, dtype=dtype) for _ in range(size)]
                return dist.all_gather(outs, numbers(*shape, dtype=dtype), group, later), outs

            def pieces(group: Any, later: bool, dtype=dtype) -> Any:
                whole = torch.zeros(size * 6, dtype=dtype)
                return dist.all_gather(list(whole.chunk(size)), numbers(6, dtype=dtype), group, later), whole

            def single(group: Any, later: bool, dtype=dtype) -> Any:
                whole = torch.zeros(size * 6, dtype=dtype)
                return dist.all_gather_into_tensor(whole, numbers(6, dtype=dtype), group, later), whole

            both(lists)
        both(pieces)
        both(single)


@check
def all_gather_of_uneven_parts() -> None:
    rank, size = here()
    outs = [torch.zeros(r, 3) for r in range(size)]
    dist.all_gather(outs, torch.full((rank, 3), float(rank)))
    assert all(torch.equal(out, torch.full((r, 3), float(r))) for r, out in enumerate(outs))
    stacked = torch.zeros(size, 3)
    dist.all_gather_into_tensor(stacked, torch.full((3,), float(rank)))
    assert torch.equal(stacked[:, 0], torch.arange(float(size)))


@check
def types_that_are_only_moved() -> None:
    rank, size = here()
    outs = [torch.zeros(3, dtype=torch.float8_e4m3fn) for _ in range(size)]
    dist.all_gather(outs, torch.full((3,), float(rank)).to(torch.float8_e4m3fn))
    assert [out.float().tolist() for out in outs] == [[float(r)] * 3 for r in range(size)]
    with raises(abccl.ArgumentError, "float8"):
        dist.all_reduce(outs[0])


@check
def gather_and_scatter() -> None:
    rank, size = here()
    for root in range(size):

        def gather(group: Any, later: bool, root=root) -> Any:
            outs = [torch.zeros(2, 3) for _ in range(size)] if rank == root else None
            return dist.gather(numbers(2, 3), outs, root, group, later), outs or []

        def scatter(group: Any, later: bool, root=root) -> Any:
            out = torch.zeros(4)
            pieces = [numbers(4, seed=r) for r in range(size)] if rank == root else None
            return dist.scatter(out, pieces, root, group, later), out

        both(gather)
        both(scatter)


@check
def all_to_all() -> None:
    rank, size = here()

    def even(group: Any, later: bool) -> Any:
        out = torch.zeros(2 * size, 3)
        return dist.all_to_all_single(out, numbers(2 * size, 3), group=group, async_op=later), out

    def uneven(group: Any, later: bool) -> Any:
        sent = [rank * r % 3 for r in range(size)]
        received = [r * rank % 3 for r in range(size)]
        out = torch.zeros(sum(received), 2, dtype=torch.int32)
        x = numbers(sum(sent), 2, dtype=torch.int32)
        return dist.all_to_all_single(out, x, received, sent, group, later), out

    both(even)
    both(uneven)
    outs = [torch.zeros(r + rank) for r in range(size)]
    dist.all_to_all(outs, [torch.full((r + rank,), float(rank)) for r in range(size)])
    assert all(torch.equal(out, torch.full((r + rank,), float(r))) for r, out in enumerate(outs))


@check
def tensors_of_any_layout() -> None:
    _, size = here()

    def call(group: Any, later: bool) -> Any:
        base = numbers(6, 8)
        x = base.t() if group is Groups.abccl else base.t().contiguous()
        return dist.all_reduce(x, group=group, async_op=later), x

    both(call)
    base = torch.zeros(6, 8)
    dist.broadcast(base[:, 2:4].t(), 0)
    columns = [base[:, i] for i in range(size)]
    dist.all_gather(columns, numbers(12)[::2])
    expected = [torch.zeros(6) for _ in range(size)]
    dist.all_gather(expected, numbers(12)[::2].contiguous(), group=Groups.gloo)
    assert all(map(torch.equal, columns, expected))
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    dist.all_reduce(parameter)
    dist.all_reduce(parameter.t())
    assert torch.equal(parameter, torch.full((4, 4), float(size * size)))


@check
def objects() -> None:
    rank, size = here()
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, {"rank": rank, "padding": "x" * rank})
    assert [entry["rank"] for entry in everyone] == list(range(size))
    words = ["from", rank] if rank == 0 else [None, None]
    dist.broadcast_object_list(words, 0)
    assert words == ["from", 0]
    gathered: list[Any] = [None] * size
    dist.gather_object(rank, gathered if rank == 0 else None, 0)
    assert rank or gathered == list(range(size))
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, [f"for {r}" for r in range(size)], 0)
    assert mine == [f"for {rank}"]


# ---- messages


@check
def messages() -> None:
    rank, size = here()
    right, left = (rank + 1) % size, (rank - 1) % size
    for count in (1, 100, 300_000):
        x, out = torch.full((count,), float(rank)), torch.zeros(count)
        ops = [dist.P2POp(dist.isend, x, right), dist.P2POp(dist.irecv, out, left)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        assert torch.equal(out, torch.full((count,), float(left)))
    if rank == 0:
        for _ in range(1, size):
            out = torch.zeros(2)
            source = dist.recv(out)
            assert out.tolist() == [source, 7.0]
        for peer in range(1, size):
            dist.send(torch.tensor([2.0]), peer, tag=2)
            dist.send(torch.tensor([1.0]), peer, tag=1)
    else:
        dist.send(torch.tensor([float(rank), 7.0]), 0)
        for tag in (1, 2):
            out = torch.zeros(1)
            assert dist.recv(out, 0, tag=tag) == 0
            assert out.item() == tag
    column = torch.zeros(3, 2)
    if rank == 0:
        dist.send(torch.arange(6.0)[::2], 1)
    elif rank == 1:
        dist.recv(column[:, 1], 0)
        assert column.tolist() == [[0.0, 0.0], [0.0, 2.0], [0.0, 4.0]]


@check
def an_unread_message_blocks_nothing() -> None:
    rank, size = here()
    work = None
    if rank == 0:
        work = dist.isend(torch.ones(1 << 20), 1)
    dist.barrier()
    x = torch.ones(5)
    dist.all_reduce(x)
    assert x.sum() == 5 * size
    if rank == 1:
        out = torch.zeros(1 << 20)
        dist.recv(out, 0)
        assert out.sum() == 1 << 20
    if work is not None:
        work.wait()


# ---- groups, works, futures


@check
def groups() -> None:
    rank, _ = here()
    assert dist.get_backend() == "abccl" and dist.get_backend(Groups.gloo) == "gloo"
    first = a_group(20.0, [0])
    pair = a_group(20.0, [1, 0])
    assert dist.get_rank(pair) == {0: 0, 1: 1}.get(rank, -1)
    x = torch.tensor([float(rank + 1)])
    if rank == 0:
        dist.all_reduce(x, group=first)
        assert x.item() == 1
    if rank < 2:
        dist.all_reduce(x, group=pair)
        assert x.item() == 3
        dist.destroy_process_group(pair)
    mine, _ = dist.new_subgroups(1, backend="abccl")
    assert dist.get_world_size(mine) == 1
    again = a_group(20.0)
    dist.barrier(again)
    dist.barrier(again, async_op=True).wait()
    assert again._get_sequence_number_for_group() == 2
    dist.destroy_process_group(again)
    with raises(abccl.ClosedError):
        again.allreduce([x])


@check
def device_mesh_and_functional_collectives() -> None:
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rank, size = here()
    mesh = init_device_mesh("cpu", (size,))
    total = functional.all_reduce(torch.full((3,), float(rank)), "sum", mesh)
    assert total.tolist() == [sum(range(size))] * 3
    whole = functional.all_gather_tensor(torch.full((2,), float(rank)), 0, mesh)
    assert whole.tolist() == [r // 2 for r in range(2 * size)]
    matrix = torch.arange(12.0).view(6, 2)
    assert torch.equal(distribute_tensor(matrix, mesh, [Shard(0)]).full_tensor(), matrix)


@check
def direct_calls() -> None:
    _, size = here()
    group = Groups.abccl
    x = torch.ones(3)
    group.allreduce(x).wait()
    group.allreduce([x], dist.ReduceOp.MAX).wait()
    group.broadcast(x, 0).wait()
    outs = [torch.zeros(3) for _ in range(size)]
    group.allgather(outs, x).wait()
    group.barrier().wait()
    group.monitored_barrier(timedelta(seconds=10))
    assert outs[-1].tolist() == [size] * 3


@check
def works_and_futures() -> None:
    _, size = here()
    x = torch.ones(3)
    work = dist.all_reduce(x, async_op=True)
    future = work.get_future()
    assert future is work.get_future()
    doubled = future.then(lambda done: done.value()[0] * 2)
    assert doubled.wait().tolist() == [2.0 * size] * 3
    assert work.wait(timedelta(seconds=5)) and work.is_completed() and work.is_success()
    assert work.result()[0] is x
    # A copy back is done before a future says so.
    base = torch.ones(3, 2)
    assert dist.all_reduce(base.t(), async_op=True).get_future().wait()[0].sum() == 6 * size
    many = [dist.all_reduce(torch.ones(1 << 16), async_op=True).get_future() for _ in range(8)]
    assert all(value[0][-1] == size for value in torch.futures.wait_all(many))
    if dist.get_rank() == 0:
        dist.send(torch.ones(1), 1)
    elif dist.get_rank() == 1:
        received = torch.zeros(1)
        assert dist.irecv(received, 0).get_future().wait()[0].item() == 1.0


@check
def two_threads() -> None:
    _, size = here()
    other = a_group(20.0)
    results = [torch.ones(1000), torch.ones(1000)]

    def work(x: Any, group: Any) -> None:
        for _ in range(5):
            dist.all_reduce(x, group=group)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(results, (Groups.abccl, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(x[0] == size**5 for x in results)


# ---- failures


@check
def a_missing_rank() -> None:
    rank, size = here()
    group, later = a_group(), a_group()
    started = time.monotonic()
    if rank != size - 1:
        with raises(abccl.DeadlineExceeded, f"rank {size - 1}|aborted|rank"):
            dist.all_reduce(torch.ones(3), group=group)
        future = dist.all_reduce(torch.ones(3), group=later, async_op=True).get_future()
        with pytest.raises(Exception, match="rank"):
            future.wait()
        assert 1.5 < time.monotonic() - started < 10
    dist.barrier(Groups.gloo)


@check
def a_timeout_of_one_call() -> None:
    rank, _ = here()
    group = a_group(60.0)
    opts = dist.distributed_c10d.AllreduceOptions()
    opts.timeout = timedelta(seconds=1)
    started = time.monotonic()
    if rank == 0:
        with raises(abccl.DeadlineExceeded):
            group.allreduce([torch.ones(1)], opts).wait()
        assert time.monotonic() - started < 10
    dist.barrier(Groups.gloo)


@check
def a_mismatch() -> None:
    rank, _ = here()
    group = a_group(5.0)
    with raises(abccl.CollectiveError, "rank"):
        dist.all_reduce(torch.ones(3 + (rank == 0)), group=group)
    group = a_group(5.0)
    with raises(abccl.CollectiveError, "rank"):
        if rank == 0:
            # A root that has sent all it has may be done before anybody sees what the others called.
            dist.broadcast(torch.ones(3), 0, group=group)
            dist.barrier(group)
        else:
            dist.all_reduce(torch.ones(3), group=group)


@check
def bad_arguments() -> None:
    _, size = here()
    with raises(abccl.ArgumentError, "meta"):
        dist.all_reduce(torch.ones(3, device="meta"))
    with raises(abccl.ArgumentError, "avg"):
        dist.all_reduce(torch.ones(3, dtype=torch.int32), dist.ReduceOp.AVG)
    with raises(abccl.ArgumentError, "elements"):
        dist.all_gather_into_tensor(torch.ones(3 * size + 1), torch.ones(3))
    with raises(abccl.ArgumentError, "add up"):
        dist.all_to_all_single(torch.ones(size), torch.ones(size), [1] * size, [2] * size)
    x = torch.ones(2)  # nothing was sent: the group still works
    dist.all_reduce(x)
    assert x.tolist() == [size, size]


@check
def an_abort() -> None:
    rank, size = here()
    group = a_group(30.0)
    started = time.monotonic()
    if rank == size - 1:
        time.sleep(0.2)
        group.abort()
    else:
        with raises(abccl.CollectiveError, "abort"):
            dist.all_reduce(torch.ones(3), group=group)
    assert time.monotonic() - started < 10
    dist.barrier(Groups.gloo)


# ---- running them


def rank_main(path: str) -> dict[str, str | None]:
    """One rank: all checks, and what each came to."""
    from abccl.collectives.bootstrap import spawned
    from abccl.collectives.torch.register import register

    register()
    torch.set_num_threads(1)
    assert spawned is not None
    store = dist.FileStore(path, spawned.size)
    dist.init_process_group(
        "abccl", store=store, rank=spawned.rank, world_size=spawned.size, timeout=timedelta(seconds=20)
    )
    Groups.abccl, Groups.gloo = dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(seconds=20))
    results: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            function()
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
    dist.destroy_process_group()
    return results


def results(ranks: int) -> list[dict[str, str | None]]:
    found = start(ranks)
    if isinstance(found, Exception):
        raise found
    return found


@cache
def start(ranks: int) -> Any:
    """What every rank found. An error is kept, or each test would start them all again."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        with tempfile.TemporaryDirectory() as folder:
            here = importlib.import_module("test_torch")
            return abccl.spawn(here.rank_main, ranks, (f"{folder}/store",), timeout=100)
    except abccl.AbcclError as error:
        return error
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("name", CHECKS)
def test_torch(name: str, ranks: int) -> None:
    if ranks < 2:
        pytest.skip("wants two ranks")
    failed = {rank: found[name] for rank, found in enumerate(results(ranks)) if found[name]}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
