"""`spawn`: local processes in which `abccl.init()` works, and what each of them returned.

The parent holds a pipe to every rank. Through it come the blobs of the bootstrap's exchanges, which the parent gathers
and hands back, and at the end the pickled result or the traceback. Only the parent's own children write there.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from operator import index
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeVar, overload

from ..errors import ArgumentError, CollectiveError, DeadlineExceeded, PeerLost, RankFailed
from . import bootstrap

T = TypeVar("T")

GRACE = 0.5
"""Seconds that the other ranks have to end by themselves after one failed, and again after they were told to."""

EXIT = 10.0
"""Seconds that a rank may take to end after it returned."""

_STARTED, _EXCHANGE, _RETURNED, _FAILED, _PEER_FAILED, _LOST = (bytes([number]) for number in range(6))


@overload
def spawn(
    fn: Callable[..., T],
    ranks: SupportsIndex = ...,
    args: Sequence[Any] = ...,
    *,
    timeout: float | None = ...,
    start_method: str = ...,
    on_failure: Literal["end"] = ...,
) -> list[T]: ...


@overload
def spawn(
    fn: Callable[..., T],
    ranks: SupportsIndex = ...,
    args: Sequence[Any] = ...,
    *,
    timeout: float | None = ...,
    start_method: str = ...,
    on_failure: Literal["continue"],
) -> list[T | RankFailed]: ...


def spawn(
    fn: Callable[..., T],
    ranks: SupportsIndex = 4,
    args: Sequence[Any] = (),
    *,
    timeout: float | None = None,
    start_method: str = "spawn",
    on_failure: Literal["end", "continue"] = "end",
) -> list[T] | list[T | RankFailed]:
    """Run fn(*args) in `ranks` new processes, in which `abccl.init()` joins them, and return their results in order.

    If a rank fails the others are ended, at once if need be, unless they are to continue; so they are on Ctrl-C and
    when the parent dies. With more than one rank, children that are not told otherwise use one thread each
    (OMP_NUM_THREADS=1), as torchrun does.

    Args:
        fn: a function that a new process can import: at the top level of a module, not a lambda.
        timeout: seconds for all of it.
        start_method: of multiprocessing. "fork" takes any function but is unsafe once this process has threads.
        on_failure: "continue" lets the other ranks live when one fails, so that they can `shrink`. In the list a rank
            that failed then has its RankFailed in place of a result; nothing is raised for it. Survivors that call
            `abccl.init()` again raise PeerLost at once.

    Raises:
        ArgumentError: an argument is not what is wanted, or can not be taken to a new process.
        RankFailed: a rank raised (its traceback is in the message), or ended without returning.
        DeadlineExceeded: not all ranks had returned after `timeout` seconds.
    """
    if not callable(fn):
        raise ArgumentError(f"spawn wants a function, and got {fn!r}")
    if not hasattr(ranks, "__index__") or (size := index(ranks)) < 1:
        raise ArgumentError(f"spawn wants at least one rank, and got ranks={ranks!r}")
    if not isinstance(args, (list, tuple)):
        raise ArgumentError(f"spawn wants the arguments as a tuple, and got {args!r}: write args=({args!r},)")
    if timeout is not None and not (isinstance(timeout, SupportsFloat) and 0 < float(timeout) < math.inf):
        raise ArgumentError(f"spawn wants a positive number of seconds, or None, and got timeout={timeout!r}")
    if start_method not in multiprocessing.get_all_start_methods():
        known = ", ".join(multiprocessing.get_all_start_methods())
        raise ArgumentError(f"no start method {start_method!r}: there are {known}")
    if on_failure not in ("end", "continue"):
        raise ArgumentError(f'spawn: on_failure is "end" or "continue", and not {on_failure!r}')
    if start_method != "fork":
        _check_importable(fn)
    family = _Family(size, None if timeout is None else time.monotonic() + timeout, on_failure == "continue")
    try:
        family.start(fn, tuple(args), start_method)
        family.run(timeout)
        return [family.outcome(rank) for rank in range(size)]
    finally:
        family.end()


class _Family:
    """The parent's view of its ranks."""

    def __init__(self, size: int, deadline: float | None, goes_on: bool) -> None:
        self.size, self.deadline = size, deadline
        self.goes_on = goes_on  # although ranks fail
        self.processes: list[Any] = []
        self.pipes: list[Connection[Any, Any]] = []
        self.started: set[int] = set()
        self.blobs: dict[int, bytes] = {}
        self.results: dict[int, bytes] = {}
        self.failures: dict[int, tuple[bool, str]] = {}
        self.ended: set[int] = set()

    def start(self, fn: Callable[..., Any], args: tuple[Any, ...], start_method: str) -> None:
        context: Any = multiprocessing.get_context(start_method)
        with _one_thread_each(self.size):
            for rank in range(self.size):
                parent, child = context.Pipe()
                self.pipes.append(parent)
                process = context.Process(
                    target=_child, args=(child, rank, self.size, fn, args), name=f"abccl rank {rank} of {self.size}"
                )
                try:
                    process.start()
                except (pickle.PicklingError, AttributeError, TypeError) as error:
                    raise ArgumentError(
                        f"{fn!r} or its arguments can not be taken to a new process ({error}): give a function at the "
                        f"top level of a module and arguments that pickle, or start_method='fork'"
                    ) from error
                finally:
                    child.close()
                self.processes.append(process)

    def run(self, timeout: float | None) -> None:
        """Serve the ranks until all have returned and ended.

        Raises:
            RankFailed: as `spawn`.
            DeadlineExceeded: as `spawn`.
        """
        while len(self.results.keys() | self.failures.keys()) < self.size and (self.goes_on or not self.failures):
            if not self._serve(self.deadline):
                late = sorted(set(range(self.size)) - self.results.keys() - self.failures.keys())
                raise DeadlineExceeded(
                    f"spawn: {_ranks(late)} of {self.size} had not returned after {timeout:g} s, and were ended: give "
                    f"a longer timeout, or find what they wait for"
                )
        until = time.monotonic() + EXIT
        while len(self.ended) < self.size and (self.goes_on or not self.failures) and self._serve(until):
            pass
        if self.failures and not self.goes_on:
            # The first to report is often not the first to fail: it lost its peer. Hear the others.
            until = time.monotonic() + GRACE
            while len(self.ended) < self.size and self._serve(until):
                pass
            raise RankFailed(self._report())

    def outcome(self, rank: int) -> Any:
        """What the rank returned, or how it failed."""
        if rank in self.failures:
            return RankFailed(self.failures[rank][1].rstrip())
        return pickle.loads(self.results[rank])

    def end(self) -> None:
        """Leave no process and no pipe behind, whatever happened."""
        for act in ("terminate", "kill"):
            alive = [process for process in self.processes if process.is_alive()]
            for process in alive:
                getattr(process, act)()
            until = time.monotonic() + GRACE
            for process in alive:
                process.join(max(0.0, until - time.monotonic()))
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()

    def _serve(self, until: float | None) -> bool:
        """Wait for news of any rank and deal with it; false at `until`."""
        sources: dict[Any, int] = {}
        for rank in range(self.size):
            if rank not in self.ended:
                sources[self.processes[rank].sentinel] = rank
                if not self.pipes[rank].closed:
                    sources[self.pipes[rank]] = rank
        ready = wait(list(sources), None if until is None else max(0.0, until - time.monotonic()))
        for source in sorted(ready, key=lambda source: isinstance(source, int)):  # what it said, then that it ended
            rank = sources[source]
            if isinstance(source, int):
                while not self.pipes[rank].closed and self.pipes[rank].poll():
                    self._hear(rank)
                self._has_ended(rank)
            else:
                self._hear(rank)
        self._answer()
        return bool(ready)

    def _hear(self, rank: int) -> None:
        try:
            message = self.pipes[rank].recv_bytes()
        except (EOFError, OSError):
            self.pipes[rank].close()
            return
        kind, body = message[:1], message[1:]
        if kind == _STARTED:
            self.started.add(rank)
        elif kind == _EXCHANGE:
            self.blobs[rank] = body
        elif kind == _RETURNED:
            self.results[rank] = body
        else:
            self.failures[rank] = kind == _FAILED, body.decode(errors="replace")

    def _has_ended(self, rank: int) -> None:
        process = self.processes[rank]
        process.join()
        self.ended.add(rank)
        code = process.exitcode
        if rank in self.failures or (rank in self.results and code == 0):
            return
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        if rank in self.results:
            how = f"returned, and then {how}"
        elif rank in self.started:
            how += " without returning"
        else:
            how += (
                " before it began (its output is above): its module must be importable, and a script must call spawn "
                'under `if __name__ == "__main__":`'
            )
        self.failures[rank] = True, f"rank {rank} of {self.size} {how}"

    def _answer(self) -> None:
        """Hand an exchange back when all ranks have given theirs, or say that it can not be."""
        if not self.blobs:
            return
        gone = sorted((self.results.keys() | self.failures.keys() | self.ended) - self.blobs.keys())
        if gone:
            reply = _LOST + f"{_ranks(gone)} of {self.size} ended without calling abccl.init() so often".encode()
        elif len(self.blobs) == self.size:
            reply = _EXCHANGE + _pack([self.blobs[rank] for rank in range(self.size)])
        else:
            return
        for rank in self.blobs:
            with suppress(OSError):  # it has just ended: its sentinel will tell
                self.pipes[rank].send_bytes(reply)
        self.blobs = {}

    def _report(self) -> str:
        """The failures: the cause in full, the consequences in a line each."""
        causes = [rank for rank, (is_cause, _) in self.failures.items() if is_cause] or list(self.failures)
        lines = [self.failures[causes[0]][1].rstrip()]
        for rank, (_, text) in sorted(self.failures.items()):
            if rank != causes[0]:
                lines.append(text.splitlines()[0])
        return "\n".join(lines)


class PipeBootstrap(bootstrap.Bootstrap):
    """A rank that `spawn` started: the parent gathers."""

    def __init__(self, pipe: Connection[Any, Any], rank: int, size: int, timeout: float = bootstrap.TIMEOUT) -> None:
        self.pipe, self.rank, self.size, self.timeout = pipe, rank, size, timeout
        self.lock = threading.Lock()

    def exchange(self, data: bytes) -> list[bytes]:
        """What every rank gave, by way of the parent."""
        with self.lock:
            self.pipe.send_bytes(_EXCHANGE + data)
            if not self.pipe.poll(self.timeout):
                raise DeadlineExceeded(
                    f"rank {self.rank} of {self.size} waited {self.timeout:g} s for the other ranks: all must call "
                    f"abccl.init() equally often"
                )
            reply = self.pipe.recv_bytes()
        if reply[:1] == _LOST:
            raise PeerLost(f"rank {self.rank} of {self.size}: {reply[1:].decode()}")
        return _unpack(reply[1:])


def _child(pipe: Connection[Any, Any], rank: int, size: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The main function of a rank."""
    threading.Thread(target=_end_with_parent, name="abccl parent watch", daemon=True).start()
    own = bootstrap.spawned = PipeBootstrap(pipe, rank, size)
    pipe.send_bytes(_STARTED)
    try:
        message = _RETURNED + _pickled(fn(*args), rank)
        code = 0
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        kind = _PEER_FAILED if isinstance(error, CollectiveError) else _FAILED
        what = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[0]
        message = kind + f"rank {rank} of {size} raised {what}\n\n{traceback.format_exc()}".encode()
        code = 1
    with own.lock:
        pipe.send_bytes(message)
    sys.exit(code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _pickled(result: Any, rank: int) -> bytes:
    try:
        return pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise ArgumentError(
            f"rank {rank} returned a {type(result).__name__}, which can not be sent to the parent ({error}): "
            f"return plain data or arrays"
        ) from error


def _check_importable(fn: Callable[..., Any]) -> None:
    main = sys.modules["__main__"]
    has_file = getattr(main, "__spec__", None) or os.path.isfile(getattr(main, "__file__", ""))
    if getattr(fn, "__module__", None) == "__main__" and not has_file:
        name = getattr(fn, "__qualname__", fn)
        raise ArgumentError(
            f"a new process can not import {name!r}: the program that defines it has no file. "
            f"Put it into a module, or give start_method='fork'"
        )


@contextmanager
def _one_thread_each(ranks: int) -> Iterator[None]:
    """OMP_NUM_THREADS=1 for what is started meanwhile: a child reads it when it imports its libraries."""
    if ranks == 1 or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _pack(blobs: Sequence[bytes]) -> bytes:
    return struct.pack(f"<{len(blobs) + 1}Q", len(blobs), *map(len, blobs)) + b"".join(blobs)


def _unpack(packed: bytes) -> list[bytes]:
    (count,) = struct.unpack_from("<Q", packed)
    start, blobs = 8 * (count + 1), []
    for length in struct.unpack_from(f"<{count}Q", packed, 8):
        blobs.append(packed[start : start + length])
        start += length
    return blobs


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
