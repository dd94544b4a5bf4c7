"""Ranks whose messages are staged, on fake devices: what tests/test_staged.py makes, and what it starts by mpirun.

mpirun -n 2 python tests/staged_ranks.py
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from fake_cuda import FakeDriver

from abccl.cuda.compile import Kernels
from abccl.transports import Transport, conformance
from abccl.transports.contract import Placed
from abccl.transports.device import DeviceTransport
from abccl.transports.staged import StagedWire


class PatientTransport(DeviceTransport):
    """The ranks are threads, any of which may drive one; and who spins keeps the others from running."""

    def place(self, image: npt.NDArray[np.uint8]) -> Placed:
        self.driver.make_current()
        return super().place(image)

    def idle(self, deadline: float) -> None:
        time.sleep(1e-4)


def staged(host: Transport, direct: bool = False, same_process: bool = True) -> DeviceTransport:
    """A rank on a fake device of its own."""
    driver = FakeDriver(host.rank, same_process=same_process)
    driver.make_current()
    kernels = Kernels(driver, image=lambda *_: b"")  # the fake device has the CPU build of them
    lock = threading.RLock()
    return PatientTransport(host, driver, kernels, StagedWire(host, lock, driver, direct, 1 << 16), lock=lock)


def main() -> None:
    """All plans between two processes."""
    from mpi_program import World

    world = World()

    @contextmanager
    def make(size: int) -> Iterator[conformance.Group]:
        with world.make(size) as group:
            ranks = [host and staged(host, same_process=False) for host in group.transports]
            yield conformance.Group(ranks, group.exchange)
            for rank in ranks:
                if rank is not None:
                    rank.close()

    conformance.check_plans(make, sizes=(2,))
    world.all.close()
    print(f"rank {world.all.rank}: all plans are right")


if __name__ == "__main__":
    main()
