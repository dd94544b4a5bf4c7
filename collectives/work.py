"""Handles on asynchronous operations."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet

from ..errors import DeadlineExceeded
from ..transports import _native


class Work(ABC):
    """An operation under way. Its buffers are kept alive, and must not be touched, until it is finished."""

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the operation is finished.

        Raises:
            DeadlineExceeded: not finished after `timeout` seconds. The operation goes on: wait again, or abort.
            AbcclError: what the operation failed with.
        """
        if not self.finishes_within(timeout):
            raise DeadlineExceeded(
                f"Work.wait: not finished after {timeout} s; it goes on, wait again or abort the communicator"
            )

    @abstractmethod
    def finishes_within(self, timeout: float | None) -> bool:
        """Like `wait`, and False instead of DeadlineExceeded."""

    @abstractmethod
    def is_completed(self) -> bool:
        """Whether the operation is finished, well or not. Never waits."""


Work.register(_native.Work)


Times = tuple[float, float]
"""When an operation was taken up and when it ended, by the clock of time.monotonic()."""


class QueuedWork(Work):
    """Work of a thread of Python's.

    Args:
        future: what the thread makes of `timed(operation)`.
    """

    def __init__(self, future: Future[Times]) -> None:
        self._future = future

    def finishes_within(self, timeout: float | None) -> bool:
        """See `Work.finishes_within`."""
        try:
            self._future.result(timeout)
        except NotYet:
            if self._future.done():
                raise
            return False
        return True

    def is_completed(self) -> bool:
        """See `Work.is_completed`."""
        return self._future.done()

    @property
    def times(self) -> Times:
        """When it ran; only once it is finished."""
        return self._future.result()


def timed(operation: Callable[[], None]) -> Times:
    """Run the operation, and tell when."""
    started = time.monotonic()
    operation()
    return started, time.monotonic()
