"""The cache regime: how fast the cores of ranks 0 and 1 see what the other has written.

On virtual machines two cores may share a cache or not, and the host moves them while programs run: the same copy then
takes five times as long. So the regime is measured at the start and at the end of a run, and is printed with its table.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import DeadlineExceeded
from .data import Values
from .world import World

NEAR = 5.0
"""GB/s of `Regime.write` above which cores are near: two that share a cache reach 11 to 18, others 2."""

BLOCK = 1 << 20
SIZE = mmap.PAGESIZE + BLOCK
"""Flags, then what is copied."""

PINGS, BATCHES, BLOCKS = 100, 15, 25
DEADLINE = 20.0
SPINS = 1000


@dataclass(frozen=True)
class Regime:
    """What was found.

    Attributes:
        line_ns: nanoseconds from a write of one rank until the other has seen it; the interpreter's share is included.
        copy: GB/s at which a rank copies 1 MiB that the other has just written.
        write: GB/s at which a rank writes 1 MiB again that the other has just read.
    """

    line_ns: float
    copy: float
    write: float

    @property
    def name(self) -> str:
        """Near or far."""
        # Reads are fetched ahead, and differ by a factor of two only. A line that the other has must be taken from it
        # before a write: that shows the way between the cores, and is what slots in shared memory wait for.
        return "near" if self.write > NEAR else "far"

    @property
    def text(self) -> str:
        """It in words."""
        return (
            f"{self.name} (a cache line one way in {self.line_ns:.0f} ns, Python included; "
            f"1 MiB is copied at {self.copy:.1f} GB/s when the peer has just written it, "
            f"and rewritten at {self.write:.1f} when it has just read it)"
        )


class Probe:
    """Memory that ranks 0 and 1 share, by which they find out, where they share a host. All ranks make it, together."""

    def __init__(self, world: World) -> None:
        self.world = world
        serves = world.rank == 0 and world.share_host(0, 1)
        fd = _fd(lambda: os.memfd_create("abccl-bench")) if serves else -1
        if fd >= 0:
            os.ftruncate(fd, SIZE)
        path = world.tell("" if fd < 0 else f"/proc/{os.getpid()}/fd/{fd}")[0]
        if world.rank == 1 and path:
            fd = _fd(lambda: os.open(path, os.O_RDWR))
        self.memory = mmap.mmap(fd, SIZE) if fd >= 0 else None
        answers = world.tell("" if self.memory is None else "has it")
        self.usable = world.size > 1 and all(answers[:2])
        if fd >= 0:
            os.close(fd)

    def measure(self) -> Regime | None:
        """The regime now; None for one rank, on two hosts, or where memory can not be shared. All ranks call it."""
        if not self.usable:
            return None
        found = np.zeros(2)
        if self.memory is not None:
            with _on_a_core_of_its_own(self.world.rank):
                found[:] = _Pair(self.memory, self.world.rank).measure()
        everyone = self.world.all(found)
        return Regime(line_ns=float(everyone[0, 0]), copy=float(everyone[1, 1]), write=float(everyone[0, 1]))


class _Pair:
    """One of the two ranks at work. Each has a flag, alone on its cache lines, that only it writes."""

    def __init__(self, memory: mmap.mmap, rank: int) -> None:
        flags = memoryview(memory).cast("q")
        self.first = rank == 0
        # Processors fetch lines in pairs: 256 bytes keep the flags apart.
        self.own, self.other = (flags[0:1], flags[32:33]) if self.first else (flags[32:33], flags[0:1])
        self.shared: Values = np.frombuffer(memory, np.uint64, BLOCK // 8, mmap.PAGESIZE)
        self.private = np.zeros_like(self.shared)
        self.turn = self.own[0]
        self.deadline = time.monotonic() + DEADLINE

    def measure(self) -> tuple[float, float]:
        """Nanoseconds one way, right on rank 0; GB/s of writing on rank 0, of copying on rank 1."""
        pings = sorted(self._pings() for _ in range(BATCHES))
        blocks = sorted(self._block() for _ in range(BLOCKS))
        return pings[BATCHES // 2] / 2 * 1e9, BLOCK / blocks[BLOCKS // 2] / 1e9

    def _pings(self) -> float:
        """Seconds of a round trip of one cache line."""
        start = time.perf_counter()
        for _ in range(PINGS):
            self._hand_over()
        return (time.perf_counter() - start) / PINGS

    def _block(self) -> float:
        """Seconds in which rank 0 writes the block, which rank 1 has copied before, and in which rank 1 copies it."""
        clock = time.perf_counter
        start = clock()
        if self.first:
            self.shared += np.uint64(1)
            elapsed = clock() - start
        self._hand_over(answer=False)
        start = clock()
        if not self.first:
            np.copyto(self.private, self.shared)
            elapsed = clock() - start
        self._hand_over()
        return elapsed

    def _hand_over(self, answer: bool = True) -> None:
        """Rank 0 writes its flag and rank 1 sees it; then, if `answer`, the same the other way."""
        self.turn += 1
        if self.first:
            self.own[0] = self.turn
            if answer:
                self._wait()
        else:
            self._wait()
            self.own[0] = self.turn

    def _wait(self) -> None:
        while True:
            for _ in range(SPINS):
                if self.other[0] >= self.turn:
                    return
            os.sched_yield()
            if time.monotonic() > self.deadline:
                raise DeadlineExceeded(f"the probe of the cache regime waited {DEADLINE:g} s for the other rank")


@contextlib.contextmanager
def _on_a_core_of_its_own(rank: int) -> Iterator[None]:
    """Rank 0 on the first of its cores, rank 1 on the second of its own, where there is one."""
    # The scheduler puts two ranks on one core now and then, where nothing would be learnt of two.
    allowed = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setaffinity(0, {sorted(allowed)[: rank + 1][-1]})
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, allowed)


def _fd(make: Callable[[], int]) -> int:
    """What it makes; -1 where that is forbidden."""
    try:
        return make()
    except OSError:
        return -1
