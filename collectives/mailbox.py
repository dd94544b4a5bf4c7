"""A user's messages over the verbs of any transport, matched by (source, tag) in the order sent.

Each message begins with an envelope of fixed length, which a rank expects from every other as soon as it receives for
the first time. What does not fit into the envelope follows on a tag of its own, for which the receiver posts a receive
once it knows where the message goes. So an unread message is in nobody's way, and is copied only if it is short.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import DeadlineExceeded, Mismatch
from ..transports import USER_TAGS, Request, Transport

ANY_SOURCE = -1

_ENVELOPE = struct.Struct("<qQQ")
"""Tag, length, number of the sender's message to this receiver."""

ENVELOPE_BYTES = 1024
_SHORT = ENVELOPE_BYTES - _ENVELOPE.size
_FIRST_BODY, _BODIES = USER_TAGS + 1, 16384


@dataclass(eq=False)
class Message:
    """A send or receive under way. `finish` is told when it has ended, with the error if it failed."""

    sends: bool
    peer: int  # or ANY_SOURCE
    tag: int | None
    data: memoryview
    deadline: float
    finish: Callable[[BaseException | None], None]
    requests: tuple[Request, ...] = ()
    source: int = ANY_SOURCE

    def accepts(self, source: int, tag: int) -> bool:
        """Whether a receive takes such a message; those with negative tags are the library's own."""
        return self.peer in (ANY_SOURCE, source) and (tag >= 0 if self.tag is None else tag == self.tag)

    @property
    def text(self) -> str:
        """What it is, for messages to people."""
        if self.sends:
            return f"send: {self.data.nbytes} bytes to rank {self.peer} with tag {self.tag}"
        who = "any rank" if self.peer == ANY_SOURCE else f"rank {self.peer}"
        return f"recv: {self.data.nbytes} bytes from {who}" + ("" if self.tag is None else f" with tag {self.tag}")


@dataclass
class _Unexpected:
    source: int
    tag: int
    length: int
    number: int
    start: bytes


class Mailbox:
    """One rank's messages. Not thread-safe: whoever drives the transport drives it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._sent = [0] * transport.size
        self._envelopes: dict[int, tuple[Request, bytearray]] = {}
        self._wanted: list[Message] = []
        self._moving: list[Message] = []
        self._unexpected: list[_Unexpected] = []

    @property
    def idle(self) -> bool:
        """Whether nothing is pending."""
        return not self._wanted and not self._moving

    def send(self, message: Message) -> None:
        """Start to send."""
        assert message.tag is not None
        number, self._sent[message.peer] = self._sent[message.peer], self._sent[message.peer] + 1
        envelope = bytearray(ENVELOPE_BYTES)
        _ENVELOPE.pack_into(envelope, 0, message.tag, message.data.nbytes, number)
        start = message.data[:_SHORT]
        envelope[_ENVELOPE.size : _ENVELOPE.size + len(start)] = start
        requests = [self._transport.post_send(message.peer, USER_TAGS, memoryview(envelope))]
        if message.data.nbytes > _SHORT:
            requests.append(self._transport.post_send(message.peer, _body_tag(number), message.data[_SHORT:]))
        message.requests = tuple(requests)
        self._moving.append(message)

    def receive(self, message: Message) -> None:
        """Start to receive."""
        if not self._envelopes:
            for peer in range(self._transport.size):
                if peer != self._transport.rank:
                    self._expect(peer)
        for position, unexpected in enumerate(self._unexpected):
            if message.accepts(unexpected.source, unexpected.tag):
                del self._unexpected[position]
                self._take(message, unexpected)
                return
        self._wanted.append(message)
        self._mark(message.peer)

    def progress(self) -> bool:
        """Move what can be moved without waiting; whether something did. The transport has progressed.

        Raises:
            Mismatch: a message has another length than its receive.
            DeadlineExceeded: of what is pending, with what it waits for.
        """
        moved = False
        for peer, (request, envelope) in list(self._envelopes.items()):
            while request.done:
                moved = True
                tag, length, number = _ENVELOPE.unpack_from(envelope)
                start = bytes(envelope[_ENVELOPE.size : _ENVELOPE.size + min(length, _SHORT)])
                request, envelope = self._expect(peer)
                self._arrived(_Unexpected(peer, tag, length, number, start))
        ended = [message for message in self._moving if all(request.done for request in message.requests)]
        if ended:
            self._moving = [message for message in self._moving if message not in ended]
            for message in ended:
                message.finish(None)
        now = time.monotonic()
        for message in (*self._moving, *self._wanted):
            if now > message.deadline:
                missing = "it was not received" if message.sends else "no such send was made, or its bytes do not come"
                raise DeadlineExceeded(f"{message.text}: rank {self._transport.rank} waited in vain: {missing}")
        return moved or bool(ended)

    def fail(self, error: BaseException) -> None:
        """End all that is pending."""
        ended, self._wanted, self._moving = [*self._wanted, *self._moving], [], []
        for message in ended:
            message.finish(error)

    def _expect(self, peer: int) -> tuple[Request, bytearray]:
        envelope = bytearray(ENVELOPE_BYTES)
        self._envelopes[peer] = self._transport.post_recv(peer, USER_TAGS, memoryview(envelope)), envelope
        self._mark(peer)
        return self._envelopes[peer]

    def _mark(self, peer: int) -> None:
        """Whether this rank misses messages of the peer, now that its receives have changed."""
        if peer in self._envelopes:
            self._envelopes[peer][0].standing = all(message.peer != peer for message in self._wanted)

    def _arrived(self, unexpected: _Unexpected) -> None:
        for position, message in enumerate(self._wanted):
            if message.accepts(unexpected.source, unexpected.tag):
                del self._wanted[position]
                self._mark(message.peer)
                self._take(message, unexpected)
                return
        self._unexpected.append(unexpected)

    def _take(self, message: Message, found: _Unexpected) -> None:
        message.source = found.source
        if found.length != message.data.nbytes:
            self._wanted.append(message)  # it fails with the others
            raise Mismatch(
                f"recv: rank {self._transport.rank} wants {message.data.nbytes} bytes from rank {found.source}, whose "
                f"send has {found.length}: both sides must name the same length"
            )
        message.data[:_SHORT] = found.start
        if found.length > _SHORT:
            tag = _body_tag(found.number)
            message.requests = (self._transport.post_recv(found.source, tag, message.data[_SHORT:]),)
        self._moving.append(message)


def _body_tag(number: int) -> int:
    return _FIRST_BODY + number % _BODIES
