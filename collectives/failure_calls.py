"""What a communicator tells of itself, and how it ends before its time: records, reports, aborts, shrinking."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import Aborted, ArgumentError
from ..transports import Transport
from ..transports.flight import Snapshot, own_snapshot
from ..transports.recorder import recorder_of
from . import flight
from .binding import Binder
from .debug import Log, Observer, Tracer, both, log_of

if TYPE_CHECKING:
    from .communicator import Communicator


class FailureCalls(ABC):
    """The calls of a communicator that somebody makes who wants to know what goes wrong, or whom it went wrong for."""

    rank: int
    size: int
    name: str
    timeout: float
    _transport: Transport
    _dispatcher: Any
    _devices: Any
    _recorder: Any
    _shrinking: Any = None  # what `shrink` is at
    _binder: Binder
    _log: Log | None = None
    _tracer: Tracer | None = None
    _observer: Observer | None = None

    @abstractmethod
    def _check_usable(self) -> None:
        """Refuse a communicator that is closed, or of the parent process."""

    def _record(self, name: str) -> None:
        """Begin to record under this name."""
        self.name = name
        self._recorder = recorder_of(self._transport)
        self._recorder.set_group(name, self._transport.token)
        flight.attend(self)

    def _speak(self) -> None:
        """Say what is chosen and done, if ABCCL_DEBUG asks for it."""
        self._log = self._binder.log = log_of(self.rank, self.size, self.name)
        if self._log is not None and self._log.traces:
            self._recorder.set_records_steps(True)
            self._tracer = Tracer(self._log, self._recorder)
            self.observe(None)

    def set_timeout(self, seconds: float) -> None:
        """Set how long operations that start from now on wait for their peers."""
        if not seconds > 0:
            raise ArgumentError(f"set_timeout: seconds must be positive, and is {seconds}")
        self.timeout = float(seconds)
        self._dispatcher.set_timeout(self.timeout)
        if self._devices is not None:
            self._devices.set_timeout(self.timeout)

    def observe(self, observer: Observer | None) -> None:
        """From now on tell `observer` of each collective, in its caller's thread; None ends it.

        It gets the call in words ("all_reduce(float32, sum, 4 elements, ring)") before the call starts, and what it
        returns is called with the Work when it has started, with None when it has run, or with False when it failed.
        """
        self._observer = both(self._tracer, observer)
        self._dispatcher.set_observer(self._observer)

    def _observed(self, text: str, run: Callable[[], Any]) -> Any:
        """Run a call that the dispatcher does not observe."""
        if self._observer is None:
            return run()
        ended = self._observer(text)
        result: Any = False
        try:
            result = run()
        finally:
            try:
                ended(result)
            except Exception as error:  # what the call made is what counts
                warnings.warn(f"abccl: an observer raised {error!r}", RuntimeWarning, stacklevel=2)
        return result

    def flight_record(self) -> Snapshot:
        """What the flight recorder holds: the last 1,000 collectives and messages, and where this rank waits.

        Also of a communicator that is broken or closed. Of collectives on CUDA arrays nothing is recorded.
        """
        return own_snapshot(self._recorder)

    def dump_flight_record(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the flight record as JSON, for `abccl trace`. A failure does so by itself.

        Args:
            path: the file; by default one in the communicator's folder below ABCCL_FLIGHT_DIR.

        Returns:
            The file.

        Raises:
            ArgumentError: there is no folder to write to; the message says why.
        """
        return flight.dump(self, path)

    def abort(self, reason: str = "abort() was called") -> None:
        """Make every rank's present and future calls raise `Aborted`. From any thread.

        If this rank shrinks meanwhile, that ends on all ranks, and the ranks can not shrink this communicator again. An
        abort before that does not: abort, then shrink, is how ranks leave a collective together.
        """
        self._check_usable()
        shrinking = self._shrinking
        if shrinking is not None:
            shrinking.is_aborted = True
        error = Aborted(f"rank {self.rank}: {reason}")
        if self._devices is not None:
            self._devices.abort(error)
        self._transport.abort(error)

    def shrink(self, timeout: float | None = None) -> Communicator:
        """A new communicator of the ranks that are left, after a loss. All of them call it.

        Ranks keep their order and are numbered from 0 anew. All survivors get the same group, also if another dies
        meanwhile; see `collectives/shrink.py` for what is promised. This communicator stays broken: close it.

        Args:
            timeout: seconds to wait for a rank that is alive and does not call this; it is left out. The
                communicator's if None.

        Raises:
            Aborted: the others have left this rank out, as it came too late; or abort() was called meanwhile.
            TransportError: there is no way for survivors to agree; the message says what to do.
        """
        from .shrink import shrink

        self._check_usable()
        return shrink(cast(Any, self), timeout)
