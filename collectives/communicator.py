"""The communicator: collectives and messages among a fixed group of ranks, on numpy arrays and torch tensors.

A warm call is one lookup in the native dispatcher, which runs the bound plan. Only when arguments of some kind are
seen for the first time does Python run: `_bind` checks them, chooses an algorithm, lowers it, and gives it sizes.
"""

from __future__ import annotations

import atexit
import itertools
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from ..algorithms import Algorithm, Collective, replay
from ..algorithms.plan import Scaling, Sizes, Skeleton, bind, cut, exchange, exchange_matrix, lower, parts
from ..errors import Aborted, ArgumentError, ClosedError, CollectiveError, TransportError
from ..transports import ANY_SOURCE, Operation, Transport, _native
from ..transports.shm import ShmPlan, ShmTransport
from ..transports.types import NUMBERS, OPERATORS, check_operator
from .arrays import Array, View, view
from .bootstrap import Bootstrap, find
from .choice import choose
from .work import Work, WorkQueue

TIMEOUT = 600.0
"""Seconds that an operation waits for its peers, unless told otherwise."""

_COLLECTIVES = tuple(Collective)
_INDEX = {collective: index for index, collective in enumerate(_COLLECTIVES)}
_ALL_REDUCE = _INDEX[Collective.ALL_REDUCE]
_REDUCE_SCATTER = _INDEX[Collective.REDUCE_SCATTER]
_ALL_GATHER = _INDEX[Collective.ALL_GATHER]
_BROADCAST = _INDEX[Collective.BROADCAST]
_ALL_TO_ALL = _INDEX[Collective.ALL_TO_ALL]
_REDUCE = _INDEX[Collective.REDUCE]
_GATHER = _INDEX[Collective.GATHER]
_SCATTER = _INDEX[Collective.SCATTER]
_BARRIER = _INDEX[Collective.BARRIER]

_SPLIT_TAG = -1
_TESTED_UP_TO = 64
_FORWARDING_FREE = ("pairwise", "direct")

_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


class PremulSum(NamedTuple):
    """The operator that sums `factor` times each rank's value."""

    factor: float


def premul_sum(factor: float) -> PremulSum:
    """The operator that sums `factor` times each rank's value, for floating and complex types."""
    return PremulSum(float(factor))


class _Uneven(NamedTuple):
    """In the place of an operator: the operator, with the parts' sizes where they differ."""

    op: str | PremulSum
    counts: tuple[int, ...] | None = None
    sent: tuple[int, ...] | None = None
    received: tuple[int, ...] | None = None
    matrix: tuple[tuple[int, ...], ...] | None = None


class Communicator:
    """One rank's end of a group. Made by `abccl.init`, `split`, or around a transport.

    Calls are collective: all ranks make the same ones in the same order. Arrays are numpy's or torch's, contiguous,
    in host memory. Calls from several threads are serialised. After a CollectiveError the communicator is broken.

    Attributes:
        rank: this rank, from 0.
        size: how many ranks there are.
        timeout: seconds that an operation waits for its peers.
    """

    def __init__(self, transport: Transport, *, timeout: float = TIMEOUT) -> None:
        self.rank, self.size, self.timeout = transport.rank, transport.size, timeout
        self._transport = transport
        self._native = transport.native if isinstance(transport, ShmTransport) else None
        self._queue = WorkQueue(f"abccl rank {transport.rank}")
        self._generation = _native.fork_generation()
        self._closed = False
        self._skeletons: dict[tuple[Algorithm, int, Scaling], Skeleton] = {}
        self._interned: dict[_Uneven, _Uneven] = {}
        self._splits = itertools.count()
        # Weak, or the dispatcher and the communicator would keep each other alive.
        this = weakref.ref(self)
        dispatcher = _native.Dispatcher(
            self._native,
            lambda *arguments: _alive(this)._bind(*arguments),
            lambda *arguments: _alive(this)._execute(*arguments),
            timeout,
        )
        self._call: Callable[..., Any] = dispatcher.function()
        _open.add(self)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<abccl.Communicator rank {self.rank} of {self.size} over {self._transport.name}{state}>"

    # ---- collectives

    def all_reduce(
        self,
        x: Array,
        op: str | PremulSum = "sum",
        *,
        out: Array = None,
        algorithm: str | None = None,
        async_op: bool = False,
    ) -> Any:
        """Combine the arrays of all ranks element by element; every rank gets the same bits.

        Args:
            x: this rank's contribution, and the result unless `out` is given.
            op: sum, prod, min, max, avg, band, bor, bxor or premul_sum(factor).
            out: where the result goes, as large as `x`; `x` is left as it is.
            algorithm: the name of an algorithm (`abccl verify` lists them); the library chooses if None.
            async_op: return a Work at once.

        Raises:
            ArgumentError: before anything is sent.
            CollectiveError: Mismatch, PeerLost, DeadlineExceeded, Aborted.
        """
        return self._call(_ALL_REDUCE, x, x if out is None else out, op, 0, algorithm, async_op)

    def reduce_scatter(
        self,
        out: Array,
        x: Array,
        op: str | PremulSum = "sum",
        *,
        counts: Sequence[int] | None = None,
        algorithm: str | None = None,
        async_op: bool = False,
    ) -> Any:
        """Combine the arrays of all ranks; rank r gets the r-th part.

        Args:
            out: this rank's part of the result. May be its own part of `x`.
            x: this rank's contribution: the parts of all ranks, one after the other.
            counts: the parts' elements, where they are not equal; the same on all ranks.
            op, algorithm, async_op, Raises: as in `all_reduce`.
        """
        extra = op if counts is None else self._intern(_Uneven(op, counts=tuple(counts)))
        return self._call(_REDUCE_SCATTER, x, out, extra, 0, algorithm, async_op)

    def all_gather(
        self,
        out: Array,
        x: Array,
        *,
        counts: Sequence[int] | None = None,
        algorithm: str | None = None,
        async_op: bool = False,
    ) -> Any:
        """Every rank gets the arrays of all ranks, one after the other in `out`.

        Args:
            out: size times as large as `x`.
            x: this rank's part. May be its own part of `out`.
            counts: the parts' elements, where they are not equal; the same on all ranks.
            algorithm, async_op, Raises: as in `all_reduce`.
        """
        extra = None if counts is None else self._intern(_Uneven("sum", counts=tuple(counts)))
        return self._call(_ALL_GATHER, x, out, extra, 0, algorithm, async_op)

    def broadcast(self, x: Array, root: int = 0, *, algorithm: str | None = None, async_op: bool = False) -> Any:
        """Every rank's `x` becomes the root's. `algorithm`, `async_op`, Raises: as in `all_reduce`."""
        return self._call(_BROADCAST, x, x, None, root, algorithm, async_op)

    def reduce(
        self,
        x: Array,
        op: str | PremulSum = "sum",
        root: int = 0,
        *,
        out: Array = None,
        algorithm: str | None = None,
        async_op: bool = False,
    ) -> Any:
        """Combine the arrays of all ranks at the root: in `out` there, or in its `x`. Others' `x` stays as it is.

        `op`, `algorithm`, `async_op`, Raises: as in `all_reduce`.
        """
        return self._call(_REDUCE, x, x if out is None else out, op, root, algorithm, async_op)

    def gather(
        self, out: Array | None, x: Array, root: int = 0, *, algorithm: str | None = None, async_op: bool = False
    ) -> Any:
        """The root gets the arrays of all ranks, one after the other in its `out` (None elsewhere).

        `algorithm`, `async_op`, Raises: as in `all_reduce`.
        """
        return self._call(_GATHER, x, out, None, root, algorithm, async_op)

    def scatter(
        self, out: Array, x: Array | None, root: int = 0, *, algorithm: str | None = None, async_op: bool = False
    ) -> Any:
        """Rank r's `out` becomes the r-th part of the root's `x` (None elsewhere).

        `algorithm`, `async_op`, Raises: as in `all_reduce`.
        """
        return self._call(_SCATTER, x, out, None, root, algorithm, async_op)

    def all_to_all(
        self,
        out: Array,
        x: Array,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
        *,
        algorithm: str | None = None,
        async_op: bool = False,
    ) -> Any:
        """Rank s's d-th part goes to rank d, where it is the s-th.

        Args:
            out: receives a part from each rank. Must not overlap `x`.
            x: a part for each rank.
            out_splits, in_splits: the parts' elements; equal parts if None. With splits, algorithms that forward
                others' parts (ring, tree, recursive_doubling, bruck) first all-gather all sizes.
            algorithm, async_op, Raises: as in `all_reduce`.
        """
        extra = None
        if out_splits is not None or in_splits is not None:
            extra = self._splits_of(out, x, out_splits, in_splits, algorithm)
        return self._call(_ALL_TO_ALL, x, out, extra, 0, algorithm, async_op)

    def barrier(self, *, algorithm: str | None = None, async_op: bool = False) -> Any:
        """Return when all ranks have called it."""
        return self._call(_BARRIER, None, None, None, 0, algorithm, async_op)

    # ---- messages

    def send(self, x: Array, peer: int, tag: int = 0, *, async_op: bool = False) -> Any:
        """Send `x` to `peer`, which receives it by `recv` with the same tag. Returns when `x` may be changed.

        Never in the way of a collective. Returns a Work at once with `async_op`.

        Raises:
            ArgumentError, CollectiveError: as in `all_reduce`.
        """
        return self._message("send", x, peer, tag, async_op)

    def recv(self, x: Array, peer: int | None = None, tag: int | None = None, *, async_op: bool = False) -> Any:
        """Receive into `x` what `peer` (any rank if None) sends with `tag` (any if None), in the order sent.

        Returns the rank that it came from; a Work at once with `async_op` (its `source` is that rank, when finished).

        Raises:
            Mismatch: the message has another number of bytes than `x`.
            ArgumentError, CollectiveError: as in `all_reduce`.
        """
        return self._message("recv", x, ANY_SOURCE if peer is None else peer, tag, async_op)

    # ---- groups, and the end

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """New communicators of the ranks that give the same color, ranked by key, then by rank. Collective.

        Returns:
            This rank's new communicator; None if its color is None.
        """
        self._check_usable()
        mine = np.array([color is not None, color or 0, key], dtype=np.int64)
        everyone = np.empty((self.size, 3), dtype=np.int64)
        self.all_gather(everyone, mine)
        number = next(self._splits)
        if color is None:
            return None
        members = [r for r in range(self.size) if everyone[r, 0] and everyone[r, 1] == color]
        members.sort(key=lambda r: (int(everyone[r, 2]), r))
        return _connect(_Members(self, members, _SPLIT_TAG - number % (1 << 20)), self._transport.name, self.timeout)

    def abort(self, reason: str = "abort() was called") -> None:
        """Make every rank's present and future calls raise `Aborted`. From any thread."""
        self._transport.abort(Aborted(f"rank {self.rank}: {reason}"))

    def close(self) -> None:
        """Give everything back. Pending operations fail. Not collective: end with a barrier if peers still need you."""
        if self._closed or self._generation != _native.fork_generation():
            return
        self._closed = True
        self._transport.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not self._closed and not isinstance(error, CollectiveError):
            self.abort(f"left its communicator by {type(error).__name__}: {error}")
        self.close()

    # ---- the cold path

    def _bind(
        self, index: int, x: Array, out: Array, op: str | PremulSum | _Uneven | None, root: int, algorithm: str | None
    ) -> Any:
        """Check the arguments, choose an algorithm, and make its plan ready. The dispatcher keeps the result."""
        self._check_usable()
        collective = _COLLECTIVES[index]
        call = collective.value
        if not isinstance(root, (int, np.integer)) or not 0 <= root < self.size:
            raise ArgumentError(f"{call}: root must be a rank from 0 to {self.size - 1}, and is {root!r}")
        uneven = op if isinstance(op, _Uneven) else _Uneven(op if op is not None else "sum")
        source, target = self._views(collective, x, out, root)
        dtype = (source or target or _NOTHING).dtype
        name, scaling, factor = self._operator(collective, uneven.op, dtype)
        itemsize = (source or target or _NOTHING).itemsize
        nbytes = max((v.count * itemsize for v in (source, target) if v), default=0)
        if collective.reduces:
            assert source is not None
            nbytes = source.count * itemsize
        # Of a rooted collective only the root sees all parts: the other ranks must come to the same number.
        if collective in (Collective.GATHER, Collective.SCATTER):
            nbytes = (source if collective is Collective.GATHER else target or _NOTHING).count * itemsize * self.size  # type: ignore[union-attr]
        if collective is Collective.ALL_TO_ALL and uneven.sent is not None:
            chosen = choose(collective, self.size, 0, algorithm or _FORWARDING_FREE[0])
        else:
            chosen = choose(collective, self.size, nbytes, algorithm)
        _prove(chosen, self.size, int(root))
        skeleton = self._skeleton(chosen, int(root), scaling)
        sizes = self._sizes(collective, source, target, uneven, chosen)
        plan = bind(skeleton, sizes, itemsize, slot_bytes=self._transport.slot_bytes, lanes=self._lanes(chosen))
        elements = {
            Collective.ALL_TO_ALL: "split elements" if uneven.sent is not None else None,
            Collective.SCATTER: f"{(target or _NOTHING).count} elements a rank",
            Collective.REDUCE_SCATTER: None if uneven.counts is None else f"{uneven.counts} elements",
            Collective.ALL_GATHER: None if uneven.counts is None else f"{uneven.counts} elements",
        }.get(collective)
        details = [
            dtype,
            *([f"premul_sum {factor}" if scaling is Scaling.BEFORE else self._op_name(uneven.op)] * collective.reduces),
            elements or f"{(source or _NOTHING).count} elements",
            *([f"root {root}"] * collective.rooted),
            chosen.name,
        ]
        text = f"{call}({', '.join(details)})" if collective is not Collective.BARRIER else f"barrier({chosen.name})"
        signature = zlib.crc32(f"{text} {plan.lanes} {self._transport.slot_bytes}".encode())
        operation = Operation(NUMBERS[dtype], OPERATORS[name], factor, signature, text)
        prepared = self._transport.prepare(plan, operation)
        return prepared.native if isinstance(prepared, ShmPlan) else prepared

    def _views(self, collective: Collective, x: Array, out: Array, root: int) -> tuple[View | None, View | None]:
        """The buffers that take part, checked for what the collective asks of them."""
        call = collective.value
        if collective is Collective.BARRIER:
            return None, None
        at_root = self.rank == root
        reads = collective is not Collective.SCATTER or at_root
        writes = at_root if collective in (Collective.GATHER, Collective.REDUCE) else True
        for array, used, name in ((x, reads, "x"), (out, writes, "out")):
            if used and array is None:
                where = f" on rank {self.rank}, the root" if collective.rooted else ""
                raise ArgumentError(f"{call}: {name} must be an array{where}, and is None")
        in_place = out is x
        source = view(x, "x", call, writable=in_place and writes) if reads else None
        target = view(out, "x" if in_place else "out", call, writable=True) if writes else None
        if source and target:
            if source.dtype != target.dtype:
                raise ArgumentError(f"{call}: x is {source.dtype} and out is {target.dtype}: both must be of one type")
            self._check_overlap(collective, source, target)
        return source, target

    def _check_overlap(self, collective: Collective, source: View, target: View) -> None:
        """In place is allowed where a part lies at its natural offset."""
        if not source.count or not target.count or source.end <= target.address or target.end <= source.address:
            return
        same = source.address == target.address and source.count == target.count
        if collective in (Collective.ALL_REDUCE, Collective.BROADCAST, Collective.REDUCE) and same:
            return
        own = {
            Collective.ALL_GATHER: (source, target),
            Collective.GATHER: (source, target),
            Collective.REDUCE_SCATTER: (target, source),
            Collective.SCATTER: (target, source),
        }.get(collective)
        if own and own[0].address == own[1].address + self.rank * own[0].count * own[0].itemsize:
            return
        raise ArgumentError(
            f"{collective.value}: x and out overlap"
            + (", other than at this rank's own part" if own else "")
            + ": pass a copy of x"
        )

    def _operator(
        self, collective: Collective, op: str | PremulSum, dtype: str
    ) -> tuple[str, Scaling, float]:
        if not collective.reduces:
            return "sum", Scaling.NONE, 1.0
        name = self._op_name(op)
        if name == "premul_sum" and not isinstance(op, PremulSum):
            raise ArgumentError("premul_sum wants its factor: pass op=abccl.premul_sum(0.5)")
        check_operator(name, dtype)
        if isinstance(op, PremulSum):
            return "sum", Scaling.BEFORE, op.factor
        return ("sum", Scaling.AFTER, 1.0 / self.size) if name == "avg" else (name, Scaling.NONE, 1.0)

    @staticmethod
    def _op_name(op: Any) -> str:
        return "premul_sum" if isinstance(op, PremulSum) else str(op)

    def _sizes(
        self, collective: Collective, source: View | None, target: View | None, uneven: _Uneven, chosen: Algorithm
    ) -> Sizes:
        call, size = collective.value, self.size
        if collective is Collective.BARRIER:
            return parts(collective, self.rank, [0] * size)
        if collective.cut:
            assert source is not None
            if target is not None and target.count != source.count:
                raise ArgumentError(f"{call}: out must have {source.count} elements as x has, and has {target.count}")
            return cut(source.count, chosen.blocks(size), source.itemsize)
        if collective is Collective.ALL_TO_ALL:
            assert source is not None and target is not None
            return self._exchange_sizes(source, target, uneven)
        gathers = collective in (Collective.ALL_GATHER, Collective.GATHER)
        part, whole = (source, target) if gathers else (target, source)
        assert part is not None
        counts = uneven.counts or (part.count,) * size
        if len(counts) != size or min(counts) < 0:
            raise ArgumentError(f"{call}: counts must name {size} sizes, one for each rank, and is {list(counts)}")
        if part.count != counts[self.rank]:
            raise ArgumentError(
                f"{call}: {part.name} has {part.count} elements, and counts gives rank {self.rank} {counts[self.rank]}"
            )
        if whole is not None and whole.count != sum(counts):
            how = f"{size} x {part.count} =" if uneven.counts is None else "the sum of counts,"
            raise ArgumentError(f"{call}: {whole.name} must have {how} {sum(counts)} elements, and has {whole.count}")
        return parts(collective, self.rank, counts)

    def _exchange_sizes(self, source: View, target: View, uneven: _Uneven) -> Sizes:
        size = self.size
        if uneven.sent is None or uneven.received is None:
            if source.count % size or target.count != source.count:
                raise ArgumentError(
                    f"all_to_all: without splits x and out have equal parts for {size} ranks; x has {source.count} "
                    f"elements and out {target.count}: pass out_splits and in_splits"
                )
            return exchange(self.rank, [source.count // size] * size, [target.count // size] * size)
        if uneven.matrix is not None:
            return exchange_matrix(self.rank, uneven.matrix)
        return exchange(self.rank, uneven.sent, uneven.received)

    def _splits_of(
        self,
        out: Array,
        x: Array,
        out_splits: Sequence[int] | None,
        in_splits: Sequence[int] | None,
        algorithm: str | None,
    ) -> _Uneven:
        def check(name: str, array: Array, of: str, splits: Sequence[int] | None) -> tuple[int, ...]:
            count = view(array, of, "all_to_all").count
            if splits is None:
                if count % self.size:
                    raise ArgumentError(f"all_to_all: {of} has {count} elements, not {self.size} equal parts: give {name}")
                splits = [count // self.size] * self.size
            splits = tuple(int(split) for split in splits)
            if len(splits) != self.size or min(splits) < 0 or sum(splits) != count:
                raise ArgumentError(
                    f"all_to_all: {name} must be {self.size} sizes that add up to the {count} elements of {of}, and is "
                    f"{list(splits)}, which add up to {sum(splits)}"
                )
            return splits

        self._check_usable()
        sent, received = check("in_splits", x, "x", in_splits), check("out_splits", out, "out", out_splits)
        matrix = None
        if algorithm is not None and algorithm not in _FORWARDING_FREE:
            rows = np.empty((self.size, self.size), dtype=np.int64)
            self.all_gather(rows, np.array(sent, dtype=np.int64))
            matrix = tuple(tuple(row) for row in rows.tolist())
        return self._intern(_Uneven("sum", sent=sent, received=received, matrix=matrix))

    def _intern(self, uneven: _Uneven) -> _Uneven:
        """One object for equal values: the dispatcher tells them apart by identity."""
        if len(self._interned) > 1024:
            self._interned.clear()
        return self._interned.setdefault(uneven, uneven)

    def _skeleton(self, algorithm: Algorithm, root: int, scaling: Scaling) -> Skeleton:
        key = (algorithm, root, scaling)
        if key not in self._skeletons:
            self._skeletons[key] = lower(algorithm, self.rank, self.size, root, scaling)
        return self._skeletons[key]

    def _lanes(self, algorithm: Algorithm) -> int:
        return self._transport.lanes

    def _execute(
        self, prepared: Any, x: Array, out: Array, x_address: int, out_address: int, asynchronous: bool
    ) -> Work | None:
        """Run a plan of a transport that is not native."""

        def operation() -> None:
            keep = (x, out)
            prepared.start(x_address, out_address).wait(time.monotonic() + self.timeout)
            del keep

        if asynchronous:
            return self._queue.submit(operation)
        self._queue.run(operation)
        return None

    def _message(self, call: str, x: Array, peer: int, tag: int | None, asynchronous: bool) -> Any:
        self._check_usable()
        sends = call == "send"
        buffer = view(x, "x", call, writable=not sends)
        if peer == self.rank or not (0 <= peer < self.size or (peer == ANY_SOURCE and not sends)):
            raise ArgumentError(
                f"{call}: peer must be another rank from 0 to {self.size - 1}, and is {peer} on rank {self.rank}"
            )
        if tag is not None and tag < 0:
            raise ArgumentError(f"{call}: tag must not be negative, and is {tag}")
        return self._transfer(call, peer, tag, buffer.address, buffer.count * buffer.itemsize, x, asynchronous)

    def _transfer(
        self, call: str, peer: int, tag: int | None, address: int, nbytes: int, keep: Any, asynchronous: bool
    ) -> Any:
        if self._native is None:
            raise TransportError(
                f"{call}: messages between ranks are served by the shm transport, and this communicator runs over "
                f"{self._transport.name}"
            )
        post = self._native.post_send if call == "send" else self._native.post_receive
        work = post(peer, tag, address, nbytes, keep, self.timeout, asynchronous)
        if asynchronous:
            return work
        self._native.wait_message(work, self.timeout)
        return None if call == "send" else work.source

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("the communicator is closed: make another with abccl.init()")
        if self._generation != _native.fork_generation():
            raise ClosedError(
                "this communicator belongs to the parent of this process, which was forked: make one in the child "
                "with abccl.init(), or start ranks with abccl.spawn()"
            )


_NOTHING = View("", "uint8", 0, 1, 0)


class _Members(Bootstrap):
    """The members of a new group meet by messages of the parent communicator, on a tag of their own."""

    def __init__(self, parent: Communicator, members: list[int], tag: int) -> None:
        self.parent, self.members, self.tag = parent, members, tag
        self.rank, self.size = members.index(parent.rank), len(members)

    def exchange(self, data: bytes) -> list[bytes]:
        """See `Bootstrap.exchange`."""
        lengths = self._all(np.array([len(data)], dtype=np.int64), [1] * self.size)
        mine = np.frombuffer(data, dtype=np.uint8)
        return [blob.tobytes() for blob in self._all(mine, [int(length[0]) for length in lengths])]

    def _all(self, mine: np.ndarray[Any, Any], counts: list[int]) -> list[np.ndarray[Any, Any]]:
        theirs = [np.empty(count, dtype=mine.dtype) for count in counts]
        theirs[self.rank] = mine
        works = []
        for call in ("send", "recv"):
            for member, buffer in zip(self.members, theirs, strict=True):
                if member == self.parent.rank:
                    continue
                array = mine if call == "send" else buffer
                works.append(
                    self.parent._transfer(call, member, self.tag, array.ctypes.data, array.nbytes, array, True)
                )
        for work in works:
            work.wait()
        return theirs


def init(transport: str | None = None, *, timeout: float = TIMEOUT) -> Communicator:
    """The communicator of all processes that were started together. Collective.

    Finds out how this process was started: by `abccl.spawn`, torchrun, mpirun (Open MPI, MPICH) or srun; else it is
    alone.

    Args:
        transport: "shm" (shared memory, one host), which is also the default.
        timeout: seconds that an operation waits for its peers.

    Raises:
        TransportError: the ranks can not be found or can not reach each other.
        ArgumentError: no such transport.
    """
    return _connect(find(), transport or "shm", timeout)


def connect(bootstrap: Bootstrap, *, timeout: float = TIMEOUT) -> Communicator:
    """The communicator of the ranks that the bootstrap knows. Collective."""
    return _connect(bootstrap, "shm", timeout)


def _connect(bootstrap: Bootstrap, transport: str, timeout: float) -> Communicator:
    if transport != "shm":
        raise ArgumentError(f"no transport is called {transport!r} here: there is shm (shared memory, one host)")
    return Communicator(ShmTransport(bootstrap.rank, bootstrap.size, bootstrap.exchange), timeout=timeout)


@lru_cache(maxsize=None)
def _prove(algorithm: Algorithm, size: int, root: int) -> None:
    """Replay a user's algorithm before its first use; the library's own are proved by its tests."""
    if not algorithm.function.__module__.startswith(f"{__package__.split('.')[0]}.algorithms") and size <= _TESTED_UP_TO:
        replay(algorithm, size, root)


def _alive(reference: weakref.ref[Communicator]) -> Communicator:
    communicator = reference()
    if communicator is None:
        raise ClosedError("the communicator is gone: keep a reference to it")
    return communicator


@atexit.register
def _close_all() -> None:
    """Peers that still wait learn that this rank has left, rather than by its death."""
    for communicator in list(_open):
        communicator.close()
