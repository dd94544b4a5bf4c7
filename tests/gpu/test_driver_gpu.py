"""Every method of `Driver` on a device: memory, order, waits, graphs, and memory between two processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu.device import FAKE, Memory, make_driver

from abccl.cuda.driver import WAIT, WRITE
from abccl.errors import TransportError

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def memory(driver: Any) -> Iterator[Memory]:
    """4 KiB, all 0."""
    with Memory(driver, 4096) as made:
        made.write(np.zeros(4096, np.uint8))
        yield made


def words(memory: Memory, count: int, offset: int = 0) -> list[int]:
    return memory.read(4 * count, offset).view(np.int32).tolist()  # type: ignore[no-any-return]


def test_a_device(driver: Any) -> None:
    assert 0 <= driver.device < driver.count()
    assert driver.name and len(driver.uuid) == 16 and any(driver.uuid)
    assert driver.architecture.startswith("sm_") and driver.multiprocessors > 0
    again = make_driver(driver.device)
    assert again.uuid == driver.uuid
    again.close_all()
    again.close_all()
    driver.make_current()
    with pytest.raises(TransportError, match="INVALID_DEVICE"):
        make_driver(driver.count())


def test_copies_and_fills(driver: Any, memory: Memory, stream: int) -> None:
    pinned, ordinary = driver.allocate_pinned(64), np.arange(16, dtype=np.int32)
    driver.copy_now(pinned, ordinary.ctypes.data, 64)
    driver.copy(memory.address, pinned, 64, stream)
    driver.copy(memory.address + 64, memory.address + 8, 16, stream)
    driver.fill(memory.address + 128, 255, 8, stream)
    driver.copy(pinned, memory.address + 64, 8, stream)
    driver.copy(memory.address, memory.address + 64, 0, stream)
    driver.fill(memory.address, 1, 0, stream)
    driver.synchronize(stream)
    assert words(memory, 16) == list(range(16))
    assert words(memory, 5, 64) == [2, 3, 4, 5, 0] and words(memory, 3, 128) == [-1, -1, 0]
    driver.copy_now(memory.address + 256, memory.address + 64, 8)
    driver.copy_now(ordinary.ctypes.data, pinned, 8)
    assert words(memory, 2, 256) == ordinary[:2].tolist() == [2, 3]
    driver.free_pinned(pinned)


def test_what_the_driver_knows_of_an_address(driver: Any, memory: Memory) -> None:
    array = np.zeros(1 << 16, np.uint8)
    assert driver.pointer(array.ctypes.data).kind == "unknown"
    found = driver.pointer(memory.address + 100)
    assert (found.kind, found.device, found.base, found.exportable) == ("device", driver.device, memory.address, True)
    assert found.nbytes >= 4096
    pinned = driver.allocate_pinned(64)
    assert driver.pointer(pinned).kind == "host" and not driver.pointer(pinned).exportable
    driver.free_pinned(pinned)


def test_the_device_uses_registered_memory_of_the_host(driver: Any, memory: Memory, stream: int) -> None:
    array = np.zeros(1 << 16, np.int32)
    address = driver.register_host(array.ctypes.data, array.nbytes)
    assert driver.pointer(array.ctypes.data).kind == "host"
    driver.operate(stream, [(WRITE, address + 4, 7)])
    driver.copy(memory.address, address + 4, 4, stream)
    driver.synchronize(stream)
    driver.unregister_host(array.ctypes.data)
    assert array[:3].tolist() == [0, 7, 0] and words(memory, 1) == [7]


@pytest.mark.parametrize(
    ("word", "value", "passes"), [(5, 5, True), (6, 5, True), (4, 5, False), (1, 2**32 - 2, True), (-2, 1, False)]
)
def test_a_wait_lasts_until_the_word_is_not_less(
    driver: Any, memory: Memory, stream: int, word: int, value: int, passes: bool
) -> None:
    memory.write(np.array([word], np.int32))
    event, other = driver.create_event(), driver.create_stream()
    driver.operate(stream, [(WAIT, memory.address, value)])
    driver.record(event, stream)
    assert passes or not driver.is_done(event)
    driver.operate(other, [(WRITE, memory.address + 4, 1)] if passes else [(WRITE, memory.address, value)])
    driver.synchronize_event(event)
    assert driver.is_done(event)
    driver.synchronize(other)
    driver.destroy_event(event)
    driver.destroy_stream(other)


def test_two_streams_take_turns(driver: Any, memory: Memory, stream: int) -> None:
    other = driver.create_stream()
    there, back = memory.address, memory.address + 4
    ready = driver.prepare_operations([(WAIT, there, 1), (WRITE, there, 0), (WRITE, back, 1)])
    for _ in range(500):
        driver.operate(other, ready)
        driver.operate(stream, [(WRITE, there, 1), (WAIT, back, 1), (WRITE, back, 0)])
    driver.operate(stream, [(WRITE, memory.address + 4 * index, index) for index in range(600)])  # several batches
    driver.synchronize_device()
    assert words(memory, 600) == list(range(600))
    driver.destroy_stream(other)


def test_events(driver: Any, memory: Memory, stream: int) -> None:
    start, end = driver.create_event(timing=True), driver.create_event(timing=True)
    other = driver.create_stream()
    driver.record(start, stream)
    driver.operate(stream, [(WAIT, memory.address, 1)])
    driver.record(end, stream)
    driver.wait_event(other, end)
    driver.operate(other, [(WRITE, memory.address + 4, 1)])
    assert not driver.is_done(end)
    with pytest.raises(TransportError, match="NOT_READY"):
        driver.elapsed(start, end)
    driver.operate(0, [(WRITE, memory.address, 1)])
    driver.synchronize(other)
    assert driver.is_done(end) and 0 < driver.elapsed(start, end) < 100
    for event in (start, end):
        driver.destroy_event(event)
    driver.destroy_stream(other)


def test_kernels_run_in_the_order_of_the_stream(driver: Any, kernels: Any, memory: Memory, stream: int) -> None:
    driver.operate(stream, [(WRITE, memory.address, 40)])
    kernels.tick(memory.address, stream)
    kernels.tick(memory.address, stream)
    driver.operate(stream, [(WAIT, memory.address, 42)])
    driver.synchronize(stream)
    assert words(memory, 1) == [42]


def test_a_graph_with_memory_operations_is_replayed_1000_times(driver: Any, memory: Memory, stream: int) -> None:
    """Its values are those of the capture: it puts back what it waited for. A second stream takes part in it."""
    start, done, source, target = (memory.address + offset for offset in (0, 4, 64, 128))
    side, peer = driver.create_stream(), driver.create_stream()
    fork, join = driver.create_event(), driver.create_event()
    assert driver.capture_id(stream) is None
    driver.begin_capture(stream)
    assert driver.capture_id(stream) is not None
    driver.operate(stream, [(WAIT, start, 1), (WRITE, start, 0)])
    driver.record(fork, stream)
    driver.wait_event(side, fork)
    assert driver.capture_id(side) == driver.capture_id(stream)
    driver.copy(target, source, 4, side)
    driver.record(join, side)
    driver.wait_event(stream, join)
    driver.operate(stream, [(WRITE, done, 1)])
    graph = driver.end_capture(stream)
    assert driver.capture_id(stream) is None and driver.capture_id(side) is None

    times = 50 if FAKE else 1000
    numbers, results = (driver.allocate_pinned(4 * times) for _ in range(2))
    given = np.arange(1, times + 1, dtype=np.int32)
    driver.copy_now(numbers, given.ctypes.data, given.nbytes)
    for turn in range(times):
        driver.launch_graph(graph, stream)
        driver.copy(source, numbers + 4 * turn, 4, peer)
        driver.operate(peer, [(WRITE, start, 1), (WAIT, done, 1), (WRITE, done, 0)])
        driver.copy(results + 4 * turn, target, 4, peer)
    driver.synchronize(peer)
    driver.synchronize(stream)
    found = np.empty_like(given)
    driver.copy_now(found.ctypes.data, results, found.nbytes)
    assert np.array_equal(found, given)
    driver.destroy_graph(graph)
    for address in (numbers, results):
        driver.free_pinned(address)
    for event in (fork, join):
        driver.destroy_event(event)
    for each in (side, peer):
        driver.destroy_stream(each)


def test_the_host_can_not_wait_for_what_is_being_captured(driver: Any, stream: int) -> None:
    event, other = driver.create_event(), driver.create_event()
    driver.record(other, 0)
    driver.begin_capture(stream)
    driver.record(event, stream)
    driver.synchronize_event(other)
    assert driver.is_done(other)
    with pytest.raises(TransportError, match="CAPTURE"):
        driver.is_done(event)
    with pytest.raises(TransportError, match="CAPTURE"):
        driver.end_capture(stream)
    driver.synchronize(stream)


# Opens the memory, takes turns with its owner through it, and says what it found.
PEER = """
import sys
import numpy as np
from gpu.device import make_driver
from abccl.cuda.driver import WAIT, WRITE
driver = make_driver()
address = driver.open(bytes.fromhex(sys.argv[1]), int(sys.argv[2]))
stream = driver.create_stream()
for turn in range(1, 101):
    driver.operate(stream, [(WAIT, address, turn)])
    driver.copy(address + 12, address + 8, 4, stream)
    driver.operate(stream, [(WRITE, address + 4, turn)])
driver.synchronize(stream)
print(driver.uuid.hex(), driver.pointer(address).kind, driver.pointer(address).exportable)
driver.close(address)
try:
    driver.close(address)
except Exception as error:
    print(type(error).__name__)
driver.close_all()
"""


def test_memory_between_two_processes_on_one_device(driver: Any, memory: Memory, stream: int) -> None:
    handle, offset = driver.export(memory.address + 256)
    assert len(handle) == 64 and offset == 256
    with pytest.raises(TransportError, match="INVALID"):
        driver.open(handle, offset)  # its own
    command = [sys.executable, "-c", PEER, handle.hex(), str(offset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as peer:
        at = memory.address + 256
        for turn in range(1, 101):
            driver.operate(stream, [(WRITE, at + 8, turn * 3), (WRITE, at, turn), (WAIT, at + 4, turn)])
            driver.copy(memory.address + 1024 + 4 * turn, at + 12, 4, stream)
        output, _ = peer.communicate(timeout=240)
        if peer.returncode != 0:  # let the stream go on, or nothing can be freed
            driver.operate(0, [(WRITE, at + 4, 1000)])
        driver.synchronize(stream)
    assert peer.returncode == 0 and output.split() == [driver.uuid.hex(), "device", "False", "TransportError"]
    assert words(memory, 100, 1028) == [turn * 3 for turn in range(1, 101)]
