"""The fake CUDA driver: order, waits, memory between processes, graphs, and what it refuses, as CUDA does."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDriver

from abccl.cuda.driver import WAIT, WRITE, Pointer
from abccl.errors import TransportError


class AddKernels:
    """`run_kernel` that adds a number to a word."""

    def run_kernel(self, name: bytes, grid: int, block: int, arguments: Any) -> int:
        if name != b"add":
            return 1
        address = ctypes.c_uint64.from_address(arguments[0]).value
        number = ctypes.c_int32.from_address(arguments[1]).value
        ctypes.c_int32.from_address(address).value += number * grid * block
        return 0


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    driver = FakeDriver(kernels=AddKernels())
    driver.make_current()
    yield driver
    driver.close_all()


@pytest.fixture
def words(driver: FakeDriver) -> int:
    """The address of 1,024 words, all 0."""
    return driver.allocate(4096)


def read(driver: FakeDriver, address: int, count: int = 1) -> list[int]:
    values = np.empty(count, np.int32)
    driver.copy_now(values.ctypes.data, address, values.nbytes)
    return values.tolist()  # type: ignore[no-any-return]


def write(driver: FakeDriver, address: int, *values: int) -> None:
    data = np.array(values, np.int64).astype(np.int32)
    driver.copy_now(address, data.ctypes.data, data.nbytes)


def add(driver: FakeDriver, address: int, number: int, stream: int, function: int = 0) -> None:
    function = function or driver.function(driver.load(b"cubin"), "add")
    driver.launch(function, 1, 1, (ctypes.c_uint64(address), ctypes.c_int32(number)), stream)


def capture_both(driver: FakeDriver, first: int, second: int) -> None:
    """Begin a capture on one stream, and take in another by an event."""
    event = driver.create_event()
    driver.begin_capture(first)
    driver.record(event, first)
    driver.wait_event(second, event)


def test_a_device(driver: FakeDriver) -> None:
    assert FakeDriver.count() == 8 and driver.architecture == "sm_90"
    for other, same in ((FakeDriver(0), True), (FakeDriver(1), False), (FakeDriver(0, uuid=b"u" * 16), False)):
        assert len(other.uuid) == 16 and (other.uuid == driver.uuid) is same
        other.close_all()
    with pytest.raises(TransportError, match="INVALID_DEVICE"):
        FakeDriver(8)


def test_a_stream_works_in_order(driver: FakeDriver, words: int) -> None:
    stream = driver.create_stream()
    driver.fill(words, 1, 8, stream)
    driver.copy(words + 8, words, 4, stream)
    driver.fill(words, 2, 4, stream)
    add(driver, words + 4, 3, stream)
    driver.copy(words + 12, words, 0, stream)
    driver.synchronize(stream)
    assert read(driver, words, 4) == [0x02020202, 0x01010104, 0x01010101, 0]


PASSING = [(5, 5), (6, 5), (-1, -1), (1, 2**32 - 2)]
WAITING = [(4, 5), (-2, 1), (2**31 + 9, 7)]


@pytest.mark.parametrize(("word", "value"), PASSING + WAITING)
def test_a_wait_compares_so_that_counters_may_wrap(driver: FakeDriver, words: int, word: int, value: int) -> None:
    stream, event = driver.create_stream(), driver.create_event()
    write(driver, words, word)
    driver.operate(stream, [(WAIT, words, value)])
    driver.record(event, stream)
    if (word, value) in PASSING:
        driver.synchronize_event(event)
        assert driver.is_done(event)
    else:
        assert not driver.is_done(event)
        driver.operate(driver.create_stream(), [(WRITE, words, value)])
        driver.synchronize_event(event)


def test_operations_come_one_after_another(driver: FakeDriver, words: int) -> None:
    first, second = driver.create_stream(), driver.create_stream()
    ready = driver.prepare_operations([(WAIT, words, 1), (WRITE, words, 0), (WRITE, words + 4, 1)])
    for _ in range(100):
        driver.operate(first, ready)
        driver.operate(second, [(WRITE, words, 1), (WAIT, words + 4, 1), (WRITE, words + 4, 0)])
    driver.synchronize_device()
    assert read(driver, words, 2) == [0, 0]


def test_stream_0_is_a_stream_of_its_own(driver: FakeDriver, words: int) -> None:
    stream = driver.create_stream()
    driver.operate(stream, [(WAIT, words, 1)])
    driver.fill(words + 4, 1, 4, 0)
    driver.synchronize(0)
    assert read(driver, words + 4) == [0x01010101]
    driver.operate(0, [(WRITE, words, 1)])
    driver.synchronize(stream)


def test_a_stream_waits_for_what_an_event_recorded_before(driver: FakeDriver, words: int) -> None:
    busy, waiting = driver.create_stream(), driver.create_stream()
    event, end = driver.create_event(), driver.create_event()
    driver.wait_event(waiting, event)  # never recorded: nothing to wait for
    driver.synchronize(waiting)
    driver.synchronize_event(event)
    driver.operate(busy, [(WAIT, words, 1)])
    driver.record(event, busy)
    driver.wait_event(waiting, event)
    driver.record(end, waiting)
    assert not driver.is_done(end)
    driver.operate(busy, [(WAIT, words, 2)])
    driver.record(event, busy)  # later than what was waited for
    driver.operate(0, [(WRITE, words, 1)])
    driver.synchronize_event(end)
    assert not driver.is_done(event)
    driver.operate(0, [(WRITE, words, 2)])
    driver.synchronize_event(event)


def test_time_between_events(driver: FakeDriver, words: int) -> None:
    start, end = driver.create_event(timing=True), driver.create_event(timing=True)
    with pytest.raises(TransportError, match="be recorded"):
        driver.elapsed(start, end)
    driver.record(start, 0)
    driver.operate(0, [(WAIT, words, 1)])
    driver.record(end, 0)
    with pytest.raises(TransportError, match="NOT_READY"):
        driver.elapsed(start, end)
    driver.operate(driver.create_stream(), [(WRITE, words, 1)])
    driver.synchronize(0)
    assert 0 < driver.elapsed(start, end) < 100
    with pytest.raises(TransportError, match="timing=True"):
        driver.elapsed(start, driver.create_event())


# The peer opens what we exported, answers our word, exports memory of its own, and dies when told.
PEER = """
import os, sys
from fake_cuda import FakeDriver
from abccl.cuda.driver import WAIT, WRITE
driver = FakeDriver()
driver.make_current()
theirs = driver.open(bytes.fromhex(sys.argv[1]), int(sys.argv[2]))
mine = driver.allocate(64)
driver.operate(0, [(WAIT, theirs, 1), (WRITE, theirs + 4, 2)])
driver.copy(mine, theirs, 8, 0)
driver.synchronize(0)
handle, offset = driver.export(mine + 4)
print(handle.hex(), offset, flush=True)
sys.stdin.readline()
os._exit(9)
"""


def test_memory_between_processes(driver: FakeDriver, words: int) -> None:
    handle, offset = driver.export(words + 8)
    assert len(handle) == 64 and offset == 8
    command = [sys.executable, "-c", PEER, handle.hex(), str(offset)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        driver.operate(0, [(WRITE, words + 8, 1), (WAIT, words + 12, 2)])
        driver.synchronize(0)
        theirs, at = peer.stdout.readline().split()
        mapped = driver.open(bytes.fromhex(theirs), int(at))
        peer.stdin.write("\n")
        peer.stdin.close()
        assert peer.wait(60) == 9
    assert read(driver, mapped - 4, 2) == [1, 2], "the memory of a peer outlives it where it is mapped"
    assert driver.pointer(mapped) == Pointer("device", 0, mapped - 4, 64, False)
    with pytest.raises(TransportError, match="not in memory .* this process allocated"):
        driver.export(mapped)
    driver.close(mapped)
    with pytest.raises(TransportError, match="is gone"):
        driver.open(bytes.fromhex(theirs), int(at))


def test_a_handle_is_opened_once_and_counted(driver: FakeDriver) -> None:
    owner, peer = FakeDriver(same_process=True), FakeDriver(same_process=True)
    owner.make_current()
    peer.make_current()
    address = owner.allocate(64)
    handle, _ = owner.export(address)
    driver.make_current()
    with pytest.raises(TransportError, match="INVALID_CONTEXT.*own handle"):
        driver.open(handle, 0)
    for each in (owner, peer):
        each.make_current()
    first, second = peer.open(handle, 0), peer.open(handle, 16)
    assert second == first + 16 != address + 16
    owner.operate(0, [(WRITE, address + 16, 5)])
    owner.synchronize(0)
    peer.close(first)
    assert read(peer, second) == [5]
    peer.close(second)
    with pytest.raises(TransportError, match="is not open"):
        peer.close(second)
    owner.free(address)
    owner.allocate(64)  # its memory has the file descriptor of the old one
    with pytest.raises(TransportError, match="has freed"):
        peer.open(handle, 0)
    with pytest.raises(TransportError, match="no handle"):
        peer.open(bytes(64), 0)
    owner.close_all()
    peer.close_all()


def test_memory_of_the_host(driver: FakeDriver, words: int) -> None:
    array = np.arange(16, dtype=np.int32)
    assert driver.pointer(array.ctypes.data) == Pointer("unknown", -1, 0, 0, False)
    with pytest.raises(TransportError, match="neither allocated, opened nor registered"):
        driver.copy(words, array.ctypes.data, 4, 0)
    address = driver.register_host(array.ctypes.data, array.nbytes)
    assert driver.pointer(address + 4) == Pointer("host", -1, address, 64, False)
    with pytest.raises(TransportError, match="ALREADY_REGISTERED"):
        driver.register_host(array.ctypes.data + 32, 64)
    driver.copy(words, address + 4, 4, 0)
    driver.operate(0, [(WRITE, address, 9)])
    driver.unregister_host(address)
    assert array[0] == 9 and read(driver, words) == [1]
    with pytest.raises(TransportError, match="INVALID_VALUE"):
        driver.unregister_host(address)
    pinned = driver.allocate_pinned(64)
    assert driver.pointer(pinned + 63) == Pointer("host", -1, pinned, 64, False)
    assert driver.pointer(pinned + 64).kind == "unknown"
    driver.free_pinned(pinned)
    assert driver.pointer(words + 4) == Pointer("device", 0, words, 4096, True)


def test_a_kernel_gets_what_its_arguments_were_at_the_launch(driver: FakeDriver, words: int) -> None:
    stream = driver.create_stream()
    driver.operate(stream, [(WAIT, words, 1)])
    number = ctypes.c_int32(2)
    driver.launch(driver.function(driver.load(b""), "add"), 2, 3, (ctypes.c_uint64(words + 4), number), stream)
    number.value = 100
    driver.operate(0, [(WRITE, words, 1)])
    driver.synchronize(stream)
    assert read(driver, words + 4) == [12]


def test_a_failed_kernel_is_a_sticky_error(driver: FakeDriver, words: int) -> None:
    driver.launch(driver.function(driver.load(b""), "no such kernel"), 1, 1, (), 0)
    for call in (lambda: driver.synchronize(0), lambda: driver.allocate(4), lambda: driver.fill(words, 0, 4, 0)):
        with pytest.raises(TransportError, match="sticky.*LAUNCH_FAILED: no such kernel"):
            call()


def test_a_graph_replays_with_new_data(driver: FakeDriver, words: int) -> None:
    """Waits in it put back what they waited for, as the values are those of the capture."""
    stream, peer = driver.create_stream(), driver.create_stream()
    function = driver.function(driver.load(b"cubin"), "add")
    assert driver.capture_id(stream) is None
    driver.begin_capture(stream)
    assert driver.capture_id(stream) is not None and driver.capture_id(peer) is None
    driver.operate(stream, [(WAIT, words, 1), (WRITE, words, 0)])
    driver.copy(words + 12, words + 8, 4, stream)
    add(driver, words + 12, 1, stream, function)
    driver.operate(stream, [(WRITE, words + 4, 1)])
    graph = driver.end_capture(stream)
    assert driver.capture_id(stream) is None
    assert read(driver, words + 12) == [0], "a capture does nothing"
    for turn in range(1000):
        driver.launch_graph(graph, stream)
        write(driver, words + 8, turn)
        driver.operate(peer, [(WRITE, words, 1), (WAIT, words + 4, 1), (WRITE, words + 4, 0)])
        driver.synchronize(peer)
        assert read(driver, words + 12) == [turn + 1]
    driver.destroy_graph(graph)
    with pytest.raises(TransportError, match="INVALID_HANDLE.*no graph"):
        driver.launch_graph(graph, stream)


def test_a_capture_takes_in_streams_that_wait_for_its_events(driver: FakeDriver, words: int) -> None:
    """The branches of a graph run side by side: here each waits for the other."""
    first, second = driver.create_stream(), driver.create_stream()
    join, function = driver.create_event(), driver.function(driver.load(b"cubin"), "add")
    capture_both(driver, first, second)
    assert driver.capture_id(second) == driver.capture_id(first) is not None
    driver.operate(second, [(WRITE, words, 1), (WAIT, words + 4, 1)])
    add(driver, words + 8, 2, second, function)
    driver.record(join, second)
    driver.operate(first, [(WAIT, words, 1), (WRITE, words + 4, 1)])
    driver.wait_event(first, join)
    driver.copy(words + 12, words + 8, 4, first)
    graph = driver.end_capture(first)
    assert driver.capture_id(second) is None
    for _ in range(50):
        driver.fill(words, 0, 16, first)
        driver.launch_graph(graph, first)
        driver.synchronize(first)
        assert read(driver, words, 4) == [1, 1, 2, 2]
    with pytest.raises(TransportError, match="CAPTURED_EVENT"):
        driver.is_done(join)
    with pytest.raises(TransportError, match="capture that has ended"):
        driver.wait_event(second, join)


def test_a_graph_is_done_when_all_its_branches_are(driver: FakeDriver, words: int) -> None:
    first, second = driver.create_stream(), driver.create_stream()
    join, end = driver.create_event(), driver.create_event()
    capture_both(driver, first, second)
    driver.operate(second, [(WAIT, words, 1)])
    driver.record(join, second)
    driver.wait_event(first, join)
    driver.launch_graph(driver.end_capture(first), first)
    driver.record(end, first)
    for _ in range(100):  # time enough for a graph that does not wait
        driver.synchronize(second)
        assert not driver.is_done(end)
    driver.operate(0, [(WRITE, words, 1)])
    driver.synchronize_event(end)


def test_a_capture_must_be_joined_and_ended_where_it_began(driver: FakeDriver, words: int) -> None:
    first, second = driver.create_stream(), driver.create_stream()
    for stream, error, then in ((second, "UNMATCHED", "INVALIDATED"), (first, "UNJOINED", "ILLEGAL_STATE")):
        capture_both(driver, first, second)
        driver.fill(words, 0, 4, second)
        with pytest.raises(TransportError, match=error):
            driver.end_capture(stream)
        with pytest.raises(TransportError, match=then):
            driver.end_capture(first)
    with pytest.raises(TransportError, match="stream 0"):
        driver.begin_capture(0)


MISUSE: dict[str, tuple[str, Callable[[FakeDriver, int, int, int], Any]]] = {
    "synchronize": ("CAPTURE_UNSUPPORTED", lambda driver, words, stream, event: driver.synchronize(stream)),
    "synchronize the device": ("CAPTURE_UNSAFE", lambda driver, words, stream, event: driver.synchronize_device()),
    "is_done": ("CAPTURED_EVENT", lambda driver, words, stream, event: driver.is_done(event)),
    "synchronize_event": ("CAPTURED_EVENT", lambda driver, words, stream, event: driver.synchronize_event(event)),
    "allocate": ("CAPTURE_UNSAFE", lambda driver, words, stream, event: driver.allocate(64)),
    "pinned": ("CAPTURE_UNSAFE", lambda driver, words, stream, event: driver.allocate_pinned(64)),
    "free": ("CAPTURE_UNSAFE", lambda driver, words, stream, event: driver.free(words)),
    "load": ("CAPTURE_UNSAFE", lambda driver, words, stream, event: driver.load(b"")),
    "copy_now": ("CAPTURE_UNSAFE", lambda driver, words, stream, event: driver.copy_now(words, words + 8, 8)),
    "destroy": ("CAPTURE_UNSUPPORTED", lambda driver, words, stream, event: driver.destroy_stream(stream)),
    "begin again": ("CAPTURE_UNSUPPORTED", lambda driver, words, stream, event: driver.begin_capture(stream)),
    "stream 0": ("CAPTURE_IMPLICIT", lambda driver, words, stream, event: driver.wait_event(0, event)),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_what_is_not_allowed_breaks_a_capture(driver: FakeDriver, words: int, misuse: str) -> None:
    error, call = MISUSE[misuse]
    stream, event, other = driver.create_stream(), driver.create_event(), driver.create_event()
    driver.begin_capture(stream)
    driver.record(event, stream)
    driver.record(other, 0)
    driver.synchronize_event(other)
    assert driver.is_done(other), "an event outside of the capture may be asked"
    with pytest.raises(TransportError, match=error):
        call(driver, words, stream, event)
    with pytest.raises(TransportError, match="INVALIDATED"):
        driver.fill(words, 0, 4, stream)
    with pytest.raises(TransportError, match="INVALIDATED"):
        driver.end_capture(stream)
    driver.fill(words, 1, 4, stream)
    driver.synchronize(stream)


def test_a_captured_stream_waits_for_nothing_outside(driver: FakeDriver) -> None:
    first, second, event = driver.create_stream(), driver.create_stream(), driver.create_event()
    driver.record(event, second)
    driver.begin_capture(first)
    with pytest.raises(TransportError, match="ISOLATION"):
        driver.wait_event(first, event)
    with pytest.raises(TransportError, match="INVALIDATED"):
        driver.end_capture(first)
    driver.begin_capture(first)
    driver.begin_capture(second)
    driver.record(event, first)
    with pytest.raises(TransportError, match="MERGE"):
        driver.wait_event(second, event)


def test_a_graph_uses_no_freed_memory(driver: FakeDriver, words: int) -> None:
    stream, other = driver.create_stream(), driver.allocate(4)
    driver.begin_capture(stream)
    driver.copy(words, other, 4, stream)
    graph = driver.end_capture(stream)
    driver.free(other)
    with pytest.raises(TransportError, match="ILLEGAL_ADDRESS: graph"):
        driver.launch_graph(graph, stream)


USES: dict[str, Callable[[FakeDriver, int], Any]] = {
    "copy from": lambda driver, address: driver.copy(driver.allocate(4), address, 4, 0),
    "copy to": lambda driver, address: driver.copy(address, driver.allocate(4), 4, 0),
    "copy_now": lambda driver, address: driver.copy_now(driver.allocate(4), address, 4),
    "fill": lambda driver, address: driver.fill(address, 0, 4, 0),
    "operate": lambda driver, address: driver.operate(0, [(WRITE, address, 1)]),
    "kernel": lambda driver, address: add(driver, address + 8, 1, 0),
}


@pytest.mark.parametrize("use", USES)
def test_freed_memory_is_a_sticky_error(driver: FakeDriver, words: int, use: str) -> None:
    driver.free(words)
    assert driver.pointer(words).kind == "unknown"
    with pytest.raises(TransportError, match="INVALID_VALUE"):
        driver.free(words)
    for call in (lambda: USES[use](driver, words), lambda: driver.synchronize(0)):
        with pytest.raises(TransportError, match="sticky.*ILLEGAL_ADDRESS"):
            call()


def test_wrong_arguments_are_refused_when_they_are_enqueued(driver: FakeDriver, words: int) -> None:
    stream = driver.create_stream()
    for call in (
        lambda: driver.operate(stream, [(WRITE, words + 2, 1)]),
        lambda: driver.operate(stream, [(7, words, 1)]),
        lambda: driver.operate(stream, [(WRITE, words + 4096, 1)]),
        lambda: driver.copy(words, words + 4000, 100, stream),
        lambda: driver.fill(words, 256, 4, stream),
        lambda: driver.fill(64, 0, 4, stream),
        lambda: driver.copy_now(64, 128, 4),
        lambda: driver.allocate(0),
        lambda: driver.free(words + 4),
        lambda: driver.launch(driver.function(driver.load(b""), "add"), 0, 1, (), stream),
    ):
        with pytest.raises(TransportError, match="INVALID_VALUE"):
            call()
    driver.destroy_stream(stream)
    for call in (lambda: driver.fill(words, 0, 4, stream), lambda: driver.is_done(0), lambda: driver.function(0, "")):
        with pytest.raises(TransportError, match="INVALID_HANDLE"):
            call()
    driver.synchronize_device()


def test_a_thread_makes_the_driver_current_first(driver: FakeDriver, words: int) -> None:
    seen: list[str] = []

    def work() -> None:
        with pytest.raises(TransportError, match="INVALID_CONTEXT.*make_current"):
            driver.fill(words, 0, 4, 0)
        with driver.as_current():
            driver.fill(words, 1, 4, 0)
        with pytest.raises(TransportError, match="INVALID_CONTEXT"):
            driver.synchronize(0)
        driver.make_current()
        driver.synchronize(0)
        other = FakeDriver(1)
        other.make_current()
        other.close_all()
        with pytest.raises(TransportError, match="INVALID_CONTEXT"):
            driver.synchronize(0)
        seen.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["done"] and read(driver, words) == [0x01010101]


def test_closing_ends_what_waits(driver: FakeDriver, words: int) -> None:
    stream = driver.create_stream()
    driver.operate(stream, [(WAIT, words, 1), (WRITE, words, 7)])

    seen: list[str] = []

    def ended() -> None:
        with pytest.raises(TransportError, match="the driver is closed"), driver.as_current():
            driver.synchronize(stream)
        seen.append("done")

    waiting = threading.Thread(target=ended)
    waiting.start()
    driver.close_all()
    driver.close_all()
    waiting.join()
    assert seen == ["done"]
    with pytest.raises(TransportError, match="the driver is closed"):
        driver.allocate(4)
