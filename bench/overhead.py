"""What Python and torch add to the native run of a 4-byte all_reduce, door by door.

    torchrun --nproc-per-node 2 -m -- abccl.bench.overhead
    python -m abccl.bench.overhead                              # one rank

The doors take turns, in rounds of 2000 calls; the medians of 31 rounds are printed, of rank 0.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import click

ROUNDS, CALLS = 31, 2000


@click.command()
def main() -> None:
    """Compare a persistent collective, the communicator's method and torch.distributed on 4 bytes."""
    import torch
    import torch.distributed as dist

    from ..collectives import init
    from ..collectives.torch.register import register

    register()
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("abccl")
    else:
        dist.init_process_group("abccl", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    comm, x = init(), torch.ones(1)
    doors: dict[str, Callable[[], object]] = {
        "native run (persistent)": comm.all_reduce_init(x),
        "Communicator.all_reduce": lambda: comm.all_reduce(x),
        "torch.distributed.all_reduce": lambda: dist.all_reduce(x),
    }
    found: dict[str, list[float]] = {door: [] for door in doors}
    for _ in range(ROUNDS):
        for door, call in doors.items():
            x.zero_()
            comm.barrier()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            found[door].append((time.perf_counter() - start) / CALLS)
    if comm.rank == 0:
        native = median(found["native run (persistent)"])
        click.echo(f"4-byte all_reduce, {comm.size} rank{'s' * (comm.size > 1)}")
        for door, times in found.items():
            click.echo(f"  {door:30} {median(times) * 1e6:7.3f} us   {(median(times) - native) * 1e6:+7.3f}")
    comm.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
