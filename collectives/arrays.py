"""What a call must know of an array before anything is sent, and what is wrong with it if it will not do."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..transports.types import NUMBERS

Array = Any
"""A numpy array or a torch tensor on the CPU."""


@dataclass(frozen=True, slots=True)
class View:
    """A contiguous array in host memory.

    Attributes:
        name: the parameter that it came as, for messages.
        dtype: its element type, as `transports.types` spells it.
        count: how many elements it has.
        itemsize: bytes of an element.
        address: of its first element.
    """

    name: str
    dtype: str
    count: int
    itemsize: int
    address: int

    @property
    def end(self) -> int:
        """The address behind its last byte."""
        return self.address + self.count * self.itemsize


def view(array: Array, name: str, call: str, writable: bool = False) -> View:
    """Look at a numpy array or torch CPU tensor.

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
    else:
        wanted = "numpy array or torch CPU tensor"
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
    if tensor.device.type != "cpu":
        raise ArgumentError(
            f"{call}: {name} is on {tensor.device}, and this communicator's transport serves the CPU: "
            f"pass {name}.cpu(), or use backend nccl for CUDA tensors"
        )
    if not tensor.is_contiguous():
        raise ArgumentError(
            f"{call}: {name} (shape {tuple(tensor.shape)}, strides {tensor.stride()}) is not contiguous: pass "
            f"{name}.contiguous()"
        )
    if tensor.is_conj() or tensor.is_neg():
        lazy = "conj" if tensor.is_conj() else "neg"
        raise ArgumentError(f"{call}: {name} is a lazy {lazy} view of other memory: pass {name}.resolve_{lazy}()")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return View(name, dtype, tensor.numel(), tensor.element_size(), tensor.data_ptr())
