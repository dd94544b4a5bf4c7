"""Collectives in the timelines of torch.profiler, as `abccl:all_reduce(ring)`: slices of the threads that call them.

The slice of an asynchronous one is the call that starts it. The profiler frees what it has recorded when it stops, so a
slice that ends later, when the collective is finished, ends in freed memory and takes the process down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.autograd.profiler import record_function

from ..communicator import Communicator


class Observer:
    """Tells torch's profiler of a communicator's collectives, while it listens."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._watching = False

    def look(self) -> None:
        """Start or stop as the profiler has. Called before each collective, so it must cost next to nothing."""
        if _profiler_enabled() is not self._watching:
            self._watching = not self._watching
            self._communicator.observe(_begin if self._watching else None)


def _begin(text: str) -> Callable[[Any], None]:
    collective, _, details = text.partition("(")
    algorithm = details.removesuffix(")").rpartition(", ")[2]
    record: Any = record_function(f"abccl:{collective}({algorithm})", text)
    record.__enter__()
    return lambda work: record.__exit__(None, None, None)
