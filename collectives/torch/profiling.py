"""Collectives in the timelines of torch.profiler: slices of the threads that call them.

A slice has the name that the flight recorder has for the call: `abccl:all_reduce(float32, sum, 1024 elements, ring)`.

The slice of an asynchronous one is the call that starts it. The profiler frees what it has recorded when it stops, so a
slice that ends later, when the collective is finished, ends in freed memory and takes the process down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.autograd.profiler import record_function

profiling: Callable[[], bool] = _profiler_enabled
"""Whether torch's profiler listens. Asked before each collective: 50 ns."""


def record(text: str) -> Callable[[Any], None]:
    """Begin a slice for a call in words, and return what ends it: see `Communicator.observe`."""
    slice: Any = record_function(f"abccl:{text}")
    slice.__enter__()
    return lambda work: slice.__exit__(None, None, None)
