"""`shrink` with real ranks: who is left goes on, whoever dies, comes late or aborts meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import abccl
from abccl import Aborted, ArgumentError, PeerLost, RankFailed, TransportError
from abccl.collectives import board, bootstrap, shrink_mpi
from abccl.collectives.board import StoreBoard
from abccl.collectives.shrink import board_of
from abccl.collectives.survivors import Agreement, Group, Steps, run
from abccl.transports import shm
from abccl.transports.inproc import inproc

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(170)]

LIMIT = 120.0
"""Seconds for all of a test's ranks on a machine that is busy."""

Told = tuple[int, int, str, float]
"""Of a communicator: its rank, its size, its name, and what an all_reduce of the rank's old number gives."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tell(communicator: abccl.Communicator, old: int) -> Told:
    x = np.array([float(1 << old)])
    communicator.all_reduce(x)
    return communicator.rank, communicator.size, communicator.name, float(x[0])


def told(*old: int, name: str = "default") -> dict[int, Told]:
    """What these ranks tell, who are left."""
    total = float(sum(1 << rank for rank in old))
    return {rank: (new, len(old), f"{name}, shrunk to {len(old)}", total) for new, rank in enumerate(old)}


def lose(communicator: abccl.Communicator) -> None:
    """Call collectives until one can not end: a rank may have all that it needs of the first."""
    try:
        for _ in range(3):
            communicator.all_reduce(np.zeros(1))
    except PeerLost:
        return
    raise AssertionError("no rank was lost")


def check(results: list[Any], wanted: dict[int, Any], failed: str = "was ended by SIGKILL") -> None:
    """That these ranks returned this, and all others failed so."""
    for rank, result in enumerate(results):
        if rank in wanted:
            assert result == wanted[rank], result
        else:
            assert isinstance(result, RankFailed) and failed in str(result)


# ---- one host


def shrinks(*lost: int) -> Told:
    """These ranks die, one after the other; the others shrink each time."""
    communicator = abccl.init(timeout=60, reproducible=True)
    own = communicator.rank
    for victim in lost:
        communicator.barrier()
        if own == victim:
            die()
        lose(communicator)
        broken, communicator = communicator, communicator.shrink()
        with pytest.raises(PeerLost):
            broken.barrier()
        broken.close()
    assert communicator.reproducible and communicator.timeout == 60
    assert [host.ranks for host in communicator.topology.hosts] == [tuple(range(communicator.size))]
    told = tell(communicator, own)
    communicator.barrier()
    return told


@pytest.mark.parametrize(("lost", "left"), [((1,), (0, 2)), ((0,), (1, 2)), ((2, 0), (1, 3)), ((0, 1), (2,))], ids=str)
def test_who_is_left_goes_on(here: ModuleType, lost: tuple[int, ...], left: tuple[int, ...]) -> None:
    ranks = len(lost) + len(left)
    check(abccl.spawn(here.shrinks, ranks, lost, timeout=LIMIT, on_failure="continue"), told(*left))


def shrinks_intact() -> tuple[Told, Told]:
    communicator = abccl.init(timeout=60)
    shrunk = communicator.shrink(30)
    return tell(shrunk, shrunk.rank), tell(communicator, shrunk.rank)


def test_all_remain_where_nobody_is_lost(here: ModuleType, ranks: int) -> None:
    for rank, (shrunk, before) in enumerate(abccl.spawn(here.shrinks_intact, ranks, timeout=LIMIT)):
        assert shrunk == told(*range(ranks))[rank]
        assert before == (rank, ranks, "default", shrunk[-1])


def dies_while_shrinking(exchange: int) -> Told:
    """Rank 1 dies, and rank 2 as it begins this exchange with the other survivors, of those that `connect` makes."""
    communicator = abccl.init(timeout=60)
    own = communicator.rank
    if own == 1:
        die()
    lose(communicator)
    real, calls = Group.exchange, iter(range(1000))

    def dying(group: Group, data: bytes) -> Steps[list[bytes]]:
        if own == 2 and next(calls) == exchange:
            die()
        return real(group, data)

    Group.exchange = dying  # type: ignore[method-assign]
    shrunk = communicator.shrink()
    result = tell(shrunk, own)
    shrunk.barrier()
    return result


@pytest.mark.parametrize("exchange", [0, 2, 4, 6])
def test_another_one_dies_while_the_ranks_shrink(here: ModuleType, exchange: int) -> None:
    start = time.monotonic()
    check(abccl.spawn(here.dies_while_shrinking, 4, (exchange,), timeout=LIMIT, on_failure="continue"), told(0, 3))
    assert time.monotonic() - start < 50, "a deadline passed"


def comes_late(flag: str) -> Told | str:
    """Rank 1 dies; rank 2 lives, and comes when the others have shrunk without it."""
    communicator = abccl.init(timeout=60)
    own = communicator.rank
    if own == 1:
        die()
    lose(communicator)
    if own < 2 or own > 2:
        shrunk = communicator.shrink(3)
        result = tell(shrunk, own)
        shrunk.barrier()
        Path(f"{flag}{own}").touch()
        return result
    while not all(Path(f"{flag}{rank}").exists() for rank in (0, 3)):
        time.sleep(0.01)
    with pytest.raises(Aborted) as caught:
        communicator.shrink(3)
    return str(caught.value)


def test_who_comes_too_late_is_told_so(here: ModuleType, tmp_path: Path) -> None:
    results = abccl.spawn(here.comes_late, 4, (str(tmp_path / "flag"),), timeout=LIMIT, on_failure="continue")
    late = results.pop(2)
    wanted = told(0, 3)
    check(results, {0: wanted[0], 2: wanted[3]})
    assert isinstance(late, str) and late.startswith("rank 2 of 4 was left out")


def no_room(*_: object, **__: object) -> None:
    raise TransportError("no room")


def has_no_room() -> Told | str:
    """Rank 2 can not make its part of the new communicator, ever."""
    communicator = abccl.init(timeout=60)
    own = communicator.rank
    if own == 1:
        die()
    lose(communicator)
    if own == 2:
        shm.ShmTransport.__init__ = no_room  # type: ignore[method-assign]
    try:
        shrunk = communicator.shrink()
    except TransportError as error:
        return str(error)
    result = tell(shrunk, own)
    shrunk.barrier()
    return result


def test_who_can_not_go_on_says_why_and_the_others_do(here: ModuleType) -> None:
    wanted: dict[int, Told | str] = {**told(0, 3), 2: "no room"}
    check(abccl.spawn(here.has_no_room, 4, timeout=LIMIT, on_failure="continue"), wanted)


def test_the_timeout_is_a_number_of_seconds() -> None:
    communicator = abccl.init()
    for timeout in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ArgumentError, match="positive number of seconds, and is"):
            communicator.shrink(timeout)
    shrunk = communicator.shrink()
    assert (shrunk.rank, shrunk.size) == (0, 1)


# ---- abort() from another thread wakes whoever waits, on all ranks

WAITS: dict[str, Callable[[abccl.Communicator], Any]] = {
    "a collective": lambda c: c.all_reduce(np.zeros(1000)),
    "a Work": lambda c: c.all_reduce(np.zeros(1000), async_op=True).wait(),
    "a message": lambda c: c.recv(np.zeros(3), 0),
    "a message from anybody": lambda c: c.recv(np.zeros(3)),
    "a message's Work": lambda c: c.recv(np.zeros(3), 0, async_op=True).wait(),
    "a barrier": lambda c: c.barrier(),
    "split": lambda c: c.split(0),
    "shrink": lambda c: c.shrink(),
}
"""For ranks 1 and 2: they wait for rank 0, which takes no part."""


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)


def are_woken(hosts: int) -> dict[str, str]:
    """What each wait raises when a thread of rank 1 aborts."""
    own = bootstrap.find().rank
    if hosts > 1:
        os.environ["ABCCL_HOST"] = f"host {own % hosts}"
    raised = {}
    for what, wait in WAITS.items():
        communicator = abccl.init(timeout=600)
        communicator.barrier()

        def abort(c: abccl.Communicator = communicator, shrinks: bool = what == "shrink") -> None:
            # Whoever comes later finds an aborted communicator: that must raise as well, but for shrink, which may.
            wait_until(lambda: c._shrinking if shrinks else c.flight_record()["waiting"], 60 if shrinks else 0.5)
            c.abort("enough")

        thread = threading.Thread(target=abort)
        if own == 1:
            thread.start()
        try:
            wait(communicator) if own else communicator.recv(np.zeros(1), 2, 99)
            raised[what] = "nothing"
        except Aborted as error:
            raised[what] = str(error)
        if own == 1:
            thread.join()
        communicator.close()
    return raised


@pytest.mark.parametrize("hosts", [1, pytest.param(2, marks=pytest.mark.torch)])
def test_an_abort_wakes_who_waits(here: ModuleType, hosts: int) -> None:
    start = time.monotonic()
    for rank, raised in enumerate(abccl.spawn(here.are_woken, 3, (hosts,), timeout=LIMIT)):
        assert raised.keys() == WAITS.keys()
        for what, words in raised.items():
            wanted = "rank 1 called abort() while the ranks shrank" if what == "shrink" and rank else "rank 1: enough"
            assert wanted in words, (what, words)
    assert time.monotonic() - start < LIMIT / 2


# ---- several hosts


class Joint:
    """As much of a JointTransport as its board uses: each rank on a host of its own."""

    def __init__(self, rank: int, size: int, gone: set[int]) -> None:
        self.rank, self.size = rank, size
        self.network = SimpleNamespace(has_lost=lambda peer: peer in gone)

        self.index = {rank: 0}
        self.local = SimpleNamespace(native=SimpleNamespace(gone=lambda index: True))

    def is_near(self, rank: int) -> bool:
        return rank == self.rank


def agree(joint: Any, store: Any, timeout: float) -> tuple[int, ...] | str:
    def build(group: Group) -> Steps[SimpleNamespace]:
        words = yield from group.exchange(bytes(3 << 20))  # of several rounds
        assert words == [bytes(3 << 20)] * group.size
        return SimpleNamespace(close=lambda: None)

    try:
        return run(Agreement(StoreBoard(store, joint), build, timeout))[1]
    except Aborted as error:
        return str(error)


@pytest.mark.torch
def test_a_store_as_a_board(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore

    store, gone = HashStore(), {0, 1}
    one, other = (StoreBoard(store, Joint(rank, 3, gone)) for rank in range(2))  # type: ignore[arg-type]
    assert one.read(1, 1) == (0, None)
    for round in (4, 5, 6):
        other.publish(round, b"%d" % round)
    assert [one.read(1, round) for round in (4, 5, 6, 7)] == [(6, None), (6, b"5"), (6, b"6"), (6, None)]

    assert one.decided(3) is None
    assert [one.decide(3, 7), other.decide(3, 8), other.decided(3), one.decided(4)] == [7, 7, 7, None]

    # Rank 0 has not come, and the connection to it is gone; rank 1 has come.
    assert not other.lost(0)
    monkeypatch.setattr(board, "GRACE", 0.0)
    one, other = (StoreBoard(store, Joint(rank, 3, gone)) for rank in range(2))  # type: ignore[arg-type]
    assert [one.lost(0), one.lost(1), one.lost(2)] == [False, False, False]
    assert [other.lost(0), other.lost(1), other.lost(2)] == [True, False, False]


@pytest.mark.torch
def test_ranks_agree_by_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 sees that the connection to rank 3 is gone, and tells the others; rank 1 wrongly suspects rank 2."""
    from torch.distributed import HashStore

    monkeypatch.setattr(board, "GRACE", 0.5)
    store, seen = HashStore(), ({3}, {2}, set[int]())
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: agree(Joint(rank, 4, seen[rank]), store, 60), range(3)))
    assert found == [(0, 1, 2)] * 3
    assert "left out" in str(agree(Joint(3, 4, set()), store, 60))


@pytest.mark.torch
def test_who_is_not_known_to_be_lost_is_waited_for_until_the_deadline() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: agree(Joint(rank, 3, set()), store, 2.0), range(2)))
    assert found == [(0, 1)] * 2


@pytest.mark.torch
def test_a_store_that_is_lost_is_told() -> None:
    class Lost:
        def set(self, key: str, value: bytes) -> None:
            raise RuntimeError("Connection reset by peer\nmore")

        compare_set = set

    with pytest.raises(TransportError, match=r"can not reach the store .*\(Connection reset by peer\).* is lost"):
        StoreBoard(Lost(), Joint(0, 2, set())).publish(1, b"")  # type: ignore[arg-type]


def shrinks_on_two_hosts(lost: tuple[int, ...]) -> tuple[Told, str]:
    own = bootstrap.find().rank
    os.environ["ABCCL_HOST"] = f"host {own // 2}"
    communicator = abccl.init(timeout=60)
    assert len(communicator.topology.hosts) == 2
    communicator.barrier()
    if own in lost:
        die()
    lose(communicator)
    shrunk = communicator.shrink()
    communicator.close()
    result = tell(shrunk, own), str(shrunk.topology)
    shrunk.barrier()
    return result


@pytest.mark.torch
@pytest.mark.parametrize("lost", [(1,), (2, 3)], ids=str)
def test_hosts_shrink(here: ModuleType, lost: tuple[int, ...]) -> None:
    """By the store that rank 0 keeps."""
    left = [rank for rank in range(4) if rank not in lost]
    results = abccl.spawn(here.shrinks_on_two_hosts, 4, (lost,), timeout=LIMIT, on_failure="continue")
    hosts = "3 ranks on 2 hosts" if lost == (1,) else "2 ranks on 1 host"
    for rank in left:
        assert not isinstance(results[rank], RankFailed), results[rank]
        assert results[rank][1].startswith(hosts)
        results[rank] = results[rank][0]
    check(results, told(*left))


def test_an_mpi_that_was_not_started_for_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(shrink_mpi.STARTED, raising=False)
    network: Any = SimpleNamespace(mpi=None, comm=SimpleNamespace(Shrink=None))
    with pytest.raises(TransportError, match="start them by mpirun --with-ft ulfm"):
        shrink_mpi.shrink_by_mpi(network, lambda bootstrap: abccl.init(), 1.0)


def test_ranks_that_nothing_joins_can_not_agree() -> None:
    with pytest.raises(TransportError, match="joined by inproc, over which survivors can not agree: use shared memory"):
        board_of(inproc(2)[0])
