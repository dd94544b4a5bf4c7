"""Checks of `backend="abccl"`: what reduces and what moves tensors, each call against the same call through Gloo.

test_torch.py runs them, and has those that are no comparison. Not named test_: pytest does not collect it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch_ranks import Checks, Groups, dist, here, raises, torch

import abccl

CHECKS = Checks()
check = CHECKS.add

# Their names since torch 2.13.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# What both backends reduce. Sums of small integers are exact in all of them, in any order.
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES += [torch.int8, torch.uint8, torch.int32, torch.int64]
OPS = [dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX]
BITWISE = [dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR]
SHAPES = [(), (1,), (7,), (3, 5), (0,), (1000, 33)]


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
    for group in (Groups.world, Groups.gloo):
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
    for dtype in (torch.int16, torch.uint16, torch.uint32, torch.uint64):
        x, total = numbers(5).to(dtype), numbers(5)
        dist.all_reduce(x)
        dist.all_reduce(total, group=Groups.gloo)
        assert torch.equal(x, total.to(dtype))
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
                if dist.get_rank() == root:
                    return work, x
                assert group is Groups.gloo or torch.equal(x, numbers(11, 3, dtype=dtype))
                return work, []

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
        return reduce_scatter_single(out, x, dist.ReduceOp.MAX, group, later), out

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
        with dist._coalescing_manager(Groups.world, async_ops=later) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor)
        if later:
            manager.wait()
        assert all(map(torch.equal, tensors, totals))
        wholes = [torch.zeros(n * size) for n in (2, 3)]
        with dist._coalescing_manager(Groups.world, async_ops=later) as manager:
            for whole in wholes:
                all_gather_single(whole, torch.full((len(whole) // size,), float(rank)))
        if later:
            manager.wait()
        for whole in wholes:
            assert torch.equal(whole, torch.arange(size).repeat_interleave(len(whole) // size).float())
        parts = [torch.zeros(n) for n in (2, 3)]
        with dist._coalescing_manager(Groups.world, async_ops=later) as manager:
            for part in parts:
                reduce_scatter_single(part, torch.ones(len(part) * size))
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
                return all_gather_single(whole, numbers(6, dtype=dtype), group, later), whole

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
    all_gather_single(stacked, torch.full((3,), float(rank)))
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
def every_type_that_gloo_serves() -> None:
    """Whatever Gloo does with an element type, abccl does too, and with bfloat16; both refuse before they send."""
    rank, size = here()
    right, left = (rank + 1) % size, (rank - 1) % size

    def exchange(x: Any, group: Any) -> Any:
        out = torch.zeros_like(x)
        for work in [dist.isend(x, right, group), dist.irecv(out, left, group)]:
            work.wait()
        return out

    def gather(x: Any, group: Any) -> Any:
        outs = [torch.zeros_like(x) for _ in range(size)] if rank == 0 else None
        dist.gather(x, outs, 0, group)
        return torch.stack(outs) if outs else x

    def reduce(x: Any, group: Any, op: Any) -> Any:
        dist.all_reduce(x, op, group)
        return x

    def fill(call: Callable[..., Any], length: int, x: Any, group: Any) -> Any:
        out = torch.zeros(length, dtype=x.dtype)
        call(out, x, group=group)
        return out

    def broadcast(x: Any, group: Any) -> Any:
        dist.broadcast(x, 0, group)
        return x

    def scatter(x: Any, group: Any) -> Any:
        out = torch.zeros(2, dtype=x.dtype)
        dist.reduce_scatter(out, list(x.chunk(size)), group=group)
        return out

    operators = {str(op): partial(reduce, op=op) for op in OPS + BITWISE}
    calls: dict[str, Callable[[Any, Any], Any]] = {
        **operators,
        "messages": exchange,
        "gather": gather,
        "broadcast": broadcast,
        "all_gather": partial(fill, all_gather_single, 2 * size * size),
        "reduce_scatter": partial(fill, reduce_scatter_single, 2),
        "reduce_scatter of a list": scatter,
        "all_to_all": partial(fill, dist.all_to_all_single, 2 * size),
    }
    served = set()
    for dtype in sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str):
        try:
            x = numbers(2 * size).to(dtype)
        except (RuntimeError, NotImplementedError):
            continue  # torch has no tensors of it
        for name, call in calls.items():
            try:
                theirs = call(x.clone(), Groups.gloo)
            except (RuntimeError, ValueError, TypeError):
                continue
            ours = call(x.clone(), Groups.world)
            same, expected = ours.view(torch.uint8), theirs.view(torch.uint8)
            if dtype == torch.bool:
                expected = (expected != 0).to(torch.uint8)  # Gloo adds bools as numbers, up to 255
            assert torch.equal(same, expected), f"{name} of {dtype}"
            served.add(dtype)
    assert served >= {*DTYPES, torch.bool, torch.complex64, torch.complex128}


@check
def layouts_as_gloo_treats_them() -> None:
    """Gloo takes tensors that are dense in memory, in any order of their dimensions."""
    _, size = here()
    image = (2, 3, 4, 5)
    dense = {
        "transposed": lambda: numbers(6, 8).t(),
        "channels_last": lambda: numbers(*image).to(memory_format=torch.channels_last),
        "permuted": lambda: numbers(2, 3, 4).permute(2, 0, 1),
    }
    for name, made in dense.items():

        def reduced(group: Any, later: bool, made=made) -> Any:
            x = made()
            return dist.all_reduce(x, group=group, async_op=later), x

        def broadcast(group: Any, later: bool, made=made) -> Any:
            x = made()
            return dist.broadcast(x, 1, group, later), x

        def gathered(group: Any, later: bool, made=made) -> Any:
            outs = [torch.zeros_like(made()) for _ in range(size)]
            return dist.all_gather(outs, made(), group, later), outs

        for call in reduced, broadcast, gathered:
            assert not dense[name]().is_contiguous()
            both(call)


@check
def tensors_of_any_layout() -> None:
    _, size = here()

    def call(group: Any, later: bool) -> Any:
        base = numbers(6, 8)
        x = base.t() if group is Groups.world else base.t().contiguous()
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


@check
def in_place() -> None:
    rank, size = here()

    def gather(group: Any, later: bool) -> Any:
        whole = torch.zeros(3 * size)
        own = whole[3 * rank : 3 * rank + 3]
        own.copy_(numbers(3))
        return all_gather_single(whole, own, group, later), whole

    def scatter(group: Any, later: bool) -> Any:
        whole = numbers(3 * size)
        own = whole[3 * rank : 3 * rank + 3]
        return reduce_scatter_single(own, whole, group=group, async_op=later), own

    both(gather)
    both(scatter)


@check
def as_lenient_as_nccl() -> None:
    """Only the number of elements counts, where Gloo wants equal shapes."""
    rank, size = here()
    everyone = list(map(float, range(size)))
    mine, total = torch.tensor(float(rank)), float(sum(range(size)))
    mixed = [torch.zeros(()), *(torch.zeros([1] * r) for r in range(1, size))]

    def values(tensors: list[Any]) -> list[float]:
        return [tensor.item() for tensor in tensors]

    dist.all_gather(mixed, mine)
    assert values(mixed) == everyone
    dist.all_gather(mixed, mine.view(1))
    assert values(mixed) == everyone
    flat, scalar = torch.zeros(size), torch.zeros(())
    all_gather_single(flat, mine)
    assert flat.tolist() == everyone
    reduce_scatter_single(scalar, flat + rank)
    assert scalar == rank * size + total
    dist.reduce_scatter(scalar, mixed)
    assert scalar == rank * size
    outs = [torch.zeros(1), *(torch.zeros(()) for _ in range(1, size))]
    dist.all_to_all(outs, [mine, *(mine.view(1) for _ in range(1, size))])
    assert values(outs) == everyone
    dist.gather(mine.view(1), mixed if rank == 0 else None, 0)
    dist.scatter(scalar, mixed if rank == 0 else None, 0)
    assert scalar == rank
    shaped = torch.full((2, 3) if rank else (6,), float(rank))
    dist.broadcast(shaped, 1)
    dist.all_reduce(shaped)
    assert shaped.flatten().tolist() == [float(size)] * 6
    dist.all_reduce(mine)
    assert mine == total


@check
def deprecated_calls() -> None:
    size = dist.get_world_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for later in (False, True):
            tensors = [torch.ones(2), torch.ones(3)]
            work = dist.all_reduce_coalesced(tensors, async_op=later)
            if later:
                work.wait()
            assert all(torch.equal(x, torch.full_like(x, size)) for x in tensors)
            lists = [[torch.zeros(2), torch.zeros(3)] for _ in range(size)]
            work = dist.all_gather_coalesced(lists, tensors, async_op=later)
            if later:
                work.wait()
            assert all(torch.equal(x, y) for row in lists for x, y in zip(row, tensors))
            whole, part = torch.zeros(2 * size), torch.zeros(2)
            dist.all_gather_into_tensor(whole, tensors[0])
            dist.reduce_scatter_tensor(part, whole)
            assert part.tolist() == [size * size] * 2
