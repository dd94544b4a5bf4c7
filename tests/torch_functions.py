"""Checks of `backend="abccl"`: functional and differentiable collectives, groups and meshes, and what else is public.

test_torch.py runs them. Not named test_: pytest does not collect it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from torch_checks import numbers
from torch_ranks import Checks, Groups, a_group, dist, here, raises, torch

import abccl

CHECKS = Checks()
check = CHECKS.add


def agree(functions: dict[str, Callable[[Any], Any]]) -> None:
    """Each function of a group gives the same tensors over both backends."""
    for name, function in functions.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ours, theirs = (torch.utils._pytree.tree_leaves(function(g)) for g in (Groups.world, Groups.gloo))
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert torch.equal(one, other), f"{name}: {one} is not {other}"


# ---- functional collectives


@check
def functional_collectives() -> None:
    from torch.distributed import _functional_collectives as functional

    rank, size = here()
    matrix = numbers(2 * size, 3 * size)
    sent, received = [rank * r % 3 for r in range(size)], [r * rank % 3 for r in range(size)]
    rows = numbers(sum(sent), 2)
    around = [(r + 1) % size for r in range(size)]

    def in_place(call: str, *arguments: Any) -> Callable[[Any], Any]:
        def run(group: Any) -> Any:
            x = matrix.clone()
            return getattr(functional, call)(x, *arguments, group), x

        return run

    def gather_in_place(group: Any) -> Any:
        out = torch.zeros(2 * size * size, 3 * size)
        return functional.all_gather_tensor_inplace(out, matrix, group), out

    def scatter_in_place(group: Any) -> Any:
        out = torch.zeros(2, 3 * size)
        return functional.reduce_scatter_tensor_inplace(out, matrix, "sum", group), out

    def exchange_in_place(group: Any) -> Any:
        out = torch.zeros(sum(received), 2)
        return functional.all_to_all_inplace(out, rows, received, sent, group), out

    both = [matrix, 2 * matrix]
    agree(
        {
            "all_reduce": lambda g: [functional.all_reduce(matrix, op, g) for op in ("sum", "min", "max", "product")],
            "all_gather": lambda g: [functional.all_gather_tensor(matrix, dim, g) for dim in (0, 1)],
            "reduce_scatter": lambda g: [functional.reduce_scatter_tensor(matrix, "sum", dim, g) for dim in (0, 1)],
            "all_to_all": lambda g: [
                functional.all_to_all_single(matrix, None, None, g),
                functional.all_to_all_single(rows, received, sent, g),
            ],
            "broadcast": lambda g: functional.broadcast(matrix, 1, g),
            "permute": lambda g: functional.permute_tensor(matrix.flatten(), around, g),
            "all_reduce_coalesced": lambda g: functional.all_reduce_coalesced(both, "sum", g),
            "all_gather_coalesced": lambda g: functional.all_gather_into_tensor_coalesced(both, g),
            "reduce_scatter_coalesced": lambda g: functional.reduce_scatter_tensor_coalesced(both, "sum", [0, 0], g),
            "all_reduce_inplace": in_place("all_reduce_inplace", "sum"),
            "all_gather_inplace": gather_in_place,
            "reduce_scatter_inplace": scatter_in_place,
            "all_to_all_inplace": exchange_in_place,
        }
    )


@check
def differentiable_collectives() -> None:
    import torch.distributed.nn.functional as differentiable
    from torch.distributed import _functional_collectives as functional

    rank, size = here()

    def gradient(call: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
        def run(group: Any) -> Any:
            x = numbers(2 * size, size).requires_grad_()
            found = call(x, group)
            whole = torch.cat([piece.reshape(-1) for piece in found] if isinstance(found, (list, tuple)) else [found])
            (whole * torch.arange(whole.numel()).view(whole.shape)).sum().backward()
            return whole.detach(), x.grad

        return run

    calls: dict[str, Callable[[Any, Any], Any]] = {
        "functional.all_gather": lambda x, g: functional.all_gather_tensor_autograd(x, 1, g),
        "functional.reduce_scatter": lambda x, g: functional.reduce_scatter_tensor_autograd(x, "sum", 1, g),
        "functional.all_to_all": lambda x, g: functional.all_to_all_single_autograd(x, None, None, g),
        "all_reduce": lambda x, g: differentiable.all_reduce(x * 1, group=g),
        "all_gather": lambda x, g: differentiable.all_gather(x, group=g),
        "reduce_scatter": lambda x, g: differentiable.reduce_scatter(
            torch.zeros(2, size), list(x.chunk(size)), group=g
        ),
        "all_to_all": lambda x, g: differentiable.all_to_all(
            [torch.zeros(2, size) for _ in range(size)], list(x.chunk(size)), group=g
        ),
        "all_to_all_single": lambda x, g: differentiable.all_to_all_single(torch.zeros_like(x), x, group=g),
        "broadcast": lambda x, g: differentiable.broadcast(x * 1, 1, group=g),
        # Gloo leaves something in the tensors of the ranks that are not the root.
        "reduce": lambda x, g: differentiable.reduce(x * 1, 0, group=g) * (rank == 0),
        "gather": lambda x, g: differentiable.gather(x, 0, group=g),
        "scatter": lambda x, g: differentiable.scatter(list(x.chunk(size)), 0, group=g),
    }
    agree({name: gradient(call) for name, call in calls.items()})


# ---- tensors of other layouts


@check
def averages_of_sparse_tensors() -> None:
    rank, size = here()
    x = torch.sparse_coo_tensor(torch.tensor([[0, rank + 1]]), torch.full((2, 3), 6.0 * size), (9, 3))
    dist.all_reduce(x, dist.ReduceOp.AVG)
    expected = torch.zeros(9, 3)
    expected[0], expected[1 : size + 1] = 6.0 * size, 6.0
    assert torch.equal(x.to_dense(), expected)


@check
def results_that_repeat_memory() -> None:
    """They are refused before anything is sent."""
    repeated = torch.ones(1).expand(4)
    calls: list[Callable[[], Any]] = [
        lambda: dist.all_reduce(repeated),
        lambda: dist.broadcast(repeated, 0),
        lambda: dist.all_gather([repeated] * dist.get_world_size(), torch.ones(4)),
        lambda: dist.recv(repeated, (dist.get_rank() + 1) % dist.get_world_size()),
    ]
    for call in calls:
        with raises(abccl.ArgumentError, "several times"):
            call()
    dist.barrier()


# ---- groups and meshes


@check
def device_meshes() -> None:
    rank, size = here()
    mesh = dist.init_device_mesh("cpu", (1, size), mesh_dim_names=("a", "b"))
    assert dist.get_backend(mesh.get_group("b")) == "abccl"
    assert mesh["b"].get_local_rank() == rank and tuple(mesh.get_coordinate()) == (0, rank)
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=mesh["b"].get_group())
    assert x.item() == sum(range(size))
    flat = mesh._flatten("both")
    assert flat.size() == size
    dist.barrier(flat.get_group())
    gloo = dist.init_device_mesh("cpu", (size,), backend_override={0: "gloo"})
    assert dist.get_backend(gloo.get_group()) == "gloo"
    assert dist.get_world_size(dist.DeviceMesh.from_group(Groups.world, "cpu").get_group()) == size


@check
def subgroups() -> None:
    rank, size = here()
    pair, pairs = dist.new_subgroups_by_enumeration([[1, 0], *([r] for r in range(2, size))], backend="abccl")
    assert len(pairs) == size - 1
    assert dist.get_process_group_ranks(pair) == ([0, 1] if rank < 2 else [rank])
    if rank < 2:
        assert dist.get_global_rank(pair, 1) == 1 and dist.get_group_rank(pair, 0) == 0
        x = torch.tensor([float(rank)])
        dist.broadcast(x, group_src=1, group=pair)
        assert x.item() == 1
        # Only the members make this one.
        local = dist.new_group([0, 1], backend="abccl", use_local_synchronization=True, group_desc="two of us")
        assert local.group_desc == "two of us" and local.group_name
        dist.all_reduce(x, group=local)
        assert x.item() == 2
    assert dist.get_backend_config(Groups.world) == "cpu:abccl,cuda:abccl"
    assert dist.get_pg_count() >= 2 + len(pairs)
    assert dist.is_initialized() and dist.is_available() and dist.is_backend_available("abccl")
    assert dist.supports_complex(dist.ReduceOp.SUM) and not dist.supports_complex(dist.ReduceOp.MAX)
    assert dist.get_node_local_rank(fallback_rank=rank) == rank
    two = dist.new_group(backend="cpu:abccl,cuda:abccl")
    dist.barrier(two)


@check
def what_torch_refuses() -> None:
    """Calls that torch serves for its own backends only, or not on the CPU: they say so, and the group goes on."""
    rank, _ = here()
    with pytest.raises(ValueError, match="only implemented for GLOO"):
        dist.monitored_barrier()
    for group in (Groups.world, Groups.gloo):
        with pytest.raises(RuntimeError, match="split"):
            dist.split_group(group, [[0], [1]])
        with pytest.raises(TypeError, match="shrink"):
            dist.shrink_group([1], group)
        with pytest.raises(ValueError, match=r"[Ii]nvalid"):
            dist.send(torch.ones(1), rank, group=group)
    dist.barrier()


@check
def objects_as_messages() -> None:
    rank, _ = here()
    if rank == 0:
        dist.send_object_list([{"a": 1}, "two"], 1)
    elif rank == 1:
        found: list[Any] = [None, None]
        assert dist.recv_object_list(found, 0) == 0
        assert found == [{"a": 1}, "two"]


@check
def a_cuda_tensor() -> None:
    """A tensor that says it is on a GPU: a machine without one has no other. All ranks hear what is missing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if torch.cuda.is_available():
        return  # gpu/test_torch_cuda.py has real ones
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.ones(4, device="cuda")
    size, world = dist.get_world_size(), Groups.world
    wholes = [x] * size
    calls: list[Callable[[], Any]] = [
        lambda: world.allreduce([x]),
        lambda: world.allreduce_coalesced([x, x]),
        lambda: world.broadcast([x]),
        lambda: world.reduce([x]),
        lambda: world.allgather([wholes], [x]),
        lambda: world.all_gather_single(x, x),
        lambda: world.all_gather_single_coalesced([x], [x]),
        lambda: world.reduce_scatter([x], [wholes]),
        lambda: world.reduce_scatter_single(x, x),
        lambda: world.reduce_scatter_single_coalesced([x], [x]),
        lambda: world.alltoall(wholes, wholes),
        lambda: world.all_to_all_single(x, x),
        lambda: world.gather([wholes] if dist.get_rank() == 0 else [], [x]),
        lambda: world.scatter([x], [wholes] if dist.get_rank() == 0 else []),
        lambda: dist.all_reduce(x),
        lambda: dist.all_reduce(x, async_op=True),
    ]
    for call in calls:
        with raises(abccl.TransportError, "CUDA|cuda"):
            call()
    dist.barrier()


@check
def changed_timeouts() -> None:
    rank, _ = here()
    group = a_group(60.0)
    group.set_timeout(timedelta(seconds=1))
    if rank == 0:
        with raises(abccl.DeadlineExceeded):
            dist.barrier(group)
    dist.barrier(Groups.gloo)
    # A wait that gives up leaves the operation going on.
    group, x = a_group(20.0), torch.ones(3)
    if rank == 0:
        work = dist.all_reduce(x, group=group, async_op=True)
        with raises(abccl.DeadlineExceeded, "wait again"):
            work.wait(timedelta(milliseconds=100))
        dist.barrier(Groups.gloo)
        work.wait()
    else:
        dist.barrier(Groups.gloo)
        dist.all_reduce(x, group=group)
    assert x[0] == dist.get_world_size()


# ---- torch.profiler


@check
def names_in_the_profiler() -> None:
    _, size = here()

    def recorded(call: Callable[[], Any]) -> list[str]:
        # acc_events: or torch warns that it forgets.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            call()
        return [event.name for event in profile.events() if event.name.startswith("abccl:")]

    small, large = torch.ones(4), torch.ones(1 << 20)
    for x in (small, large):
        (called,) = recorded(lambda x=x: dist.all_reduce(x))
        assert re.fullmatch(rf"abccl:all_reduce\(float32, sum, {x.numel()} elements, \w+\)", called)
        assert recorded(lambda x=x: dist.all_reduce(x, async_op=True).wait()) == [called]
    wholes = [torch.empty(4) for _ in range(size)]
    assert recorded(lambda: (dist.all_gather(wholes, small), dist.broadcast(small, 0), dist.barrier())) == [
        "abccl:all_gather(float32, 4 elements, direct)",
        "abccl:broadcast(float32, 4 elements, root 0, direct)",
        "abccl:barrier(recursive_doubling)",
    ]
    dist.all_reduce(small)
    assert recorded(lambda: None) == []
