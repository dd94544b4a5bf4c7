"""NCCL without a GPU: `FakeNccl` stands for the module cupy.cuda.nccl in one rank, on the streams of its fake device.

It is as strict as NCCL may be. A send ends with its receive and not before, and the same way round; what is not in a
group is a group of its own; a communicator runs one group at a time; between two ranks messages match in their order,
and must be equally long; collectives match in their order, and must be the same. What breaks this is a *verdict*: it
names who waits for whom, and raises on the streams of all ranks; or all of them hang, as NCCL's may, until they are
aborted. A group with a new peer lets the host wait until that peer comes, too.
"""

from __future__ import annotations

import ctypes
import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from fake_cuda import FakeDriver

from abccl.transports.commands import Incoming, Outgoing
from abccl.transports.device import DeviceTransport
from abccl.transports.nccl import NcclWirePlan
from abccl.transports.types import numpy_dtype

NUMBERS = ("int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "bfloat16")
FOLDS = (np.add, np.multiply, np.maximum, np.minimum)
WORDS = {
    1: "unhandled cuda error",
    2: "unhandled system error",
    3: "internal error",
    4: "invalid argument",
    5: "invalid usage",
    6: "remote process exited or there was a network error",
}
PATIENCE = 60.0
TICK = 0.02


class NcclError(RuntimeError):
    """As cupy's: it does not know all statuses either."""

    def __init__(self, status: int, why: str = "") -> None:
        self.status = status
        super().__init__(WORDS[status] + (why and f" ({why})"))


@dataclass(frozen=True)
class Call:
    """A call of a rank: "send" and "recv" with a peer, or a collective, whose peer is the root or -1."""

    kind: str
    rank: int
    peer: int
    send: int
    receive: int
    count: int
    dtype: int
    op: int = -1

    @property
    def nbytes(self) -> int:
        return self.count * numpy_dtype(NUMBERS[self.dtype]).itemsize

    @property
    def is_message(self) -> bool:
        return self.kind in ("send", "recv")

    def sizes(self, size: int) -> tuple[int, int]:
        """The bytes that are read at `send`, and written at `receive`."""
        n, at_root = self.nbytes, self.peer in (-1, self.rank)
        return {
            "send": (n, 0),
            "recv": (0, n),
            "reduce": (n, n * at_root),
            "broadcast": (n * at_root, n),
            "reduceScatter": (n * size, n),
            "allGather": (n, n * size),
            "allReduce": (n, n),
        }[self.kind]

    def __str__(self) -> str:
        return f"{self.kind} of {self.nbytes} bytes" + f" with rank {self.peer}" * self.is_message


@dataclass
class Group:
    """A group that a rank's stream has come to, and what of it has not ended."""

    rank: int
    left: list[Call]


@dataclass
class World:
    """A communicator, as all its ranks see it."""

    size: int
    hangs: bool = False  # after a verdict
    changed: threading.Condition = field(default_factory=threading.Condition)
    came: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    groups: dict[int, Group] = field(default_factory=dict)
    waiting: dict[tuple[str, int, int], deque[tuple[Group, Call]]] = field(default_factory=dict)
    collectives: list[deque[tuple[Group, Call]]] = field(default_factory=list)
    announced: set[tuple[str, int, int]] = field(default_factory=set)
    errors: dict[int, int] = field(default_factory=dict)
    verdict: str = ""

    def __post_init__(self) -> None:
        self.collectives = [deque() for _ in range(self.size)]

    def until(self, done: Callable[[], bool], over: Callable[[], bool] = lambda: False) -> bool:
        """Wait until `done`, or until there is no use in it; whether it is. The lock is held."""
        for _ in range(int(PATIENCE / TICK)):
            if done() or over():
                break
            self.changed.wait(TICK)
        return done()

    # ---- the host

    def join(self, rank: int) -> None:
        with self.changed:
            if rank in self.came or not 0 <= rank < self.size:
                raise NcclError(4, f"rank {rank} of {self.size}, who has come before")
            self.came.add(rank)
            self.changed.notify_all()
            if not self.until(lambda: len(self.came) == self.size):
                raise NcclError(2, f"rank {rank} waited in vain for all of {self.size} ranks")

    def connect(self, calls: Sequence[Call]) -> None:
        """Who has not sent to a peer before, or received from it, waits until it does the other part."""
        ends = {(call.kind, *_pair(call)) for call in calls if call.is_message}
        with self.changed:
            self.announced |= ends
            self.changed.notify_all()
            others = {("recv" if kind == "send" else "send", source, to) for kind, source, to in ends}
            self.until(lambda: others <= self.announced, lambda: bool(self.verdict) or calls[0].rank in self.gone)
            if calls[0].rank in self.gone:
                raise NcclError(3, "aborted while it waited for a new peer")

    def leave(self, rank: int) -> None:
        """The rank's communicator is aborted: what waits in it ends, and moves nothing."""
        with self.changed:
            self.gone.add(rank)
            self.groups.pop(rank, None)
            for queue in (*self.waiting.values(), *self.collectives):
                for item in [item for item in queue if item[1].rank == rank]:
                    queue.remove(item)
            self.changed.notify_all()

    # ---- the stream

    def run(self, rank: int, calls: Sequence[Call], driver: FakeDriver) -> None:
        """What a stream does when it comes to a group."""

        def over() -> bool:
            return rank in self.gone or bool(self.verdict and not self.hangs) or driver._context.over

        group = Group(rank, list(calls))
        with self.changed:
            self.until(lambda: rank not in self.groups, over)
            if not over():
                self.groups[rank] = group
                for call in calls:
                    self._post(group, call)
                self._look_for_deadlock(rank)
                self.changed.notify_all()
                self.until(lambda: not group.left, over)
                if self.groups.get(rank) is group:
                    del self.groups[rank]
                self.changed.notify_all()
            if self.verdict and not self.hangs and rank not in self.gone:
                raise NcclError(5, self.verdict)

    def _post(self, group: Group, call: Call) -> None:
        if not call.is_message:
            self.collectives[group.rank].append((group, call))
            if all(self.collectives):
                self._collect([queue.popleft() for queue in self.collectives])
            return
        source, to = _pair(call)
        self.waiting.setdefault((call.kind, source, to), deque()).append((group, call))
        sends, receives = (self.waiting.setdefault((kind, source, to), deque()) for kind in ("send", "recv"))
        if sends and receives:
            (sender, send), (receiver, receive) = sends.popleft(), receives.popleft()
            if send.nbytes != receive.nbytes:
                self._judge(f"rank {source}'s {send} meets rank {to}'s {receive}")
                return
            ctypes.memmove(receive.receive, send.send, send.nbytes)
            sender.left.remove(send)
            receiver.left.remove(receive)

    def _collect(self, called: Sequence[tuple[Group, Call]]) -> None:
        calls = [call for _, call in called]
        first = calls[0]
        for call in calls:
            if (call.kind, call.peer, call.count, call.dtype, call.op) != (
                first.kind,
                first.peer,
                first.count,
                first.dtype,
                first.op,
            ):
                self._judge(f"rank {first.rank}'s {first} meets rank {call.rank}'s {call}")
                return
        root = max(0, first.peer)
        if first.kind == "broadcast":
            result = _read(calls[root], self.size)
        elif first.kind == "allGather":
            result = np.concatenate([_read(call, self.size) for call in calls])
        else:
            result = _read(first, self.size)
            for call in calls[1:]:
                result = FOLDS[first.op](result, _read(call, self.size)).astype(result.dtype)
        for (group, call), part in zip(
            called, np.split(result, self.size) if first.kind == "reduceScatter" else itertools.repeat(result)
        ):
            ctypes.memmove(call.receive, np.ascontiguousarray(part).ctypes.data, call.sizes(self.size)[1])
            group.left.remove(call)

    def _look_for_deadlock(self, rank: int) -> None:
        """Each group waits for all that is in it: so ranks whose groups wait for each other do so for ever."""
        path: list[tuple[int, Call]] = []

        def walk(at: int) -> bool:
            for peer, call in self._waits_for(at):
                path.append((at, call))
                if peer == rank or (peer not in [one for one, _ in path] and walk(peer)):
                    return True
                path.pop()
            return False

        if walk(rank):
            self._judge("deadlock: " + ", ".join(f"rank {at} waits in a {call}" for at, call in path))

    def _waits_for(self, rank: int) -> list[tuple[int, Call]]:
        """The ranks that must come before the rank's group can end, of those that are in a group."""
        left = self.groups[rank].left if rank in self.groups else []
        return [
            (peer, call)
            for call in left
            for peer in ([call.peer] if call.is_message else range(self.size))
            if peer in self.groups and (call.is_message or not self.collectives[peer])
        ]

    def _judge(self, verdict: str) -> None:
        self.verdict = self.verdict or verdict
        self.changed.notify_all()


class Network:
    """What the ranks of a test share: their communicators by unique id, and what a test does to them."""

    def __init__(self, hangs: bool = False) -> None:
        self.lock, self.hangs = threading.Lock(), hangs
        self.worlds: dict[bytes, World] = {}
        self.inits = 0
        self.communicators: list[FakeCommunicator] = []
        self.init_errors: dict[int, int] = {}

    @property
    def world(self) -> World:
        """The only communicator."""
        (world,) = self.worlds.values()
        return world

    def kill(self, rank: int) -> None:
        """The rank's process ends: it moves nothing more, and NCCL's network tells the others."""
        self.world.leave(rank)
        with self.world.changed:
            self.world.errors |= dict.fromkeys(set(range(self.world.size)) - {rank}, 6)


class FakeNccl:
    """The module cupy.cuda.nccl, for one rank."""

    NcclError = NcclError
    available = True
    NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN = range(4)

    def __init__(self, network: Network, driver: FakeDriver, version: int = 23203) -> None:
        self._network, self._driver, self._version = network, driver, version
        self._thread = threading.local()  # .group: the calls of the group that it has begun, if it has

    def __getattr__(self, name: str) -> int:
        dtype = name.removeprefix("NCCL_").lower()
        if dtype not in NUMBERS:
            raise AttributeError(f"cupy.cuda.nccl has no {name}")
        return NUMBERS.index(dtype)

    def get_version(self) -> int:
        return self._version

    def get_unique_id(self) -> bytes:
        return secrets.token_bytes(128)

    def NcclCommunicator(self, ndev: int, commId: bytes, rank: int) -> FakeCommunicator:
        self._driver._enter("NcclCommunicator")  # NCCL takes the device that is current in the thread
        with self._network.lock:
            self._network.inits += 1
            world = self._network.worlds.setdefault(commId, World(ndev, self._network.hangs))
        if rank in self._network.init_errors:
            raise NcclError(self._network.init_errors[rank])
        world.join(rank)
        self._network.communicators.append(FakeCommunicator(self, world, rank))
        return self._network.communicators[-1]

    def groupStart(self) -> None:
        self._thread.group = []

    def groupEnd(self) -> None:
        calls: list[tuple[World, Call, int]] = self._thread.group
        del self._thread.group
        if not calls:
            return
        assert len({(id(world), stream) for world, _, stream in calls}) == 1, "a group on several streams"
        world, _, stream = calls[0]
        group = [call for _, call, _ in calls]
        world.connect(group)
        ranges = [
            piece
            for call in group
            for piece in zip((call.send, call.receive), call.sizes(world.size), strict=True)
            if piece[1]
        ]
        self._driver._enqueue(stream, "NCCL", partial(world.run, group[0].rank, group, self._driver), ranges)

    def enqueue(self, world: World, call: Call, stream: int) -> None:
        """Add a call to the thread's group, or make it one of its own."""
        if call.rank in world.gone:
            raise NcclError(4, "the communicator was aborted")
        if call.is_message and (call.peer == call.rank or not 0 <= call.peer < world.size):
            raise NcclError(4, f"rank {call.rank} of {world.size}: {call}")
        alone = not hasattr(self._thread, "group")
        if alone:
            self.groupStart()
        if call.count or call.is_message:
            self._thread.group.append((world, call, stream))
        if alone:
            self.groupEnd()


class FakeCommunicator:
    """NcclCommunicator: the same calls with the same arguments."""

    def __init__(self, nccl: FakeNccl, world: World, rank: int) -> None:
        self._nccl, self._world, self._rank = nccl, world, rank
        self.ended: list[str] = []  # how: once, if all is well

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._call("send", peer, sendbuf, 0, count, datatype, stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._call("recv", peer, 0, recvbuf, count, datatype, stream)

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        self._call("allReduce", -1, sendbuf, recvbuf, count, datatype, stream, op)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int) -> None:
        self._call("reduce", root, sendbuf, recvbuf, count, datatype, stream, op)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self._call("broadcast", root, sendbuff, recvbuff, count, datatype, stream)

    def reduceScatter(self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int) -> None:
        self._call("reduceScatter", -1, sendbuf, recvbuf, recvcount, datatype, stream, op)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        self._call("allGather", -1, sendbuf, recvbuf, count, datatype, stream)

    def check_async_error(self) -> None:
        status = 4 if self.ended else self._world.errors.get(self._rank, 0)
        if status:
            raise NcclError(status)

    def abort(self) -> None:
        self.ended.append("aborted")
        self._world.leave(self._rank)

    def destroy(self) -> None:
        self.ended.append("destroyed")
        with self._world.changed:
            self._world.until(lambda: self._rank not in self._world.groups)

    def _call(
        self, kind: str, peer: int, send: int, receive: int, count: int, datatype: int, stream: int, op: int = -1
    ) -> None:
        self._nccl.enqueue(self._world, Call(kind, self._rank, peer, send, receive, count, datatype, op), stream)


def connect(transport: DeviceTransport) -> None:
    """Let NCCL, or this one, connect a rank to all others, so that none of its runs waits for that."""
    peers = tuple(peer for peer in range(transport.size) if peer != transport.rank)
    commands, _ = NcclWirePlan(transport.wire).step([Outgoing(peers, ())], [Incoming(peer, ()) for peer in peers])
    transport.driver.make_current()
    for command in commands:
        command(transport.stream)


def _pair(call: Call) -> tuple[int, int]:
    """Who sends, and who receives."""
    return (call.rank, call.peer) if call.kind == "send" else (call.peer, call.rank)


def _read(call: Call, size: int) -> Any:
    """What a rank gives to a collective."""
    nbytes = call.sizes(size)[0]
    return np.frombuffer(ctypes.string_at(call.send, nbytes), numpy_dtype(NUMBERS[call.dtype]))
