"""The device engine: runs plans on memory of a CUDA device, by commands (`commands.py`) on a stream.

A wire whose commands only enqueue has one lane: everything is in one order on one stream, which is the order of each
lane that replay proves. A run has then been started when all of it is enqueued, the host waits for nothing, and it may
be captured in a CUDA graph. A wire that the host drives has several lanes, each a generator that stops where the host
must wait.

What ranks tell each other beside messages, errors and who called what, goes over a host transport (`watch.py`).
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..algorithms import Collective
from ..algorithms.plan import Plan
from ..cuda import compile as compiler
from ..cuda.driver import Driver
from ..errors import AbcclError, ArgumentError, ClosedError, TransportError
from .commands import Command, Kernels, Make, Wire
from .contract import NativeCall, Operation, Placed, Prepared, Request, Transport
from .growing import Growing
from .running import Running
from .types import element_type
from .watch import Watch

_PER_THREAD = 2  # CUDA's handle for a stream that is another one in each thread

KEPT = 16
"""Pairs of buffers for which a plan keeps its commands."""


driver_of: Callable[[int], Any] = cache(Driver)
"""The driver of a device, by its number."""

device_of: Callable[[int], int] = Driver.ordinal_of
"""The number of the device whose memory an address is."""

LEAST = 80
"""The kernels have instructions of sm_80."""


def open_device(ordinal: int) -> tuple[Any, Kernels]:
    """The driver of a device, and its kernels.

    Raises:
        TransportError: there is none, or something is not installed; the message names it.
    """
    driver = driver_of(ordinal)
    if int(driver.architecture.removeprefix("sm_")) < LEAST:
        raise TransportError(
            f"{driver.name} is {driver.architecture}, and abccl's kernels want sm_{LEAST} or later: "
            "pass arrays in host memory"
        )
    kernels = compiler.Kernels(driver)
    with driver.as_current():
        kernels.load()  # or why it can not be, before ranks rely on it
    return driver, kernels


class DeviceTransport(Transport):
    """Ranks that each have a CUDA device, or share some.

    Args:
        host: a transport of the same ranks, for this one alone: the verbs over host memory, errors, lost peers.
        driver: of the device (`cuda/driver.py`).
        kernels: its kernels.
        wire: how messages of plans move.
        lock: held in every call of the host transport, which has none of its own.

    Attributes:
        stream: where runs are enqueued; a stream of the transport's own until somebody sets it.
        timeout: seconds after which a run that has not ended fails, counted from when it was enqueued.
        on_failure: called with what this transport has failed with, in any thread.
    """

    device = "cuda"

    def __init__(
        self,
        host: Transport,
        driver: Any,
        kernels: Kernels,
        wire: Wire,
        timeout: float = 600.0,
        lock: threading.RLock | None = None,
    ) -> None:
        self.host, self.driver, self.kernels, self.wire, self.timeout = host, driver, kernels, wire, timeout
        self.name = wire.name  # type: ignore[misc]
        self.rank, self.size = host.rank, host.size
        self.lanes, self.slot_bytes = wire.lanes, wire.slot_bytes
        self.lock = lock or threading.RLock()
        self.on_failure: Callable[[AbcclError], None] = lambda error: None
        with driver.as_current():
            try:
                kernels.load()
                self.own_stream = self.stream = driver.create_stream()
                self.watch = Watch(self)
            except BaseException:
                wire.close()
                raise
        self._scratch = Growing(driver)
        self._events: list[int] = []
        # Of the last run, and of the last in each capture: its stream, and its end.
        self._last: dict[int | None, tuple[int, Event]] = {}
        self._closed = False

    # ---- the host's part

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        """See `Transport.post_send`: from host memory."""
        self._check_open()
        with self.lock:
            return self.host.post_send(peer, tag, data)

    def post_recv(self, peer: int, tag: int, into: memoryview) -> Request:
        """See `Transport.post_recv`: into host memory."""
        self._check_open()
        with self.lock:
            return self.host.post_recv(peer, tag, into)

    def progress(self) -> None:
        """See `Transport.progress`."""
        self.check()
        try:
            with self.lock:
                self.host.progress()
        except AbcclError as error:
            self.watch.fail(error)
            raise

    def abort(self, error: Exception) -> None:
        """See `Transport.abort`. What waits on the device is let go by the watch."""
        self.host.abort(error)
        self.watch.fail(error)

    def abandon(self, kept: object) -> None:
        """See `Transport.abandon`."""
        self.host.abandon(kept)

    def check(self) -> None:
        """Raise what this transport has failed with, if it has."""
        self._check_open()
        if self.watch.error is not None:
            error = self.watch.error
            raise type(error)(*error.args)

    def close(self) -> None:
        """See `Transport.close`. Waits until the device has done, or let go of, what is under way here."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as ends:
            # Each whatever the others raise: of a device that has failed nothing can be given back, peers must be told.
            ends.callback(self.host.close)
            ends.enter_context(contextlib.suppress(AbcclError))
            if self.watch.in_graphs:
                # A graph that is launched and has not begun is not seen by the watch, which sees to it that this ends.
                with contextlib.suppress(AbcclError), self.driver.as_current():
                    self.driver.synchronize_device()
            drained = self.watch.stop()
            ends.enter_context(self.driver.as_current())
            if drained:
                ends.callback(self.driver.destroy_stream, self.own_stream)
                for event in self._events:
                    ends.callback(self.driver.destroy_event, event)
                ends.callback(self.watch.free)
                ends.callback(self._scratch.free)
                ends.callback(self.wire.close)
                self.driver.synchronize(self.own_stream)

    def is_broken(self) -> bool:
        """Whether the device itself has failed: it does nothing any more."""
        try:
            with self.driver.as_current():
                if None in self._last:
                    self.driver.is_done(self._last[None][1].handle)
        except AbcclError:
            return True
        return False

    def place(self, image: npt.NDArray[np.uint8]) -> Placed:
        """See `Transport.place`: in device memory."""
        with self.driver.as_current():
            return _OnDevice(self.driver, image)

    # ---- plans

    @property
    def collectives(self) -> frozenset[Collective]:  # type: ignore[override]
        """Those that the wire's library has of its own."""
        found: frozenset[Collective] = getattr(self.wire, "collectives", frozenset())
        return found

    def prepare(self, plan: Plan, operation: Operation) -> Prepared:
        """The plan as commands on a stream."""
        with self.driver.as_current():
            commands = self.wire.commands(self, plan, operation)
        return DevicePlan(self, operation.signature, operation.text, commands)

    def prepare_native(self, call: NativeCall) -> Prepared:
        """See `Transport.prepare_native`: the wire's library's."""
        own = getattr(self.wire, "prepare_native", None)
        if own is None:
            return super().prepare_native(call)
        return DevicePlan(self, zlib.crc32(call.text.encode()), call.text, own(call))

    def scaled(self, prepared: Prepared, call: NativeCall, before: bool, factor: float) -> Prepared:
        """See `Transport.scaled`."""
        assert isinstance(prepared, DevicePlan)
        dtype = element_type(call.dtype)
        scaling, make = self.kernels.scaling, prepared.make

        def scale_before(input: int, output: int) -> list[list[Command]]:
            copy = self.scratch(call.input_count * dtype.itemsize)
            first = scaling(dtype.name, copy, input, factor, call.input_count)
            return [[first, *make(copy, output)[0]]]

        def scale_after(input: int, output: int) -> list[list[Command]]:
            last = scaling(dtype.name, output, output, factor, call.output_count)
            return [[*make(input, output)[0], last]]

        return DevicePlan(self, prepared.signature, prepared.text, scale_before if before else scale_after)

    def scratch(self, nbytes: int) -> int:
        """See `Runner.scratch`."""
        return self._scratch.take(nbytes)

    def event(self) -> Event:
        """An event of the driver's."""
        return Event(self.driver, self._events)

    def enter(self, stream: int) -> int | None:
        """Before a run is enqueued: behind the run before it, wherever that was. What captures the stream, if any."""
        found = self.driver.capture_id(stream)
        capture = int(found) if found is not None else None
        if capture is not None and capture not in self._last:
            self._last = {None: self._last[None]} if None in self._last else {}  # older captures have ended
        # An event of another capture, or of none, can not be waited for in this one: who captures orders that.
        if capture in self._last:
            last, end = self._last[capture]
            if last != stream or stream == _PER_THREAD:
                self.driver.wait_event(stream, end.handle)
        return capture

    def leave(self, stream: int, capture: int | None) -> Event:
        """A run is enqueued: the event of its end."""
        end = self.event()
        self.driver.record(end.handle, stream)
        self._last[capture] = (stream, end)
        return end

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.name}: rank {self.rank} of {self.size} is closed: make a new one")


class Event:
    """An event of the driver's, used again when the last reference to it has gone."""

    def __init__(self, driver: Any, free: list[int]) -> None:
        self._free, self.handle = free, free.pop() if free else int(driver.create_event())

    def __del__(self) -> None:
        self._free.append(self.handle)


class DevicePlan:
    """What runs on the device, made ready.

    Args:
        make: gives the commands of each lane for an input and an output.
    """

    def __init__(self, transport: DeviceTransport, signature: int, text: str, make: Make) -> None:
        self.transport, self.signature, self.text, self.make = transport, signature, text, make
        self._made: OrderedDict[tuple[int, int], list[list[Command]]] = OrderedDict()

    def start(self, input: int, output: int) -> DeviceExecution:
        """See `Prepared.start`: on the transport's stream."""
        return DeviceExecution(self, input, output)

    def commands(self, input: int, output: int) -> list[list[Command]]:
        """What each lane does on these buffers.

        Raises:
            ArgumentError: it was never run, and the stream is being captured: memory can not be allocated then.
        """
        key = (input, output)
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        transport = self.transport
        if not self._made and transport.driver.capture_id(transport.stream) is not None:
            raise ArgumentError(
                f"{self.text}: its first run can not be captured in a graph, since it allocates memory: run it once on "
                "such arrays before the capture"
            )
        self._made[key] = made = self.make(input, output)
        if len(self._made) > KEPT:
            self._made.popitem(last=False)
        return made


class DeviceExecution(Running):
    """One run: enqueued as far as the host need not wait."""

    transport: DeviceTransport
    end: Event | None

    def __init__(self, prepared: DevicePlan, input: int, output: int) -> None:
        self.prepared, self.transport = prepared, prepared.transport
        self.stream, self.end = self.transport.stream, None
        with self.transport.driver.as_current():
            self._begin(prepared, input, output)

    def _begin(self, prepared: DevicePlan, input: int, output: int) -> None:
        transport = self.transport
        transport.progress()  # peers may have failed meanwhile
        lanes = prepared.commands(input, output)
        self.capture = transport.enter(self.stream)
        if self.capture is not None and transport.wire.host_driven:
            raise ArgumentError(f"{prepared.text}: {transport.name} is driven by the host, and can not be in a graph")
        self.number = transport.runs
        transport.runs = (self.number + 1) & 0xFFFFFFFF
        transport.watch.begin(self)
        self.lanes = [self._run(commands) for commands in lanes]
        try:
            if self.capture is not None:
                transport.kernels.tick(transport.watch.begun, self.stream)
            self._enqueue()
        except BaseException as error:
            self._fail(error)
            raise

    def finished(self) -> bool:
        """Whether all is enqueued, and the device has done it. Raises nothing of the transport's."""
        return self.end is not None and (self.capture is not None or self.transport.watch.is_done(self.number))

    def _advance(self) -> bool:
        with self.transport.driver.as_current():
            # The host last: what was let go by an abort has also ended, and must not pass for done.
            done = self._enqueue() and self.finished()
            if self.end is not None and not done:
                self.transport.driver.is_done(self.end.handle)  # raises what the device has failed with
            self.transport.progress()
            return done and self.transport.watch.has_compared(self.number)

    def _enqueue(self) -> bool:
        if self.lanes:
            self.lanes = [lane for lane in self.lanes if next(lane, "end") != "end"]
            if not self.lanes:
                self._leave()
        return not self.lanes

    def _leave(self) -> None:
        transport = self.transport
        if self.capture is not None:
            transport.kernels.tick(transport.watch.ended, self.stream)
        else:
            transport.driver.write(self.stream, transport.watch.done, (self.number + 1) & 0xFFFFFFFF)
        self.end = transport.leave(self.stream, self.capture)

    def _fail(self, error: BaseException) -> None:
        if self.lanes:
            # What is enqueued may wait, and the watch lets it go: it must know when it has ended.
            self.lanes = []
            with contextlib.suppress(AbcclError), self.transport.driver.as_current():
                self._leave()
        super()._fail(error)

    def _run(self, commands: Sequence[Command]) -> Iterator[None]:
        for command in commands:
            waits = command(self.stream)
            if waits is not None:
                yield from waits

    def _late(self) -> str:
        transport = self.transport
        return (
            f"{self.prepared.text} #{self.number + 1}: rank {transport.rank} of {transport.size} is not done at its "
            f"deadline{transport.watch.about(self.number)}: have all ranks called it, are they alive? If they are only "
            f"slow, give a longer timeout"
        )


class _OnDevice:
    """An image of device memory: see `Placed`."""

    def __init__(self, driver: Any, image: npt.NDArray[np.uint8]) -> None:
        self._driver, self._image = driver, image
        self.address = driver.allocate(max(1, image.nbytes))

    def store(self) -> None:
        with self._driver.as_current():
            self._driver.copy_now(self.address, self._image.ctypes.data, self._image.nbytes)

    def fetch(self) -> None:
        with self._driver.as_current():
            self._driver.copy_now(self._image.ctypes.data, self.address, self._image.nbytes)

    def __del__(self) -> None:
        # A thread of the collector's choice; and of a device that has failed nothing can be given back.
        with contextlib.suppress(AbcclError), self._driver.as_current():
            self._driver.free(self.address)
