"""What CUDA tensors ask of torch: streams, events, and futures that know of them. Only this file here calls torch.cuda.

The memory of a tensor may be given out again once nobody refers to it, to whatever is enqueued next on the stream that
it was made on. An operation under way refers to its tensors until the device is done (see `DeviceWork`), which holds
wherever they come from, and keeps them no longer than that. Copies by another stream have nobody who would look when
they are done: `keep` tells torch's allocator of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_cuda: Any = torch.cuda


def device_of(result: Any) -> torch.device | None:
    """The CUDA device of a tensor, or of the first in nested lists; None if it is elsewhere, or there is none."""
    while isinstance(result, (list, tuple)):
        if not result:
            return None
        result = result[0]
    return result.device if result.is_cuda else None


def here(device: torch.device) -> Any:
    """An event behind all that the device's current stream has been given."""
    event = _cuda.Event()
    event.record(_cuda.current_stream(device))
    return event


def wait(event: Any, device: torch.device) -> None:
    """Have the device's current stream wait for the event."""
    _cuda.current_stream(device).wait_event(event)


def another(device: torch.device) -> AbstractContextManager[Any]:
    """Makes another stream, of torch's pool, the current one. It waits for nothing yet."""
    return torch.cuda.stream(_cuda.Stream(device))


def future(device: torch.device) -> Any:
    """A future of tensors there: set on one stream, its callbacks and who waits for it come behind that stream."""
    return torch.futures.Future(devices=[device])


def host_memory(like: Tensor) -> Tensor:
    """Undefined elements, that the device copies to and from without a copy between."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def keep(*tensors: Tensor) -> None:
    """The current stream uses these: their memory is given to nobody else before it has done so."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
