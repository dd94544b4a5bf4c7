"""Handles on asynchronous operations."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet

from ..errors import DeadlineExceeded
from ..transports import _native


class Work(ABC):
    """An operation under way. Its buffers are kept alive, and must not be touched, until it is finished."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> None:
        """Wait until the operation is finished.

        Raises:
            DeadlineExceeded: not finished after `timeout` seconds. The operation goes on: wait again, or abort.
            AbcclError: what the operation failed with.
        """

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

    def wait(self, timeout: float | None = None) -> None:
        """See `Work.wait`."""
        if not self.finishes_within(timeout):
            raise DeadlineExceeded(
                f"Work.wait: not finished after {timeout} s; it goes on, wait again or abort the communicator"
            )

    def finishes_within(self, timeout: float | None) -> bool:
        """Like `wait`, and False instead of DeadlineExceeded."""
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


class WorkQueue:
    """Runs operations one after the other: in their caller's thread if nothing is queued, else on a thread of its own.

    The thread lives as long as there is something queued.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._running = threading.Lock()
        self._queue: deque[tuple[Future[Times], Callable[[], None]]] = deque()
        self._active = False

    def run(self, operation: Callable[[], None]) -> None:
        """Run the operation behind what is queued; returns when it is done, or raises what it raised."""
        with self._lock:
            direct = not self._active and self._running.acquire(blocking=False)
        if not direct:
            self.submit(operation).wait()
            return
        try:
            operation()
        finally:
            self._running.release()

    def submit(self, operation: Callable[[], None]) -> Work:
        """Queue the operation."""
        future: Future[Times] = Future()
        with self._lock:
            self._queue.append((future, operation))
            if not self._active:
                self._active = True
                threading.Thread(target=self._drain, name=self._name, daemon=True).start()
        return QueuedWork(future)

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._active = False
                    return
                future, operation = self._queue.popleft()
            with self._running:
                try:
                    times = timed(operation)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(times)
