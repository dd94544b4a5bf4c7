"""What a communicator over verbs has under way: collectives one after the other, messages beside them.

Nothing moves by itself over such a transport. Whoever waits drives everything; what nobody waits for is driven by a
thread, which lives as long as there is such. (Shared memory alone has an engine of its own: `transports/native`.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import AbcclError, Aborted
from ..transports import Execution, Transport
from ..transports.recorder import recorder_of
from ..transports.shm import abort_native
from .mailbox import Mailbox, Message
from .work import Times, Work

_BROKEN = " (since then the communicator is broken: close it and make another)"

TICK = 0.02
"""Seconds between looks at deadlines."""


class DrivenWork(Work):
    """An operation that a Driver drives. `keep` are its buffers, kept until it has ended."""

    def __init__(self, driver: Driver, keep: Any) -> None:
        self._driver, self._keep = driver, keep
        self._error: BaseException | None = None
        self.message: Message | None = None
        self.recorded = 0  # the message's number in the flight recorder
        self.started = self.ended = 0.0
        self.done = False

    def finishes_within(self, timeout: float | None) -> bool:
        """See `Work.finishes_within`."""
        if not self.done:
            self._driver.drive(self, timeout)
        if self._error is not None:
            raise self._error
        return self.done

    def is_completed(self) -> bool:
        """See `Work.is_completed`."""
        return self.done

    @property
    def source(self) -> int:
        """The rank that a finished receive came from."""
        assert self.message is not None
        return self.message.source

    @property
    def times(self) -> Times:
        """When it ran; only once it is finished."""
        return self.started, self.ended

    def finish(self, error: BaseException | None) -> None:
        """It has ended, by this error if it failed."""
        self.ended = time.monotonic()
        if self.message is not None:
            peer = self.message.source if error is None and not self.message.sends else -1
            self._driver.recorder.end_message(self.recorded, peer, error is None)
        if error is None:
            self._keep = None
        self._error, self.done = error, True


class _Run:
    """A queued collective."""

    def __init__(self, start: Callable[[], Execution], timeout: float, work: DrivenWork) -> None:
        self.start, self.timeout, self.work = start, timeout, work
        self.execution: Execution | None = None
        self.deadline = 0.0


class Driver:
    """Drives one communicator's operations. From any thread.

    Args:
        transport: what they run on.

    Attributes:
        recorder: what keeps the flight recorder.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport, self.recorder = transport, recorder_of(transport)
        self._mailbox = Mailbox(transport)
        # Of all below and of the transport. The collector may close another communicator, or this, at any moment.
        self._lock = threading.RLock()
        self._runs: deque[_Run] = deque()
        self._broken: AbcclError | None = None
        self._waiting = 0  # threads that wait for some work, and so drive
        self._nobody_waits = threading.Condition()
        self._thread: threading.Thread | None = None

    def run(self, start: Callable[[], Execution], timeout: float, keep: Any) -> None:
        """Run a collective behind what is queued; returns when it is done, or raises what it failed with."""
        self._queue(start, timeout, keep).wait()

    def submit(self, start: Callable[[], Execution], timeout: float, keep: Any) -> DrivenWork:
        """Queue a collective."""
        work = self._queue(start, timeout, keep)
        self.in_background()
        return work

    def send(self, peer: int, tag: int, data: memoryview, timeout: float, keep: Any) -> DrivenWork:
        """Start to send a user's message."""
        return self._post(Mailbox.send, Message(True, peer, tag, data, time.monotonic() + timeout, _ignore), keep)

    def receive(self, peer: int, tag: int | None, data: memoryview, timeout: float, keep: Any) -> DrivenWork:
        """Start to receive a user's message, from anybody if `peer` is ANY_SOURCE, with any tag if None."""
        return self._post(Mailbox.receive, Message(False, peer, tag, data, time.monotonic() + timeout, _ignore), keep)

    def in_background(self) -> None:
        """Go on with what is under way although nobody waits."""
        with self._lock:
            if self._thread is None and (self._runs or not self._mailbox.idle):
                self._thread = threading.Thread(target=self._drive_alone, name="abccl driver", daemon=True)
                self._thread.start()

    def drive(self, work: DrivenWork, timeout: float | None) -> None:
        """Drive everything until this work is done, or `timeout` seconds have passed."""
        until = float("inf") if timeout is None else time.monotonic() + timeout
        with self._nobody_waits:
            self._waiting += 1
        self._transport.stirred = time.monotonic()
        try:
            while not work.done:
                moved = self._step()
                now = time.monotonic()
                if now >= until:
                    return
                if not moved:
                    self._transport.idle(min(until, now + TICK))
        except AbcclError as error:
            self._fail(error)
        except BaseException as error:  # an interrupt: peers must not wait for this rank
            self._fail(Aborted(f"rank {self._transport.rank} of {self._transport.size} gave up: {error!r}"))
            raise
        finally:
            with self._nobody_waits:
                self._waiting -= 1
                if not self._waiting:
                    self._nobody_waits.notify_all()

    def close(self, error: AbcclError) -> None:
        """End everything by this error."""
        with self._lock:
            self._end_all(error)

    def _queue(self, start: Callable[[], Execution], timeout: float, keep: Any) -> DrivenWork:
        self._check_usable()
        work = DrivenWork(self, keep)
        with self._lock:
            self._runs.append(_Run(start, timeout, work))
        return work

    def _post(self, post: Callable[[Mailbox, Message], None], message: Message, keep: Any) -> DrivenWork:
        self._check_usable()
        work = DrivenWork(self, keep)
        if message.tag is None or message.tag >= 0:  # the others are the library's own
            work.recorded = self.recorder.begin_message(message.sends, message.peer, message.tag, message.data.nbytes)
        work.message, message.finish = message, work.finish
        try:
            with self._lock:
                post(self._mailbox, message)
        except AbcclError as error:
            self._fail(error)
            if not work.done:  # the mailbox had not got it yet
                work.finish(error)
        return work

    def _step(self) -> bool:
        """Do what can be done without waiting; whether something was finished."""
        with self._lock:
            run = self._runs[0] if self._runs else None
            if run is not None:
                if run.execution is None:
                    run.execution = run.start()
                    run.work.started = time.monotonic()
                    run.deadline = run.work.started + run.timeout
                finished = run.execution.progress()
                if not finished and time.monotonic() > run.deadline:
                    run.execution.wait(run.deadline)  # it knows what it waits for, and says so
                    finished = True
                if finished:
                    self._runs.popleft()
                    run.work.finish(None)
                    self._transport.stirred = time.monotonic()
                    return True
            if self._mailbox.idle:
                return False
            self._transport.progress()
            return self._mailbox.progress()

    def _check_usable(self) -> None:
        if self._broken is not None:
            text = str(self._broken).removesuffix(_BROKEN)  # shared memory says so, too
            raise type(self._broken)(text + _BROKEN)

    def _fail(self, error: AbcclError) -> None:
        self._transport.abort(error)
        abort_native(self.recorder, error)
        with self._lock:
            self._broken = self._broken or error
            self._end_all(error)

    def _end_all(self, error: AbcclError) -> None:
        runs, self._runs = self._runs, deque()
        for run in runs:
            run.work.finish(error)
        self._transport.abandon([run.work for run in runs])
        self._mailbox.fail(error)

    def _drive_alone(self) -> None:
        while True:
            with self._nobody_waits:
                while self._waiting:
                    self._nobody_waits.wait()
            try:
                moved = self._step()
                if not moved:
                    self._transport.idle(time.monotonic() + TICK)
            except AbcclError as error:
                self._fail(error)
            except BaseException as error:
                self._fail(Aborted(f"rank {self._transport.rank} of {self._transport.size} failed: {error!r}"))
            with self._lock:
                if not self._runs and self._mailbox.idle:
                    self._thread = None
                    return


def _ignore(error: BaseException | None) -> None:
    """What a message tells before its work is known."""
