"""Shared memory: CPU ranks on one host. The native core runs whole plans without the GIL.

Each rank owns one region of anonymous memory, which its peers open through its process entry; where that is not
allowed, a named object of mode 0600 that is unlinked once all have it. Pages are touched only when used. Which ranks
share a host is found by trying.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..algorithms import Collective, lookup
from ..algorithms.plan import Plan, bind, cut, lower
from ..errors import AbcclError, Aborted, ArgumentError, DeadlineExceeded, Mismatch, PeerLost, TransportError
from . import _native
from .contract import Execution, Operation, Request, Transport
from .topology import Exchange, host_identity
from .types import NUMBERS, OPERATORS

LANES = 4
SLOTS = 4
NEVER = 1 << 62
CALIBRATION_ROUNDS = 7
CALIBRATION_TIMEOUT = 60.0
ARENA_BYTES = 8 << 20
"""What the arenas of one rank may take together, up to 50 ranks; only what is used is touched."""

PROTOCOLS = ("cached", "streaming", "lent", "lent_streaming")
"""How long messages travel, in the order of the native core's numbers.

Copied into the sender's arena, by ordinary stores or past the cache; or read by the receiver where they lie, what it
writes going through its cache or past it. What is lent is mapped by the receiver if it is registered memory (direct),
else copied by the kernel (pull).
"""


PROTOCOL = "ABCCL_PROTOCOL"
"""Names the protocol of all plans. Read when ranks meet."""


def protocol_number(name: str) -> int:
    """The native core's number of a protocol.

    Raises:
        ArgumentError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise ArgumentError(f"no protocol is called {name!r}: there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS.index(name)


_KINDS: dict[type[Exception], int] = {DeadlineExceeded: 4, PeerLost: 5, Mismatch: 6, Aborted: 7}
"""The native core's numbers of the errors that travel through an abort."""


def slot_bytes(size: int, most: int = 128 << 10, arena: int = ARENA_BYTES) -> int:
    """The slots shrink as ranks are added: a power of two from 8 KiB up to `most`."""
    slot = most
    # A channel for messages beside the lanes, to each peer; and slots for several readers, once for each lane.
    while slot > 8 << 10 and slot * SLOTS * ((LANES + 1) * (size - 1) + LANES) > arena:
        slot //= 2
    return slot


def abort_native(native: Any, error: Exception) -> None:
    """Abort the native core's communicator; the first abort wins."""
    native.abort(next((number for kind, number in _KINDS.items() if isinstance(error, kind)), 7), str(error))


class ShmTransport(Transport):
    """The ranks of one host through shared memory.

    Args:
        exchange: an all-gather of small blobs among the ranks; called the same number of times on each.
        names: what messages to people call these ranks, where they are some of others; then what they call the others.
        named: whether to find each other's memory by name; None tries without, then with.
        slot: bytes of a slot, by default `slot_bytes(size)`.

    Raises:
        TransportError: on all ranks, if any can not attach to another's memory; the message names them.
    """

    name = "shm"

    def __init__(
        self,
        rank: int,
        size: int,
        exchange: Exchange,
        names: Sequence[int] | None = None,
        named: bool | None = None,
        slot: int | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.names = list(names or range(size))
        self.lanes = LANES
        self.slot_bytes = slot or slot_bytes(size)
        self.geometry = _native.Geometry(size, LANES, SLOTS, self.slot_bytes)
        self._timeout = 365 * 86400.0  # of the verbs, whose callers have deadlines of their own
        refusals: list[str] = []
        for way in (False, True) if named is None else (named,):
            refusals = self._connect(exchange, way)
            if not refusals:
                break
        if refusals:
            raise TransportError(
                f"shm serves ranks of one host and one user, and of {size} ranks not all can attach to each other: "
                + "; ".join(refusals[:3])
            )
        # Spinning longer than this gains nothing that was measured, and two ranks that the scheduler has put on one
        # core wait for each other's spins. More ranks than cores: whoever waits must let others run at once.
        self.native.set_patience(*((20, 500) if size > self.cores else (200, 4000)))
        self.native.streaming_from = NEVER
        self.protocol: str | None = None
        try:
            self.probe_link()
        except BaseException:
            self.native.close()  # peers that still measure must not wait for this rank
            raise
        if not self._named:
            # All have read what the probe wrote: the last message of it came from ranks that were done.
            arena = self.geometry.arena_at
            self._region.forget(arena, self.geometry.bytes - arena)
        self.native.adapt()
        self.set_protocol(os.environ.get(PROTOCOL) or None)

    def _connect(self, exchange: Exchange, named: bool) -> list[str]:
        """Make and announce the own region, attach to all others; returns what went wrong anywhere."""
        card = {"host": host_identity(), "pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0)), "token": 0}
        refusal, reads_all = "", True
        try:
            card |= self._make_region(named)
        except AbcclError as error:  # memory may be full; the others, who wait for the card, must hear of it
            refusal = f"rank {self.rank}: {error}"
        cards = [json.loads(blob) for blob in exchange(json.dumps(card).encode())]
        self.token = cards[0]["token"]
        if card["token"]:
            self.native.set_group("", self.token)  # for who looks before the communicator has a name
        # All cores that any rank may use: a launcher may have bound each rank to one.
        self.cores = len({core for theirs in cards for core in theirs["cores"]})
        for peer, theirs in enumerate(cards):
            if peer == self.rank or refusal or not theirs["token"]:
                continue
            if theirs["host"] != card["host"]:
                refusal = f"rank {self.rank} and rank {peer} are on different hosts or in different containers"
                continue
            try:
                memory = (
                    _native.Region.attach_named(theirs["name"], self.geometry.bytes)
                    if named
                    else _native.Region.attach(theirs["pid"], theirs["fd"], self.geometry.bytes)
                )
                self.native.attach(peer, memory, theirs["token"])
                reads_all = reads_all and self.native.can_read(peer, theirs["address"], theirs["token"])
            except AbcclError as error:
                refusal = f"rank {self.rank} to rank {peer}: {error}"
        verdicts = [json.loads(blob) for blob in exchange(json.dumps([refusal, reads_all]).encode())]
        refusals = [text for text, _ in verdicts if text]
        if card["token"]:
            self._region.unlink_name()
        if refusals:
            return refusals
        # Linux lets processes of one user read each other's memory (process_vm_readv), unless a security module or a
        # container's policy forbids it. Without it all that is not registered is copied twice.
        self.pulls = all(reads for _, reads in verdicts)
        self.native.set_pull(self.pulls)
        return []

    def _make_region(self, named: bool) -> dict[str, Any]:
        """Make and announce the own region; what others need to attach to it."""
        token, name = secrets.randbits(63) | 1, f"/abccl-{secrets.token_hex(8)}"
        size = self.geometry.bytes
        self._region = _native.Region.create_named(size, name) if named else _native.Region.create(size)
        self._named = named
        self.registers = not named  # peers map a rank's registered memory through its process entry
        self.native = _native.Communicator(self.rank, self.geometry, self._region)
        self.native.set_names(self.names)
        self.native.announce(token)
        self.recorder = self.native
        return {"fd": self._region.fd, "name": name, "token": token, "address": self.native.address_of_token}

    def probe_link(self) -> bool:
        """Whether the ranks' cores are far from each other now, sharing no cache. Collective; some ms.

        A hypervisor may move them at any time. Nothing is measured where a protocol is forced, and of many more ranks
        than cores.
        """
        if 1 < self.size <= 2 * self.cores and self.protocol is None:
            allowed = sorted(os.sched_getaffinity(0))
            # Ranks that have just met may still share a core, where the cache always wins: apart for a moment.
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.sched_setaffinity(0, {allowed[self.rank % len(allowed)]})
            try:
                self.native.streaming_from = self._calibrate()
            finally:
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(0, allowed)
            self.native.number_from_here()
        return self.far

    def _calibrate(self) -> int:
        """From how many bytes on messages go past the cache: measured, as it depends on what the ranks' cores share.

        Cores that share a cache hand lines over faster than memory does; between others it is the other way round,
        by up to 8 times. The same on all ranks. Plans begin with it, and watch their runs.
        """
        skeleton = lower(lookup(Collective.ALL_REDUCE, "two_shot"), self.rank, self.size)
        for message in (8 << 10, self.slot_bytes):
            vector = np.zeros(4 * message * self.size, dtype=np.uint8)
            out = np.empty_like(vector)
            plan = bind(skeleton, cut(vector.size, self.size, 1), 1, slot_bytes=message, lanes=self.lanes)
            operation = Operation(NUMBERS["uint8"], OPERATORS["bor"], 1.0, message, f"calibration {message}")
            native = self.prepare(plan, operation).native
            # Runs touch the memory, and fill all of the arena as they leave it in the caches, before they count.
            warm = 1 + self.slot_bytes * SLOTS // message
            medians = []
            for protocol in ("cached", "streaming"):
                native.force(protocol_number(protocol))
                times = []
                for _ in range(warm + CALIBRATION_ROUNDS):
                    start = time.perf_counter()
                    self.native.run(native, vector.ctypes.data, out.ctypes.data, CALIBRATION_TIMEOUT)
                    times.append(time.perf_counter() - start)
                medians.append(np.median(times[warm:]))
            gain = np.array([medians[0] / medians[1]])
            plan = bind(skeleton, cut(1, self.size, 8), 8, slot_bytes=self.slot_bytes)
            operation = Operation(NUMBERS["float64"], OPERATORS["sum"], 1.0, 0, "calibration result")
            agreed = self.prepare(plan, operation).native
            self.native.run(agreed, gain.ctypes.data, gain.ctypes.data, CALIBRATION_TIMEOUT)
            if gain[0] > 1.1 * self.size:
                return message // 2
        return NEVER

    @property
    def far(self) -> bool:
        """Whether the ranks' cores share no cache, as was measured when they met."""
        return bool(self.native.streaming_from != NEVER)

    def set_protocol(self, name: str | None) -> None:
        """One of PROTOCOLS for all plans; None lets each plan find out, which is the default.

        Messages that can not be lent are copied all the same.

        Raises:
            ArgumentError: there is no such protocol.
        """
        self.native.set_way(None if name is None else protocol_number(name))
        self.protocol = name

    def prepare(self, plan: Plan, operation: Operation) -> ShmPlan:
        """The plan as the native engine runs it."""
        return ShmPlan(self, self.native_plan(plan, operation, plan.skeleton.code))

    def native_plan(self, plan: Plan, operation: Operation, code: npt.NDArray[np.int32], remotes: int = 0) -> Any:
        """The plan in the native core.

        Args:
            code: the plan's, its peers numbered by this transport.
            remotes: how many peers are numbered behind this transport's ranks.
        """
        skeleton = plan.skeleton
        native = _native.Plan(
            code=code,
            table=plan.table.reshape(-1),
            rank=self.rank,
            size=self.size,
            remotes=remotes,
            input_count=plan.input_count,
            output_count=plan.output_count,
            scratch=skeleton.scratch,
            registers=skeleton.registers,
            segment=plan.segment,
            segments=plan.segments,
            lanes=plan.lanes,
            straight=operation.straight,
            type=operation.dtype,
            op=operation.op,
            factor=operation.factor,
            signature=operation.signature,
            text=operation.text,
            names=[str(block) for block in skeleton.blocks],
            communicator=self.native,
        )
        if plan.protocol is not None:
            way = protocol_number(plan.protocol)
            (native.force if plan.forced else native.expect)(way)
        return native

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        """See `Transport.post_send`."""
        work = self.native.post_send(peer, tag, _address(data), data.nbytes, data, self._timeout, False)
        return _Message(work, data.nbytes, self.names[peer])

    def post_recv(self, peer: int, tag: int, into: memoryview) -> Request:
        """See `Transport.post_recv`."""
        work = self.native.post_receive(peer, tag, _address(into), into.nbytes, into, self._timeout, False)
        return _Message(work, into.nbytes, self.names[peer])

    def progress(self) -> None:
        """See `Transport.progress`."""
        self.native.progress_messages()

    def abort(self, error: Exception) -> None:
        """See `Transport.abort`."""
        abort_native(self.native, error)

    def close(self) -> None:
        """See `Transport.close`. The memory goes when the last object that uses it does."""
        self.native.close()


class ShmPlan:
    """A plan in the native engine; `native` is what the dispatcher runs."""

    def __init__(self, transport: ShmTransport, native: Any) -> None:
        self.transport, self.native = transport, native

    def start(self, input: int, output: int) -> Execution:
        """See `Prepared.start`: the process's progress thread runs it."""
        work = self.transport.native.start(self.native, input, output, self.transport._timeout, None)
        return _Run(self, work)


class _Run:
    def __init__(self, plan: ShmPlan, work: Any) -> None:
        self._plan, self._work = plan, work

    def progress(self) -> bool:
        return bool(self._work.is_completed()) and self._finished(0.0)

    def wait(self, deadline: float) -> None:
        if not self._finished(max(0.0, deadline - time.monotonic())):
            error = DeadlineExceeded(f"{self._plan.native.text}: rank {self._plan.transport.rank} waited in vain")
            self.abort_with(error)
            raise error

    def abort(self, reason: str) -> None:
        self.abort_with(Aborted(reason))

    def abort_with(self, error: Exception) -> None:
        self._plan.transport.abort(error)

    def _finished(self, timeout: float) -> bool:
        return bool(self._work.finishes_within(timeout))


class _Message:
    """A posted send or receive; done only once its transport has looked."""

    def __init__(self, work: Any, wanted: int, source: int) -> None:
        self._work, self.wanted, self.length, self.source = work, wanted, wanted, source
        self._standing = False

    @property
    def standing(self) -> bool:
        return self._standing

    @standing.setter
    def standing(self, standing: bool) -> None:
        self._standing = standing
        self._work.set_standing(standing)

    @property
    def done(self) -> bool:
        return bool(self._work.is_completed()) and bool(self._work.finishes_within(0.0))


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, dtype=np.uint8).ctypes.data) if data.nbytes else 0


def shm_threads(size: int) -> list[ShmTransport]:
    """The transports of a new group of ranks that are threads of this process: for tests and notebooks."""
    barrier = threading.Barrier(size)
    blobs = [b""] * size

    def connect(rank: int) -> ShmTransport:
        def exchange(data: bytes) -> list[bytes]:
            blobs[rank] = data
            barrier.wait()
            everyone = list(blobs)
            barrier.wait()
            return everyone

        return ShmTransport(rank, size, exchange)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(connect, range(size)))
