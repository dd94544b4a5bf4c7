"""A CUDA device without a GPU: `FakeDriver` has the methods of `abccl.cuda.driver.Driver`.

Memory of the device is a memfd mapped here; another process opens its handle by /proc/PID/fd, and keeps the memory
when the exporter dies. Streams are threads, a wait polls, and kernels are the CPU build of our own. What CUDA refuses
is refused here, and some more: an address which the driver does not know is an error when it is enqueued, freed
addresses are never given out again, and stream 0 is a stream of its own (as seen from non-blocking streams).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fake_memory import ANONYMOUS, PRIVATE, SHARED, Memory, Region, map_memory
from fake_streams import Capture, CapturedPoint, Context, Event, Graph, Operation, Stream, handles, refuse

from abccl.cuda.driver import WAIT, WRITE, MemoryOperation, Pointer

HANDLE = struct.Struct("<8sqqqQ24x")  # magic, process, file descriptor, bytes, inode: 64 bytes as CUDA's
MAGIC = b"fakecuda"

_all: weakref.WeakSet[FakeDriver] = weakref.WeakSet()
_thread = threading.local()  # .drivers: those that are current in this thread


def _is_there(word: ctypes.c_int32, value: int) -> bool:
    return ctypes.c_int32(word.value - value).value >= 0


@dataclass(frozen=True)
class Prepared:
    """Memory operations, checked and ready for `operate`."""

    operations: tuple[MemoryOperation, ...]


class FakeDriver:
    """One fake device in this process; `same_process` lets ranks be threads, each with a driver of its own.

    `uuid` tells devices apart: by default ranks of one ordinal share a device. `kernels` has `run_kernel` and is the
    CPU build of our kernels by default. As with CUDA, a thread calls `make_current()` before anything else.
    """

    devices = 8

    def __init__(
        self, device: int = 0, uuid: bytes | None = None, kernels: Any = None, *, same_process: bool = False
    ) -> None:
        if not 0 <= device < self.devices:
            refuse("INVALID_DEVICE", f"device {device} was asked for; there are {self.devices}, from 0 on")
        self.device = device
        self.name = f"Fake GPU {device}"
        self.uuid = uuid if uuid is not None else b"fake GPU %07d" % device
        self.architecture = "sm_90"
        self.multiprocessors = 4
        self._kernels = kernels
        self._same_process = same_process
        self._process = os.getpid()
        self._context = Context()
        _all.add(self)
        self._memory = Memory(self._context)
        self._streams = {0: Stream(self._context)}
        self._events: dict[int, Event] = {}
        self._graphs: dict[int, Graph] = {}
        self._modules: dict[int, bytes] = {}
        self._functions: dict[int, str] = {}
        self._opened: dict[int, list[Region]] = {}  # by address, as often as it was opened

    @staticmethod
    def count() -> int:
        return FakeDriver.devices

    @staticmethod
    def ordinal_of(address: int) -> int:
        """Of any driver of this process."""
        found = [driver.device for driver in list(_all) if driver._memory.find(address) is not None]
        if not found:
            refuse("INVALID_VALUE", f"ordinal_of: {address:#x} is no device's memory")
        return found[0]

    def make_current(self) -> None:
        drivers = getattr(_thread, "drivers", ())
        if self not in drivers or not self._same_process:
            _thread.drivers = (*drivers, self) if self._same_process else (self,)

    @contextlib.contextmanager
    def as_current(self) -> Iterator[None]:
        before = getattr(_thread, "drivers", ())
        self.make_current()
        try:
            yield
        finally:
            _thread.drivers = before

    # Memory

    def allocate(self, nbytes: int) -> int:
        self._enter("allocate", unsafe=True)
        self._positive(nbytes)
        file = os.memfd_create("fake CUDA memory")
        os.ftruncate(file, nbytes)
        return self._memory.add(Region(map_memory(nbytes, SHARED, file), nbytes, "allocated", file))

    def free(self, address: int) -> None:
        self._give_up("free", address, "allocated")

    def export(self, address: int) -> tuple[bytes, int]:
        self._enter("export")
        region = self._memory.find(address)
        if region is None or region.source != "allocated":
            refuse("INVALID_VALUE", f"export: {address:#x} is not in memory of this device that this process allocated")
        inode = os.fstat(region.file).st_ino
        return HANDLE.pack(MAGIC, self._process, region.file, region.nbytes, inode), address - region.base

    def open(self, handle: bytes, offset: int) -> int:
        self._enter("open", unsafe=True)
        if len(handle) != HANDLE.size or handle[: len(MAGIC)] != MAGIC:
            refuse("INVALID_VALUE", "open: these 64 bytes are no handle that export() gave")
        _, process, file, nbytes, inode = HANDLE.unpack(handle)
        if process == self._process and not self._same_process:
            refuse("INVALID_CONTEXT", "open: a process can not open its own handle, only another can")
        if not 0 <= offset < nbytes:
            refuse("INVALID_VALUE", f"open: offset {offset} is not in an allocation of {nbytes} bytes")
        region = next((r for r in self._memory if r.source == "opened" and r.handle == handle), None)
        if region is None:
            region = Region(self._map_of_peer(process, file, nbytes, inode), nbytes, "opened", handle=handle)
            self._memory.add(region)
        self._opened.setdefault(region.base + offset, []).append(region)
        return region.base + offset

    def close(self, address: int) -> None:
        self._enter("close", unsafe=True)
        regions = self._opened.get(address)
        if not regions:
            refuse("INVALID_VALUE", f"close: {address:#x} is not open")
        region = regions.pop()
        if not any(region in others for others in self._opened.values()):
            self._drain()
            region.retire()

    def register_host(self, address: int, nbytes: int) -> int:
        self._enter("register_host", unsafe=True)
        self._positive(nbytes)
        if self._memory.overlaps(address, nbytes):
            refuse("HOST_MEMORY_ALREADY_REGISTERED", f"register_host: {nbytes} bytes at {address:#x}, or some of them")
        return self._memory.add(Region(address, nbytes, "registered"))

    def unregister_host(self, address: int) -> None:
        self._give_up("unregister_host", address, "registered")

    def allocate_pinned(self, nbytes: int) -> int:
        self._enter("allocate_pinned", unsafe=True)
        self._positive(nbytes)
        return self._memory.add(Region(map_memory(nbytes, PRIVATE | ANONYMOUS), nbytes, "pinned"))

    def free_pinned(self, address: int) -> None:
        self._give_up("free_pinned", address, "pinned")

    def pointer(self, address: int) -> Pointer:
        self._enter("pointer")
        region = self._memory.find(address)
        if region is None or region.source == "freed":
            return Pointer("unknown", -1, 0, 0, False)
        if region.source in ("pinned", "registered"):
            return Pointer("host", -1, region.base, region.nbytes, False)
        return Pointer("device", self.device, region.base, region.nbytes, region.source == "allocated")

    # What streams do

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        ranges = [(destination, nbytes), (source, nbytes)] if nbytes else []
        self._enqueue(stream, "copy", lambda: ctypes.memmove(destination, source, nbytes), ranges)

    def copy_now(self, destination: int, source: int, nbytes: int) -> None:
        """Memory that the driver does not know is taken for the host's here, as CUDA does; one side must be known."""
        self._enter("copy_now", unsafe=True)
        if not nbytes:
            return
        known = [address for address in (destination, source) if self._memory.find(address) is not None]
        for address in known or [destination]:
            self._memory.check("copy_now", address, nbytes)
        self._streams[0].mark().wait()
        self._context.check()
        ctypes.memmove(destination, source, nbytes)

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        if not 0 <= value < 256:
            refuse("INVALID_VALUE", f"fill: {value} is not a byte")
        ranges = [(address, nbytes)] if nbytes else []
        self._enqueue(stream, "fill", lambda: ctypes.memset(address, value, nbytes), ranges)

    def prepare_operations(self, operations: Sequence[MemoryOperation]) -> Prepared:
        for kind, address, _ in operations:
            if kind not in (WRITE, WAIT):
                refuse("INVALID_VALUE", f"operate: {kind} is neither WRITE nor WAIT")
            if address % 4:
                refuse("INVALID_VALUE", f"operate: {address:#x} is not a multiple of 4")
        return Prepared(tuple(operations))

    def operate(self, stream: int, operations: Sequence[MemoryOperation] | Prepared) -> None:
        ready = operations if isinstance(operations, Prepared) else self.prepare_operations(operations)
        ranges = [(address, 4) for _, address, _ in ready.operations]
        self._enqueue(stream, "operate", lambda: self._operate(ready.operations), ranges)

    def _operate(self, operations: tuple[MemoryOperation, ...]) -> None:
        for kind, address, value in operations:
            word = ctypes.c_int32.from_address(address)
            if kind == WAIT:
                self._context.until(partial(_is_there, word, value))
            if self._context.over:
                return
            if kind == WRITE:
                word.value = value

    def write(self, stream: int, address: int, value: int) -> None:
        self.operate(stream, [(WRITE, address, value)])

    def load(self, image: bytes) -> int:
        self._enter("load", unsafe=True)
        module = next(handles)
        self._modules[module] = bytes(image)
        return module

    def function(self, module: int, name: str) -> int:
        self._enter("function")
        self._known(self._modules, module, "module")
        if self._kernels is None:
            from kernels_on_cpu import library

            self._kernels = library()
        function = next(handles)
        self._functions[function] = name
        return function

    def launch(
        self, function: int, grid: int, block: int, arguments: Sequence[Any], stream: int, cooperative: bool = False
    ) -> None:
        """`cooperative` makes no difference here: the blocks of a CPU build run one after another."""
        name = self._known(self._functions, function, "function")
        if grid < 1 or not 1 <= block <= 1024:
            refuse(
                "INVALID_VALUE", f"launch: {name} with {grid} blocks of {block} threads; wanted are 1, and 1 to 1024"
            )
        copies = [type(argument).from_buffer_copy(argument) for argument in arguments]
        self._refuse_freed(name, copies)
        addresses = (ctypes.c_void_p * max(1, len(copies)))(*map(ctypes.addressof, copies))

        def action() -> None:
            keep = copies
            result = self._kernels.run_kernel(name.encode(), grid, block, addresses)
            if result:
                refuse("LAUNCH_FAILED", f"{name} with {len(keep)} arguments: run_kernel says {result}")

        self._enqueue(stream, f"kernel {name}", action, ())

    # Streams and events

    def create_stream(self) -> int:
        self._enter("create_stream")
        stream = Stream(self._context)
        self._streams[stream.handle] = stream
        return stream.handle

    def destroy_stream(self, stream: int) -> None:
        found = self._stream("destroy_stream", stream, captured=False)
        if stream == 0:
            refuse("INVALID_HANDLE", "destroy_stream: stream 0 is always there")
        del self._streams[stream]
        found.stop()

    def synchronize(self, stream: int) -> None:
        self._stream("synchronize", stream, captured=False).mark().wait()
        self._context.check()

    def synchronize_device(self) -> None:
        self._enter("synchronize_device", unsafe=True)
        self._drain()
        self._context.check()

    def create_event(self, timing: bool = False) -> int:
        self._enter("create_event")
        event = next(handles)
        self._events[event] = Event(timing)
        return event

    def destroy_event(self, event: int) -> None:
        self._event("destroy_event", event)
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        found, at = self._event("record", event), self._stream("record", stream)
        if at.capture is not None:
            found.at = CapturedPoint(at.capture, at.capture.ends[at.handle])
        else:
            found.at = at.mark()

    def wait_event(self, stream: int, event: int) -> None:
        at, waiting = self._event("wait_event", event).at, self._stream("wait_event", stream)
        if isinstance(at, CapturedPoint):
            if at.capture not in self._context.captures:
                refuse("STREAM_CAPTURE_ISOLATION", "wait_event: the event was recorded in a capture that has ended")
            if waiting.capture not in (None, at.capture):
                at.capture.spoil("STREAM_CAPTURE_MERGE", "wait_event: the event is of another capture than the stream")
            if stream == 0:
                at.capture.spoil("STREAM_CAPTURE_IMPLICIT", "wait_event: stream 0 can not be captured")
            at.capture.join(waiting, at)
        elif at is not None:
            if waiting.capture is not None:
                waiting.capture.spoil(
                    "STREAM_CAPTURE_ISOLATION", "wait_event: the event is not of the stream's capture"
                )
            waiting.enqueue(Operation("wait_event", at.wait))

    def is_done(self, event: int) -> bool:
        mark = self._event("is_done", event).mark()
        return mark is None or mark.reached()

    def synchronize_event(self, event: int) -> None:
        mark = self._event("synchronize_event", event).mark()
        if mark is not None:
            mark.wait()
            self._context.check()

    def elapsed(self, start: int, end: int) -> float:
        marks = []
        for event in (start, end):
            found = self._event("elapsed", event)
            mark = found.mark()
            if not found.timing or mark is None:
                refuse("INVALID_HANDLE", "elapsed: both events must be made with timing=True and be recorded")
            if not mark.reached():
                refuse("NOT_READY", "elapsed: synchronize both events first")
            marks.append(mark)
        return marks[1].time - marks[0].time

    # Graphs

    def capture_id(self, stream: int) -> int | None:
        capture = self._stream("capture_id", stream).capture
        return capture.id if capture is not None else None

    def begin_capture(self, stream: int) -> None:
        found = self._stream("begin_capture", stream, captured=False)
        if stream == 0:
            refuse("STREAM_CAPTURE_UNSUPPORTED", "begin_capture: stream 0 can not be captured")
        found.capture = Capture(found)
        self._context.captures.append(found.capture)

    def end_capture(self, stream: int) -> int:
        capture = self._stream("end_capture", stream).capture
        if capture is None:
            refuse("ILLEGAL_STATE", f"end_capture: stream {stream:#x} is not being captured")
        if capture.origin.handle != stream:
            capture.spoil("STREAM_CAPTURE_UNMATCHED", "end_capture: the capture began in another stream")
        if capture.thread != threading.get_ident():
            refuse("STREAM_CAPTURE_WRONG_THREAD", "end_capture: another thread began this capture")
        self._context.captures.remove(capture)
        made = capture.end()
        graph = next(handles)
        self._graphs[graph] = made
        return graph

    def launch_graph(self, graph: int, stream: int) -> None:
        found = self._known(self._graphs, graph, "graph")
        self._enqueue(stream, "graph", lambda: found.run(self._context), found.ranges)

    def destroy_graph(self, graph: int) -> None:
        self._enter("destroy_graph")
        self._known(self._graphs, graph, "graph")
        del self._graphs[graph]

    def close_all(self) -> None:
        with self._context.lock:
            if self._context.closed:
                return
            self._context.closed = True
            for stream in self._streams.values():
                stream.stop()
        for stream in self._streams.values():
            stream.join()
        for region in self._memory:
            if region.source not in ("registered", "freed"):
                region.retire()

    # Checks

    def _enter(self, what: str, unsafe: bool = False) -> None:
        """What each call begins with; `unsafe` is what CUDA does not allow while a stream is being captured."""
        self._context.check()
        if os.getpid() != self._process:
            refuse("NOT_INITIALIZED", f"{what}: the driver was made before a fork; make one in the child")
        if self not in getattr(_thread, "drivers", ()):
            refuse("INVALID_CONTEXT", f"{what}: call make_current() in this thread first")
        if unsafe and self._context.captures:
            self._context.captures[0].spoil("STREAM_CAPTURE_UNSAFE", f"{what} during the capture of a stream")

    def _stream(self, what: str, stream: int, captured: bool = True) -> Stream:
        self._enter(what)
        found = self._known(self._streams, stream, "stream")
        if found.capture is not None and not captured:
            found.capture.spoil("STREAM_CAPTURE_UNSUPPORTED", f"{what}: stream {stream:#x} is being captured")
        return found

    def _event(self, what: str, event: int) -> Event:
        self._enter(what)
        return self._known(self._events, event, "event")

    def _enqueue(self, stream: int, what: str, action: Callable[[], Any], ranges: Sequence[tuple[int, int]]) -> None:
        found = self._stream(what, stream)
        for address, nbytes in ranges:
            self._memory.check(what, address, nbytes)
        found.enqueue(Operation(what, action, tuple(ranges)))

    def _known(self, table: dict[int, Any], handle: int, what: str) -> Any:
        if handle not in table:
            refuse("INVALID_HANDLE", f"{handle:#x} is no {what} of this driver, or was destroyed")
        return table[handle]

    def _refuse_freed(self, name: str, arguments: list[Any]) -> None:
        """Arguments may hold addresses anywhere: whatever looks like one that was freed is a sticky error."""
        for argument in arguments:
            data = bytes(argument)
            for (word,) in struct.iter_unpack("<Q", data[: len(data) // 8 * 8]):
                region = self._memory.find(word) if word else None
                if region is not None and region.source == "freed":
                    self._memory.check(f"kernel {name}", word, 1)

    def _positive(self, nbytes: int) -> None:
        if nbytes <= 0:
            refuse("INVALID_VALUE", f"{nbytes} bytes were asked for; at least 1")

    def _give_up(self, what: str, address: int, source: str) -> None:
        """Memory goes when the device has nothing left to do, as with CUDA."""
        self._enter(what, unsafe=True)
        region = self._memory.find(address)
        if region is None or region.source != source or region.base != address:
            refuse("INVALID_VALUE", f"{what}: {address:#x} is not the start of {source} memory")
        self._drain()
        if source == "registered":
            self._memory.remove(region)
        else:
            region.retire()

    def _drain(self) -> None:
        for mark in [stream.mark() for stream in list(self._streams.values()) if stream.capture is None]:
            mark.wait()

    def _map_of_peer(self, process: int, file: int, nbytes: int, inode: int) -> int:
        try:
            mine = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
        except OSError as error:
            refuse("INVALID_VALUE", f"open: the memory of process {process} is gone ({error})")
        try:
            if os.fstat(mine).st_ino != inode:
                refuse("INVALID_VALUE", f"open: process {process} has freed this memory")
            return map_memory(nbytes, SHARED, mine)
        finally:
            os.close(mine)
