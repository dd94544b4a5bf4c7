"""DistributedDataParallel over abccl: the same losses as over Gloo, to the last bit (two ranks add two numbers)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from torch_ranks import MARKS, Checks, dist, outcomes, returned, torch

pytestmark = MARKS
nn = torch.nn
ddp = nn.parallel.DistributedDataParallel

STEPS = 4


class Net(nn.Module):
    """Several buckets' worth of parameters, a buffer that is broadcast, and a branch that may go unused."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32, sparse=sparse)
        self.norm = nn.BatchNorm1d(32)
        self.left, self.right = nn.Linear(32, 64), nn.Linear(32, 64)
        self.out = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 5))

    def forward(self, x: Any, branch: bool | None = None) -> Any:
        x = self.norm(self.embed(x).mean(1))
        both = self.left(x) + self.right(x) if branch is None else (self.left if branch else self.right)(x)
        return self.out(both)


# ---- hooks


def built_in(name: str) -> Callable[[Any], None]:
    """A hook of torch's default_hooks."""

    def register(model: Any) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        model.register_comm_hook(None, getattr(default_hooks, name))

    return register


def power_sgd(model: Any, halves: bool = False) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    hook = powerSGD_hook.powerSGD_hook
    model.register_comm_hook(state, default_hooks.fp16_compress_wrapper(hook) if halves else hook)


def bf16(model: Any) -> None:
    """torch takes its bf16 hook, by name, with NCCL only."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    def hook(state, bucket):
        return default_hooks.bf16_compress_hook(state, bucket)

    model.register_comm_hook(None, hook)


def quantization(model: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import quantization_hooks

    model.register_comm_hook(dist.group.WORLD, quantization_hooks.quantization_pertensor_hook)


def local_sgd(model: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook

    state = post_localSGD_hook.PostLocalSGDState(None, dist.new_subgroups(1)[0], start_localSGD_iter=2)
    model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)


# What DDP is asked for, beside a small bucket size. A hook that starts collectives in its callbacks has one bucket:
# with several, the ranks would start them in different orders, over any backend of CPU tensors.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "find_unused": {"find_unused_parameters": True, "branches": True},
    "no_sync": {"no_sync": True},
    "bucket_views": {"gradient_as_bucket_view": True},
    "one_bucket": {"bucket_cap_mb": 25},
    "buffers": {"buffers": True},
    "own_buffers": {"buffers": True, "broadcast_buffers": False},
    "sparse": {"sparse": True},
    "join": {"join": True},
    "join_of_branches": {"join": True, "find_unused_parameters": True, "branches": True},
    "all_reduce_hook": {"hook": built_in("allreduce_hook")},
    "fp16": {"hook": built_in("fp16_compress_hook")},
    "bf16": {"hook": bf16},
    "power_sgd": {"hook": power_sgd, "bucket_cap_mb": 25},
    "power_sgd_fp16": {"hook": partial(power_sgd, halves=True), "bucket_cap_mb": 25},
    "local_sgd": {"hook": local_sgd},
    "replicate": {"replicate": True},
    "compiled": {"compiled": True, "bucket_cap_mb": 25},
}


def train(
    *,
    branches: bool = False,
    no_sync: bool = False,
    sparse: bool = False,
    join: bool = False,
    buffers: bool = False,
    replicate: bool = False,
    compiled: bool = False,
    hook: Callable[[Any], None] | None = None,
    **asked: Any,
) -> list[float]:
    """Losses of a few steps, and a sum of the weights; `asked` is for DDP."""
    torch.manual_seed(3)
    rank = dist.get_rank()
    net = Net(sparse)
    asked = {"bucket_cap_mb": 0.02} | asked
    if replicate:
        from torch.distributed._composable.replicate import replicate as replicated

        model = replicated(net, **asked)
    else:
        model = ddp(net, **asked)
    if hook:
        hook(model)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    losses = []

    def step(number: int) -> None:
        x = torch.randint(0, 20, (16, 6), generator=generator)
        y = torch.randint(0, 5, (16,), generator=generator)
        branch = (number + rank) % 2 == 0 if branches else None
        loss = nn.functional.cross_entropy(called(x, branch), y)
        loss.backward()
        losses.append(loss.item())

    if join:
        with model.join():
            for number in range(STEPS + rank):
                step(number)
                optimizer.step()
                optimizer.zero_grad()
    else:
        for number in range(STEPS):
            if no_sync:
                with model.no_sync():
                    step(number)
            step(number)
            optimizer.step()
            optimizer.zero_grad()
    summed = [*model.parameters(), *(model.buffers() if buffers else [])]
    return [*losses, sum(float(p.detach().double().sum()) for p in summed)]


def quantized() -> list[float]:
    """The hook takes the future of an all-gather as NCCL gives it, a list in a list. Gloo's is another."""
    return train(hook=quantization, bucket_cap_mb=25)


def in_debug_mode() -> list[float]:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL. With it, torch 2.13's DDP over Gloo crashes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
        dist.set_debug_level_from_env()
        assert dist.get_debug_level() == dist.DebugLevel.DETAIL
        losses = train(process_group=dist.new_group(), find_unused_parameters=True)
    dist.set_debug_level_from_env()
    return losses


def other_shapes() -> str:
    """A parameter of another shape on one rank: DDP says so on some ranks; all raise, in time."""
    group = dist.new_group(backend="abccl", timeout=timedelta(seconds=3))
    try:
        model = ddp(nn.Linear(3, 4 + dist.get_rank()), process_group=group)
        model(torch.ones(2, 3)).sum().backward()
    except RuntimeError:
        return "raised"
    return "went on"


COMPARED = Checks({name: partial(train, **setting) for name, setting in SETTINGS.items()})
CHECKS = Checks(COMPARED)
CHECKS.add(quantized)
CHECKS.add(in_debug_mode)
CHECKS.add(other_shapes)


def over(backend: str, name: str) -> list[Any]:
    """What the ranks' checks returned."""
    return returned(outcomes("test_ddp", 2, abccl="CHECKS", gloo="COMPARED")[backend][name])


@pytest.mark.parametrize("name", COMPARED)
def test_same_as_gloo(name: str) -> None:
    assert over("abccl", name) == over("gloo", name)


def test_quantized_gradients() -> None:
    """Numbers of 8 bits: nearly the same losses as Gloo's without the hook."""
    ours, theirs = over("abccl", "quantized"), over("gloo", "one_bucket")
    assert ours != theirs
    for losses, expected in zip(ours, theirs):
        assert losses == pytest.approx(expected, rel=1e-2)


def test_debug_mode() -> None:
    assert over("abccl", "in_debug_mode") == over("gloo", "plain")


def test_other_shapes_on_one_rank() -> None:
    assert over("abccl", "other_shapes") == ["raised", "raised"]
