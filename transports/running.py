"""What transports share: executions that run in their caller's thread, and messages that wait under their tags.

Whatever ends such an execution before its time aborts the transport.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from typing import TypeVar

from ..errors import AbcclError, Aborted, DeadlineExceeded
from .contract import Transport

Key = TypeVar("Key")
Item = TypeVar("Item")


def take_first(waiting: dict[Key, deque[Item]], key: Key) -> Item:
    """The first of those that wait under the key, which goes with the last of them: tags are many."""
    first = waiting[key].popleft()
    if not waiting[key]:
        del waiting[key]
    return first


class Running(ABC):
    """An execution, but for what it does and what it waits for."""

    transport: Transport

    @abstractmethod
    def _advance(self) -> bool:
        """Do what can be done without waiting; true when the run is finished."""

    @abstractmethod
    def _late(self) -> str:
        """What is said at the deadline: what was waited for, and what to do next."""

    def progress(self) -> bool:
        """See `Execution.progress`."""
        try:
            return self._advance()
        except BaseException as error:
            self._fail(error)
            raise

    def wait(self, deadline: float) -> None:
        """See `Execution.wait`."""
        self.transport.stirred = time.monotonic()
        try:
            while not self._advance():
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(self._late())
                self._idle(deadline)
        except BaseException as error:
            self._fail(error)
            raise

    def abort(self, reason: str) -> None:
        """See `Execution.abort`."""
        self._fail(Aborted(reason))

    def _idle(self, deadline: float) -> None:
        """Give the processor away until there may be something to do."""
        self.transport.idle(deadline)

    def _fail(self, error: BaseException) -> None:
        rank, size = self.transport.rank, self.transport.size
        self.transport.abort(
            error if isinstance(error, AbcclError) else Aborted(f"rank {rank} of {size} gave up: {error!r}")
        )
