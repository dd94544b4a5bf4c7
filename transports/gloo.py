"""Gloo: ranks on any hosts that share one of torch's stores, over point-to-point messages of torch's ProcessGroupGloo.

Gloo tells only a thread that waits that its message has come, can not wait for one of several, and breaks on a message
longer than its receive. So each pair of ranks that talks has a channel: a few receives that are always posted, and a
thread that waits for them and hands what comes to `progress`. What travels there begins with a head:

- EAGER: a message of up to EAGER_BYTES, copied on both sides, as long as the receiver has granted room for it;
- OFFER, ACCEPT, BODY: a longer message, or one for which there is no room, moves from the sender's memory into the
  receiver's once both have posted it;
- NOTE: nothing but what every head tells: how many heads have come, and for how much there is room;
- ABORT: the error, which each rank that hears it for the first time passes on.

An interface is chosen by GLOO_SOCKET_IFNAME, else it is the one from which the store's host is reached.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..algorithms import Collective
from ..algorithms.plan import Plan
from ..errors import ArgumentError, ClosedError, PeerLost, TransportError
from .contract import NativeCall, Operation, Prepared, Request, Transport
from .errand import error_from_json, error_from_words, error_to_words
from .gloo_collectives import COLLECTIVES, NativePlan
from .gloo_meeting import device, meet, reason
from .portable import PortablePlan
from .running import take_first

SLOT_BYTES = 256 << 10

EAGER_BYTES = SLOT_BYTES + 1024
"""A plan's messages and their heads."""

ROOM = 4 << 20
"""How many bytes a rank keeps for messages of one peer that it has not read."""

LEAST_ROOM = 1024
"""What the shortest message takes of it."""

POSTED = 4
"""Receives that each channel keeps posted."""

LINGER = 1.0
"""Seconds that closing waits for messages on their way."""

FOREVER = timedelta(days=365)
"""Deadlines are the caller's: a wait of Gloo's that times out breaks all its connections."""

_HEADS, _BODIES, _LAST = 0, 1, 0x7FFFFFFF  # Gloo's tags

_OFFERS = 1 << 30
"""How many offers are numbered before the numbers begin anew."""

_HEAD = struct.Struct("<BxHIQQQ")
"""Kind, tag, number of the offer, length, heads received, room granted since the beginning."""


class _Kind(IntEnum):
    EAGER, OFFER, ACCEPT, BODY, NOTE, ABORT = range(6)


class _Post:
    """One posted send or receive."""

    def __init__(self, peer: int, memory: memoryview) -> None:
        self.source, self.done, self.standing = peer, False, False
        self.wanted = self.length = memory.nbytes
        self.memory = memory.cast("B") if memory.nbytes else memoryview(bytearray())
        self.work: Any = None


class _Unread(NamedTuple):
    """A message that came before its receive; of an offered one only the number."""

    length: int
    offer: int
    data: bytes | memoryview | None


class _Underway(NamedTuple):
    """What is kept until the peer has received the head of that number."""

    number: int
    works: tuple[Any, ...]
    post: _Post | None


class _Channel:
    """What a rank knows of one peer."""

    def __init__(self, peer: int, group: Any) -> None:
        self.peer, self.group = peer, group
        self.lock = threading.Lock()  # heads are numbered in the order in which Gloo gets them
        self.posted: deque[tuple[Any, Any]] = deque()
        self.buffers: list[Any] = []
        self.sent = self.received = self.offers = 0
        self.granted, self.told = ROOM, 0
        self.room = self.spent = 0
        self.underway: deque[_Underway] = deque()
        self.unfinished: set[_Post] = set()
        self.receives: dict[int, deque[_Post]] = {}
        self.unread: dict[int, deque[_Unread]] = {}
        self.offered: dict[int, _Post] = {}
        self.accepted: dict[int, _Post] = {}
        self.lost: RuntimeError | None = None
        self.ended = False  # the connection, which `progress` may not have seen yet


_open: set[GlooTransport] = set()


@atexit.register
def _close_all() -> None:
    """A thread that waits inside Gloo must not wake in an interpreter that is gone."""
    for transport in list(_open):
        transport.close()


class GlooTransport(Transport):
    """Ranks that reach each other by TCP.

    Args:
        store: one of torch's, the same for all ranks; its keys must be new (a PrefixStore of a new prefix).
        timeout: seconds to wait for all ranks to connect.

    Raises:
        TransportError: no torch, no Gloo in it, no such interface, or ranks that can not reach each other.
        DeadlineExceeded: not all ranks came; the message names them.
    """

    name = "gloo"
    lanes, slot_bytes = 4, SLOT_BYTES
    collectives: ClassVar[frozenset[Collective]] = COLLECTIVES

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.store, self.timeout = rank, size, store, timeout
        try:
            self.torch = importlib.import_module("torch")
            self.distributed = importlib.import_module("torch.distributed")
            kind = self.distributed.ProcessGroupGloo
        except (ImportError, AttributeError) as error:
            raise TransportError(f"the gloo transport needs torch with Gloo ({error}): pip install torch") from error
        self._process = os.getpid()
        self._closed = self._severed = False
        self._error: Exception | None = None
        self._aborted = threading.Lock()  # by the first abort, for good
        self.broken = threading.Event()
        self._bell: Callable[[], None] | None = None
        self._news: deque[tuple[_Channel, Any]] = deque()
        self._woken = threading.Event()  # something new may be there
        self._finished: list[_Post] = []
        self._lost: list[_Channel] = []
        self._channels: dict[int, _Channel] = {}
        self._threads: list[threading.Thread] = []
        until = time.monotonic() + timeout
        address = meet(store, rank, size, timeout)
        options = kind._Options()
        options._timeout = timedelta(seconds=max(1.0, until - time.monotonic()))
        try:
            options._devices = [device(kind, address)]
            self.group = kind(self.distributed.PrefixStore("gloo", store), rank, size, options)
        except RuntimeError as error:
            raise TransportError(
                f"gloo: rank {rank} of {size}, at {address or 'the address of its host name'}, can not reach the "
                f"others ({reason(error)}): set GLOO_SOCKET_IFNAME to the interface that joins the hosts"
            ) from error
        self.group.set_timeout(FOREVER)
        _open.add(self)
        # Enough that an abort gets everywhere in a few hops, although some ranks are dead.
        strides = [1 << bit for bit in range(size.bit_length()) if 1 << bit < size]
        for peer in sorted({(rank + sign * stride) % size for stride in strides for sign in (1, -1)}):
            self._channel(peer)

    # The verbs

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        """See `Transport.post_send`."""
        channel, post = self._post(peer, data)
        cost = max(post.length, LEAST_ROOM)
        if post.length <= EAGER_BYTES and channel.spent + cost <= channel.room:
            channel.spent += cost
            if self._send(channel, _Kind.EAGER, tag, 0, post.length, post.memory):
                self._finish(channel, post)
        else:
            channel.offers = (channel.offers + 1) % _OFFERS
            channel.offered[channel.offers] = post
            self._send(channel, _Kind.OFFER, tag, channel.offers, post.length)
        return post

    def post_recv(self, peer: int, tag: int, into: memoryview) -> Request:
        """See `Transport.post_recv`."""
        if into.readonly:
            raise ArgumentError("a receive wants writable memory, and this is read-only")
        channel, post = self._post(peer, into)
        if tag in channel.unread:
            self._match(channel, post, take_first(channel.unread, tag))
        else:
            channel.receives.setdefault(tag, deque()).append(post)
        return post

    def progress(self) -> None:
        """See `Transport.progress`."""
        self._woken.clear()
        while self._news:
            self._handle(*self._news.popleft())
        for post in self._finished:
            post.done = True
        self._finished.clear()
        if self._error is not None:
            raise type(self._error)(str(self._error))
        for channel in self._lost:
            if channel.lost is not None and not all(post.standing for post in channel.unfinished):
                lost = self.lost(f"rank {channel.peer}", channel.lost)
                self.abort(lost)
                raise lost

    def idle(self, deadline: float) -> None:
        """Sleep until a message or an abort comes."""
        if not self._finished:
            self._woken.wait(max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX)))

    def has_lost(self, peer: int) -> bool:
        """See `Transport.has_lost`."""
        return peer in self._channels and self._channels[peer].ended

    def set_bell(self, ring: Callable[[], None]) -> bool:
        """See `Transport.set_bell`."""
        self._bell = ring
        return True

    def abort(self, error: Exception) -> None:
        """See `Transport.abort`. Ranks that can not be reached are not waited for."""
        if not self._aborted.acquire(blocking=False):
            return
        words = error_to_words(error)
        data = memoryview(json.dumps(words).encode())
        for channel in list(self._channels.values()):
            self._send(channel, _Kind.ABORT, 0, 0, len(data), data)
        # Not before: who is told may close at once.
        self._error = error_from_words(words)
        self.broken.set()
        self.ring()

    def close(self) -> None:
        """See `Transport.close`. Waits a second for messages that are under way."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        _open.discard(self)
        self.sever()
        for thread in self._threads:
            thread.join(LINGER)
        self._channels.clear()
        self._lost.clear()
        self._finished.clear()
        self._news.clear()
        self.group = None

    def split(self, members: Sequence[int], name: str) -> GlooTransport:
        """See `Transport.split`."""
        store = self.distributed.PrefixStore(f"split/{name}", self.store)
        return GlooTransport(store, list(members).index(self.rank), len(members), self.timeout)

    def prepare(self, plan: Plan, operation: Operation) -> Prepared:
        """See `Transport.prepare`."""
        return PortablePlan(self, plan, operation)

    def prepare_native(self, call: NativeCall) -> Prepared:
        """See `Transport.prepare_native`. Ranks that call different things are not told so."""
        return NativePlan(self, call)

    # What Gloo's own collectives need too

    def ring(self) -> None:
        """Let who waits look again."""
        self._tell(None)

    def sever(self) -> None:
        """Break all connections, once messages under way have left or LINGER has passed: Gloo then writes no more."""
        if self._severed:
            return
        self._severed = True
        until = time.monotonic() + LINGER
        for channel in list(self._channels.values()):
            # A peer that was never heard may not have its receives posted.
            with contextlib.suppress(RuntimeError):
                for underway in list(channel.underway) if channel.received else []:
                    for work in underway.works:
                        work.wait(timedelta(seconds=max(1e-3, until - time.monotonic())))
        unused = self.torch.empty(1, dtype=self.torch.uint8)
        for peer in set(range(self.size)) - {self.rank}:
            with contextlib.suppress(RuntimeError):
                self.group.recv([unused], peer, _LAST).wait(timedelta(milliseconds=1))

    def lost(self, whom: str, why: Exception) -> PeerLost:
        """The error for a connection that is no more."""
        return PeerLost(
            f"gloo: rank {self.rank} of {self.size} needs {whom}, and its connection is gone ({reason(why)}): "
            f"did that process end, or close before all ranks were done?"
        )

    # Channels

    def _post(self, peer: int, memory: memoryview) -> tuple[_Channel, _Post]:
        if self._closed:
            raise ClosedError(f"gloo: rank {self.rank} of {self.size} has closed this transport: make another")
        if not 0 <= peer < self.size or peer == self.rank:
            raise ArgumentError(f"rank {self.rank} of {self.size} has no peer {peer}: name another rank of the group")
        if self._error is not None:
            raise type(self._error)(str(self._error))
        channel, post = self._channel(peer), _Post(peer, memory)
        channel.unfinished.add(post)
        return channel, post

    def _channel(self, peer: int) -> _Channel:
        """The channel to a peer, which its first use opens."""
        if peer not in self._channels:
            channel = self._channels[peer] = _Channel(peer, self.group)
            try:
                for _ in range(POSTED):
                    self._listen(channel)
            except RuntimeError as error:
                self._lose(channel, error)
                return channel
            thread = threading.Thread(target=self._hear, args=(channel,), daemon=True, name=f"gloo {peer}")
            self._threads.append(thread)
            thread.start()
            self._send(channel, _Kind.NOTE)
        return self._channels[peer]

    def _listen(self, channel: _Channel) -> None:
        """Post a receive for one more head."""
        buffer = channel.buffers.pop() if channel.buffers else np.empty(_HEAD.size + EAGER_BYTES, np.uint8)
        work = channel.group.recv([self.torch.from_numpy(buffer)], channel.peer, _HEADS)
        channel.posted.append((work, buffer))

    def _hear(self, channel: _Channel) -> None:
        """The channel's thread: hand on what comes, until the connection ends."""
        try:
            while True:
                work, buffer = channel.posted[0]
                work.wait(FOREVER)  # else it gives up after the time that ranks had to connect
                channel.posted.popleft()
                channel.received += 1
                if buffer[0] == _Kind.ABORT:
                    length = _HEAD.unpack_from(buffer)[3]
                    self.abort(error_from_json(bytes(buffer[_HEAD.size :][:length])))
                self._tell((channel, buffer))
                self._listen(channel)
        except RuntimeError as error:
            self._lose(channel, error)

    def _tell(self, item: tuple[_Channel, Any] | None) -> None:
        if item is not None:
            self._news.append(item)
        self._woken.set()
        if self._bell is not None:
            self._bell()

    def _send(
        self,
        channel: _Channel,
        kind: _Kind,
        tag: int = 0,
        offer: int = 0,
        length: int = 0,
        data: memoryview | None = None,
        body: _Post | None = None,
    ) -> bool:
        """Send a head and, behind it, the data; `body` is finished when it has come. False if the peer is lost."""
        message = np.empty(_HEAD.size + (len(data) if data else 0), np.uint8)
        if data:
            message.data[_HEAD.size :] = data
        with channel.lock:
            channel.told = channel.granted
            _HEAD.pack_into(message.data, 0, kind, tag, offer, length, channel.received, channel.told)
            try:
                work = channel.group.send([self.torch.from_numpy(message)], channel.peer, _HEADS)
            except RuntimeError as error:
                self._lose(channel, error)
                return False
            channel.sent += 1
            works = (work,) if body is None else (work, body.work)
            channel.underway.append(_Underway(channel.sent, works, body))
        return True

    def _lose(self, channel: _Channel, error: RuntimeError) -> None:
        channel.ended = True
        self._tell((channel, error))

    def _handle(self, channel: _Channel, news: Any) -> None:
        """What came on a channel: a buffer that begins with a head, or the error that ended it."""
        if isinstance(news, RuntimeError):
            if channel.lost is None:
                channel.lost = news
                self._lost.append(channel)
            return
        number, tag, offer, length, received, channel.room = _HEAD.unpack_from(news)
        while channel.underway and channel.underway[0].number <= received:
            post = channel.underway.popleft().post
            if post is not None:
                self._finish(channel, post)
        kind = _Kind(number)
        if kind in (_Kind.EAGER, _Kind.OFFER):
            data = news.data[_HEAD.size : _HEAD.size + length] if kind is _Kind.EAGER else None
            if tag in channel.receives:
                self._match(channel, take_first(channel.receives, tag), _Unread(length, offer, data))
            else:
                unread = _Unread(length, offer, None if data is None else bytes(data))
                channel.unread.setdefault(tag, deque()).append(unread)
        elif kind is _Kind.ACCEPT:
            self._send_body(channel, channel.offered.pop(offer), offer, length)
        elif kind is _Kind.BODY:
            post = channel.accepted.pop(offer)
            post.work = None
            self._finish(channel, post)
            self._send(channel, _Kind.NOTE)
        channel.buffers.append(news)

    def _match(self, channel: _Channel, post: _Post, unread: _Unread) -> None:
        """A receive has met its message."""
        post.length = unread.length
        fits = min(post.length, post.wanted)
        if unread.data is not None:
            post.memory[:fits] = unread.data[:fits]
            self._finish(channel, post)
            channel.granted += max(post.length, LEAST_ROOM)
            if channel.granted - channel.told >= ROOM // 4:
                self._send(channel, _Kind.NOTE)
            return
        if fits:
            try:
                post.work = channel.group.recv([self._tensor(post, fits)], channel.peer, _BODIES + unread.offer)
            except RuntimeError as error:
                self._lose(channel, error)
                return
            channel.accepted[unread.offer] = post
        else:
            self._finish(channel, post)
        self._send(channel, _Kind.ACCEPT, 0, unread.offer, fits)

    def _send_body(self, channel: _Channel, post: _Post, offer: int, length: int) -> None:
        """Send as much of an offered message as the receiver has room for."""
        if not length:
            self._finish(channel, post)
            return
        try:
            post.work = channel.group.send([self._tensor(post, length)], channel.peer, _BODIES + offer)
        except RuntimeError as error:
            self._lose(channel, error)
            return
        # The receiver's thread hears of it behind the body: one connection carries both, in this order.
        self._send(channel, _Kind.BODY, 0, offer, body=post)

    def _tensor(self, post: _Post, length: int) -> Any:
        """The post's memory, which it keeps alive; torch would warn of memory that is read-only."""
        address = np.frombuffer(post.memory, np.uint8).ctypes.data
        return self.torch.frombuffer((ctypes.c_char * length).from_address(address), dtype=self.torch.uint8)

    def _finish(self, channel: _Channel, post: _Post) -> None:
        channel.unfinished.discard(post)
        self._finished.append(post)
