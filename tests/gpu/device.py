"""The device that the tests of this folder use, and what is to be known of it.

It is the machine's first GPU. With ABCCL_TEST_FAKE_CUDA=1 it is the fake driver of tests/fake_cuda.py, on which the
tests themselves can be tried without a GPU: what they show then is nothing about a GPU, and no figure is kept.

    python tests/gpu/device.py        prints the facts as JSON
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

import numpy as np
import numpy.typing as npt

FAKE = os.environ.get("ABCCL_TEST_FAKE_CUDA") == "1"

Bytes = npt.NDArray[np.uint8]


def missing() -> str | None:
    """Why there is no device to test on; None if there is one."""
    if FAKE:
        return None
    from abccl.cuda.driver import Driver
    from abccl.errors import TransportError

    try:
        return None if Driver.count() else "the driver finds no GPU"
    except TransportError as error:
        return str(error)


def make_driver(device: int = 0) -> Any:
    """The driver of the device."""
    if FAKE:
        from fake_cuda import FakeDriver

        driver: Any = FakeDriver(device)
        driver.make_current()
        return driver
    from abccl.cuda.driver import Driver

    driver = Driver(device)
    driver.make_current()
    return driver


def make_kernels(driver: Any) -> Any:
    """Our kernels on it."""
    from abccl.cuda.compile import Kernels

    return Kernels(driver)


class Memory:
    """Device memory that is freed with the `with` statement; the address is that of its first byte."""

    def __init__(self, driver: Any, nbytes: int) -> None:
        self.driver, self.nbytes = driver, nbytes
        self.address: int = driver.allocate(max(1, nbytes))

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.free(self.address)

    def write(self, data: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy an array there."""
        data = np.ascontiguousarray(data)
        self.driver.copy_now(self.address + offset, data.ctypes.data, data.nbytes)

    def read(self, nbytes: int | None = None, offset: int = 0) -> Bytes:
        """Copy bytes from there."""
        data = np.empty(self.nbytes - offset if nbytes is None else nbytes, np.uint8)
        self.driver.copy_now(data.ctypes.data, self.address + offset, data.nbytes)
        return data


# ---- facts


def facts() -> dict[str, Any]:
    """Name, architecture, UUID, memory and driver version of the device, and how many there are."""
    driver = make_driver()
    try:
        found: dict[str, Any] = {
            "fake": FAKE,
            "name": driver.name,
            "architecture": driver.architecture,
            "multiprocessors": driver.multiprocessors,
            "uuid": f"GPU-{_dashed(bytes(driver.uuid).hex())}",
            "devices": 1 if FAKE else type(driver).count(),
        }
    finally:
        driver.close_all()
    return found if FAKE else found | _of_the_system(found["uuid"])


def _of_the_system(uuid: str) -> dict[str, Any]:
    """What nvidia-smi tells of the device, if it is there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    asked = [program, f"--id={uuid}", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        version, memory = told.split(", ")
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return {"driver": version, "memory": memory}


def _dashed(digits: str) -> str:
    return "-".join(digits[begin:end] for begin, end in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


if __name__ == "__main__":
    print(json.dumps(facts()))
