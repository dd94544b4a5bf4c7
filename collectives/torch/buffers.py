"""Between torch's lists of tensors of any layout and the flat contiguous buffers that the communicator takes.

A tensor that is contiguous is used as it is, and so are tensors that lie one behind the other in one storage, as the
pieces of `chunk` and `split` do. Everything else goes through a flat copy: on CUDA by the stream that is current then,
the caller's before an operation, the waiter's behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...transports.types import NUMBERS
from . import streams
from .errors import torch_error

_SERVED = frozenset(getattr(torch, name) for name in NUMBERS if hasattr(torch, name))

Finish = Callable[[], None]
"""Copies a result to where it belongs, once it is there."""


def plain(tensor: Tensor) -> bool:
    """Whether the communicator can read and write the tensor where it lies."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def as_bytes(flat: Tensor) -> Tensor:
    """A contiguous tensor of an element type that is only moved, not computed with (float8, ...), as bytes."""
    return flat if flat.dtype in _SERVED else flat.detach().view(-1).view(torch.uint8)


def as_reals(flat: Tensor, operator: Any) -> Tensor:
    """A contiguous tensor of complex32, which the communicator has not, as float16 where that gives the same."""
    real = flat.dtype == torch.complex32 and operator in ("sum", "avg")
    return torch.view_as_real(flat.detach()) if real else flat


def reading(tensor: Tensor) -> Tensor:
    """A contiguous buffer with the values of the tensor."""
    return tensor if plain(tensor) else tensor.detach().resolve_conj().resolve_neg().contiguous()


def writing(tensor: Tensor) -> tuple[Tensor, Finish | None]:
    """A contiguous buffer for the values of the tensor, and what takes them there if it is another's memory."""
    if plain(tensor):
        return tensor, None
    _check_distinct(tensor)
    target = tensor.detach()
    flat = target.new_empty(target.shape)
    return flat, lambda: _copy(target, flat)


def changing(tensor: Tensor) -> tuple[Tensor, Finish | None]:
    """Like `writing`, filled with the values of the tensor."""
    flat, finish = writing(tensor)
    if finish is not None:
        flat.copy_(tensor.detach())
    return flat, finish


def sent(tensor: Tensor) -> Tensor:
    """Like `reading`, in host memory, where messages are matched. The host waits for the current stream."""
    x = reading(tensor)
    return x if streams.device_of(x) is None else streams.host_memory(x).copy_(x.detach())


def received(tensor: Tensor) -> tuple[Tensor, Finish | None]:
    """Like `writing`, in host memory."""
    if streams.device_of(tensor) is None:
        return writing(tensor)
    _check_distinct(tensor)
    target, host = tensor.detach(), streams.host_memory(tensor)

    def finish() -> None:
        target.copy_(host, non_blocking=True)
        streams.keep(target)

    return host, finish


def reading_all(tensors: Sequence[Tensor]) -> Tensor:
    """A flat buffer with the values of all tensors, one after the other."""
    joined = _joined(tensors)
    if joined is not None:
        return joined
    check_one_device(tensors)
    return torch.cat([reading(tensor).detach().view(-1) for tensor in tensors])


def writing_all(tensors: Sequence[Tensor]) -> tuple[Tensor, Finish | None]:
    """A flat buffer for the values of all tensors, and what takes them there if it is another's memory."""
    joined = _joined(tensors)
    if joined is not None:
        return joined, None
    check_one_device(tensors)
    for tensor in tensors:
        _check_distinct(tensor)
    sizes = [tensor.numel() for tensor in tensors]
    flat = tensors[0].new_empty(sum(sizes))

    def finish() -> None:
        for tensor, piece in zip(tensors, torch.split(flat, sizes)):
            _copy(tensor.detach(), piece)

    return flat, finish


def check_one_device(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors of several devices before any is used."""
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        found = " and ".join(sorted(devices))
        raise torch_error(ArgumentError(f"tensors on {found} in one call: all must be on one device"))


def _check_distinct(target: Tensor) -> None:
    if any(stride == 0 and extent > 1 for stride, extent in zip(target.stride(), target.shape)):
        raise torch_error(
            ArgumentError(f"a tensor of shape {tuple(target.shape)} holds elements several times: pass a copy of it")
        )


def _copy(target: Tensor, flat: Tensor) -> None:
    target.copy_(flat.view(target.shape))
    streams.keep(target, flat)


def _joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """One flat view of tensors that lie one behind the other; None if they do not."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.detach().view(-1) if plain(first) else None
    storage = first.untyped_storage()
    address, offset = storage.data_ptr(), first.storage_offset()
    count = 0
    for tensor in tensors:
        if (
            not plain(tensor)
            or tensor.dtype != first.dtype
            or tensor.storage_offset() != offset + count
            or tensor.untyped_storage().data_ptr() != address
        ):
            return None
        count += tensor.numel()
    return first.detach().as_strided((count,), (1,), offset)
