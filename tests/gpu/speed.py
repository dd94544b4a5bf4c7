"""all_reduce among processes that share the one device: abccl against Gloo with CUDA tensors, and NCCL where it can.

All take turns in every round, on tensors of torch's. A call's time is that of the slowest rank from a barrier to the
device being idle, divided by the calls between; medians over rounds are compared. Every contestant's result is compared
with the sum first. With the fake driver the tensors are on the CPU: that tries this program, and no figure is kept.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from gpu.checks import FIGURES_FILE
from gpu.device import FAKE

import abccl
from abccl.algorithms.words import in_words
from abccl.bench.table import microseconds

RANKS = (2,) if FAKE else (2, 4)
SIZES = (4, 4096, 1 << 20) if FAKE else (4, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 128 << 20)
ROUNDS = 3 if FAKE else 11
SLICE = 0.02
"""Seconds that a contestant gets in a round, or so."""
MOST_CALLS = 16
"""In a row: each adds up what the one before left, and float32 must hold it."""
NCCL_FROM = (2, 30)
"""The first NCCL that takes several ranks on a GPU, by NCCL_MULTI_RANK_GPU_ENABLE=1."""

Contestants = dict[str, Callable[[Any], Any]]


def contestants(comm: Any, folder: str) -> tuple[Contestants, list[str]]:
    """Who takes part, and why somebody does not."""
    import torch
    import torch.distributed as dist

    store = dist.FileStore(os.path.join(folder, "store"), comm.size)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    found: Contestants = {"abccl": comm.all_reduce, "gloo": dist.all_reduce}
    if FAKE or not dist.is_nccl_available():
        return found, ["NCCL is left out: torch has none, or no GPU"]
    version = torch.cuda.nccl.version()
    if version < NCCL_FROM:
        words = ".".join(map(str, version))
        return found, [f"NCCL {words} is left out: it takes one rank on a GPU, and several from 2.30 on"]
    group = dist.new_group(backend="nccl")
    try:
        dist.all_reduce(torch.ones(1, device="cuda:0"), group=group)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return found, [f"NCCL is left out: {str(error).splitlines()[0]}"]
    return {**found, "nccl": lambda x: dist.all_reduce(x, group=group)}, []


def measure(folder: str) -> dict[str, Any]:
    """On every rank: the medians in seconds, by contestant, of every size."""
    import torch
    import torch.distributed as dist

    device = "cpu" if FAKE else "cuda:0"
    comm = abccl.init()
    found, notes = contestants(comm, folder)
    rows = []
    for size in SIZES:
        count = size // 4
        pattern = torch.arange(count, device=device, dtype=torch.float32) % 7
        given, wanted = pattern * (comm.rank + 1), pattern * sum(range(1, comm.size + 1))
        x = given.clone()

        def seconds(call: Callable[[Any], Any], calls: int, x: Any = x, given: Any = given) -> float:
            x.copy_(given)
            _finish()
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(calls):
                call(x)
            _finish()
            return (time.perf_counter() - begin) / calls

        calls = {}
        for name, call in found.items():
            once = [seconds(call, 1) for _ in range(3)][-1]
            assert torch.equal(x, wanted), f"{name} has another sum of {count} elements"
            wish = torch.tensor([max(1, min(MOST_CALLS, int(SLICE / once)))])
            dist.all_reduce(wish, op=dist.ReduceOp.MIN)
            calls[name] = int(wish)
        taken: dict[str, list[float]] = {name: [] for name in found}
        for number in range(ROUNDS):
            for name in list(found)[:: 1 if number % 2 else -1]:
                slowest = torch.tensor([seconds(found[name], calls[name])], dtype=torch.float64)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                taken[name].append(float(slowest))
        rows.append({"size": size, **{name: statistics.median(times) for name, times in taken.items()}})
        if comm.rank == 0:
            print(f"{comm.size} ranks: {rows[-1]}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    told = str(comm.devices or comm)
    comm.close()
    return {"rows": rows, "notes": notes, "communicator": told}


def _finish() -> None:
    import torch

    if not FAKE:
        torch.cuda.synchronize()


def main() -> int:
    """Measure, print, leave the figures."""
    names = ("abccl", "gloo", "nccl")
    rows, notes, ratios = [], [], []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            found = abccl.spawn(measure, ranks, args=(folder,), timeout=400)[0]
        notes += [note for note in found["notes"] if note not in notes]
        print(found["communicator"])
        for row in found["rows"]:
            times = [microseconds(row[name]) if name in row else "-" for name in names]
            parts = [f"{row[name] / row['abccl']:.2f}" if name in row else "-" for name in names[1:]]
            rows.append([str(ranks), in_words(row["size"]), *times, *parts])
            ratios.append(row["gloo"] / row["abccl"])
    showed = f"{statistics.geometric_mean(ratios):.1f} times as fast as Gloo, {min(ratios):.1f} at least"
    showed = "fake driver: no GPU was used" if FAKE else showed
    notes.append(
        f"float32, medians of {ROUNDS} rounds in turns. All ranks share one GPU, which gives its time to one process "
        "after the other: these figures say nothing about speed between GPUs."
    )
    columns = ["ranks", "bytes", "abccl us", "Gloo us", "NCCL us", "Gloo / abccl", "NCCL / abccl"]
    figures = {"title": "all_reduce among processes on one GPU", "columns": columns, "rows": rows, "notes": notes}
    if FIGURES_FILE in os.environ:
        with open(os.environ[FIGURES_FILE], "w", encoding="utf-8") as file:
            json.dump({"showed": showed, "figures": [figures]}, file)
    print(showed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
