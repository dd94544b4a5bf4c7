"""A Communicator of processes that share the one device, with cupy's arrays and torch's CUDA tensors."""

from __future__ import annotations

import pytest
from gpu import arrays
from gpu.device import FAKE

import abccl

pytestmark = [pytest.mark.timeout(600), pytest.mark.ranks]

real = pytest.mark.skipif(FAKE, reason="needs a real GPU's streams and graphs")


# The fake driver tries the functions, and torch's tensors are on the CPU there.
SIZES = {"cupy": [1, 3], "torch": [2]} if FAKE else {"cupy": [1, 2, 3, 4], "torch": [1, 2, 3, 4]}


@pytest.mark.parametrize(("library", "size"), [(library, size) for library in SIZES for size in SIZES[library]])
def test_collectives(library: str, size: int) -> None:
    pytest.importorskip(library)
    assert abccl.spawn(arrays.collectives, size, args=(library,), timeout=300) == [[]] * size


@real
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_work_follows_the_current_stream(library: str) -> None:
    pytest.importorskip(library)
    assert abccl.spawn(arrays.streams, 2, args=(library,), timeout=300) == [[]] * 2


@real
@pytest.mark.parametrize("size", [2, 3])
def test_torchs_graph_is_replayed(size: int) -> None:
    pytest.importorskip("torch")
    assert abccl.spawn(arrays.graph, size, args=(1000,), timeout=300) == ["1003 steps, 0 wrong elements"] * size


def test_arrays_of_host_and_device_in_one_call_are_refused() -> None:
    pytest.importorskip("cupy")
    for text in abccl.spawn(arrays.mixed, 2, timeout=120):
        assert "host" in text or "cpu" in text.lower(), text
