"""The kernels that wait for each other, on one device: one cooperative launch, whose groups of blocks are the ranks.

What one device does not show: signals and messages between devices.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from gpu.device import FAKE
from gpu.spinning import LANES, Ranks, all_reduce, make_spin_driver

from abccl.transports.trial import cases

COUNTS = (1, 1000) if FAKE else (1, 1000, 20_003, 500_003, 5_000_003)
REPLAYS = 20 if FAKE else 1000


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The driver."""
    made = make_spin_driver(tmp_path_factory.mktemp("kernels"))
    yield made
    made.close_all()


@pytest.fixture
def make(device: Any) -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def one(size: int, timeout: float = 60.0) -> Ranks:
        made.append(Ranks(device, size, timeout))
        return made[-1]

    yield one
    for ranks in made:
        ranks.close()


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["direct", "two_shot", "ring", "rabenseifner"])
def test_all_reduce(make: Callable[..., Ranks], size: int, name: str) -> None:
    """Of the counts for which this device has room."""
    ranks = make(size)
    wanted = [all_reduce(name, size, count, lanes=LANES) for count in COUNTS for _ in range(3)]
    assert sum(ranks.run(case) is not None for case in wanted), "no launch runs here"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_algorithm(make: Callable[..., Ranks], size: int) -> None:
    ranks = make(size)
    assert sum(ranks.run(case) is not None for case in cases(size, LANES)), "no launch runs here"


@pytest.mark.parametrize("name", ["direct", "two_shot", "ring"])
def test_a_graph_is_replayed(make: Callable[..., Ranks], name: str) -> None:
    """Rank r gives n + r in replay n."""
    size, count = 4, 1000
    ranks = make(size)
    ranks.trials(all_reduce(name, size, count, dtype="uint8", lanes=LANES))
    buffers = [(input, output) for _, input, output in ranks.started]
    driver, stream = ranks.driver, ranks.stream
    driver.begin_capture(stream)
    ranks.launch()
    graph = driver.end_capture(stream)
    result = np.empty(count, np.uint8)
    for replay in range(REPLAYS):
        for rank, (input, _) in enumerate(buffers):
            driver.fill(input, (replay + rank) % 256, count, stream)
        driver.launch_graph(graph, stream)
        driver.synchronize(stream)
        wanted = sum((replay + rank) % 256 for rank in range(size)) % 256
        for _, output in buffers:
            driver.copy_now(result.ctypes.data, output, count)
            assert (result == wanted).all(), f"replay {replay}"
    driver.destroy_graph(graph)
    assert [spin.error() for spin in ranks.spins] == [None] * size


@pytest.mark.parametrize("name", ["direct", "ring"])
def test_a_missing_rank_is_named(make: Callable[..., Ranks], name: str) -> None:
    ranks = make(3, timeout=0.2)
    ranks.trials(all_reduce(name, 3, 1000), ranks=[0, 1])
    ranks.launch()
    ranks.driver.synchronize(ranks.stream)
    said = [spin.error() for spin in ranks.spins]
    assert said[2] is None and any(said)
    for one in filter(None, said):
        assert re.match(r"rank [01] of 3: (block|lane) 0 .*waited 0.2 s for .*rank \d", one)


@pytest.mark.parametrize("name", ["direct", "ring"])
@pytest.mark.parametrize("who", ["somebody", "the host"])
def test_an_abort_ends_the_waits(make: Callable[..., Ranks], name: str, who: str) -> None:
    ranks = make(3, timeout=3600.0)
    ranks.trials(all_reduce(name, 3, 1000), ranks=[0, 1])
    ranks.launch()
    if who == "somebody":
        ctypes.c_uint32.from_address(ranks.abort).value = 1
    else:
        for spin in ranks.spins:
            spin.fail()
    ranks.driver.synchronize(ranks.stream)
    assert [spin.error() for spin in ranks.spins] == [None] * 3
