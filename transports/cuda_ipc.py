"""CUDA ranks on one host: messages are read by the peers out of memory that they have mapped by CUDA IPC.

Each rank has one workspace, a cuMemAlloc of its own: what torch's and cupy's pools give out can often not be exported.
A message is copied into a slot of it, and the receiver folds straight out of the slot. Who waits for whom is said by
words, which the stream writes and waits for (cuStreamBatchMemOp): no processor of the GPU is kept waiting, so ranks may
share one. The words lie in host memory that all ranks share: there the host can read how far a run has come, and let
go what waits for a dead peer by a plain store, whatever the GPU is doing.

A word is 1 when there is something: a message in a slot, or a slot that has been read. Who waited for it makes it 0
again, and a run ends when all that it sent has been read. So all words are 0 between runs, every run of a plan is the
same, and it may be captured in a CUDA graph, whose values are baked in.

Between two ranks there are two slots, the room that replay proves schedules for.
"""

from __future__ import annotations

import ctypes
import json
import secrets
from collections.abc import Sequence
from typing import Any

from ..algorithms.plan import Plan
from ..cuda import compile as compiler
from ..cuda.driver import WAIT, WRITE, MemoryOperation
from ..errors import AbcclError, ArgumentError, DeadlineExceeded, TransportError
from . import _native
from .commands import Command, Incoming, Make, Outgoing, Runner, StepWire, WirePlan, copying, offsets
from .contract import Operation, Transport
from .cuda_spin import Spin, workspace_bytes
from .device import DeviceTransport
from .topology import Exchange, host_identity

SPIN_LANES, SPIN_SLOT = 8, 256 << 10
"""Of `sync="spin"`: each lane is a block of the kernel."""

SLOTS = 2
"""Between two ranks: a step has at most two messages for each."""

PADDING = 64 << 10
"""Bytes of a slot beyond `slot_bytes`, for what lies between the parts of a message."""

WORKSPACE_BYTES, LARGEST_SLOT, SMALLEST_SLOT = 128 << 20, 8 << 20, 256 << 10

_BLOCK = 2 << 20
_LINE = 64
_FULL, _READ, _CLOSED = 0, SLOTS, 2 * SLOTS
"""Which words of a line: the slots that are full, those that have been read; and whether the one who writes has closed
its mapping of the workspace of the one who waits."""
_WORD = 4


def slot_bytes(size: int) -> int:
    """Of a slot: they shrink as ranks are added."""
    slot = LARGEST_SLOT
    while slot > SMALLEST_SLOT and slot * SLOTS * (size - 1) > WORKSPACE_BYTES:
        slot //= 2
    return slot


class Words:
    """The words of all ranks, in memory that they share. A line for each pair: who waits, and who writes.

    Args:
        region: the memory.
        base: where the device finds it.
    """

    def __init__(self, region: Any, base: int, rank: int, size: int) -> None:
        self._region, self.base, self.rank, self.size = region, base, rank, size

    @staticmethod
    def nbytes(size: int) -> int:
        """Of all."""
        return size * size * _LINE

    def address(self, waits: int, writes: int, word: int) -> int:
        """Where the device finds a word that the first rank waits for and the second writes."""
        return self.base + (waits * self.size + writes) * _LINE + word * _WORD

    def let_go(self) -> None:
        """Make all words that this rank waits for 1."""
        for peer in range(self.size):
            for word in range(2 * SLOTS):
                self._here(self.rank, peer, word).value = 1

    def close_mappings(self) -> None:
        """Tell all that their workspaces are not mapped here any more."""
        for peer in range(self.size):
            self._here(peer, self.rank, _CLOSED).value = 1

    def is_mapped(self) -> bool:
        """Whether somebody may still read the own workspace."""
        return not all(self._here(self.rank, peer, _CLOSED).value for peer in range(self.size))

    def _here(self, waits: int, writes: int, word: int) -> ctypes.c_uint32:
        return ctypes.c_uint32.from_address(self._region.address + (waits * self.size + writes) * _LINE + word * _WORD)


class IpcWire(StepWire):
    """The wire whose streams wait: `sync="stream"`."""

    name = "cuda_ipc"
    lanes = 1
    host_driven = False

    def __init__(self, meeting: Meeting, kernels: Any) -> None:
        self.driver, self.kernels, self.rank, self.size = meeting.driver, kernels, meeting.rank, meeting.size
        self.workspaces, self.words, self.close = meeting.workspaces, meeting.words, meeting.close
        self.slot_bytes = slot_bytes(self.size)

    def compile(self, lane: int) -> WirePlan:
        """See `StepWire.compile`."""
        return _IpcPlan(self)

    def slot(self, sender: int, receiver: int, slot: int) -> int:
        """Where this rank finds a slot."""
        return self.workspaces[sender] + (receiver * SLOTS + slot) * (self.slot_bytes + PADDING)

    def fail(self) -> None:
        """See `Wire.fail`."""
        self.words.let_go()

    def check(self) -> None:
        """See `Wire.check`: the driver's errors come by its calls."""


class SpinWire:
    """The wire whose kernels wait, each for the messages of a whole plan: `sync="spin"`."""

    name = "cuda_ipc"
    lanes = SPIN_LANES
    slot_bytes = SPIN_SLOT
    host_driven = False

    def __init__(self, meeting: Meeting, timeout: float) -> None:
        self.words, self._unmap = meeting.words, meeting.close
        abort = self.words.address(meeting.rank, meeting.rank, 0)
        self.spin = Spin(
            meeting.driver, meeting.rank, meeting.workspaces, abort, timeout, SPIN_LANES, SPIN_SLOT, compiler.compile
        )

    def commands(self, runner: Runner, plan: Plan, operation: Operation) -> Make:
        """See `Wire.commands`: one launch."""
        prepared = self.spin.prepare(plan, operation)
        return lambda input, output: [prepared.commands(input, output)]

    def fail(self) -> None:
        """See `Wire.fail`."""
        self.spin.fail()
        self.words.let_go()

    def check(self) -> None:
        """See `Wire.check`: what a kernel has said that gave up."""
        said = self.spin.error()
        if said is not None:
            raise DeadlineExceeded(f"cuda_ipc: {said}")

    def close(self) -> None:
        """See `Wire.close`."""
        self.spin.close()
        self._unmap()


class _IpcPlan:
    """One run: how many messages have gone to and come from each peer."""

    def __init__(self, wire: IpcWire) -> None:
        self.wire, self.rank, self.word = wire, wire.rank, wire.words.address
        self.sent, self.received = [0] * wire.size, [0] * wire.size
        self.read: list[tuple[int, int]] = []  # what this step has received: the peer and the slot
        self.acknowledged: list[MemoryOperation] = []  # that it has been read: said when next something is

    def step(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> tuple[list[Command], list[int]]:
        """See `WirePlan.step`."""
        commands: list[Command] = []
        before, after = self._said(), list[MemoryOperation]()
        copies: list[tuple[int, int, int]] = []
        for peers, pieces in sends:
            starts = self._offsets([size for _, size in pieces])
            for peer in peers:
                slot = self.sent[peer] % SLOTS
                if self.sent[peer] >= SLOTS:
                    if after:
                        # Replay lets the peers have the sends of a step before this one finds room: so does this.
                        commands += self._moving(before, copies, after)
                        before, copies, after = [], [], []
                    before += self._wait(peer, _READ + slot)
                self.sent[peer] += 1
                to = self.wire.slot(self.rank, peer, slot)
                copies += [(to + start, source, size) for start, (source, size) in zip(starts, pieces) if size]
                after.append((WRITE, self.word(peer, self.rank, _FULL + slot), 1))
        arrived = []
        for peer, sizes in receives:
            self._offsets(sizes)
            slot = self.received[peer] % SLOTS
            self.received[peer] += 1
            after += self._wait(peer, _FULL + slot)
            arrived.append(self.wire.slot(peer, self.rank, slot))
            self.read.append((peer, slot))
        return [*commands, *self._moving(before, copies, after)], arrived

    def _moving(
        self, before: list[MemoryOperation], copies: list[tuple[int, int, int]], after: list[MemoryOperation]
    ) -> list[Command]:
        if not copies:
            return self._operating([*before, *after])
        copy = copying(self.wire.driver, self.wire.kernels, copies)
        # Waits for nothing: what has been read may as well be said behind the copies, together with what is full.
        if all(kind == WRITE for kind, _, _ in before):
            return [copy, *self._operating([*before, *after])]
        return [*self._operating(before), copy, *self._operating(after)]

    def release(self) -> list[Command]:
        """See `WirePlan.release`."""
        self.acknowledged += [(WRITE, self.word(peer, self.rank, _READ + slot), 1) for peer, slot in self.read]
        self.read = []
        return []

    def finish(self) -> list[Command]:
        """See `WirePlan.finish`: all that was sent has been read."""
        operations = self._said()
        for peer, sent in enumerate(self.sent):
            for number in range(max(0, sent - SLOTS), sent):
                operations += self._wait(peer, _READ + number % SLOTS)
        return self._operating(operations)

    def _said(self) -> list[MemoryOperation]:
        said, self.acknowledged = self.acknowledged, []
        return said

    def _wait(self, peer: int, word: int) -> list[MemoryOperation]:
        address = self.word(self.rank, peer, word)
        return [(WAIT, address, 1), (WRITE, address, 0)]

    def _operating(self, operations: list[MemoryOperation]) -> list[Command]:
        if not operations:
            return []
        prepared, operate = self.wire.driver.prepare_operations(operations), self.wire.driver.operate
        return [lambda stream: operate(stream, prepared)]

    def _offsets(self, sizes: Sequence[int]) -> list[int]:
        starts = offsets(sizes)
        if starts[-1] > self.wire.slot_bytes + PADDING:
            raise ArgumentError(
                f"cuda_ipc: a message of {len(sizes)} parts wants {starts[-1]} bytes, and a slot has "
                f"{self.wire.slot_bytes + PADDING}: choose an algorithm that sends fewer blocks at a time"
            )
        return starts


class CudaIpcTransport(DeviceTransport):
    """CUDA ranks on one host, each with a device or sharing some. Collective to make.

    Args:
        host: a transport of the same ranks, for this one alone.
        driver: of the device (`cuda/driver.py`).
        kernels: its kernels (`cuda/compile.py`).
        exchange: an all-gather of small blobs among the ranks; called the same number of times on each.
        sync: "stream": streams wait. "spin": kernels wait; only where every rank has a device of its own.
        timeout: seconds after which a run that has not ended fails.

    Raises:
        TransportError: on all ranks, if any can not map another's memory, or shares a device and it is "spin"; the
            message names them.
        ArgumentError: no such `sync`.
    """

    def __init__(
        self,
        host: Transport,
        driver: Any,
        kernels: Any,
        exchange: Exchange,
        sync: str = "stream",
        timeout: float = 600.0,
    ) -> None:
        self.sync, size = sync, host.size
        if sync not in ("stream", "spin"):
            raise ArgumentError(f'cuda_ipc: sync must be "stream" or "spin", and is {sync!r}')
        nbytes = size * SLOTS * (slot_bytes(size) + PADDING)
        if sync == "spin":
            nbytes = workspace_bytes(size, SPIN_LANES, SPIN_SLOT)
        # A handle shares the whole block that the memory lies in, which may be of this size.
        nbytes = -(-nbytes // _BLOCK) * _BLOCK
        with driver.as_current():
            meeting = Meeting(host.rank, size, driver, exchange, nbytes, sync)
            try:
                wire = SpinWire(meeting, timeout) if sync == "spin" else IpcWire(meeting, kernels)
            except BaseException:
                meeting.close()
                raise
        super().__init__(host, driver, kernels, wire, timeout)


class Meeting:
    """Maps the ranks' workspaces, and the words: one object to close."""

    def __init__(self, rank: int, size: int, driver: Any, exchange: Exchange, nbytes: int, sync: str) -> None:
        self.rank, self.size, self.driver = rank, size, driver
        self.nbytes, self.sync = nbytes, sync
        _free_what_nobody_maps()
        self.opened: list[int] = []
        self.workspaces: list[int] = []
        self.own = self.base = 0
        self.region: Any = None
        try:
            refusals = self._meet(exchange)
            if refusals:
                self._close_mappings()
                exchange(b"")  # memory is freed after all have closed their mappings of it
                if self.own:
                    self.driver.free(self.own)
                    self.own = 0
                raise TransportError(
                    f"cuda_ipc serves ranks of one host whose GPUs can map each other's memory, and of {size} ranks "
                    f"not all can: {'; '.join(refusals[:3])}. Leave it out, and NCCL or host memory carries messages"
                )
        except BaseException:
            self.close()
            raise

    def _meet(self, exchange: Exchange) -> list[str]:
        nbytes, name = Words.nbytes(self.size), f"/abccl-{secrets.token_hex(8)}"
        card: dict[str, Any] = {"host": host_identity(), "refusal": ""}
        try:
            self.own = self.driver.allocate(self.nbytes)
            self.driver.fill(self.own, 0, self.nbytes, 0)
            self.driver.synchronize(0)
            handle, offset = self.driver.export(self.own)
            card |= {"handle": handle.hex(), "offset": offset, "uuid": self.driver.uuid.hex()}
            if self.rank == 0:
                # Of mode 0600, and without a name as soon as all have it.
                self.region = _native.Region.create_named(nbytes, name)
                card["words"] = name
        except AbcclError as error:
            card["refusal"] = f"rank {self.rank}: {error}"
        cards = [json.loads(blob) for blob in exchange(json.dumps(card).encode())]
        refusal = next((theirs["refusal"] for theirs in cards if theirs["refusal"]), "")
        if not refusal and self.sync == "spin":
            refusal = _shared_device([theirs["uuid"] for theirs in cards])
        if not refusal:
            refusal = self._map(cards, nbytes)
        said = [blob.decode() for blob in exchange(refusal.encode())]
        if self.rank == 0 and self.region is not None:
            self.region.unlink_name()
        return list(dict.fromkeys(filter(None, said)))

    def _map(self, cards: Sequence[dict[str, Any]], nbytes: int) -> str:
        """Map all that others have; what went wrong, if anything did."""
        me = cards[self.rank]
        for peer, theirs in enumerate(cards):
            try:
                if theirs["host"] != me["host"]:
                    return f"rank {self.rank} and rank {peer} are on different hosts or in different containers"
                if peer == self.rank:
                    self.workspaces.append(self.own)
                    continue
                address = self.driver.open(bytes.fromhex(theirs["handle"]), theirs["offset"])
                self.opened.append(address)
                self.workspaces.append(address)
            except AbcclError as error:
                return f"rank {self.rank} to rank {peer}: {error}"
        try:
            if self.region is None:
                self.region = _native.Region.attach_named(cards[0]["words"], nbytes)
            self.base = self.driver.register_host(self.region.address, nbytes)
        except AbcclError as error:
            return f"rank {self.rank}: {error}"
        self.words = Words(self.region, self.base, self.rank, self.size)
        return ""

    def close(self) -> None:
        """Unmap all, and give the own workspace back. Memory that peers have mapped stays until they close it."""
        self._close_mappings()
        if self.base:
            self.driver.unregister_host(self.region.address)
            if self.own:
                self.words.close_mappings()
                _kept.append((self.driver, self.own, self.words))
        elif self.own:
            self.driver.free(self.own)
        self.own, self.base = 0, 0
        _free_what_nobody_maps()

    def _close_mappings(self) -> None:
        for address in self.opened:
            self.driver.close(address)
        self.opened = []


def _shared_device(uuids: Sequence[str]) -> str:
    """What is wrong if two ranks have one device: a kernel that waits may keep from running whom it waits for."""
    for rank, uuid in enumerate(uuids):
        first = uuids.index(uuid)
        if first != rank:
            return f'ranks {first} and {rank} share a GPU, and sync="spin" wants one for each: take sync="stream"'
    return ""


_kept: list[tuple[Any, int, Words]] = []
"""Workspaces of closed transports. CUDA wants memory to be freed after its last mapping is closed, and a close waits
for nobody; what peers have not closed at the end of this process goes with it."""


def _free_what_nobody_maps() -> None:
    for kept in list(_kept):
        driver, address, words = kept
        if not words.is_mapped():
            _kept.remove(kept)
            with driver.as_current():
                driver.free(address)
