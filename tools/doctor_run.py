"""Two ranks that all_reduce and look at the bits: `python -m abccl.tools.doctor_run shm|gloo|mpi|device [RANKS]`.

The doctor starts it, with a time limit, and reads what it prints: JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from .. import collectives

SMALL, LARGE = 4, 1 << 20
BATCHES, SECONDS = 5, 0.05


def measure(transport: str) -> dict[str, Any]:
    """Check and time an all_reduce of SMALL and of LARGE bytes of float32. Collective.

    Raises:
        ValueError: the result is wrong.
    """
    device = transport == "device"
    with collectives.init(None if device else transport, timeout=30.0) as communicator:
        found: dict[str, Any] = {"ranks": communicator.size}
        for name, nbytes in (("small", SMALL), ("large", LARGE)):
            found[name] = _one(communicator, nbytes // 4, device)
        found["transport"] = f"{communicator.devices}" if device else repr(communicator).split(" over ")[1].rstrip(">")
        communicator.barrier()
        return found


def _one(communicator: Any, elements: int, device: bool) -> float:
    """The seconds of one all_reduce of so many elements."""
    rank, size = communicator.rank, communicator.size
    # Whole numbers, whose sum is exact whatever the order.
    mine = (np.arange(elements) % 251 + rank).astype(np.float32)
    wanted = (size * (np.arange(elements) % 251) + size * (size - 1) // 2).astype(np.float32)
    if device:
        import cupy

        cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount()).use()
        mine = cupy.asarray(mine)
    out = mine.copy()
    communicator.all_reduce(mine, out=out)
    came = out.get() if device else out
    if came.tobytes() != wanted.tobytes():
        place = int(np.flatnonzero(came != wanted)[0])
        raise ValueError(f"element {place} of {elements} came as {came[place]}, and should be {wanted[place]}")
    calls, times = 1, []
    while True:  # as many calls as take long enough to be timed; rank 0 says when
        took = _batch(communicator, mine, out, calls, device)
        enough = np.array([took >= SECONDS / BATCHES], dtype=np.int32)
        communicator.broadcast(enough)
        if enough[0]:
            break
        calls *= 2
    for _ in range(BATCHES):
        times.append(_batch(communicator, mine, out, calls, device) / calls)
    return statistics.median(times)


def _batch(communicator: Any, mine: Any, out: Any, calls: int, device: bool) -> float:
    communicator.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        communicator.all_reduce(mine, out=out)
    if device:
        import cupy

        cupy.cuda.get_current_stream().synchronize()
    return time.perf_counter() - start


def main(transport: str, ranks: int) -> None:
    """Run it and print what rank 0 found; an MPI's ranks are here already."""
    if transport != "mpi":
        found = collectives.spawn(measure, ranks, (transport,), timeout=60.0)
        print("\n" + json.dumps(found[0]))
        return
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    mine = measure(transport)
    if rank == 0:
        print("\n" + json.dumps(mine))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2)
