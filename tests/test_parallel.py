"""Ways to train in parallel over abccl: the same losses as over Gloo, to the last bit.

Two ranks add two numbers, which has one result in any order.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from torch_ranks import MARKS, Checks, dist, here, outcomes, returned, torch

pytestmark = MARKS
nn = torch.nn

CHECKS = Checks()
check = CHECKS.add
STEPS = 3
WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def blocks(count: int = 2) -> Any:
    """The same on every rank, as if loaded from a file."""
    torch.manual_seed(5)
    return nn.Sequential(*(Block() for _ in range(count)))


def batches(seed: int, steps: int = STEPS) -> Iterator[tuple[Any, Any]]:
    """Inputs and what to make of them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(8, 4, WIDTH, generator=generator), torch.randn(8, 4, WIDTH, generator=generator)


def train(model: Any, optimizer: Any, seed: int, loss_of: Callable[..., Any] = nn.functional.mse_loss) -> list[float]:
    """The losses of a few steps."""
    losses = []
    for x, y in batches(seed):
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def adam(model: Any) -> Any:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    return torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


# ---- fully sharded data parallel


def sharded(model: Any, **how: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model:
        fully_shard(block, **how)
    return fully_shard(model, **how)


@check
def fsdp2() -> list[float]:
    model = sharded(blocks())
    return train(model, adam(model), dist.get_rank())


@check
def fsdp2_in_mixed_precision() -> list[float]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(blocks(), mp_policy=policy)
    return train(model, adam(model), dist.get_rank())


@check
def fsdp2_in_registered_memory() -> list[float]:
    """Gathers and reduces in memory of the process group, where it has some."""
    model = sharded(blocks())
    if dist.get_backend() != "abccl":
        return train(model, adam(model), dist.get_rank())
    for module in [model, *model]:
        module.set_allocate_memory_from_process_group_for_comm(True)
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        allocate = backend.allocate_tensor
        patch.setattr(backend, "allocate_tensor", lambda n, **how: (asked.append(n), allocate(n, **how))[1])
        losses = train(model, adam(model), dist.get_rank())
    assert asked
    return losses


@check
def fsdp2_of_accumulated_gradients() -> list[float]:
    model = sharded(blocks(), reshard_after_forward=False)
    optimizer = adam(model)
    losses = []
    for number, (x, y) in enumerate(batches(dist.get_rank(), 2 * STEPS)):
        model.set_requires_gradient_sync(number % 2 == 1)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(float(loss))
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@check
def fsdp1() -> list[float]:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    losses = []
    for strategy in ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD:
        for precision in None, MixedPrecision(torch.bfloat16, torch.float32):
            model = FullyShardedDataParallel(
                blocks(),
                sharding_strategy=strategy,
                mixed_precision=precision,
                auto_wrap_policy=ModuleWrapPolicy({Block}),
                device_id=torch.device("cpu"),
                use_orig_params=True,
            )
            losses += train(model, adam(model), dist.get_rank())
            with FullyShardedDataParallel.summon_full_params(model):
                losses.append(sum(float(p.double().sum()) for p in model.parameters()))
    return losses


@check
def replicated() -> list[float]:
    """Data parallel by the means of FSDP2."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    model = blocks()
    for block in model:
        replicate(block)
    replicate(model)
    return train(model, adam(model), dist.get_rank())


# ---- tensor parallel


def tensor_parallel(model: Any, mesh: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in model:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


@check
def tensor_parallelism() -> list[float]:
    model = tensor_parallel(blocks(), mesh_of(dist.get_world_size()))
    return train(model, adam(model), 0)


@check
def sequence_parallelism() -> list[float]:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    model, mesh = blocks(), mesh_of(dist.get_world_size())
    rows = Shard(1)
    for block in model:
        parallelize_module(
            block,
            mesh,
            {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=rows),
                "down": RowwiseParallel(output_layouts=rows, use_local_output=False),
            },
        )
    parallelize_module(
        model,
        mesh,
        {"0": PrepareModuleInput(input_layouts=torch.distributed.tensor.Replicate(), desired_input_layouts=rows)},
    )
    parallelize_module(
        model,
        mesh,
        {"1": PrepareModuleOutput(output_layouts=rows, desired_output_layouts=torch.distributed.tensor.Replicate())},
    )
    return train(model, adam(model), 0)


@check
def loss_parallelism() -> list[float]:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

    torch.manual_seed(5)
    embed, head = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, 10)
    plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(head, mesh_of(dist.get_world_size()), plan)
    model = nn.Sequential(embed, head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        words = torch.randint(0, 10, (32,), generator=generator)
        with loss_parallel():
            loss = nn.functional.cross_entropy(model(words), words)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.full_tensor() if hasattr(loss, "full_tensor") else loss))
    return losses


@check
def distributed_tensors() -> list[float]:
    """Every way from one placement to another, of a tensor that does not split evenly."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    _, size = here()
    mesh = mesh_of(size)
    matrix = torch.arange(35.0).view(7, 5)
    placements = [Replicate(), Shard(0), Shard(1)]
    for source, target in itertools.product(placements, placements):
        moved = distribute_tensor(matrix, mesh, [source]).redistribute(mesh, [target])
        assert torch.equal(moved.full_tensor(), matrix)
    for target in placements:
        total = DTensor.from_local(matrix, mesh, [Partial()]).redistribute(mesh, [target]).full_tensor()
        assert torch.equal(total, size * matrix)
    left, right = distribute_tensor(matrix, mesh, [Shard(1)]), distribute_tensor(matrix.t(), mesh, [Shard(0)])
    product = (left @ right).full_tensor()
    assert torch.equal(product, matrix @ matrix.t())
    return product.flatten().tolist()


# ---- optimizers


@check
def zero() -> list[float]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    losses = []
    for views in False, True:
        model = nn.parallel.DistributedDataParallel(blocks())
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.Adam, parameters_as_bucket_view=views, lr=0.01
        )
        losses += train(model, optimizer, dist.get_rank())
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            losses.append(sum(float(state["exp_avg"].sum()) for state in optimizer.state_dict()["state"].values()))
    return losses


@check
def zero_that_overlaps() -> list[float]:
    """Steps that begin in the backward pass. torch refuses it with Gloo, whose losses come without the overlap."""
    from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import hook_with_zero_step
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.optim import ZeroRedundancyOptimizer

    overlaps = dist.get_backend() != "gloo"
    model = nn.parallel.DistributedDataParallel(blocks(), bucket_cap_mb=0.01)
    optimizer = (
        ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, overlap_with_ddp=True, lr=0.01)
        if overlaps
        else adam(model)
    )
    if overlaps:
        model.register_comm_hook(None, hook_with_zero_step(allreduce_hook, model, optimizer))
    losses = []
    for number, (x, y) in enumerate(batches(dist.get_rank(), 2 * STEPS)):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        # The first steps only learn which parameters are in which bucket.
        if not overlaps and number >= 2:
            optimizer.step()
        model.zero_grad()
        losses.append(float(loss))
    return losses


@check
def averaged_models() -> list[float]:
    """Every rank for itself, and the mean of their models now and then."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model = blocks()
    optimizer = PostLocalSGDOptimizer(adam(model), PeriodicModelAverager(period=2, warmup_steps=0))
    return train(model, optimizer, dist.get_rank())


# ---- pipelines


def pipeline(
    schedule: str, per_rank: int, mesh: Any = None, wrap: Callable[[Any], Any] = lambda model: model
) -> list[float]:
    """The losses on the rank of the last stage, and on all a sum of their weights."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

    group = mesh.get_group() if mesh else dist.group.WORLD
    rank, size = group.rank(), group.size()
    count = per_rank * size
    # The schedules in the shape of a V give a rank a stage from the front and one from the back.
    numbers = [rank, count - 1 - rank] if schedule in V_SHAPED else list(range(rank, count, size))
    whole, kind, device = blocks(count), get_schedule_class(schedule), torch.device("cpu")
    model = nn.ModuleList(wrap(nn.Sequential(whole[number])) for number in numbers)
    stages = [PipelineStage(part, number, count, device, group=group) for part, number in zip(model, numbers)]
    several = issubclass(kind, PipelineScheduleMulti)
    run = kind(stages if several else stages[0], n_microbatches=4, loss_fn=nn.functional.mse_loss)
    optimizer = adam(model)
    losses: list[float] = []
    for x, y in batches(0):
        found: list[Any] = []
        first, last = 0 in numbers, count - 1 in numbers
        run.step(*([x] if first else []), **({"target": y, "losses": found} if last else {}))
        optimizer.step()
        optimizer.zero_grad()
        losses += [float(loss) for loss in found]
    weights = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return [*losses, sum(float(weight.double().sum()) for weight in weights)]


V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SINGLE = ("GPipe", "1F1B")
SEVERAL = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", *V_SHAPED)
CHECKS |= {f"pipeline_{schedule}": partial(pipeline, schedule, 1) for schedule in SINGLE}
CHECKS |= {f"pipeline_{schedule}": partial(pipeline, schedule, 2) for schedule in SEVERAL}


# ---- checkpoints


def shared_folder() -> Any:
    """A folder of rank 0, known to all."""
    folder = tempfile.TemporaryDirectory()
    names = [folder.name]
    dist.broadcast_object_list(names)
    return folder, names[0]


@check
def checkpoint() -> list[float]:
    """Half of the steps, a checkpoint, the other half from there in another process's place: other shards."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    losses = []
    for asynchronous in False, True:
        folder, name = shared_folder()
        model = sharded(blocks())
        optimizer = adam(model)
        losses += train(model, optimizer, dist.get_rank())
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state}
        if asynchronous:
            checkpoint.async_save(saved, checkpoint_id=name).result()
        else:
            checkpoint.save(saved, checkpoint_id=name)
        again = tensor_parallel(blocks(), mesh_of(dist.get_world_size()))
        optimizer = adam(again)
        weights, state = get_state_dict(again, optimizer)
        loaded = {"model": weights, "optimizer": state}
        checkpoint.load(loaded, checkpoint_id=name)
        set_state_dict(again, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        for ours, theirs in zip(again.parameters(), model.parameters()):
            full = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
            assert torch.equal(full, theirs.full_tensor())
        losses += train(again, optimizer, 0)
        dist.barrier()
        folder.cleanup()
    return losses


# ---- on a grid of four ranks


GRID = Checks()


@GRID.add
def hybrid_sharded() -> list[float]:
    """FSDP2 whose shards are on two ranks, and each of them on two pairs of ranks."""
    model = sharded(blocks(), mesh=mesh_of(2, 2, names=("replicate", "shard")))
    return train(model, adam(model), dist.get_rank())


@GRID.add
def hybrid_sharded_fsdp1() -> list[float]:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    model = FullyShardedDataParallel(
        blocks(),
        device_mesh=mesh_of(2, 2, names=("replicate", "shard")),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_id=torch.device("cpu"),
    )
    return train(model, adam(model), dist.get_rank())


@GRID.add
def fsdp2_and_tensor_parallelism() -> list[float]:
    """A checkpoint of the grid is read by shards of four."""
    from torch.distributed import checkpoint

    mesh = mesh_of(2, 2, names=("data", "tensor"))
    model = sharded(tensor_parallel(blocks(), mesh["tensor"]), mesh=mesh["data"])
    losses = train(model, adam(model), mesh["data"].get_local_rank())
    folder, name = shared_folder()
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=name)
    again = sharded(blocks())
    loaded = {"model": again.state_dict()}
    checkpoint.load(loaded, checkpoint_id=name)
    again.load_state_dict(loaded["model"])
    for ours, theirs in zip(again.parameters(), model.parameters()):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor())
    folder.cleanup()
    return losses


@GRID.add
def ddp_and_tensor_parallelism() -> list[float]:
    from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform

    mesh = mesh_of(2, 2, names=("data", "tensor"))
    model = tensor_parallel(blocks(), mesh["tensor"])
    _pre_dp_module_transform(model)
    model = nn.parallel.DistributedDataParallel(model, device_mesh=mesh["data"])
    return train(model, adam(model), mesh["data"].get_local_rank())


@GRID.add
def fsdp2_and_a_pipeline() -> list[float]:
    mesh = mesh_of(2, 2, names=("stage", "data"))
    return pipeline("1F1B", 1, mesh["stage"], lambda model: sharded(model, mesh=mesh["data"]))


@pytest.mark.parametrize("name", CHECKS)
def test_same_as_gloo(name: str) -> None:
    same(outcomes("test_parallel", 2, abccl="CHECKS", gloo="CHECKS"), name)


@pytest.mark.parametrize("name", GRID)
def test_same_as_gloo_on_a_grid(name: str) -> None:
    same(outcomes("test_parallel", 4, abccl="GRID", gloo="GRID"), name)


def same(found: Any, name: str) -> None:
    ours, theirs = returned(found["abccl"][name]), returned(found["gloo"][name])
    assert ours == theirs
    assert all(math.isfinite(loss) for losses in ours for loss in losses)
