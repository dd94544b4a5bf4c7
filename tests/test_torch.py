"""`backend="abccl"` of torch.distributed: messages, groups, works, failures; and the checks of torch_checks.py and
torch_functions.py. All of one number of ranks run in one start.
"""

from __future__ import annotations

import inspect
import re
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch_checks
import torch_functions
from torch_ranks import MARKS, Checks, Groups, a_group, assert_passes, dist, here, raises, torch

import abccl

pytestmark = MARKS

CHECKS = Checks(torch_checks.CHECKS | torch_functions.CHECKS)
check = CHECKS.add


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
def direct_calls() -> None:
    _, size = here()
    group = Groups.world
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
def registered_memory() -> None:
    """As FSDP2 asks for it."""
    _, size = here()
    backend = Groups.world._get_backend(torch.device("cpu"))
    assert backend.supports_tensor_alloc(torch.device("cpu"))
    x = backend.allocate_tensor(100_000, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert x.shape == (100_000,) and x.dtype == torch.bfloat16
    region = Groups.world._communicator._memory._region
    assert region.address <= x.data_ptr() < region.address + region.bytes
    x.fill_(1)
    dist.all_reduce(x)
    assert torch.equal(x, torch.full_like(x, size))


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

    threads = [threading.Thread(target=work, args=pair) for pair in zip(results, (Groups.world, other))]
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
        group.abort()
        with raises(abccl.ClosedError):
            group.allreduce([torch.ones(3)])
    else:
        with raises(abccl.Aborted, "abort"):
            dist.all_reduce(torch.ones(3), group=group)
    assert time.monotonic() - started < 10
    dist.barrier(Groups.gloo)


# ---- running them


@pytest.mark.parametrize("name", CHECKS)
def test_torch(name: str, ranks: int) -> None:
    assert_passes("test_torch", name, ranks)


@pytest.mark.parametrize("backend", ["abccl", "cpu:abccl,cuda:abccl", "cpu:abccl,cuda:nccl", "cpu:gloo,cuda:abccl"])
def test_a_world_of_one(backend: str, tmp_path: Path) -> None:
    from abccl.collectives.torch.register import register

    register()
    for how in ({"store": dist.HashStore()}, {"init_method": f"file://{tmp_path}/store"}):
        dist.init_process_group(backend, rank=0, world_size=1, **how)
        try:
            x, outs = torch.arange(3.0), [torch.zeros(3)]
            dist.all_reduce(x)
            dist.all_gather(outs, x)
            assert outs[0].tolist() == x.tolist() == [0.0, 1.0, 2.0]
            assert dist.get_backend() == backend
        finally:
            dist.destroy_process_group()


# Public functions of torch.distributed without a check, and why.
UNCHECKED = {
    "breakpoint": "a debugger's prompt, around a barrier",
    "get_default_backend_for_device": "asks nothing of a backend",
    "is_gloo_available": "of another backend",
    "is_mpi_available": "of another backend",
    "is_nccl_available": "of another backend",
    "is_torchelastic_launched": "asks nothing of a backend",
    "is_ucc_available": "of another backend",
    "is_xccl_available": "of another backend",
    "record_comm": "marks a range for a profiler",
    "register_rendezvous_handler": "before there is a backend",
    "rendezvous": "before there is a backend",
}


def test_every_public_function_has_a_check() -> None:
    files = ("test_torch", "torch_checks", "torch_functions", "torch_ranks")
    text = "".join(Path(__file__).with_name(f"{name}.py").read_text() for name in files)
    named = set(re.findall(r"\bdist(?:, \"|\.)(\w+)", text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        public = {name for name in dir(dist) if name[0] != "_" and inspect.isfunction(getattr(dist, name))}
    assert public - named == UNCHECKED.keys() & public
