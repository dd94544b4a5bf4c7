"""Many ranks on one machine, as processes: what tests/test_many_ranks.py starts.

    python tests/many_ranks.py collectives 64

Forked from this small process, which has imported all that they need and has no threads: so 64 ranks take seconds and
share most of their memory; started anew, each would take half a second of a core to import numpy and the library.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("ABCCL_TUNER", "built-in")

import numpy as np

import abccl
from abccl import Collective, Communicator
from abccl.algorithms import algorithms
from abccl.transports import joint, shm  # noqa: F401  (imported before ranks are forked)

TIMEOUT = 60.0
SECONDS = float(os.environ.get("ABCCL_TEST_SECONDS", "150"))
"""For all of it: many times what an idle machine takes."""
SMALL, LARGE = 8, 1 << 20
CHEAP = ("recursive_doubling", "tree", "knomial", "recursive_multiplying")
"""With few steps each, and each step is a turn of each of the ranks on their few cores."""
STRAIGHT = ("direct", "bruck")
"""Of an all_to_all. What forwards half of all blocks in one message, as a tree does, cuts 1 MiB into 2,048 segments."""


def checked(c: Communicator, collective: Collective, algorithm: str | None, nbytes: int) -> None:
    """Make the call on buffers of so many bytes of all ranks together (of each, where nothing is cut), and check it."""
    rank, size, root = c.rank, c.size, c.size - 1
    part = max(1, nbytes // (4 * size))
    count = part * size
    base = np.arange(count, dtype=np.int32) % 1000
    own, ranks = base + rank, np.arange(size, dtype=np.int32)
    total, parts = size * base + size * (size - 1) // 2, base.reshape(size, part)
    whole, out = np.empty((size, part), np.int32), np.empty(part, np.int32)
    match collective:
        case Collective.ALL_REDUCE:
            c.all_reduce(own, algorithm=algorithm)
            right = np.array_equal(own, total)
        case Collective.REDUCE:
            c.reduce(own, root=root, algorithm=algorithm)
            right = np.array_equal(own, total if rank == root else base + rank)
        case Collective.BROADCAST:
            c.broadcast(own, root, algorithm=algorithm)
            right = np.array_equal(own, base + root)
        case Collective.REDUCE_SCATTER:
            c.reduce_scatter(out, own, algorithm=algorithm)
            right = np.array_equal(out, total.reshape(size, part)[rank])
        case Collective.ALL_GATHER:
            c.all_gather(whole, parts[0] + rank, algorithm=algorithm)
            right = np.array_equal(whole, parts[0] + ranks[:, None])
        case Collective.GATHER:
            c.gather(whole if rank == root else None, parts[0] + rank, root, algorithm=algorithm)
            right = rank != root or np.array_equal(whole, parts[0] + ranks[:, None])
        case Collective.SCATTER:
            c.scatter(out, own if rank == root else None, root, algorithm=algorithm)
            right = np.array_equal(out, parts[rank] + root)
        case Collective.ALL_TO_ALL:
            c.all_to_all(whole, own, algorithm=algorithm)
            right = np.array_equal(whole, parts[rank] + ranks[:, None])
        case Collective.BARRIER:
            c.barrier(algorithm=algorithm)
            right = True
    assert right, f"rank {rank}: {collective.value} of {nbytes} bytes by {algorithm or 'the tuner'} came out wrong"


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def collectives() -> dict[str, Any]:
    """All collectives, small and large, by the tuner's choice and by several algorithms."""
    started, spent = time.monotonic(), _cpu()
    calls = 0
    with abccl.init(timeout=TIMEOUT) as c:
        met, met_cpu = time.monotonic() - started, _cpu() - spent
        for collective in Collective:
            known = algorithms(collective)
            cheap = STRAIGHT if collective is Collective.ALL_TO_ALL else [name for name in CHEAP if name in known][:2]
            # Choosing takes each rank some 0.1 s for each collective, so once is enough: 64 ranks share two cores.
            names = [*[None] * (collective is Collective.ALL_REDUCE), *cheap]
            for algorithm in names:
                for nbytes in (SMALL, LARGE) if collective is not Collective.BARRIER else (0,):
                    checked(c, collective, algorithm, nbytes)
                    calls += 1
        files = len(os.listdir("/proc/self/fd"))
        c.barrier()
    return {"calls": calls, "met": met, "met_cpu": met_cpu, "cpu": _cpu() - spent, "files": files}


def missing(which: int) -> str:
    """One rank does not come to the second call; what the others are told."""
    with abccl.init(timeout=TIMEOUT) as c:
        x = np.ones(4, np.float32)
        c.all_reduce(x)
        c.barrier()
        if c.rank == which:
            # It is there, and alive, until all others have given up.
            while not any_failed(c):
                time.sleep(0.01)
            return "was missing"
        c.set_timeout(2.0)
        try:
            c.all_reduce(x)
        except abccl.CollectiveError as error:
            return f"{type(error).__name__}: {error}"
        return "no error"


def any_failed(c: Communicator) -> bool:
    """Whether the communicator is broken: asked of a message that nobody sends."""
    try:
        c.recv(np.empty(1, np.uint8), (c.rank + 1) % c.size, 7, async_op=True).is_completed()
    except abccl.CollectiveError:
        return True
    return False


def killed(which: int) -> tuple[str, float]:
    """One rank is killed while all call; what the others are told, and how long that took."""
    c = abccl.init(timeout=TIMEOUT)
    x = np.ones(4, np.float32)
    c.all_reduce(x)
    start = time.monotonic()
    try:
        c.barrier()
        start = time.monotonic()
        if c.rank == which:
            os.kill(os.getpid(), signal.SIGKILL)
        c.all_reduce(x)
    except abccl.CollectiveError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    finally:
        c.close()
    return "no error", 0.0


torch: Any = None  # only where it is wanted: it takes seconds to import


def over_torch(store: str) -> list[float]:
    """torch.distributed's calls; what came of each."""
    from abccl.collectives import bootstrap

    dist = torch.distributed
    assert bootstrap.spawned is not None
    rank, size = bootstrap.spawned.rank, bootstrap.spawned.size
    dist.init_process_group("abccl", init_method=f"file://{store}", rank=rank, world_size=size)
    x = torch.full((1000,), float(rank))
    dist.all_reduce(x)
    parts = [torch.empty(3) for _ in range(size)]
    dist.all_gather(parts, torch.full((3,), float(rank)))
    y = torch.full((5,), float(rank))
    dist.broadcast(y, size - 1)
    out = torch.empty(size)
    dist.all_to_all_single(out, torch.full((size,), float(rank)))
    group = dist.new_group(list(range(0, size, 2)), backend="abccl")
    z = torch.ones(2)
    if rank % 2 == 0:
        dist.all_reduce(z, group=group)
    dist.barrier()
    dist.destroy_process_group()
    return [x.sum().item() / 1000, sum(float(part[0]) for part in parts), y[0].item(), out.sum().item(), z[0].item()]


BODIES: dict[str, Callable[..., Any]] = {
    "collectives": collectives,
    "missing": missing,
    "killed": killed,
    "torch": over_torch,
}


def main() -> None:
    """Run a body among so many ranks and print what each returned, as JSON; null for a rank that failed."""
    name, ranks, *rest = sys.argv[1:]
    if name == "torch":
        globals()["torch"] = importlib.import_module("torch")
    goes_on = "continue" if name == "killed" else "end"
    start = time.monotonic()
    args = rest if name == "torch" else map(int, rest)
    came = abccl.spawn(  # type: ignore[call-overload]
        BODIES[name], int(ranks), tuple(args), start_method="fork", timeout=SECONDS, on_failure=goes_on
    )
    results = [None if isinstance(result, abccl.RankFailed) else result for result in came]
    print(json.dumps({"seconds": time.monotonic() - start, "results": results}))


if __name__ == "__main__":
    main()
