"""What the processes of test_staged_gpu.py do: messages of device plans through pinned host memory."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
from gpu.device import FAKE, Memory
from gpu.groups import PATIENCE, World, exchange_among

from abccl.algorithms import Collective, lookup
from abccl.transports import conformance
from abccl.transports.device import DeviceTransport
from abccl.transports.shm import ShmTransport
from abccl.transports.staged import StagedWire
from abccl.transports.trial import Case, Trial

SLOTS = (64 << 10, 1 << 20) if FAKE else (256 << 10, 1 << 20, 4 << 20)
COUNT, ROUNDS = (1 << 14, 3) if FAKE else (64 << 20, 7)
"""Elements of float32, and runs that are timed."""


def staged(world: World, size: int, slot_bytes: int) -> DeviceTransport:
    """Ranks whose messages go from pinned memory to pinned memory through shared memory."""
    host = ShmTransport(world.rank, size, exchange_among(world.all, range(size)))
    lock = threading.RLock()
    wire = StagedWire(host, lock, world.driver, slot_bytes=slot_bytes)
    return DeviceTransport(host, world.driver, world.kernels, wire, lock=lock)


def conform() -> str:
    """All plans among two processes; what went wrong."""
    world = World()

    @contextlib.contextmanager
    def make(size: int) -> Iterator[conformance.Group]:
        own = staged(world, size, 1 << 16) if world.rank < size else None
        yield conformance.Group([own if rank == world.rank else None for rank in range(size)], world.exchange)
        if own is not None:
            own.close()

    try:
        conformance.check_plans(make, PATIENCE, (2,))
    except Exception:
        return traceback.format_exc()
    finally:
        world.close()
    return ""


def bandwidth() -> list[tuple[int, int, float]]:
    """Of a ring all_reduce: (bytes of a slot, lanes, bytes of the vector by seconds)."""
    world, found = World(), []
    for slot_bytes in SLOTS:
        transport = staged(world, world.size, slot_bytes)
        for lanes in (1, transport.lanes):
            case = Case(lookup(Collective.ALL_REDUCE, "ring"), world.size, COUNT, lanes=lanes)
            prepared = Trial(transport, case).prepared
            with Memory(world.driver, 4 * COUNT) as source, Memory(world.driver, 4 * COUNT) as target:
                source.write(np.full(COUNT, world.rank + 1, np.float32))
                seconds = [_timed(world, prepared, source.address, target.address) for _ in range(ROUNDS)]
                wanted = sum(range(1, world.size + 1))
                assert (target.read().view(np.float32) == wanted).all(), f"{lanes} lanes: wrong sums"
            found.append((slot_bytes, lanes, 4 * COUNT / statistics.median(seconds[1:])))
        transport.close()
    world.close()
    return found


def _timed(world: World, prepared: Any, source: int, target: int) -> float:
    world.exchange(b"")
    begin = time.perf_counter()
    prepared.start(source, target).wait(time.monotonic() + PATIENCE)
    return time.perf_counter() - begin
