"""Random elements of every type as bytes, what the native core makes of them, and how results are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from abccl.transports import _native
from abccl.transports.types import NUMBERS, Op, element_type

Bytes = npt.NDArray[np.uint8]

_FLOATS = {"float16": "f2", "float32": "f4", "float64": "f8", "complex64": "f4", "complex128": "f8"}


def operators(dtype: str) -> list[Op]:
    """The operators that fold this type."""
    return [op for op in Op if _native.op_defined(int(op), NUMBERS[dtype])]


def tame(generator: np.random.Generator, dtype: str, count: int) -> Bytes:
    """Elements that sums and products of some keep finite; integers are any."""
    if dtype == "bool":
        return generator.integers(0, 2, count, np.uint8)
    if element_type(dtype).kind in "iu":
        return wild(generator, dtype, count)
    if dtype == "bfloat16":
        return (generator.standard_normal(count, np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    numbers = generator.standard_normal(count * (2 if dtype.startswith("complex") else 1))
    return numbers.astype(_FLOATS[dtype]).view(np.uint8)


def wild(generator: np.random.Generator, dtype: str, count: int) -> Bytes:
    """Any bits: infinities, NaN, numbers below the normal ones, extremes. (A bool has two values.)"""
    if dtype == "bool":
        return tame(generator, dtype, count)
    return generator.integers(0, 256, count * element_type(dtype).itemsize, np.uint8)


def folded(dtype: str, op: Op, sources: Sequence[Bytes], count: int) -> Bytes:
    """The native core's fold."""
    result = np.empty(count * element_type(dtype).itemsize, np.uint8)
    _native.fold(NUMBERS[dtype], int(op), result.ctypes.data, [source.ctypes.data for source in sources], count)
    return result


def scaled(dtype: str, source: Bytes, factor: float, count: int) -> Bytes:
    """The native core's scaling."""
    result = np.empty(count * element_type(dtype).itemsize, np.uint8)
    _native.scale(NUMBERS[dtype], result.ctypes.data, source.ctypes.data, factor, count)
    return result


def _is_nan(dtype: str, data: Bytes) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        return (data.view(np.uint16) & 0x7FFF) > 0x7F80
    nan: npt.NDArray[Any] = np.isnan(data.view(_FLOATS[dtype]))
    return nan


def difference(dtype: str, wanted: Bytes, came: Bytes) -> str | None:
    """Where two results differ in a bit. One NaN is as good as another: processors give them different bits."""
    if np.array_equal(wanted, came):
        return None
    if dtype in _FLOATS or dtype == "bfloat16":
        part = 2 if dtype == "bfloat16" else np.dtype(_FLOATS[dtype]).itemsize
        unequal = (wanted.reshape(-1, part) != came.reshape(-1, part)).any(axis=1)
        unequal &= ~(_is_nan(dtype, wanted) & _is_nan(dtype, came))
    else:
        part = element_type(dtype).itemsize
        unequal = (wanted.reshape(-1, part) != came.reshape(-1, part)).any(axis=1)
    places = np.flatnonzero(unequal)
    if not places.size:
        return None
    at = int(places[0])
    bits = [data[at * part : (at + 1) * part][::-1].tobytes().hex() for data in (wanted, came)]
    return f"{places.size} of {unequal.size} differ, the first is {at}: wanted {bits[0]}, and {bits[1]} came"
