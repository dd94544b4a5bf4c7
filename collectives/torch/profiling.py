"""Collectives in the timelines of torch.profiler, as `abccl:all_reduce(ring)`.

A synchronous one is a slice of its caller's thread; an asynchronous one begins with the call and ends when it is
finished.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.autograd.profiler import record_function

from ..communicator import Communicator
from .futures import Completion, GroupWork


class Observer:
    """Tells torch's profiler of a communicator's collectives, while it listens."""

    def __init__(self, communicator: Communicator, completion: Completion) -> None:
        self._communicator = communicator
        self._begin = partial(_begin, completion)
        self._watching = False

    def look(self) -> None:
        """Start or stop as the profiler has. Called before each collective, so it must cost next to nothing."""
        if _profiler_enabled() is not self._watching:
            self._watching = not self._watching
            self._communicator._dispatcher.set_observer(self._begin if self._watching else None)


def _begin(completion: Completion, text: str) -> Callable[[Any], None]:
    collective, _, details = text.partition("(")
    algorithm = details.removesuffix(")").rpartition(", ")[2]
    record: Any = record_function(f"abccl:{collective}({algorithm})", text)
    record.__enter__()

    def end(work: Any) -> None:
        if work is None:
            record.__exit__(None, None, None)
        else:
            record._call_end_callbacks_on_future(GroupWork([work], [], None, completion).get_future())

    return end
