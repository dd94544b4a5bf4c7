"""Members of a communicator that meet to make a new one, by messages of the old one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..transports import Transport
from .bootstrap import Bootstrap


class Members(Bootstrap):
    """The bootstrap of a new group.

    Args:
        transfer: the parent's `_transfer`: (call, peer, tag, address, bytes, what to keep, asynchronous) -> work.
        own: this rank, in the parent.
        members: the parent's ranks, in the new group's order.
        tag: theirs alone.
        network: makes a transport of these ranks that needs no common host: see `Transport.split`.
    """

    how = "some ranks of another group, which meet by its messages"

    def __init__(
        self,
        transfer: Callable[..., Any],
        own: int,
        members: list[int],
        tag: int,
        network: Callable[[], Transport],
    ) -> None:
        self._transfer, self._own, self._members, self._tag, self._network = transfer, own, members, tag, network
        self.rank, self.size = members.index(own), len(members)

    def exchange(self, data: bytes) -> list[bytes]:
        """See `Bootstrap.exchange`."""
        lengths = self._all(np.array([len(data)], dtype=np.int64), [1] * self.size)
        mine = np.frombuffer(data, dtype=np.uint8)
        return [blob.tobytes() for blob in self._all(mine, [int(length[0]) for length in lengths])]

    def network(self, kind: str | None) -> Transport:
        """See `Bootstrap.network`: a part of the parent's."""
        return self._network()

    def _all(self, mine: np.ndarray[Any, Any], counts: list[int]) -> list[np.ndarray[Any, Any]]:
        theirs = [np.empty(count, dtype=mine.dtype) for count in counts]
        theirs[self.rank] = mine
        works = []
        for call in ("send", "recv"):
            for member, buffer in zip(self._members, theirs, strict=True):
                if member == self._own:
                    continue
                array = mine if call == "send" else buffer
                works.append(self._transfer(call, member, self._tag, array.ctypes.data, array.nbytes, array, True))
        for work in works:
            work.wait()
        return theirs
