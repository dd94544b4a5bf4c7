"""How a process finds its ranks: who am I, how many are there, and a first way to talk to them.

`find` reads what the launcher left in the environment and returns a Bootstrap, whose one verb is an all-gather of
small blobs. Everything else (addresses, memory, links) is set up by means of it. No blob is unpickled here.

A launcher is recognised by the variables that it alone sets, most certain first:

    abccl.spawn     set in the child itself, not in its environment
    torchrun        RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT          a TCPStore of torch
    Open MPI        OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE          mpi4py
    MPICH, Intel    PMI_RANK, PMI_SIZE, MPI_LOCALRANKID                 mpi4py
    srun            SLURM_STEP_ID, SLURM_PROCID, SLURM_NTASKS           a TCPStore on the first host, if torch is there
    any PMI(x)      PMI_RANK or PMIX_RANK                               mpi4py

A batch script that Slurm starts has SLURM_PROCID and SLURM_NTASKS without being one of several processes: only a
step has SLURM_STEP_ID. Hydra (MPICH) starts its ranks through srun, so they inherit the Slurm variables of its proxies:
that is why it is looked for before Slurm, by the variable that Slurm does not set.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from ..errors import ArgumentError, DeadlineExceeded, TransportError
from ..transports import Transport
from .debug import say_start
from .rendezvous import make_store

TIMEOUT = 300.0
"""Seconds that an exchange waits for all ranks, unless told otherwise."""


class Bootstrap(ABC):
    """A rank among its peers, before there is a transport."""

    rank: int
    size: int
    how = "their maker brought them together"
    """How the ranks were started and meet, in words."""
    _made: Any = None
    _networks = 0

    @abstractmethod
    def exchange(self, data: bytes) -> list[bytes]:
        """What every rank gave, in rank order. Collective: all ranks call it, in the same order.

        Raises:
            DeadlineExceeded: some ranks did not call it; the message names them where that can be known.
            TransportError: the way to them is broken.
        """

    def network(self, kind: str | None) -> Transport:
        """A transport to all ranks that needs no common host. Collective.

        Args:
            kind: "mpi" or "gloo"; None for what the ranks were started with.

        Raises:
            TransportError: these ranks have no such way to each other.
        """
        if kind == "mpi":
            _mpi('transport="mpi"')
            raise TransportError("mpi: MPI did not start these ranks and does not know them: start them by mpirun")
        return self._gloo()

    def _gloo(self) -> Transport:
        from ..transports.gloo import GlooTransport

        store = self.store()  # or an error that says what is missing
        prefix, self._networks = f"abccl/gloo/{self._networks}", self._networks + 1
        store = importlib.import_module("torch.distributed").PrefixStore(prefix, store)
        return GlooTransport(store, self.rank, self.size, TIMEOUT)

    def store(self) -> Any:
        """A store of torch's that all ranks share. Collective.

        Raises:
            TransportError: there is no torch, or rank 0 can not be reached.
        """
        if self._made is None:
            self._made = make_store(self.rank, self.exchange)
        return self._made


class Alone(Bootstrap):
    """The only rank."""

    rank, size, how = 0, 1, "this process is alone: no launcher has set its variables"

    def exchange(self, data: bytes) -> list[bytes]:
        """The own data."""
        return [data]


class StoreBootstrap(Bootstrap):
    """Ranks that share one of torch's stores (TCPStore, FileStore, PrefixStore, ...).

    Every exchange has keys of its own below `prefix`, which must be new for every StoreBootstrap on the store. Keys of
    an exchange are deleted one exchange later, when every rank must have read them.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        prefix: str,
        timeout: float = TIMEOUT,
        how: str = "ranks meet by a store of torch.distributed's",
    ) -> None:
        self._store, self.rank, self.size, self.prefix, self.timeout = store, rank, size, prefix, timeout
        self.how = how
        self.round = 0

    def exchange(self, data: bytes) -> list[bytes]:
        """What every rank gave, by one key for each."""
        keys = [self._key(self.round, rank) for rank in range(self.size)]
        try:
            self._store.set(keys[self.rank], data)
            poll(lambda: self._missing(keys), self.timeout, self)
            gathered = [bytes(self._store.get(key)) for key in keys]
            if self.round:
                self._store.delete_key(self._key(self.round - 1, self.rank))
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.rank} of {self.size} lost the store it meets its peers by: {_first_line(error)}. "
                f"Is the process that keeps it (rank 0, or torchrun) still running?"
            ) from error
        self.round += 1
        return gathered

    def store(self) -> Any:
        """See `Bootstrap.store`: the launcher's, below a prefix of its own."""
        return importlib.import_module("torch.distributed").PrefixStore(self.prefix, self._store)

    def _key(self, round: int, rank: int) -> str:
        return f"{self.prefix}/{round}/{rank}"

    def _missing(self, keys: Sequence[str]) -> list[int]:
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]


class MPIBootstrap(Bootstrap):
    """The ranks of an mpi4py communicator. Works on a duplicate, `comm`, that nobody else sends on."""

    how = "ranks meet by a communicator of mpi4py's"

    def __init__(self, comm: Any, timeout: float = TIMEOUT) -> None:
        self.rank, self.size, self.timeout = comm.Get_rank(), comm.Get_size(), timeout
        self.comm, request = comm.Idup()
        self._finish(request)

    @classmethod
    def of(cls, comm: Any, timeout: float = TIMEOUT) -> MPIBootstrap:
        """The ranks of a communicator of mpi4py's.

        Raises:
            ArgumentError: it is no such, or this process is not in it.
        """
        mpi = _mpi("init(comm=...)")
        if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
            raise ArgumentError(
                f"init: comm must be an intra-communicator of mpi4py's that this process is in, and is {comm!r}"
            )
        return cls(comm, timeout)

    def exchange(self, data: bytes) -> list[bytes]:
        """What every rank gave: first the lengths, then the bytes (not mpi4py's allgather, which unpickles)."""
        lengths = memoryview(bytearray(8 * self.size)).cast("q")
        self._finish(self.comm.Iallgather(memoryview(len(data).to_bytes(8, "little")).cast("B").cast("q"), lengths))
        counts = lengths.tolist()
        starts = [0, *itertools.accumulate(counts)]
        gathered = bytearray(starts[-1])
        self._finish(self.comm.Iallgatherv(data, [gathered, counts, starts[:-1], _mpi("meeting").BYTE]))
        return [bytes(gathered[start : start + count]) for start, count in zip(starts, counts)]

    def close(self) -> None:
        """Give the duplicate back. Collective."""
        self.comm.Free()

    def network(self, kind: str | None) -> Transport:
        """MPI's messages: see `Bootstrap.network`."""
        if kind == "gloo":
            return self._gloo()
        from ..transports.mpi import MPITransport

        return MPITransport(self.comm)

    def _finish(self, request: Any) -> None:
        # MPI goes from round to round of a collective only when it is called.
        poll(lambda: [] if request.Test() else None, self.timeout, self, longest_pause=0.001)


def poll(
    missing: Callable[[], Sequence[int] | None], timeout: float, own: Bootstrap, longest_pause: float = 0.05
) -> None:
    """Ask until nobody is missing. Sleeps between, so that Ctrl-C is seen and the store is left in peace.

    Args:
        missing: the ranks still missing; None if some are and it can not be known which.

    Raises:
        DeadlineExceeded: after `timeout` seconds.
    """
    deadline, pause = time.monotonic() + timeout, 0.0005
    while True:
        ranks = missing()
        if ranks is not None and not ranks:
            return
        if time.monotonic() > deadline:
            who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else "the other ranks"
            raise DeadlineExceeded(
                f"rank {own.rank} of {own.size} waited {timeout:g} s for {who}: every process must call this, "
                f"equally often. Look at the output of {who}; if they are only slow to start, give a longer timeout"
            )
        time.sleep(pause)
        pause = min(2 * pause, longest_pause)


spawned: Bootstrap | None = None
"""Set in a process that abccl.spawn started."""

_inits = itertools.count()
_stores: dict[tuple[str, int], Any] = {}
_worlds: dict[str, MPIBootstrap] = {}  # one at most: MPI has some thousand communicators for a process


def find(environment: Mapping[str, str] | None = None, timeout: float = TIMEOUT) -> Bootstrap:
    """Find out how this process was started, and meet the other ranks. Collective, and so is every call of it.

    Args:
        environment: the variables to look at; os.environ if None.
        timeout: seconds to wait for the others, here and in each exchange.

    Raises:
        TransportError: variables are missing or make no sense, a package is missing, the peers can not be reached.
        DeadlineExceeded: other ranks did not come.
    """
    environment = os.environ if environment is None else environment
    if spawned is not None:
        spawned.how = "started by abccl.spawn; ranks meet through its pipes"
        return spawned
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _torchrun(environment, timeout)
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _mpirun("Open MPI", "OMPI_COMM_WORLD_SIZE", environment, timeout)
    if "PMI_RANK" in environment and "MPI_LOCALRANKID" in environment:
        return _mpirun("MPICH", "PMI_SIZE", environment, timeout)
    managed = "PMI_RANK" in environment or "PMIX_RANK" in environment
    step = "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment
    if step and (not managed or importlib.util.find_spec("torch")):
        return _slurm(environment, timeout)
    if managed:
        return _mpirun("PMI", "PMI_SIZE", environment, timeout)
    return Alone()


def _torchrun(environment: Mapping[str, str], timeout: float) -> Bootstrap:
    rank, size = _rank_and_size("RANK", "WORLD_SIZE", environment)
    if size == 1:
        return Alone()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise TransportError(
            f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}: start the processes by torchrun, "
            f"or set where rank 0 listens"
        )
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = _integer("MASTER_PORT", environment)
    how = f"started by torchrun; ranks meet by the store at {environment['MASTER_ADDR']}:{port}"
    say_start(rank, size, how)
    store = _store(environment["MASTER_ADDR"], port, rank == 0 and not agent, timeout)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return StoreBootstrap(store, rank, size, f"abccl/{attempt}/{next(_inits)}", timeout, how)


def _slurm(environment: Mapping[str, str], timeout: float) -> Bootstrap:
    size_variable = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    rank, size = _rank_and_size("SLURM_PROCID", size_variable, environment)
    if size == 1:
        return Alone()
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environment[name] for name in lists if environment.get(name)), None)
    if nodes is None:
        raise TransportError(f"Slurm's step has {size} tasks but none of {', '.join(lists)} is set: start it by srun")
    step = f"{environment.get('SLURM_JOB_ID', environment.get('SLURM_JOBID', '0'))}.{environment['SLURM_STEP_ID']}"
    # The ephemeral ports, which any connection may hold, begin at 32768 on Linux: stay below.
    port = 16384 + zlib.crc32(step.encode()) % 16384
    how = f"started by srun; ranks meet by the store at {first_host(nodes)}:{port}"
    say_start(rank, size, how)
    store = _store(first_host(nodes), port, rank == 0, timeout)
    return StoreBootstrap(store, rank, size, f"abccl/{step}/{next(_inits)}", timeout, how)


def first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list: node[007-010,12],other -> node007."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    host = first.group() if first else ""
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", host)


def _mpirun(launcher: str, size_variable: str, environment: Mapping[str, str], timeout: float) -> Bootstrap:
    mpi = _mpi(f"{launcher} started this process")
    if "world" not in _worlds:
        _worlds["world"] = MPIBootstrap(mpi.COMM_WORLD, timeout)
    bootstrap = _worlds["world"]
    bootstrap.timeout = timeout
    bootstrap.how = f"started by mpirun; ranks meet by mpi4py over {_library(mpi)}"
    if size_variable in environment and _integer(size_variable, environment) != bootstrap.size:
        raise TransportError(
            f"{launcher} started {environment[size_variable]} processes, and mpi4py sees {bootstrap.size}: it uses "
            f"another MPI ({_library(mpi)}). Start them by that one's mpirun, or install mpi4py for {launcher}"
        )
    return bootstrap


def _library(mpi: Any) -> str:
    """The MPI library, as in Open MPI v5.0.8."""
    first: str = mpi.Get_library_version().splitlines()[0]
    return " ".join(first.split(",")[0].split())


def _mpi(reason: str) -> Any:
    """mpi4py's module MPI.

    Raises:
        TransportError: it can not be had; the message says what to install.
    """
    from ..transports.mpi import find_mpi

    try:
        return find_mpi()
    except TransportError as error:
        raise TransportError(f"{reason}: {error}") from error


def _store(host: str, port: int, serves: bool, timeout: float) -> Any:
    """The TCPStore there, one connection for each process. The server may be shared with torch in this process."""
    if (host, port) not in _stores:
        try:
            distributed = importlib.import_module("torch.distributed")
        except ImportError as error:
            raise TransportError(
                f"ranks on {host} meet by torch's TCPStore, and there is no torch: pip install torch"
            ) from error
        try:
            _stores[host, port] = distributed.TCPStore(
                host, port, None, serves, timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError as error:
            verb = "open" if serves else "reach"
            raise TransportError(
                f"can not {verb} the store at {host}:{port} ({_first_line(error)}): does rank 0 run on {host}, is the "
                f"port free there and not behind a firewall?"
            ) from error
    return _stores[host, port]


def _rank_and_size(rank_variable: str, size_variable: str, environment: Mapping[str, str]) -> tuple[int, int]:
    rank, size = _integer(rank_variable, environment), _integer(size_variable, environment)
    if not 0 <= rank < size:
        raise TransportError(f"{rank_variable}={rank} and {size_variable}={size}: ranks are 0 to size - 1")
    return rank, size


def _integer(name: str, environment: Mapping[str, str]) -> int:
    try:
        return int(environment[name])
    except KeyError:
        raise TransportError(f"{name} is not set: start the processes by their launcher") from None
    except ValueError:
        raise TransportError(f"{name}={environment[name]!r} is not a number: the launcher sets it") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
