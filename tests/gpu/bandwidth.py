"""How fast the kernels read and write, by a copy within the device that moves as many bytes.

Bytes are counted as read plus written: a fold of k sources of n bytes moves (k + 1) n, and is held against a copy of
(k + 1) n / 2. The two take turns, each some times in a CUDA graph between two events of the device; medians over rounds
are compared. The data is random and every result is compared with the native core's. Both sides find their data where
the run before left it: small sizes come from the device's cache.

The bar is for folds of the six types that must be fast, from 64 MiB per source up, where no cache helps.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
from gpu import elements
from gpu.checks import FIGURES_FILE
from gpu.device import FAKE, Memory, make_driver, make_kernels

from abccl.algorithms.words import in_words
from abccl.transports.types import Op, element_type

BAR = 0.85
BAR_FROM = 64 << 20
FAST_TYPES = ("float32", "float16", "bfloat16", "float64", "int32", "int64")
SIZES = (64 << 10, 256 << 10) if FAKE else (64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30)
FOLDED = (2, 4, 8)
PIECES = 16
ROUNDS, BATCH = (3, 2e-4) if FAKE else (15, 2e-3)

PERIOD = 16 * 524_287
"""Bytes after which random data repeats: 16 times a prime, so that pieces of a kernel's work do not see the same."""


class Bench:
    """The device, its memory of this run, and the table."""

    def __init__(self) -> None:
        self.driver = make_driver()
        self.kernels = make_kernels(self.driver)
        self.stream = self.driver.create_stream()
        self.events = [self.driver.create_event(timing=True) for _ in range(2)]
        self.generator = np.random.default_rng(8)
        self.rows: list[list[str]] = []
        self.below: list[str] = []
        self.least = float("inf")

    def captured(self, work: Callable[[], None], times: int) -> int:
        """A graph of `times` runs in a row: launching it costs the host the same whatever is in it."""
        self.driver.begin_capture(self.stream)
        for _ in range(times):
            work()
        return int(self.driver.end_capture(self.stream))

    def seconds(self, graph: int) -> float:
        """Of a graph, on the device's clock."""
        begin, end = self.events
        self.driver.record(begin, self.stream)
        self.driver.launch_graph(graph, self.stream)
        self.driver.record(end, self.stream)
        self.driver.synchronize_event(end)
        return float(self.driver.elapsed(begin, end))

    def compare(
        self, what: str, dtype: str, size: int, moved: int, work: Callable[[], None], copy: Callable[[], None]
    ) -> None:
        """Time both in turns, and add a row."""
        for either in (work, copy):  # outside of a capture first: a kernel may be loaded then
            either()
        self.driver.synchronize(self.stream)
        trial = self.captured(copy, 1)
        self.seconds(trial)
        times = max(1, min(100, int(BATCH / max(self.seconds(trial), 1e-7))))
        graphs = [self.captured(either, times) for either in (work, copy)]
        for graph in graphs:
            self.seconds(graph)
        taken = [[self.seconds(graph) / times for graph in graphs] for _ in range(ROUNDS)]
        ours, theirs = (statistics.median(column) for column in zip(*taken, strict=True))
        for graph in (trial, *graphs):
            self.driver.destroy_graph(graph)
        ratio = theirs / ours
        held = what.startswith("fold") and dtype in FAST_TYPES and size >= BAR_FROM
        if held:
            self.least = min(self.least, ratio)
            if ratio < BAR:
                self.below.append(f"{what} of {in_words(size)} {dtype}: {ratio:.2f}")
        verdict = "" if not held else "pass" if ratio >= BAR else "BELOW"
        rates = [f"{moved / seconds / 1e9:.1f}" for seconds in (ours, theirs)]
        row = [what, dtype, in_words(size), *rates, f"{ratio:.2f}", verdict]
        self.rows.append(row)
        print("  ".join(row), flush=True)

    def fold(self, dtype: str, size: int, most: int) -> None:
        """Fold 2, 4 and 8 sources of `size` bytes."""
        count = size // element_type(dtype).itemsize
        period = min(size, PERIOD)
        with ExitStack() as stack:
            data = [elements.tame(self.generator, dtype, period // element_type(dtype).itemsize) for _ in range(most)]
            places = [stack.enter_context(Memory(self.driver, size)) for _ in range(most)]
            for place, block in zip(places, data, strict=True):
                self.fill(place, block, size)
            result = stack.enter_context(Memory(self.driver, size))
            # A copy of (k + 1) / 2 sources reads and writes as much as a fold of k.
            longest = (most + 1) * size // 2
            source, target = (stack.enter_context(Memory(self.driver, longest)) for _ in range(2))
            self.driver.fill(source.address, 1, longest, self.stream)
            for sources in (k for k in FOLDED if k <= most):
                moved = (sources + 1) * size
                addresses = [place.address for place in places[:sources]]

                def work(addresses: list[int] = addresses) -> None:
                    self.kernels.fold(dtype, int(Op.SUM), result.address, addresses, count, self.stream)

                def copy(nbytes: int = moved // 2) -> None:
                    self.driver.copy(target.address, source.address, nbytes, self.stream)

                self.compare(f"fold of {sources}", dtype, size, moved, work, copy)
                wanted = elements.folded(dtype, Op.SUM, data[:sources], period // element_type(dtype).itemsize)
                self.verify(dtype, result, wanted, size)

    def gather(self, size: int) -> None:
        """Move `size` bytes in 16 pieces, in another order."""
        with ExitStack() as stack:
            source, result, target = (stack.enter_context(Memory(self.driver, size)) for _ in range(3))
            block = self.generator.integers(0, 256, min(size, PERIOD), np.uint8)
            self.fill(source, block, size)
            part = size // PIECES
            order = [int(index) for index in self.generator.permutation(PIECES)]
            pieces = [(result.address + to * part, source.address + of * part, part) for to, of in enumerate(order)]
            self.compare(
                f"gather of {PIECES}", "bytes", size, 2 * size,
                lambda: self.kernels.gather(pieces, self.stream),
                lambda: self.driver.copy(target.address, source.address, size, self.stream),
            )  # fmt: skip
            for to, of in enumerate(order):
                assert np.array_equal(result.read(part, to * part), source.read(part, of * part)), "a piece came wrong"

    def fill(self, place: Memory, block: elements.Bytes, size: int) -> None:
        """Repeat the block over the place."""
        for begin in range(0, size, block.size):
            place.write(block[: size - begin], begin)

    def verify(self, dtype: str, result: Memory, wanted: elements.Bytes, size: int) -> None:
        """All of the result is the wanted block again and again."""
        for begin in range(0, size, wanted.size):
            length = min(wanted.size, size - begin)
            wrong = elements.difference(dtype, wanted[:length], result.read(length, begin))
            assert wrong is None, f"{dtype}, from byte {begin} on: {wrong}"


def main() -> int:
    """Measure, print, leave the figures; 1 if a fold is below the bar."""
    bench = Bench()
    free = _free_memory(bench)
    for dtype in FAST_TYPES:
        for size in SIZES:
            # All sizes in one type; of the others what fits the cache, and what does not.
            if dtype == "float32" or size in (1 << 20, 64 << 20, 256 << 20) or FAKE:
                if size * 18 < free:
                    bench.fold(dtype, size, max(FOLDED))
                else:
                    print(f"left out: {in_words(size)} {dtype} wants {in_words(size * 18)} of device memory")
    for size in SIZES:
        bench.gather(size)
    bench.driver.close_all()
    columns = ["", "type", "bytes of a source", "GB/s", "device copy GB/s", "ratio", f"at least {BAR:g}"]
    showed = f"folds of {in_words(BAR_FROM)} and more: at least {bench.least:.2f} of a device copy"
    showed = "fake driver: no GPU was used" if FAKE else showed
    notes = [f"Read plus written, sums, medians of {ROUNDS} rounds in turns; results compared with the native core's."]
    notes += [f"Below {BAR:g}: {'; '.join(bench.below)}."] if bench.below and not FAKE else []
    if FIGURES_FILE in os.environ:
        figures = {"title": "Bandwidth of the kernels", "columns": columns, "rows": bench.rows, "notes": notes}
        with open(os.environ[FIGURES_FILE], "w", encoding="utf-8") as file:
            json.dump({"showed": showed, "figures": [figures]}, file)
    print(showed)
    return 1 if bench.below and not FAKE else 0


def _free_memory(bench: Bench) -> int:
    """Bytes that can be had, at least, found by asking for them: the seam has no other way."""
    size = 64 << 30
    while size > 1 << 28:
        try:
            address = bench.driver.allocate(size)
        except Exception:
            size //= 2
            continue
        bench.driver.free(address)
        return int(size)
    return size


if __name__ == "__main__":
    sys.exit(main())
