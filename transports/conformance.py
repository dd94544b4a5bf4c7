"""The conformance suite: what every transport must do, as checks that a transport's own tests run.

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
    def test_shm(check):
        check(make_shm)

`make(size)` is a context manager that gives the transports of one new group, in rank order; the checks drive each from
a thread of its own. A check raises AssertionError, or the transport's own error, and is silent if all is well.
No wait is longer than `patience` seconds, so a transport that loses a message fails and does not hang.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..algorithms import Collective, algorithms, lookup
from ..errors import Aborted, CollectiveError, DeadlineExceeded, Mismatch
from .contract import ANY_SOURCE, USER_TAGS, Transport
from .trial import Case, Trial, cases

Make = Callable[[int], AbstractContextManager[Sequence[Transport]]]

PATIENCE = 60.0
_GUARD = 64


def check_transport(make: Make, *, sizes: Sequence[int] = (1, 2, 3, 4, 5), patience: float = PATIENCE) -> None:
    """Run all checks; plans among each of `sizes` ranks, the others among as many as they need (two to four)."""
    for check in CHECKS:
        if check is check_plans:
            check_plans(make, patience, sizes)
        else:
            check(make, patience)


# Threads


def outcomes(transports: Sequence[Transport], main: Callable[[Transport], Any], patience: float) -> list[Any]:
    """What main(transport) returned or raised in a thread for each transport."""
    results: list[Any] = [AssertionError("the thread never ended: a wait ignores its deadline") for _ in transports]

    def run(rank: int) -> None:
        try:
            results[rank] = main(transports[rank])
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(transports))]
    for thread in threads:
        thread.start()
    until = time.monotonic() + patience + 5  # the last wait's deadline, and what is done beside it
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return results


def run_ranks(transports: Sequence[Transport], main: Callable[[Transport], Any], patience: float) -> list[Any]:
    """What main(transport) returned for each transport. If one raises, the group is aborted and the cause raised."""
    first: list[Exception] = []

    def guarded(transport: Transport) -> Any:
        try:
            return main(transport)
        except Exception as error:
            first.append(error)
            transport.abort(Aborted(f"rank {transport.rank} failed"))
            raise

    results = outcomes(transports, guarded, patience)
    for error in [*first, *results]:
        if isinstance(error, Exception):
            raise error
    return results


# The verbs


def _random(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


def _is_broken(transport: Transport, kind: type[Exception], patience: float) -> None:
    """The transport's calls raise `kind`, at once or as soon as the news has come."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            transport.progress()
        except kind:
            return
        time.sleep(0)
    raise AssertionError(f"rank {transport.rank} was not told: wanted {kind.__name__}")


def check_attributes(make: Make, patience: float = PATIENCE) -> None:
    """Ranks in order, and room for something."""
    for size in (1, 3):
        with make(size) as transports:
            assert [(t.rank, t.size) for t in transports] == [(rank, size) for rank in range(size)]
            for transport in transports:
                assert transport.lanes >= 1 and transport.slot_bytes >= 64 and transport.name


def check_order(make: Make, patience: float = PATIENCE) -> None:
    """Messages of one tag arrive in the order posted, and a buffer may be used again once its send is done."""
    count = 40

    def main(transport: Transport) -> None:
        deadline, peer = time.monotonic() + patience, 1 - transport.rank
        if transport.rank == 0:
            buffer = bytearray(8)
            for number in range(count):
                buffer[:] = number.to_bytes(8, "little")
                transport.wait([transport.post_send(peer, USER_TAGS, memoryview(buffer))], deadline)
                buffer[:] = b"\xff" * 8
        else:
            one_by_one = [bytearray(8) for _ in range(count)]
            for into in one_by_one[: count // 2]:
                transport.wait([transport.post_recv(peer, USER_TAGS, memoryview(into))], deadline)
            rest = [transport.post_recv(peer, USER_TAGS, memoryview(into)) for into in one_by_one[count // 2 :]]
            transport.wait(rest, deadline)
            assert [int.from_bytes(into, "little") for into in one_by_one] == list(range(count))

    with make(2) as transports:
        run_ranks(transports, main, patience)


def check_sizes(make: Make, patience: float = PATIENCE) -> None:
    """Messages from nothing to several MiB, both ways at once, unaligned, and not a byte written beside them."""

    def main(transport: Transport) -> None:
        deadline, peer = time.monotonic() + patience, 1 - transport.rank
        slot = transport.slot_bytes
        for length in (0, 1, 64, 4097, 287, 288, 289, 304, 305, 65536, slot - 1, slot, slot + 1, (3 << 20) + 5):
            memory = bytearray(b"\xa5" * (length + 2 * _GUARD + 1))
            into = memoryview(memory)[_GUARD + 1 : _GUARD + 1 + length]
            # Both send first: a transport without room must take the receive that is posted behind the send.
            send = transport.post_send(peer, USER_TAGS, memoryview(_random(length, 2 * length + transport.rank)))
            receive = transport.post_recv(peer, USER_TAGS, into)
            transport.wait([send, receive], deadline)
            assert into == _random(length, 2 * length + peer), f"a message of {length} bytes came otherwise than sent"
            assert (receive.source, receive.length, receive.wanted) == (peer, length, length)
            rest = memory[: _GUARD + 1] + memory[_GUARD + 1 + length :]
            assert set(rest) == {0xA5}, f"a message of {length} bytes was written beside its buffer"

    with make(2) as transports:
        run_ranks(transports, main, patience)


def check_tags(make: Make, patience: float = PATIENCE) -> None:
    """A receive takes the message of its tag, also past others that were sent before."""

    def main(transport: Transport) -> None:
        deadline, peer = time.monotonic() + patience, 1 - transport.rank
        tags = [0, 1, USER_TAGS, USER_TAGS + 1, 32767]
        if transport.rank == 0:
            sends = [transport.post_send(peer, tag, memoryview(_random(100 + tag, tag))) for tag in tags]
            transport.wait(sends, deadline)
        else:
            for tag in reversed(tags):
                into = bytearray(100 + tag)
                transport.wait([transport.post_recv(peer, tag, memoryview(into))], deadline)
                assert into == _random(100 + tag, tag), f"tag {tag} got another message"

    with make(2) as transports:
        run_ranks(transports, main, patience)


def check_any_order(make: Make, patience: float = PATIENCE) -> None:
    """Everybody to everybody at once, small and large, sends and receives posted in any order."""
    size = 4

    def length(source: int, destination: int) -> int:
        return (0, 3, 1000, 300_000)[(source + 2 * destination) % 4]

    def main(transport: Transport) -> None:
        deadline, rank = time.monotonic() + patience, transport.rank
        posts = [(kind, peer) for kind in ("send", "receive") for peer in range(size) if peer != rank]
        random.Random(rank).shuffle(posts)
        received = {peer: bytearray(length(peer, rank)) for peer in range(size)}
        requests = [
            transport.post_send(peer, USER_TAGS, memoryview(_random(length(rank, peer), 10 * rank + peer)))
            if kind == "send"
            else transport.post_recv(peer, USER_TAGS, memoryview(received[peer]))
            for kind, peer in posts
        ]
        transport.wait(requests, deadline)
        for peer in set(range(size)) - {rank}:
            assert received[peer] == _random(length(peer, rank), 10 * peer + rank), f"wrong bytes from rank {peer}"

    with make(size) as transports:
        run_ranks(transports, main, patience)


def check_any_source(make: Make, patience: float = PATIENCE) -> None:
    """ANY_SOURCE takes each message of its tag once, says whose it was, and keeps each sender's order."""
    size, count = 4, 8

    def main(transport: Transport) -> None:
        deadline, rank = time.monotonic() + patience, transport.rank
        if rank > 0:
            data = [memoryview(bytes([rank, number])) for number in range(count)]
            other = transport.post_send(0, USER_TAGS + 1, memoryview(b"other"))
            transport.wait([other, *(transport.post_send(0, USER_TAGS, each) for each in data)], deadline)
            return
        taken: dict[int, list[int]] = {peer: [] for peer in range(1, size)}
        for _ in range(count * (size - 1)):
            into = bytearray(2)
            receive = transport.post_recv(ANY_SOURCE, USER_TAGS, memoryview(into))
            transport.wait([receive], deadline)
            assert receive.source == into[0], f"a message of rank {into[0]} was said to be of rank {receive.source}"
            taken[into[0]].append(into[1])
        wanted = {peer: list(range(count)) for peer in range(1, size)}
        assert taken == wanted, f"messages came twice, or in another order than sent: {taken}"
        words = [bytearray(5) for _ in range(1, size)]
        transport.wait([transport.post_recv(ANY_SOURCE, USER_TAGS + 1, memoryview(word)) for word in words], deadline)
        assert words == [b"other"] * (size - 1)

    with make(size) as transports:
        run_ranks(transports, main, patience)


def check_length(make: Make, patience: float = PATIENCE) -> None:
    """A message of another length than its receive is a Mismatch, and everybody is told."""
    for sent, wanted in ((10, 20), (20, 10), (0, 1), (1, 0), (200_000, 100_000)):

        def main(transport: Transport, sent: int = sent, wanted: int = wanted) -> None:
            deadline = time.monotonic() + patience
            if transport.rank == 0:
                transport.wait([transport.post_send(1, USER_TAGS, memoryview(bytes(sent)))], deadline)
            else:
                transport.wait([transport.post_recv(0, USER_TAGS, memoryview(bytearray(wanted)))], deadline)

        with make(2) as transports:
            sender, receiver = outcomes(transports, main, patience)
            assert isinstance(receiver, Mismatch), f"{sent} bytes for {wanted}: wanted Mismatch, came {receiver!r}"
            assert sender is None or isinstance(sender, Mismatch), f"the sender got {sender!r}"
            for transport in transports:
                _is_broken(transport, Mismatch, patience)


def check_deadline(make: Make, patience: float = PATIENCE) -> None:
    """A wait ends at its deadline, not before, and then everybody is told."""

    def main(transport: Transport) -> None:
        deadline = time.monotonic() + 0.02
        receive = transport.post_recv(1, USER_TAGS, memoryview(bytearray(1)))
        try:
            transport.wait([receive], deadline)
        finally:
            assert time.monotonic() >= deadline, "a wait ended before its deadline"

    with make(2) as transports:
        (outcome,) = outcomes(transports[:1], main, patience)
        assert isinstance(outcome, DeadlineExceeded), f"wanted DeadlineExceeded, came {outcome!r}"
        for transport in transports:
            _is_broken(transport, DeadlineExceeded, patience)


def check_abort(make: Make, patience: float = PATIENCE) -> None:
    """An abort from any thread wakes every rank; the first reason is the one that all hear, then and later."""
    size = 3
    posted = threading.Barrier(size + 1)

    def main(transport: Transport) -> None:
        receive = transport.post_recv((transport.rank + 1) % size, USER_TAGS, memoryview(bytearray(1)))
        posted.wait(patience)
        transport.wait([receive], time.monotonic() + patience)

    with make(size) as transports:

        def abort(transport: Transport) -> None:
            posted.wait(patience)
            transport.abort(Aborted("the first reason"))
            transport.abort(Mismatch("the second reason"))

        waiting = threading.Thread(target=abort, args=(transports[1],), daemon=True)
        waiting.start()
        results = outcomes(transports, main, patience)
        waiting.join()
        for outcome in results:
            assert isinstance(outcome, Aborted) and "the first reason" in str(outcome), (
                f"wanted Aborted by the first reason, came {outcome!r}"
            )
        for transport in transports:
            _is_broken(transport, Aborted, patience)


def check_close(make: Make, patience: float = PATIENCE) -> None:
    """Closing twice is closing once; who waits for a closed rank gets an error, not a hang."""
    with make(2) as transports:
        transports[1].close()
        transports[1].close()

        def main(transport: Transport) -> None:
            receive = transport.post_recv(1, USER_TAGS, memoryview(bytearray(1)))
            transport.wait([receive], time.monotonic() + min(patience, 1.0))

        (outcome,) = outcomes(transports[:1], main, patience)
        assert isinstance(outcome, CollectiveError), f"wanted PeerLost or DeadlineExceeded, came {outcome!r}"
        transports[0].close()
        transports[0].close()


# Plans


def check_plans(make: Make, patience: float = PATIENCE, sizes: Iterable[int] = (1, 2, 3, 4, 5)) -> None:
    """Every registered algorithm against numpy, one after another without a pause between."""

    def main(transport: Transport) -> None:
        for case in cases(transport.size, transport.lanes):
            trial = Trial(transport, case)
            trial.start().wait(time.monotonic() + patience)
            trial.verify()

    for size in sizes:
        with make(size) as transports:
            run_ranks(transports, main, patience)


def check_runs_again(make: Make, patience: float = PATIENCE) -> None:
    """A plan made ready once runs many times; a rank that only sends may be several runs ahead."""
    count, times = 1000, 30

    def main(transport: Transport) -> None:
        tree = next(iter(algorithms(Collective.BROADCAST).values()))
        trial = Trial(transport, Case(tree, transport.size, count, segment=100, lanes=transport.lanes))
        for turn in range(times):
            if trial.input is not None:
                trial.input[:] = turn
            trial.start().wait(time.monotonic() + patience)
            assert trial.output is not None and (trial.output == turn).all(), f"run {turn}: came {trial.output}"

    with make(3) as transports:
        run_ranks(transports, main, patience)


def check_progress(make: Make, patience: float = PATIENCE) -> None:
    """`progress` returns although the peer has not begun, and unread messages of the user are in nobody's way."""
    asked, case = threading.Event(), Case(lookup(Collective.ALL_REDUCE, "ring"), 2, 50_000)

    def main(transport: Transport) -> None:
        peer, deadline, word = 1 - transport.rank, time.monotonic() + patience, bytearray(70_000)
        send = transport.post_send(peer, USER_TAGS, memoryview(_random(len(word), transport.rank)))
        trial = Trial(transport, case)
        if transport.rank == 0:
            execution = trial.start()
            finished = [execution.progress() for _ in range(10)]
            asked.set()
            assert not any(finished), "a run was finished before the peer began"
        else:
            asked.wait(patience)
            execution = trial.start()
        while not execution.progress():
            assert time.monotonic() < deadline, "a run never finished by progress alone"
            time.sleep(0)
        trial.verify()
        transport.wait([send, transport.post_recv(peer, USER_TAGS, memoryview(word))], deadline)
        assert word == _random(len(word), peer)

    with make(2) as transports:
        run_ranks(transports, main, patience)


def check_mismatch(make: Make, patience: float = PATIENCE) -> None:
    """Ranks that call different things all get a Mismatch, which says who called what."""
    ring = {collective: lookup(collective, "ring") for collective in (Collective.ALL_REDUCE, Collective.ALL_GATHER)}
    own = Case(ring[Collective.ALL_REDUCE], 2, 1000)
    others = [
        Case(ring[Collective.ALL_REDUCE], 2, 1008),
        Case(ring[Collective.ALL_REDUCE], 2, 1000, op="max"),
        Case(ring[Collective.ALL_REDUCE], 2, 1000, dtype="float64"),
        Case(ring[Collective.ALL_REDUCE], 2, 1000, dtype="int32"),
        Case(ring[Collective.ALL_GATHER], 2, 500),
    ]
    for other in others:
        called = (own, other)

        def main(transport: Transport, called: tuple[Case, Case] = called) -> None:
            Trial(transport, called[transport.rank]).start().wait(time.monotonic() + patience)

        with make(2) as transports:
            for outcome in outcomes(transports, main, patience):
                assert isinstance(outcome, Mismatch), f"wanted Mismatch, came {outcome!r}"
                for words in ("rank 0", "rank 1", own.text, other.text):
                    assert words in str(outcome), f"the message does not say {words!r}: {outcome}"


def check_absent_rank(make: Make, patience: float = PATIENCE) -> None:
    """A run that a rank does not join ends at its deadline, or by an abort, and says in what."""
    case = Case(lookup(Collective.ALL_REDUCE, "ring"), 3, 100)

    def late(transport: Transport) -> None:
        Trial(transport, case).start().wait(time.monotonic() + 0.02)

    def aborted(transport: Transport) -> None:
        execution = Trial(transport, case).start()
        if transport.rank == 0:
            execution.abort("enough")
        execution.wait(time.monotonic() + patience)

    with make(3) as transports:
        for outcome in outcomes(transports[:2], late, patience):
            assert isinstance(outcome, DeadlineExceeded), f"wanted DeadlineExceeded, came {outcome!r}"
            assert case.text in str(outcome), f"the message does not say {case.text!r}: {outcome}"
        _is_broken(transports[2], DeadlineExceeded, patience)
    with make(3) as transports:
        for outcome in outcomes(transports[:2], aborted, patience):
            assert isinstance(outcome, Aborted) and "enough" in str(outcome), f"wanted Aborted, came {outcome!r}"


CHECKS: tuple[Callable[..., None], ...] = (
    check_attributes,
    check_order,
    check_sizes,
    check_tags,
    check_any_order,
    check_any_source,
    check_length,
    check_deadline,
    check_abort,
    check_close,
    check_plans,
    check_runs_again,
    check_progress,
    check_mismatch,
    check_absent_rank,
)
"""Every check, from the simplest on."""
