"""An engine's own collectives (MPI's, Gloo's) under the name `native`, with what they lack made around them."""

from __future__ import annotations

import numpy as np

from ..algorithms.plan import Scaling
from ..transports import Execution, NativeCall, Prepared, Transport
from ..transports.portable import kernels
from ..transports.types import NUMBERS, numpy_dtype


def prepare_native(transport: Transport, call: NativeCall, scaling: Scaling, factor: float) -> Prepared:
    """The engine's own collective, scaled before or after.

    Raises:
        ArgumentError: the engine has no such collective, type or operator.
        TransportError: the transport has no collectives of its own.
    """
    prepared = transport.prepare_native(call)
    if scaling is Scaling.NONE:
        return prepared
    if transport.device != "cpu":
        return transport.scaled(prepared, call, scaling is Scaling.BEFORE, factor)
    return _Scaled(prepared, call, scaling, factor)


class _Scaled:
    def __init__(self, prepared: Prepared, call: NativeCall, scaling: Scaling, factor: float) -> None:
        self.prepared, self.type, self.factor = prepared, NUMBERS[call.dtype], factor
        before = scaling is Scaling.BEFORE
        self.scaled_input = np.empty(call.input_count, numpy_dtype(call.dtype)) if before else None
        self.output_count = 0 if before else call.output_count

    def start(self, input: int, output: int) -> Execution:
        if self.scaled_input is not None:
            copy = self.scaled_input
            kernels().scale(self.type, copy.ctypes.data, input, self.factor, copy.size)
            input = copy.ctypes.data
        return _ScaledExecution(self, self.prepared.start(input, output), output)


class _ScaledExecution:
    def __init__(self, scaled: _Scaled, execution: Execution, output: int) -> None:
        self.scaled, self.execution, self.output = scaled, execution, output

    def progress(self) -> bool:
        finished = self.execution.progress()
        if finished:
            self._finish()
        return finished

    def wait(self, deadline: float) -> None:
        self.execution.wait(deadline)
        self._finish()

    def abort(self, reason: str) -> None:
        self.execution.abort(reason)

    def _finish(self) -> None:
        scaled = self.scaled
        if scaled.output_count:
            kernels().scale(scaled.type, self.output, self.output, scaled.factor, scaled.output_count)
