"""How ranks reach each other's devices: by what is there on all of them, or as somebody wishes.

On one host memory that is mapped by CUDA IPC (`cuda_ipc`), then NCCL; on several NCCL; else host memory (`staged`),
which works wherever the ranks themselves reach each other. What was tried and could not be had is kept, and shown.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AbcclError, ArgumentError, TransportError
from ..transports import Transport
from ..transports.cuda_ipc import CudaIpcTransport
from ..transports.device import DeviceTransport, open_device
from ..transports.joint import JOINT
from ..transports.mpi import MPITransport
from ..transports.nccl import nccl_wire
from ..transports.staged import StagedWire, mpi_is_cuda_aware
from ..transports.topology import Exchange, Topology, find_topology
from .bootstrap import Bootstrap
from .reach import reach
from .tuner.candidates import Place
from .tuner.device_table import device_table
from .tuner.tuner import Tuner

ENVIRONMENT = "ABCCL_CUDA_TRANSPORT"
"""Names what carries messages between devices. The same on all ranks."""

SYNC = "ABCCL_CUDA_SYNC"
"""What waits in `cuda_ipc`: "stream", or "spin" where every rank has a device of its own. The same on all ranks."""

TRANSPORTS = {
    "cuda_ipc": "memory mapped by CUDA IPC, one host",
    "nccl": "NCCL's messages",
    "staged": "host memory and what carries messages between hosts; an MPI that takes CUDA memory gets it directly",
}


@dataclass(frozen=True)
class Reached:
    """A transport to the devices of all ranks.

    Attributes:
        refused: what was tried before, and why it could not be had.
    """

    transport: DeviceTransport
    tuner: Tuner
    refused: tuple[str, ...]


def reach_devices(meeting: Bootstrap, host_transport: str, ordinal: int, tuner: Tuner, timeout: float) -> Reached:
    """A transport to the devices of the ranks that meet. Collective.

    Args:
        host_transport: the name of what connects them already.
        ordinal: this rank's device.
        tuner: theirs, for arrays in host memory.

    Raises:
        TransportError: on all ranks, if any lacks something; the message names what.
        ArgumentError: ABCCL_CUDA_TRANSPORT or ABCCL_CUDA_SYNC is not what is wanted.
    """
    wanted, sync = os.environ.get(ENVIRONMENT) or None, os.environ.get(SYNC) or "stream"
    made: tuple[Any, Any] | None = None
    refusal = ""
    try:
        if wanted is not None and wanted not in TRANSPORTS:
            known = ", ".join(f"{one} ({what})" for one, what in TRANSPORTS.items())
            raise ArgumentError(f"{ENVIRONMENT}={wanted!r}: there are {known}")
        made = open_device(ordinal)
    except AbcclError as error:
        refusal = f"rank {meeting.rank}: {error}"
    # Only MPI may be given addresses of a device's memory: not a transport in which some peers share memory instead.
    direct = host_transport == "mpi" and mpi_is_cuda_aware()
    cards = [json.loads(blob) for blob in meeting.exchange(json.dumps([refusal, direct, wanted, sync]).encode())]
    refusals = list(dict.fromkeys(card[0] for card in cards if card[0]))
    if refusals or made is None:
        raise TransportError("; ".join(refusals))
    other = next((rank for rank, card in enumerate(cards) if card[2:] != cards[0][2:]), None)
    if other is not None:
        raise ArgumentError(
            f"rank 0 has {ENVIRONMENT}={cards[0][2] or ''} and {SYNC}={cards[0][3]}, rank {other} has "
            f"{ENVIRONMENT}={cards[other][2] or ''} and {SYNC}={cards[other][3]}: they must be the same on all ranks"
        )
    if all(card[1] for card in cards):
        host, topology = meeting.network("mpi"), find_topology(meeting.rank, meeting.size, meeting.exchange)
    else:
        host, topology = reach(meeting, None if host_transport == JOINT else host_transport)
    try:
        name, transport, refused = _first_of(_names(wanted, topology), host, made, meeting.exchange, sync, timeout)
    except BaseException:
        host.close()
        raise
    if name == "staged" and refused and meeting.rank == 0 and meeting.size > 1:
        warnings.warn(
            f"abccl: arrays on CUDA devices go through host memory: {'; '.join(refused)}", RuntimeWarning, stacklevel=2
        )
    place = Place(
        topology.groups,
        max(map(len, topology.groups)),
        transport.slot_bytes,
        transport.lanes,
        shared=False,
        natives=frozenset(transport.collectives),
        reproducible=tuner.place.reproducible,
    )
    return Reached(transport, Tuner(place, device_table(name), tuner.rules, name), refused)


def _names(wanted: str | None, topology: Topology) -> Sequence[str]:
    if wanted is not None:
        return [wanted]
    return ["cuda_ipc", "nccl", "staged"] if len(topology.hosts) == 1 else ["nccl", "staged"]


def _first_of(
    names: Sequence[str], host: Transport, made: tuple[Any, Any], exchange: Exchange, sync: str, timeout: float
) -> tuple[str, DeviceTransport, tuple[str, ...]]:
    """The first that can be had, its name, and why others could not. All ranks come to the same."""
    refused: list[str] = []
    for name in names:
        try:
            with made[0].as_current():
                return name, _MAKERS[name](host, *made, exchange, sync, timeout), tuple(refused)
        except TransportError as error:
            refused.append(f"{name}: {error}")
    raise TransportError("; ".join(refused))


def _cuda_ipc(
    host: Transport, driver: Any, kernels: Any, exchange: Exchange, sync: str, timeout: float
) -> DeviceTransport:
    return CudaIpcTransport(host, driver, kernels, exchange, sync, timeout)


def _nccl(host: Transport, driver: Any, kernels: Any, exchange: Exchange, sync: str, timeout: float) -> DeviceTransport:
    return DeviceTransport(host, driver, kernels, nccl_wire(exchange, host.rank, host.size, driver), timeout)


def _staged(
    host: Transport, driver: Any, kernels: Any, exchange: Exchange, sync: str, timeout: float
) -> DeviceTransport:
    lock = threading.RLock()
    # An MPI that knows of devices is the host transport itself: see `reach_devices`.
    wire = StagedWire(host, lock, driver, direct=isinstance(host, MPITransport))
    return DeviceTransport(host, driver, kernels, wire, timeout, lock)


_MAKERS: dict[str, Callable[..., DeviceTransport]] = {"cuda_ipc": _cuda_ipc, "nccl": _nccl, "staged": _staged}
