"""What tests/test_mpi.py starts by mpirun: the checks of the mpi transport among 5 ranks, or a way to end among 3.

    mpirun -n 5 python tests/mpi_program.py checks
    mpirun -n 3 python tests/mpi_program.py raises

Rank 0 prints a line of JSON for each check: its name, and what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from few_plans import few_plans

import abccl
from abccl.errors import ArgumentError, Mismatch
from abccl.transports import USER_TAGS, Transport, conformance, mpi
from abccl.transports.conformance import Group, run_ranks
from abccl.transports.mpi import MPITransport, find_mpi

PATIENCE = 60.0


class World:
    """Makes the groups of a check: splits of one transport of all ranks."""

    def __init__(self) -> None:
        self.comm = find_mpi().COMM_WORLD
        self.all = MPITransport(self.comm, PATIENCE)
        self.made = 0

    def exchange(self, blob: bytes) -> list[bytes]:
        """What every process gave. Waits asleep: the processes share the cores."""
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.001)
        blobs: list[bytes] = self.comm.allgather(blob)
        return blobs

    @contextlib.contextmanager
    def make(self, size: int) -> Iterator[Group]:
        """A group of the first ranks."""
        self.made += 1
        rank = self.all.rank
        own = self.all.split(range(size), f"group {self.made}") if rank < size else None
        yield Group([own if other == rank else None for other in range(size)], self.exchange)
        if own is not None:
            own.close()

    def run(self, transport: Transport | None, main: Callable[[Any], None]) -> None:
        """As `run_ranks`, on any transports."""
        size = self.all.size
        run_ranks(
            Group([transport if rank == self.all.rank else None for rank in range(size)], self.exchange), main, 60
        )


def swap(transport: Transport, to: int, words: bytes, source: int, length: int) -> bytes:
    """Send to one rank and receive from one."""
    into = bytearray(length)
    send = transport.post_send(to, USER_TAGS, memoryview(words))
    transport.wait([send, transport.post_recv(source, USER_TAGS, memoryview(into))], time.monotonic() + PATIENCE)
    return bytes(into)


def refused(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    """The call raises the error; there is no pytest in every environment of MPI's."""
    try:
        call()
    except kind as error:
        if re.search(words, str(error)) is None:
            raise
        return
    raise AssertionError(f"wanted {kind.__name__}: {words}, and nothing was raised")


def check_long_messages(world: World) -> None:
    """Messages longer than MPI counts arrive whole; of one that is too long the length is told."""
    length = (3 << 20) + 12345

    def words(rank: int) -> bytes:
        return bytes([rank + 1]) * (length - 1) + b"!"

    def main(transport: Transport) -> None:
        rank = transport.rank
        assert swap(transport, 1 - rank, words(rank), 1 - rank, length) == words(1 - rank)
        told = f"wanted {length - 1} bytes from rank .* and {length} came"
        refused(Mismatch, told, lambda: swap(transport, 1 - rank, words(rank), 1 - rank, length - 1))

    longest, mpi.LONGEST = mpi.LONGEST, 1000
    try:
        with world.make(2) as group:
            run_ranks(group, main, PATIENCE)
    finally:
        mpi.LONGEST = longest


def check_splits(world: World) -> None:
    """Ranks are numbered in the order given; parts do not hear each other, nor the whole; a part can be split."""
    members = [[4, 2, 0], [3, 1]]
    own = next(part for part in members if world.all.rank in part)
    name = f"part {own}"

    def main(transport: Transport) -> None:
        whole = world.all
        to, source = (whole.rank + 1) % whole.size, (whole.rank - 1) % whole.size
        send = whole.post_send(to, USER_TAGS, memoryview(b"whole"))
        part = transport.split(own, name)
        assert part.rank == own.index(whole.rank) and part.size == len(own)
        words = b"".join(b"%d" % rank for rank in own)
        heard = swap(part, (part.rank + 1) % part.size, words, (part.rank - 1) % part.size, len(words))
        assert heard == words, f"wanted {words!r}, and heard {heard!r}"
        alone = part.split([part.rank], "alone")
        assert (alone.rank, alone.size) == (0, 1)
        receive = whole.post_recv(source, USER_TAGS, memoryview(into := bytearray(5)))
        whole.wait([send, receive], time.monotonic() + PATIENCE)
        assert into == b"whole"
        for members in ([part.rank] * 2, [(part.rank + 1) % part.size]):
            refused(ArgumentError, "wanted different ranks", lambda members=members: part.split(members, "wrong"))
        alone.close()
        part.close()

    world.run(world.all, main)


def check_given_communicators(world: World) -> None:
    """Any intracommunicator serves, whatever is sent on it; nothing else does."""
    comm = world.comm.Split(world.comm.rank % 2, -world.comm.rank)
    own = MPITransport(comm, PATIENCE)
    assert (own.rank, own.size) == (comm.Get_rank(), comm.Get_size())
    requests = [comm.isend("other words", (comm.rank + 1) % comm.size, USER_TAGS)]

    def main(transport: MPITransport) -> None:
        to, source = (own.rank + 1) % own.size, (own.rank - 1) % own.size
        assert swap(own, to, b"words", source, 5) == b"words"
        assert comm.recv(source=source, tag=USER_TAGS) == "other words"
        requests.pop().wait()
        for wrong in (find_mpi().COMM_NULL, None):
            refused(ArgumentError, "wanted an intracommunicator", lambda wrong=wrong: MPITransport(wrong))

    world.run(world.all, main)
    own.close()
    comm.Free()


def check_communicators(world: World) -> None:
    """`abccl.init` of all ranks by MPI alone, and of a part of them in another order: every collective, and a split."""
    part = world.comm.Split(world.comm.rank % 2, -world.comm.rank)
    for options in ({"transport": "mpi"}, {"comm": part}, {"comm": part, "transport": "mpi"}):
        with abccl.init(**options, timeout=PATIENCE) as comm:
            ours = part if "comm" in options else world.comm
            assert (comm.rank, comm.size) == (ours.Get_rank(), ours.Get_size()), f"{options}: {comm!r}"
            assert comm._transport.name == options.get("transport", "shm")
            use(comm)
            pair = comm.split(comm.rank // 2)
            assert pair is not None
            with pair:
                use(pair)
    part.Free()


def check_native_in_place_on_some_ranks(world: World) -> None:
    """Who gives another array for the result, and who does not, is each rank's own business."""
    with abccl.init("mpi", timeout=PATIENCE) as comm:
        for count in (1, 100_000):
            x, out = np.full(count, 1.0 + comm.rank, "float32"), np.empty(count, "float32")
            comm.all_reduce(x, out=None if comm.rank == 0 else out, algorithm="native")
            assert ((x if comm.rank == 0 else out) == sum(range(1, comm.size + 1))).all()
            whole = np.full(count * comm.size, float(comm.rank))
            own = whole[comm.rank * count : (comm.rank + 1) * count]
            comm.all_gather(whole, own if comm.rank % 2 else own.copy(), algorithm="native")
            assert (whole.reshape(comm.size, count) == np.arange(comm.size)[:, None]).all()


def check_a_send_outlives_its_communicator(world: World) -> None:
    """What was on its way when the sender closed comes as it was sent, or not at all."""
    comm = abccl.init("mpi", timeout=PATIENCE)
    x = np.full(2_000_000, 7.0)
    comm.barrier()
    if comm.rank == 0:
        comm.send(x, 1, async_op=True)
        comm.close()
        del x
        others = [np.full(2_000_000, 99.0) for _ in range(3)]
        assert others
    elif comm.rank == 1:
        with contextlib.suppress(abccl.PeerLost):
            comm.recv(x, 0)
        assert (x == 7).all()
    world.exchange(b"")
    comm.close()


def use(comm: abccl.Communicator) -> None:
    """All collectives, once."""
    rank, size = comm.rank, comm.size
    ranks = np.arange(size)
    x, one, every = np.full(1001, rank), np.array([rank]), np.empty(size, int)
    comm.all_reduce(x)
    assert (x == ranks.sum()).all()
    comm.reduce(x, "max", size - 1)
    comm.broadcast(x, size - 1)
    assert (x == ranks.sum()).all()
    comm.all_gather(every, one)
    assert (every == ranks).all()
    comm.reduce_scatter(one, every)
    assert one[0] == rank * size
    out = np.empty_like(every)
    comm.all_to_all(out, np.full(size, rank))
    assert (out == ranks).all()
    comm.gather(every if rank == 0 else None, one)
    comm.scatter(one, every if rank == 0 else None)
    assert one[0] == rank * size
    native = {} if comm._transport.name == "shm" else {"algorithm": "native"}
    comm.all_reduce(one, **native)
    assert one[0] == ranks.sum() * size
    work = comm.send(one, (rank + 1) % size, async_op=True) if size > 1 else None
    if work is not None:
        assert comm.recv(one) == (rank - 1) % size
        work.wait()
    comm.barrier()


def check_nothing_is_kept(world: World) -> None:
    """Closed transports give their communicators back, also after an abort with unread messages."""
    for _ in range(20):
        with world.make(3) as group:
            conformance.outcomes(group, leave_unread, PATIENCE)

    def main(transport: Transport) -> None:
        until = time.monotonic() + PATIENCE
        while mpi._sweep():
            assert time.monotonic() < until, f"{len(mpi._leaving)} closed transports keep their communicators"
            time.sleep(0.001)

    world.run(world.all, main)


def leave_unread(transport: Transport) -> None:
    """Send what nobody receives, then one rank fails."""
    for length in (10, 1_000_000):
        transport.post_send((transport.rank + 1) % 3, USER_TAGS, memoryview(bytes(length)))
    transport.progress()
    if transport.rank == 0:
        transport.abort(Mismatch("enough"))


CHECKS = (
    check_long_messages,
    check_splits,
    check_given_communicators,
    check_communicators,
    check_native_in_place_on_some_ranks,
    check_a_send_outlives_its_communicator,
    check_nothing_is_kept,
)


def checks() -> None:
    """Make all checks, those of the conformance suite first."""
    world = World()
    every: list[tuple[str, Callable[[], None]]] = []
    every += [
        (check.__name__, lambda check=check: few_plans(check)(world.make, PATIENCE)) for check in conformance.CHECKS
    ]
    every += [(check.__name__, lambda check=check: check(world)) for check in CHECKS]
    for name, check in every:
        fault, begun = "", time.monotonic()
        try:
            check()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        faults = [json.loads(blob) for blob in world.exchange(json.dumps(fault).encode())]
        if world.all.rank == 0:
            line = {"check": name, "fault": next(filter(None, faults), ""), "seconds": time.monotonic() - begun}
            print(json.dumps(line), flush=True)
    world.all.close()


def wait_for_rank_1(transport: Transport, seconds: float) -> None:
    """Wait for a message that never comes."""
    transport.wait([transport.post_recv(1, USER_TAGS, memoryview(bytearray(1)))], time.monotonic() + seconds)


def raises() -> None:
    """Rank 1 raises; the others wait for it, and hear of it."""
    transport = MPITransport(find_mpi().COMM_WORLD, PATIENCE)
    if transport.rank == 1:
        raise RuntimeError("rank 1 has a fault")
    wait_for_rank_1(transport, PATIENCE)


def stuck() -> None:
    """Rank 1 does something else for ever; the others' deadline ends the job."""
    mpi.GRACE = 0.3
    transport = MPITransport(find_mpi().COMM_WORLD, PATIENCE)
    if transport.rank == 1:
        time.sleep(600)
    wait_for_rank_1(transport, 0.1)


def absent() -> None:
    """Rank 1 never makes its transport; the others' deadline ends the job."""
    mpi.GRACE = 0.3
    if find_mpi().COMM_WORLD.rank == 1:
        time.sleep(600)
    MPITransport(find_mpi().COMM_WORLD, 0.1)


def killed() -> None:
    """Rank 1 is killed: the launcher ends the job."""
    transport = MPITransport(find_mpi().COMM_WORLD, PATIENCE)
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_rank_1(transport, 600)


if __name__ == "__main__":
    {each.__name__: each for each in (checks, raises, stuck, absent, killed)}[sys.argv[1]]()
