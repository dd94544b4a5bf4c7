"""The conformance suite for transports whose plans take long: among fewer numbers of ranks.

The engine that runs the plans is the one of the inproc transport, whose tests take all numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from abccl.transports import conformance


def few_plans(check: Callable[..., None], sizes: Sequence[int] = (1, 2, 5)) -> Callable[..., None]:
    """A check of the suite; the one of plans is among these numbers of ranks."""
    return partial(check, sizes=sizes) if check is conformance.check_plans else check
