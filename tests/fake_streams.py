"""Streams, events and graphs of the fake CUDA driver: each stream is a thread with a queue."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from abccl.errors import TransportError

# Handles of all fake drivers of a process differ, so that one driver's are refused by another.
handles = itertools.count(0x1000, 0x10)


def refuse(error: str, why: str) -> NoReturn:
    """Raise what the driver would."""
    raise TransportError(f"CUDA_ERROR_{error}: {why}")


class Context:
    """What the streams of a driver share: whether it is over, by a sticky error or because it was closed."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.closed = False
        self.lock = threading.RLock()
        self.captures: list[Capture] = []  # under way

    @property
    def over(self) -> bool:
        return self.closed or self.error is not None

    def fail(self, error: BaseException | str) -> None:
        """From here on every call raises: the first error stays."""
        with self.lock:
            self.error = self.error or str(error)

    def check(self) -> None:
        if self.error is not None:
            raise TransportError(f"an earlier error is sticky: {self.error}")
        if self.closed:
            refuse("CONTEXT_IS_DESTROYED", "the driver is closed")

    def until(self, done: Callable[[], bool]) -> None:
        """Poll until `done`, or until all is over."""
        for _ in range(50):
            if done():
                return
        pause = 20e-6
        while not self.over and not done():
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)


class Operation(NamedTuple):
    """What a stream does, and the memory (address, nbytes) that must be known when it is enqueued or replayed."""

    what: str
    action: Callable[[], object]
    ranges: tuple[tuple[int, int], ...] = ()


class Mark:
    """A point in a stream: reached once all that was enqueued before it is done, or all is over."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self.time = 0.0
        self.wait = self._reached.wait
        self.reached = self._reached.is_set

    def reach(self) -> None:
        self.time = time.perf_counter()
        self._reached.set()


class Node(NamedTuple):
    """An operation of a graph: the stream it was captured in, and the nodes that come before it."""

    stream: int
    operation: Operation
    needs: frozenset[int]


class Capture:
    """A capture under way. `ends` holds, for each stream in it, the nodes that its next one comes after."""

    _ids = itertools.count(1)

    def __init__(self, origin: Stream) -> None:
        self.id = next(self._ids)
        self.origin = origin
        self.thread = threading.get_ident()
        self.nodes: list[Node] = []
        self.streams = {origin.handle: origin}
        self.ends: dict[int, frozenset[int]] = {origin.handle: frozenset()}
        self.valid = True

    def add(self, stream: Stream, operation: Operation) -> None:
        if not self.valid:
            refuse("STREAM_CAPTURE_INVALIDATED", "an earlier call broke this capture: end it and begin another")
        self.nodes.append(Node(stream.handle, operation, self.ends[stream.handle]))
        self.ends[stream.handle] = frozenset([len(self.nodes) - 1])

    def spoil(self, error: str, why: str) -> NoReturn:
        """Refuse what must not be done during a capture, which it breaks."""
        self.valid = False
        refuse(error, why)

    def join(self, stream: Stream, point: CapturedPoint) -> None:
        """Let `stream` wait for a point of this capture; a stream that is not in it comes in."""
        self.streams[stream.handle] = stream
        self.ends[stream.handle] = self.ends.get(stream.handle, frozenset()) | point.ends
        stream.capture = self

    def end(self) -> Graph:
        """The graph. Every stream must have come back to the one where the capture began."""
        for stream in self.streams.values():
            stream.capture = None
        if not self.valid:
            refuse("STREAM_CAPTURE_INVALIDATED", "a call that is not allowed during a capture broke it")
        joined: set[int] = set()
        rest = list(self.ends[self.origin.handle])
        while rest:
            node = rest.pop()
            if node not in joined:
                joined.add(node)
                rest += self.nodes[node].needs
        if len(joined) < len(self.nodes):
            left = next(node for index, node in enumerate(self.nodes) if index not in joined)
            refuse("STREAM_CAPTURE_UNJOINED", f"stream {left.stream:#x} did not join the stream of the capture again")
        return Graph(self.nodes, self.origin.handle)


class CapturedPoint(NamedTuple):
    """What an event recorded during a capture stands for."""

    capture: Capture
    ends: frozenset[int]


class Graph:
    """What was captured: each stream's operations are one branch, which runs in a thread of its own."""

    def __init__(self, nodes: list[Node], origin: int) -> None:
        self.nodes = nodes
        self._origin = origin
        self._others = {node.stream for node in nodes} - {origin}
        self._running = threading.Lock()

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return tuple(piece for node in self.nodes for piece in node.operation.ranges)

    def run(self, context: Context) -> None:
        """All of it, once; a graph that is running is waited for."""
        with self._running:
            done = [threading.Event() for _ in self.nodes]
            branches = [
                threading.Thread(target=self._branch, args=(stream, done, context), daemon=True)
                for stream in self._others
            ]
            for branch in branches:
                branch.start()
            self._branch(self._origin, done, context)
            for branch in branches:
                branch.join()

    def _branch(self, stream: int, done: list[threading.Event], context: Context) -> None:
        for index, node in enumerate(self.nodes):
            if node.stream == stream:
                for before in node.needs:
                    done[before].wait()
                run(node.operation, context)
                done[index].set()


def run(operation: Operation, context: Context) -> None:
    """Do it, unless all is over; what it raises is a sticky error."""
    if not context.over:
        try:
            operation.action()
        except BaseException as error:
            context.fail(f"{operation.what}: {error}")


class Event:
    """`at` is where it was recorded last: nowhere, in a stream, or in a capture."""

    def __init__(self, timing: bool) -> None:
        self.timing = timing
        self.at: Mark | CapturedPoint | None = None

    def mark(self) -> Mark | None:
        """Where it was recorded, for a question by the host."""
        if isinstance(self.at, CapturedPoint):
            if self.at.capture.origin.capture is self.at.capture:
                self.at.capture.valid = False
            refuse("CAPTURED_EVENT", "the event was last recorded in a captured stream: only streams can wait for it")
        return self.at


class Stream:
    """A thread that does what is enqueued, in order."""

    def __init__(self, context: Context) -> None:
        self.handle = next(handles)
        self.capture: Capture | None = None
        self._context = context
        self._queue: queue.SimpleQueue[Operation | Mark | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"fake stream {self.handle:#x}", daemon=True)
        self._thread.start()

    def enqueue(self, operation: Operation) -> None:
        if self.capture is not None:
            self.capture.add(self, operation)
        else:
            self._put(operation)

    def mark(self) -> Mark:
        """A point after all that was enqueued until now, on a stream that is not being captured."""
        mark = Mark()
        self._put(mark)
        return mark

    def stop(self) -> None:
        """The thread ends after what was enqueued."""
        self._queue.put(None)

    def join(self) -> None:
        self._thread.join()

    def _put(self, item: Operation | Mark) -> None:
        with self._context.lock:  # nothing comes after the stop of a closed driver, or it would be waited for in vain
            self._context.check()
            self._queue.put(item)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Mark):
                item.reach()
            else:
                run(item, self._context)
