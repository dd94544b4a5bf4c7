"""Arrays in the memory of a fake device, as CuPy's would be, and communicators of threads that each have one."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fake_cuda import FakeDriver

from abccl.collectives import Communicator
from abccl.transports import device
from abccl.transports.shm import shm_threads


class DeviceArray:
    """An array with `__cuda_array_interface__`, and nothing else."""

    def __init__(self, driver: Any, values: Any, stream: int | None = None) -> None:
        values = np.ascontiguousarray(values)
        self.driver, self.shape, self.dtype, self.nbytes = driver, values.shape, values.dtype, values.nbytes
        self.address = driver.allocate(max(1, values.nbytes))
        self.strides: tuple[int, ...] | None = None
        self.read_only = False
        self.stream = stream
        self.put(values)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, self.read_only),
            "strides": self.strides,
            "stream": self.stream,
            "version": 3,
        }

    def put(self, values: Any) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        self.driver.copy_now(self.address, values.ctypes.data, values.nbytes)

    def get(self) -> Any:
        """The values, when all streams have done what they have."""
        self.driver.synchronize_device()
        values = np.empty(math.prod(self.shape), self.dtype)
        self.driver.copy_now(values.ctypes.data, self.address, values.nbytes)
        return values.reshape(self.shape)


class Rank:
    """One rank of `on_devices`: its communicator and what makes arrays on its device."""

    def __init__(self, communicator: Communicator, driver: Any) -> None:
        self.communicator, self.driver = communicator, driver
        self.rank, self.size = communicator.rank, communicator.size

    def array(self, values: Any, dtype: Any = None, stream: int | None = None) -> DeviceArray:
        return DeviceArray(self.driver, np.asarray(values, dtype), stream)


def on_devices(
    monkeypatch: Any, size: int, body: Callable[[Rank], Any], timeout: float = 60.0, shared: bool = True
) -> Sequence[Any]:
    """What `body` returns on each of `size` threads, which share a fake device, or have one each."""
    drivers = [
        FakeDriver(0, same_process=True, uuid=b"fake GPU %07d" % (0 if shared else rank)) for rank in range(size)
    ]
    communicators = [Communicator(made, timeout=timeout) for made in shm_threads(size)]

    by_thread: dict[int, Any] = {}
    monkeypatch.setattr(device, "driver_of", lambda ordinal: by_thread[threading.get_ident()])
    monkeypatch.setattr(device, "device_of", FakeDriver.ordinal_of)
    started = threading.Barrier(size)  # or one thread takes two ranks

    def run(rank: int) -> Any:
        started.wait(60)
        by_thread[threading.get_ident()] = drivers[rank]
        drivers[rank].make_current()
        with communicators[rank] as communicator:
            result = body(Rank(communicator, drivers[rank]))
            communicator.barrier()
            return result

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    for driver in drivers:
        driver.close_all()
    return results
