"""`abccl.buckets` with compressed gradients and with partitioned parameters, on several ranks."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from bucket_models import adam, alone, batch, bucketed, loss_of, net, same
from torch_ranks import MARKS, Checks, assert_passes, dist, here, torch

import abccl

pytestmark = MARKS
nn = torch.nn

CHECKS = Checks()
check = CHECKS.add


# ---- compression


@check
def int8_keeps_its_bound() -> None:
    """Of each block: a step within its own bound and the last one's, the sum of all steps within the last one's."""
    rank, size = here()
    count, steps, block = 5 * 256, 12, 256
    parameter = nn.Parameter(torch.zeros(count))

    def gradient(step: int, of: int) -> Any:
        """They shrink, so that what was kept is the largest part of what is sent; and a block is of one magnitude."""
        generator = torch.Generator().manual_seed(100 * step + of)
        values = torch.randn(count, generator=generator) * 50.0 ** -(step // 3)
        values[:block] = 127.0 if step == 0 else 0.02
        values[1:block] = 0.49 if step == 0 else 0.02
        return values

    with bucketed([parameter], compress="int8") as buckets:
        total, wanted = torch.zeros(count), torch.zeros(count)
        sent, averaged = [torch.zeros(5)] * size, torch.zeros(5)  # bounds of each block's largest magnitude
        last = torch.zeros(5)
        for step in range(steps):
            gradients = [gradient(step, of) for of in range(size)]
            largest = [g.view(5, block).abs().amax(1) for g in gradients]
            sent = [new + kept / 254 for new, kept in zip(largest, sent)]
            averaged = sum(sent) / size + averaged / 254
            bound = (sum(sent) / size + averaged) / 254
            (parameter * gradients[rank]).sum().backward()
            buckets.finish()
            exact = sum(gradients) / size
            total, wanted = total + parameter.grad.double(), wanted + exact.double()
            slack = 1e-5 * largest[0] + 1e-6
            assert ((parameter.grad - exact).view(5, block).abs().amax(1) <= bound + last + slack).all(), step
            assert ((total - wanted).view(5, block).abs().amax(1) <= bound + slack).all(), step
            last = bound
            parameter.grad = None
        # Every rank has the same bits.
        everyone = [torch.empty_like(total) for _ in range(size)]
        dist.all_gather(everyone, total)
        assert all(torch.equal(everyone[0], other) for other in everyone)


@check
def int8_loses_nothing_of_what_is_used_now_and_then() -> None:
    always, sometimes = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(300))
    slope = torch.linspace(0.1, 1.0, 300)
    with bucketed([always, sometimes], compress="int8") as buckets:
        total = torch.zeros(300)
        for step in range(40):
            value = always.sum()
            if step % 2 == 0:
                value = value + (sometimes * slope).sum()
            value.backward()
            buckets.finish()
            total += sometimes.grad
            always.grad = sometimes.grad = None
        assert (total - 20 * slope).abs().max() <= 1.01 * 255 / 254 / 127


@check
def int8_beside_types_that_are_not_compressed() -> None:
    """Their collectives come in the same order on all ranks, whoever runs them."""
    rank, size = here()
    reals = [nn.Parameter(torch.zeros(200_000)) for _ in range(4)]
    others = [nn.Parameter(torch.zeros(1000, dtype=torch.complex64)) for _ in range(4)]
    parameters = [p for pair in zip(reals, others) for p in pair]
    with bucketed(parameters, 1, "int8") as buckets:
        for _ in range(5):
            total = torch.zeros(())
            for number, p in enumerate(parameters):
                total = total + p.real.sum() * (number + rank)
            total.backward()
            buckets.finish()
            for number, p in enumerate(parameters):
                expected = torch.full_like(p.grad, number + (size - 1) / 2)
                torch.testing.assert_close(p.grad, expected, rtol=0.02, atol=1e-6)
                p.grad = None


@check
def halves_round_as_halves() -> None:
    """bf16 and fp16 are what they say: each rank's share is rounded, and the sum."""
    rank, size = here()
    values = [torch.randn(1000, generator=torch.Generator().manual_seed(of)) for of in range(size)]
    found = {}
    for compress, half in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        parameter = nn.Parameter(torch.zeros(1000))
        with bucketed([parameter], compress=compress) as buckets:
            for _ in range(2):
                parameter.grad = None
                (parameter * values[rank]).sum().backward()
                buckets.finish()
        shares = [(value * (1 / size)).to(half) for value in values]
        assert torch.equal(parameter.grad, sum(share.float() for share in shares).to(half).float())
        found[compress] = parameter.grad
    assert not torch.equal(found["bf16"], found["fp16"])
    # A sum of float16 would overflow where the average does not.
    large = nn.Parameter(torch.zeros(10, dtype=torch.float16))
    with bucketed([large]) as buckets:
        (large * 40000).sum().backward()
        buckets.finish()
        torch.testing.assert_close(large.grad, torch.full((10,), 40000.0, dtype=torch.float16), rtol=1e-3, atol=0)


@check
def overflow_is_seen() -> None:
    """A gradient scaler must find the infinity, on all ranks, and the next step must be sound."""
    rank, _ = here()
    for compress in (None, "bf16", "fp16", "int8"):
        parameter = nn.Parameter(torch.ones(600))
        with bucketed([parameter], compress=compress) as buckets:
            for step in range(3):
                factor = torch.ones(600)
                if step == 1 and rank == 0:
                    factor[5] = float("inf")
                (parameter * factor).sum().backward()
                buckets.finish()
                assert bool(torch.isfinite(parameter.grad).all()) == (step != 1), (compress, step)
                parameter.grad = None


# ---- partition


@check
def partitioned_trains_as_one_process() -> None:
    rank, size = here()

    def momentum(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    for kind, options, reference in (
        (torch.optim.AdamW, {"lr": 0.01}, adam),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, momentum),
    ):
        model = net(rank)
        with bucketed(model, 5000, partition=True) as buckets:
            stepper = buckets.optimizer(kind, **options)
            for step in range(5):
                loss_of(model, step, rank).backward()
                buckets.finish()
                assert all(parameter.grad is None for parameter in model.parameters())
                norm = buckets.clip_grad_norm_(0.05)
                assert norm > 0.05
                stepper.step()
                stepper.zero_grad()
            held = sum(value.numel() for state in stepper.state.values() for value in state.values() if value.dim())
            whole = sum(parameter.numel() for parameter in model.parameters())
            # Two moments with AdamW and one with SGD, of this rank's part, and padding.
            assert held < (2 if kind is torch.optim.AdamW else 1) * (whole / size + 5 * 256)
            loaded = {name: value.clone() for name, value in model.state_dict().items()}  # waits until they are whole
            stepper.step()
            model.load_state_dict(loaded)  # waits for the gathers that the step began
            weights = model.state_dict()
            reference_model = alone(5, reference, most=0.05)
            for name, value in reference_model.state_dict().items():
                torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-3)
            assert len(buckets.report().buckets) > 1


class Borrower(nn.Module):
    """Uses a parameter of a module whose forward it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.owner, self.last = nn.Linear(20, 2000), nn.Linear(2000, 1)
        self.before_use: Callable[[Any], None] = lambda parameter: None

    def forward(self, x: Any) -> Any:
        self.before_use(self.owner.weight)
        return self.last(torch.relu(x @ self.owner.weight.t()))


@check
def partitioned_parameters_are_whole_when_used() -> None:
    torch.manual_seed(0)
    model = Borrower()
    reference = copy.deepcopy(model)
    with bucketed(model, 5000, partition=True) as buckets:
        gathers, numbers = buckets._partition, {id(p): k for k, p in enumerate(model.parameters())}

        def whole(parameter: Any) -> None:
            assert gathers._bucket_of[numbers[id(parameter)]] not in gathers._pending

        model.before_use = whole
        stepper, theirs = buckets.optimizer(torch.optim.SGD, lr=0.1), torch.optim.SGD(reference.parameters(), lr=0.1)
        for step in range(5):
            value = model(batch(step, 0)[0]).sum()
            expected = reference(batch(step, 0)[0]).sum()
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
            for backward, each in ((value, stepper), (expected, theirs)):
                (backward * 1e-3).backward()
                if each is stepper:
                    buckets.finish()
                each.step()
                each.zero_grad()


@check
def compressed_and_partitioned() -> None:
    """The same training as compressed only, but for 8 bits, which are rounded once less."""
    rank, _ = here()
    # Sums of 16 bits are rounded after each fold: both must fold in one order.
    alike = {"ABCCL_ALGORITHM": "all_reduce=two_shot,reduce_scatter=direct"}
    os.environ |= alike
    for compress in ("bf16", "fp16", "int8"):
        weights = []
        for partition in (False, True):
            model = net()
            with bucketed(model, 5000, compress, partition=partition) as buckets:
                stepper = buckets.optimizer(torch.optim.SGD, lr=0.1)
                for step in range(4):
                    loss_of(model, step, rank).backward()
                    buckets.finish()
                    stepper.step()
                    stepper.zero_grad()
                buckets.gathered()
                weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        start = torch.cat([p.detach().flatten() for p in net().parameters()])
        assert (weights[0] - start).norm() > 0.1
        assert (weights[0] - weights[1]).norm() <= (0.02 if compress == "int8" else 1e-6) * (weights[0] - start).norm()
    for name in alike:
        del os.environ[name]


@check
def gathers_overlap_with_forward() -> None:
    """A module's forward waits for its own parameters, not for those of modules behind it."""
    rank, _ = here()
    model = net()
    with bucketed(model, 1, partition=True) as buckets:
        stepper, gathers, pending = buckets.optimizer(torch.optim.SGD, lr=0.1), buckets._partition, []
        waits = [0, 2, 4]  # the linear layers
        for place in waits:
            model[place].register_forward_hook(lambda *_: pending.append(len(gathers._pending)))
        for step in range(3):
            loss_of(model, step, rank).backward()
            buckets.finish()
            stepper.step()
        assert pending[-3:] == [4, 2, 0]
        # First those that are used first: the buckets of the layer that backward reaches last.
        gathers.gather()
        assert list(gathers._pending) == [5, 4, 3, 2, 1, 0]


@check
def partition_with_a_scaler() -> None:
    """An infinity in one rank's part: no rank makes the step."""
    rank, _ = here()
    model = net()
    with bucketed(model, 5000, partition=True) as buckets:
        stepper = buckets.optimizer(torch.optim.SGD, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for step in range(3):
            before = [p.detach().clone() for p in model.parameters()]
            loss = loss_of(model, step, rank)
            if step == 1 and rank == 0:
                loss = loss + model[0].weight[0, 0] * float("inf")
            scaler.scale(loss).backward()
            buckets.finish()
            scaler.step(stepper)
            scaler.update()
            buckets.gathered()
            moved = not all(map(torch.equal, before, model.parameters()))
            assert moved == (step != 1)


@check
def partition_keeps_an_optimizer_with_state() -> None:
    rank, _ = here()
    model = net()
    with bucketed(model, 5000, partition=True) as buckets:
        stepper = buckets.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        shards = list(buckets._partition.shards)
        for shard in shards:
            shard.grad = torch.zeros_like(shard)
        stepper.step()
        loss_of(model, 0, rank).backward()
        buckets.finish()
        assert all(map(lambda one, other: one is other, stepper.param_groups[0]["params"], shards))
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        same(copied, model)
        copied(batch(0, 0)[0]).sum().backward()


@check
def partition_under_compilation() -> None:
    """Hooks are kept by torch.compile; where it has left them out, it is said."""
    rank, _ = here()
    for optimized in (False, True):
        torch._dynamo.reset()
        model = net()
        with bucketed(model, 5000, partition=True) as buckets:
            stepper = buckets.optimizer(torch.optim.AdamW, lr=0.01)
            called = torch.compile(model, backend="aot_eager") if optimized else model
            for step in range(4):
                loss_of(called, step, rank).backward()
                buckets.finish()
                stepper.step()
            for hook in buckets._partition._hooks:
                hook.remove()
            torch._dynamo.reset()
            with pytest.raises(abccl.ArgumentError, match="gathered"):
                loss_of(called, 0, rank).backward()
            buckets.gathered()
            same(model, alone(4, adam))


@check
def partition_sees_what_is_stale() -> None:
    model = net()
    with bucketed(model, 5000, partition=True) as buckets:
        stepper = buckets.optimizer(torch.optim.SGD, lr=0.1)
        kept = loss_of(model, 0, 0)
        loss_of(model, 1, 0).backward()
        buckets.finish()
        stepper.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()
        buckets.finish()


@pytest.mark.parametrize("name", CHECKS)
def test_bucket_modes(name: str, ranks: int) -> None:
    assert_passes("test_bucket_modes", name, ranks)
