"""The memory that all libraries get: numpy's, torch's, of the communicator's registered memory, or a GPU's by cupy."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..collectives import Communicator
from ..errors import ArgumentError
from ..transports.types import numpy_dtype
from .data import Values
from .measure import Call
from .messages import AnyCase
from .world import import_or


class Buffers:
    """Memory for one case: `x` and `out`, as numpy arrays, as torch tensors, as cupy arrays.

    It is allocated as users of the library would: numpy's large arrays begin 16 bytes behind a page, torch's are
    aligned to 64 bytes. For cupy the numpy arrays are copies in host memory: `to_device` and `to_host` bring them up to
    date, and do nothing for the others.

    Attributes:
        library: "numpy", "torch", "cupy" or "comm.empty", the communicator's registered memory: who allocated it.

    Raises:
        ArgumentError: this communicator has no registered memory, or cupy no such element type.
    """

    def __init__(self, case: AnyCase, library: str, comm: Communicator) -> None:
        self.case, self.library = case, library
        self._tensors: dict[str, Any] = {}
        self._on_device: dict[str, Any] = {}
        counts = {"x": case.x_count, "out": 0 if case.in_place else case.out_count}
        if library == "torch":
            torch = import_torch()
            self._tensors = {
                name: torch.empty(count, dtype=getattr(torch, case.dtype)) for name, count in counts.items()
            }
        self._arrays: dict[str, Values] = {
            name: self._tensors[name].view(torch.uint8).numpy().view(numpy_dtype(case.dtype))
            if library == "torch"
            else _registered(comm)(count, case.dtype)
            if library == "comm.empty" and count
            else np.empty(count, numpy_dtype(case.dtype))
            for name, count in counts.items()
        }
        if library == "cupy":
            cupy = import_cupy()
            if case.dtype == "bfloat16":
                raise ArgumentError("cupy has no bfloat16: take another --dtype, or leave out --array cupy")
            self._on_device = {name: cupy.empty(array.size, array.dtype) for name, array in self._arrays.items()}

    @property
    def x(self) -> Values:
        """The input."""
        return self._arrays["x"]

    @property
    def result(self) -> Values:
        """Where the result goes."""
        return self._arrays["x" if self.case.in_place else "out"]

    def of(self, array: str) -> tuple[Any, Any]:
        """`x` and `out` as arrays of "numpy", "torch" or "cupy"."""
        if array == "torch":
            found = self._as_tensors()
        else:
            found = self._on_device if array == "cupy" else self._arrays
        return found["x"], found["out"]

    def _as_tensors(self) -> dict[str, Any]:
        if not self._tensors:
            torch = import_torch()
            for name, array in self._arrays.items():
                self._tensors[name] = torch.from_numpy(array.view(np.uint8)).view(getattr(torch, self.case.dtype))
        return self._tensors

    def to_device(self) -> None:
        """Bring what was written to the numpy arrays to where the libraries read it."""
        for name, array in self._on_device.items():
            array.set(self._arrays[name])
        self._synchronize()

    def to_host(self) -> None:
        """Bring what the libraries have written to the numpy arrays."""
        self._synchronize()
        for name, array in self._on_device.items():
            array.get(out=self._arrays[name])

    def keep(self) -> Call:
        """A call that restores the input as it is now."""
        x = self._on_device.get("x", self.x)
        fresh = x.copy()

        def restore() -> None:
            x[...] = fresh
            self._synchronize()

        return restore

    def _synchronize(self) -> None:
        # MPI knows nothing of streams: what was written must be there before a call gets its address.
        if self._on_device:
            import_cupy().cuda.get_current_stream().synchronize()


def take_gpu(number: int) -> None:
    """Let cupy use the GPU of this number from now on, counted round where there are fewer.

    Raises:
        TransportError: there is no cupy.
        ArgumentError: it finds no GPU.
    """
    cupy = import_cupy()
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:  # as CUDA's errors are
        raise ArgumentError(f"cupy finds no GPU ({error}): leave out --array cupy") from error
    if not devices:
        raise ArgumentError("cupy finds no GPU: leave out --array cupy")
    cupy.cuda.Device(number % devices).use()


def import_torch() -> Any:
    """torch, or an error that says how to install it."""
    return import_or("torch", "pip install 'abccl[torch]'")


def import_cupy() -> Any:
    """cupy, or an error that says how to install it."""
    return import_or("cupy", "pip install cupy-cuda12x, or leave out --array cupy")


def _registered(comm: Communicator) -> Any:
    """The communicator's allocator of registered memory."""
    allocate = getattr(comm, "empty", None)
    if allocate is None:
        raise ArgumentError("this abccl has no registered memory (comm.empty): leave out --registered")
    return allocate
