"""Registered memory: what it hands out and takes back, and that peers read it where it lies."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abccl
from abccl import ArgumentError, Communicator, TransportError
from abccl.collectives.memory import PAGE, RegisteredMemory
from abccl.transports.inproc import inproc
from abccl.transports.shm import shm_threads


def alone() -> Communicator:
    return Communicator(shm_threads(1)[0])


def memory(capacity: int) -> tuple[Communicator, RegisteredMemory]:
    communicator = alone()
    return communicator, RegisteredMemory(communicator._native, capacity)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 5 * PAGE), st.just(-1)), max_size=60))
def test_arrays_never_overlap_and_what_is_dropped_comes_back(requests: list[int]) -> None:
    communicator, heap = memory(64 * PAGE)
    with communicator:
        alive: list[tuple[np.ndarray[Any, Any], int]] = []
        for number, request in enumerate(requests):
            if request < 0:
                alive[: len(alive) // 2] = []
                continue
            try:
                array = heap.allocate(request)
            except TransportError:
                break
            array[:] = number % 251
            alive.append((array, number % 251))
        for array, value in alive:
            assert (array == value).all()
        alive.clear()
        array = np.empty(0)
        gc.collect()
        assert heap.allocate(64 * PAGE).nbytes == 64 * PAGE


def test_a_full_heap_says_what_to_do() -> None:
    communicator, heap = memory(1 << 20)
    with communicator:
        kept = heap.allocate(PAGE)
        with pytest.raises(TransportError, match="no 1 MiB in one piece are left of this rank's 1 MiB"):
            heap.allocate(1 << 20)
        del kept


def test_pages_go_back_to_the_system() -> None:
    with alone() as communicator:
        array = communicator.empty(1 << 20, "uint8")
        array[:] = 1
        fd = communicator._memory._region.fd  # type: ignore[union-attr]
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20
        view = array[5:10]
        del array
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20, "a view keeps the memory"
        del view
        assert os.fstat(fd).st_blocks == 0


def test_shapes_and_types() -> None:
    torch = pytest.importorskip("torch")
    with alone() as communicator:
        for shape, dims in ((3, (3,)), ((2, 3), (2, 3)), ((), ()), ((0, 4), (0, 4)), (np.int64(2), (2,))):
            assert communicator.empty(shape, "float64").shape == dims
            tensor = communicator.empty(shape, torch.bfloat16)
            assert tensor.dtype == torch.bfloat16 and tuple(tensor.shape) == dims
        assert communicator.empty(3).dtype == np.float32
        for bad in (-1, (2, -1), 1.5, ("a",)):
            with pytest.raises((ArgumentError, TypeError)):
                communicator.empty(bad)


def test_memory_outlives_its_communicator() -> None:
    communicator = alone()
    array = communicator.empty(1000)
    array[:] = 7
    communicator.close()
    del communicator
    gc.collect()
    assert (array == 7).all()


def test_ordinary_memory_over_other_transports() -> None:
    def body(transport: Any) -> None:
        with Communicator(transport) as communicator:
            x = communicator.empty(10)
            x[:] = 1
            communicator.all_reduce(x)
            assert (x == 2).all()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(body, inproc(2)))


def each_protocol(body: Callable[..., Any], protocols: Sequence[str | None], count: int) -> list[Any]:
    """A process: what the body finds with each protocol, on communicators of their own."""
    found = []
    for protocol in protocols:
        with abccl.init() as communicator:
            found.append(body(communicator, protocol, count))
            communicator.barrier()
    return found


def lends(communicator: Communicator, protocol: str | None, count: int) -> tuple[bool, bool, int]:
    """The sum is right with registered memory and with ordinary; how much of the arena was touched."""
    transport: Any = communicator._transport
    transport.set_protocol(protocol)
    registered, ordinary = communicator.empty(count), np.empty(count, np.float32)
    right = []
    for x in (registered, ordinary):
        x[:] = communicator.rank + 1
        communicator.all_reduce(x, algorithm="two_shot")
        right.append(bool((x == sum(range(1, communicator.size + 1))).all()))
    fd = transport._region.fd
    communicator.barrier()
    return right[0], right[1], os.fstat(fd).st_blocks * 512


def test_what_is_lent_is_not_copied(here: ModuleType, ranks: int) -> None:
    """Between processes: nothing is written to the arena."""
    outcomes, staged = zip(*abccl.spawn(each_protocol, ranks, (lends, ["lent", "cached"], 1 << 20)))
    assert all(first and second for first, second, _ in outcomes)
    assert all(first and second for first, second, _ in staged)
    pulls = all(touched < 128 << 10 for _, _, touched in outcomes)
    assert pulls or not _may_pull()
    assert min(touched for _, _, touched in staged) >= 128 << 10


def moves(communicator: Communicator, protocol: str | None, count: int) -> tuple[bool, int]:
    """Long parts come to where they belong, also uneven ones; how much of the arena was touched."""
    transport: Any = communicator._transport
    transport.set_protocol(protocol)
    rank, size = communicator.rank, communicator.size
    values = np.arange(1, size + 1, dtype=np.float32)
    counts = [count] * (size - 1) + [count + 1000]
    whole, uneven = np.zeros(size * count, np.float32), np.zeros(sum(counts), np.float32)
    exchanged, same = np.zeros_like(whole), np.zeros(count, np.float32)
    right = True
    for _ in range(12):  # enough to try all ways
        whole[:] = uneven[:] = exchanged[:] = 0
        communicator.all_gather(whole, np.full(count, rank + 1, np.float32))
        communicator.all_gather(uneven, np.full(counts[rank], rank + 1, np.float32), counts=counts)
        communicator.all_to_all(exchanged, np.full(size * count, rank + 1, np.float32))
        same[:] = rank + 1
        communicator.broadcast(same, root=size - 1)
        right &= bool((whole == np.repeat(values, count)).all() and (exchanged == whole).all())
        right &= bool((uneven == np.repeat(values, counts)).all() and (same == size).all())
    communicator.barrier()
    return right, os.fstat(transport._region.fd).st_blocks * 512


def test_long_parts(here: ModuleType, ranks: int) -> None:
    """All of a part in one piece if it is lent, and without a copy."""
    protocols = ("lent", "lent_streaming", None)
    found = abccl.spawn(each_protocol, ranks, (moves, protocols, (1 << 20) // 4 + 3))
    for protocol, outcomes in zip(protocols, zip(*found), strict=True):
        assert all(right for right, _ in outcomes), protocol
        assert protocol is None or not _may_pull() or all(touched < 128 << 10 for _, touched in outcomes), protocol


def test_a_forked_child_leaves_its_parent_s_memory_alone() -> None:
    with alone() as communicator:
        array = communicator.empty(10_000)
        array[:] = 7
        child = os.fork()
        if child == 0:
            del array
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (array == 7).all()


def test_threads_get_memory_of_their_own() -> None:
    with alone() as communicator, ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda _: communicator.empty(1000), range(64)))
        for number, array in enumerate(arrays):
            array[:] = number
        assert all((array == number).all() for number, array in enumerate(arrays))


def _may_pull() -> bool:
    return shm_threads(2)[0].pulls
