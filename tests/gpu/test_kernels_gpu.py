"""The kernels on the device against the native core, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from gpu import elements
from gpu.device import FAKE, Memory

from abccl.cuda.compile import SOURCES
from abccl.transports.types import TYPES, Op, element_type

NAMES = [element.name for element in TYPES]
COUNTS = (0, 1, 7, 16, 1023) if FAKE else (0, 1, 2, 7, 8, 15, 16, 17, 1023, 65_537, 3_000_001)
GUARD = 64
SEED = 8


class Fold:
    """Sources on the host and on the device, and a place for the result with a guard before and behind it."""

    def __init__(self, driver: Any, dtype: str, sources: Sequence[elements.Bytes], shifts: Sequence[int]) -> None:
        self.dtype, self.sources = dtype, sources
        self.nbytes = sources[0].nbytes
        self.count = self.nbytes // element_type(dtype).itemsize
        self.stack = ExitStack()
        self.places = [
            self.stack.enter_context(Memory(driver, self.nbytes + shift + 2 * GUARD))
            for shift in (shifts[-1], *shifts[:-1])
        ]
        self.shifts = (shifts[-1], *shifts[:-1])
        for place, shift, data in zip(self.places[1:], self.shifts[1:], sources, strict=True):
            place.write(data, GUARD + shift)

    @property
    def addresses(self) -> list[int]:
        """Of the result, and of the sources."""
        return [place.address + GUARD + shift for place, shift in zip(self.places, self.shifts, strict=True)]

    def guard(self, index: int) -> None:
        """Fill the place of the result (0) or a source with a pattern, but for the source's elements."""
        data = np.full(self.places[index].nbytes, 0xA5, np.uint8)
        if index:
            begin = GUARD + self.shifts[index]
            data[begin : begin + self.nbytes] = self.sources[index - 1]
        self.places[index].write(data)

    def result(self, index: int) -> elements.Bytes:
        """What is there now; nothing beside it may have been written."""
        data = self.places[index].read()
        begin = GUARD + self.shifts[index]
        beside = np.concatenate([data[:begin], data[begin + self.nbytes :]])
        assert (beside == 0xA5).all(), "the kernel wrote beside its result"
        return data[begin : begin + self.nbytes]


def check(driver: Any, kernels: Any, stream: int, fold: Fold, op: Op, into: int) -> None:
    """Fold into the place of the result (0), or into that of a source."""
    fold.guard(into)
    sources = fold.addresses[1:]
    kernels.fold(fold.dtype, int(op), fold.addresses[into], sources, fold.count, stream)
    driver.synchronize(stream)
    wanted = elements.folded(fold.dtype, op, fold.sources, fold.count)
    wrong = elements.difference(fold.dtype, wanted, fold.result(into))
    place = "a place of its own" if into == 0 else f"source {into - 1}"
    assert wrong is None, (
        f"{op.name} of {len(sources)} x {fold.count} {fold.dtype} at {fold.shifts}, into {place}: {wrong}"
    )


def run(driver: Any, kernels: Any, stream: int, dtype: str, sources: int, count: int, shifts: Sequence[int]) -> None:
    """All operators on tame and wild data, into a place of its own and in place."""
    generator = np.random.default_rng([SEED, count, sources])
    for make in (elements.tame, elements.wild):
        data = [make(generator, dtype, count) for _ in range(sources)]
        fold = Fold(driver, dtype, data, shifts)
        with fold.stack:
            for op in elements.operators(dtype):
                check(driver, kernels, stream, fold, op, 0)
            check(driver, kernels, stream, fold, Op.SUM, sources)


@pytest.mark.parametrize("dtype", NAMES)
def test_folds_of_all_lengths(driver: Any, kernels: Any, stream: int, dtype: str) -> None:
    for count in COUNTS:
        run(driver, kernels, stream, dtype, 3, count, (0, 0, 0, 0))


@pytest.mark.parametrize("dtype", NAMES)
def test_folds_of_any_number_of_sources(driver: Any, kernels: Any, stream: int, dtype: str) -> None:
    for sources in (1, 2, 3, 4, 8, 64, SOURCES):
        run(driver, kernels, stream, dtype, sources, 100, (0,) * (sources + 1))


@pytest.mark.parametrize("dtype", NAMES)
def test_folds_at_any_alignment(driver: Any, kernels: Any, stream: int, dtype: str) -> None:
    """All off by the same, which can be peeled; and each by another, which can not."""
    size = element_type(dtype).itemsize
    for shifts in ((size, size, size), (15 * size, 15 * size, 15 * size), (0, 0, size), (size, 2 * size, 3 * size)):
        run(driver, kernels, stream, dtype, 2, 1000, shifts)


@pytest.mark.parametrize("dtype", [name for name in NAMES if element_type(name).kind in "fc"])
def test_scaling(driver: Any, kernels: Any, stream: int, dtype: str) -> None:
    generator = np.random.default_rng(SEED)
    size = element_type(dtype).itemsize
    for count in COUNTS:
        for make in (elements.tame, elements.wild):
            data = make(generator, dtype, count)
            with Memory(driver, data.nbytes + size) as source, Memory(driver, data.nbytes) as result:
                for shift in (0, size):
                    source.write(data, shift)
                    for factor in (1 / 3, 0.5):
                        kernels.scale(dtype, result.address, source.address + shift, factor, count, stream)
                        driver.synchronize(stream)
                        came = result.read(data.nbytes)
                        wrong = elements.difference(dtype, elements.scaled(dtype, data, factor, count), came)
                        assert wrong is None, f"{count} {dtype} by {factor}, off by {shift}: {wrong}"


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_gathers(driver: Any, kernels: Any, stream: int, count: int) -> None:
    """Pieces of any length from anywhere to anywhere, also empty ones, and nothing beside them."""
    generator = np.random.default_rng(SEED + count)
    longest = 3000 if FAKE else 100_000
    lengths = [0 if i == 3 else int(generator.integers(1, longest)) for i in range(count)]
    gaps = [int(generator.integers(0, 40)) for _ in range(count)]
    total = sum(lengths) + sum(gaps)
    data = generator.integers(0, 256, total, np.uint8)
    wanted = np.full(total, 0xA5, np.uint8)
    with Memory(driver, total) as source, Memory(driver, total) as result:
        source.write(data)
        result.write(wanted)
        pieces, at = [], 0
        order = generator.permutation(count)
        begins = dict(zip(order, np.cumsum([0, *(lengths[i] for i in order)]), strict=False))
        for index, (length, gap) in enumerate(zip(lengths, gaps, strict=True)):
            begin = int(begins[index])
            pieces.append((result.address + at, source.address + begin, length))
            wanted[at : at + length] = data[begin : begin + length]
            at += length + gap
        kernels.gather(pieces, stream)
        driver.synchronize(stream)
        assert np.array_equal(result.read(total), wanted)


def test_ticks(driver: Any, kernels: Any, stream: int) -> None:
    with Memory(driver, 12) as words:
        words.write(np.array([5, 0xFFFFFFFF, 5], np.uint32))
        for _ in range(3):
            kernels.tick(words.address + 4, stream)
        driver.synchronize(stream)
        assert words.read().view(np.uint32).tolist() == [5, 2, 5]
