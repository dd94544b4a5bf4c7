"""The MPI library's own collectives, non-blocking, on the buffers of a plan."""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..algorithms import Collective
from ..errors import AbcclError, Aborted, ArgumentError, DeadlineExceeded, Mismatch, PeerLost
from .contract import Execution, NativeCall
from .types import element_type

if TYPE_CHECKING:
    from .mpi import MPITransport

COLLECTIVES = frozenset(Collective)
"""What MPI has of its own: everything."""

_TYPES = {"float32": "FLOAT", "float64": "DOUBLE", "bool": "C_BOOL"}
_TYPES |= {"complex64": "C_FLOAT_COMPLEX", "complex128": "C_DOUBLE_COMPLEX"}
_OF_BYTES = {1: "BYTE", 2: "UINT16_T", 4: "UINT32_T", 8: "UINT64_T", 16: "C_DOUBLE_COMPLEX"}
_LOGICAL = {"sum": "LOR", "max": "LOR", "bor": "LOR", "prod": "LAND", "min": "LAND", "band": "LAND", "bxor": "LXOR"}


def mpi_type(mpi: Any, dtype: str, reduces: bool = True) -> Any:
    """MPI's predefined type for an element type of abccl.

    A duplicate, as mpi4py.util.dtlib makes, would be refused by MPI's operators. What is only moved may be any type.

    Raises:
        ArgumentError: MPI can not reduce it.
    """
    element = element_type(dtype)
    name = _TYPES.get(dtype) or (f"{dtype.upper()}_T" if element.kind in "iu" else None)
    if name is None and not reduces:
        name = _OF_BYTES[element.itemsize]
    if name is None:
        raise ArgumentError(f"MPI does not reduce {dtype}: take another algorithm, or convert to float32")
    return getattr(mpi, name)


def mpi_operator(mpi: Any, op: str, dtype: str) -> Any:
    """MPI's operator; a bool is a truth value, as in `transports.types`.

    Raises:
        ArgumentError: MPI has none of that name.
    """
    name = _LOGICAL.get(op, "") if dtype == "bool" else op.upper()
    if name not in {"SUM", "PROD", "MIN", "MAX", "BAND", "BOR", "BXOR", *_LOGICAL.values()}:
        raise ArgumentError(f"MPI has no operator {op}: take another algorithm, or one of sum, prod, min, max, band, bor, bxor")
    return getattr(mpi, name)
