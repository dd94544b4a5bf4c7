"""Random collectives run and checked: by ranks that are threads, or by one rank of several processes.

    python tests/random_runs.py joint 4 '{"collective": "all_reduce", ...}'

makes calls again as a failed test prints them. No pytest in here: MPI's environments have none.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from random_calls import Array, RandomCall

from abccl import Aborted, ArgumentError, Collective, Communicator
from abccl.transports import Transport
from abccl.transports.inproc import inproc
from abccl.transports.joint import joint_threads
from abccl.transports.shm import shm_threads
from abccl.transports.topology import topology_of
from abccl.transports.types import numpy_dtype

T = TypeVar("T")

TIMEOUT = 60.0
GUARD = 64


class Attempt:
    """One rank's part in a call. Make it, `start` and `finish` it, as often as wanted; each time it is checked."""

    def __init__(self, communicator: Communicator, call: RandomCall) -> None:
        self.c, self.call, rank = communicator, call, communicator.rank
        self.given = call.given(rank)
        self.wanted = call.wanted(rank)
        self.memories: list[Array] = []
        collective, self.persistent, self.work = call.collective, None, None
        dtype = numpy_dtype(call.dtype)
        start = sum(call.counts()[:rank])
        at_root = rank == call.root
        x, out = None, None
        if collective is Collective.BARRIER:
            pass
        elif call.in_place and collective in (Collective.ALL_GATHER, Collective.GATHER) and self.wanted is not None:
            out = self._guarded(len(self.wanted), dtype)
            x = out[start : start + len(self.given)]
        elif collective is not Collective.SCATTER or at_root:
            x = self._guarded(len(self.given), dtype)
        if collective is Collective.BARRIER or collective is Collective.BROADCAST:
            pass
        elif call.in_place and collective in (Collective.REDUCE_SCATTER, Collective.SCATTER) and x is not None:
            out = x[start : start + call.counts()[rank]]
        elif out is None and self.wanted is not None and not (call.in_place and collective.cut):
            out = self._guarded(len(self.wanted), dtype)
        self.x, self.out = x, out

    def start(self) -> bool:
        """Call it; false if the engine's own collective does not serve such a call."""
        call, c = self.call, self.c
        if self.out is not None:
            self.out.view(np.uint8)[:] = 0x5A
        if self.x is not None:
            self.x[:] = self.given
        name, (args, keywords) = call.collective.value, self._arguments()
        try:
            if call.form in ("plain", "async"):
                self.work = getattr(c, name)(*args, **keywords, async_op=call.form == "async")
            else:
                self.persistent = self.persistent or getattr(c, f"{name}_init")(*args, **keywords)
                self.persistent() if call.form == "persistent" else self.persistent.start()
        except ArgumentError:
            if call.asked == "native":
                return False
            raise
        return True

    def finish(self) -> int:
        """Wait for it and compare with numpy; returns a checksum of the result.

        Raises:
            AssertionError: something is wrong.
        """
        if self.work is not None:
            self.work.wait(self.c.timeout)
            assert self.work.is_completed()
            self.work = None
        elif self.call.form == "started":
            assert self.persistent is not None
            self.persistent.wait(self.c.timeout)
        return self._verify()

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call, x, out = self.call, self.x, self.out
        keywords: dict[str, Any] = {"algorithm": call.wish}
        parts = call.sizes_of_parts
        match call.collective:
            case Collective.ALL_REDUCE:
                return (x, call.operator), {**keywords, "out": out}
            case Collective.REDUCE:
                return (x, call.operator, call.root), {**keywords, "out": out}
            case Collective.BROADCAST:
                return (x, call.root), keywords
            case Collective.REDUCE_SCATTER:
                return (out, x, call.operator), {**keywords, "counts": parts}
            case Collective.ALL_GATHER:
                return (out, x), {**keywords, "counts": parts}
            case Collective.GATHER | Collective.SCATTER:
                return (out, x, call.root), keywords
            case Collective.ALL_TO_ALL:
                received = parts and tuple(row[self.c.rank] for row in parts)
                return (out, x, received, parts and parts[self.c.rank]), keywords
        return (), keywords

    def _verify(self) -> int:
        call, wanted = self.call, self.wanted
        me = f"rank {self.c.rank} of {self.c.size}"
        result = self.out if self.out is not None else self.x
        collective = call.collective
        if collective is Collective.BARRIER:
            return 0
        if wanted is None or result is None:
            result = None
        else:
            wrong = call.differs(result, wanted, self.c.rank)
            assert not len(wrong), (
                f"{me}: {len(wrong)} of {len(wanted)} elements are wrong, the first is {wrong[0]}: wanted "
                f"{wanted[wrong[0]]}, came {result[wrong[0]]}"
            )
        if self.x is not None and not (call.in_place and result is not None):
            assert self.x.tobytes() == self.given.tobytes(), f"{me}: the input was written"
        for memory in self.memories:
            first, last = memory[: GUARD + self._shift], memory[-GUARD:]
            assert (first == 0xA5).all() and (last == 0xA5).all(), f"{me}: bytes beside a buffer were written"
        return zlib.crc32(np.ascontiguousarray(result).view(np.uint8)) if result is not None else 0

    @property
    def _shift(self) -> int:
        return self.call.offset * numpy_dtype(self.call.dtype).itemsize

    def _guarded(self, count: int, dtype: np.dtype[Any]) -> Array:
        nbytes = 2 * GUARD + self._shift + count * dtype.itemsize
        memory = self.c.empty(nbytes, "uint8") if self.call.registered else np.empty(nbytes, np.uint8)
        first = GUARD + self._shift
        memory[:first], memory[-GUARD:] = 0xA5, 0xA5
        self.memories.append(memory)
        inner: Array = memory[first : first + count * dtype.itemsize].view(dtype)
        return inner


def perform(communicator: Communicator, calls: Sequence[RandomCall]) -> list[list[int]]:
    """Start all calls, then finish them; again on the same buffers, when plans are known. Returns their checksums.

    Raises:
        AssertionError: a result is wrong.
    """
    attempts = [Attempt(communicator, call) for call in calls]
    sums: list[list[int]] = [[] for _ in attempts]
    for _ in range(2):
        started = [attempt.start() for attempt in attempts]
        for attempt, serves, found in zip(attempts, started, sums):
            if serves:
                found.append(attempt.finish())
    return sums


class Group:
    """Ranks that are threads of this process, kept for many examples. After a failure it is of no more use.

    Args:
        communicators: by rank. Their timeout ends a wait for a rank that never comes.
    """

    def __init__(self, communicators: Sequence[Communicator]) -> None:
        self.communicators = list(communicators)
        self.pool = ThreadPoolExecutor(len(self.communicators))
        self.runs, self.broken = 0, False

    def run(self, body: Callable[[Communicator], T]) -> list[T]:
        """What `body` returns on each rank.

        Raises:
            Exception: what it raised on the rank that failed first; the others are aborted, so that none waits for it.
        """
        errors: list[Exception] = []

        def guarded(communicator: Communicator) -> Any:
            try:
                return body(communicator)
            except Exception as error:
                errors.append(error)
                communicator.abort(f"{type(error).__name__}: {error}")
                raise

        futures = [self.pool.submit(guarded, communicator) for communicator in self.communicators]
        done = [future.exception() or future.result() for future in futures]
        if errors:
            self.broken = True
            self.close()
            raise next((error for error in errors if not isinstance(error, Aborted)), errors[0])
        self.runs += 1
        return done

    def close(self) -> None:
        """End the threads."""
        for communicator in self.communicators:
            communicator.close()
        self.pool.shutdown()


def hosts_of(size: int, shape: int) -> list[list[int]]:
    """The ranks dealt out to some hosts; with shape 1 each has one of its own."""
    hosts = size if shape == 1 else min(size, shape)
    return [list(range(host, size, hosts)) for host in range(hosts)]


def make(kind: str, size: int) -> Group:
    """Ranks that are threads, over "shm", "inproc", "gloo", "joint" (2 or 3 hosts) or "apart" (a host for each)."""
    if kind in ("shm", "inproc"):
        return Group([Communicator(t, timeout=TIMEOUT) for t in (shm_threads if kind == "shm" else inproc)(size)])
    hosts = hosts_of(size, 1 if kind in ("gloo", "apart") else 2 + size % 2)
    transports = joint_threads(hosts, _gloo(size) if kind == "gloo" else None)
    return Group([Communicator(t, timeout=TIMEOUT, topology=topology_of(hosts)) for t in transports])


def _gloo(size: int) -> list[Transport]:
    import torch

    from abccl.transports.gloo import GlooTransport

    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: GlooTransport(store, rank, size, TIMEOUT), range(size)))


def agreed(call: RandomCall, sums: Sequence[Sequence[int]]) -> None:
    """Check that all ranks have the same bits where they must.

    Raises:
        AssertionError: they have not.
    """
    if call.collective in (Collective.ALL_REDUCE, Collective.BROADCAST, Collective.ALL_GATHER):
        assert all(own == sums[0] for own in sums), f"ranks have other bits than rank 0: {sums}"


def check(group: Group, calls: Sequence[RandomCall]) -> None:
    """Make the calls on all ranks, twice, and compare what they come to.

    Raises:
        AssertionError: a result is wrong, or not the same everywhere.
    """
    for call, *sums in zip(calls, *group.run(lambda communicator: perform(communicator, calls)), strict=True):
        agreed(call, sums)


if __name__ == "__main__":
    check(make(sys.argv[1], int(sys.argv[2])), [RandomCall.from_json(text) for text in sys.argv[3:]])
