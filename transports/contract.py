"""The transport contract: a handful of verbs over bytes, and the execution of plans.

A transport carries messages between the ranks of one group. The portable engine (`portable.py`) runs any plan over
the verbs; a transport that can do better overrides `prepare` and runs plans itself. `check_transport` in
`conformance.py` holds every transport to what this file says.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ..algorithms import Collective
from ..algorithms.plan import Plan
from ..errors import DeadlineExceeded, Mismatch, TransportError

SPINNING, YIELDING, NAP = 20e-6, 0.005, 100e-6
"""Seconds without news after which a wait begins to yield the processor, after which it sleeps, and for how long at a
time. A yield may take milliseconds where others want the processor, and 30 us where they do not."""

USER_TAGS = 256
"""The first tag that plans leave alone."""


@dataclass(frozen=True)
class Operation:
    """What a plan means, the same on every rank.

    Attributes:
        dtype: the number of the element type (`transports.types.NUMBERS`).
        op: the number of the operator (`transports.types.OPERATORS`); of no meaning if nothing is folded.
        factor: what SCALE multiplies by.
        signature: a 32-bit checksum of the call; ranks whose signatures differ have called different things.
        text: "all_reduce(float32, sum, 1024 elements, ring)", for messages to people. Of an all_to_all it tells what
            this rank sends and receives, and so is another on each.
        straight: whether on every rank messages go from the input of one to the output of another, and no further: an
            engine may then move whole blocks, whatever their segments.
    """

    dtype: int
    op: int
    factor: float
    signature: int
    text: str
    straight: bool = False


@dataclass(frozen=True)
class NativeCall:
    """A collective of the engine's own: MPI's, Gloo's.

    Attributes:
        collective: what is called.
        dtype: the element type, as `transports.types` spells it.
        op: "sum", "max", ...; "" if nothing is reduced. avg and premul_sum are made of sum by the caller.
        root: of a rooted collective.
        input_count, output_count: elements of this rank's buffers.
        counts: the parts' elements by rank, of a reduce_scatter or all_gather; None if they are equal.
        sent, received: the parts' elements of an all_to_all; None if they are equal.
        text: the call in words.
    """

    collective: Collective
    dtype: str
    op: str
    root: int
    input_count: int
    output_count: int
    counts: tuple[int, ...] | None
    sent: tuple[int, ...] | None
    received: tuple[int, ...] | None
    text: str


class Request(Protocol):
    """One posted send or receive.

    Attributes:
        standing: of a receive, false at first: true says that its message may never come, so that its peer is not lost
            if it closes. May be changed at any time.
    """

    standing: bool

    @property
    def done(self) -> bool:
        """Whether the buffer may be used again. Becomes true only within `progress` or `wait`."""

    @property
    def source(self) -> int:
        """For a receive: the rank it comes from."""

    @property
    def wanted(self) -> int:
        """How many bytes the buffer has."""

    @property
    def length(self) -> int:
        """How many bytes the message has. For a finished receive: had, which may be other than was wanted."""


class Execution(Protocol):
    """One run of a plan on its buffers."""

    def progress(self) -> bool:
        """Do what can be done without waiting; true when the run is finished.

        Raises:
            CollectiveError: the run failed; the transport is aborted.
        """

    def wait(self, deadline: float) -> None:
        """Progress until finished or `deadline` (of time.monotonic()).

        Raises:
            DeadlineExceeded: with what was waited for; the transport is aborted.
            CollectiveError: as `progress`.
        """

    def abort(self, reason: str) -> None:
        """Abort the transport: every rank's waits raise `Aborted` with the reason."""


class Prepared(Protocol):
    """A plan made ready to run many times on one transport."""

    def start(self, input: int, output: int) -> Execution:
        """Start a run on the buffers at these addresses (0 where the plan has none).

        The caller keeps the buffers alive until the run is finished. One run at a time per transport.
        """


class Placed(Protocol):
    """Bytes of the host with their image where a transport's plans run.

    Attributes:
        address: of the image.
    """

    address: int

    def store(self) -> None:
        """Make the image as the bytes are."""

    def fetch(self) -> None:
        """Make the bytes as the image is. Whatever writes it must be done."""


class _InPlace:
    """Host memory is its own image."""

    def __init__(self, image: npt.NDArray[np.uint8]) -> None:
        self.address = int(image.ctypes.data)

    def store(self) -> None:
        pass

    def fetch(self) -> None:
        pass


class Transport(ABC):
    """A group of ranks that can exchange messages. Not thread-safe: the communicator serialises its calls.

    Messages of one tag from one rank to another arrive in the order they were posted. A send may wait for its
    receive (no buffering is promised), so post first, then wait for all. Sending to oneself is not promised.
    """

    name: ClassVar[str]

    collectives: ClassVar[frozenset[Collective]] = frozenset()
    """Those that its engine has of its own, for `prepare_native`."""

    device: str = "cpu"
    """Where the buffers of its plans lie: "cpu" or "cuda". The verbs' are in host memory."""

    rank: int
    size: int

    slot_bytes: int
    """The longest message of a plan. (Messages of the verbs have no limit.)"""

    lanes: int
    """How many segments of a plan may be under way at a time."""

    stirred: float = 0.0
    """When something last began or moved, of time.monotonic(): `idle` goes by it."""

    runs: int = 0
    """How many runs of plans were started: the portable engine numbers its messages by it."""

    recorder: Any = None
    """The native core's communicator that keeps the flight recorder, where the transport has one."""

    explain: Callable[[str], str] | None = None
    """Adds to what is said at the deadline of an engine's own collective where the other ranks are."""

    token: int = 0
    """A number that the ranks of this host share, and no other transport's."""

    _called: tuple[tuple[int, str], ...] = ()

    _abandoned: tuple[object, ...] = ()

    @abstractmethod
    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        """Begin to send `data` (contiguous bytes), which must stay unchanged until the request is done.

        Tags are 0 to 32767. The portable engine sends lane l's messages with tag l; the rest, from USER_TAGS up, is
        for the caller's own.
        """

    @abstractmethod
    def post_recv(self, peer: int, tag: int, into: memoryview) -> Request:
        """Begin to receive exactly len(into) bytes from `peer`.

        Of a message of another length what fits is delivered, and the request's `length` tells; `wait` raises
        `Mismatch` and aborts the transport. (A transport that can not tell may do so in `progress`.)
        """

    @abstractmethod
    def progress(self) -> None:
        """Move what can be moved without waiting.

        Raises:
            CollectiveError: the transport was aborted or a peer is lost.
        """

    @abstractmethod
    def abort(self, error: Exception) -> None:
        """Make every rank's present and future calls raise the class of `error` (Aborted, Mismatch, ...) with its
        message. May be called from any thread; the first abort wins; never raises."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Peers that still wait for this rank raise PeerLost or their deadline. Idempotent."""

    @abstractmethod
    def prepare(self, plan: Plan, operation: Operation) -> Prepared:
        """Make a plan ready to run; the portable engine's `PortablePlan(self, plan, operation)` serves all."""

    def prepare_native(self, call: NativeCall) -> Prepared:
        """Make a collective of the engine's own ready to run; all ranks make the same ones in the same order.

        Raises:
            ArgumentError: the engine has no such collective, type or operator.
        """
        raise TransportError(f"{self.name} has no collectives of its own: leave out algorithm='native'")

    def scaled(self, prepared: Prepared, call: NativeCall, before: bool, factor: float) -> Prepared:
        """A native collective whose input, or else whose output, is scaled; only where `device` is not the CPU."""
        raise TransportError(f"{self.name} scales nothing: leave out algorithm='native'")

    def split(self, members: Sequence[int], name: str) -> Transport:
        """A transport of these ranks, in this order. Only they call it.

        Args:
            name: no other split of this transport has it.
        """
        raise TransportError(f"{self.name} makes no transport of a part of its ranks")

    def place(self, image: npt.NDArray[np.uint8]) -> Placed:
        """An image of these bytes where plans can use it. The caller keeps both while it is used."""
        return _InPlace(image)

    def has_lost(self, peer: int) -> bool:
        """Whether the connection to the peer is known to be gone. From any thread, and after an abort."""
        return False

    def set_bell(self, ring: Callable[[], None]) -> bool:
        """Call `ring`, from any thread, whenever `progress` may find something new.

        False if this transport must be asked: nobody tells it.
        """
        return False

    def begin_run(self, text: str) -> int:
        """The number of a run of a plan that begins now. The last few are remembered with their text."""
        number = self.runs
        self.runs = (number + 1) & 0xFFFFFFFF
        self._called = (*self._called[-7:], (number, text))
        return number

    def called(self, number: int) -> str | None:
        """The text of a run of late, or None."""
        return dict(self._called).get(number)

    def abandon(self, kept: object) -> None:
        """Keep this for as long as this transport lives: a run has failed, and its buffers can not be taken back."""
        self._abandoned = (*self._abandoned, kept)

    def idle(self, deadline: float) -> None:
        """Give the processor away until `progress` may find something, at most until `deadline`; may return early.

        This one is for transports that must be asked: it returns at first, then yields, and sleeps when nothing has
        stirred for long.
        """
        now = time.monotonic()
        if now - self.stirred > YIELDING:
            time.sleep(max(0.0, min(NAP, deadline - now)))
        elif now - self.stirred > SPINNING:
            os.sched_yield()  # time.sleep(0) takes a hundred times as long

    def wait(self, requests: Sequence[Request], deadline: float) -> None:
        """Progress until all requests are done.

        Raises:
            DeadlineExceeded: at `deadline` (of time.monotonic()); the transport is aborted.
            Mismatch: a received message had another length than its buffer; the transport is aborted.
            CollectiveError: as `progress`.
        """
        self.stirred = time.monotonic()
        self.progress()
        while not all(request.done for request in requests):
            if time.monotonic() > deadline:
                error = DeadlineExceeded(
                    f"{self.name}: rank {self.rank} of {self.size} waited in vain for "
                    f"{sum(not request.done for request in requests)} of {len(requests)} messages"
                )
                self.abort(error)
                raise error
            self.idle(deadline)
            self.progress()
        for request in requests:
            if request.length != request.wanted:
                mismatch = Mismatch(
                    f"{self.name}: rank {self.rank} of {self.size} wanted {request.wanted} bytes from rank "
                    f"{request.source}, and {request.length} came: make the buffers of both equally long"
                )
                self.abort(mismatch)
                raise mismatch
