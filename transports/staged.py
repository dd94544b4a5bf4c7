"""Messages of device plans over the verbs of a host transport: MPI, Gloo, shared memory, threads.

What is sent is copied into a buffer, since what comes after may change it while the message waits. Staged, buffers are
of pinned host memory: a message is copied out of the device, travels, and is copied into a register on the device.
Direct, for an MPI library that knows of CUDA memory, buffers are of device memory, and registers receive.

A step ends when its messages have come and its own were posted. Until a request is done, and the copy out of a buffer
too, the buffer belongs to the step. Copies have streams of their own, one for each direction, so that both directions
of the bus work at a time, and beside them the folds.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from ..errors import ArgumentError, Mismatch, TransportError
from .commands import Command, Incoming, Outgoing, StepWire, offsets
from .contract import Request, Transport
from .mpi import MPITransport

LANES = 4
"""A segment is copied out, travels, is copied in, or is folded: four lanes keep all of that busy at a time, and more
would only take more memory."""

SLOT_BYTES = 1 << 20

GRACE = 1.0
"""Seconds after a message of another length in which the transport's watch may say who has called what."""

_LEAST = 4096
"""Bytes of the smallest buffer; and what each has beyond a power of two, for what lies between parts of a message."""

_CUDA = 0
"""MPIX_GPU_SUPPORT_CUDA of MPICH's mpi.h."""


def mpi_is_cuda_aware(library: str | None = None) -> bool:
    """Whether the MPI library that mpi4py has loaded says that it takes addresses of CUDA memory.

    Open MPI and MPICH answer MPIX_Query_cuda_support(), and MPICH MPIX_GPU_query_support(kind, &answer), too. A library
    that has neither does not.

    Args:
        library: a library to ask instead.
    """
    # Symbols of what a library is linked with are found through it: mpi4py.MPI is linked with the MPI library.
    functions = ctypes.CDLL(library or importlib.import_module("mpi4py.MPI").__file__)
    with contextlib.suppress(AttributeError):
        return bool(functions.MPIX_Query_cuda_support())
    answer = ctypes.c_int(0)
    with contextlib.suppress(AttributeError):
        return functions.MPIX_GPU_query_support(_CUDA, ctypes.byref(answer)) == 0 and bool(answer.value)
    return False


class _Memory:
    """Memory that messages pass through. It is given back when asked to, or when nobody refers to it.

    Attributes:
        view: of all of it. The memory of a device must not be touched through it.
        requests: the last that were posted for it.
        copied: the event after the last copy into or out of it.
    """

    def __init__(self, driver: Any, nbytes: int, pinned: bool) -> None:
        allocate, free = (driver.allocate_pinned, driver.free_pinned) if pinned else (driver.allocate, driver.free)
        self.nbytes, self.address = nbytes, int(allocate(nbytes))
        self.view = memoryview((ctypes.c_ubyte * nbytes).from_address(self.address)).cast("B")
        self.requests: list[Request] = []
        self.copied = int(driver.create_event())
        self.free = weakref.finalize(self, _free, driver, free, self.address, self.copied)
        self.free.atexit = False

    @property
    def is_posted(self) -> bool:
        """Whether a message is still to come or to go."""
        return not all(request.done for request in self.requests)


def _free(driver: Any, free: Callable[[int], None], address: int, event: int) -> None:
    # The collector calls this in any thread; with a context that is gone goes all that it had.
    with contextlib.suppress(TransportError), driver.as_current():
        driver.destroy_event(event)
        free(address)


class _Lane:
    """What the runs of a lane, one after another, have in common.

    Attributes:
        ready: the event before the step under way.
        leaving: buffers of steps that have ended, in use until their requests and copies are done.
    """

    def __init__(self, number: int, ready: int) -> None:
        self.number, self.ready = number, ready
        self.leaving: list[_Memory] = []
        self.registers: list[_Memory] = []


class StagedWire(StepWire):
    """See `commands.Wire`.

    Args:
        host: carries the messages; lane l's with tag l.
        lock: of the host transport.
        driver: of the device.
        direct: give the host transport addresses of device memory.
        slot_bytes: the longest message of a plan.

    Raises:
        ArgumentError: `direct`, and the host transport takes no such addresses.
    """

    host_driven = True

    def __init__(
        self,
        host: Transport,
        lock: contextlib.AbstractContextManager[Any],
        driver: Any,
        direct: bool = False,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        # Not a joint transport either: of its messages some go through shared memory.
        if direct and not (isinstance(host, MPITransport) and mpi_is_cuda_aware()):
            raise ArgumentError(
                f"direct messages want an MPITransport whose library takes addresses of CUDA memory, and this "
                f"{type(host).__name__} takes none: leave direct out, and they go through host memory; or install an "
                f"MPI that is built with CUDA"
            )
        self.host, self.lock, self.driver, self.direct = host, lock, driver, direct
        self.name = f"{host.name}_{'direct' if direct else 'staged'}"
        self.lanes, self.slot_bytes = min(LANES, host.lanes), slot_bytes
        self.outward, self.inward = driver.create_stream(), driver.create_stream()
        self._lanes = [_Lane(number, driver.create_event()) for number in range(self.lanes)]
        self._buffers: list[_Memory] = []
        self._free: dict[int, list[_Memory]] = {}
        self._closed = False

    def compile(self, lane: int) -> StagedPlan:
        """See `StepWire.compile`."""
        return StagedPlan(self, self._lanes[lane])

    def fail(self) -> None:
        """See `Wire.fail`. Nothing on the device waits for a peer: what is enqueued ends by itself."""

    def check(self) -> None:
        """See `Wire.check`. The host transport's errors are raised by its own calls."""

    def close(self) -> None:
        """See `Wire.close`. Memory that a failed run has left to the host transport lives as long as that."""
        if self._closed:
            return
        self._closed = True
        for stream in (self.outward, self.inward):
            with contextlib.suppress(TransportError):  # a device that has failed does nothing more
                self.driver.synchronize(stream)
                self.driver.destroy_stream(stream)
        memories = self._buffers + [memory for lane in self._lanes for memory in lane.registers]
        for memory in memories:
            if memory.is_posted:
                self.host.abandon(memory)
            else:
                memory.free()
        for lane in self._lanes:
            with contextlib.suppress(TransportError):
                self.driver.destroy_event(lane.ready)
            lane.leaving, lane.registers = [], []
        self._buffers, self._free = [], {}

    def take(self, nbytes: int) -> _Memory:
        """A buffer for a message."""
        capacity = _capacity(nbytes)
        free = self._free.setdefault(capacity, [])
        if not free:
            free.append(_Memory(self.driver, capacity, pinned=not self.direct))
            self._buffers.append(free[0])
        return free.pop()

    def settle(self, lane: _Lane) -> int:
        """Take back the buffers that are not used any more; how many still are."""
        leaving, lane.leaving = lane.leaving, []
        for buffer in leaving:
            if buffer.is_posted or not self.driver.is_done(buffer.copied):
                lane.leaving.append(buffer)
            else:
                buffer.requests = []
                self._free[buffer.nbytes].append(buffer)
        return len(lane.leaving)

    def registers(self, lane: _Lane, nbytes: int) -> _Memory:
        """Device memory for what a lane receives in a step: runs follow each other, and share it."""
        if not lane.registers or lane.registers[-1].nbytes < nbytes:
            # What commands were made with stays valid: older ones are kept, less than this one together.
            lane.registers.append(_Memory(self.driver, _capacity(nbytes), pinned=False))
        return lane.registers[-1]


class _Arrival(NamedTuple):
    request: Request
    register: int
    memory: _Memory


class _Departure(NamedTuple):
    peers: tuple[int, ...]
    data: memoryview
    buffer: _Memory


class StagedPlan:
    """See `commands.WirePlan`."""

    def __init__(self, wire: StagedWire, lane: _Lane) -> None:
        self._wire, self._lane = wire, lane
        self._most = 0
        self._since: float | None = None  # a message of another length has come

    def step(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> tuple[list[Command], list[int]]:
        """See `WirePlan.step`."""
        *starts, end = accumulate((offsets(incoming.sizes)[-1] for incoming in receives), initial=0)
        registers = self._wire.registers(self._lane, end)
        self._most = max(self._most, len(sends) + len(receives))
        move = partial(self._move, tuple(sends), tuple(receives), registers)
        return [move], [registers.address + start for start in starts]

    def release(self) -> list[Command]:
        """See `WirePlan.release`. What comes into a register waits for the stream."""
        return []

    def finish(self) -> list[Command]:
        """See `WirePlan.finish`."""
        return [self._end]

    def _end(self, stream: int) -> Iterator[None]:
        """Wait until all that was sent has been taken."""
        self._wire.settle(self._lane)
        while any(buffer.is_posted for buffer in self._lane.leaving):
            yield
            self._wire.settle(self._lane)

    def _move(
        self, sends: Sequence[Outgoing], receives: Sequence[Incoming], registers: _Memory, stream: int
    ) -> Iterator[None]:
        wire, lane = self._wire, self._lane
        # The longest step and as much of earlier ones: so what waits here waits for messages of earlier steps only, and
        # these end by themselves in every schedule that replay passes.
        while wire.settle(lane) > self._most:
            yield
        wire.driver.record(lane.ready, stream)
        while wire.direct and not wire.driver.is_done(lane.ready):  # the registers are being read
            yield
        arriving = self._post_receives(receives, registers)
        departing = deque(self._copy_out(outgoing) for outgoing in sends)
        while arriving or departing:
            while departing and wire.driver.is_done(departing[0].buffer.copied):
                self._post_send(departing.popleft())
            arriving = [arrival for arrival in arriving if not self._lands(arrival, stream)]
            if arriving or departing:
                yield

    def _post_receives(self, receives: Sequence[Incoming], registers: _Memory) -> list[_Arrival]:
        wire, arriving, start = self._wire, [], 0
        registers.requests = []
        for incoming in receives:
            length = offsets(incoming.sizes)[-1]
            memory, begin = (registers, start) if wire.direct else (wire.take(length), 0)
            with wire.lock:
                into = memory.view[begin : begin + length]
                request = wire.host.post_recv(incoming.peer, self._lane.number, into)
            memory.requests.append(request)
            arriving.append(_Arrival(request, registers.address + start, memory))
            start += length
        return arriving

    def _copy_out(self, outgoing: Outgoing) -> _Departure:
        wire = self._wire
        *starts, end = offsets([nbytes for _, nbytes in outgoing.pieces])
        buffer = wire.take(end)
        wire.driver.wait_event(wire.outward, self._lane.ready)
        for start, (address, nbytes) in zip(starts, outgoing.pieces, strict=True):
            wire.driver.copy(buffer.address + start, address, nbytes, wire.outward)
        wire.driver.record(buffer.copied, wire.outward)
        return _Departure(outgoing.peers, buffer.view[:end], buffer)

    def _post_send(self, departure: _Departure) -> None:
        wire, buffer = self._wire, departure.buffer
        with wire.lock:
            for peer in departure.peers:
                buffer.requests.append(wire.host.post_send(peer, self._lane.number, departure.data))
        self._lane.leaving.append(buffer)

    def _lands(self, arrival: _Arrival, stream: int) -> bool:
        """Whether the message has come; then what is enqueued from now on finds it in its register."""
        request, register, memory = arrival
        if not request.done:
            return False
        wire, driver = self._wire, self._wire.driver
        if request.length != request.wanted:
            self._since = self._since or time.monotonic()
            if time.monotonic() < self._since + GRACE:
                return False
            raise Mismatch(
                f"{wire.name}: rank {wire.host.rank} of {wire.host.size} wanted {request.wanted} bytes from rank "
                f"{request.source}, and {request.length} came: all ranks must call the same collectives in the same "
                f"order, with the same counts"
            )
        if not wire.direct:
            driver.wait_event(wire.inward, self._lane.ready)
            driver.copy(register, memory.address, request.length, wire.inward)
            driver.record(memory.copied, wire.inward)
            driver.wait_event(stream, memory.copied)
            self._lane.leaving.append(memory)
        return True


def _capacity(nbytes: int) -> int:
    """One of few sizes, the next larger."""
    return max(_LEAST, 1 << max(0, nbytes - _LEAST - 1).bit_length()) + _LEAST
