"""A new communicator of the ranks that are left.

The survivors agree as `survivors.py` says, on a board that fits how they reach each other: shared memory on one host, a
store of torch's where Gloo carries messages between hosts. Where MPI does, they agree by MPI itself, which must have
been started for it (`mpirun --with-ft ulfm`).

What is promised: all ranks for which `shrink` returns get communicators of one and the same group, with dense ranks in
the old order. No rank waits for a rank that is known to be lost; for one that lives and does not come, or does not go
on, each wait lasts `timeout` seconds at most. What is not: that no member dies just after.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError, TransportError
from ..transports import Transport
from ..transports.joint import JOINT, JointTransport
from ..transports.mpi import MPITransport, outlive
from ..transports.shm import ShmTransport
from .board import Board, ShmBoard, StoreBoard
from .bootstrap import Bootstrap
from .communicator import Communicator, connect
from .shrink_mpi import shrink_by_mpi
from .survivors import Agreement, Group, Steps, drive, run


class BoardBootstrap(Bootstrap):
    """The members of a group of survivors, by what they write on the board."""

    how = "survivors of a communicator that has shrunk"

    def __init__(self, group: Group, store: Any = None) -> None:
        self.rank, self.size, self._group, self._made = group.rank, group.size, group, store

    def exchange(self, data: bytes) -> list[bytes]:
        """What every member gave: see `Group.exchange`."""
        return drive(self._group.exchange(data))


def shrink(communicator: Communicator, timeout: float | None = None) -> Communicator:
    """See `Communicator.shrink`."""
    if timeout is not None and not 0 < timeout < math.inf:
        raise ArgumentError(f"shrink: timeout must be a positive number of seconds, and is {timeout!r}")
    transport = communicator._transport
    timeout = communicator.timeout if timeout is None else timeout

    def make(bootstrap: Bootstrap) -> Communicator:
        return connect(
            bootstrap,
            transport=None if transport.name == JOINT else transport.name,
            timeout=communicator.timeout,
            reproducible=communicator.reproducible,
            name=f"{communicator.name.partition(', shrunk')[0]}, shrunk to {bootstrap.size}",
        )

    if isinstance(transport, JointTransport) and isinstance(transport.network, MPITransport):
        made = shrink_by_mpi(transport.network, make, timeout)
    else:
        made = _by_board(communicator, board_of(transport), make, timeout)
    if made.size < communicator.size:
        outlive()
    return made


def _by_board(
    communicator: Communicator, board: Board, make: Callable[[Bootstrap], Communicator], timeout: float
) -> Communicator:
    def build(group: Group) -> Steps[Communicator]:
        yield False
        store = None
        if isinstance(board, StoreBoard):
            store = importlib.import_module("torch.distributed").PrefixStore(f"epoch/{group.epoch}", board.store)
        return make(BoardBootstrap(group, store))

    agreement = Agreement(board, build, timeout)
    communicator._shrinking = agreement
    try:
        made, _ = run(agreement)
    finally:
        communicator._shrinking = None
    return made


def board_of(transport: Transport) -> Board:
    """Where the ranks of a broken transport can agree.

    Raises:
        TransportError: nowhere; the message says what to do.
    """
    if isinstance(transport, ShmTransport):
        return ShmBoard(transport)
    store = getattr(transport.network, "store", None) if isinstance(transport, JointTransport) else None
    if isinstance(transport, JointTransport) and store is not None:
        return StoreBoard(importlib.import_module("torch.distributed").PrefixStore("shrink", store), transport)
    raise TransportError(
        f"shrink: the ranks are joined by {transport.name}, over which survivors can not agree: use shared memory on "
        f"one host, or start them by torchrun"
    )
