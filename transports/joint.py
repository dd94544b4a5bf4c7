"""Several transports as one: shared memory to the ranks of this host, a network to the others.

The native engine runs the plan: steps between ranks of one host in shared memory, as it does on one host. What goes to
other hosts it queues, copied out behind room for a head (`message.py`); this file hands it to the network's verbs, and
tells the engine when it has been carried. Each lane of a plan has its own place in the schedule, so while one segment
waits for the network, others move in memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..algorithms import Collective
from ..algorithms.decoded import Decoded, Receiving, Reclaim, Release, Sending, Writing, decode
from ..algorithms.plan import Instruction, Plan
from . import _native
from .bulletin import Bulletin, account
from .contract import NAP, Execution, NativeCall, Operation, Prepared, Request, Transport
from .inproc import inproc
from .message import HEAD_BYTES, Heads, Wanted
from .running import Running
from .shm import ShmTransport, slot_bytes

JOINT = "joint"

SLOT_BYTES, ARENA_BYTES = 256 << 10, 64 << 20
"""Of the slots, and of all of a rank's together. A message costs a network more than memory: 256 KiB were 1.2 times as
fast as 128 over 1 Gbit/s, and 1.8 times as fast as 64."""

YIELDING = 50e-6
"""Seconds without news after which a wait sleeps until somebody rings. A network that rings has threads of its own,
which need the cores: with 5 ms, four ranks on two cores took 1.5 times as long for 4 MiB."""

TICK = 0.02
"""Seconds between looks at what does not announce itself: a peer that has died, an interrupt."""

LONG = 1.0
"""Seconds without news after which the rank that is waited for is followed, if it is not of this host."""


_MOVED, _DONE = 1, 2


class JointTransport(Transport):
    """Ranks on several hosts; or ranks that are to use a network whatever they share, each a host of its own.

    Args:
        local: shared memory among the ranks of this host.
        members: what `network` calls them, in the order of `local`.
        network: reaches all ranks.
        name: what messages to people call it.

    Attributes:
        bulletin: tells where the ranks of other hosts are, if there is one. Closed with the transport.
    """

    bulletin: Bulletin | None = None

    def __init__(self, local: ShmTransport, members: Sequence[int], network: Transport, name: str = JOINT) -> None:
        self.local, self.network = local, network
        self.recorder, self.token = local.recorder, local.token
        self.name = name  # type: ignore[misc]
        self.rank, self.size = network.rank, network.size
        self.lanes, self.slot_bytes = local.lanes, local.slot_bytes
        self.order = joint_order(members, self.size)
        self.index = {rank: index for index, rank in enumerate(self.order)}
        self.engine = _native.DrivenExecution(local.native, HEAD_BYTES)
        self._rings = network.set_bell(local.native.ring)
        network.explain = self._explain
        local.native.set_records_messages(False)  # who drives all transports alike records the user's

    @property
    def collectives(self) -> frozenset[Collective]:  # type: ignore[override]
        """The network's own collectives."""
        return self.network.collectives

    def _explain(self, waits: str) -> str:
        text = f"{self.recorder.title()}: {waits}{self.local.native.stragglers()}"
        if self.bulletin is not None:
            text = account(self.bulletin, text, None, self.order[self.local.size :], self.network.progress)
        return f"{text}. If a rank is only slow, give a longer timeout"

    def is_near(self, rank: int) -> bool:
        """Whether the rank is on this host."""
        return self.index[rank] < self.local.size

    def prepare(self, plan: Plan, operation: Operation) -> Prepared:
        """The plan, its steps divided between the engines."""
        return JointPlan(self, plan, operation)

    def prepare_native(self, call: NativeCall) -> Prepared:
        """See `Transport.prepare_native`: the network's own."""
        return self.network.prepare_native(call)

    def split(self, members: Sequence[int], name: str) -> Transport:
        """A network of these ranks, in this order: see `Transport.split`."""
        return self.network.split(members, name)

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        """See `Transport.post_send`."""
        if self.is_near(peer):
            return self.local.post_send(self.index[peer], tag, data)
        return self.network.post_send(peer, tag, data)

    def post_recv(self, peer: int, tag: int, into: memoryview) -> Request:
        """See `Transport.post_recv`."""
        if self.is_near(peer):
            return self.local.post_recv(self.index[peer], tag, into)
        return self.network.post_recv(peer, tag, into)

    def progress(self) -> None:
        """See `Transport.progress`."""
        self.local.progress()
        self.network.progress()

    def idle(self, deadline: float) -> None:
        """Give the processor away: yield at first, then sleep until the host's ranks or the network ring."""
        if not self._rings:
            self.network.stirred = self.stirred
            self.network.idle(min(deadline, time.monotonic() + NAP))  # the host's ranks ring for nobody here
        elif time.monotonic() - self.stirred < YIELDING:
            os.sched_yield()
        else:
            nap = _native.Nap(self.local.native)
            nap.sleep(1)  # what came just before it began rang for nobody
            nap.end()

    def abandon(self, kept: object) -> None:
        """See `Transport.abandon`."""
        self.network.abandon((kept, self.engine))

    def abort(self, error: Exception) -> None:
        """See `Transport.abort`: here and on all other hosts."""
        self.abandon(None)
        self.local.abort(error)
        self.network.abort(error)

    def close(self) -> None:
        """See `Transport.close`."""
        if self.bulletin is not None:
            self.bulletin.close()
        self.local.close()
        self.network.close()

    def set_bell(self, ring: Callable[[], None]) -> bool:
        """Nobody rings for both."""
        return False


def joint_slot_bytes(largest_host: int, network: Transport | type[Transport]) -> int:
    """Of a slot, the same on all ranks: hosts may have different numbers of them."""
    return slot_bytes(largest_host, min(network.slot_bytes, SLOT_BYTES), ARENA_BYTES)


def joint_order(members: Sequence[int], size: int) -> list[int]:
    """All ranks as the native core numbers them on a host: those that share its memory first."""
    return [*members, *(rank for rank in range(size) if rank not in set(members))]


class JointPlan:
    """A plan made ready to run on one host of several."""

    def __init__(self, transport: JointTransport, plan: Plan, operation: Operation) -> None:
        self.transport, self.text = transport, operation.text
        self.heads = Heads(operation, f"rank {transport.rank} of {transport.size}")
        near = transport.local.size
        code = divide(decode(plan.skeleton.code), transport.index, near)
        # Whole blocks can not be lent to a network.
        operation = replace(operation, straight=False)
        self.native = transport.local.native_plan(plan, operation, code, remotes=transport.size - near)

    def start(self, input: int, output: int) -> Execution:
        """Start a run on the buffers at these addresses."""
        return JointExecution(self, input, output)


class _Carried(NamedTuple):
    """A message that the network carries, by the engine's number; `wanted` if it is to be received."""

    id: int
    request: Request
    wanted: Wanted | None
    head: bytes
    data: memoryview


class JointExecution(Running):
    """One run of a plan: the engine, and the messages that the network carries for it."""

    def __init__(self, prepared: JointPlan, input: int, output: int) -> None:
        self.prepared = prepared
        self.joint = self.transport = prepared.transport
        self.number = self.transport.begin_run(prepared.heads.operation.text)
        self.engine = self.joint.engine
        self.carried: list[_Carried] = []
        self.next_tick = time.monotonic() + TICK
        self.engine.start(prepared.native, input, output)

    def _advance(self) -> bool:
        """Let the engine and the network move each other on, as far as they go."""
        stirred, outcome = False, _MOVED
        while outcome == _MOVED:
            outcome = max(self.engine.progress(), self._carry())
            stirred = stirred or bool(outcome)
        now = time.monotonic()
        if stirred:
            self.transport.stirred = now
            if self.joint.bulletin is not None:
                self.joint.bulletin.follow(None)
        if outcome != _DONE and now > self.next_tick:
            self.next_tick = now + TICK
            self.engine.check()
            if self.joint.bulletin is not None and now > self.transport.stirred + LONG:
                self.joint.bulletin.follow(self._distant())
        return bool(outcome == _DONE)

    def _distant(self) -> int | None:
        """The rank that is waited for, if it shares no memory with this one."""
        peer = self.engine.waits_for()
        return None if peer is None or peer < self.joint.local.size else self.joint.order[peer]

    def _late(self) -> str:
        text, bulletin, near = self.engine.blame(), self.joint.bulletin, self.joint.local.size
        if bulletin is None:
            return f"{text}: is that rank alive, is its host reached? If it is only slow, give a longer timeout"
        text = account(bulletin, text, self._distant(), self.joint.order[near:], self._look_for_abort)
        return f"{text}. If a rank is only slow, give a longer timeout"

    def _look_for_abort(self) -> None:
        self.joint.network.progress()
        self.engine.check()

    def _carry(self) -> int:
        """Hand over what is to be carried, and tell the engine what has been."""
        network, fresh = self.joint.network, self.engine.take()
        for id, sends, peer, lane, segment, row, data in fresh:
            tag, step, blocks = self.engine.about(row)
            head, rank = self.prepared.heads.make(self.number, tag, segment), self.joint.order[peer]
            if sends:
                data[:HEAD_BYTES] = head
                self.carried.append(_Carried(id, network.post_send(rank, lane, data), None, head, data))
            else:
                wanted = Wanted(rank, tag, segment, data.nbytes - HEAD_BYTES, step, blocks)
                self.carried.append(_Carried(id, network.post_recv(rank, lane, data), wanted, head, data))
        network.progress()
        carried, self.carried = self.carried, []
        for message in carried:
            if not message.request.done:
                self.carried.append(message)
                continue
            if message.wanted is not None:
                self._check(message, message.wanted)
            self.engine.complete(message.id)
        return _MOVED if fresh or len(self.carried) < len(carried) else 0

    def _check(self, message: _Carried, wanted: Wanted) -> None:
        length, head = message.request.length, bytes(message.data[:HEAD_BYTES])
        if length != message.request.wanted or head != message.head:
            raise self.prepared.heads.mismatch(self.number, wanted, head, length, self.joint.called)


def divide(program: Sequence[Decoded], index: dict[int, int], near: int) -> npt.NDArray[np.int32]:
    """A plan's code with its peers by number; a send to ranks of this host (numbers below `near`) and others is two."""
    code: list[int] = []
    sends: list[list[int]] = []  # the numbers of the sends that each was divided into
    made = 0
    for instruction in program:
        match instruction:
            case Sending(tag, peers, parts, lends):
                numbers = [index[peer] for peer in peers]
                sends.append([])
                for group in ([n for n in numbers if n < near], [n for n in numbers if n >= near]):
                    if not group:
                        continue
                    is_near = group[0] < near
                    code += (Instruction.SEND, tag, int(lends and is_near), len(group), *group, len(parts))
                    for part in parts:
                        code += part
                    sends[-1].append(made)
                    made += 1
            case Receiving(tag, peer, blocks):
                code += (Instruction.RECV, tag, index[peer], len(blocks), *blocks)
            case Writing(kind, destination, sources):
                code += (kind, *destination, *((len(sources),) if kind is Instruction.FOLD else ()))
                for source in sources:
                    code += source
            case Release():
                code.append(Instruction.RELEASE)
            case Reclaim(lent):
                reclaimed = [number for send in lent for number in sends[send]]
                code += (Instruction.RECLAIM, len(reclaimed), *reclaimed)
    return np.array(code, dtype=np.int32)


def joint_threads(hosts: Sequence[Sequence[int]], networks: Sequence[Transport] | None = None) -> list[JointTransport]:
    """The transports of a new group of ranks that are threads of this process, and mailboxes in it their network.

    For tests and notebooks.

    Args:
        hosts: the ranks of each host; only these share memory.
        networks: other ones than mailboxes, by rank.
    """
    size = sum(map(len, hosts))
    carriers = networks or inproc(size)
    barriers = {tuple(host): threading.Barrier(len(host)) for host in hosts}
    blobs = [b""] * size

    def make(rank: int) -> JointTransport:
        members = next(host for host in hosts if rank in host)
        barrier = barriers[tuple(members)]

        def exchange(data: bytes) -> list[bytes]:
            blobs[rank] = data
            barrier.wait(60)
            everyone = [blobs[member] for member in members]
            barrier.wait(60)
            return everyone

        names = joint_order(members, size)
        slot = joint_slot_bytes(max(map(len, hosts)), carriers[rank])
        local = ShmTransport(members.index(rank), len(members), exchange, names, slot=slot)
        return JointTransport(local, members, carriers[rank])

    with ThreadPoolExecutor(size) as pool:
        transports = list(pool.map(make, range(size)))
    # Hosts were measured one by one, and ranks that go by what they have themselves must choose alike.
    nearest = max(transport.local.native.streaming_from for transport in transports)
    for transport in transports:
        transport.local.native.streaming_from = nearest
    return transports
