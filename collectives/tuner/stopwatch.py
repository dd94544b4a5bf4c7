"""The time of a collective, done as somebody chose, among ranks that all do it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ...algorithms import Collective
from ...transports import Transport
from ...transports.shm import ShmPlan, ShmTransport
from .choice import Choice

TIMEOUT = 60.0

LEAST = 0.2
"""Of the time of a call with a barrier behind it, what is the call's at least, however long barriers took before."""

_ITEM = 4
_UNCHAINED = (Collective.BROADCAST, Collective.SCATTER, Collective.REDUCE, Collective.GATHER)


class Subject:
    """A call made ready: its plan and its buffers."""

    def __init__(self, prepared: Any, collective: Collective, x: Any, out: Any) -> None:
        self.prepared, self.collective, self.x, self.out = prepared, collective, x, out


class Stopwatch:
    """Makes calls on buffers of its own and times them. All ranks use it alike.

    Args:
        bind: the communicator's: from a collective, its buffers, operator, root and a choice to what runs it.
    """

    def __init__(self, transport: Transport, bind: Any) -> None:
        self.transport, self._bind = transport, bind
        self._memory = np.zeros(0, np.float32)
        self._barrier = bind(Collective.BARRIER, None, None, None, 0, "recursive_doubling")

    def subject(self, collective: Collective, nbytes: int, choice: Choice) -> Subject:
        """A call on a vector of at least so many bytes (see `Tuner.decide`); it begins with zeros."""
        size = self.transport.size
        part = max(1, -(-nbytes // _ITEM) if collective.cut else -(-nbytes // _ITEM // size))
        whole = part if collective.cut else part * size
        if 2 * whole > len(self._memory):
            self._memory = np.zeros(2 * whole, np.float32)
            self._memory.fill(0.0)  # of pages that were never written all would be one
        first, second = self._memory[:whole], self._memory[whole : 2 * whole]
        x, out = first, first
        if collective in (Collective.REDUCE_SCATTER, Collective.SCATTER):
            out = second[:part]
        elif collective in (Collective.ALL_GATHER, Collective.GATHER):
            x, out = second[:part], first
        elif collective is Collective.ALL_TO_ALL:
            out = second
        return Subject(self._bind(collective, x, out, "sum", 0, choice), collective, x, out)

    def seconds(self, subject: Subject, calls: int) -> float:
        """This rank's seconds for a call, of so many after one that does not count.

        Where the root would run ahead of the others, a barrier stands between calls, and its own time is taken off.
        """
        if subject.collective not in _UNCHAINED:
            return self._loop(subject, calls, False) / calls
        rounds = max(4, calls)
        barrier = Subject(self._barrier, Collective.BARRIER, None, None)
        alone = self._loop(barrier, rounds, False) / rounds
        together = self._loop(subject, calls, True) / calls
        return max(together - alone, LEAST * together)

    def _loop(self, subject: Subject, calls: int, apart: bool) -> float:
        x, out = (0 if array is None else int(array.ctypes.data) for array in (subject.x, subject.out))
        if isinstance(self.transport, ShmTransport) and isinstance(subject.prepared, ShmPlan):
            time_native = self.transport.native.time
            between = self._barrier.native if apart else None
            time_native(subject.prepared.native, x, out, 1, self._barrier.native, TIMEOUT)
            return float(time_native(subject.prepared.native, x, out, calls, between, TIMEOUT))
        start = time.perf_counter()
        for call in range(calls + 1):
            self._run(subject.prepared, x, out)
            if apart or call == 0:
                self._run(self._barrier, 0, 0)
            if call == 0:
                start = time.perf_counter()
        return time.perf_counter() - start

    def _run(self, prepared: Any, x: int, out: int) -> None:
        prepared.start(x, out).wait(time.monotonic() + TIMEOUT)
