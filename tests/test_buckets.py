"""`abccl.buckets` on several ranks: training loops, what they may do, and the hook of DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import pytest
from bucket_models import adam, alone, batch, bucketed, loss_of, net, same
from torch_ranks import MARKS, Checks, Groups, assert_passes, dist, here, torch

import abccl

pytestmark = MARKS
nn = torch.nn

CHECKS = Checks()
check = CHECKS.add


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
def ranks_that_measure_differently() -> None:
    """Rank 0 decides, on the model and on the size; the second look happens once."""
    from abccl.collectives.buckets import gradients, sizing

    rank, _ = here()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizing, "fit", lambda *_: sizing.AlphaBeta(1.0 + rank, 2.0 + rank, 3.0 + rank))
        sizes = iter([64 << 10, 2000, 3000, 4000, 5000, 6000])
        patch.setattr(gradients, "best_bytes", lambda *_: next(sizes) + 1000 * rank)
        model = net()
        with bucketed(model) as buckets:
            seen = []
            for step in range(9):
                loss_of(model, step, rank).backward()
                buckets.finish()
                seen.append(len(buckets._buckets))
                assert (buckets._model.alpha, buckets._model.beta, buckets._model.launch) == (1.0, 2.0, 3.0)
            assert seen == [2, 2, 2, *[seen[-1]] * 6] and seen[-1] > 2
            assert buckets._bytes == 2000


@check
def buffers_and_frozen_parameters_become_rank_0s() -> None:
    rank, _ = here()
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(rank + 1)
    with bucketed(model):
        assert all((tensor == 1).all() for tensor in (*model.parameters(), *model.buffers()))


@check
def no_sync_inside_no_sync() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    with bucketed([parameter]) as buckets:
        with buckets.no_sync():
            with buckets.no_sync():
                pass
            parameter.sum().backward()
        assert not buckets._backward.arrived
        parameter.sum().backward()
        buckets.finish()
        assert parameter.grad.tolist() == [2.0] * 3
        # What has been sent must not be written to.
        parameter.sum().backward()
        with buckets.no_sync(), pytest.raises(abccl.ArgumentError, match="second gradient"):
            parameter.sum().backward()
        buckets.finish()


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
    with pytest.raises(wrong, match="other options"):
        make([parameter], comm, 100 + rank)
    with pytest.raises(wrong, match="bucket_bytes" if rank == 0 else "rank 0 has refused"):
        make([parameter], comm, True if rank == 0 else 100)
    with pytest.raises(wrong, match="communicator"):
        make([parameter], Groups.gloo)
    with make(model := net(), dist.group.WORLD) as buckets:
        with pytest.raises(wrong, match="assign"):
            model.load_state_dict(model.state_dict(), assign=True)
        model.double()
        with pytest.raises(wrong, match="float64"):
            model(batch(0, 0)[0].double()).sum().backward()
    with make(model := net(), comm, partition=True) as buckets:
        loss_of(model, 0, 0).backward()
        with pytest.raises(wrong, match=r"buckets\.optimizer"):
            buckets.finish()
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
    """It is raised, in time, on those that are left."""
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

        def step() -> None:
            parameter.sum().backward()  # raises too if the loss is known by then
            buckets.finish()

        with pytest.raises(abccl.CollectiveError):
            step()
        buckets.close()
    dist.barrier(Groups.gloo)


# ---- DistributedDataParallel


class Meddler(nn.Module):
    """Makes a collective of the user's in the middle of backward."""

    def forward(self, x: Any) -> Any:
        x.register_hook(lambda gradient: dist.all_reduce(torch.ones(3)))
        return x


def ddp_losses(state: Any, group: Any, use_hook: bool) -> list[float]:
    rank, _ = here()
    layers = list(net())
    model = nn.Sequential(*layers[:3], Meddler(), *layers[3:])
    model = nn.parallel.DistributedDataParallel(model, process_group=group, bucket_cap_mb=0.02)
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
        (lambda: state(abccl.init(), None), 1e-6),
        (lambda: state(compress="bf16"), 1e-2),
        (lambda: state(compress="fp16"), 2e-3),
        (lambda: state(compress="int8"), 2e-2),
    ):
        for group in (Groups.world, Groups.gloo)[: 1 if make is None else 2]:
            assert ddp_losses(make, group, True) == pytest.approx(wanted, rel=tolerance)
    with pytest.raises(abccl.ArgumentError, match="group of abccl's"):
        state(Groups.gloo)
    with pytest.raises(abccl.ArgumentError, match="compress"):
        state(compress="int4")


@pytest.mark.parametrize("name", CHECKS)
def test_buckets(name: str, ranks: int) -> None:
    assert_passes("test_buckets", name, ranks)


def test_public_names() -> None:
    from abccl.buckets import GradientBuckets, hook

    assert abccl.buckets.GradientBuckets is GradientBuckets and abccl.buckets.hook is hook
