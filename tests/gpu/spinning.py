"""Ranks on one device, for the kernels that wait for each other: a launch is cooperative, and has groups of blocks.

All blocks of such a launch run at the same time, as they do where every rank has a device of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from gpu.device import FAKE, make_driver
from spin_on_cpu import library, no_image

from abccl.algorithms import Collective, lookup
from abccl.algorithms.plan import Plan
from abccl.cuda.compile import compile
from abccl.transports.contract import Operation
from abccl.transports.cuda_spin import BLOCK, Calls, Spin, SpinPlan, workspace_bytes
from abccl.transports.trial import Case, Trial

LANES, SLOT_BYTES = 3, 64 << 10


def make_spin_driver(folder: Path) -> Any:
    """The driver of the device. A fake one has the CPU build of these kernels, which is made in the folder."""
    if not FAKE:
        return make_driver()
    from fake_cuda import FakeDriver

    made = FakeDriver(kernels=library(folder))
    made.make_current()
    return made


def all_reduce(name: str, size: int, count: int, **others: Any) -> Case:
    """All ranks' all_reduce by that algorithm."""
    return Case(lookup(Collective.ALL_REDUCE, name), size, count, **others)


class Ranks:
    """Ranks on one device. What they start is launched together by `launch`."""

    def __init__(self, driver: Any, size: int, timeout: float = 60.0) -> None:
        self.driver, self.size, self.stream = driver, size, driver.create_stream()
        nbytes = workspace_bytes(size, LANES, SLOT_BYTES)
        self.memory: list[int] = []
        workspaces = [self.allocate(nbytes) for _ in range(size)]
        for address in workspaces:
            driver.fill(address, 0, nbytes, self.stream)
        driver.synchronize(self.stream)
        self.abort = driver.allocate_pinned(8)
        ctypes.c_uint32.from_address(self.abort).value = 0
        image = no_image if FAKE else compile
        self.spins = [
            Spin(driver, rank, workspaces, self.abort, timeout, LANES, SLOT_BYTES, image) for rank in range(size)
        ]
        self.started: list[tuple[SpinPlan, int, int]] = []

    def close(self) -> None:
        self.driver.synchronize(self.stream)
        for spin in self.spins:
            spin.close()
        for address in self.memory:
            self.driver.free(address)
        self.driver.free_pinned(self.abort)
        self.driver.destroy_stream(self.stream)

    def allocate(self, nbytes: int) -> int:
        self.memory.append(self.driver.allocate(nbytes))
        return self.memory[-1]

    def trials(self, case: Case, ranks: Iterable[int] | None = None) -> list[Trial]:
        """Let these ranks (all) start the case."""
        members = range(self.size) if ranks is None else ranks
        trials = [Trial(_Transport(self, rank), case) for rank in members]  # type: ignore[arg-type]
        for trial in trials:
            trial.start()
        return trials

    def fits(self) -> bool:
        """Whether the blocks of what was started run together on this device."""
        return FAKE or self._blocks() * len(self.started) <= self.driver.multiprocessors

    def launch(self) -> None:
        """Enqueue what was started, as one launch."""
        assert self.fits(), f"{len(self.started)} x {self._blocks()} blocks do not run together on this device"
        (first, _, _), blocks, calls = self.started[0], self._blocks(), Calls()
        for group, (plan, input, output) in enumerate(self.started):
            calls.call[group] = plan.call(input, output)
        grid = blocks * len(self.started)
        self.started.clear()
        arguments = (calls, ctypes.c_uint32(blocks), *first.arguments[1:])
        self.driver.launch(first.function, grid, BLOCK, arguments, self.stream, cooperative=True)

    def run(self, case: Case) -> str | None:
        """One launch of the case, after which the ranks have what they must have: the kernel that did it. None, and
        nothing is launched, if its blocks do not run together on this device."""
        trials, kernel = self.trials(case), self.started[0][0].kernel
        if not self.fits():
            self.started.clear()
            return None
        self.launch()
        self.driver.synchronize(self.stream)
        assert [spin.error() for spin in self.spins] == [None] * self.size
        for trial in trials:
            trial.verify()
        return kernel

    def _blocks(self) -> int:
        return max(plan.blocks for plan, _, _ in self.started)


class _Transport:
    """What a trial asks of a transport."""

    slot_bytes = SLOT_BYTES

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def prepare(self, plan: Plan, operation: Operation) -> Any:
        prepared = self.ranks.spins[self.rank].prepare(plan, operation)
        return SimpleNamespace(start=lambda input, output: self.ranks.started.append((prepared, input, output)))

    def place(self, image: npt.NDArray[np.uint8]) -> Any:
        address, here = self.ranks.allocate(max(1, image.nbytes)), image.ctypes.data
        copy = self.ranks.driver.copy_now
        return SimpleNamespace(
            address=address,
            store=lambda: copy(address, here, image.nbytes),
            fetch=lambda: copy(here, address, image.nbytes),
        )
