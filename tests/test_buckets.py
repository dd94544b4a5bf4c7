"""`abccl.buckets` on several ranks: training loops, compression, partition, and the hook of DistributedDataParallel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch_ranks import MARKS, Checks, Groups, dist, here, outcomes, returned, torch

import abccl

pytestmark = MARKS
nn = torch.nn

CHECKS = Checks()
check = CHECKS.add


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


@check
def trains_as_one_process() -> None:
    rank, _ = here()
    for options in ({}, {"bucket_bytes": 5000}, {"overlap": False}, {"bucket_bytes": 1 << 30}):
        model = net(rank)  # other weights on each rank, until they become rank 0's
        with bucketed(model.parameters(), **options) as buckets:
            stepper = adam(model.parameters())
            for step in range(6):
                loss_of(model, step, rank).backward()
                buckets.finish()
                stepper.step()
                stepper.zero_grad(set_to_none=step % 2 == 0)
            same(model, alone(6, adam))
            report = buckets.report()
            assert sum(bucket.parameters for bucket in report.buckets) == 6
            if "bucket_bytes" in options:
                assert (len(report.buckets) > 1) == (options["bucket_bytes"] == 5000), report
            assert report.communication > 0 and 0 <= report.hidden <= report.communication
            assert "hidden" in str(report) and set(report.predicted) == {"after", "overlapped", "partition"}


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
def buckets_follow_backward() -> None:
    """The order is that of the first backward on rank 0; a full bucket is sent before backward ends."""
    rank, _ = here()
    early, middle, late = (nn.Parameter(torch.randn(30, 30)) for _ in range(3))
    with bucketed([middle, late, early], 3600) as buckets:
        for step in range(3):
            # Other ranks see another order at first.
            factors = (early, late, middle) if rank and not step else (early, middle, late)
            x = torch.ones(30)
            for factor in factors:
                x = factor @ x
            x.sum().backward()
            assert buckets._backward.sent == (3 if step else 0)
            buckets.finish()
        order = [piece.parameter for bucket in buckets._buckets for piece in bucket.layout.pieces]
        assert order == [1, 0, 2]  # the gradient of what was used last comes first


@check
def unused_parameters() -> None:
    rank, size = here()
    everywhere, on_rank_0, nowhere = (nn.Parameter(torch.ones(10)) for _ in range(3))
    with bucketed([everywhere, on_rank_0, nowhere], 1) as buckets:
        for _ in range(3):
            value = everywhere.sum() * (rank + 1)
            if rank == 0:
                value = value + on_rank_0.sum() * 6
            value.backward()
            buckets.finish()
            assert torch.equal(everywhere.grad, torch.full((10,), (size + 1) / 2))
            torch.testing.assert_close(on_rank_0.grad, torch.full((10,), 6 / size))
            assert nowhere.grad is None
            everywhere.grad = on_rank_0.grad = None


@check
def a_rank_without_a_batch() -> None:
    rank, size = here()
    parameter = nn.Parameter(torch.ones(10))
    with bucketed([parameter]) as buckets:
        for step in range(3):
            if rank != size - 1 or step == 0:
                parameter.sum().backward()
            buckets.finish()
            torch.testing.assert_close(parameter.grad, torch.full((10,), 1.0 if step == 0 else (size - 1) / size))
            parameter.grad = None


@check
def accumulation() -> None:
    rank, size = here()
    model, reference = net(), net()
    with bucketed(model, 5000) as buckets:
        for step in range(4):
            with buckets.no_sync():
                loss_of(model, step, rank).backward()
                if rank == 0:  # a parameter of which only what was accumulated is sent
                    model[0].bias.sum().backward()
            loss = model[4](torch.relu(model[2](torch.relu(batch(step, rank)[0] @ model[0].weight.t())))).sum()
            loss.backward()
            buckets.finish()
            for other in range(size):
                x, y = batch(step, other)
                (nn.functional.cross_entropy(reference(x), y) / size).backward()
                if other == 0:
                    (reference[0].bias.sum() / size).backward()
                hidden = torch.relu(reference[2](torch.relu(x @ reference[0].weight.t())))
                (reference[4](hidden).sum() / size).backward()
            for mine, theirs in zip(model.parameters(), reference.parameters()):
                torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)
            model.zero_grad()
            reference.zero_grad()


@check
def mixed_types_and_shared_parameters() -> None:
    rank, size = here()
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    parameters = [nn.Parameter(torch.ones(3, 5, dtype=kind)) for kind in kinds]
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    # One that is passed twice and used twice is one parameter.
    for compress in (None, "bf16", "int8"):
        with bucketed([*parameters, parameters[0], frozen], compress=compress) as buckets:
            for _ in range(2):
                value = sum((p * (rank + 1)).sum().abs().float() for p in parameters) + parameters[0].sum()
                value.backward()
                buckets.finish()
                for p in parameters:
                    wanted = (size + 1) / 2 + (1 if p is parameters[0] else 0)
                    torch.testing.assert_close(p.grad.abs().float(), torch.full((3, 5), wanted), rtol=0.02, atol=0)
                    p.grad = None
            assert frozen.grad is None


@check
def gradients_of_other_layouts() -> None:
    rank, size = here()
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with bucketed(model) as buckets:
        for _ in range(2):
            model(torch.full((1, 3, 5, 5), rank + 1.0).to(memory_format=torch.channels_last)).sum().backward()
            buckets.finish()
            torch.testing.assert_close(model.weight.grad, torch.full((4, 3, 3, 3), 9 * (size + 1) / 2))
            model.zero_grad()


@check
def int8_keeps_its_bound() -> None:
    """Each step within the bound, and the sum of many steps too: what is rounded off is not lost."""
    rank, size = here()
    count, steps = 5000, 25
    parameter = nn.Parameter(torch.zeros(count))
    with bucketed([parameter], compress="int8") as buckets:
        total, wanted, largest = torch.zeros(count), torch.zeros(count), 0.0
        for step in range(steps):
            gradients = [
                torch.randn(count, generator=torch.Generator().manual_seed(100 * step + r)) for r in range(size)
            ]
            (parameter * gradients[rank]).sum().backward()
            buckets.finish()
            total += parameter.grad
            wanted += sum(gradients) / size
            # What a rank keeps back is at most 1/254 of what it sends, so it sends at most 254/253 of its largest.
            largest = max(largest, sum(float(g.abs().max()) for g in gradients) / size)
            assert (total - wanted).abs().max() <= largest * 254 / 253 / 127 * (1 + 1e-4)
            parameter.grad = None
        assert (total - wanted).abs().max() > 0
        # Every rank has the same bits.
        everyone = [torch.empty(count) for _ in range(size)]
        dist.all_gather(everyone, total)
        assert all(torch.equal(everyone[0], other) for other in everyone)


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


@check
def reproducible_whatever_the_buckets() -> None:
    rank, _ = here()
    found = []
    for nbytes in (1, 3000, 1 << 30):
        model = net()
        with (
            abccl.init(reproducible=True) as comm,
            abccl.buckets.GradientBuckets(model, comm, nbytes) as buckets,
        ):
            loss_of(model, 0, rank).backward()
            buckets.finish()
            assert len(buckets._buckets) == {1: 6, 3000: 3, 1 << 30: 1}[nbytes]
            found.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@check
def bad_use() -> None:
    rank, _ = here()
    parameter = nn.Parameter(torch.ones(4))
    comm, wrong = abccl.init(), abccl.ArgumentError
    make = abccl.buckets.GradientBuckets
    for arguments, words in (
        (([], comm), "no parameter"),
        (([torch.ones(3)], comm), "Tensor"),
        (([nn.Parameter(torch.ones(3, device="meta"))], comm), "meta"),
        (([parameter], comm, 0), "bucket_bytes"),
        (([parameter], comm, "auto", "int4"), "compress"),
    ):
        with pytest.raises(wrong, match=words):
            make(*arguments)
    with pytest.raises(wrong, match="module"):
        make([parameter], comm, partition=True)
    with pytest.raises(wrong, match="other parameters"):
        make([nn.Parameter(torch.ones(3 + rank))], comm)
    with make([parameter], comm) as buckets:
        with pytest.raises(wrong, match="no iteration"):
            buckets.report()
        parameter.sum().backward()
        with pytest.raises(wrong, match="no_sync"):
            parameter.sum().backward()
        buckets.finish()
    with make(model := net(), comm, partition=True) as buckets:
        stepper = buckets.optimizer(torch.optim.SGD, lr=0.1)
        model.double()
        with pytest.raises(wrong, match="left its bucket"):
            stepper.step()
    embedding = nn.Embedding(5, 3, sparse=True)
    with make(embedding, comm), pytest.raises(wrong, match="sparse"):
        embedding(torch.tensor([1])).sum().backward()
    comm.close()


@check
def a_peer_that_leaves() -> None:
    """finish() raises, in time, on those that are left."""
    rank, size = here()
    parameter = nn.Parameter(torch.ones(1000))
    buckets = abccl.buckets.GradientBuckets([parameter], abccl.init(timeout=20), compress="int8" if size == 2 else None)
    parameter.sum().backward()
    buckets.finish()
    dist.barrier(Groups.gloo)  # all have finished, before the first learns of the loss and tells the others
    if rank == size - 1:
        buckets.close()
    else:
        parameter.grad = None
        parameter.sum().backward()
        with pytest.raises(abccl.CollectiveError):
            buckets.finish()
        buckets.close()
    dist.barrier(Groups.gloo)


# ---- DistributedDataParallel


def ddp_losses(state: Any, group: Any, use_hook: bool) -> list[float]:
    rank, _ = here()
    model = nn.parallel.DistributedDataParallel(net(), process_group=group, bucket_cap_mb=0.02)
    if use_hook:
        model.register_comm_hook(state() if callable(state) else state, abccl.buckets.hook)
    stepper, losses = adam(model.parameters()), []
    for step in range(6):
        loss = loss_of(model, step, rank)
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses


@check
def hook_of_ddp() -> None:
    state = abccl.buckets.HookState
    wanted = ddp_losses(None, Groups.gloo, False)
    for make, tolerance in (
        (None, 1e-6),
        (Groups.world, 1e-6),
        (lambda: state(), 1e-6),
        (lambda: state(abccl.init()), 1e-6),
        (lambda: state(compress="bf16"), 1e-2),
        (lambda: state(compress="fp16"), 2e-3),
        (lambda: state(compress="int8"), 2e-2),
    ):
        assert ddp_losses(make, Groups.world, True) == pytest.approx(wanted, rel=tolerance)
    with pytest.raises(abccl.ArgumentError, match="abccl's groups"):
        state(Groups.gloo)
    with pytest.raises(abccl.ArgumentError, match="compress"):
        state(compress="int4")


@pytest.mark.parametrize("name", CHECKS)
def test_buckets(name: str, ranks: int) -> None:
    if ranks < 2:
        pytest.skip("wants two ranks")
    returned(outcomes("test_buckets", ranks, abccl="CHECKS")["abccl"][name])


def test_public_names() -> None:
    from abccl.buckets import GradientBuckets, hook

    assert abccl.buckets.GradientBuckets is GradientBuckets and abccl.buckets.hook is hook
