"""Handles on asynchronous operations, as torch wants them: Work, and torch's futures.

On CPU tensors the host waits. On CUDA tensors (`StreamWork`) the current stream does, as torch has it for NCCL.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ...errors import AbcclError, DeadlineExceeded
from . import streams
from .errors import torch_error

_NO_TIMEOUT = timedelta(0)

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class GroupWork(dist.Work):
    """An operation of a process group: native operations, and what is left to do when they are finished.

    Args:
        parts: the native operations; with none it is finished already.
        result: what the future will hold.
        finish: copies the result to where it belongs. Called once, by whoever first sees that all parts are finished.
        completion: the thread that completes futures. None for a message, which finishes in no order with others.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        result: list[Any],
        finish: Callable[[], None] | None,
        completion: Completion | None,
    ) -> None:
        super().__init__()
        self._parts, self._result, self._finish, self._completion = parts, result, finish, completion
        self._error: BaseException | None = None
        self._future: Any = None
        self._failure: list[BaseException] = []  # what the future raises
        # A copy back takes a moment, and may be asked for by two threads; a reentrant lock, since a signal handler may.
        self._lock = threading.RLock()

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Wait until the operation is finished, raise what it failed with. A timeout of 0 is none."""
        seconds = timeout.total_seconds()
        try:
            if seconds > 0:
                deadline = time.monotonic() + seconds
                for part in self._parts:
                    if not part.finishes_within(max(0.0, deadline - time.monotonic())):
                        raise DeadlineExceeded(f"Work.wait: not finished after {seconds:g} s; it goes on, wait again")
            else:
                for part in self._parts:
                    part.wait()
        except AbcclError as error:
            raise torch_error(error) from None
        self._conclude()
        return True

    def is_completed(self) -> bool:
        """Whether the operation is finished, well or not. Never waits for a peer."""
        if not all(part.is_completed() for part in self._parts):
            return False
        if self._finish is not None:
            self.exception()
        return True

    def is_success(self) -> bool:
        """Whether the operation is finished, and well."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        """What the operation failed with, if it is finished and did."""
        if self._error is None and all(part.is_completed() for part in self._parts):
            try:
                self.wait()
            except Exception as error:
                self._error = error
        return self._error

    def result(self) -> list[Any]:
        """The tensors that hold the result."""
        self.wait()
        return self._result

    def synchronize(self) -> None:
        """The same as `wait`, as for NCCL."""
        self.wait()

    def block_current_stream(self) -> None:
        """The same as `wait`, as for NCCL."""
        self.wait()

    def get_future(self) -> Any:
        """A future of the result. Made on demand: most callers only wait."""
        with self._lock:
            if self._future is None:
                source = self._source()
                # C++ must never see a future whose error was set from Python: DDP's reducer would crash. An error that
                # a callback raises is safe. The callback does not hold this work, or they would keep each other alive.
                self._future = source.then(partial(_value, self._result, self._failure))
                if self._has_future():
                    self.complete(source)
                elif self._completion is None or self._completion.is_here():
                    # A callback may wait for the future of another operation, which its own thread can not complete.
                    Completion("abccl future").add(self, source, last=True)
                else:
                    self._completion.add(self, source)
            return self._future

    def complete(self, source: Any) -> None:
        """Wait, and set the future that `get_future` has made."""
        try:
            self.wait()
        except BaseException as caught:
            self._failure.append(caught)
        # A callback of the user may raise, and torch logs it.
        with suppress(BaseException):
            source.set_result(None if self._failure else self._result)

    def source_rank(self) -> int:
        """The rank that a message came from."""
        self.wait()
        return int(self._parts[0].source)

    _source_rank = source_rank

    def _source(self) -> Any:
        return torch.futures.Future()

    def _has_future(self) -> bool:
        """Whether the future can be set at once."""
        return self.is_completed()

    def _conclude(self) -> None:
        if self._finish is None:
            return
        with self._lock:
            finish, self._finish = self._finish, None
            if finish is not None:
                finish()


class StreamWork(GroupWork):
    """An operation on CUDA tensors: `wait` makes the current stream wait, not the host, and copies back there.

    A part with a `stream` is enqueued. The host waits for others: messages, and what it must drive. A future is set
    when all is enqueued, and what follows from it comes behind that on the device. So it does not tell of what fails
    later: the next call does. What is copied back is so by the first stream that waits; others wait for that copy.

    Args:
        device: where the tensors are.
        operation: all that `GroupWork` wants.
    """

    def __init__(self, device: torch.device, *operation: Any) -> None:
        super().__init__(*operation)
        self._device = device
        self._copied: Any = None  # the event behind the copies back

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Have the current stream wait for the operation; raise what it is known to have failed with.

        With a timeout the host waits, too, until the device is done, as NCCL's does.
        """
        if timeout != _NO_TIMEOUT:
            super().wait(timeout)
        return super().wait()

    def is_completed(self) -> bool:
        """Whether the device is done, well or not. Never waits."""
        return super().is_completed() and (self._copied is None or bool(self._copied.query()))

    def complete(self, source: Any) -> None:
        """See `GroupWork.complete`: on another stream, which the caller's does not wait for."""
        with streams.another(self._device):
            super().complete(source)

    def _source(self) -> Any:
        return streams.future(self._device)

    def _has_future(self) -> bool:
        return all(hasattr(part, "stream") or part.is_completed() for part in self._parts)

    def _conclude(self) -> None:
        with self._lock:
            if self._copied is not None:
                streams.wait(self._copied, self._device)
            elif self._finish is not None:
                super()._conclude()
                self._copied = streams.here(self._device)


def work_of(
    parts: Sequence[Any], result: list[Any], finish: Callable[[], None] | None, completion: Completion | None
) -> GroupWork:
    """The handle on an operation, by where its result is: see `GroupWork` for the arguments."""
    device = streams.device_of(result)
    if device is None:
        return GroupWork(parts, result, finish, completion)
    return StreamWork(device, parts, result, finish, completion)


class Waited:
    """An operation with another way to wait for it."""

    def __init__(self, part: Any, wait: Callable[[Any], None]) -> None:
        self._part, self._wait = part, wait
        self.is_completed, self.finishes_within = part.is_completed, part.finishes_within

    def wait(self) -> None:
        """Wait until it is finished."""
        self._wait(self._part)

    @property
    def source(self) -> int:
        """The rank that a message came from."""
        return int(self._part.source)


def _value(result: list[Any], failure: list[BaseException], source: Any) -> list[Any]:
    if failure:
        raise failure[0]
    return result


class Completion:
    """Completes the futures of a process group, whose operations finish in the order in which they were started.

    The thread starts with the first future that anybody asks for.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[GroupWork, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, work: GroupWork, source: Any, last: bool = False) -> None:
        """Complete `source` when the work is finished; end the thread after the last one."""
        self._queue.put((work, source))
        if last:
            self._queue.put(None)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            _threads.add(self._thread)
            self._thread.start()

    def is_here(self) -> bool:
        """Whether this is the thread that completes futures."""
        return self._thread is threading.current_thread()

    def stop(self) -> None:
        """End the thread, when it has completed all futures: what they wait for must end first."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            if thread is not threading.current_thread():
                thread.join(10.0)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, source = item
            work.complete(source)
            del item, work, source


def join_completions() -> None:
    """Wait for the threads that complete futures, once what they wait for has ended: torch must not see them killed."""
    for thread in list(_threads):
        thread.join(10.0)
