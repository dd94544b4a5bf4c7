"""Runs every kernel once or twice on little data: what compute-sanitizer watches.

compute-sanitizer slows a kernel down a hundredfold, and what it looks for shows in one launch as in a thousand.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from gpu import elements
from gpu.device import Memory, make_driver, make_kernels
from gpu.spinning import LANES, Ranks, all_reduce, make_spin_driver

from abccl.transports.types import TYPES

COUNT = 5000
"""Elements of an all_reduce: more than one block's."""


def main() -> None:
    launched, kernels = alone(), together()
    print(f"{launched} folds, scalings, gathers and ticks, and {', '.join(kernels)}")


def alone() -> int:
    """The kernels that wait for nobody; how many launches."""
    driver = make_driver()
    kernels = make_kernels(driver)
    stream = driver.create_stream()
    generator = np.random.default_rng(8)
    launched = 0
    for element in TYPES:
        for count, shift, sources in ((1000, 0, 2), (1001, element.itemsize, 3), (33, 0, 65)):
            data = [elements.tame(generator, element.name, count) for _ in range(sources)]
            with ExitStack() as stack:
                places = [stack.enter_context(Memory(driver, data[0].nbytes + shift)) for _ in (None, *data)]
                for place, numbers in zip(places[1:], data, strict=True):
                    place.write(numbers, shift)
                destination, *addresses = (place.address + shift for place in places)
                for op in elements.operators(element.name):
                    kernels.fold(element.name, int(op), destination, addresses, count, stream)
                    driver.synchronize(stream)
                    came = places[0].read(data[0].nbytes, shift)
                    wrong = elements.difference(element.name, elements.folded(element.name, op, data, count), came)
                    assert wrong is None, f"{op.name} of {element.name}: {wrong}"
                    launched += 1
                if element.kind in "fc":
                    kernels.scale(element.name, destination, addresses[0], 0.5, count, stream)
                    driver.synchronize(stream)
                    launched += 1
    with Memory(driver, 5000) as source, Memory(driver, 5000) as result, Memory(driver, 4) as word:
        source.write(generator.integers(0, 256, 5000, np.uint8))
        driver.fill(result.address, 0, 5000, stream)
        driver.fill(word.address, 0, 4, stream)
        pieces = [(result.address + 50 * i, source.address + 50 * i + i % 3, 40) for i in range(99)]
        kernels.gather(pieces, stream)
        kernels.tick(word.address, stream)
        driver.synchronize(stream)
        launched += 2
    driver.destroy_stream(stream)
    driver.close_all()
    return launched


def together() -> list[str]:
    """Those that wait for each other, two ranks of several blocks each: they share memory, and have barriers."""
    with tempfile.TemporaryDirectory() as folder:
        driver = make_spin_driver(Path(folder))
        ranks = Ranks(driver, 2, timeout=300.0)
        ran = [ranks.run(all_reduce(name, 2, COUNT, lanes=LANES)) for name in ("direct", "two_shot", "ring")]
        ranks.close()
        driver.close_all()
    assert ran == ["one_shot", "two_shot", "interpret"], ran
    return [kernel for kernel in ran if kernel]


if __name__ == "__main__":
    main()
