"""Messages through pinned host memory between two processes on the one device, over shared memory."""

from __future__ import annotations

import pytest
from gpu import staging

import abccl
from abccl.algorithms.words import in_words

pytestmark = [pytest.mark.timeout(600), pytest.mark.ranks]


def test_plans() -> None:
    assert abccl.spawn(staging.conform, 2, timeout=300) == ["", ""]


def test_bandwidth() -> None:
    """Prints how fast an all_reduce is; what it gives is checked."""
    found, _ = abccl.spawn(staging.bandwidth, 2, timeout=300)
    for slot_bytes, lanes, speed in found:
        print(f"slots of {in_words(slot_bytes)}, {lanes} lanes: {speed / 1e9:.2f} GB/s of the vector")
