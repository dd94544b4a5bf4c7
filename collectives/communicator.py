"""The communicator: collectives and messages among a fixed group of ranks, on numpy arrays and torch tensors.

A warm call is one lookup in the native dispatcher, which runs the bound plan. Only when arguments of some kind are
seen for the first time does Python run (`binding.py`).
"""

from __future__ import annotations

import atexit
import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from ..algorithms import Collective, registry
from ..errors import ArgumentError, ClosedError, CollectiveError
from ..transports import Execution, Transport, _native
from ..transports.joint import JOINT
from ..transports.recorder import recorder_of
from ..transports.shm import ShmPlan, ShmTransport
from ..transports.topology import Topology, topology_of
from . import flight
from .arrays import Array, view
from .binding import Binder, PremulSum, Uneven
from .bootstrap import TIMEOUT as MEETING_TIMEOUT
from .bootstrap import Bootstrap, MPIBootstrap, find
from .debug import say_connected, say_start
from .device_calls import DeviceCalls
from .driver import Driver
from .failure_calls import FailureCalls
from .members import Members
from .memory import empty, registered_memory
from .messages import MessageCalls
from .persistent import Persistent, PersistentCalls, PersistentExecution
from .reach import reach, wanted_transport
from .reproducible import is_reproducible
from .shortcut import shortcut
from .tuner.tuner import AlgorithmLike, Tuner
from .tuning import TunerCalls, built_in_tuner, tuned
from .uneven_calls import UnevenCalls

TIMEOUT = 600.0
"""Seconds that an operation waits for its peers, unless told otherwise."""

_COLLECTIVES = tuple(Collective)
# In the order in which `Collective` names them.
_ALL_REDUCE, _REDUCE_SCATTER, _ALL_GATHER, _BROADCAST, _ALL_TO_ALL, _REDUCE, _GATHER, _SCATTER, _BARRIER = range(
    len(_COLLECTIVES)
)

_SPLIT_TAG = -1

_inits = itertools.count(1)

_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


class Communicator(DeviceCalls, FailureCalls, UnevenCalls, PersistentCalls, MessageCalls, TunerCalls):
    """One rank's end of a group. Made by `abccl.init`, `split`, or around a transport.

    Calls are collective: all ranks make the same ones in the same order. Arrays are numpy's, torch's or CuPy's,
    contiguous, in host memory or on a CUDA device (`device.py`: calls are then enqueued on the current stream). Calls
    from several threads are serialised. After a CollectiveError the communicator is broken.

    Attributes:
        rank: this rank, from 0.
        size: how many ranks there are.
        timeout: seconds that an operation waits for its peers.
        topology: which ranks share a host. Print it.
        name: what messages to people call the group: "default" for all that were started together.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        timeout: float = TIMEOUT,
        reproducible: bool | None = None,
        topology: Topology | None = None,
        tuner: Tuner | None = None,
        name: str = "",
    ) -> None:
        self.rank, self.size, self.timeout = transport.rank, transport.size, timeout
        self.topology = topology or topology_of([range(transport.size)])
        self._transport = transport
        self._native = transport.native if isinstance(transport, ShmTransport) else None
        self._driver = Driver(transport)
        self._record(name)
        self._generation = _native.fork_generation()
        self._closed = False
        tuner = tuner or built_in_tuner(transport, self.topology, is_reproducible(reproducible))
        self._binder = Binder(transport, tuner, self._recorder)
        self._memory = registered_memory(transport)
        self._interned, self._device_messages = {}, {}
        self._messages: list[Any] = []  # their buffers stay alive until they are finished
        self._splits = itertools.count()
        # Weak, or the dispatcher and the communicator would keep each other alive.
        this = weakref.ref(self)
        self._dispatcher = _native.Dispatcher(
            self._native,
            lambda *arguments: _alive(this)._bind(*arguments),
            lambda *arguments: _alive(this)._execute(*arguments),
            timeout,
        )
        self._call: Callable[..., Any] = self._dispatcher.function()
        self._speak()
        _open.add(self)

    def __repr__(self) -> str:
        state = ", reproducible" * self.reproducible + ", closed" * self._closed
        return f"<abccl.Communicator rank {self.rank} of {self.size} over {self._transport.name}{state}>"

    @property
    def reproducible(self) -> bool:
        """Whether what is reduced has the same bits for a given number of ranks, however it is done: see `init`."""
        return self._binder.reproducible

    # ---- collectives

    @shortcut(_ALL_REDUCE, x="x", out="x", op="op")
    def all_reduce(
        self,
        x: Array,
        op: str | PremulSum = "sum",
        *,
        out: Array = None,
        algorithm: AlgorithmLike = None,
        async_op: bool = False,
    ) -> Any:
        """Combine the arrays of all ranks element by element; every rank gets the same bits.

        Args:
            x: this rank's contribution, and the result unless `out` is given.
            op: sum, prod, min, max, avg, band, bor, bxor or premul_sum(factor).
            out: where the result goes, as large as `x`; `x` is left as it is.
            algorithm: an algorithm or its name (`abccl verify` lists them), as in "ring" or "knomial(radix=8)";
                "native" for MPI's or Gloo's own, where they carry messages; or a `Choice`. The tuner chooses if None.
            async_op: return a Work at once.

        Raises:
            ArgumentError: before anything is sent.
            CollectiveError: Mismatch, PeerLost, DeadlineExceeded, Aborted.
        """
        return self._call(_ALL_REDUCE, x, x if out is None else out, op, 0, algorithm, async_op)

    @shortcut(_REDUCE_SCATTER, x="x", out="out", op="op")
    def reduce_scatter(
        self,
        out: Array,
        x: Array,
        op: str | PremulSum = "sum",
        *,
        counts: Sequence[int] | None = None,
        algorithm: AlgorithmLike = None,
        async_op: bool = False,
    ) -> Any:
        """Combine the arrays of all ranks; rank r gets the r-th part.

        Args:
            out: this rank's part of the result. May be its own part of `x`.
            x: this rank's contribution: the parts of all ranks, one after the other.
            counts: the parts' elements, where they are not equal; the same on all ranks.
            op, algorithm, async_op, Raises: as in `all_reduce`.
        """
        return self._call(_REDUCE_SCATTER, x, out, self._with_counts(op, counts), 0, algorithm, async_op)

    @shortcut(_ALL_GATHER, x="x", out="out")
    def all_gather(
        self,
        out: Array,
        x: Array,
        *,
        counts: Sequence[int] | None = None,
        algorithm: AlgorithmLike = None,
        async_op: bool = False,
    ) -> Any:
        """Every rank gets the arrays of all ranks, one after the other in `out`.

        Args:
            out: size times as large as `x`.
            x: this rank's part. May be its own part of `out`.
            counts: the parts' elements, where they are not equal; the same on all ranks.
            algorithm, async_op, Raises: as in `all_reduce`.
        """
        return self._call(_ALL_GATHER, x, out, self._with_counts(None, counts), 0, algorithm, async_op)

    @shortcut(_BROADCAST, x="x", out="x", root="root")
    def broadcast(self, x: Array, root: int = 0, *, algorithm: AlgorithmLike = None, async_op: bool = False) -> Any:
        """Every rank's `x` becomes the root's. `algorithm`, `async_op`, Raises: as in `all_reduce`."""
        return self._call(_BROADCAST, x, x, None, root, algorithm, async_op)

    @shortcut(_REDUCE, x="x", out="x", op="op", root="root")
    def reduce(
        self,
        x: Array,
        op: str | PremulSum = "sum",
        root: int = 0,
        *,
        out: Array = None,
        algorithm: AlgorithmLike = None,
        async_op: bool = False,
    ) -> Any:
        """Combine the arrays of all ranks at the root: in `out` there, or in its `x`. Others' `x` stays as it is.

        `op`, `algorithm`, `async_op`, Raises: as in `all_reduce`.
        """
        return self._call(_REDUCE, x, x if out is None else out, op, root, algorithm, async_op)

    @shortcut(_GATHER, x="x", out="out", root="root")
    def gather(
        self,
        out: Array | None,
        x: Array,
        root: int = 0,
        *,
        algorithm: AlgorithmLike = None,
        async_op: bool = False,
    ) -> Any:
        """The root gets the arrays of all ranks, one after the other in its `out` (None elsewhere).

        `algorithm`, `async_op`, Raises: as in `all_reduce`.
        """
        return self._call(_GATHER, x, out, None, root, algorithm, async_op)

    @shortcut(_SCATTER, x="x", out="out", root="root")
    def scatter(
        self,
        out: Array,
        x: Array | None,
        root: int = 0,
        *,
        algorithm: AlgorithmLike = None,
        async_op: bool = False,
    ) -> Any:
        """Rank r's `out` becomes the r-th part of the root's `x` (None elsewhere).

        `algorithm`, `async_op`, Raises: as in `all_reduce`.
        """
        return self._call(_SCATTER, x, out, None, root, algorithm, async_op)

    @shortcut(_ALL_TO_ALL, x="x", out="out")
    def all_to_all(
        self,
        out: Array,
        x: Array,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
        *,
        algorithm: AlgorithmLike = None,
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
        uneven = self._uneven_exchange(out, x, out_splits, in_splits, algorithm)
        return self._call(_ALL_TO_ALL, x, out, uneven, 0, algorithm, async_op)

    @shortcut(_BARRIER)
    def barrier(self, *, algorithm: AlgorithmLike = None, async_op: bool = False) -> Any:
        """Return when all ranks have called it."""
        return self._call(_BARRIER, None, None, None, 0, algorithm, async_op)

    # ---- memory, groups, and the end

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """An array in registered memory, its elements undefined: collectives on it copy nothing on the way.

        Not collective, but it pays where all ranks have such arrays. Any array of numpy's or torch's may be made a view
        of it. Where peers can not map it, as over a network, it is ordinary memory. A forked child
        shares it with its parent: it must not write to it.

        Args:
            shape: its sizes.
            dtype: numpy's, or its name; or torch's, and the result is a tensor.

        Raises:
            TransportError: no room is left: a rank has its share of the machine's memory, 1 GiB at least.
        """
        self._check_usable()
        if self._memory is None:
            return empty(shape, dtype, lambda nbytes: np.empty(nbytes, np.uint8))
        return empty(shape, dtype, self._memory.allocate)

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """New communicators of the ranks that give the same color, ranked by key, then by rank. Collective.

        Returns:
            This rank's new communicator; None if its color is None.
        """
        self._check_usable()
        for name, value in (("color", color), ("key", key)):
            if not isinstance(value, (int, np.integer)) and not (name == "color" and value is None):
                raise ArgumentError(f"split: {name} must be an integer, and is {value!r}")
        mine = np.array([color is not None, color or 0, key], dtype=np.int64)
        everyone = np.empty((self.size, 3), dtype=np.int64)
        self.all_gather(everyone, mine)
        number = next(self._splits)
        if color is None:
            return None
        members = [r for r in range(self.size) if everyone[r, 0] and everyone[r, 1] == color]
        members.sort(key=lambda r: (int(everyone[r, 2]), r))
        kind, name = self._transport.name, f"{self.name}/{number}.{color}"
        meeting = self._members(members, number)
        return _connect(meeting, None if kind == JOINT else kind, self.timeout, self.reproducible, True, name)

    def close(self) -> None:
        """Give everything back. Pending operations fail. Not collective: end with a barrier if peers still need you."""
        if self._closed or self._generation != _native.fork_generation():
            return
        self._closed = True
        for on_device in (self._devices, *self._device_messages.values()):
            if on_device is not None:
                on_device.close()
        self._driver.close(ClosedError("the communicator was closed while this operation was pending"))
        self._transport.close()

    def __enter__(self) -> Communicator:
        return self

    def __del__(self) -> None:
        # Peers that still wait for this rank learn that it has gone.
        if hasattr(self, "_call"):
            self.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        harmless = error is None or isinstance(error, (CollectiveError, SystemExit))
        if not harmless and not self._closed and self._generation == _native.fork_generation():
            self.abort(f"left its communicator by {type(error).__name__}: {error}")
        self.close()

    # ---- how it is done

    def _bind(
        self,
        index: int,
        x: Array,
        out: Array,
        op: str | PremulSum | Uneven | None,
        root: int,
        algorithm: AlgorithmLike,
    ) -> Any:
        """For the dispatcher, which keeps the result: make the plan of a call that it has not seen."""
        self._check_usable()
        on_device = self._device_call(_COLLECTIVES[index], x, out, op, root, algorithm)
        if on_device is not None:
            return on_device
        prepared = self._binder.bind(_COLLECTIVES[index], x, out, op, root, algorithm)
        return prepared.native if isinstance(prepared, ShmPlan) else prepared

    def _persistent(
        self, collective: Collective, x: Array, out: Array, op: Any, root: int, algorithm: AlgorithmLike
    ) -> Persistent:
        self._check_usable()
        text = f"{collective.value} on {self!r}"
        on_device = self._device_call(collective, x, out, op, root, algorithm)
        if on_device is not None:
            return self._persistent_on_device(on_device, x, out, text)
        prepared = self._binder.bind(collective, x, out, op, root, algorithm)
        source, target = (0 if array is None else view(array, "x", collective.value).address for array in (x, out))
        if isinstance(prepared, ShmPlan):
            return _native.Persistent(self._dispatcher, prepared.native, source, target, (x, out))
        execute = partial(self._execute, prepared, x, out, source, target)
        return PersistentExecution(execute, text)

    def _execute(
        self, prepared: Any, x: Array, out: Array, x_address: int, out_address: int, asynchronous: bool
    ) -> Any:
        """Run a plan of a transport that is not native; with `asynchronous` returns its work."""
        devices = self._devices
        if devices is not None and isinstance(prepared, devices.Call):
            return self._observed(prepared.plan.text, lambda: devices.run(prepared, x, out, asynchronous))
        start: Callable[[], Execution] = partial(prepared.start, x_address, out_address)
        run = self._driver.submit if asynchronous else self._driver.run
        return self._observed(prepared.text, lambda: run(start, self.timeout, (x, out)))

    def _meeting(self, members: Sequence[int]) -> Members:
        return self._members(list(members), next(self._splits))

    def _members(self, members: list[int], number: int) -> Members:
        network = partial(self._transport.split, members, f"{number}/{members[0]}")
        return Members(self._transfer, self.rank, members, _SPLIT_TAG - number % (1 << 20), network)

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("the communicator is closed: make another with abccl.init()")
        if self._generation != _native.fork_generation():
            raise ClosedError(
                "this communicator belongs to the parent of this process, which was forked: make one in the child "
                "with abccl.init(), or start ranks with abccl.spawn()"
            )


def init(
    transport: str | None = None, *, comm: Any = None, timeout: float = TIMEOUT, reproducible: bool | None = None
) -> Communicator:
    """The communicator of all processes that were started together. Collective.

    Finds out how this process was started: by `abccl.spawn`, torchrun, mpirun (Open MPI, MPICH) or srun; else it is
    alone. Ranks that can attach to each other's memory use it; others are reached by MPI if mpirun started them, else
    by Gloo's messages. `Communicator.topology` tells which ranks share a host.

    Args:
        transport: "shm" (shared memory, one host), "mpi" or "gloo" for all ranks. None: as ABCCL_TRANSPORT says; the
            best for each pair, by default. The same on all ranks.
        comm: a communicator of mpi4py; its ranks, instead of all that were started together.
        timeout: seconds that an operation waits for its peers.
        reproducible: whether all_reduce, reduce_scatter and reduce give the same bits for a given number of ranks,
            whatever the algorithm, the segments and the length of the vector. None: as ABCCL_REPRODUCIBLE says, 0 or
            1; not, by default. The same on all ranks: the first reduction raises Mismatch if not.

    Raises:
        TransportError: the ranks can not be found or can not reach each other.
        ArgumentError: no such transport; ABCCL_REPRODUCIBLE is neither 0 nor 1; `comm` is no communicator of mpi4py's.
    """
    wanted_transport(transport)  # or an error, before the ranks meet
    if comm is None:
        return _connect(find(), transport, timeout, reproducible)
    meeting = MPIBootstrap.of(comm, MEETING_TIMEOUT)
    try:
        return _connect(meeting, transport, timeout, reproducible)
    finally:
        meeting.close()


def connect(
    bootstrap: Bootstrap,
    *,
    transport: str | None = None,
    timeout: float = TIMEOUT,
    reproducible: bool | None = None,
    part: bool = False,
    name: str | None = None,
) -> Communicator:
    """The communicator of the ranks that the bootstrap knows, all or a `part` of their job's; as `init`. Collective."""
    return _connect(bootstrap, transport, timeout, reproducible, part, name)


def _connect(
    bootstrap: Bootstrap,
    transport: str | None,
    timeout: float,
    reproducible: bool | None,
    part: bool = False,
    name: str | None = None,
) -> Communicator:
    wanted, reproducible = wanted_transport(transport), is_reproducible(reproducible)
    flight.install()  # or the signal would end a process that still meets its ranks
    if name is None:
        number = next(_inits)
        name = f"default {number}" if number > 1 else "default"
    say_start(bootstrap.rank, bootstrap.size, bootstrap.how, name)
    reached, topology = reach(bootstrap, wanted)
    recorder_of(reached).set_group(name, reached.token)
    try:
        tuner = tuned(reached, topology, reproducible, bootstrap.exchange, part) if reached.size > 1 else None
    except BaseException:
        reached.close()  # peers that measure with this rank must not wait for it
        raise
    say_connected(wanted, reached, topology, tuner, name)
    return Communicator(reached, timeout=timeout, reproducible=reproducible, topology=topology, tuner=tuner, name=name)


def _alive(reference: weakref.ref[Communicator]) -> Communicator:
    communicator = reference()
    if communicator is None:
        raise ClosedError("the communicator is gone: keep a reference to it")
    return communicator


def _forget_plans() -> None:
    for communicator in list(_open):
        communicator._dispatcher.forget()
        if communicator._devices is not None:
            communicator._devices.forget()


registry.on_redefinition.append(_forget_plans)


@atexit.register
def _close_all() -> None:
    """Peers that still wait learn that this rank has left, rather than by its death."""
    for communicator in list(_open):
        communicator.close()
