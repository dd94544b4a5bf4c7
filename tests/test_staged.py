"""The staged wire over fake devices: all plans, how lanes overlap, how runs fail, and what becomes of the memory."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from staged_ranks import staged

from abccl.algorithms import Collective, lookup
from abccl.cuda.driver import WAIT
from abccl.errors import Aborted, ArgumentError, DeadlineExceeded, Mismatch, PeerLost
from abccl.transports import conformance
from abccl.transports import staged as module
from abccl.transports.contract import Request
from abccl.transports.device import DeviceTransport
from abccl.transports.inproc import InprocGroup, InprocTransport
from abccl.transports.staged import StagedWire, mpi_is_cuda_aware
from abccl.transports.trial import Case, Trial, cases

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0


@contextmanager
def group(
    size: int, room: int = 2, lanes: int = 4, kind: type[InprocTransport] = InprocTransport, direct: bool = False
) -> Iterator[Sequence[DeviceTransport]]:
    """Ranks on fake devices."""
    shared = InprocGroup(size, room)
    ranks = [staged(kind(shared, rank, 1 << 16, lanes), direct) for rank in range(size)]
    yield ranks
    for rank in ranks:
        rank.close()


@contextmanager
def strict(*args: Any, **options: Any) -> Iterator[Sequence[DeviceTransport]]:
    """The same; when they are closed, and their hosts are gone, nothing is left of the memory of their wires."""
    with group(*args, **options) as ranks:
        yield ranks
        memories = [(rank.driver, memory.address) for rank in ranks for memory in all_memory(rank.wire)]
    for each in ranks:
        del each.host, each.wire.host  # type: ignore[attr-defined]
    del each
    gc.collect()
    left = [driver.pointer(address) for driver, address in memories]
    assert {pointer.kind for pointer in left} <= {"unknown"}, f"was not given back: {left}"


def all_memory(wire: Any) -> list[Any]:
    """What a wire has allocated, and not given back."""
    return wire._buffers + [registers for lane in wire._lanes for registers in lane.registers]


def until(reached: Callable[[], bool]) -> None:
    """Wait until that is so."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, "it never came"


def progress(executions: Sequence[Any]) -> bool:
    """Let all go on; whether all are finished."""
    return min([execution.progress() for execution in executions])


def run(ranks: Sequence[DeviceTransport], case: Case) -> None:
    """Run the case and look at the results."""

    def main(transport: Any) -> None:
        trial = Trial(transport, case)
        trial.start().wait(time.monotonic() + PATIENCE)
        trial.verify()

    conformance.run_ranks(ranks, main, PATIENCE)


BROADCAST = lookup(Collective.BROADCAST, "tree")


def segments(count: int, lanes: int = 1) -> Case:
    """Broadcast from rank 0 to rank 1, in this many segments of 64 bytes."""
    return Case(BROADCAST, 2, 16 * count, segment=16, lanes=lanes)


# Plans


def test_plans() -> None:
    conformance.check_plans(group, PATIENCE, sizes=(2,))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_plans_of_many_segments(size: int) -> None:
    def main(transport: Any) -> None:
        for case in cases(size, 4):
            if case.count == 131:
                trial = Trial(transport, case)
                trial.start().wait(time.monotonic() + PATIENCE)
                trial.verify()

    with strict(size, room=0) as ranks:
        conformance.run_ranks(ranks, main, PATIENCE)


@pytest.mark.parametrize(
    "check",
    [
        conformance.check_runs_again,
        conformance.check_progress,
        conformance.check_mismatch,
        conformance.check_absent_rank,
        conformance.check_close,
    ],
    ids=lambda check: check.__name__,
)
def test_runs(check: Callable[..., None]) -> None:
    check(group, PATIENCE)


def test_two_processes(mpirun: list[str]) -> None:
    command = [*mpirun, "-n", "2", sys.executable, str(ROOT / "tests" / "staged_ranks.py")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = job.communicate(timeout=PATIENCE)
    finally:
        job.terminate()  # which the launcher passes on to its ranks
        job.wait(20)
    assert job.returncode == 0, output
    assert output.count("all plans are right") == 2, output


# Lanes, and what they use


class Held(InprocTransport):
    """Messages of lane 0 are not taken before they are released."""

    held = True

    def _match(self, receive: Any) -> None:
        if not (self.held and receive.tag == 0):
            super()._match(receive)


def test_other_lanes_go_on() -> None:
    """While lane 0 waits for its message, all segments of lane 1 travel, and are copied to where they belong."""
    with strict(2, lanes=2, kind=Held) as ranks:
        trials = [Trial(rank, segments(8, lanes=2)) for rank in ranks]
        executions = [trial.start() for trial in trials]

        def received() -> Any:
            ranks[1].driver.synchronize(ranks[1].stream)
            trials[1].fetch()
            return trials[1].output.reshape(8, 16)  # type: ignore[union-attr]

        wanted = trials[0].case.given(0).reshape(8, 16)
        until(lambda: not progress(executions) and (received()[1::2] == wanted[1::2]).all())
        assert not received()[::2].any()
        Held.held = False
        try:
            until(lambda: progress(executions))
        finally:
            Held.held = True
        assert (received() == wanted).all()


def test_a_wire_has_few_lanes() -> None:
    with strict(1, lanes=9) as (rank,):
        assert rank.lanes == 4
    with strict(1, lanes=2) as (rank,):
        assert rank.lanes == 2


def test_memory_is_used_again() -> None:
    """However many runs and segments there are: two buffers for each message of the longest step, and the registers."""
    with strict(2) as ranks:
        for _ in range(3):
            run(ranks, segments(40, lanes=2))
            for rank in ranks:
                assert len(all_memory(rank.wire)) <= 2 * (2 + 1)


class _Hold:
    """Stops a stream of a rank's."""

    def __init__(self, rank: DeviceTransport, stream: int) -> None:
        self.driver, self.word = rank.driver, rank.driver.allocate_pinned(4)
        self.driver.operate(stream, [(WAIT, self.word, 1)])

    def release(self) -> None:
        ctypes.c_int32.from_address(self.word).value = 1
        self.driver.free_pinned(self.word)


def slow_copies(direction: str, spoil: Callable[[StagedWire], None] | None = None) -> None:
    """Broadcast ten segments where one side's copies have to wait; `spoil` breaks that side's wire."""
    slow, fast = (0, 1) if direction == "outward" else (1, 0)
    with strict(2) as ranks:
        wires: list[Any] = [rank.wire for rank in ranks]
        if spoil is not None:
            spoil(wires[slow])
        trials = [Trial(rank, segments(10)) for rank in ranks]
        hold = _Hold(ranks[slow], getattr(wires[slow], direction))
        executions = [trial.start() for trial in trials]
        for _ in range(100):
            progress(executions)
            for stream in (ranks[fast].stream, wires[fast].outward):
                ranks[fast].driver.synchronize(stream)
        hold.release()
        until(lambda: progress(executions))
        for trial in trials:
            trial.verify()


class Eager:
    """A driver for which all events are done."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def is_done(self, event: int) -> bool:
        return True


def never_ask(wire: StagedWire) -> None:
    wire.driver = Eager(wire.driver)


@pytest.mark.parametrize("direction", ["outward", "inward"])
def test_slow_copies(direction: str) -> None:
    """A message is not sent before it is copied out, nor its buffer filled again before it is copied in."""
    slow_copies(direction)
    with pytest.raises(AssertionError, match="elements are wrong"):
        slow_copies(direction, never_ask)


def late_receiver(ranks: Sequence[DeviceTransport]) -> None:
    """The receiver begins when the sender can do no more."""
    trials = [Trial(rank, segments(10)) for rank in ranks]
    executions = [trials[0].start()]
    for _ in range(100):
        progress(executions)
        ranks[0].driver.synchronize(ranks[0].wire.outward)  # type: ignore[attr-defined]
    executions.append(trials[1].start())
    until(lambda: progress(executions))
    trials[1].verify()


def test_a_message_waits_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    with strict(2, room=0) as ranks:
        late_receiver(ranks)
    monkeypatch.setattr(module._Memory, "is_posted", property(lambda memory: False))
    with pytest.raises(AssertionError, match="elements are wrong"), strict(2, room=0) as ranks:
        late_receiver(ranks)


# Failures


def rank_0_aborts(ranks: Sequence[DeviceTransport], execution: Any) -> None:
    ranks[0].abort(Aborted("enough"))
    execution.wait(time.monotonic() + PATIENCE)


def rank_0_closes(ranks: Sequence[DeviceTransport], execution: Any) -> None:
    ranks[0].close()
    execution.wait(time.monotonic() + PATIENCE)


def rank_0_is_late(ranks: Sequence[DeviceTransport], execution: Any) -> None:
    execution.wait(time.monotonic() + 0.05)


def rank_0_sends_too_little(ranks: Sequence[DeviceTransport], execution: Any) -> None:
    ranks[0].post_send(1, 0, memoryview(bytes(60)))
    execution.wait(time.monotonic() + PATIENCE)


@pytest.mark.parametrize(
    ("end", "kind", "words"),
    [
        (rank_0_aborts, Aborted, "enough"),
        (rank_0_closes, PeerLost, "rank 0"),
        (rank_0_is_late, DeadlineExceeded, "rank 1 of 2 is not done at its deadline"),
        (rank_0_sends_too_little, Mismatch, "rank 1 of 2 wanted 64 bytes from rank 0, and 60 came"),
    ],
)
def test_failures(end: Callable[..., None], kind: type[Exception], words: str) -> None:
    """What waits for a message gets the error. The memory that was posted lives as long as the host transport, which
    may still write it; `group` sees that it is given back then."""
    with strict(2) as ranks:
        wire, driver = ranks[1].wire, ranks[1].driver
        assert isinstance(wire, StagedWire)
        execution = Trial(ranks[1], segments(8, lanes=2)).start()
        assert len(posted(wire)) == 2
        with pytest.raises(kind, match=words):
            end(ranks, execution)
        kept = [memory.address for memory in posted(wire)]
        assert kept
        ranks[1].close()
        assert {driver.pointer(address).kind for address in kept} == {"host"}


def posted(wire: StagedWire) -> list[Any]:
    """The buffers whose messages are under way."""
    return [memory for memory in wire._buffers if memory.is_posted]


# Direct


class Knowing(InprocTransport):
    """An MPI that looks at what memory it is given."""

    name = "mpi"
    kinds: set[str] = set()
    driver: Any

    def _look(self, tag: int, data: memoryview) -> None:
        if tag < self.lanes and data.nbytes:
            self.kinds.add(self.driver.pointer(np.frombuffer(data, np.uint8).ctypes.data).kind)

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        self._look(tag, data)
        return super().post_send(peer, tag, data)

    def post_recv(self, peer: int, tag: int, into: memoryview) -> Request:
        self._look(tag, into)
        return super().post_recv(peer, tag, into)


@pytest.mark.parametrize("direct", [False, True])
def test_what_memory_mpi_gets(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "mpi_is_cuda_aware", lambda: direct)
    monkeypatch.setattr(module, "MPITransport", Knowing)
    monkeypatch.setattr(Knowing, "kinds", set())
    with strict(3, kind=Knowing, direct=direct) as ranks:
        for rank in ranks:
            rank.host.driver = rank.driver  # type: ignore[attr-defined]
        for collective in (Collective.ALL_REDUCE, Collective.ALL_GATHER):
            for count in (0, 1000):
                run(ranks, Case(lookup(collective, "ring"), 3, count, segment=100, lanes=3))
    assert Knowing.kinds == {"device" if direct else "host"}


@pytest.mark.parametrize("stream", ["stream", "outward"])
def test_direct_messages_wait_for_the_device(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent before the device has made it, nothing received while the device may read what was there."""
    monkeypatch.setattr(module, "mpi_is_cuda_aware", lambda: True)
    monkeypatch.setattr(module, "MPITransport", Knowing)
    monkeypatch.setattr(Knowing, "_look", lambda *_: None)

    def go(spoil: Callable[[StagedWire], None] | None = None) -> None:
        with strict(2, kind=Knowing, direct=True) as ranks:
            wires: list[Any] = [rank.wire for rank in ranks]
            slow = 1 if stream == "stream" else 0
            if spoil is not None:
                spoil(wires[slow])
            trials = [Trial(rank, segments(10)) for rank in ranks]
            hold = _Hold(ranks[slow], ranks[1].stream if stream == "stream" else wires[0].outward)
            executions = [trial.start() for trial in trials]
            for _ in range(100):
                for execution in executions:
                    execution.progress()
                if slow == 1:
                    ranks[0].driver.synchronize(wires[0].outward)
            hold.release()
            until(lambda: progress(executions))
            trials[1].verify()

    go()
    with pytest.raises(AssertionError, match="elements are wrong"):
        go(never_ask)


@pytest.mark.parametrize("kind", [InprocTransport, Knowing])
def test_who_does_not_know_device_memory_is_given_none(
    kind: type[InprocTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "mpi_is_cuda_aware", lambda: kind is InprocTransport)
    monkeypatch.setattr(module, "MPITransport", Knowing)
    with (
        pytest.raises(ArgumentError, match=f"this {kind.__name__} takes none: leave direct out"),
        strict(1, 2, 4, kind, True),
    ):
        pass


QUERY = "int MPIX_Query_cuda_support(void) {{ return {answer}; }}"
GPU_QUERY = "int MPIX_GPU_query_support(int kind, int *is) {{ *is = kind == 0 && {answer}; return {failed}; }}"


@pytest.mark.parametrize(
    ("source", "aware"),
    [
        (QUERY.format(answer=1), True),
        (QUERY.format(answer=0), False),
        (GPU_QUERY.format(answer=1, failed=0), True),
        (GPU_QUERY.format(answer=0, failed=0), False),
        (GPU_QUERY.format(answer=1, failed=15), False),
        ("int MPI_Init(void) { return 0; }", False),
    ],
)
def test_whether_mpi_is_cuda_aware(source: str, aware: bool, tmp_path: Path) -> None:
    (tmp_path / "mpi.c").write_text(source)
    library = tmp_path / "libmpi.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "mpi.c"], check=True)
    assert mpi_is_cuda_aware(str(library)) is aware


@pytest.mark.mpi
@pytest.mark.parametrize("environment", ["", ".venv-mpich"])
def test_the_installed_mpi_is_not_cuda_aware(environment: str, tmp_path: Path) -> None:
    python = ROOT / environment / "bin" / "python" if environment else Path(sys.executable)
    if not python.exists():
        pytest.skip("MPICH is not in .venv-mpich: make test-mpich puts it there")
    (tmp_path / "abccl").symlink_to(ROOT)
    program = "from abccl.transports.staged import mpi_is_cuda_aware; print(mpi_is_cuda_aware())"
    paths = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=100, env=paths, check=True)
    assert done.stdout.strip() == "False"
