"""Runs every kernel once or twice on little data: what compute-sanitizer watches.

compute-sanitizer slows a kernel down a hundredfold, and what it looks for shows in one launch as in a thousand.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
from gpu import elements
from gpu.device import Memory, make_driver, make_kernels

from abccl.transports.types import TYPES


def main() -> None:
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
    print(f"{launched} folds, scalings, gathers and ticks")


if __name__ == "__main__":
    main()
