"""Who is measured. A peer is how to call a collective on prepared buffers, through the door that its users use.

    abccl, direct     the Communicator, on numpy arrays, torch tensors or cupy arrays
    abccl, torch      torch.distributed with backend "abccl", on torch tensors
    gloo              torch.distributed with backend "gloo", on torch tensors
    mpi               mpi4py's buffer calls ([array, MPI.FLOAT]), on numpy or cupy arrays

All of them get the same memory.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

from ..algorithms import Collective
from ..collectives import premul_sum
from ..errors import AbcclError, ArgumentError
from ..transports.mpi_collectives import mpi_operator, mpi_type
from .buffers import Buffers, import_torch
from .collectives import Case
from .measure import Call
from .messages import AnyCase, Endpoint, Exchange, exchange, idle
from .world import World, import_or


class Peer(ABC):
    """A library, reached in one way.

    Attributes:
        name: of the library.
        door: the way to abccl that it is compared with; for abccl itself, the way.
        algorithm: the algorithm asked for; "auto" if the library chooses.
    """

    name: str
    door: str
    rank: int
    algorithm = "auto"

    def call(self, case: AnyCase, buffers: Buffers, root: int) -> Call:
        """What is measured of the case, ready to be made.

        Raises:
            ArgumentError: the library has no such thing.
        """
        if isinstance(case, Case):
            return self.prepare(case, buffers, root)
        if self.rank not in case.pair:
            return idle
        first, second = case.pair
        return exchange(case, self.rank, self.endpoint(case, buffers, second if self.rank == first else first))

    @abstractmethod
    def prepare(self, case: Case, buffers: Buffers, root: int) -> Call:
        """The call, ready to be made; the arguments are put together now.

        Raises:
            ArgumentError: the library has no such collective, type or operator.
        """

    @abstractmethod
    def endpoint(self, case: Exchange, buffers: Buffers, other: int) -> Endpoint:
        """How to send to the rank `other` and to receive from it.

        Raises:
            ArgumentError: the library has no such type.
        """

    def first(self, call: Call, case: AnyCase) -> None:
        """Make a call for the first time.

        Raises:
            ArgumentError: the library refuses it, with its reason.
        """
        try:
            call()
        except AbcclError:
            raise
        except (RuntimeError, ValueError, NotImplementedError) as error:  # mpi4py's and torch's are RuntimeErrors
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArgumentError(f"{self.name} refuses {case.text} ({reason}): leave it out") from error

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Its version, and the settings that its speed depends on."""


class AbcclDirect(Peer):
    """abccl's own calls."""

    name, door = "abccl", "direct"

    def __init__(self, world: World, algorithm: str, array: str, persistent: bool = False) -> None:
        self.comm, self.rank, self.algorithm, self.array = world.comm, world.rank, algorithm, array
        self.persistent = persistent

    def prepare(self, case: Case, buffers: Buffers, root: int) -> Call:
        """See `Peer.prepare`."""
        plain = self._plain(case, buffers, root)
        if not self.persistent:
            return plain
        name = f"{case.collective.value}_init"
        initialise = getattr(self.comm, name, None)
        if initialise is None:
            raise ArgumentError(f"this abccl has no {name}: leave out --persistent")
        # A handle takes the arguments of the plain call, once.
        started: Call = initialise(*plain.args, **plain.keywords)
        return started

    def endpoint(self, case: Exchange, buffers: Buffers, other: int) -> Endpoint:
        """See `Peer.endpoint`."""
        comm, (x, out) = self.comm, buffers.of(self.array)
        return Endpoint(
            x,
            out,
            (x[:1], out[:1]),
            lambda message, tag: comm.send(message, other, tag),
            lambda message, tag: comm.recv(message, other, tag),
            lambda message, tag: comm.send(message, other, tag, async_op=True),
            lambda message, tag: comm.recv(message, other, tag, async_op=True),
            _wait_each,
        )

    def _plain(self, case: Case, buffers: Buffers, root: int) -> partial[object]:
        comm, here = self.comm, self.rank == root
        x, out = buffers.of(self.array)
        op = premul_sum(1 / case.ranks) if case.op == "premul_sum" else case.op
        forced: dict[str, Any] = {} if self.algorithm == "auto" else {"algorithm": self.algorithm}
        options: dict[str, Any] = forced if case.in_place else {"out": out, **forced}
        match case.collective:
            case Collective.ALL_REDUCE:
                return partial(comm.all_reduce, x, op, **options)
            case Collective.REDUCE:
                return partial(comm.reduce, x, op, root, **options)
            case Collective.REDUCE_SCATTER:
                return partial(comm.reduce_scatter, out, x, op, **forced)
            case Collective.ALL_GATHER:
                return partial(comm.all_gather, out, x, **forced)
            case Collective.ALL_TO_ALL:
                return partial(comm.all_to_all, out, x, **forced)
            case Collective.BROADCAST:
                return partial(comm.broadcast, x, root, **forced)
            case Collective.GATHER:
                return partial(comm.gather, out if here else None, x, root, **forced)
            case Collective.SCATTER:
                return partial(comm.scatter, out, x if here else None, root, **forced)
            case Collective.BARRIER:
                return partial(comm.barrier, **forced)

    def about(self) -> dict[str, str]:
        """See `Peer.about`."""
        return {"version": _abccl_version(), **settings("ABCCL_")}


class TorchPeer(Peer):
    """A backend of torch.distributed, in a group of its own."""

    def __init__(self, world: World, backend: str) -> None:
        self.rank, self.distributed = world.rank, world.distributed()
        self.group = self.distributed.new_group(backend=backend)

    def prepare(self, case: Case, buffers: Buffers, root: int) -> Call:
        """See `Peer.prepare`."""
        dist, group, here = self.distributed, self.group, self.rank == root
        x, out = buffers.of("torch")
        if not case.in_place and case.facts.both_ways:
            raise ArgumentError(f"torch.distributed has its {case.collective.value} in place: leave out --out-of-place")
        if case.op == "premul_sum":
            raise ArgumentError("torch.distributed has premul_sum for NCCL only: take another --op or --through direct")
        op = getattr(dist.ReduceOp, case.op.upper()) if case.op else None
        match case.collective:
            case Collective.ALL_REDUCE:
                return partial(dist.all_reduce, x, op, group)
            case Collective.REDUCE:
                return partial(dist.reduce, x, root, op, group)
            case Collective.REDUCE_SCATTER:
                return partial(_newest(dist, "reduce_scatter_single", "reduce_scatter_tensor"), out, x, op, group)
            case Collective.ALL_GATHER:
                return partial(_newest(dist, "all_gather_single", "all_gather_into_tensor"), out, x, group)
            case Collective.ALL_TO_ALL:
                return partial(dist.all_to_all_single, out, x, group=group)
            case Collective.BROADCAST:
                return partial(dist.broadcast, x, root, group)
            case Collective.GATHER:
                return partial(dist.gather, x, list(out.chunk(case.ranks)) if here else None, root, group)
            case Collective.SCATTER:
                return partial(dist.scatter, out, list(x.chunk(case.ranks)) if here else None, root, group)
            case Collective.BARRIER:
                return partial(dist.barrier, group)

    def endpoint(self, case: Exchange, buffers: Buffers, other: int) -> Endpoint:
        """See `Peer.endpoint`."""
        dist, group, (x, out) = self.distributed, self.group, buffers.of("torch")
        return Endpoint(
            x,
            out,
            (x[:1], out[:1]),
            lambda message, tag: dist.send(message, other, group, tag),
            lambda message, tag: dist.recv(message, other, group, tag),
            lambda message, tag: dist.isend(message, other, group, tag),
            lambda message, tag: dist.irecv(message, other, group, tag),
            _wait_each,
        )


class AbcclTorch(TorchPeer):
    """abccl as a backend of torch.distributed."""

    name, door = "abccl", "torch"

    def __init__(self, world: World, algorithm: str) -> None:
        # Beside the entry point, for a checkout that is not installed. Idempotent.
        remedy = "this build has no torch backend; measure with --through direct"
        import_or(f"{__package__.rpartition('.')[0]}.collectives.torch.register", remedy).register()
        if algorithm != "auto":  # torch's calls have no argument for it
            os.environ["ABCCL_ALGORITHM"] = algorithm
        self.algorithm = algorithm
        super().__init__(world, "abccl")

    def about(self) -> dict[str, str]:
        """See `Peer.about`."""
        return {"version": f"{_abccl_version()}, torch {import_torch().__version__}", **settings("ABCCL_")}


class Gloo(TorchPeer):
    """torch's own backend for CPUs."""

    name, door = "gloo", "torch"

    def __init__(self, world: World) -> None:
        super().__init__(world, "gloo")

    def about(self) -> dict[str, str]:
        """See `Peer.about`."""
        return {"version": f"torch {import_torch().__version__}", **settings("GLOO_", "TORCH_GLOO_")}


class MPI(Peer):
    """The MPI library that started the ranks, by mpi4py.

    Raises:
        ArgumentError: it is to take what a GPU holds, and can not.
    """

    name, door = "mpi", "direct"

    def __init__(self, world: World, array: str = "numpy", persistent: bool = False) -> None:
        self.mpi, self.rank, self.persistent = world.mpi(), world.rank, persistent
        self.comm = self.mpi.COMM_WORLD
        self.array = "cupy" if array == "cupy" else "numpy"
        if self.array == "cupy" and not _cuda_aware(self.mpi):
            raise ArgumentError(
                f"{self._library()} is not CUDA-aware, and would take a GPU's address for one of the host: leave out "
                f"--array cupy, or start by the mpirun of one that is"
            )

    def prepare(self, case: Case, buffers: Buffers, root: int) -> Call:
        """See `Peer.prepare`."""
        plain = self._plain(case, buffers, root)
        if not self.persistent:
            return plain
        try:
            # Not by MPI's version: Open MPI 5 has them, and calls itself MPI 3.1.
            return _Persistent(getattr(self.comm, f"{plain.func.__name__}_init")(*plain.args))
        except NotImplementedError:
            raise ArgumentError(
                f"{self._library()} has no persistent {case.collective.value}, which came with MPI 4.0: leave out "
                f"--persistent"
            ) from None

    def _plain(self, case: Case, buffers: Buffers, root: int) -> partial[object]:
        comm, here = self.comm, self.rank == root
        mpi_type = self._type(case)
        x, out = ([array, mpi_type] for array in buffers.of(self.array))
        op = self._operator(case) if case.op else None
        match case.collective:
            case Collective.ALL_REDUCE:
                return partial(comm.Allreduce, *((self.mpi.IN_PLACE, x) if case.in_place else (x, out)), op)
            case Collective.REDUCE:
                at_root = (self.mpi.IN_PLACE, x) if case.in_place else (x, out)
                return partial(comm.Reduce, *(at_root if here else (x, None)), op, root)
            case Collective.REDUCE_SCATTER:
                return partial(comm.Reduce_scatter_block, x, out, op)
            case Collective.ALL_GATHER:
                return partial(comm.Allgather, x, out)
            case Collective.ALL_TO_ALL:
                return partial(comm.Alltoall, x, out)
            case Collective.BROADCAST:
                return partial(comm.Bcast, x, root)
            case Collective.GATHER:
                return partial(comm.Gather, x, out if here else None, root)
            case Collective.SCATTER:
                return partial(comm.Scatter, x if here else None, out, root)
            case Collective.BARRIER:
                return partial(comm.Barrier)

    def endpoint(self, case: Exchange, buffers: Buffers, other: int) -> Endpoint:
        """See `Peer.endpoint`."""
        comm, mpi_type, (x, out) = self.comm, self._type(case), buffers.of(self.array)
        return Endpoint(
            [x, mpi_type],
            [out, mpi_type],
            ([x[:1], mpi_type], [out[:1], mpi_type]),
            lambda message, tag: comm.Send(message, other, tag),
            lambda message, tag: comm.Recv(message, other, tag),
            lambda message, tag: comm.Isend(message, other, tag),
            lambda message, tag: comm.Irecv(message, other, tag),
            self.mpi.Request.Waitall,
        )

    def _type(self, case: AnyCase) -> Any:
        try:
            return mpi_type(self.mpi, case.dtype)
        except ArgumentError:
            raise ArgumentError(f"MPI has no type {case.dtype}: take another --dtype, or leave out --vs mpi") from None

    def _operator(self, case: Case) -> Any:
        try:
            return mpi_operator(self.mpi, case.op, case.dtype)
        except ArgumentError:
            raise ArgumentError(f"MPI has no operator {case.op}: take another --op, or leave out --vs mpi") from None

    def about(self) -> dict[str, str]:
        """See `Peer.about`."""
        version = f"{self._library()}, mpi4py {import_or('mpi4py', '').__version__}"
        return {"version": version, **settings("OMPI_MCA_", "PRTE_MCA_", "MPIR_CVAR_", "UCX_", "FI_", "I_MPI_")}

    def _library(self) -> str:
        """Its name and version, of which MPICH makes two columns."""
        first = self.mpi.Get_library_version().strip("\0").splitlines()[0].split(", package")[0]
        return " ".join(first.replace("Version:", "").split())


def _wait_each(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _cuda_aware(mpi: Any) -> bool:
    """Whether the library behind mpi4py says that it takes a GPU's memory."""
    # MPI has no call for it. Open MPI and MPICH, and those that come of them, have this function beside it.
    try:
        return bool(ctypes.CDLL(mpi.__file__).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return False


class _Persistent:
    """Starts a persistent request and waits for it."""

    def __init__(self, request: Any) -> None:
        self.request = request

    def __call__(self) -> None:
        self.request.Start()
        self.request.Wait()

    def __del__(self) -> None:
        self.request.Free()


# Variables that launchers set in every run: no settings of the user's.
_NOT_SETTINGS = (
    *(
        f"OMPI_MCA_{name}"
        for name in ("ess", "pmix", "orte", "initial_wdir", "num_procs", "PREFIXES", "cpu_type", "prte")
    ),
    *(f"PRTE_MCA_{name}" for name in ("ess", "pmix", "prte")),
    *(
        f"I_MPI_{name}"
        for name in ("INFO_", "HYDRA_", "INTERNAL_", "BIND_WIN_", "RETURN_WIN_", "PIN_INFO", "PIN_MAPPING")
    ),
    *("I_MPI_MPIRUN", "I_MPI_ROOT", "FI_PROVIDER_PATH"),
)


def settings(*prefixes: str) -> dict[str, str]:
    """The variables of the environment by which a user has set a library."""
    found = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    return {name: found[name] for name in sorted(found) if not name.startswith(_NOT_SETTINGS)}


def _newest(module: Any, name: str, former: str) -> Any:
    """The function of that name, or of its former name: torch renamed some, and the old ones warn on every call."""
    return getattr(module, name, None) or getattr(module, former)


def _abccl_version() -> str:
    return str(importlib.import_module(__package__.rpartition(".")[0]).__version__)
