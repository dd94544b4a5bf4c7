"""The conformance suite: what every transport must do, as checks that a transport's own tests run.

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
    def test_shm(check):
        check(make_shm)

`make(size)` is a context manager that gives the transports of one new group, in rank order; the checks drive each from
a thread of its own. A check raises AssertionError, or the transport's own error, and is silent if all is well.
No wait is longer than `patience` seconds, so a transport that loses a message fails and does not hang.

Ranks may be processes: then all processes make the same checks, and `make` gives each a `Group`, also those beyond
`size`. What one rank finds is raised in every process.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ..algorithms import Collective, algorithms, lookup
from ..errors import Aborted, ArgumentError, CollectiveError, DeadlineExceeded, Mismatch
from .contract import USER_TAGS, Transport
from .errand import error_from_words, error_to_words
from .trial import Case, Trial, cases, native_cases


@dataclass(frozen=True)
class Group:
    """The ranks of a group whose ranks are processes, as one process sees them.

    Attributes:
        transports: by rank, those of this process; None stands for another process's.
        exchange: an all-gather of small blobs among all processes, also those that have no rank of the group.
    """

    transports: Sequence[Transport | None]
    exchange: Callable[[bytes], list[bytes]]


Make = Callable[[int], AbstractContextManager[Sequence[Transport] | Group]]

Main = Callable[[Transport], None]
"""What a rank does in a check."""

PATIENCE = 60.0
_GUARD = 64


def check_transport(make: Make, *, sizes: Sequence[int] = (1, 2, 3, 4, 5), patience: float = PATIENCE) -> None:
    """Run all checks; plans among each of `sizes` ranks, the others among as many as they need (two to four)."""
    for check in CHECKS:
        if check is check_plans:
            check_plans(make, patience, sizes)
        else:
            check(make, patience)


# Ranks


def outcomes(group: Sequence[Transport] | Group, main: Main, patience: float) -> list[Exception | None]:
    """What main(transport) raised on each rank, in a thread for each transport; None where it returned."""
    transports = group.transports if isinstance(group, Group) else group
    hung = AssertionError("the thread never ended: a wait ignores its deadline")
    results: list[Exception | None] = [None if transport is None else hung for transport in transports]

    def run(rank: int, transport: Transport) -> None:
        try:
            main(transport)
            results[rank] = None
        except Exception as error:
            results[rank] = error

    threads = [
        threading.Thread(target=run, args=(rank, transport), daemon=True)
        for rank, transport in enumerate(transports)
        if transport is not None
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + patience + 5  # the last wait's deadline, and what is done beside it
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if isinstance(group, Group):
        words = [error and error_to_words(error) for error in results]
        for blob in group.exchange(json.dumps(words).encode()):
            for rank, told in enumerate(json.loads(blob)):
                # A rank that did not fail here may have its transport elsewhere.
                results[rank] = results[rank] or (told and error_from_words(told, AssertionError))
    return results


def run_ranks(group: Sequence[Transport] | Group, main: Main, patience: float) -> None:
    """Run main(transport) on each rank. If one raises, the group is aborted and the cause raised."""

    def guarded(transport: Transport) -> None:
        try:
            main(transport)
        except Exception as error:
            transport.abort(Aborted(f"rank {transport.rank} failed: {error}"))
            raise

    errors = [error for error in outcomes(group, guarded, patience) if error is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, Aborted))  # the others failed by the abort


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


def _all_are_broken(group: Sequence[Transport] | Group, kind: type[Exception], patience: float) -> None:
    run_ranks(group, lambda transport: _is_broken(transport, kind, patience), patience)


def check_attributes(make: Make, patience: float = PATIENCE) -> None:
    """Ranks in order, and room for something."""
    for size in (1, 3):

        def main(transport: Transport, size: int = size) -> None:
            assert transport.size == size, f"wanted {size} ranks, and there are {transport.size}"
            assert transport.lanes >= 1 and transport.slot_bytes >= 64 and transport.name

        with make(size) as group:
            transports = group.transports if isinstance(group, Group) else group
            ranks = [rank if transport is None else transport.rank for rank, transport in enumerate(transports)]
            assert ranks == list(range(size)), f"wanted the ranks in order, and they are {ranks}"
            run_ranks(group, main, patience)


def check_order(make: Make, patience: float = PATIENCE) -> None:
    """Messages of one tag arrive in the order posted, and a buffer may be used again once its send is done."""
    count = 20

    def main(transport: Transport) -> None:
        deadline, peer = time.monotonic() + patience, 1 - transport.rank
        numbers = [number.to_bytes(8, "little") for number in range(2 * count)]
        if transport.rank == 0:
            at_once = [transport.post_send(peer, USER_TAGS, memoryview(number)) for number in numbers[:count]]
            transport.wait(at_once, deadline)
            buffer = bytearray(8)
            for number in numbers[count:]:
                buffer[:] = number
                transport.wait([transport.post_send(peer, USER_TAGS, memoryview(buffer))], deadline)
                buffer[:] = b"\xff" * 8
            return
        received = [bytearray(8) for _ in numbers]
        for into in received[:count]:
            transport.wait([transport.post_recv(peer, USER_TAGS, memoryview(into))], deadline)
        assert received[:count] == numbers[:count], f"messages came in another order than sent: {received[:count]}"
        rest = [transport.post_recv(peer, USER_TAGS, memoryview(into)) for into in received[count:]]
        transport.wait(rest, deadline)
        assert received == numbers, f"messages came in another order, or were changed after: {received[count:]}"

    with make(2) as group:
        run_ranks(group, main, patience)


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

    with make(2) as group:
        run_ranks(group, main, patience)


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

    with make(2) as group:
        run_ranks(group, main, patience)


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

    with make(size) as group:
        run_ranks(group, main, patience)


def check_length(make: Make, patience: float = PATIENCE) -> None:
    """A message of another length than its receive is a Mismatch, and everybody is told."""
    for sent, wanted in ((10, 20), (20, 10), (0, 1), (1, 0), (200_000, 100_000)):

        def main(transport: Transport, sent: int = sent, wanted: int = wanted) -> None:
            deadline = time.monotonic() + patience
            if transport.rank == 0:
                transport.wait([transport.post_send(1, USER_TAGS, memoryview(bytes(sent)))], deadline)
            else:
                transport.wait([transport.post_recv(0, USER_TAGS, memoryview(bytearray(wanted)))], deadline)

        with make(2) as group:
            sender, receiver = outcomes(group, main, patience)
            assert isinstance(receiver, Mismatch), f"{sent} bytes for {wanted}: wanted Mismatch, came {receiver!r}"
            assert sender is None or isinstance(sender, Mismatch), f"the sender got {sender!r}"
            _all_are_broken(group, Mismatch, patience)


def check_deadline(make: Make, patience: float = PATIENCE) -> None:
    """A wait ends at its deadline, not before, and then everybody is told."""

    def main(transport: Transport) -> None:
        if transport.rank == 1:
            return
        deadline = time.monotonic() + 0.02
        receive = transport.post_recv(1, USER_TAGS, memoryview(bytearray(1)))
        try:
            transport.wait([receive], deadline)
        finally:
            assert time.monotonic() >= deadline, "a wait ended before its deadline"

    with make(2) as group:
        outcome = outcomes(group, main, patience)[0]
        assert isinstance(outcome, DeadlineExceeded), f"wanted DeadlineExceeded, came {outcome!r}"
        _all_are_broken(group, DeadlineExceeded, patience)


def check_abort(make: Make, patience: float = PATIENCE) -> None:
    """An abort from any thread wakes every rank; the first reason is the one that all hear, then and later."""
    size = 3

    def main(transport: Transport) -> None:
        deadline, rank = time.monotonic() + patience, transport.rank
        receive = transport.post_recv((rank + 1) % size, USER_TAGS, memoryview(bytearray(1)))
        if rank != 1:
            told = [transport.post_send(1, USER_TAGS + 1, memoryview(b"posted"))]
            transport.wait([*told, receive], deadline)
            return
        told = [transport.post_recv(peer, USER_TAGS + 1, memoryview(bytearray(6))) for peer in (0, 2)]
        transport.wait(told, deadline)
        waiting = threading.Thread(target=abort, args=(transport,), daemon=True)
        waiting.start()
        try:
            transport.wait([receive], deadline)
        finally:
            waiting.join(patience)

    def abort(transport: Transport) -> None:
        transport.abort(Aborted("the first reason"))
        transport.abort(Mismatch("the second reason"))

    with make(size) as group:
        for outcome in outcomes(group, main, patience):
            assert isinstance(outcome, Aborted) and "the first reason" in str(outcome), (
                f"wanted Aborted by the first reason, came {outcome!r}"
            )
        _all_are_broken(group, Aborted, patience)


def check_close(make: Make, patience: float = PATIENCE) -> None:
    """Closing twice is closing once; who waits for a closed rank gets an error, not a hang."""

    def main(transport: Transport) -> None:
        try:
            if transport.rank == 0:
                receive = transport.post_recv(1, USER_TAGS, memoryview(bytearray(1)))
                transport.wait([receive], time.monotonic() + min(patience, 1.0))
        finally:
            transport.close()
            transport.close()

    with make(2) as group:
        waited, closed = outcomes(group, main, patience)
        assert isinstance(waited, CollectiveError), f"wanted PeerLost or DeadlineExceeded, came {waited!r}"
        assert closed is None, f"closing raised {closed!r}"


# Plans


def check_plans(make: Make, patience: float = PATIENCE, sizes: Iterable[int] = (1, 2, 3, 4, 5)) -> None:
    """Every registered algorithm against numpy, one after another without a pause between."""

    def main(transport: Transport) -> None:
        for case in cases(transport.size, transport.lanes):
            trial = Trial(transport, case)
            trial.start().wait(time.monotonic() + patience)
            trial.verify()

    for size in sizes:
        with make(size) as group:
            run_ranks(group, main, patience)


def check_native(make: Make, patience: float = PATIENCE, sizes: Iterable[int] = (1, 3)) -> None:
    """The collectives that the engine has of its own against numpy. It may refuse types, but no float32."""

    def main(transport: Transport) -> None:
        for case in native_cases(transport.size):
            if case.collective not in transport.collectives:
                continue
            try:
                trial = Trial(transport, case, native=True)
            except ArgumentError:
                assert (case.dtype, case.op) != ("float32", "sum"), f"{case.text} was refused"
                continue
            trial.start().wait(time.monotonic() + patience)
            trial.verify()

    for size in sizes:
        with make(size) as group:
            run_ranks(group, main, patience)


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
            trial.fetch()
            assert trial.output is not None and (trial.output == turn).all(), f"run {turn}: came {trial.output}"

    with make(3) as group:
        run_ranks(group, main, patience)


def check_progress(make: Make, patience: float = PATIENCE) -> None:
    """`progress` returns although the peer has not begun, and unread messages of the user are in nobody's way."""
    case = Case(lookup(Collective.ALL_REDUCE, "ring"), 2, 50_000)

    def main(transport: Transport) -> None:
        peer, deadline, word = 1 - transport.rank, time.monotonic() + patience, bytearray(70_000)
        sends = [transport.post_send(peer, USER_TAGS, memoryview(_random(len(word), transport.rank)))]
        trial = Trial(transport, case)
        if transport.rank == 0:
            execution = trial.start()
            finished = [execution.progress() for _ in range(10)]
            sends.append(transport.post_send(peer, USER_TAGS + 1, memoryview(b"asked")))
            assert not any(finished), "a run was finished before the peer began"
        else:
            transport.wait([transport.post_recv(peer, USER_TAGS + 1, memoryview(bytearray(5)))], deadline)
            execution = trial.start()
        while not execution.progress():
            assert time.monotonic() < deadline, "a run never finished by progress alone"
            time.sleep(0)
        trial.verify()
        transport.wait([*sends, transport.post_recv(peer, USER_TAGS, memoryview(word))], deadline)
        assert word == _random(len(word), peer)

    with make(2) as group:
        run_ranks(group, main, patience)


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
            trial = Trial(transport, called[transport.rank])
            trial.start().wait(time.monotonic() + patience)

        with make(2) as group:
            for outcome in outcomes(group, main, patience):
                assert isinstance(outcome, Mismatch), f"wanted Mismatch, came {outcome!r}"
                for words in ("rank 0", "rank 1", own.text, other.text):
                    assert words in str(outcome), f"the message does not say {words!r}: {outcome}"


def check_absent_rank(make: Make, patience: float = PATIENCE) -> None:
    """A run that a rank does not join ends at its deadline, or by an abort, and says in what."""
    case = Case(lookup(Collective.ALL_REDUCE, "ring"), 3, 100)

    def late(transport: Transport) -> None:
        if transport.rank == 2:
            _is_broken(transport, DeadlineExceeded, patience)
        else:
            trial = Trial(transport, case)
            trial.start().wait(time.monotonic() + 0.02)

    def aborted(transport: Transport) -> None:
        if transport.rank == 2:
            return
        trial = Trial(transport, case)
        execution = trial.start()
        if transport.rank == 0:
            execution.abort("enough")
        execution.wait(time.monotonic() + patience)

    with make(3) as group:
        *joined, absent = outcomes(group, late, patience)
        for outcome in joined:
            assert isinstance(outcome, DeadlineExceeded), f"wanted DeadlineExceeded, came {outcome!r}"
            # The call's number may stand before its arguments.
            for words in case.text.replace("(", " (", 1).split(" ", 1):
                assert words in str(outcome), f"the message does not say {words!r}: {outcome}"
        assert absent is None, f"the absent rank got {absent!r}"
    with make(3) as group:
        for outcome in outcomes(group, aborted, patience)[:2]:
            assert isinstance(outcome, Aborted) and "enough" in str(outcome), f"wanted Aborted, came {outcome!r}"


CHECKS: tuple[Callable[..., None], ...] = (
    check_attributes,
    check_order,
    check_sizes,
    check_tags,
    check_any_order,
    check_length,
    check_deadline,
    check_abort,
    check_close,
    check_plans,
    check_native,
    check_runs_again,
    check_progress,
    check_mismatch,
    check_absent_rank,
)
"""Every check, from the simplest on."""
