"""The gloo transport: the conformance suite with ranks as threads, and what processes do when one of them dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from few_plans import few_plans

from abccl.algorithms import Collective
from abccl.errors import Aborted, ArgumentError, ClosedError, DeadlineExceeded, Mismatch, PeerLost, TransportError
from abccl.transports import USER_TAGS, NativeCall, Transport, conformance, gloo_meeting
from abccl.transports import gloo as module

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.torch

GlooTransport = module.GlooTransport

PATIENCE = 30.0


def soon() -> float:
    return time.monotonic() + PATIENCE


def connect(size: int, store: Any = None, patience: float = PATIENCE) -> list[GlooTransport]:
    store = store or torch.distributed.HashStore()
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: GlooTransport(store, rank, size, patience), range(size)))


@contextmanager
def make(size: int, patience: float = PATIENCE) -> Iterator[Sequence[GlooTransport]]:
    transports = connect(size, patience=patience)
    try:
        yield transports
    finally:
        for transport in transports:
            transport.close()


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[..., None]) -> None:
    few_plans(check)(make)


# Messages


def meet(transport: Transport) -> None:
    """A message each way: whoever has it knows that the peer has room for it."""
    peer = 1 - transport.rank
    receive = transport.post_recv(peer, USER_TAGS, memoryview(bytearray(1)))
    transport.wait([receive, transport.post_send(peer, USER_TAGS, memoryview(b"x"))], soon())


def test_messages_of_all_lengths_cross_in_any_order() -> None:
    """More than there is room for, so that some wait for their receives; and each in its tag's order."""
    draw = random.Random(1)
    lengths = [draw.choice((0, 1, 100, 5000, module.EAGER_BYTES, module.EAGER_BYTES + 1, 700_000)) for _ in range(120)]
    tags = [USER_TAGS + draw.randrange(5) for _ in lengths]
    order = sorted(range(len(tags)), key=lambda index: tags[index])  # a tag's messages keep their order

    def message(rank: int, index: int) -> bytes:
        return random.Random(1000 * rank + index).randbytes(lengths[index])

    def main(transport: Transport) -> None:
        meet(transport)
        peer = 1 - transport.rank
        sends = [
            transport.post_send(peer, tag, memoryview(message(transport.rank, index))) for index, tag in enumerate(tags)
        ]
        received = {index: bytearray(lengths[index]) for index in order}
        receives = [transport.post_recv(peer, tags[index], memoryview(into)) for index, into in received.items()]
        transport.wait([*receives, *sends], soon())
        for index, into in received.items():
            assert into == message(peer, index), f"message {index} came otherwise than sent"

    with make(2) as transports:
        conformance.run_ranks(transports, main, PATIENCE)


def test_unread_messages_take_no_more_than_their_room() -> None:
    count, length = 60, 100_000
    assert count * length > module.ROOM

    def main(transport: Transport) -> None:
        meet(transport)
        if transport.rank == 1:
            transport.wait([transport.post_recv(0, USER_TAGS + 1, memoryview(bytearray(1)))], soon())
            for _ in range(count):
                transport.wait([transport.post_recv(0, USER_TAGS, memoryview(bytearray(length)))], soon())
            transport.wait([transport.post_send(0, USER_TAGS, memoryview(b"x"))], soon())
            return
        sends = [transport.post_send(1, USER_TAGS, memoryview(bytes(length))) for _ in range(count)]
        transport.progress()
        done = sum(send.done for send in sends)
        assert 1 <= done <= module.ROOM // length, f"{done} messages were taken without a receive"
        transport.wait([*sends, transport.post_send(1, USER_TAGS + 1, memoryview(b"x"))], soon())
        transport.wait([transport.post_recv(1, USER_TAGS, memoryview(bytearray(1)))], soon())
        again = transport.post_send(1, USER_TAGS, memoryview(bytes(length)))
        transport.progress()
        assert again.done, "there is no more room, although all was read"

    with make(2) as transports:
        conformance.run_ranks(transports, main, PATIENCE)


@pytest.mark.parametrize(("sent", "wanted"), [(10, 20), (20, 10), (0, 1), (1, 0)])
def test_short_messages_of_another_length(sent: int, wanted: int) -> None:
    """As `check_length`, but after ranks have met: the message does not wait for its receive."""

    def main(transport: Transport) -> None:
        meet(transport)
        if transport.rank == 0:
            transport.wait([transport.post_send(1, USER_TAGS, memoryview(bytes(sent)))], soon())
        else:
            transport.wait([transport.post_recv(0, USER_TAGS, memoryview(bytearray(wanted)))], soon())

    with make(2) as transports, pytest.raises(Mismatch, match=f"wanted {wanted} bytes from rank 0, and {sent} came"):
        conformance.run_ranks(transports, main, PATIENCE)


def test_a_message_of_many_megabytes() -> None:
    numbers = torch.arange(10_000_000, dtype=torch.int32).numpy()

    def main(transport: Transport) -> None:
        peer, into = 1 - transport.rank, bytearray(numbers.nbytes)
        posts = [transport.post_recv(peer, USER_TAGS, memoryview(into))]
        posts.append(transport.post_send(peer, USER_TAGS, memoryview(numbers)))
        transport.wait(posts, soon())
        assert into == numbers.tobytes()

    with make(2) as transports:
        conformance.run_ranks(transports, main, PATIENCE)


def test_ranks_may_be_silent_for_longer_than_they_had_to_connect() -> None:
    patience = 2.0
    with make(2, patience) as transports:
        silence = time.monotonic() + 1.5 * patience
        while time.monotonic() < silence:
            for transport in transports:
                transport.progress()
            threading.Event().wait(0.05)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(meet, transports))


def test_a_bell_rings_when_something_has_come() -> None:
    with make(2) as (one, two):
        rung = threading.Event()
        assert two.set_bell(rung.set)
        into = bytearray(1)
        receive = two.post_recv(0, USER_TAGS, memoryview(into))
        two.progress()
        until = soon()
        send = one.post_send(1, USER_TAGS, memoryview(b"x"))
        while not receive.done and time.monotonic() < until:
            one.progress()
            if rung.wait(0.01):
                rung.clear()
                two.progress()
        assert receive.done and into == b"x"
        one.wait([send], until)


def test_what_is_refused() -> None:
    with make(2) as (one, two):
        with pytest.raises(ArgumentError, match="writable"):
            one.post_recv(1, USER_TAGS, memoryview(b"constant"))
        for peer in (0, 2, -1):
            with pytest.raises(ArgumentError, match=f"no peer {peer}"):
                one.post_send(peer, USER_TAGS, memoryview(b"x"))
        two.close()
        with pytest.raises(ClosedError, match="make another"):
            two.post_send(0, USER_TAGS, memoryview(b"x"))


def test_what_was_sent_before_closing_arrives() -> None:
    messages = [bytes([number]) * 1000 for number in range(50)]
    met, sent, closed = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        """Most messages are still under way when their sender closes."""
        sent.wait(PATIENCE)

    def main(transport: Transport) -> None:
        meet(transport)
        if transport.rank == 0:
            assert met.wait(PATIENCE)
            transport.wait([transport.post_send(1, USER_TAGS, memoryview(message)) for message in messages], soon())
            sent.set()
            transport.close()
            closed.set()
            return
        transport.set_bell(hold)
        met.set()
        assert closed.wait(PATIENCE), "closing, or a send for which there is room, waits for a receive"
        into = [bytearray(1000) for _ in messages]
        transport.wait([transport.post_recv(0, USER_TAGS, memoryview(each)) for each in into], soon())
        assert into == messages
        with pytest.raises(PeerLost, match="rank 1 of 2 needs rank 0, and its connection is gone"):
            transport.wait([transport.post_recv(0, USER_TAGS, memoryview(into[0]))], soon())

    with make(2) as transports:
        conformance.run_ranks(transports, main, PATIENCE)


def test_an_abort_reaches_ranks_that_do_not_talk_to_the_one_that_aborts() -> None:
    """Rank 8 of 16 is no neighbour of rank 3."""
    with make(16) as transports:
        transports[3].abort(Aborted("enough"))
        for transport in transports:
            assert transport.broken.wait(PATIENCE), f"rank {transport.rank} was not told"
            with pytest.raises(Aborted, match="enough"):
                transport.progress()


def test_a_split_is_a_group_of_its_own() -> None:
    def main(transport: Transport) -> None:
        members = [2, 0] if transport.rank != 1 else [1]
        part = transport.split(members, "even" if transport.rank != 1 else "odd")
        try:
            assert (part.rank, part.size) == (members.index(transport.rank), len(members))
            if part.size == 2:
                into = bytearray(1)
                posts = [part.post_recv(1 - part.rank, 0, memoryview(into))]
                posts.append(part.post_send(1 - part.rank, 0, memoryview(bytes([transport.rank]))))
                part.wait(posts, soon())
                assert into[0] == members[1 - part.rank]
        finally:
            part.close()

    with make(3) as transports:
        conformance.run_ranks(transports, main, PATIENCE)


def test_closing_gives_everything_back() -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def once() -> None:
        with make(2) as transports:
            conformance.run_ranks(transports, meet, PATIENCE)

    once()
    before = held()
    for _ in range(3):
        once()
    assert held() <= before


# Gloo's own collectives


def all_reduce(dtype: str = "float32", op: str = "sum", **changes: Any) -> NativeCall:
    values: dict[str, Any] = {"collective": Collective.ALL_REDUCE, "dtype": dtype, "op": op, "root": 0, "counts": None}
    values |= {"input_count": 4, "output_count": 4, "sent": None, "received": None, "text": "all_reduce(4 elements)"}
    return NativeCall(**(values | changes))


def test_what_gloo_lacks_is_refused() -> None:
    with make(1) as (transport,):
        for dtype, op in (("int16", "sum"), ("uint64", "max"), ("complex64", "prod")):
            with pytest.raises(ArgumentError, match=f"Gloo has no {op} for {dtype}"):
                transport.prepare_native(all_reduce(dtype, op))


def test_an_all_to_all_in_place() -> None:
    size, part = 3, 50_000

    def main(transport: Transport) -> None:
        vector = torch.arange(size).repeat_interleave(part) + 10 * transport.rank
        call = all_reduce(
            "int64", "", collective=Collective.ALL_TO_ALL, input_count=len(vector), output_count=len(vector)
        )
        transport.prepare_native(call).start(vector.data_ptr(), vector.data_ptr()).wait(soon())
        assert torch.equal(vector, 10 * torch.arange(size).repeat_interleave(part) + transport.rank)

    with make(size) as transports:
        conformance.run_ranks(transports, main, PATIENCE)


@pytest.mark.parametrize("how", ["abort", "deadline", "close"])
def test_a_call_that_not_all_ranks_make_ends(how: str) -> None:
    errors = {"abort": Aborted, "deadline": DeadlineExceeded, "close": PeerLost}
    with make(2) as (one, two):
        vector = torch.ones(4)
        run = one.prepare_native(all_reduce()).start(vector.data_ptr(), vector.data_ptr())
        assert not run.progress()
        if how == "abort":
            two.abort(Aborted("enough"))
        elif how == "close":
            two.close()
        with pytest.raises(errors[how]):
            run.wait(time.monotonic() + (0.05 if how == "deadline" else PATIENCE))
        assert run.work.is_completed(), "Gloo still has the buffers"
        with pytest.raises(errors[how]):
            one.progress()


# Meeting


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(DeadlineExceeded, match=r"rank 1 of 4 waited 0.1 s in vain for ranks \[0, 2, 3\]"):
        GlooTransport(torch.distributed.HashStore(), 1, 4, 0.1)


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(TransportError, match="set GLOO_SOCKET_IFNAME to the interface that joins the hosts"):
        GlooTransport(torch.distributed.HashStore(), 0, 1, PATIENCE)


def test_the_address_is_the_one_that_reaches_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's host knows itself by a loopback address, rank 1's reaches it by another."""
    store = torch.distributed.HashStore()
    store.set("address/0", "127.0.1.1")
    for rank, host, reached in ((1, "keeper", "10.0.0.2"), (0, "itself", "10.0.0.1")):
        towards = {"keeper": "10.0.0.2", "10.0.0.2": "10.0.0.1", "itself": "127.0.1.1"}
        monkeypatch.setattr(gloo_meeting, "host_of", lambda store, host=host: host)
        monkeypatch.setattr(gloo_meeting, "address_towards", towards.get)
        assert gloo_meeting.meet(store, rank, 2, PATIENCE) == reached


# Processes

PROGRAM = """
import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed
from abccl.transports.gloo import GlooTransport

size, port, folder = 3, int(sys.argv[1]), sys.argv[2]

def main(what, rank):
    os.dup2(os.open(f"{folder}/{what}.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    store = torch.distributed.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60))
    transport = GlooTransport(torch.distributed.PrefixStore(what, store), rank, size, 30)
    deadline, peers = time.monotonic() + 30, sorted({0, 1, 2} - {rank})
    receives = [transport.post_recv(peer, 300, memoryview(bytearray(1))) for peer in peers]
    sends = [transport.post_send(peer, 300, memoryview(b"x")) for peer in peers]
    transport.wait([*receives, *sends], deadline)
    if rank == 0 and what == "raise":
        raise ValueError("no reason")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    if what == "stop":
        sends = [transport.post_send(0, 300, memoryview(bytes(1 << 16))) for _ in range(1000)]
        transport.wait(sends, time.monotonic() + 0.5)
    transport.wait([transport.post_recv(rank - 1, 301, memoryview(bytearray(1)))], deadline)

for what in ("kill", "raise", "stop"):
    ranks, ended = {}, {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            main(what, rank)
            sys.exit()
        ranks[pid] = rank
    while len(ended) < size:
        pid, status = os.wait()
        ended[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if what == "stop" and len(ended) == 2:
            os.kill(next(pid for pid, rank in ranks.items() if rank not in ended), signal.SIGKILL)
    print(what, *(ended[rank] for rank in range(size)), flush=True)
"""


def test_processes_end_soon_after_one_has_failed(tmp_path: Path) -> None:
    """One dies, ends without closing, or answers no more: all others raise and exit, also who waits for another."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    command = [sys.executable, "-c", PROGRAM, str(store.port), str(tmp_path)]
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        ended, failed = launcher.communicate(timeout=110)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    said = {path.name: path.read_text() for path in sorted(tmp_path.iterdir())}
    assert ended.splitlines() == ["kill -9 1 1", "raise 1 1 1", "stop -9 1 1"], f"{ended}: {failed} {said}"
    for what, error in (("kill", "PeerLost"), ("raise", "PeerLost"), ("stop", "DeadlineExceeded")):
        for rank in (1, 2):
            last = said[f"{what}.{rank}"].splitlines()[-1]
            assert last.startswith(f"abccl.errors.{error}: "), said[f"{what}.{rank}"]
