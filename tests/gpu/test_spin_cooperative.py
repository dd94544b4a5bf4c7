"""The kernels that wait for each other, on one device: one cooperative launch, whose groups of blocks are the ranks.

All blocks of such a launch run at the same time, as they do where every rank has a device of its own. What one device
does not show: signals and messages between devices.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gpu.device import FAKE, make_driver

from abccl.algorithms import Collective, lookup
from abccl.algorithms.plan import Plan
from abccl.transports.contract import Operation
from abccl.transports.cuda_spin import BLOCK, Calls, Spin, SpinPlan, workspace_bytes
from abccl.transports.trial import Case, Trial, cases

LANES, SLOT_BYTES = 3, 64 << 10
COUNTS = (1, 1000) if FAKE else (1, 1000, 20_003, 500_003, 5_000_003)
REPLAYS = 20 if FAKE else 1000


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The driver; a fake one has the CPU build of these kernels."""
    if FAKE:
        from fake_cuda import FakeDriver
        from spin_on_cpu import library

        made: Any = FakeDriver(kernels=library(tmp_path_factory.mktemp("kernels")))
        made.make_current()
    else:
        made = make_driver()
    yield made
    made.close_all()


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
        self.spins = [
            Spin(driver, rank, workspaces, self.abort, timeout, LANES, SLOT_BYTES, _image()) for rank in range(size)
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

    def launch(self) -> None:
        """Enqueue what was started, as one launch."""
        started, self.started = self.started, []
        blocks, calls = max(plan.blocks for plan, _, _ in started), Calls()
        for group, (plan, input, output) in enumerate(started):
            calls.call[group] = plan.call(input, output)
        first = started[0][0]
        if not FAKE and blocks * len(started) > self.driver.multiprocessors:
            pytest.skip(f"{blocks * len(started)} blocks do not run together on this device")
        arguments = (calls, ctypes.c_uint32(blocks), *first.arguments[1:])
        self.driver.launch(first.function, blocks * len(started), BLOCK, arguments, self.stream, cooperative=True)

    def run(self, case: Case) -> None:
        """One launch of the case; the ranks have what they must have."""
        trials = self.trials(case)
        self.launch()
        self.driver.synchronize(self.stream)
        assert [spin.error() for spin in self.spins] == [None] * self.size
        for trial in trials:
            trial.verify()


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


def _image() -> Callable[..., bytes]:
    if FAKE:
        return lambda *_: b""
    from abccl.cuda.compile import compile

    return compile


@pytest.fixture
def make(device: Any) -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def one(size: int, timeout: float = 60.0) -> Ranks:
        made.append(Ranks(device, size, timeout))
        return made[-1]

    yield one
    for ranks in made:
        ranks.close()


def all_reduce(name: str, size: int, count: int, **others: Any) -> Case:
    return Case(lookup(Collective.ALL_REDUCE, name), size, count, **others)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["direct", "two_shot", "ring", "rabenseifner"])
def test_all_reduce(make: Callable[..., Ranks], size: int, name: str) -> None:
    ranks = make(size)
    for count in COUNTS:
        for _ in range(3):
            ranks.run(all_reduce(name, size, count, lanes=LANES))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_algorithm(make: Callable[..., Ranks], size: int) -> None:
    ranks = make(size)
    for case in cases(size, LANES):
        ranks.run(case)


@pytest.mark.parametrize("name", ["direct", "two_shot", "ring"])
def test_a_graph_is_replayed(make: Callable[..., Ranks], name: str) -> None:
    """Rank r gives n + r in replay n."""
    size, count = 4, 1000
    ranks = make(size)
    ranks.trials(all_reduce(name, size, count, dtype="uint8", lanes=LANES))
    buffers = [(input, output) for _, input, output in ranks.started]
    driver, stream = ranks.driver, ranks.stream
    driver.begin_capture(stream)
    ranks.launch()
    graph = driver.end_capture(stream)
    result = np.empty(count, np.uint8)
    for replay in range(REPLAYS):
        for rank, (input, _) in enumerate(buffers):
            driver.fill(input, (replay + rank) % 256, count, stream)
        driver.launch_graph(graph, stream)
        driver.synchronize(stream)
        wanted = sum((replay + rank) % 256 for rank in range(size)) % 256
        for _, output in buffers:
            driver.copy_now(result.ctypes.data, output, count)
            assert (result == wanted).all(), f"replay {replay}"
    driver.destroy_graph(graph)
    assert [spin.error() for spin in ranks.spins] == [None] * size


@pytest.mark.parametrize("name", ["direct", "ring"])
def test_a_missing_rank_is_named(make: Callable[..., Ranks], name: str) -> None:
    ranks = make(3, timeout=0.2)
    ranks.trials(all_reduce(name, 3, 1000), ranks=[0, 1])
    ranks.launch()
    ranks.driver.synchronize(ranks.stream)
    said = [spin.error() for spin in ranks.spins]
    assert said[2] is None and any(said)
    for one in filter(None, said):
        assert re.match(r"rank [01] of 3: (block|lane) 0 .*waited 0.2 s for .*rank \d", one)


@pytest.mark.parametrize("name", ["direct", "ring"])
@pytest.mark.parametrize("who", ["somebody", "the host"])
def test_an_abort_ends_the_waits(make: Callable[..., Ranks], name: str, who: str) -> None:
    ranks = make(3, timeout=3600.0)
    ranks.trials(all_reduce(name, 3, 1000), ranks=[0, 1])
    ranks.launch()
    if who == "somebody":
        ctypes.c_uint32.from_address(ranks.abort).value = 1
    else:
        for spin in ranks.spins:
            spin.fail()
    ranks.driver.synchronize(ranks.stream)
    assert [spin.error() for spin in ranks.spins] == [None] * 3
