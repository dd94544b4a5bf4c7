"""Flight recorders for what the native engine does not run: it keeps its own (`transports/native/flight.hpp`)."""

from __future__ import annotations

import zlib
from typing import Any

from . import _native
from .contract import Execution, Prepared, Transport
from .joint import JointPlan, joint_order
from .shm import ShmPlan


def recorder_of(transport: Transport) -> Any:
    """The native core's communicator that keeps the transport's flight recorder; a new one where it has none."""
    if transport.recorder is None:
        geometry = _native.Geometry(1, 1, 2, 64)
        recorder = _native.Communicator(0, geometry, _native.Region.create(geometry.bytes))
        recorder.set_names(joint_order([transport.rank], transport.size))
        transport.recorder = recorder
    return transport.recorder


def recorded(prepared: Prepared, recorder: Any, text: str, nbytes: int, counts: Transport | None = None) -> Prepared:
    """The same, whose runs the recorder knows of: the native engine tells it itself.

    Args:
        counts: the transport that numbers its runs, of a plan that is not numbered by itself.
    """
    if isinstance(prepared, (ShmPlan, JointPlan)) or recorder is None:
        return prepared
    return _RecordedPlan(prepared, recorder, text, nbytes, counts)


class _RecordedPlan:
    def __init__(self, prepared: Prepared, recorder: Any, text: str, nbytes: int, counts: Transport | None) -> None:
        self._counts = counts
        self._prepared, self._recorder, self.text, self._nbytes = prepared, recorder, text, nbytes
        self._signature = zlib.crc32(text.encode())

    def start(self, input: int, output: int) -> Execution:
        self._recorder.begin_call(self._signature, self.text, self._nbytes)
        if self._counts is not None:
            self._counts.begin_run(self.text)
        try:
            return _RecordedRun(self._prepared.start(input, output), self._recorder)
        except BaseException:
            self._recorder.end_call(False)
            raise


class _RecordedRun:
    def __init__(self, execution: Execution, recorder: Any) -> None:
        self._execution, self._recorder = execution, recorder

    def progress(self) -> bool:
        try:
            done = self._execution.progress()
        except BaseException:
            self._recorder.end_call(False)
            raise
        if done:
            self._recorder.end_call(True)
        return done

    def wait(self, deadline: float) -> None:
        well = False
        try:
            self._execution.wait(deadline)
            well = True
        finally:
            self._recorder.end_call(well)

    def abort(self, reason: str) -> None:
        self._recorder.end_call(False)
        self._execution.abort(reason)
