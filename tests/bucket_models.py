"""Models, batches and buckets for the tests of `abccl.buckets`. Not named test_: pytest does not collect it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch_ranks import here, torch

import abccl

nn = torch.nn


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 3))


def batch(step: int, rank: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 20, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def loss_of(model: Any, step: int, rank: int) -> Any:
    x, y = batch(step, rank)
    return nn.functional.cross_entropy(model(x), y)


@contextmanager
def bucketed(params: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
    with abccl.init() as comm, abccl.buckets.GradientBuckets(params, comm, *arguments, **options) as buckets:
        yield buckets


def alone(steps: int, optimizer: Callable[[Any], Any], most: float | None = None) -> Any:
    """The model that one process would have trained on the batches of all ranks."""
    model, (_, size) = net(), here()
    stepper = optimizer(model.parameters())
    for step in range(steps):
        sum(loss_of(model, step, rank) for rank in range(size)).div(size).backward()
        if most is not None:
            nn.utils.clip_grad_norm_(model.parameters(), most)
        stepper.step()
        stepper.zero_grad()
    return model


def adam(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.01)


def same(one: Any, other: Any, atol: float = 1e-6) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=1e-4)
