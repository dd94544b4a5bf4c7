"""The conformance suite on the in-process transport, with room and without, and on transports that are broken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

from abccl.algorithms.plan import Plan
from abccl.errors import CollectiveError
from abccl.transports import conformance, inproc
from abccl.transports.contract import USER_TAGS, Operation, Prepared, Request
from abccl.transports.inproc import InprocGroup, InprocTransport


def maker(room: int, kind: type[InprocTransport] = InprocTransport, slot_bytes: int = 1 << 16) -> conformance.Make:
    @contextmanager
    def make(size: int) -> Iterator[Sequence[InprocTransport]]:
        group = InprocGroup(size, room)
        transports = [kind(group, rank, slot_bytes, 3) for rank in range(size)]
        yield transports
        for transport in transports:
            transport.close()

    return make


@pytest.mark.parametrize("room", [0, 2])
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_inproc(check: Callable[..., None], room: int) -> None:
    check(maker(room))


class Dropping(InprocTransport):
    """Loses every third message."""

    sent = 0

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        self.sent += 1
        if self.sent % 3 == 0:
            return super().post_send(peer, tag + 1000, data)
        return super().post_send(peer, tag, data)


class Cutting(InprocTransport):
    """Leaves out the last byte of long messages."""

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        return super().post_send(peer, tag, data[:-1] if len(data) > 100 else data)


class Swapping(InprocTransport):
    """Of the messages of the first user tag every second overtakes the one before it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.held: list[tuple[memoryview, _Later]] = []

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        if tag != USER_TAGS:
            return super().post_send(peer, tag, data)
        if not self.held:
            later = _Later()
            self.held.append((data, later))
            return later
        request = super().post_send(peer, tag, data)
        earlier, later = self.held.pop()
        later.request = super().post_send(peer, tag, earlier)
        return request


class _Later:
    """The request of a message that is held back."""

    source = length = wanted = 0

    def __init__(self) -> None:
        self.request: Request | None = None

    @property
    def done(self) -> bool:
        return self.request is not None and self.request.done


class Spoiling(InprocTransport):
    """Changes the last bit of long messages."""

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        if len(data) <= 200:
            return super().post_send(peer, tag, data)
        spoilt = bytearray(data)
        spoilt[-1] ^= 1
        return super().post_send(peer, tag, memoryview(spoilt))


class TagBlind(InprocTransport):
    """Takes no notice of tags."""

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        return super().post_send(peer, 0, data)

    def post_recv(self, peer: int, tag: int, into: memoryview) -> Request:
        return super().post_recv(peer, 0, into)


class LonelyAbort(InprocTransport):
    """Tells nobody of an abort."""

    def abort(self, error: Exception) -> None:
        pass


class Impatient(InprocTransport):
    """Waits for nothing."""

    def wait(self, requests: Sequence[Request], deadline: float) -> None:
        self.progress()


class _Scribbling:
    """Runs a plan and then writes where it may not: one byte of the input, or one after the output."""

    def __init__(self, prepared: Prepared, transport: InprocTransport, where: str, plan: Plan) -> None:
        self.prepared, self.transport, self.where, self.plan = prepared, transport, where, plan

    def start(self, input: int, output: int) -> Any:
        import ctypes

        execution = self.prepared.start(input, output)
        ends = self.plan.table[:, 0] + self.plan.table[:, 2]
        address = input if self.where == "input" else output and output + int(ends.max(initial=0)) * self.plan.itemsize
        if address and self.plan.table[:, 0].any():
            ctypes.memset(address, 0x5A, 1)
        return execution


class WritesInput(InprocTransport):
    """Its plans change their input."""

    where = "input"

    def prepare(self, plan: Plan, operation: Operation) -> Prepared:
        return _Scribbling(super().prepare(plan, operation), self, self.where, plan)


class WritesBeyond(WritesInput):
    """Its plans write past their output."""

    where = "output"


class Unsigned(InprocTransport):
    """All operations have the same signature."""

    def prepare(self, plan: Plan, operation: Operation) -> Prepared:
        return super().prepare(plan, Operation(operation.dtype, operation.op, operation.factor, 0, "something"))


@pytest.mark.parametrize(
    ("kind", "check", "reason"),
    [
        (Dropping, conformance.check_order, "waited in vain for . of .* messages"),
        (Dropping, conformance.check_any_order, "waited in vain"),
        (Dropping, conformance.check_plans, r"waits .* at its deadline"),
        (Cutting, conformance.check_sizes, "wanted 4097 bytes from rank ., and 4096 came"),
        (Cutting, conformance.check_plans, "got 191 bytes from rank . that are no message"),
        (Swapping, conformance.check_order, r"in another order than sent: \[bytearray\(b'.x01.*b'.x00"),
        (Spoiling, conformance.check_sizes, "a message of 4097 bytes came otherwise than sent"),
        (Spoiling, conformance.check_any_order, "wrong bytes from rank"),
        (Spoiling, conformance.check_plans, "elements are wrong"),
        (TagBlind, conformance.check_tags, "wanted 32867 bytes from rank 0, and 100 came"),
        (LonelyAbort, conformance.check_abort, "wanted Aborted by the first reason, came DeadlineExceeded"),
        (LonelyAbort, conformance.check_length, "rank 0 was not told: wanted Mismatch"),
        (LonelyAbort, conformance.check_deadline, "rank 0 was not told: wanted DeadlineExceeded"),
        (Impatient, conformance.check_sizes, "came otherwise than sent"),
        (Impatient, conformance.check_deadline, "a wait ended before its deadline"),
        (WritesInput, conformance.check_plans, "elements are wrong"),
        (WritesBeyond, conformance.check_plans, "bytes beside a buffer were written"),
        (Unsigned, conformance.check_mismatch, r"the message does not say 'all_reduce\(float32, sum, 1000"),
    ],
)
def test_a_broken_transport_is_found(kind: type[InprocTransport], check: Callable[..., None], reason: str) -> None:
    """For the reason that it is broken by: what is whole passes with the same patience."""
    with pytest.raises((AssertionError, CollectiveError), match=reason):
        check(maker(2, kind), patience=0.3)
    passes_whole(check)


@cache
def passes_whole(check: Callable[..., None]) -> None:
    check(maker(2), patience=0.3)


class Deaf(InprocTransport):
    """Its waits know no deadline."""

    def wait(self, requests: Sequence[Request], deadline: float) -> None:
        super().wait(requests, deadline + 60)


def test_a_wait_that_ignores_its_deadline_is_found_soon() -> None:
    """Soon: before pytest ends the test."""
    begun = time.monotonic()
    with pytest.raises(AssertionError, match="never ended: a wait ignores its deadline"):
        conformance.check_deadline(maker(2, Deaf), patience=0.3)
    assert time.monotonic() - begun < 20


def test_the_whole_suite_stops_at_the_first_fault() -> None:
    with pytest.raises((AssertionError, CollectiveError)):
        conformance.check_transport(maker(2, Spoiling), sizes=(2,), patience=1)


def test_a_group_is_one_call() -> None:
    assert [(t.rank, t.size) for t in inproc(3)] == [(0, 3), (1, 3), (2, 3)]
