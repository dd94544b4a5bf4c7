"""What every rank of a job across hosts runs; test_hosts.py starts it. Prints "OK" and what it is when all is right.

hosts_program.py check 2,1,1     everything that a communicator does, on hosts of 2, 1 and 1 ranks
hosts_program.py torch 2,1,1     torch.distributed over abccl
hosts_program.py loop SECONDS    all_reduce until an error ends it; prints it, and the seconds that it took
hosts_program.py kill SECONDS FOLDER RANK    the same, and after some turns this rank kills itself
hosts_program.py stay SECONDS FOLDER RANK    the same, and after some turns this rank calls nothing any more
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import abccl
from abccl import Communicator
from abccl.algorithms import Collective, algorithms

# Of each rank's part, in elements: the last makes a vector of 1 MiB for four ranks of float32.
COUNTS = (0, 1, 1001, 1 << 16)
DTYPES = ("float32", "int64", "float16")

TURNS = 20
"""After which a rank dies or stays away."""


class Case(NamedTuple):
    """One call of a collective, and what must be in `result` after it. `result` may be one of the arguments."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Any
    expected: Any


def values(rank: int, count: int, dtype: str) -> Any:
    """Small whole numbers, of which sums are exact in every type."""
    return np.random.default_rng([rank, count]).integers(0, 8, count).astype(dtype)


def case(comm: Communicator, collective: Collective, count: int, dtype: str, root: int) -> Case:
    """The call, with `count` elements in each rank's part."""
    rank, size = comm.rank, comm.size
    whole = [values(r, count * size, dtype) for r in range(size)]
    x, own = whole[rank].copy(), slice(rank * count, (rank + 1) * count)
    gathered = np.concatenate([array[:count] for array in whole])
    total = np.sum(whole, axis=0, dtype=dtype)
    part, full = np.empty(count, dtype), np.empty(count * size, dtype)
    at_root = rank == root
    match collective:
        case Collective.ALL_REDUCE:
            return Case(comm.all_reduce, (x,), x, total)
        case Collective.REDUCE:
            return Case(comm.reduce, (x, "sum", root), x, total if at_root else whole[rank])
        case Collective.REDUCE_SCATTER:
            return Case(comm.reduce_scatter, (part, x), part, total[own])
        case Collective.ALL_GATHER:
            return Case(comm.all_gather, (full, x[:count]), full, gathered)
        case Collective.GATHER:
            there = full if at_root else None
            return Case(comm.gather, (there, x[:count], root), there, gathered if at_root else None)
        case Collective.BROADCAST:
            return Case(comm.broadcast, (x, root), x, whole[root])
        case Collective.SCATTER:
            return Case(comm.scatter, (part, x if at_root else None, root), part, whole[root][own])
        case Collective.ALL_TO_ALL:
            return Case(comm.all_to_all, (full, x), full, np.concatenate([array[own] for array in whole]))
        case Collective.BARRIER:
            return Case(comm.barrier, (), None, None)


def check_collectives(comm: Communicator) -> None:
    """Every collective by every algorithm in all sizes; types and roots by the default one."""
    for collective in Collective:
        rooted = range(comm.size) if collective.rooted else [0]
        named = [name for name, a in algorithms(collective).items() if a.refusal(comm.size) is None]
        named += ["native"] * (collective in comm._transport.collectives)
        calls: Iterator[tuple[str | None, int, str, int]] = itertools.chain(
            itertools.product([None, *named], COUNTS, DTYPES[:1], [0]),
            itertools.product([None], COUNTS[:-1], DTYPES[1:], rooted),
            itertools.product(named, [1001], DTYPES[:1], rooted[1:]),
        )
        for name, count, dtype, root in calls:
            given = case(comm, collective, count, dtype, root)
            given.call(*given.arguments, algorithm=name)
            told = f"{collective.value} {name}: {count} elements a rank of {dtype}, root {root}"
            assert np.array_equal(given.result, given.expected), told


def check_forms(comm: Communicator) -> None:
    """Several at once, persistent ones, parts of unequal size, operators, registered memory."""
    cases = [case(comm, collective, 1001, "float32", 1) for collective in Collective]
    for work in [given.call(*given.arguments, async_op=True) for given in cases]:
        work.wait()
    for given in cases:
        assert np.array_equal(given.result, given.expected), f"{given.call.__name__}, async"

    x, out = comm.empty(1001), comm.empty(1001)
    step = comm.all_reduce_init(x, "max", out=out)
    for turn in range(3):
        x[:] = comm.rank + turn
        if turn == 1:
            step.start()
            step.wait()
        else:
            step()
        assert np.all(out == comm.size - 1 + turn), f"persistent, turn {turn}"

    counts = list(range(comm.size))
    everything = np.concatenate([np.full(r, r, "int32") for r in counts])
    got = np.empty_like(everything)
    comm.all_gather(got, np.full(comm.rank, comm.rank, "int32"), counts=counts)
    assert np.array_equal(got, everything), "all_gather with counts"
    mine = np.empty(comm.rank, "int32")
    comm.reduce_scatter(mine, everything, counts=counts)
    assert np.all(mine == comm.rank * comm.size), "reduce_scatter with counts"
    received = np.empty(comm.rank * comm.size, "int32")
    comm.all_to_all(received, everything, [comm.rank] * comm.size, counts)
    assert np.all(received == comm.rank), "all_to_all with splits"


def check_messages(comm: Communicator) -> None:
    """Tags out of order, short and long ones, from anybody, both ways at once."""
    peers = [rank for rank in range(comm.size) if rank != comm.rank]
    for count in (0, 1, 1001, 1 << 18):
        sent = [
            comm.send(np.full(count, 10 * comm.rank + tag, "float32"), peer, tag, async_op=True)
            for peer in peers
            for tag in (1, 2)
        ]
        for peer, tag in itertools.product(reversed(peers), (2, 1)):
            x = np.empty(count, "float32")
            assert comm.recv(x, peer, tag) == peer and np.all(x == 10 * peer + tag), f"tag {tag} from {peer}"
        for work in sent:
            work.wait()
    comm.barrier()
    sent = [comm.send(np.array([comm.rank]), peer, 3, async_op=True) for peer in peers]
    came = []
    for _ in peers:
        x = np.empty(1, "int64")
        came.append(comm.recv(x, None, 3))
        assert x[0] == came[-1], f"the message from {came[-1]} says that it is from {x[0]}"
    assert sorted(came) == peers, f"from anybody: {came}"
    for work in sent:
        work.wait()


def check_split(comm: Communicator, hosts: list[list[int]]) -> None:
    """A communicator of each host's ranks, and one across them in reverse order; both at work at the same time."""
    own = next(ranks for ranks in hosts if comm.rank in ranks)
    place = own.index(comm.rank)
    equals = [ranks[place] for ranks in reversed(hosts) if len(ranks) > place]
    local = comm.split(hosts.index(own))
    across = comm.split(place, key=-comm.rank)
    assert local and across and comm.split(None) is None
    with local, across:
        a, b = np.full(1001, comm.rank), np.full(1001, comm.rank)
        for work in (local.all_reduce(a, async_op=True), across.all_reduce(b, async_op=True)):
            work.wait()
        assert np.all(a == sum(own)), "the host's communicator"
        assert np.all(b == sum(equals)) and equals[across.rank] == comm.rank, "the communicator across hosts"
        local.barrier()
        across.barrier()


def check_reproducible() -> None:
    """The same bits on all ranks, whatever the algorithm."""
    with abccl.init(reproducible=True) as comm:
        x = np.random.default_rng(comm.rank).standard_normal(10_001).astype("float32")
        results = []
        for name in None, "direct":
            out = np.empty_like(x)
            comm.all_reduce(x, out=out, algorithm=name)
            results.append(out)
            everyone = np.empty((comm.size, len(x)), "float32")
            comm.all_gather(everyone, out)
            assert np.all(everyone == out), "ranks differ"
        assert np.array_equal(*results), "algorithms differ"
        comm.barrier()


def check(hosts: list[list[int]]) -> None:
    """All of the above."""
    with abccl.init(timeout=60) as comm:
        found = [list(host.ranks) for host in comm.topology.hosts]
        assert found == hosts, f"hosts are {hosts}, and the topology is {comm.topology}"
        check_collectives(comm)
        check_forms(comm)
        check_messages(comm)
        check_split(comm, hosts)
        comm.barrier()
        say(f"OK rank {comm.rank} of {comm.size}: {comm!r} {comm.topology}")
    check_reproducible()


def check_torch() -> None:
    """A collective and a step of DistributedDataParallel, which must be the step of one process on all the data."""
    import torch
    import torch.distributed as dist

    from abccl.collectives.torch.register import register

    register()  # as the installed package's entry point does
    dist.init_process_group("abccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    for count in COUNTS:
        x = torch.full((count,), float(rank))
        dist.all_reduce(x)
        assert torch.all(x == size * (size - 1) / 2), f"all_reduce of {count}"
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, {"rank": rank})
    assert everyone == [{"rank": r} for r in range(size)]

    torch.manual_seed(1)
    model, alone = (
        torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)) for _ in "ab"
    )
    alone.load_state_dict(model.state_dict())
    data = torch.randn(size, 8, 64)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    ddp(data[rank]).square().mean().backward()
    alone(data.flatten(0, 1)).square().mean().backward()
    for got, wanted in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(got.grad, wanted.grad)
    dist.barrier()
    say(f"OK rank {rank} of {size}: torch")
    dist.destroy_process_group()


def loop(seconds: float, folder: str) -> None:
    """Until it fails: the program ends by the error, as programs do. What it prints then may be cut off, too."""
    comm = abccl.init(timeout=seconds)
    x = np.ones(1 << 16, "float32")
    comm.all_reduce(x)
    say(f"looping rank {comm.rank}")
    while True:
        began = time.monotonic()
        try:
            comm.all_reduce(x, "max")
        except abccl.CollectiveError as error:
            took = time.monotonic() - began
            unfinished = Path(folder, f"{comm.rank}.unfinished")
            unfinished.write_text(f"{took:.1f} s {type(error).__name__}: {error}")
            unfinished.rename(Path(folder, str(comm.rank)))
            raise


def without(what: str, seconds: float, folder: str, rank: int) -> None:
    """A rank dies or stays away. The others write what they raise."""
    comm = abccl.init(timeout=seconds)
    x = np.ones(1 << 16, "float32")
    written = [Path(folder, str(other)) for other in range(comm.size) if other != rank]
    for turn in itertools.count():
        if comm.rank == rank and turn == TURNS:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            break
        began = time.monotonic()
        try:
            comm.all_reduce(x, "max")
        except abccl.CollectiveError as error:
            unfinished = Path(folder, f"{comm.rank}.unfinished")
            unfinished.write_text(f"{time.monotonic() - began:.1f} s turn {turn} {type(error).__name__}: {error}")
            unfinished.rename(Path(folder, str(comm.rank)))
            break
    while not all(path.exists() for path in written):
        time.sleep(0.01)
    os._exit(0)  # MPI's end waits for the dead, and Open MPI may end all when one has gone


def say(line: str) -> None:
    """Print it in one write: lines of ranks that share a terminal stay whole."""
    sys.stdout.write(line.replace("\n", " | ") + "\n")
    sys.stdout.flush()


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "loop":
        return loop(float(arguments[0]), arguments[1])
    if what == "torch":
        return check_torch()
    if what in ("kill", "stay"):
        return without(what, float(arguments[0]), arguments[1], int(arguments[2]))
    return check([[int(rank) for rank in word.split(",")] for word in arguments])


if __name__ == "__main__":
    main()
