"""What the ranks of a broken communicator still read of each other, and the questions that they decide together."""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import TransportError
from ..transports.joint import JointTransport
from ..transports.shm import ShmTransport

T = TypeVar("T")

GRACE = 5.0
"""Seconds that a rank has to come after the connection to it was lost."""


class Board(ABC):
    """A place where each rank writes and all read, whoever has died. Ranks are the communicator's.

    Attributes:
        room: bytes of the longest blob.
    """

    rank: int
    size: int
    room: int

    @abstractmethod
    def publish(self, round: int, blob: bytes) -> None:
        """Write down the blob of a round, in ascending rounds. That of the round before the last one may go."""

    @abstractmethod
    def read(self, rank: int, round: int) -> tuple[int, bytes | None]:
        """The latest round that the rank has written (0 or less: none), and the round's blob if it is there."""

    @abstractmethod
    def decide(self, question: int, value: int) -> int:
        """The answer to a question (0 to 511): the first value, not 0, that any rank gave."""

    @abstractmethod
    def decided(self, question: int) -> int | None:
        """The answer if there is one."""

    @abstractmethod
    def lost(self, rank: int) -> bool:
        """Whether the rank is known to be dead, or to have closed the communicator. Never of this rank."""


class ShmBoard(Board):
    """Ranks of one host: memory that stays mapped when its owner dies."""

    room = 16 << 10

    def __init__(self, transport: ShmTransport) -> None:
        self.rank, self.size, self._native = transport.rank, transport.size, transport.native

    def publish(self, round: int, blob: bytes) -> None:
        """See `Board.publish`."""
        self._native.board_publish(round, blob)

    def read(self, rank: int, round: int) -> tuple[int, bytes | None]:
        """See `Board.read`."""
        latest, blob = self._native.board_read(rank, round)
        return int(latest), blob

    def decide(self, question: int, value: int) -> int:
        """See `Board.decide`."""
        return int(self._native.decide(question, value))

    def decided(self, question: int) -> int | None:
        """See `Board.decided`."""
        return int(self._native.decide(question, 0)) or None

    def lost(self, rank: int) -> bool:
        """See `Board.lost`."""
        return rank != self.rank and bool(self._native.gone(rank))


class StoreBoard(Board):
    """Ranks that share one of torch's stores. Whoever keeps the store (torchrun, else rank 0) must live.

    A rank of another host is held for lost when the connection to it is gone and it has not come for GRACE seconds.
    That is no proof: Gloo breaks connections between living ranks, too, when one of its collectives fails. Once a rank
    has come only its own host, or a deadline, can tell that it is lost.

    Args:
        store: its keys must be new for this board.
        joint: the ranks' transport.
    """

    room = 1 << 20
    _HEAD = struct.Struct("<q")

    def __init__(self, store: Any, joint: JointTransport) -> None:
        self.rank, self.size, self.store, self._joint = joint.rank, joint.size, store, joint
        self._grace = time.monotonic() + GRACE

    def publish(self, round: int, blob: bytes) -> None:
        """See `Board.publish`."""
        self._ask(lambda: self.store.set(f"{self.rank}/{round % 2}", self._HEAD.pack(round) + blob))

    def read(self, rank: int, round: int) -> tuple[int, bytes | None]:
        """See `Board.read`."""
        latest, blob = 0, None
        for parity in range(2):
            found = self._get(f"{rank}/{parity}")
            if found is not None:
                (number,) = self._HEAD.unpack_from(found)
                latest = max(latest, number)
                blob = found[self._HEAD.size :] if number == round else blob
        return latest, blob

    def decide(self, question: int, value: int) -> int:
        """See `Board.decide`."""
        return int(self._ask(lambda: self.store.compare_set(f"question/{question}", "", str(value))))

    def decided(self, question: int) -> int | None:
        """See `Board.decided`."""
        found = self._get(f"question/{question}")
        return None if found is None else int(found)

    def lost(self, rank: int) -> bool:
        """See `Board.lost`."""
        joint = self._joint
        if joint.is_near(rank):
            return rank != self.rank and bool(joint.local.native.gone(joint.index[rank]))
        silent = time.monotonic() > self._grace and joint.network.has_lost(rank)
        return silent and self.read(rank, 0)[0] == 0

    def _get(self, key: str) -> bytes | None:
        return self._ask(lambda: bytes(self.store.get(key)) if self.store.check([key]) else None)

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.rank} of {self.size} can not reach the store by which survivors agree "
                f"({str(error).splitlines()[0]}): the process that keeps it (rank 0, unless torchrun does) is lost. "
                f"Start the job anew"
            ) from error
