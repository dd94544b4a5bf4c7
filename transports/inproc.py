"""Ranks as threads of one process: for tests, notebooks, and as the plainest example of a transport.

A sender leaves its message in the receiver's mailbox; the receiver copies it. With `room` for a few unread messages
per pair and tag, these are copied on sending; beyond that a send waits for its receive. Waiting ranks sleep.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import ClassVar

from ..algorithms.plan import Plan
from ..errors import ArgumentError, ClosedError, PeerLost
from .contract import Operation, Prepared, Request, Transport
from .portable import PortablePlan


class _Post:
    """One posted send or receive. `matched` is set under the group's lock by either side, `done` by the owner."""

    def __init__(self, peer: int, tag: int, data: memoryview) -> None:
        self.peer, self.tag = peer, tag
        self.data = data.cast("B") if data.nbytes else memoryview(b"")
        self.wanted = self.length = data.nbytes
        self.source = peer
        self.matched = self.done = self.standing = False


class _Message:
    """An unread message: the sender's own memory, or a copy of it."""

    def __init__(self, source: int, post: _Post) -> None:
        self.source, self.post, self.data = source, post, post.data
        self.copied = False

    def copy(self) -> None:
        self.data, self.copied, self.post.matched = memoryview(bytes(self.data)), True, True


class InprocGroup:
    """What the ranks share: one lock, and for each rank a mailbox for each source and tag."""

    def __init__(self, size: int, room: int = 2) -> None:
        self.size, self.room = size, room
        self.lock = threading.Lock()
        self.changed = [threading.Condition(self.lock) for _ in range(size)]
        self.news = [True] * size
        self.mail: list[dict[tuple[int, int], deque[_Message]]] = [{} for _ in range(size)]
        self.closed: set[int] = set()
        self.error: Exception | None = None

    def tell(self, rank: int) -> None:
        """Let a rank know that its next `progress` may find something. The lock is held."""
        self.news[rank] = True
        self.changed[rank].notify_all()

    def tell_all(self) -> None:
        """Let all ranks know. The lock is held."""
        for rank in range(self.size):
            self.tell(rank)

    def buffer(self, messages: deque[_Message]) -> None:
        """Copy the first unread messages of a pair, as far as there is room. The lock is held."""
        for message, _ in zip(messages, range(self.room), strict=False):
            if not message.copied:
                message.copy()
                self.tell(message.source)


class InprocTransport(Transport):
    """One rank of an InprocGroup. One thread drives it; `abort` may come from any."""

    name: ClassVar[str] = "inproc"

    def __init__(self, group: InprocGroup, rank: int, slot_bytes: int = 1 << 20, lanes: int = 4) -> None:
        self.group, self.rank, self.size = group, rank, group.size
        self.slot_bytes, self.lanes = slot_bytes, lanes
        self.receives: list[_Post] = []
        self.sends: list[_Post] = []

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        """Leave the message in the peer's mailbox."""
        self._check_peer(peer)
        post = _Post(peer, tag, data)
        with self.group.lock:
            self._check_state()
            mail = self.group.mail[peer].setdefault((self.rank, tag), deque())
            mail.append(_Message(self.rank, post))
            self.group.buffer(mail)
            self.group.tell(peer)
            self.group.tell(self.rank)
        self.sends.append(post)
        return post

    def post_recv(self, peer: int, tag: int, into: memoryview) -> Request:
        """Note the receive; `progress` looks for its message."""
        self._check_peer(peer)
        if into.readonly:
            raise ArgumentError("a receive wants writable memory, and this is read-only")
        post = _Post(peer, tag, into)
        with self.group.lock:
            self._check_state()
            self.group.tell(self.rank)
        self.receives.append(post)
        return post

    def progress(self) -> None:
        """Match receives with messages in the order posted, and see which sends were taken."""
        with self.group.lock:
            self._check_state()
            self.group.news[self.rank] = False
            for post in self.receives:
                self._match(post)
            lost = self._lost()
        if lost is not None:
            self.abort(lost)
            raise lost
        for posts in (self.receives, self.sends):
            for post in posts:
                post.done = post.matched
            posts[:] = [post for post in posts if not post.done]

    def idle(self, deadline: float) -> None:
        """Sleep until a peer or an abort has news."""
        with self.group.lock:
            if not self.group.news[self.rank]:
                self.group.changed[self.rank].wait(max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX)))

    def abort(self, error: Exception) -> None:
        """Make every rank raise; the first abort wins."""
        with self.group.lock:
            if self.group.error is None:
                self.group.error = error
                self.group.tell_all()

    def close(self) -> None:
        """Leave the group: unsent messages are dropped, copied ones stay for their readers."""
        with self.group.lock:
            self.group.closed.add(self.rank)
            for mail in self.group.mail:
                for (source, _), messages in mail.items():
                    if source == self.rank:
                        kept = [message for message in messages if message.copied]
                        messages.clear()
                        messages.extend(kept)
            self.group.mail[self.rank].clear()
            self.group.tell_all()
        self.receives.clear()
        self.sends.clear()

    def prepare(self, plan: Plan, operation: Operation) -> Prepared:
        """Make a plan ready for the portable engine."""
        return PortablePlan(self, plan, operation)

    def _match(self, receive: _Post) -> None:
        if receive.matched:
            return
        box = self.group.mail[self.rank].get((receive.peer, receive.tag))
        if not box:
            return
        message = box.popleft()
        fits = min(len(message.data), len(receive.data))
        if fits:
            receive.data[:fits] = message.data[:fits]
        receive.length, receive.matched = len(message.data), True
        message.post.matched = True
        self.group.tell(message.source)
        self.group.buffer(box)

    def _lost(self) -> PeerLost | None:
        """The error if a post can not come to its end because its peer is closed. The lock is held."""
        for post in (*self.receives, *self.sends):
            if not post.matched and not post.standing and post.peer in self.group.closed:
                return PeerLost(
                    f"inproc: rank {self.rank} of {self.size} waits for rank {post.peer}, which has closed: "
                    f"close only after all ranks are done"
                )
        return None

    def _check_peer(self, peer: int) -> None:
        if not 0 <= peer < self.size:
            raise ArgumentError(f"inproc: peer {peer} is out of range: there are ranks 0 to {self.size - 1}")

    def _check_state(self) -> None:
        error = self.group.error
        if error is not None:
            raise type(error)(*error.args)
        if self.rank in self.group.closed:
            raise ClosedError(f"inproc: rank {self.rank} of {self.size} is closed: make a new group")


def inproc(size: int, room: int = 2, slot_bytes: int = 1 << 20, lanes: int = 4) -> list[InprocTransport]:
    """The transports of a new group of ranks, each to be driven by a thread.

    Args:
        room: how many unread messages per pair and tag are copied on sending; 0: every send waits for its receive.
    """
    group = InprocGroup(size, room)
    return [InprocTransport(group, rank, slot_bytes, lanes) for rank in range(size)]
