"""What a process holds, and whether it grows: shared by tests/soak.py and tests/test_many_ranks.py."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import combinations


@dataclass(frozen=True)
class Held:
    """What this process holds at a moment.

    Attributes:
        resident: bytes of memory of its own: anonymous pages, of the heap, of stacks and of Python's objects.
        heap: bytes that malloc has handed out, which no fragmentation blurs.
        shared: bytes behind the anonymous files that it owns or has mapped.
        objects: blocks that Python has allocated.
        files, threads, maps: open files, threads, mapped regions.
    """

    resident: int
    heap: int
    shared: int
    objects: int
    files: int
    threads: int
    maps: int


class _Malloc(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "k")
    )


def held() -> Held:
    """What this process holds now, after it gave back what it does not use."""
    gc.collect()
    libc = ctypes.CDLL(None)
    heap = 0
    if hasattr(libc, "mallinfo2"):
        libc.malloc_trim(0)
        libc.mallinfo2.restype = _Malloc
        info = libc.mallinfo2()
        heap = info.uordblks + info.hblkhd
    return Held(
        resident=_rollup("Anonymous"),
        heap=heap,
        shared=_memfd_bytes(),
        objects=sys.getallocatedblocks(),
        files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        maps=_lines("/proc/self/maps"),
    )


def _rollup(name: str) -> int:
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _lines(path: str) -> int:
    with open(path) as lines:
        return sum(1 for _ in lines)


def _memfd_bytes() -> int:
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:"):
                state = os.stat(f"/proc/self/fd/{name}")
                found[state.st_ino] = 512 * state.st_blocks
    return sum(found.values())


def growth(calls: Sequence[int], samples: Sequence[Held]) -> dict[str, float]:
    """What each resource grows by in 1,000 calls: the median slope of all pairs of samples (Theil and Sen's fit).

    One sample that is out of line, as where the system has just taken a stack's pages, does not tilt it.
    """
    slopes: dict[str, float] = {}
    for field in fields(Held):
        points = [(call, getattr(sample, field.name)) for call, sample in zip(calls, samples, strict=True)]
        pairs = combinations(points, 2)
        slopes[field.name] = statistics.median(1000 * (y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairs)
    return slopes
