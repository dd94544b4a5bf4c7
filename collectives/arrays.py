"""What a call must know of an array before anything is sent, and what is wrong with it if it will not do."""

from __future__ import annotations

import ctypes
import math
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..transports.types import NUMBERS

Array = Any
"""A numpy array, a torch tensor, or an array of CuPy's or of any other library that has `__cuda_array_interface__`."""


CPU = "cpu"


@dataclass(frozen=True, slots=True)
class View:
    """A contiguous array.

    Attributes:
        name: the parameter that it came as, for messages.
        dtype: its element type, as `transports.types` spells it.
        count: how many elements it has.
        itemsize: bytes of an element.
        address: of its first element.
        device: where it is: "cpu", or "cuda:1".
        writable: whether it may be written to.
    """

    name: str
    dtype: str
    count: int
    itemsize: int
    address: int
    device: str = CPU
    writable: bool = True

    @property
    def end(self) -> int:
        """The address behind its last byte."""
        return self.address + self.count * self.itemsize


def view(array: Array, name: str, call: str, writable: bool = False) -> View:
    """Look at an array.

    Args:
        name: the parameter's name.
        call: the collective's name; both for messages.
        writable: whether the call writes to it.

    Raises:
        ArgumentError: it is something else, not contiguous, read-only, or of an element type that is not served.
    """
    if isinstance(array, np.ndarray):
        found = _numpy_view(array, name, call, writable)
    elif _is_tensor(array):
        found = _torch_view(array, name, call)
    elif hasattr(type(array), "__cuda_array_interface__"):
        found = _cuda_view(array, name, call, writable)
    else:
        wanted = "numpy array, torch tensor or CuPy array"
        raise ArgumentError(
            f"{call}: {name} must be a {wanted}, and is {type(array).__name__}"
            + (": wrap it in numpy.asarray(...)" if isinstance(array, (list, tuple, int, float)) else "")
        )
    if found.dtype not in NUMBERS:
        raise ArgumentError(f"{call}: {name} has element type {found.dtype}: convert it to one of {', '.join(NUMBERS)}")
    return found


def bytes_at(address: int, nbytes: int, owner: Any) -> memoryview:
    """The memory there, which lives as long as the view, by its owner."""
    if not nbytes:
        return memoryview(bytearray())
    memory: Any = (ctypes.c_char * nbytes).from_address(address)
    memory.owner = owner
    return memoryview(memory).cast("B")


def _is_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _numpy_view(array: np.ndarray[Any, Any], name: str, call: str, writable: bool) -> View:
    if not array.flags.c_contiguous:
        raise ArgumentError(
            f"{call}: {name} (shape {array.shape}, strides {array.strides}) is not contiguous: pass "
            f"numpy.ascontiguousarray({name})" + (" and copy the result back" if writable else "")
        )
    if writable and not array.flags.writeable:
        raise ArgumentError(f"{call}: {name} is read-only, and the result goes there: pass a copy")
    if not array.dtype.isnative:
        raise ArgumentError(f"{call}: {name} is of foreign byte order ({array.dtype}): pass {name}.astype(native)")
    return View(name, array.dtype.name, array.size, array.itemsize, array.ctypes.data)


def _torch_view(tensor: Any, name: str, call: str) -> View:
    if str(tensor.layout) != "torch.strided":
        raise ArgumentError(f"{call}: {name} is of layout {tensor.layout}: pass {name}.to_dense()")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"{call}: {name} is on {tensor.device}: pass {name}.cpu(), or a tensor on a CUDA device")
    if not tensor.is_contiguous():
        raise ArgumentError(
            f"{call}: {name} (shape {tuple(tensor.shape)}, strides {tensor.stride()}) is not contiguous: pass "
            f"{name}.contiguous()"
        )
    if tensor.is_conj() or tensor.is_neg():
        lazy = "conj" if tensor.is_conj() else "neg"
        raise ArgumentError(f"{call}: {name} is a lazy {lazy} view of other memory: pass {name}.resolve_{lazy}()")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return View(name, dtype, tensor.numel(), tensor.element_size(), tensor.data_ptr(), str(tensor.device))


def _cuda_view(array: Any, name: str, call: str, writable: bool) -> View:
    """By https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, up to its version 3."""
    interface = array.__cuda_array_interface__
    shape, strides, (address, read_only) = interface["shape"], interface.get("strides"), interface["data"]
    if interface.get("mask") is not None:
        raise ArgumentError(f"{call}: {name} is masked: pass an array of all its elements")
    if writable and read_only:
        raise ArgumentError(f"{call}: {name} is read-only, and the result goes there: pass a copy")
    dtype = getattr(array, "dtype", None) or interface["typestr"]
    spelled, itemsize, is_native = _element_type(dtype)
    if not is_native:
        raise ArgumentError(f"{call}: {name} is of foreign byte order ({dtype}): pass {name}.astype(native)")
    count = math.prod(shape)
    if strides is not None and count > 1:
        step = itemsize
        for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
            if extent > 1 and stride != step:
                raise ArgumentError(
                    f"{call}: {name} (shape {shape}, strides {strides}) is not contiguous: pass "
                    f"cupy.ascontiguousarray({name})" + (" and copy the result back" if writable else "")
                )
            step *= extent
    return View(name, spelled, count, itemsize, address or 0, f"cuda:{_ordinal(array)}", not read_only)


@cache
def _element_type(dtype: Any) -> tuple[str, int, bool]:
    """Its name, the bytes of an element, and whether its bytes are in this machine's order."""
    if str(dtype) == "bfloat16":  # numpy has none of its own
        return "bfloat16", 2, True
    known = np.dtype(str(dtype))
    return known.name, known.itemsize, bool(known.isnative)


def _ordinal(array: Any) -> str:
    """The number of the array's device; "" if it does not tell, and its address must be asked."""
    found = getattr(getattr(array, "device", None), "id", "")
    return str(found)


def is_on_device(array: Any) -> bool:
    """Whether the array is in the memory of a CUDA device."""
    if isinstance(array, np.ndarray) or array is None:
        return False
    return bool(array.is_cuda) if _is_tensor(array) else hasattr(type(array), "__cuda_array_interface__")


def current_stream(array: Any) -> int:
    """The stream that the library which the array comes from works on now, in this thread."""
    if _is_tensor(array):
        return int(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)
    cupy = sys.modules.get("cupy")
    # While another thread imports it, it has no arrays yet.
    if cupy is not None and hasattr(cupy, "ndarray") and isinstance(array, cupy.ndarray):
        return int(cupy.cuda.get_current_stream(array.device.id).ptr)
    stream = array.__cuda_array_interface__.get("stream")
    return 0 if stream in (None, _LEGACY_DEFAULT) else int(stream)


_LEGACY_DEFAULT = 1  # as the interface spells it; 0 is not allowed there
