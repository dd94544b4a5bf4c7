"""What communicators may cost: memory, file descriptors, threads, and processor time while they wait."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import abccl
from abccl import Collective, Communicator
from abccl.algorithms import algorithms
from abccl.collectives import flight, launch
from abccl.transports.shm import ARENA_BYTES, shm_threads

DEADLINE = 30.0
"""Seconds after which a test gives up on what should come to pass."""

MEBIBYTE = 1 << 20


# ---- what the kernel says of this process


def regions() -> dict[str, tuple[int, int]]:
    """The regions that this process maps, by inode: their bytes, and how many of them any process has touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.match(r"(\w+)-(\w+) \S+ \S+ \S+ (\d+) +(?:/memfd:abccl|/dev/shm/abccl)", line)
        if not match:
            continue
        start, end = int(match[1], 16), int(match[2], 16)
        pages = (ctypes.c_ubyte * ((end - start) // mmap.PAGESIZE))()
        # Another thread may have unmapped it since.
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), pages) == 0:
            found[match[3]] = (end - start, sum(page & 1 for page in pages) * mmap.PAGESIZE)
    return found


def handles() -> Counter[str]:
    """What the open file descriptors of this process lead to."""
    found: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed the folder
            found[os.readlink(f"/proc/self/fd/{entry}")] += 1
    return found


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def names() -> set[str]:
    """The named objects of the library, of all processes of this machine."""
    return {name for name in os.listdir("/dev/shm") if "abccl" in name}


def sleeps(pid: int, thread: int) -> int:
    """How often a thread has given up its core to wait. (A yield does not count.)"""
    status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds, now or before the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


# ---- memory


def everything(c: Communicator) -> None:
    """Every algorithm of every collective on megabytes, then messages between all pairs."""
    count = 240_000 * c.size
    whole, part = np.ones(count, "float32"), np.ones(count // c.size, "float32")
    out, out_part = np.empty_like(whole), np.empty_like(part)
    calls: dict[Collective, Callable[[str], Any]] = {
        Collective.ALL_REDUCE: lambda name: c.all_reduce(whole, out=out, algorithm=name),
        Collective.REDUCE_SCATTER: lambda name: c.reduce_scatter(out_part, whole, algorithm=name),
        Collective.ALL_GATHER: lambda name: c.all_gather(out, part, algorithm=name),
        Collective.BROADCAST: lambda name: c.broadcast(whole, algorithm=name),
        Collective.ALL_TO_ALL: lambda name: c.all_to_all(out, whole, algorithm=name),
        Collective.REDUCE: lambda name: c.reduce(whole, out=out, algorithm=name),
        Collective.GATHER: lambda name: c.gather(out, part, algorithm=name),
        Collective.SCATTER: lambda name: c.scatter(out_part, whole, algorithm=name),
        Collective.BARRIER: lambda name: c.barrier(algorithm=name),
    }
    assert set(calls) == set(Collective)
    for collective, call in calls.items():
        for name, algorithm in algorithms(collective).items():
            if all(restriction.holds(c.size) for restriction in algorithm.restrictions):
                call(name)
    others = [peer for peer in range(c.size) if peer != c.rank]
    works = [c.send(part, peer, async_op=True) for peer in others]
    works += [c.recv(np.empty_like(part), peer, async_op=True) for peer in others]
    for work in works:
        work.wait()
    c.barrier()


@pytest.mark.parametrize("size", [3, 8])
def test_a_rank_touches_eight_mebibytes_at_most(size: int) -> None:
    before = regions()
    communicators = [Communicator(transport, timeout=60) for transport in shm_threads(size)]
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(everything, communicators))
    after = [value for inode, value in regions().items() if inode not in before]
    for communicator in communicators:
        communicator.close()
    assert len(after) == size
    for mapped, touched in after:
        assert MEBIBYTE < touched <= ARENA_BYTES == 8 * MEBIBYTE
        assert touched < mapped


def just_connected() -> list[Any]:
    c = abccl.init(timeout=60)
    transport: Any = c._transport
    found = [transport.geometry.bytes, list(regions().values())]
    c.barrier()
    c.close()
    return found


def test_connecting_maps_all_regions_and_touches_less_than_half(here: ModuleType, ranks: int) -> None:
    """What it touches is what the calibration sends."""
    for size, found in abccl.spawn(here.just_connected, ranks, timeout=60):
        assert [mapped for mapped, _ in found] == [size] * ranks
        assert all(0 < touched < size / 2 for _, touched in found)


def test_more_ranks_than_are_calibrated_touch_next_to_nothing() -> None:
    before = regions()
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
    except OSError:
        pytest.skip("this machine forbids to set the affinity")
    try:
        transports = shm_threads(4)
    finally:
        os.sched_setaffinity(0, cores)
    after = [value for inode, value in regions().items() if inode not in before]
    for transport in transports:
        transport.close()
    assert len(after) == 4
    assert all(touched <= 64 << 10 for _, touched in after)


# ---- many communicators


def fifty() -> dict[str, Any]:
    c = abccl.init(timeout=60)
    c.all_reduce(np.ones(3))
    files, mapped, running = handles(), regions().keys(), threads()
    many = [c.split(0) for _ in range(50)]
    vectors = [np.full(1000, float(i)) for i in range(50)]
    for each, x in zip(many, vectors, strict=True):
        assert each is not None
        each.all_reduce(x)
    works = [each.all_reduce(x, async_op=True) for each, x in zip(many, vectors, strict=True) if each]
    for work in works:
        work.wait(60)
    found = {
        "right": all((x == i * c.size**2).all() for i, x in enumerate(vectors)),
        "files": (handles() - files).total(),
        "regions": len(regions().keys() - mapped),
        "threads": threads() - running,
    }
    c.barrier()
    for each in many:
        assert each is not None
        each.close()
    del each, many, work, works
    gc.collect()
    # The progress thread lets go of a communicator when it next looks.
    found["files left"] = not eventually(lambda: handles() == files) and handles() - files
    found["regions left"] = not eventually(lambda: regions().keys() == mapped) and regions().keys() - mapped
    c.barrier()
    c.close()
    return found


def test_fifty_communicators_live_together_and_leave_nothing(here: ModuleType, ranks: int) -> None:
    """Each opens its own memory, and of each peer the memory and a handle on the process; none has a thread."""
    for found in abccl.spawn(here.fifty, ranks, timeout=100):
        assert found.pop("files") <= 50 * (2 * ranks - 1)
        assert found == {
            "right": True,
            "regions": 50 * ranks,
            "threads": 1,
            "files left": False,
            "regions left": False,
        }


# ---- when a run ends badly


def goes_wrong(how: str) -> list[str]:
    """Rank 1 ends the run; the errors of the other ranks."""
    c = abccl.init(timeout=60)
    x = np.ones(100_000)
    c.all_reduce(x)
    errors = []
    if c.rank != 1:
        for call in (lambda: c.all_reduce(x, async_op=True).wait(), lambda: c.recv(x, 1)):
            try:
                call()
            except abccl.CollectiveError as error:
                errors.append(type(error).__name__)
    elif how == "death":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "abort":
        c.abort("enough")
    c.close()
    return errors


def ends_badly(how: str, folder: str) -> None:
    flight.install()  # its thread and its pipes stay as long as the process
    before = handles()
    errors = goes_wrong(how)
    gc.collect()
    # The progress thread lets go of a communicator when it next looks.
    eventually(lambda: not regions() and not handles() - before)
    Path(folder, str(os.getpid())).write_text(f"{errors} {[*regions(), *(handles() - before)]}")


@pytest.mark.ranks
@pytest.mark.parametrize(("how", "error"), [("death", "PeerLost"), ("abort", "Aborted"), ("close", "PeerLost")])
def test_a_run_that_ends_badly_leaves_no_memory(
    here: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, error: str
) -> None:
    monkeypatch.setattr(launch, "GRACE", 60.0)  # the survivors may tell
    before = names()
    if how == "death":
        with pytest.raises(abccl.RankFailed, match="rank 1 of 3 was ended by SIGKILL"):
            abccl.spawn(here.ends_badly, 3, (how, str(tmp_path)), timeout=100)
    else:
        abccl.spawn(here.ends_badly, 3, (how, str(tmp_path)), timeout=100)
    told = sorted(path.read_text() for path in tmp_path.iterdir())
    assert told == sorted([f"{[error, error]} []"] * 2 + ["[] []"] * (how != "death"))
    assert eventually(lambda: not names() - before)


# ---- processor time

SLEEPS = 20


def waits_for_a_slow_peer(how: str) -> tuple[float, float, int] | None:
    """What rank 0's wait took: seconds of processor time, and of the clock, and how often it slept."""
    c = abccl.init(timeout=2 * DEADLINE)
    other = c.split(0)
    assert other is not None
    x, y = np.ones(1000), np.ones(1000)
    thread = np.array([os.getpid(), threading.get_native_id()])
    c.broadcast(thread)
    pid, number = (int(value) for value in thread)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: c.all_reduce(x),
        "message": lambda: c.recv(x, 1) if c.rank == 0 else c.send(x, 0),
        "work": lambda: c.all_reduce(x, async_op=True).wait(),
        "two works": lambda: [work.wait() for work in [each.all_reduce(x, async_op=True) for each in (c, other)]],
    }
    found = None
    if c.rank == 0:
        slept, used, began = sleeps(pid, number), time.process_time(), time.monotonic()
        calls[how]()
        found = time.process_time() - used, time.monotonic() - began, sleeps(pid, number) - slept
    else:
        # Rank 0 may begin to count later than this rank: so wait for more than it must find.
        slept = sleeps(pid, number)
        eventually(lambda: sleeps(pid, number) >= slept + SLEEPS + 10)
        calls[how]()
    c.all_reduce(y)
    for each in (c, other):
        each.close()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["all_reduce", "message", "work", "two works"])
def test_who_waits_long_sleeps(here: ModuleType, how: str) -> None:
    used, waited, slept = abccl.spawn(here.waits_for_a_slow_peer, 2, (how,), timeout=100)[0]
    assert slept >= SLEEPS
    assert used < waited / 4


def idles_after_an_abort() -> tuple[float, float]:
    """Seconds of processor time, and of the clock, with all that was pending aborted."""
    c = abccl.init(timeout=60)
    x, y = np.ones(1000), np.ones(1000)
    if c.rank == 0:
        works = [c.all_reduce(x, async_op=True), c.recv(y, async_op=True)]
        c.send(np.ones(1000), 1)
        for work in works:
            with pytest.raises(abccl.Aborted):
                work.wait()
    else:
        c.recv(x, 0)
        c.abort("enough")
    used, began = time.process_time(), time.monotonic()
    threading.Event().wait(0.5)  # a stretch to measure; nothing is waited for
    found = time.process_time() - used, time.monotonic() - began
    c.close()
    return found


@pytest.mark.ranks
def test_nothing_spins_after_an_abort(here: ModuleType) -> None:
    for used, waited in abccl.spawn(here.idles_after_an_abort, 2, timeout=60):
        assert used < waited / 4


# ---- overlap

ROUNDS = 20
SAMPLES = 256


def computes_meanwhile() -> list[tuple[bool, bool, bool]]:
    """Of rounds of an asynchronous all_reduce: whether it ended unwaited, was seen under way, and gave the sum.

    Every piece of the caller's work is short, and after each it looks: first at samples of the result, then whether the
    operation is finished. Rounds end once all ranks have seen it under way: a busy machine may run a caller too seldom.
    """
    c = abccl.init(timeout=60)
    x, out = np.full(16 * MEBIBYTE, c.rank + 1, "float32"), np.empty(16 * MEBIBYTE, "float32")
    samples = out[:: out.size // SAMPLES]
    matrix = np.ones((64, 64))
    found = []
    seen = np.zeros(1)
    while len(found) < ROUNDS and not seen[0]:
        out[:] = 0
        c.barrier()
        work = c.all_reduce(x, out=out, async_op=True)
        end = time.monotonic() + DEADLINE
        completed = under_way = False
        while not completed and time.monotonic() < end:
            matrix = matrix @ matrix / len(matrix) + sum(range(100)) / 4950 - 1
            written = np.count_nonzero(samples)
            completed = work.is_completed()
            under_way |= not completed and 0 < written < len(samples)
        work.wait()
        right = (out == sum(range(1, c.size + 1))).all() and (matrix == 1).all()
        found.append((completed, under_way, bool(right)))
        seen[0] = under_way
        c.all_reduce(seen, "min")
    c.close()
    return found


@pytest.mark.ranks
def test_an_asynchronous_all_reduce_goes_on_while_its_caller_computes(here: ModuleType) -> None:
    for found in abccl.spawn(here.computes_meanwhile, 2, timeout=100):
        assert all(completed and right for completed, _, right in found)
        assert any(under_way for _, under_way, _ in found)
