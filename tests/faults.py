"""Groups of processes that end badly on purpose: forked in milliseconds, watched to their end, and counted after it.

A `Zygote` is a process with one thread that has imported everything and forks the ranks of one job after the other. A
rank runs a function of a test module, returns plain data, or ends as it likes; the zygote tells how and when each rank
ended, what it returned, and what the job left behind on the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

LIMIT = 30.0
"""Seconds after which a rank counts as hung: it is told to show its stacks, and killed."""

SETTLING = 10.0
"""Seconds that the machine has to forget what a job used: other programs use it, too."""

_RESULT, _EXCHANGE, _REGROUP, _LOST = (bytes([number]) for number in range(4))


@dataclass
class Ended:
    """How a rank ended.

    Attributes:
        status: its exit code, or the signal that ended it, negative.
        at: when the zygote saw it, of time.monotonic().
        result: what its function returned; None if it did not.
        state: "ended"; "hung" or "stopped" if the zygote had to end it.
    """

    rank: int
    status: int = 0
    at: float = 0.0
    result: Any = None
    state: str = "ended"


@dataclass
class Job:
    """What came of a job. `left`: new names in /dev/shm, System V objects, and processes, that did not go away."""

    ranks: list[Ended]
    left: list[str] = field(default_factory=list)


# ---- for the tests


class Zygote:
    """Forks jobs. To be closed.

    Args:
        modules: imported once, before the first fork; the jobs' functions are in them.
    """

    def __init__(self, *modules: str, log: Path | None = None) -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
        self.log = log or Path(os.devnull)
        self.records = tempfile.TemporaryDirectory()
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *modules],
                env=os.environ | one_thread | {"PYTHONPATH": path, "ABCCL_FLIGHT_DIR": self.records.name},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, name: str, size: int, *arguments: Any, limit: float = LIMIT) -> Job:
        """The function "module:name" with these arguments (plain data) on `size` ranks."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, size, arguments, limit]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or "null")
        assert answer is not None, f"the zygote has ended: {self.said()}"
        return Job([Ended(**each) for each in answer["ranks"]], answer["left"])

    def said(self) -> str:
        """The end of what its ranks wrote to standard error, if that was kept."""
        return self.log.read_text(errors="replace")[-4000:] if self.log.is_file() else ""

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.records.cleanup()


# ---- for the ranks


rank = 0
"""Of this process in its job."""


def joined(calibrates: bool = False, **how: Any) -> Any:
    """A communicator of the ranks that live: of all at first, of the survivors whenever they call it again.

    Args:
        calibrates: whether it measures its links first, which on a busy machine takes the most of its time.
    """
    from abccl.collectives.communicator import connect
    from abccl.transports.shm import NEVER, ShmTransport

    if not calibrates:
        ShmTransport._calibrate = lambda transport: NEVER  # type: ignore[method-assign]
    assert _meet is not None
    return connect(_meet(), **how)


def inventory() -> dict[str, int]:
    """What this process holds of what a communicator may leave: files, threads, mappings of shared memory.

    What a process gets with its first communicator, and keeps, is there already.
    """
    importlib.import_module("abccl.collectives.communicator").connect(_alone()).close()
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "maps": maps.count("/memfd:abccl") + maps.count("/dev/shm/"),
    }


def left_since(before: dict[str, int]) -> dict[str, int]:
    """What this process has more of than before, once its progress thread has had time to let go: 2 s at most."""
    until = time.monotonic() + 2.0
    while True:
        left = {kind: number - before[kind] for kind, number in inventory().items()}
        if (left["files"] <= 0 and left["maps"] <= 0) or time.monotonic() > until:
            return left
        time.sleep(0.02)


def _alone() -> Any:
    return importlib.import_module("abccl.collectives.bootstrap").Alone()


def idle_seconds(duration: float) -> float:
    """The processor time that this process takes while its only wish is to sleep."""
    begin = time.process_time()
    time.sleep(duration)
    return time.process_time() - begin


_meet: Callable[[], Any] | None = None


def _meetings(pipe: Connection) -> Callable[[], Any]:
    """For a rank: makes its bootstraps, over its pipe to the zygote."""
    from abccl.collectives.bootstrap import Bootstrap
    from abccl.errors import DeadlineExceeded, PeerLost

    lock = threading.Lock()

    def ask(kind: bytes, data: bytes) -> bytes:
        with lock:
            pipe.send_bytes(kind + data)
            if not pipe.poll(LIMIT):
                raise DeadlineExceeded("the other ranks did not come")
            reply = pipe.recv_bytes()
        if reply[:1] == _LOST:
            raise PeerLost(reply[1:].decode())
        return reply[1:]

    class Meeting(Bootstrap):
        def __init__(self, rank: int, size: int) -> None:
            self.rank, self.size = rank, size

        def exchange(self, data: bytes) -> list[bytes]:
            return [bytes.fromhex(each) for each in json.loads(ask(_EXCHANGE, data))]

    return lambda: Meeting(*json.loads(ask(_REGROUP, b"")))


# ---- the zygote


class _Group:
    """The ranks of one job, as the zygote sees them."""

    def __init__(self, size: int, deadline: float) -> None:
        self.ranks = [Ended(rank) for rank in range(size)]
        self.deadline = deadline
        self.pids: dict[int, int] = {}
        self.handles: dict[int, int] = {}
        self.pipes: dict[int, Connection] = {}
        self.asked: dict[int, bytes] = {}
        self.members = list(range(size))

    def watch(self) -> None:
        """Serve the ranks until all have ended."""
        while self.handles:
            late = time.monotonic() > self.deadline
            stopped = [rank for rank in self.handles if _state(self.pids[rank]) in "Tt"]
            if late or len(stopped) == len(self.handles):
                for rank in self.handles:
                    self.ranks[rank].state = "stopped" if rank in stopped else "hung"
                    if rank not in stopped:
                        os.kill(self.pids[rank], signal.SIGABRT)  # the fault handler shows its stacks
                time.sleep(0.2 if late else 0)
                for rank in self.handles:
                    os.kill(self.pids[rank], signal.SIGKILL)
            sources: dict[Any, int] = {handle: rank for rank, handle in self.handles.items()}
            sources |= {pipe: rank for rank, pipe in self.pipes.items()}
            for source in wait(list(sources), 0.1):
                rank = sources[source]
                if isinstance(source, int):
                    self._has_ended(rank)
                elif rank in self.pipes:
                    self._hear(rank)
            self._answer()

    def _has_ended(self, rank: int) -> None:
        self.ranks[rank].at = time.monotonic()
        while rank in self.pipes and self.pipes[rank].poll():
            self._hear(rank)
        os.close(self.handles.pop(rank))
        self.asked.pop(rank, None)
        _, status = os.waitpid(self.pids[rank], 0)
        self.ranks[rank].status = os.waitstatus_to_exitcode(status)

    def _hear(self, rank: int) -> None:
        try:
            message = self.pipes[rank].recv_bytes()
        except (EOFError, OSError):
            self.pipes.pop(rank).close()
            return
        if message[:1] == _RESULT:
            self.ranks[rank].result = json.loads(message[1:])
        else:
            self.asked[rank] = message

    def _answer(self) -> None:
        kinds = {message[:1] for message in self.asked.values()}
        living = [rank for rank in sorted(self.handles) if _state(self.pids[rank]) not in "Tt"]
        if kinds == {_REGROUP} and self.asked.keys() >= set(living):
            self.members = sorted(self.asked)
            replies = [_REGROUP + json.dumps([i, len(self.members)]).encode() for i in range(len(self.members))]
        elif _EXCHANGE in kinds and (gone := [rank for rank in self.members if rank not in living]):
            replies = [_LOST + f"rank {gone[0]} ended before all had met".encode()] * len(self.asked)
        elif kinds == {_EXCHANGE} and self.asked.keys() == set(self.members):
            everyone = json.dumps([self.asked[rank][1:].hex() for rank in self.members]).encode()
            replies = [_EXCHANGE + everyone] * len(self.members)
        else:
            return
        for rank, reply in zip(sorted(self.asked), replies, strict=True):
            with contextlib.suppress(OSError, KeyError):  # it has just ended
                self.pipes[rank].send_bytes(reply)
        self.asked = {}


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _objects() -> set[str]:
    """What the library may leave behind on the machine. Others run on it, too: Open MPI's segments come and go."""
    found = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if "abccl" in name or name.startswith("sem.")}
    for kind in ("sem", "msg"):
        with contextlib.suppress(OSError):
            rows = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]
            found |= {f"sysv {kind} {row.split()[1]}" for row in rows}
    return found


def _left(before: set[str]) -> Iterator[str]:
    until = time.monotonic() + SETTLING
    while (new := _objects() - before) and time.monotonic() < until:
        time.sleep(0.02)
    yield from new
    with contextlib.suppress(ChildProcessError):
        while True:
            yield f"process {os.waitpid(-1, 0)[0]}"


def _serve(requests: Iterator[str]) -> tuple[int, Connection, str, list[Any]] | None:
    """Run jobs. In a rank: returns which it is, its pipe, and what it is to run."""
    for line in requests:
        name, size, arguments, limit = json.loads(line)
        before = _objects()
        group = _Group(size, time.monotonic() + limit)
        for rank in range(size):
            ours, theirs = Pipe()
            pid = os.fork()
            if pid == 0:
                ours.close()
                for pipe in group.pipes.values():
                    pipe.close()
                for handle in group.handles.values():
                    os.close(handle)
                return rank, theirs, name, arguments
            theirs.close()
            group.pids[rank], group.pipes[rank] = pid, ours
            group.handles[rank] = os.pidfd_open(pid)
        group.watch()
        for pipe in group.pipes.values():
            pipe.close()
        answer = {"ranks": [asdict(each) for each in group.ranks], "left": list(_left(before))}
        print(json.dumps(answer), flush=True)
    return None


def _main() -> None:
    import faults  # what the ranks see, which is not __main__

    modules = {name: importlib.import_module(name) for name in ("abccl.collectives.communicator", *sys.argv[1:])}
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    found = _serve(iter(sys.stdin.readline, ""))
    if found is None:
        return
    number, pipe, name, arguments = found
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the zygote
    faulthandler.enable()
    os.dup2(2, 1)
    faults._meet, faults.rank = _meetings(pipe), number
    module, _, function = name.partition(":")
    # Whatever it raises ends this process as it ends a program: with a traceback and what is to be done at exit.
    result = getattr(modules[module], function)(*arguments)
    pipe.send_bytes(_RESULT + json.dumps(result).encode())
    os._exit(0)


if __name__ == "__main__":
    _main()
