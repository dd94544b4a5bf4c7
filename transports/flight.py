"""The flight recorders of running processes: found through their entries in /proc, and read without stopping them.

Every rank's shared memory holds what it has called, where each call stands and what it waits for. Whoever may open the
memory, which is the owner's user, may read that at any time; nothing is written, and nobody is signalled.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast, get_args, get_origin, get_type_hints, is_typeddict

from ..algorithms import Collective
from ..errors import ArgumentError, TransportError
from . import _native
from .topology import HOST

# ---- what is recorded


class Operation(TypedDict):
    """A collective. Times are of time.monotonic(), which the processes of a host share.

    Attributes:
        number: which of the communicator's collectives it is, from 1.
        call: it in words, the same on all ranks that call the same: see `CallText`.
        bytes: of the whole vector.
        state: "running", "finished" or "failed".
    """

    number: int
    call: str
    bytes: int
    start: float
    end: float | None
    state: str


class Step(TypedDict):
    """The end of a step of a plan, in a lane, of a segment. `peer` is whom it received from or sent to."""

    number: int
    lane: int
    segment: int
    step: int
    peer: int | None
    end: float


class Message(TypedDict):
    """A send or recv of the user's. One from any rank has no `peer` until it has its message; any tag is None."""

    call: str
    peer: int | None
    tag: int | None
    bytes: int
    start: float
    end: float | None
    state: str


class _Waiting(TypedDict):
    number: int
    since: float
    step: int
    peer: int | None
    text: str


class Waiting(_Waiting, total=False):
    """A wait that has lasted some 20 ms. `note` is what is known of a peer on another host, if anything is."""

    note: str


class Peer(TypedDict):
    """What a rank sees of another on its host. `gone`: its process has ended."""

    rank: int
    pid: int
    entered: int
    finished: int
    closed: bool
    gone: bool


class Snapshot(TypedDict):
    """What a rank's recorder holds at one moment. A dump is one of these as JSON.

    Attributes:
        host: the name of its host.
        group: the communicator's name.
        token: a number that all ranks of the communicator have, on this host.
        rank, size, pid: who it is.
        closed: whether it has closed the communicator.
        error: why the communicator is broken, if it is.
        entered, finished: the numbers of the newest collective that it has begun and that it has finished.
        monotonic, wall: when this was, by time.monotonic() and by time.time().
        waiting: where it waits, if it does.
        operations: the newest 1024, the oldest first.
        steps: the newest 4096 of plans with messages over 4 KiB, or of all if ABCCL_DEBUG is trace.
        messages: the newest 1024.
        peers: the others on this host, as it sees them; none if another process has read it.
    """

    version: int
    host: str
    group: str
    token: int
    rank: int
    size: int
    pid: int
    closed: bool
    error: str | None
    entered: int
    finished: int
    monotonic: float
    wall: float
    waiting: Waiting | None
    operations: list[Operation]
    steps: list[Step]
    messages: list[Message]
    peers: list[Peer]


VERSION = 1


def to_snapshot(found: object) -> Snapshot:
    """What was read from a file, checked to be a snapshot: names, types, and times of this world.

    Raises:
        ArgumentError: it is none; the message says what is wrong where.
    """
    _check(found, Snapshot, "it")
    snapshot = cast(Snapshot, found)
    if snapshot["version"] != VERSION:
        raise ArgumentError(f"it is of version {snapshot['version']}, and this abccl reads {VERSION}")
    return snapshot


_hints = cache(get_type_hints)


def _check(found: object, wanted: Any, where: str) -> None:
    inside = get_args(wanted)
    if is_typeddict(wanted):
        if not isinstance(found, dict) or not wanted.__required_keys__ <= found.keys():
            raise ArgumentError(f"{where} is no {wanted.__name__.strip('_').lower()}: {repr(found)[:60]}")
        for name, kind in _hints(wanted).items():
            if name in found:
                _check(found[name], kind, name)
    elif get_origin(wanted) is list:
        if not isinstance(found, list):
            raise ArgumentError(f"{where} is no list: {repr(found)[:60]}")
        for one in found:
            _check(one, inside[0], where)
    elif inside:  # it, or None
        if found is not None:
            _check(found, inside[0], where)
    elif wanted is float:
        if type(found) not in (int, float) or not -1e12 < cast(float, found) < 1e12:
            raise ArgumentError(f"{where} is no time: {repr(found)[:60]}")
    elif type(found) is not wanted:
        raise ArgumentError(f"{where} is no {wanted.__name__}: {repr(found)[:60]}")


class CallText(NamedTuple):
    """A collective in words, as they stand in messages and records: all_reduce(float32, sum, 4 elements, ring).

    Attributes:
        kind: the collective.
        dtype, op, what, root: where it has them; `what` is the size in words.
        algorithm: its name, with parameters.
    """

    kind: str
    dtype: str | None
    op: str | None
    what: str | None
    root: int | None
    algorithm: str

    def __str__(self) -> str:
        root = None if self.root is None else f"root {self.root}"
        return f"{self.kind}({', '.join(word for word in (*self[1:4], root, self.algorithm) if word)})"

    @property
    def elements(self) -> int | None:
        """The elements, where the words tell."""
        number, _, unit = (self.what or "").partition(" ")
        return int(number) if number.isdecimal() and unit.startswith("element") else None


@lru_cache(1024)
def parse_call(text: str) -> CallText:
    """What `str` of a CallText was made from. Of words that are none, or are cut off, what there is."""
    kind, _, inside = text.partition("(")
    words = list(_words(inside.removesuffix(")") if text.endswith(")") else inside))
    algorithm = words.pop() if words else ""
    root = None
    if words and words[-1].startswith("root ") and words[-1][5:].isdecimal():
        root = int(words.pop()[5:])
    reduces = kind in _REDUCING
    dtype = words.pop(0) if words else None
    op = words.pop(0) if words and reduces else None
    return CallText(kind, dtype, op, ", ".join(words) or None, root, algorithm)


_REDUCING = {collective.value for collective in Collective if collective.reduces}


def _words(text: str) -> Iterator[str]:
    """What commas separate, but for those in brackets."""
    depth, word = 0, ""
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            yield word.strip()
            word = ""
        else:
            word += letter
    if word.strip():
        yield word.strip()


# ---- who has one


def snapshots(pid: int) -> list[Snapshot]:
    """What the recorders of a process hold: one for each communicator, in the order of their file descriptors.

    Raises:
        ArgumentError: there is no such process, or it has no communicator.
        TransportError: the process is another user's, or may not be looked into.
    """
    try:
        descriptors = _descriptors(pid)
    except FileNotFoundError:
        raise ArgumentError(f"there is no process {pid} on this machine: `abccl inspect` lists them") from None
    except PermissionError as error:
        raise TransportError(_not_permitted(pid)) from error
    found = list(_read(pid, descriptors))
    if not found:
        raise ArgumentError(
            f"process {pid} has no communicator of abccl now: `abccl inspect` lists the processes that have"
        )
    return found


def running() -> list[int]:
    """The processes of this user that have communicators, by number. What may not be looked into is left out."""
    return [pid for pid in _own_processes() if _there(pid)]


def everything() -> list[Snapshot]:
    """What the recorders of all processes of this user on this machine hold."""
    return [snapshot for pid in _own_processes() for snapshot in _there(pid)]


def together(pid: int) -> list[Snapshot]:
    """The communicators that a process or its children take part in: what all of their ranks on this machine hold.

    Raises:
        ArgumentError, TransportError: see `snapshots`.
    """
    own = [snapshot for one in _with_children(pid) for snapshot in _there(one)] or snapshots(pid)
    here = {one["pid"] for one in own}
    tokens = {one["token"] for one in own}
    others = (snapshot for other in _own_processes() if other not in here for snapshot in _there(other))
    return own + [one for one in others if one["token"] in tokens]


def _with_children(pid: int) -> list[int]:
    """A process and those that it has started, directly or not: ranks, if it is a launcher."""
    parents = {}
    for one in _own_processes():
        with contextlib.suppress(OSError, IndexError):
            stat = Path(f"/proc/{one}/stat").read_text()
            parents[one] = int(stat.rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += (one for one, its in parents.items() if its == parent)
    return found


def own_snapshot(communicator: Any) -> Snapshot:
    """What the recorder of a communicator of this process holds, with what it sees of its peers.

    Args:
        communicator: the native core's.
    """
    return _of_this_host(communicator.flight())


def _of_this_host(snapshot: dict[str, Any]) -> Snapshot:
    return cast(Snapshot, {**snapshot, "host": os.environ.get(HOST) or socket.gethostname()})


def _there(pid: int) -> list[Snapshot]:
    """What there still is: processes end while they are looked at."""
    try:
        return list(_read(pid, _descriptors(pid)))
    except OSError:
        return []


def _read(pid: int, descriptors: Iterable[int]) -> Iterator[Snapshot]:
    numbers = _numbers(pid)
    for descriptor in descriptors:
        try:
            snapshot = _native.read_flight(pid, descriptor)
        except (TransportError, UnicodeDecodeError):
            continue  # other memory of that name, or it was closed or written to meanwhile
        # A forked child has its parent's descriptors.
        if snapshot["pid"] in numbers:
            yield _of_this_host(snapshot)


def _own_processes() -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdecimal() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                found.append(int(name))
        except OSError:
            continue
    return sorted(found)


def _descriptors(pid: int) -> list[int]:
    """The descriptors of a process that may be our memory: that which peers attach to, not heaps."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        if target == "/memfd:abccl (deleted)" or target.startswith("/dev/shm/abccl-"):
            found.append(int(name))
    return sorted(found)


def _numbers(pid: int) -> set[int]:
    """What the process is called here and, if it is in a container, there."""
    try:
        with open(f"/proc/{pid}/status") as status:
            spaces = [line for line in status if line.startswith("NSpid:")]
    except OSError:
        return {pid}
    return {pid, *(int(number) for line in spaces for number in line.split()[1:])}


def _not_permitted(pid: int) -> str:
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
        name = pwd.getpwuid(owner).pw_name
    except FileNotFoundError:
        return f"process {pid} has ended"
    except KeyError:
        name = str(owner)
    if owner == os.geteuid():
        return f"process {pid} may not be looked into: a security module or a container's policy forbids it"
    return f"process {pid} belongs to user {name}: only that user and root can look into it"
