"""A tensor-parallel block on a 3-D grid of ranks: does it become faster than one process?

    python examples/tensor_parallel.py
    python examples/tensor_parallel.py --grid 2,2,1 --grid 4,1,1 --grid 1,1,4     # the same: x,y,z
    python examples/tensor_parallel.py --grid 2,2 --rows 2048 --width 512         # a 2-D grid; other sizes

The block is y = x + gelu(x W1) W2, forward and backward. Its matrices are spread over the grid as in AxoNN (Singh et
al., "A 4D Hybrid Algorithm to Scale Parallel Training to Thousands of GPUs", arXiv 2305.13525), after the 3-D matrix
multiplication of Agarwal et al. (IBM Journal of Research and Development 39(5), 1995):

    x, y     [rows, width]     rows over z, columns over y
    W1       [width, hidden]   rows over y, columns over x; what is left is sharded over z and gathered for use
    x W1     [rows, hidden]    rows over z, columns over x
    W2       [hidden, width]   rows over x, columns over y, else as W1

W2 has the roles of x and y swapped, so y is laid out as x is, and nothing is laid out anew between two layers.

A product over spread columns is a partial sum. AxoNN all_reduces it: along y after W1 and along x after W2, the other
way round in backward. Here an all_reduce is taken apart into its halves, as in sequence parallelism (Korthikanti
et al., arXiv 2205.05198): a reduce_scatter of rows behind a product, an all_gather of rows in front of the next. The
bytes are the same, and between the two gelu and residual do each row once. The backward of the one is the other, so
autograd finds the rest: the weights' gradients are reduce_scattered along z. (AxoNN gathers the weights once more in
backward, to save memory; here they are kept.)

Each axis has four such halves in a step. Of a grid of X, Y, Z ranks each rank sends, in elements:

    along x    4 (X - 1)/X   rows width / (Y Z)
    along y    4 (Y - 1)/Y   rows hidden / (X Z)
    along z    4 (Z - 1)/Z   width hidden / (X Y)

[X,1,1] is Megatron's tensor parallelism, [1,1,Z] is FSDP: the one is cheap for few rows, the other for many.

All grids take turns, step by step; times are medians over the steps, of the slowest rank. "communication" is the time
in collectives, waiting for slower ranks included; "compute" is the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from math import prod

import torch
from arguments import Help, positive
from torch.nn.functional import gelu

import abccl

TOLERANCE = 1e-4

Shape = tuple[int, int, int]
Case = tuple[Shape, int]  # a grid, and the threads of each rank

WARM_UP = 6
"""Steps that are not timed: a plan of long messages tries its ways of moving them in its first dozen runs."""


class Axis:
    """The line of ranks that differ in one coordinate only, and what its collectives cost."""

    def __init__(self, comm: abccl.Communicator) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.seconds, self.bytes = 0.0, 0

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks of the line."""
        out = x.new_empty(x.shape[0] * self.size, x.shape[1])
        start = time.perf_counter()
        self.comm.all_gather(out, x.contiguous())
        self._count(start, out)
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum over the line."""
        out = x.new_empty(x.shape[0] // self.size, x.shape[1])
        start = time.perf_counter()
        self.comm.reduce_scatter(out, x.contiguous())
        self._count(start, x)
        return out

    def _count(self, start: float, whole: torch.Tensor) -> None:
        self.seconds += time.perf_counter() - start
        self.bytes += whole.nbytes // self.size * (self.size - 1)


class Collective(torch.autograd.Function):
    """One collective forward, and its adjoint backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, forward: Callable, backward: Callable) -> torch.Tensor:
        ctx.backward_collective = backward
        return forward(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.backward_collective(gradient), None, None


def gather(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return x if axis.size == 1 else Collective.apply(x, axis.all_gather, axis.reduce_scatter)


def scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return x if axis.size == 1 else Collective.apply(x, axis.reduce_scatter, axis.all_gather)


class Grid:
    """This rank's place in a grid of ranks."""

    def __init__(self, comm: abccl.Communicator, shape: Shape) -> None:
        _, size_y, size_z = shape
        x, y, z = comm.rank // (size_y * size_z), comm.rank // size_z % size_y, comm.rank % size_z
        self.x = Axis(comm.split(color=y * size_z + z))
        self.y = Axis(comm.split(color=x * size_z + z))
        self.z = Axis(comm.split(color=x * size_y + y))
        self.axes = {"x": self.x, "y": self.y, "z": self.z}

    def shard(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part: rows are cut along two axes, one after the other, columns along one."""
        x, y, z = self.x, self.y, self.z
        outer, inner, columns = {"w1": (y, z, x), "w2": (x, z, y)}.get(name, (z, x, y))
        rows = whole.chunk(outer.size)[outer.rank].chunk(inner.size)[inner.rank]
        return rows.chunk(columns.size, 1)[columns.rank].contiguous()

    def linear(self, x: torch.Tensor, weight: torch.Tensor, columns: Axis, over: Axis) -> torch.Tensor:
        """x W: the columns of the result lie along `columns`, and the sum goes along `over`."""
        return scatter(gather(x, columns) @ gather(weight, self.z), over)

    def block(self, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        hidden = gelu(self.linear(x, w1, self.x, self.y))
        return x + self.linear(hidden, w2, self.y, self.x)


def alone(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """The block in one process."""
    return x + gelu(x @ w1) @ w2


def inputs(rows: int, width: int, hidden: int) -> dict[str, torch.Tensor]:
    """The same on all ranks: the input, the weights, and the gradient that comes from behind the block."""
    torch.manual_seed(0)
    w1, w2 = torch.randn(width, hidden) / width**0.5, torch.randn(hidden, width) / hidden**0.5
    return {"x": torch.randn(rows, width), "w1": w1, "w2": w2, "gradient": torch.randn(rows, width)}


def step(block: Callable, x, w1, w2, gradient) -> dict[str, torch.Tensor]:
    """Forward and backward: the output, and the gradients of the input and the weights by their names."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in (("x", x), ("w1", w1), ("w2", w2))}
    out = block(**leaves)
    out.backward(gradient)
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def check(grid: Grid, shards: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest error of this rank's shards, relative to the largest element of the whole tensor."""
    found = step(grid.block, **shards)
    return max(
        float((found[name] - grid.shard(name, whole)).abs().max() / whole.abs().max())
        for name, whole in expected.items()
    )


def rank_main(cases: list[Case], sizes: tuple[int, int, int], steps: int) -> list[dict | None]:
    """One rank of all grids. For each that it is in: the error, the bytes sent along each axis, times of the steps."""
    world = abccl.init()
    whole = inputs(*sizes)
    expected = step(alone, **whole)
    grids, found = [], []
    for shape, _ in cases:
        comm = world.split(0 if world.rank < prod(shape) else None)
        grid = Grid(comm, shape) if comm else None
        shards = {name: grid.shard(name, tensor) for name, tensor in whole.items()} if grid else {}
        grids.append((grid, shards))
        found.append(None)
        if grid:
            error = check(grid, shards, expected)
            sent = {name: axis.bytes for name, axis in grid.axes.items()}
            found[-1] = {"error": error, "bytes": sent, "steps": [], "communication": []}
    if world.rank == 0:
        print("  all grids have done a step; now they take turns", flush=True)

    for number in range(WARM_UP + steps):
        for (grid, shards), (_, threads), mine in zip(grids, cases, found):
            world.barrier()
            if not grid:
                continue
            torch.set_num_threads(threads)
            before = sum(axis.seconds for axis in grid.axes.values())
            start = time.perf_counter()
            step(grid.block, **shards)
            mine["steps"].append(time.perf_counter() - start)
            mine["communication"].append(sum(axis.seconds for axis in grid.axes.values()) - before)
        if world.rank == 0:
            print(f"\r  step {number + 1} of {WARM_UP + steps}", end="", flush=True)
    world.barrier()
    return found


def summary(case: Case, ranks: list[dict]) -> dict:
    """What the ranks of a grid found, together."""
    shape, threads = case
    seconds = [max(times) for times in zip(*(rank["steps"] for rank in ranks))]
    communication = [statistics.mean(times) for times in zip(*(rank["communication"] for rank in ranks))]
    return {
        "grid": list(shape),
        "threads": threads,
        "seconds": statistics.median(seconds[WARM_UP:]),
        "communication": statistics.median(communication[WARM_UP:]),
        "bytes": ranks[0]["bytes"],
        "error": max(rank["error"] for rank in ranks),
    }


def table(results: list[dict]) -> None:
    print("\n  grid      threads   step ms   compute   communication   sent along x / y / z, MB   speed     error")
    for one in results:
        whole, apart = one["seconds"] * 1e3, one["communication"] * 1e3
        sent = " / ".join(f"{one['bytes'][axis] / 1e6:.1f}" for axis in "xyz")
        print(
            f"  {label(one['grid']):10}{one['threads']:7}{whole:10.1f}{whole - apart:10.1f}{apart:16.1f}"
            f"{sent:>27}{results[0]['seconds'] / one['seconds']:7.2f}x{one['error']:10.1e}"
        )


def verdict(results: list[dict]) -> None:
    """Does it become faster?"""
    best = min((one for one in results if prod(one["grid"]) > 1), key=lambda one: one["seconds"])
    for one in results:
        if prod(one["grid"]) == 1:
            ratio = one["seconds"] / best["seconds"]
            print(f"{label(best['grid'])} has {ratio:.2f} times the speed of one process, threads={one['threads']}")


def label(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def grid_shape(text: str) -> Shape:
    words = text.split(",")
    sizes = [int(word) for word in words if word.isdecimal()]
    if not 1 <= len(sizes) == len(words) <= 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a grid is x,y,z or x,y with sizes from 1, and not {text!r}")
    return tuple(sizes + [1] * (3 - len(sizes)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--grid", action="append", type=grid_shape, metavar="X,Y,Z", help="several times: several; three if not at all"
    )
    parser.add_argument("--rows", type=positive, default=512, help="of the input: batch times sequence")
    parser.add_argument("--width", type=positive, default=1024, help="of the input")
    parser.add_argument("--hidden", type=positive, help="of the block, 4 times the width if not given")
    parser.add_argument("--steps", type=positive, default=10, help="that are timed, of each grid")
    parser.add_argument("--threads", type=positive, default=1, help="of each rank")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    options = parser.parse_args()
    shapes = options.grid or [(2, 2, 1), (4, 1, 1), (1, 1, 4)]
    rows, width, hidden = options.rows, options.width, options.hidden or 4 * options.width
    for x, y, z in shapes:
        if rows % (z * x) or rows % (z * y) or width % (y * z) or hidden % (x * z):
            parser.error(
                f"{label((x, y, z))}: --rows must be a multiple of xz and yz, --width of yz, --hidden of xz, and they "
                f"are {rows}, {width} and {hidden}"
            )

    cores, ranks = len(os.sched_getaffinity(0)), max(map(prod, shapes))
    cases = [((1, 1, 1), threads) for threads in sorted({options.threads, cores})]
    cases += [(shape, options.threads) for shape in shapes if prod(shape) > 1]
    print(f"x [{rows}, {width}], W1 [{width}, {hidden}], W2 [{hidden}, {width}], float32; {ranks} ranks, {cores} cores")
    found = abccl.spawn(rank_main, ranks, (cases, (rows, width, hidden), options.steps))
    results = [summary(case, [rank for rank in ranks if rank]) for case, ranks in zip(cases, zip(*found))]
    table(results)
    if ranks > 1:
        verdict(results)
    right = all(one["error"] < TOLERANCE for one in results)
    print(f"all results and gradients agree with one process to {TOLERANCE}: {'yes' if right else 'no'}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
