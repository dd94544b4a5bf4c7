"""Survivors that MPI joins: they agree by MPI itself, which has it as User Level Failure Mitigation (MPIX_Comm_shrink).

`Shrink` makes a communicator of the ranks that live, the same on all; `Agree` tells all alike whether all have made
theirs on it. If not, as another rank has died meanwhile, they begin anew. MPI waits for every rank that lives: none is
left out for being late.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import AbcclError, DeadlineExceeded, TransportError
from ..transports.mpi import MPITransport, within
from .bootstrap import MPIBootstrap
from .survivors import EPOCHS, Closable

M = TypeVar("M", bound=Closable)

STARTED = "OMPI_MCA_mpi_ft_enable"
"""What `mpirun --with-ft ulfm` sets for its ranks."""


def shrink_by_mpi(network: MPITransport, connect: Callable[[MPIBootstrap], M], timeout: float) -> M:
    """What `connect` makes of the ranks that live.

    Raises:
        TransportError: MPI was not started for it, or the ranks can not be connected.
        DeadlineExceeded: a rank that lives did not come.
    """
    mpi, old = network.mpi, network.comm
    if os.environ.get(STARTED) != "1" or not hasattr(old, "Shrink"):
        raise TransportError(
            "shrink: MPI joins these ranks, and it was not started to go on without some of them: start them by "
            "mpirun --with-ft ulfm (Open MPI 5). On one host shared memory needs no more than --enable-recovery"
        )
    who = f"rank {network.rank} of {network.size} called shrink()"
    with contextlib.suppress(mpi.Exception):
        old.Revoke()  # whoever still waits in a call of MPI comes out of it
    refused = 0
    for _ in range(EPOCHS):
        comm = within(timeout, old.Shrink, who)
        comm.Set_errhandler(mpi.ERRORS_RETURN)
        made, error = None, None
        try:
            made = connect(MPIBootstrap(comm, timeout))
        except (AbcclError, mpi.Exception) as failure:
            error = failure
            with contextlib.suppress(mpi.Exception):
                comm.Revoke()
        if _agree(mpi, comm, made is not None, timeout, who) and made is not None:
            return made
        if made is not None:
            made.close()
        alike = comm.Get_size() == old.Get_size()
        refused = refused + 1 if alike else 0
        if refused > 1:  # nobody has died: it will not be better
            raise error if isinstance(error, AbcclError) else TransportError(f"{who}: {error or 'another rank failed'}")
        old = comm
    raise DeadlineExceeded(f"{who}: {EPOCHS} attempts have failed: start the job anew")


def _agree(mpi: Any, comm: Any, well: bool, timeout: float, who: str) -> bool:
    """Whether all are well, and none has died: the same on all."""
    try:
        return bool(within(timeout, lambda: comm.Agree(int(well)), who))
    except TransportError:  # a rank has died, which all are told
        return False
