"""Communicators over verbs: a user's messages, what drives them, and how they end. Ranks are threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from abccl import Aborted, ClosedError, Communicator, DeadlineExceeded, Mismatch
from abccl.algorithms import Collective, lookup
from abccl.collectives.driver import Driver
from abccl.collectives.mailbox import ENVELOPE_BYTES
from abccl.transports import Request
from abccl.transports.inproc import InprocGroup, InprocTransport, inproc
from abccl.transports.joint import joint_threads
from abccl.transports.topology import topology_of
from abccl.transports.trial import Case, Trial

KINDS: dict[str, Callable[[int], Any]] = {
    "inproc": inproc,
    "no room": lambda size: inproc(size, room=0),
    "joint": lambda size: joint_threads([list(range(host, size, 2)) for host in range(2)]),
}
LENGTHS = [0, 1, ENVELOPE_BYTES - 24, ENVELOPE_BYTES - 23, 300_000]


def run(communicators: list[Communicator], body: Callable[[Communicator], Any]) -> list[Any]:
    """What `body` returns or raises on each rank."""

    def outcome(communicator: Communicator) -> Any:
        try:
            return body(communicator)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(communicators)) as pool:
        results = list(pool.map(outcome, communicators))
    for communicator in communicators:
        communicator.close()
    return results


def made(kind: str, size: int, timeout: float = 60.0) -> list[Communicator]:
    return [Communicator(transport, timeout=timeout) for transport in KINDS[kind](size)]


def succeed(results: list[Any]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_any_length_by_source_and_tag(kind: str) -> None:
    def body(c: Communicator) -> None:
        peers = [rank for rank in range(c.size) if rank != c.rank]
        sent = [
            c.send(np.full(length, 16 * c.rank + tag, "uint8"), peer, tag, async_op=True)
            for peer in peers
            for length in LENGTHS
            for tag in (1, 2)
        ]
        for tag in (2, 1):
            for length in LENGTHS:
                for peer in peers:
                    x = np.empty(length, "uint8")
                    assert c.recv(x, peer, tag) == peer
                    assert (x == 16 * peer + tag).all(), f"{length} bytes from {peer} with tag {tag}"
        for work in sent:
            work.wait(60)
            assert work.is_completed() and work.times[1] > 0

    succeed(run(made(kind, 4), body))


@pytest.mark.parametrize("kind", KINDS)
def test_from_anybody_each_message_once_and_in_its_senders_order(kind: str) -> None:
    count = 5

    def body(c: Communicator) -> None:
        if c.rank:
            for number in range(count):
                c.send(np.array([c.rank, number]), 0)
            return
        came: dict[int, list[int]] = {rank: [] for rank in range(1, c.size)}
        for _ in range(count * (c.size - 1)):
            x = np.empty(2, "int64")
            source = c.recv(x)
            assert source == x[0]
            came[source].append(int(x[1]))
        assert came == {rank: list(range(count)) for rank in range(1, c.size)}

    succeed(run(made(kind, 4), body))


@pytest.mark.parametrize("kind", KINDS)
def test_messages_move_while_another_thread_waits_in_a_collective(kind: str) -> None:
    """Rank 1 enters the collective only when it has got the message, which rank 0 sends from beside it."""
    waits = threading.Event()

    def body(c: Communicator) -> None:
        x, word = np.ones(1000), np.zeros(50_000)
        if c.rank == 1:
            waits.wait(60)
            c.recv(word, 0)
            assert (word == 7).all()
            c.all_reduce(x)
        else:
            with ThreadPoolExecutor(1) as pool:
                reduces = pool.submit(c.all_reduce, x)
                waits.set()
                c.send(np.full(50_000, 7.0), 1)
                reduces.result(60)
        assert (x == 2).all()

    succeed(run(made(kind, 2), body))


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_waits_for_goes_on(kind: str) -> None:
    def body(c: Communicator) -> None:
        x, word = np.ones(30_000), np.full(30_000, float(c.rank))
        got = np.empty(30_000)
        works = [
            c.all_reduce(x, async_op=True),
            c.send(word, 1 - c.rank, async_op=True),
            c.recv(got, 1 - c.rank, async_op=True),
        ]
        deadline = time.monotonic() + 60
        while not all(work.is_completed() for work in works):
            assert time.monotonic() < deadline, "it never ended although nobody waited"
            time.sleep(0)
        assert (x == 2).all() and (got == 1 - c.rank).all() and works[2].source == 1 - c.rank
        began, ended = works[0].times
        assert began <= ended

    succeed(run(made(kind, 2), body))


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_of_another_length_is_a_mismatch_on_both(kind: str) -> None:
    def body(c: Communicator) -> None:
        if c.rank:
            c.send(np.zeros(10), 0)
        else:
            c.recv(np.zeros(11), 1)
        c.barrier()

    receiver, sender = run(made(kind, 2), body)
    assert isinstance(receiver, Mismatch) and isinstance(sender, Mismatch)
    assert "rank 0 wants 88 bytes from rank 1, whose send has 80" in str(receiver)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: c.recv(np.zeros(3), 1, 5), "recv: 24 bytes from rank 1 with tag 5: rank 0 waited in vain"),
        (lambda c: c.recv(np.zeros(3)), "recv: 24 bytes from any rank: rank 0 waited in vain"),
        (lambda c: c.all_reduce(np.zeros(3)), "all_reduce #1 (float64, sum, 3 elements"),
    ],
    ids=["recv", "recv from anybody", "all_reduce"],
)
def test_a_deadline_says_what_was_waited_for(kind: str, call: Callable[[Communicator], Any], text: str) -> None:
    first, second = made(kind, 2, timeout=0.05)
    with pytest.raises(DeadlineExceeded) as raised:
        call(first)
    assert text in str(raised.value)
    with pytest.raises(DeadlineExceeded):  # everybody hears of it
        second.barrier()
    for communicator in (first, second):
        communicator.close()


def test_a_send_that_nobody_receives_says_so() -> None:
    first, second = made("no room", 2, timeout=0.05)
    text = "send: 799992 bytes to rank 1 with tag 5: rank 0 waited in vain: it was not received"
    with pytest.raises(DeadlineExceeded, match=text):
        first.send(np.zeros(99_999), 1, 5)
    for communicator in (first, second):
        communicator.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_with_a_timeout_leaves_the_work_as_it_is(kind: str) -> None:
    timed_out = threading.Event()

    def body(c: Communicator) -> None:
        if c.rank:
            timed_out.wait(60)
            c.send(np.ones(3), 0)
            return
        x = np.zeros(3)
        work = c.recv(x, async_op=True)
        with pytest.raises(DeadlineExceeded, match="it goes on"):
            work.wait(0.01)
        assert not work.finishes_within(0.0)
        timed_out.set()
        work.wait(60)
        assert (x == 1).all()

    succeed(run(made(kind, 2), body))


@pytest.mark.parametrize("kind", KINDS)
def test_closing_ends_what_is_pending(kind: str) -> None:
    first, second = made(kind, 2)
    works = [first.recv(np.zeros(3), async_op=True), first.all_reduce(np.zeros(3), async_op=True)]
    first.close()
    for work in works:
        with pytest.raises(ClosedError, match="while this operation was pending"):
            work.wait(60)
    second.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_abort_wakes_whoever_waits(kind: str) -> None:
    first, second = made(kind, 2)
    work = first.recv(np.zeros(3), async_op=True)
    second.abort("enough")
    with pytest.raises(Aborted, match="enough"):
        work.wait(60)
    for communicator in (first, second):
        communicator.close()


@pytest.mark.parametrize("kind", KINDS)
def test_messages_after_an_abort_raise_at_once(kind: str) -> None:
    first, second = made(kind, 2)
    second.abort("enough")
    for call in (lambda: first.send(np.zeros(3), 1), lambda: first.recv(np.zeros(3), 1), first.barrier):
        with pytest.raises(Aborted, match="enough"):
            call()
    for communicator in (first, second):
        communicator.close()


def test_a_run_that_ends_at_its_deadline_ends_once() -> None:
    class AtTheLastMoment:
        ends = 0

        def progress(self) -> bool:
            return False

        def wait(self, deadline: float) -> None:
            self.ends += 1

        def abort(self, reason: str) -> None:
            raise AssertionError(reason)

    execution = AtTheLastMoment()
    (transport,) = inproc(1)
    Driver(transport).run(lambda: execution, -1.0, None)
    assert execution.ends == 1


@pytest.mark.parametrize("kind", KINDS)
def test_splits_on_some_ranks_only(kind: str) -> None:
    def body(c: Communicator) -> None:
        x, out = np.arange(8) + 10 * c.rank, np.empty(8, int)
        c.all_to_all(out, x, *([[2] * 4] * 2 if c.rank == 0 else []))
        assert out.tolist() == [10 * source + 2 * c.rank + i for source in range(4) for i in range(2)]

    hosts = topology_of([[0, 2], [1, 3]]) if kind == "joint" else None
    succeed(run([Communicator(transport, topology=hosts) for transport in KINDS[kind](4)], body))


def test_lanes_do_not_wait_for_each_others_messages() -> None:
    """Of two segments one has its messages withheld; the other is done."""

    class Withholding(InprocTransport):
        """Keeps what lane 0 sends, until it is told."""

        def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
            if tag == 0 and not told.is_set():
                held.append((self, peer, data, later := Later(data.nbytes)))
                return later
            return super().post_send(peer, tag, data)

    class Later:
        standing = done = False

        def __init__(self, length: int) -> None:
            self.wanted = self.length = length
            self.source = -1

    held: list[Any] = []
    told = threading.Event()
    group = InprocGroup(2)
    ranks = joint_threads([[0], [1]], [Withholding(group, rank) for rank in range(2)])
    case = Case(lookup(Collective.ALL_REDUCE, "recursive_doubling"), 2, 2048, segment=1024, lanes=2)
    trials = [Trial(transport, case) for transport in ranks]
    executions = [trial.start() for trial in trials]
    for _ in range(50):
        finished = [execution.progress() for execution in executions]
        assert not any(finished)
    wanted = case.wanted(0)
    assert wanted is not None and len(held) == 2
    for trial in trials:
        assert trial.output is not None
        assert np.array_equal(trial.output[1024:2048], wanted[1024:]), "lane 1 has waited for lane 0"
        assert not np.array_equal(trial.output[:1024], wanted[:1024])
    told.set()
    for transport, peer, data, later in held:
        InprocTransport.post_send(transport, peer, 0, data)
        later.done = True
    for _ in range(50):
        finished = [execution.progress() for execution in executions]
    assert all(finished)
    for trial in trials:
        trial.verify()
