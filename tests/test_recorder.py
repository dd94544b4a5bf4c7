"""The flight recorder: what the native engine and Python tell it of collectives and messages, over each transport."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from abccl import Aborted, ClosedError, Communicator, DeadlineExceeded, Mismatch
from abccl.transports import Transport, _native
from abccl.transports.inproc import inproc
from abccl.transports.joint import joint_threads
from abccl.transports.shm import shm_threads

GROUPS: dict[str, Callable[[], Sequence[Transport]]] = {
    "shm": lambda: shm_threads(2),
    "inproc": lambda: inproc(2),
    "joint": lambda: joint_threads([[0], [1]]),
}


@pytest.fixture(params=GROUPS)
def group(request: pytest.FixtureRequest) -> Iterator[list[Communicator]]:
    """Two ranks, threads of this process."""
    communicators = [Communicator(transport, timeout=20, name="pair") for transport in GROUPS[request.param]()]
    yield communicators
    for communicator in communicators:
        communicator.close()


def together(group: Sequence[Communicator], call: Callable[[Communicator], Any]) -> list[Any]:
    """What the call returns on each rank."""
    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(call, group))


def test_collectives_are_recorded_in_their_order(group: list[Communicator]) -> None:
    before = time.monotonic()

    def calls(c: Communicator) -> None:
        c.all_reduce(np.ones(6, np.float32), algorithm="ring")
        c.broadcast(np.ones(3), 1, algorithm="tree")
        c.barrier(async_op=True).wait()

    together(group, calls)
    for rank, c in enumerate(group):
        record = c.flight_record()
        assert (record["group"], record["rank"], record["size"]) == ("pair", rank, 2)
        assert (record["entered"], record["finished"], record["error"], record["waiting"]) == (3, 3, None, None)
        reduce, broadcast, barrier = record["operations"]
        assert [one["number"] for one in record["operations"]] == [1, 2, 3]
        assert reduce["call"] == "all_reduce(float32, sum, 6 elements, ring)" and reduce["bytes"] == 24
        assert broadcast["call"].startswith("broadcast(float64, 3 elements, root 1, tree") and broadcast["bytes"] == 24
        assert barrier["call"].startswith("barrier(")
        stamps = [before, *(time for one in record["operations"] for time in (one["start"], one["end"]))]
        assert stamps == sorted(stamps) and stamps[-1] < time.monotonic() + 0.01
        assert {one["state"] for one in record["operations"]} == {"finished"}


def test_messages_are_recorded_with_their_peer_and_the_librarys_own_are_not(group: list[Communicator]) -> None:
    def calls(c: Communicator) -> None:
        if c.rank == 0:
            c.send(np.ones(5), 1, 7)
        else:
            assert c.recv(np.zeros(5)) == 0
        if c._transport.name != "inproc":  # it can not be split
            part = c.split(0)
            assert part is not None and part.name == "pair/0.0"
            part.close()

    together(group, calls)
    for rank, c in enumerate(group):
        (message,) = c.flight_record()["messages"]
        assert (message["call"], message["peer"], message["bytes"]) == (("send", "recv")[rank], 1 - rank, 40)
        assert message["tag"] == (None if rank else 7)
        assert message["state"] == "finished" and message["end"] is not None and message["start"] <= message["end"]


def test_a_failure_is_recorded_with_where_the_rank_waited(group: list[Communicator]) -> None:
    together(group, Communicator.barrier)
    group[0].set_timeout(0.2)
    with pytest.raises(DeadlineExceeded) as raised:
        group[0].all_reduce(np.ones(6))
    record = group[0].flight_record()
    assert record["error"] == f"DeadlineExceeded: {raised.value}"[:511]
    assert (record["entered"], record["finished"]) == (2, 1)
    last = record["operations"][-1]
    assert last["state"] == "failed" and last["end"] is not None
    assert last["end"] - last["start"] >= 0.15
    if record["peers"]:  # it sees the other, and has looked where it waits itself
        assert record["waiting"] is not None and record["waiting"]["peer"] == 1
        assert record["waiting"]["text"].startswith("waits at step 1 for block")
        assert record["peers"][0]["entered"] == 1


def test_the_recorder_keeps_the_last_thousand_and_all_their_texts() -> None:
    (alone,) = shm_threads(1)
    with Communicator(alone) as c:
        for count in range(3000):
            c.all_reduce(np.ones(1 + count % 1500, np.uint8))
        operations = c.flight_record()["operations"]
    assert len(operations) == 1024
    assert [one["number"] for one in operations] == list(range(3000 - 1023, 3001))
    for one in operations:
        assert f", {1 + (one['number'] - 1) % 1500} elements, " in one["call"]
        assert one["bytes"] == 1 + (one["number"] - 1) % 1500


def test_steps_are_stamped_where_messages_are_long_or_where_asked_for() -> None:
    group = [Communicator(transport) for transport in shm_threads(2)]
    together(group, lambda c: c.all_reduce(np.ones(16, np.float32), algorithm="ring"))
    assert group[0].flight_record()["steps"] == []
    together(group, lambda c: c.all_reduce(np.ones(1 << 15, np.float32), algorithm="ring"))
    long = group[0].flight_record()
    (operation,) = [one for one in long["operations"] if one["number"] == 2]
    assert {one["step"] for one in long["steps"]} == {1, 2} and {one["number"] for one in long["steps"]} == {2}
    assert {one["peer"] for one in long["steps"]} == {1}
    for step in long["steps"]:
        assert operation["start"] <= step["end"] <= operation["end"]
    group[0]._recorder.set_records_steps(True)
    together(group, lambda c: c.all_reduce(np.ones(16, np.float32), algorithm="ring"))
    assert [(one["number"], one["step"]) for one in group[0].flight_record()["steps"]][-2:] == [(3, 1), (3, 2)]
    for c in group:
        c.close()


def test_a_blob_is_read_as_long_as_its_round_is_kept_and_the_first_answer_wins() -> None:
    first, second = (transport.native for transport in shm_threads(2))
    assert first.board_read(1, 1) == (0, None)
    second.board_publish(1, b"one")
    second.board_publish(2, b"")
    assert first.board_read(1, 1) == (2, b"one") and first.board_read(1, 2) == (2, b"")
    second.board_publish(3, b"three")
    assert first.board_read(1, 1) == (3, None)
    with pytest.raises(ValueError, match="16384 bytes"):
        second.board_publish(4, bytes(_native.BOARD_BYTES + 1))
    assert second.decide(5, 7) == 7 and first.decide(5, 9) == 7 and first.decide(6, 9) == 9
    assert first.decide(7, 0) == 0 and first.decide(5, 0) == 7  # only asks
    with pytest.raises(ValueError, match="questions"):
        first.decide(_native.DECISIONS, 1)


def test_a_message_within_a_host_of_several_is_recorded_once() -> None:
    group = [Communicator(transport) for transport in joint_threads([[0, 1], [2]])]

    def calls(c: Communicator) -> None:
        if c.rank == 0:
            c.send(np.ones(5), 1, 7)
        elif c.rank == 1:
            c.recv(np.zeros(5), 0, 7)

    together(group, calls)
    assert [[one["tag"] for one in c.flight_record()["messages"]] for c in group] == [[7], [7], []]
    for c in group:
        c.close()


def test_steps_name_peers_as_users_do() -> None:
    group = [Communicator(transport) for transport in joint_threads([[0, 2], [1, 3]])]
    together(group, lambda c: c.all_reduce(np.ones(1 << 14, np.float32), algorithm="ring"))
    for c in group:
        steps = c.flight_record()["steps"]
        assert steps and {one["peer"] for one in steps} <= {(c.rank - 1) % 4, (c.rank + 1) % 4}
        c.close()


def test_an_operation_lasts_as_long_as_its_steps() -> None:
    (alone,) = shm_threads(1)
    with Communicator(alone) as c:
        x, out = np.ones(1 << 22), np.empty(1 << 22)
        c.all_reduce(x, out=out)
        before = time.perf_counter()
        c.all_reduce(x, out=out)
        took = time.perf_counter() - before
        last = c.flight_record()["operations"][-1]
    assert last["end"] is not None and 0.5 * took < last["end"] - last["start"] <= took


def test_what_a_posting_call_raises_is_recorded() -> None:
    group = [Communicator(transport, timeout=20) for transport in shm_threads(2)]
    work = group[0].send(np.ones(4), 1, 3, async_op=True)
    with pytest.raises(Mismatch):
        group[1].recv(np.ones(5), 0, 3)
    record = group[1].flight_record()
    assert record["error"] is not None and record["error"].startswith("Mismatch: recv: rank 1 wants 40 bytes")
    assert record["messages"][-1]["state"] == "failed"
    del work
    for c in group:
        c.close()


def test_an_observers_error_is_not_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: said.append(about.exc_value))

    def observer(text: str) -> Callable[[Any], None]:
        def ended(how: Any) -> None:
            raise KeyError(text)

        return ended

    first, second = (Communicator(transport, timeout=20) for transport in shm_threads(2))
    first.observe(observer)
    second.abort("enough")
    with pytest.raises(Aborted, match="enough"):
        first.barrier()
    assert [type(error) for error in said] == [KeyError]
    for c in (first, second):
        c.close()


def test_a_deadline_of_what_nobody_recorded_has_words(group: list[Communicator]) -> None:
    assert group[0]._recorder.title().endswith(' in group "pair"')  # even if none has begun


def test_the_last_owner_may_be_the_progress_thread() -> None:
    for _ in range(20):
        first, second = (Communicator(transport, timeout=20) for transport in shm_threads(2))
        work = first.recv(np.zeros(1), 1, async_op=True)
        first.close()
        del first
        # Who has the interpreter submits, while the thread gives back what only it still had.
        pending = [second.send(np.ones(1), 0, async_op=True) for _ in range(3)]
        with pytest.raises(ClosedError):
            work.wait()
        del work, pending
        second.close()
