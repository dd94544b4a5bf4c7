"""Checks of `backend="abccl"`: what reduces and what moves tensors, each call against the same call through Gloo.

test_torch.py runs them, and has those that are no comparison. Not named test_: pytest does not collect it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch

import abccl

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
