"""Corners of the communicator over shared memory that were wrong once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from abccl import ArgumentError, Collective, Communicator, PeerLost, algorithm, recv, send
from abccl.algorithms import algorithms, registry
from abccl.transports.shm import shm_threads


def threads(size: int, body: Callable[[Communicator], Any], timeout: float = 60.0) -> list[Any]:
    """What `body` returns on each rank; the ranks are threads."""
    communicators = [Communicator(transport, timeout=timeout) for transport in shm_threads(size)]
    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(body, communicators))
    for communicator in communicators:
        communicator.close()
    return results


@pytest.fixture
def own_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards."""
    for collective in Collective:
        monkeypatch.setitem(registry._registry, collective, algorithms(collective))


def test_buffers_of_dropped_messages_stay_alive() -> None:
    def body(c: Communicator) -> None:
        other = 1 - c.rank
        for tag in range(8):
            c.send(np.full(30_000, c.rank * 8.0 + tag), other, tag, async_op=True)  # nobody keeps array or work
        gc.collect()
        rubbish = [np.full(30_000, -9.0) for _ in range(8)]
        for tag in range(8):
            x = np.empty(30_000)
            c.recv(x, other, tag)
            assert (x == other * 8 + tag).all()
        c.barrier()
        assert all((array == -9).all() for array in rubbish)

    threads(2, body)


def test_in_place_with_uneven_parts() -> None:
    counts = (4, 2, 3)
    starts = (0, 4, 6)

    def body(c: Communicator) -> None:
        r = c.rank
        out = np.full(9, -1.0)
        own = out[starts[r] : starts[r] + counts[r]]
        own[:] = r
        c.all_gather(out, own, counts=np.array(counts))
        assert np.array_equal(out, np.repeat([0.0, 1.0, 2.0], counts))
        c.reduce_scatter(own, out, counts=list(counts))
        assert (own == 3 * r).all()
        wrong = out[r * counts[r] : (r + 1) * counts[r]]
        if r == 1:
            with pytest.raises(ArgumentError, match="overlap, other than at this rank's own part"):
                c.all_gather(out, wrong, counts=counts)

    threads(3, body)


def test_what_a_rank_does_not_use_is_not_looked_at() -> None:
    def body(c: Communicator) -> None:
        out = np.empty(3)
        c.scatter(out, np.arange(6.0) if c.rank == 0 else [], 0)
        assert np.array_equal(out, np.arange(3.0) + 3 * c.rank)

    threads(2, body)


def test_bad_arguments_are_refused_on_warm_calls_too() -> None:
    def body(c: Communicator) -> None:
        x = np.ones(4)
        c.broadcast(x, 0)
        with pytest.raises(ArgumentError, match="root must be a rank"):
            c.broadcast(x, 1 << 32)
        with pytest.raises(ArgumentError, match="peer must be another rank"):
            c.recv(x, -1)
        c.all_reduce(x)
        x.flags.writeable = False
        with pytest.raises(ArgumentError, match="read-only"):
            c.all_reduce(x)
        with pytest.raises(ArgumentError, match="op must be an operator's name"):
            c.all_reduce(np.ones(4), ["sum"])  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="color must be an integer"):
            c.split(1.5)  # type: ignore[arg-type]
        c.barrier()

    threads(2, body)


def test_a_receive_of_any_tag_leaves_the_librarys_messages_alone() -> None:
    def body(c: Communicator) -> None:
        x = np.zeros(2)
        pending = c.recv(x, async_op=True)
        part = c.split(0)
        assert part is not None
        c.send(np.full(2, c.rank + 1.0), 1 - c.rank)
        pending.wait(60)
        assert (x == 2 - c.rank).all()
        part.close()

    threads(2, body)


@pytest.mark.parametrize("timeout", [float("inf"), 1e300])
def test_an_endless_timeout(timeout: float) -> None:
    def body(c: Communicator) -> None:
        x = np.ones(3)
        c.all_reduce(x, async_op=True).wait(timeout)
        c.barrier()
        assert (x == 2).all()

    threads(2, body, timeout)


def test_more_multicasts_in_a_step_than_slots(own_algorithms: None) -> None:
    @algorithm(Collective.ALL_GATHER, name="pairs")
    def pairs(rank: int, size: int) -> Any:
        """All to all, then in the next step each block once more to two ranks: as many multicasts as pairs of ranks."""
        others = range(1, size)
        yield [
            *(send((rank + d) % size, rank) for d in others),
            *(recv((rank - d) % size, (rank - d) % size) for d in others),
        ]
        shift = {d: 4 * ((d - 1) // 2) for d in others}
        yield [
            *(send((rank + d) % size, (rank + shift[d]) % size) for d in others),
            *(recv((rank - d) % size, (rank - d + shift[d]) % size) for d in others),
        ]

    def body(c: Communicator) -> None:
        out = np.empty((c.size, 100))
        c.all_gather(out, np.full(100, float(c.rank)), algorithm="pairs")
        assert (out == np.arange(c.size)[:, None]).all()

    threads(11, body)


def test_a_redefined_algorithm_is_the_one_that_runs(own_algorithms: None) -> None:
    def define(factor: int) -> None:
        @algorithm(Collective.BROADCAST, name="redefined", blocks=factor, largest=factor)
        def redefined(rank: int, size: int) -> Any:
            """The second version cuts the vector in two."""
            ran.append(factor)
            blocks = range(factor)
            yield [send(peer, *blocks) for peer in range(1, size)] if rank == 0 else recv(0, *blocks)

    ran: list[int] = []
    transports = shm_threads(2)
    communicators = [Communicator(transport, timeout=60) for transport in transports]

    def call(c: Communicator) -> None:
        x = np.full(5, c.rank)
        c.broadcast(x, algorithm="redefined")
        assert (x == 0).all()

    with ThreadPoolExecutor(2) as pool:
        for factor in (1, 2):
            define(factor)
            ran.clear()
            list(pool.map(call, communicators))
            assert set(ran) == {factor}
    for communicator in communicators:
        communicator.close()


def test_a_dropped_communicator_says_goodbye() -> None:
    first, second = (Communicator(transport, timeout=60) for transport in shm_threads(2))
    first.all_reduce(np.ones(1000), async_op=True)
    del first
    gc.collect()

    def until_it_notices() -> None:
        while True:  # the first may have got all it needs
            second.all_reduce(np.ones(1000))

    with pytest.raises(PeerLost, match="rank 0 closed its communicator"):
        until_it_notices()
    second.close()
