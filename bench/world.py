"""The ranks that measure, however they were started, and what the peers among them need to meet."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from ..collectives import Communicator, bootstrap, connect, spawn
from ..collectives.reach import ENVIRONMENT as TRANSPORT
from ..errors import AbcclError, ArgumentError, CollectiveError, TransportError

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that a rank which has failed waits for the others to come to know it."""

Floats = np.ndarray[Any, np.dtype[np.float64]]


class World:
    """This rank among those that measure.

    Args:
        own: how it meets the others.
        transport: abccl's; None to leave it to abccl.

    Attributes:
        rank, size: as ever.
        launcher: what started it: spawn, torchrun, mpirun.
        comm: their communicator; it is measured, and it keeps the ranks in step.
        transport: the name of its transport.
        natives: the collectives that the transport's engine has of its own.
        hosts: where the ranks are.
    """

    def __init__(self, own: bootstrap.Bootstrap, transport: str | None = None) -> None:
        self.rank, self.size, self.launcher = own.rank, own.size, launcher(own)
        self._own = own
        self._distributed: Any = None
        self._store: Any = None
        if transport == "mpi":
            self.wants_mpi(own)
        if transport:  # for the communicators of torch's groups, which nobody makes by name
            os.environ[TRANSPORT] = transport
        self.comm: Communicator = connect(own, transport=transport)
        self.hosts = self.comm.topology.hosts
        carrier = self.comm._transport
        self.transport, self.natives = carrier.name, carrier.collectives

    @property
    def local_rank(self) -> int:
        """Which of its host's ranks this is."""
        return self.comm.topology.host_of(self.rank).ranks.index(self.rank)

    def share_host(self, *ranks: int) -> bool:
        """Whether these ranks are all on one host."""
        return any(set(ranks) <= set(host.ranks) for host in self.hosts)

    def slowest(self, seconds: float) -> float:
        """The largest of what all ranks give. All call it."""
        shared = np.array([seconds])
        self.comm.all_reduce(shared, "max")
        return float(shared[0])

    def total(self, number: int) -> int:
        """The sum of what all ranks give. All call it."""
        shared = np.array([number])
        self.comm.all_reduce(shared)
        return int(shared[0])

    def all(self, own: Floats) -> Floats:
        """What all ranks give, behind a new first axis. All call it."""
        everyone = np.empty((self.size, *own.shape))
        self.comm.all_gather(everyone, own)
        return everyone

    def tell(self, text: str) -> list[str]:
        """What all ranks tell. All call it."""
        return [told.decode() for told in self._own.exchange(text.encode())]

    def distributed(self) -> Any:
        """torch.distributed, initialised with gloo among the ranks. All call it."""
        if self._distributed is None:
            distributed: Any = import_or("torch.distributed", "pip install 'abccl[torch]'")
            # Not env://, which only torchrun sets up.
            self._store = distributed.PrefixStore("bench", self._own.store())
            distributed.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size)
            self._distributed = distributed
        return self._distributed

    def mpi(self) -> Any:
        """mpi4py's MPI.

        Raises:
            ArgumentError: mpirun has not started this process.
        """
        self.wants_mpi(self._own)
        return import_or("mpi4py.MPI", "pip install 'abccl[mpi]'")

    @staticmethod
    def wants_mpi(own: bootstrap.Bootstrap) -> None:
        """Refuse ranks that are not MPI's.

        Raises:
            ArgumentError: with the command that starts such.
        """
        if not isinstance(own, bootstrap.MPIBootstrap):
            raise ArgumentError(
                "MPI is measured among ranks that it has started: mpirun -n 2 python -m abccl.bench all_reduce --vs mpi"
            )

    def abort(self, reason: str) -> None:
        """Let the other ranks' waits end: this one has failed, and perhaps only this one."""
        self.comm.abort(reason)
        if self._distributed is not None:
            # Gloo's threads, left to the interpreter's exit, now and then end the process by SIGABRT.
            with contextlib.suppress(Exception):
                self._distributed.destroy_process_group()

    def all_have_failed(self) -> bool:
        """Whether all ranks of mpirun come here soon. Those that wait in a call of MPI's do not."""
        assert isinstance(self._own, bootstrap.MPIBootstrap)
        self._own.timeout = PATIENCE
        try:
            self._own.exchange(b"")
        except AbcclError:
            return False
        return True

    def close(self) -> None:
        """Give everything back, together."""
        if self._distributed is not None:
            self._distributed.destroy_process_group()
        self.comm.barrier()  # rank 0 keeps the store
        self.comm.close()


@contextlib.contextmanager
def joined(own: bootstrap.Bootstrap, transport: str | None = None) -> Iterator[World]:
    """The ranks, met and left together; one that fails lets all others know."""
    world = World(own, transport)
    try:
        yield world
        world.close()
    except BaseException as error:
        world.abort(str(error))
        refused = isinstance(error, AbcclError)
        if world.launcher == "mpirun" and not (refused and world.all_have_failed()):
            # Ranks that wait in MPI do not notice that this one is gone.
            print(f"rank {world.rank}: {error}" if refused else traceback.format_exc(), file=sys.stderr, flush=True)
            world.mpi().COMM_WORLD.Abort(1)
        raise


def on_ranks(
    own: bootstrap.Bootstrap, body: Callable[..., T], arguments: tuple[Any, ...], ranks: int
) -> tuple[T | None, AbcclError | None]:
    """Run body(own, *arguments) on the ranks that were started or, if this process is alone, on so many new ones.

    Args:
        own: this process.
        body: a function that a new process can import, and so its arguments.

    Returns:
        What rank 0 returned, on rank 0 and where the ranks were started from; or what to tell the user about a failure.
        Neither on a rank that has nothing to tell.
    """
    if launcher(own):
        result, error = _outcome(own, body, arguments)
        tells = own.rank == 0 or isinstance(error, CollectiveError)
        return (result if own.rank == 0 else None), (error if tells else None)
    outcomes = spawn(_spawned, ranks, (body, arguments))
    errors = [error for _, error in outcomes if error is not None]
    # A rank that failed by itself knows more than those that were let down.
    errors.sort(key=lambda error: isinstance(error, CollectiveError))
    return outcomes[0][0], errors[0] if errors else None


def _spawned(body: Callable[..., T], arguments: tuple[Any, ...]) -> tuple[T | None, AbcclError | None]:
    return _outcome(bootstrap.find(), body, arguments)


def _outcome(
    own: bootstrap.Bootstrap, body: Callable[..., T], arguments: tuple[Any, ...]
) -> tuple[T | None, AbcclError | None]:
    try:
        result = body(own, *arguments)
    except AbcclError as error:
        return None, error
    return (result if own.rank == 0 else None), None


def launcher(own: bootstrap.Bootstrap) -> str:
    """What started these ranks; "" if this process is alone and nobody did."""
    if isinstance(own, bootstrap.MPIBootstrap):
        return "mpirun"
    if own is bootstrap.spawned:
        return "spawn"
    if isinstance(own, bootstrap.StoreBootstrap):
        return "torchrun" if "RANK" in os.environ else "srun"
    return "torchrun" if "RANK" in os.environ and "WORLD_SIZE" in os.environ else ""


def import_or(module: str, remedy: str) -> Any:
    """The module.

    Raises:
        TransportError: it can not be imported, with the remedy.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TransportError(f"{module} can not be imported ({reason}): {remedy}") from error
