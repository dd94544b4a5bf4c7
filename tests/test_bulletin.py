"""Bulletins, on a store and by messages: where ranks of other hosts are, and what a run that stands still says."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from abccl import Communicator, DeadlineExceeded, PeerLost
from abccl.transports import asking_bulletin, bulletin
from abccl.transports.asking_bulletin import AskingBulletin
from abccl.transports.bulletin import Bulletin, Own, account
from abccl.transports.inproc import inproc
from abccl.transports.joint import JointTransport, joint_threads
from abccl.transports.store_bulletin import StoreBulletin


class Store:
    """A store in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.sets = 0

    def clone(self) -> Store:
        return self

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()
        self.sets += 1

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]


class Rank:
    """A rank that says what the test wants it to say."""

    def __init__(self, entered: int, waiting: str | None = None) -> None:
        self.entered, self.finished, self.waiting = entered, entered, waiting
        self.notes: list[str] = []
        self.noted = threading.Event()

    def position(self) -> dict[str, Any]:
        ended = 4.2 if self.waiting is None else None
        last = f"broadcast #{self.entered}"
        return {
            "entered": self.entered,
            "finished": self.finished,
            "closed": False,
            "last": last,
            "ended": ended,
            "waiting": self.waiting,
        }

    def words(self, entered: int, finished: int, closed: bool, last: str, ago: float | None) -> str:
        if entered >= self.entered:
            return f"which is in {last}"
        return f"which has not entered #{self.entered} (last: {last}, finished {ago:.1f} s ago)"

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.noted.set()

    def own(self, rank: int, size: int, hosts: Sequence[str]) -> Own:
        return Own(rank, size, hosts, self.position, self.words, self.note)


HOSTS = ("h0", "h0", "h1", "h1")

Make = Callable[..., list[Bulletin]]


def on_a_store(ranks: Sequence[Rank]) -> list[Bulletin]:
    store = Store()
    return [StoreBulletin(store, who.own(rank, len(ranks), HOSTS)) for rank, who in enumerate(ranks)]


def by_messages(ranks: Sequence[Rank]) -> list[Bulletin]:
    return [
        AskingBulletin(network, who.own(rank, len(ranks), HOSTS))
        for (rank, who), network in zip(enumerate(ranks), inproc(len(ranks)), strict=True)
    ]


@contextmanager
def made(make: Make, ranks: Sequence[Rank]) -> Iterator[list[Bulletin]]:
    bulletins = make(ranks)
    try:
        yield bulletins
    finally:
        for one in bulletins:
            one.close()


def published(bulletins: list[Bulletin]) -> None:
    """Wait until every rank has told where it is, as far as they tell unasked."""
    until = time.monotonic() + 30
    for one, rank in itertools.permutations(range(len(bulletins)), 2):
        while bulletins[one].status_of(rank) is None:
            assert time.monotonic() < until


def serving() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "abccl bulletin"]


BOTH = pytest.mark.parametrize("make", [on_a_store, by_messages])


@BOTH
def test_status(make: Make) -> None:
    with made(make, [Rank(17), Rank(17, "waits at step 3"), Rank(16), Rank(1)]) as bulletins:
        until = time.monotonic() + 30
        while (status := bulletins[0].status_of(2)) is None and time.monotonic() < until:
            pass
        assert status is not None
        assert status[:4] == (16, 16, False, "broadcast #16") and status.waiting is None
        assert status.ago is not None and 4.2 <= status.ago < 60
        assert bulletins[0].words(status).startswith("which has not entered #17 (last: broadcast #16, finished")
        again = bulletins[2].ask([0, 1, 3])
        assert again.wait(30) and again.found[1] is not None and again.found[1].waiting == "waits at step 3"


@BOTH
def test_the_thread_ends_with_the_last(make: Make) -> None:
    bulletins = make([Rank(1), Rank(1)])
    (thread,) = serving()
    bulletins[0].close()
    assert thread.is_alive()
    bulletins[1].close()
    thread.join(30)
    assert not thread.is_alive()
    assert bulletins[1].status_of(0) is None  # at once


def test_only_changes_are_told() -> None:
    store, rank = Store(), Rank(3)
    one = StoreBulletin(store, rank.own(0, 1, HOSTS))
    try:
        for entered in (3, 3, 4):
            rank.entered = entered
            one._next = 0.0
            one.turn()
        assert store.sets == 2
    finally:
        one.close()


def test_many_ranks_tell_less_often() -> None:
    one = StoreBulletin(Store(), Rank(0).own(0, 2000, HOSTS))
    one.close()
    assert one._period == 4.0


def test_who_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_bulletin, "PATIENCE", 0.1)
    networks = inproc(2)
    one = AskingBulletin(networks[0], Rank(17).own(0, 2, ("h0", "h1")))
    try:
        assert one.status_of(1) is None
        monkeypatch.setattr(bulletin, "PATIENCE", 1e9)  # who has been silent for so long is not waited for again
        with pytest.raises(PeerLost, match=r"from rank 1, which has not answered.*; that rank is on another host"):
            account(one, "rank 0 waits for block 1 from rank 1", 1, [1], lambda: None)
    finally:
        one.close()
        networks[1].close()


def test_who_closes_ends_nobody_elses() -> None:
    with made(by_messages, [Rank(17), Rank(17), Rank(16)]) as bulletins:
        bulletins[0].close()
        status = bulletins[1].status_of(2)
        assert status is not None and status.entered == 16 and not bulletins[1].failed


def test_a_store_that_fails_is_no_lost_rank() -> None:
    store = Store()
    one = StoreBulletin(store, Rank(17).own(0, 2, ("h0", "h1")))
    try:
        store.check = lambda keys: 1 // 0  # type: ignore[assignment]
        assert one.status_of(1) is None and "division" in one.failed
        text = account(one, "rank 0 waits for rank 1", 1, [1], lambda: None)
        assert text.startswith("rank 0 waits for rank 1, which has told nothing, as integer division")
    finally:
        one.close()


@BOTH
def test_account(make: Make) -> None:
    ranks = [Rank(17), Rank(17), Rank(17, "waits at step 2 for block 0 from rank 3"), Rank(16)]
    with made(make, ranks) as bulletins:
        published(bulletins)
        text = account(bulletins[0], "X: rank 0 waits for block 1 from rank 3", 3, [2, 3], lambda: None)
        assert re.fullmatch(
            r"X: rank 0 waits for block 1 from rank 3, which has not entered #17 \(last: broadcast #16, finished "
            r"\d+.\d s ago\); that rank is on another host \(h1\)",
            text,
        )
        # Whom it waits for waits itself.
        for awaited, begins in (2, ", which is in broadcast #17; that rank is on another host"), (None, "; rank 3, on"):
            text = account(bulletins[0], "X", awaited, [2, 3], lambda: None)
            assert text.startswith(f"X{begins}")
            assert "rank 3, on another host (h1), has not entered #17" in text

        def stop() -> None:
            raise DeadlineExceeded("of another rank")

        bulletins[0]._turning.acquire()  # the thread does not get to the question
        try:
            with pytest.raises(DeadlineExceeded, match="of another rank"):
                account(bulletins[0], "X", 3, [2, 3], stop)
        finally:
            bulletins[0]._turning.release()


@BOTH
def test_follow(make: Make) -> None:
    ranks = [Rank(17), Rank(17), Rank(17), Rank(16)]
    with made(make, ranks) as bulletins:
        published(bulletins)
        bulletins[0].follow(3)
        assert ranks[0].noted.wait(30)
        assert ranks[0].notes[0].startswith("rank 3, on another host (h1), has not entered #17 (last: ")
        bulletins[0].follow(None)
        assert ranks[0].notes[-1] == ""


def with_bulletins(make: Make) -> list[JointTransport]:
    """Four ranks as threads, each on a host of its own."""
    transports = joint_threads([[0], [1], [2], [3]])
    store, networks = Store(), inproc(4)
    for rank, transport in enumerate(transports):
        native = transport.local.native
        own = Own(rank, 4, ("h0", "h1", "h2", "h3"), native.position, native.status_words, native.note)
        transport.bulletin = StoreBulletin(store, own) if make is on_a_store else AskingBulletin(networks[rank], own)
    return transports


@BOTH
def test_the_message_at_the_deadline(make: Make) -> None:
    """Three ranks wait for a fourth."""
    comms = [Communicator(transport, timeout=60) for transport in with_bulletins(make)]
    waited = threading.Barrier(4)

    def call(comm: Communicator) -> str:
        x = np.ones(3, "float32")
        comm.broadcast(x)
        comm.all_reduce(x)
        waited.wait(60)
        if comm.rank == 3:
            return ""
        while (status := comm._transport.bulletin.status_of(3)) is None or status.finished < 2:
            pass
        comm.set_timeout(0.3)
        try:
            comm.all_reduce(x, "max", algorithm="direct")
        except DeadlineExceeded as error:
            return str(error)
        return "no error"

    try:
        with ThreadPoolExecutor(4) as pool:
            *errors, _ = pool.map(call, comms)
        for error in errors:
            assert re.fullmatch(
                r"all_reduce #3 \(float32, max, 3 elements, direct\).*: rank [012] waits at step 1 for block 0 "
                r"from rank 3, which has not entered #3 \(last: all_reduce #2, finished [\d.]+ s ago\); "
                r"that rank is on another host \(h3\)\. If a rank is only slow, give a longer timeout",
                error,
            ), error
    finally:
        for comm in comms:
            comm.close()
    assert not any(thread.is_alive() for thread in serving() if not thread.join(30))


def test_forked_children_have_no_thread() -> None:
    one = StoreBulletin(Store(), Rank(17).own(0, 1, HOSTS))
    try:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            mine = [thread for thread in threading.enumerate() if thread.name == "abccl bulletin"]
            own = StoreBulletin(Store(), Rank(17).own(0, 1, HOSTS))  # and one of its own serves its own
            right = not mine and own.status_of(0) is not None
            os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        one.close()


PROGRAM = """
from datetime import timedelta
from torch.distributed import PrefixStore, TCPStore
from abccl.transports.bulletin import Own
from abccl.transports.joint import JointTransport, joint_threads
from abccl.transports.store_bulletin import StoreBulletin

server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
store = PrefixStore("x", TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=30)))
position = dict(entered=1, finished=1, closed=False, last="barrier #1", ended=0.1, waiting=None)
bulletin = StoreBulletin(store, Own(0, 2, "ab", lambda: position, None, None))
assert bulletin.status_of(0).last == "barrier #1" and server.check(["x/0"])
del server
while not bulletin.failed:
    position["entered"] += 1
    bulletin._next = 0.0
    bulletin.turn()
assert bulletin.failed == "the process that keeps the store has ended", bulletin.failed
assert bulletin.status_of(1) is None
"""


@pytest.mark.torch
def test_a_store_that_goes_first() -> None:
    """The rank prints nothing, and its interpreter ends while the bulletin is open."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


DEAD = """
import os, signal, sys
import numpy as np
import abccl

comm = abccl.init("mpi", timeout=3)
x = np.ones(3, "float32")
comm.broadcast(x)
if comm.rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    comm.all_reduce(x)
except abccl.CollectiveError as error:
    sys.stdout.write(f"rank {comm.rank}: {type(error).__name__}: {error}\\n")
    sys.stdout.flush()
os._exit(0)  # MPI's end waits for the dead
"""


def test_a_dead_rank_over_mpi(mpirun: list[str]) -> None:
    """Nothing breaks when it ends: at the deadline it is asked in vain."""
    command = [*mpirun, "--enable-recovery", "-n", "3", sys.executable, "-c", DEAD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    errors = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert len(errors) == 2, done
    for error in errors:
        assert re.match(r"rank [01]: PeerLost: all_reduce #2 .*rank 2,? .*has not answered for 2 s", error)
