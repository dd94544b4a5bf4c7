"""A bulletin on a store of torch's: each rank writes how far it is once a second, if that has changed."""

from __future__ import annotations

import json
import re
import select
import time
from typing import Any

from .bulletin import PATIENCE, Bulletin, Own, Status, status_from

PERIOD = 1.0
"""Seconds between two times that a rank writes."""

RANKS_A_SECOND = 500
"""How many ranks write into a store: where there are more, each writes less often."""


class StoreBulletin(Bulletin):
    """One rank's end.

    Args:
        store: a TCPStore that all ranks share, below a prefix of the bulletin's own. A connection of its own is made to
            it: a client is locked while it waits for an answer.
    """

    silence = f"has told nothing, or the store that ranks tell it to has not answered for {PATIENCE:g} s"
    answers = False

    def __init__(self, store: Any, own: Own) -> None:
        self._store = store.clone()
        self._hung_up = _HungUp(self._store)
        self._told: Any = None
        self._next = 0.0
        self._period = PERIOD * max(1.0, own.size / RANKS_A_SECOND)
        super().__init__(own)

    def _tell(self) -> float:
        now = time.monotonic()
        if now < self._next:
            return self._next - now
        self._next = now + self._period
        position = self._position()
        if position is None:  # closed meanwhile
            return self._period
        told = {**position, "ended": None}  # which grows by itself
        if told != self._told:
            self._check()
            self._store.set(str(self.own.rank), json.dumps({**position, "told": time.time()}))
            self._told = told
        return self._period

    def _look(self, ranks: set[int]) -> dict[int, Status | None]:
        self._check()
        found: dict[int, Status | None] = dict.fromkeys(ranks)
        keys = {rank: str(rank) for rank in ranks}
        if not self._store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        for rank, key in keys.items():
            said = json.loads(bytes(self._store.get(key)))
            found[rank] = status_from(said, max(0.0, time.time() - said["told"]))
        return found

    def _check(self) -> None:
        # torch prints its stack when it writes to a store that has gone.
        if self._hung_up():
            raise ConnectionError("the process that keeps the store has ended")


class _HungUp:
    """Whether the store's process has closed the connection. Only the client's repr tells the number of the socket."""

    def __init__(self, store: Any) -> None:
        found = re.search(r"SocketImpl\(fd=(\d+)", repr(innermost(store)))
        self._poll = select.poll() if found else None
        if found and self._poll:
            self._poll.register(int(found[1]), select.POLLRDHUP)

    def __call__(self) -> bool:
        return self._poll is not None and bool(self._poll.poll(0))


def innermost(store: Any) -> Any:
    """The store below all prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store
