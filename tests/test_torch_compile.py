"""torch.compile of collectives over abccl, in one graph: what comes out equals Gloo's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from torch_ranks import MARKS, Checks, dist, outcomes, returned, torch

pytestmark = MARKS

CHECKS = Checks()
check = CHECKS.add


def compiled(function: Callable[[Any], Any], backend: str = "aot_eager") -> list[float]:
    """What a function of one tensor, compiled without a break, returns twice: compiled now, and from the cache."""
    torch._dynamo.reset()
    called = torch.compile(function, backend=backend, fullgraph=True)
    rank = dist.get_rank()
    found = [called(torch.arange(8.0) + rank + number) for number in range(2)]
    return torch.cat([x.flatten() for x in found]).tolist()


@check
def collectives() -> list[float]:
    """torch replaces `dist` calls in place by functional ones."""
    size = dist.get_world_size()

    def function(x: Any) -> Any:
        x = x * 2
        dist.all_reduce(x)
        whole, part, moved = torch.empty(8 * size), torch.empty(8), torch.empty(8)
        dist.all_gather_into_tensor(whole, x)
        dist.reduce_scatter_tensor(part, whole)
        dist.all_to_all_single(moved, part)
        return moved + part

    return compiled(function)


@check
def functional_collectives() -> list[float]:
    from torch.distributed import _functional_collectives as functional

    group = dist.group.WORLD

    def function(x: Any) -> Any:
        total = functional.all_reduce(x * 2, "sum", group)
        whole = functional.all_gather_tensor(total, 0, group)
        part = functional.reduce_scatter_tensor(whole, "sum", 0, group)
        together = functional.all_reduce_coalesced([part, part + 1], "max", group)
        return functional.all_to_all_single(together[0] + together[1], None, None, group)

    return compiled(function)


@check
def gradients() -> list[float]:
    from torch.distributed import _functional_collectives as functional

    def function(x: Any) -> Any:
        whole = functional.all_gather_tensor_autograd(x * x, 0, dist.group.WORLD)
        return functional.reduce_scatter_tensor_autograd(whole * whole, "sum", 0, dist.group.WORLD)

    torch._dynamo.reset()
    x = torch.arange(8.0, requires_grad=True)
    torch.compile(function, backend="aot_eager", fullgraph=True)(x).sum().backward()
    return x.grad.tolist()


@check
def inductor() -> list[float]:
    from torch.distributed import _functional_collectives as functional

    def function(x: Any) -> Any:
        return functional.all_reduce(x * 2, "sum", dist.group.WORLD) + 1

    return compiled(function, backend="inductor")


@pytest.mark.parametrize("name", CHECKS)
def test_same_as_gloo(name: str) -> None:
    if name == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor wants g++")
    found = outcomes("test_torch_compile", 2, abccl="CHECKS", gloo="CHECKS")
    ours, theirs = returned(found["abccl"][name]), returned(found["gloo"][name])
    assert ours == theirs
    assert all(map(any, ours))
