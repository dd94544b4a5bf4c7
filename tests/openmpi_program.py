"""What a rank of a job does that Open MPI's rules are tried on: `mpirun ... openmpi_program.py RANKS CALLS`.

CALLS is JSON: for each collective, by abccl's name, the bytes of a rank's largest buffer. The first RANKS ranks make
them. Rank 0 prints what became of each, in the same form: "right", "wrong" or "refused".
"""

from __future__ import annotations

import json
import sys
from functools import partial

import numpy as np
from mpi4py import MPI


def outcome(comm: MPI.Intracomm, collective: str, size: int) -> str:
    """Of one call; sums are of whole numbers, so all algorithms must agree."""
    ranks, rank = comm.size, comm.rank
    whole, part = size // 4, size // 4 // ranks
    inputs = np.arange(ranks * whole, dtype="float32").reshape(ranks, whole)
    mine, out = inputs[rank].copy(), np.empty(whole, "float32")
    match collective:
        case "all_reduce":
            call, expected = partial(comm.Allreduce, mine, out), inputs.sum(0)
        case "reduce_scatter":
            call, expected = partial(comm.Reduce_scatter_block, mine, out[:part]), inputs.sum(0)[rank * part :]
        case "all_gather":
            call, expected = partial(comm.Allgather, mine[:part], out), inputs[:, :part].reshape(-1)
        case "broadcast":
            call, expected, out = partial(comm.Bcast, mine, 0), inputs[0], mine
        case "all_to_all":
            call, expected = partial(comm.Alltoall, mine, out), inputs[:, rank * part : (rank + 1) * part].reshape(-1)
    try:
        call()
    except MPI.Exception:
        return "refused"
    length = part if collective == "reduce_scatter" else whole
    return "right" if np.array_equal(out[:length], expected[:length]) else "wrong"


def main() -> None:
    """Make the calls."""
    ranks, calls, comm = int(sys.argv[1]), json.loads(sys.argv[2]), MPI.COMM_WORLD
    if ranks < comm.size:
        comm = comm.Split(MPI.UNDEFINED if comm.rank >= ranks else 0)
    if comm != MPI.COMM_NULL:
        found = {name: [outcome(comm, name, size) for size in sizes] for name, sizes in calls.items()}
        if comm.rank == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
