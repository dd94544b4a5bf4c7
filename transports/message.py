"""The head of every message of a plan that leaves shared memory.

It says to which collective the message belongs (signature, number on this transport, text), and which message of it
this is (checksum of its blocks, segment). So ranks that call different things get an error that names both.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import Mismatch
from .contract import Operation

_HEAD = struct.Struct("<IIII176s")
"""Signature, number of the run, checksum of the blocks, segment, text: three cache lines."""

HEAD_BYTES = _HEAD.size

_TEXT = 176

_SAME = HEAD_BYTES - _TEXT
"""The bytes of a head that both sides of a message must agree on; the text is for people."""


class Head(bytes):
    """The head of a message; equal to the bytes of any that belongs to the same message."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, bytes) and self[:_SAME] == other[:_SAME]

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The message that a rank waits for.

    Attributes:
        peer: who sends it.
        tag: the checksum of its blocks.
        segment: the segment that they are of.
        nbytes: their bytes.
        step: the schedule's, from 1.
        blocks: their names.
    """

    peer: int
    tag: int
    segment: int
    nbytes: int
    step: int
    blocks: str


class Heads:
    """Makes and checks the heads of an operation's messages.

    Args:
        me: "rank 1 of 4".
    """

    def __init__(self, operation: Operation, me: str) -> None:
        self.operation, self.me = operation, me
        self._text = operation.text.encode()[:_TEXT]

    def make(self, run: int, tag: int, segment: int) -> Head:
        """The head of a message."""
        return Head(_HEAD.pack(self.operation.signature, run, tag, segment, self._text))

    def mismatch(
        self,
        run: int,
        wanted: Wanted,
        head: bytes,
        length: int,
        called: Callable[[int], str | None] = lambda number: None,
    ) -> Mismatch:
        """The error for a message of another head, or of another length (head included), than was wanted.

        Args:
            called: this rank's call of a number, if it is remembered.
        """
        peer = f"rank {wanted.peer}"
        if length < HEAD_BYTES:
            return Mismatch(f"{self.me} got {length} bytes from {peer} that are no message of this library")
        signature, number, tag, segment, text = _HEAD.unpack(head)
        theirs = text.rstrip(b"\0").decode(errors="replace")
        # Of an earlier call, in which the two exchanged no message: there they went apart.
        earlier = called(number) if number != run else None
        ours = f"{self.operation.text} #{run + 1}" if earlier in (None, theirs) else f"{earlier} #{number + 1}"
        both = f"{self.me} called {ours}, {peer} called {theirs} #{number + 1}"
        if (signature, number) != (self.operation.signature, run):
            return Mismatch(f"{both}: all ranks must call the same collectives in the same order")
        return Mismatch(
            f"{both}; at step {wanted.step} {self.me} wants from {peer} blocks "
            f"{wanted.blocks} of segment {wanted.segment}, {wanted.nbytes} bytes, and it sends "
            f"{'these' if tag == wanted.tag else 'other'} blocks of segment {segment}, {length - HEAD_BYTES} bytes: "
            f"check the schedule by `abccl verify`, and the counts on both ranks"
        )
