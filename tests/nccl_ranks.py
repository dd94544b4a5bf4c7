"""Ranks as threads, each with a fake device and a fake NCCL: what tests/test_nccl.py makes."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fake_cuda import FakeDriver
from fake_nccl import FakeNccl, Network, connect

from abccl.cuda.compile import Kernels
from abccl.transports.contract import Placed
from abccl.transports.device import DeviceTransport
from abccl.transports.inproc import InprocGroup, InprocTransport
from abccl.transports.nccl import NcclWire, NcclWirePlan, nccl_wire

PATIENCE = 60.0
ARENA = 1 << 20


class Meeting:
    """An all-gather of blobs among threads."""

    def __init__(self, size: int) -> None:
        self.blobs = [b""] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)

    def exchange(self, rank: int) -> Callable[[bytes], list[bytes]]:
        def gather(blob: bytes) -> list[bytes]:
            self.blobs[rank] = blob
            self.barrier.wait()
            blobs = list(self.blobs)
            self.barrier.wait()
            return blobs

        return gather


def in_threads(size: int, main: Callable[[int], Any]) -> list[Any]:
    """What main(rank) returned or raised, each rank in a thread."""
    results: list[Any] = [AssertionError("the thread never ended")] * size

    def run(rank: int) -> None:
        try:
            results[rank] = main(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return results


class Ranks:
    """Wires among fake devices, each on one of its own unless `shared`."""

    def __init__(
        self, size: int, *, shared: bool = False, versions: Sequence[int] = (), hangs: bool = False, timeout: float = 60
    ) -> None:
        self.size, self.network, self.meeting, self.timeout = size, Network(hangs), Meeting(size), timeout
        self.drivers = [FakeDriver(0 if shared else rank, same_process=True) for rank in range(size)]
        versions = versions or [23203] * size
        self.nccls: list[Any] = [FakeNccl(self.network, d, v) for d, v in zip(self.drivers, versions)]

    def meet(self) -> list[Any]:
        """The wire of each rank, or why there is none."""
        return in_threads(self.size, self._meet)

    def _meet(self, rank: int) -> NcclWire:
        self.drivers[rank].make_current()
        return nccl_wire(
            self.meeting.exchange(rank), rank, self.size, self.drivers[rank], self.nccls[rank], self.timeout
        )

    def close(self) -> None:
        for driver in self.drivers:
            driver.close_all()


class Image:
    """An image in memory that is there already."""

    def __init__(self, address: int, image: Any) -> None:
        self.address, self.image = address, image

    def store(self) -> None:
        ctypes.memmove(self.address, self.image.ctypes.data, self.image.nbytes)

    def fetch(self) -> None:
        ctypes.memmove(self.image.ctypes.data, self.address, self.image.nbytes)


class Rank(DeviceTransport):
    """A rank that waits as its tests can afford it: for the end of its last run, and for the memory of few arrays."""

    arena = used = 0

    def idle(self, deadline: float) -> None:
        mark = self.driver._events[self._last[None][1].handle].mark() if None in self._last else None
        if mark is None or mark.reached():
            time.sleep(1e-4)
        else:
            mark.wait(1e-3)

    def place(self, image: Any) -> Placed:
        """The arrays of one case after another, in turn, in the same memory."""
        self.driver.make_current()
        self.arena = self.arena or self.driver.allocate(ARENA)
        if self.used + image.nbytes > ARENA:
            self.used = 0
        address, self.used = self.arena + self.used, self.used + -(-image.nbytes // 64) * 64
        return Image(address, image)

    def close(self) -> None:
        super().close()
        if self.arena:
            self.driver.make_current()
            self.driver.free(self.arena)
            self.arena = 0


@contextmanager
def make(size: int, wire_plan: type[NcclWirePlan] = NcclWirePlan, hangs: bool = False) -> Iterator[list[Rank]]:
    """Ranks that are connected, and at the end have given all memory back."""
    ranks, group = Ranks(size, hangs=hangs), InprocGroup(size)
    transports = []
    for rank, wire in enumerate(ranks.meet()):
        wire.slot_bytes = 1 << 16
        wire.compile = lambda lane, wire=wire: wire_plan(wire)
        driver = ranks.drivers[rank]
        driver.make_current()
        kernels = Kernels(driver, image=lambda *_: b"")  # the fake device has the CPU build of them
        transports.append(Rank(InprocTransport(group, rank), driver, kernels, wire))
    assert in_threads(size, lambda rank: connect(transports[rank])) == [None] * size
    yield transports
    closed = in_threads(size, lambda rank: transports[rank].close())
    for transport, outcome in zip(transports, closed):
        if not transport.driver._context.over:  # a device that has failed gives nothing back
            assert outcome is None, outcome
            left = [region for region in transport.driver._memory if region.source in ("allocated", "pinned")]
            assert not left and len(transport.wire.communicator.ended) == 1, left
    ranks.close()
