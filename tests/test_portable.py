"""The portable engine: its messages on the wire, and what it says when something is wrong. Also the types' numbers."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from abccl.algorithms import Algorithm, Collective, Program, lookup, recv, send
from abccl.errors import Aborted, ArgumentError, DeadlineExceeded, Mismatch
from abccl.transports import _native, inproc
from abccl.transports.contract import Execution, Request
from abccl.transports.inproc import InprocTransport
from abccl.transports.message import HEAD_BYTES, Heads
from abccl.transports.portable import PortablePlan
from abccl.transports.trial import Case, Trial
from abccl.transports.types import NUMBERS, OPERATORS, TYPES, check_operator, numpy_dtype, numpy_operator

RING = lookup(Collective.ALL_REDUCE, "ring")


class Recording(InprocTransport):
    """Notes tag and payload length of what it sends."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sent: list[tuple[int, int]] = []

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        self.sent.append((tag, len(data) - HEAD_BYTES))
        return super().post_send(peer, tag, data)


def recording(size: int) -> list[Recording]:
    group = inproc(size)[0].group
    return [Recording(group, rank, 1 << 16, 4) for rank in range(size)]


def start(transports: list[Any], *cases: Case) -> list[Execution]:
    """A case for each rank (or one for all); the trials are kept alive by their transports."""
    each = cases if len(cases) > 1 else cases * len(transports)
    trials = [Trial(transport, case) for transport, case in zip(transports, each)]
    for transport, trial in zip(transports, trials):
        transport.trial = trial
    return [trial.start() for trial in trials]


def finish(executions: list[Execution]) -> None:
    """All in this thread, until all are finished or one raises."""
    for _ in range(10_000):
        executions = [execution for execution in executions if not execution.progress()]
        if not executions:
            return
    raise AssertionError("never finished")


def message(kind: type[Exception], executions: list[Execution]) -> str:
    with pytest.raises(kind) as caught:
        finish(executions)
    return str(caught.value)


@pytest.mark.parametrize(
    "other",
    [Case(RING, 2, 1008), Case(RING, 2, 1000, op="max"), Case(lookup(Collective.BROADCAST, "tree"), 2, 1000, root=0)],
    ids=lambda case: case.text,
)
def test_a_mismatch_names_both_ranks_and_both_calls(other: Case) -> None:
    own = Case(RING, 2, 1000)
    transports = inproc(2)
    executions = start(transports, other, own)
    text = message(Mismatch, executions)
    assert f"rank 0 called {other.text} #1" in text or f"rank 0 of 2 called {other.text} #1" in text
    assert f"rank 1 called {own.text} #1" in text or f"rank 1 of 2 called {own.text} #1" in text
    for transport in transports:  # a root that has sent all is finished, and hears of it in its next call
        with pytest.raises(Mismatch, match="called"):
            transport.progress()


def test_a_call_that_one_rank_left_out_is_seen_by_its_number() -> None:
    broadcast, own = Case(lookup(Collective.BROADCAST, "tree"), 2, 10), Case(RING, 2, 10)
    transports = inproc(2)
    ahead = Trial(transports[0], broadcast)
    ahead.start().wait(time.monotonic() + 60)  # there is room for its message, so the root is finished
    text = message(Mismatch, start(transports, own)[1:])
    assert f"rank 1 of 2 called {own.text} #1, rank 0 called {broadcast.text} #1" in text
    assert "in the same order" in text


def test_the_same_call_repeated_unequally_often_is_seen() -> None:
    case = Case(lookup(Collective.BROADCAST, "tree"), 2, 10)
    transports = inproc(2)
    transports[1].runs = 1
    assert f"{case.text} #2, rank 0 called {case.text} #1" in message(Mismatch, start(transports, case))


def test_blocks_that_are_swapped_do_not_go_unnoticed() -> None:
    def swapped(rank: int, size: int) -> Program:
        yield (send(1, 0), send(1, 1)) if rank == 0 else (recv(0, 1), recv(0, 0))

    wrong = Algorithm("swapped", Collective.BROADCAST, swapped, lambda _: 2, lambda _: 1)
    text = message(Mismatch, start(inproc(2), Case(wrong, 2, 128)))
    assert "at step 1 rank 1 of 2 wants from rank 0 blocks (1,) of segment 0, 256 bytes" in text
    assert "it sends other blocks of segment 0, 256 bytes" in text
    assert "abccl verify" in text


def test_counts_that_differ_under_one_signature_are_seen() -> None:
    tree = lookup(Collective.GATHER, "direct")
    cases = [Case(tree, 2, 8), Case(tree, 2, 9)]
    transports = inproc(2)
    trials = [Trial(transport, case) for transport, case in zip(transports, cases)]
    assert isinstance(trials[1].prepared, PortablePlan)
    trials[1].prepared.operation = trials[0].prepared.operation  # type: ignore[attr-defined]
    trials[1].prepared.heads = trials[0].prepared.heads  # type: ignore[attr-defined]
    text = message(Mismatch, [trial.start() for trial in trials])
    assert "32 bytes" in text and "it sends these blocks of segment 0, 36 bytes" in text


def test_bytes_of_somebody_else_are_seen() -> None:
    transports = inproc(2)
    transports[0].post_send(1, 0, memoryview(b"hello"))
    text = message(Mismatch, start(transports, Case(RING, 2, 10))[1:])
    assert text == "rank 1 of 2 got 5 bytes from rank 0 that are no message of this library"


def test_a_deadline_says_what_is_waited_for() -> None:
    transports = inproc(4)
    case = Case(RING, 4, 1000)
    executions = start(transports, case)
    for _ in range(20):  # rank 1 never moves
        for rank in (0, 2, 3):
            executions[rank].progress()
    with pytest.raises(DeadlineExceeded) as caught:
        executions[3].wait(time.monotonic())
    assert str(caught.value).startswith(
        f"{case.text} #1: rank 3 of 4 waits at step 2 for blocks (0,) from rank 2 at its deadline"
    )
    with pytest.raises(DeadlineExceeded, match="rank 3 of 4 waits at step 2"):
        executions[1].progress()


def test_a_deadline_says_who_does_not_take_a_message() -> None:
    broadcast = lookup(Collective.BROADCAST, "tree")
    case = Case(broadcast, 2, 100, segment=64)
    (execution,) = start(inproc(2, room=0)[:1], case)
    with pytest.raises(DeadlineExceeded, match=r"waits since step 1 for rank 1 to take blocks \(0,\) of segment 1 at"):
        execution.wait(time.monotonic())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("odd")], ids=repr)
def test_whatever_ends_a_wait_ends_it_for_all(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    transports = inproc(2)
    executions = start(transports, Case(RING, 2, 10))

    def interrupted(deadline: float) -> None:
        raise error

    monkeypatch.setattr(transports[0], "idle", interrupted)
    with pytest.raises(type(error)):
        executions[0].wait(time.monotonic() + 60)
    with pytest.raises(Aborted, match=f"rank 0 of 2 gave up: {type(error).__name__}"):
        executions[1].wait(time.monotonic() + 60)


def test_progress_raises_after_an_abort() -> None:
    executions = start(inproc(2), Case(RING, 2, 10))
    executions[0].abort("enough")
    for execution in executions:
        with pytest.raises(Aborted, match="enough"):
            execution.progress()


def test_lanes_have_their_tags_and_empty_messages_go_once() -> None:
    # 100 elements in blocks of 64 and 36, segments of 16: four segments, the last of which has none of block 1.
    transports = recording(2)
    finish(start(transports, Case(RING, 2, 100, segment=16, lanes=2)))
    assert sorted(transports[0].sent) == [(0, 16)] + [(0, 64)] * 3 + [(1, 64)] * 3
    transports = recording(2)
    finish(start(transports, Case(RING, 2, 0, segment=16, lanes=2)))
    assert transports[0].sent == [(0, 0)] * 2
    transports = recording(3)
    finish(start(transports, Case(lookup(Collective.BARRIER, "recursive_doubling"), 3, 0)))
    assert transports[0].sent == [(0, 0)] * 2


def test_send_buffers_are_bounded() -> None:
    transports = inproc(3, room=0)
    executions = start(transports, Case(RING, 3, 3000, segment=10))
    finish(executions)
    for transport in transports:
        prepared = transport.trial.prepared  # type: ignore[attr-defined]
        assert [len(lane.free) for lane in prepared.lanes] == [2]


def test_a_long_text_is_cut() -> None:
    transports = inproc(2)
    trials = [Trial(transport, Case(RING, 2, count)) for transport, count in zip(transports, (10, 20))]
    for trial in trials:
        long = replace(trial.prepared.operation, text="é" * 500)  # type: ignore[attr-defined]
        trial.prepared.heads = Heads(long, "one")  # type: ignore[attr-defined]
    assert "é" * 80 in message(Mismatch, [trial.start() for trial in trials])


def test_numbers_are_the_native_cores() -> None:
    assert [_native.type_name(number) for number in range(len(TYPES))] == [element.name for element in TYPES]
    assert [_native.type_size(number) for number in range(len(TYPES))] == [element.itemsize for element in TYPES]
    assert [_native.op_name(number) for number in OPERATORS.values()] == list(OPERATORS)
    for dtype, type_number in NUMBERS.items():
        assert numpy_dtype(dtype).itemsize == TYPES[type_number].itemsize
        for op, op_number in OPERATORS.items():
            assert _native.op_defined(op_number, type_number) == _is_defined(op, dtype), (op, dtype)


@pytest.mark.parametrize(
    ("op", "dtype", "words"),
    [
        ("mean", "float32", "no operator is called 'mean': there are sum, prod"),
        ("sum", "float128", "no element type 'float128' is served: convert to one of float16"),
        ("band", "float32", "band is defined for signed and unsigned integers, bool, and this is float32"),
        ("max", "complex64", "complex64 has sum, prod, avg, premul_sum"),
        ("avg", "int32", "avg is defined for floating types, complex types, and this is int32"),
    ],
)
def test_undefined_operators_are_refused(op: str, dtype: str, words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_operator(op, dtype)
    assert words in str(caught.value)


def test_a_bool_is_a_truth_value() -> None:
    a, b = np.array([False, False, True, True]), np.array([False, True, False, True])
    for op, wanted in {"sum": a | b, "max": a | b, "prod": a & b, "min": a & b, "bxor": a ^ b}.items():
        assert np.array_equal(numpy_operator(op, "bool")(a, b), wanted), op


def _is_defined(op: str, dtype: str) -> bool:
    try:
        check_operator(op, dtype)
    except ArgumentError:
        return False
    return True
