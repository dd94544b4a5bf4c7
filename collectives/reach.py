"""How ranks reach each other: which transport serves them, by where they are and how they were started."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from ..errors import AbcclError, Aborted, ArgumentError, TransportError
from ..transports import Transport
from ..transports.asking_bulletin import AskingBulletin
from ..transports.bulletin import Bulletin, Own
from ..transports.joint import JOINT, JointTransport, joint_order, joint_slot_bytes
from ..transports.shm import ShmTransport
from ..transports.store_bulletin import StoreBulletin, innermost
from ..transports.topology import Exchange, Topology, find_topology
from .bootstrap import Bootstrap

ENVIRONMENT = "ABCCL_TRANSPORT"
"""Names a transport for communicators whose maker names none. The same on all ranks."""

TRANSPORTS = {
    "shm": "shared memory, one host",
    "mpi": "MPI's messages, for ranks that mpirun started",
    "gloo": "Gloo's messages, for ranks that share a store of torch's, as under torchrun",
}


def wanted_transport(asked: str | None) -> str | None:
    """The transport asked for, by the caller or by the environment; None if neither does.

    Raises:
        ArgumentError: there is none of that name.
    """
    source, name = ("transport", asked) if asked is not None else (ENVIRONMENT, os.environ.get(ENVIRONMENT) or None)
    if name is not None and name not in TRANSPORTS:
        known = ", ".join(f"{one} ({what})" for one, what in TRANSPORTS.items())
        raise ArgumentError(f"{source}={name!r}: no transport is called so: there are {known}")
    return name


def reach(bootstrap: Bootstrap, wanted: str | None) -> tuple[Transport, Topology]:
    """A transport to all ranks, and where they are. Collective.

    Without a wish: shared memory if all can attach to each other; else shared memory on each host, and between hosts
    the network that the ranks were started with.

    Raises:
        TransportError: the ranks can not reach each other so, or ask for different transports.
    """
    rank, size = bootstrap.rank, bootstrap.size
    _check_agreed(bootstrap.exchange((wanted or "").encode()))
    topology = find_topology(rank, size, bootstrap.exchange)
    by_network = wanted in ("mpi", "gloo")
    if not by_network and (wanted == "shm" or len(topology.hosts) == 1):
        return ShmTransport(rank, size, bootstrap.exchange), topology
    members = (rank,) if by_network else topology.host_of(rank).ranks
    largest_host = 1 if by_network else max(map(len, topology.groups))
    network = bootstrap.network(wanted)
    exchange = _among(members, bootstrap.exchange)
    names = joint_order(members, size)
    slot = joint_slot_bytes(largest_host, network)
    carrier: Any = None
    joint: JointTransport | None = None  # which has closed the others when it closes
    try:
        carrier = _carrier(network)
        local = ShmTransport(members.index(rank), len(members), exchange, names, named=topology.named, slot=slot)
        joint = JointTransport(local, members, network, network.name if by_network else JOINT)
        joint.bulletin = _bulletin(carrier, local, rank, topology)
        # Of all hosts: who reads the records of several knows what belongs together.
        joint.token = int.from_bytes(bootstrap.exchange(joint.token.to_bytes(8, "little"))[0], "little")
    except BaseException as error:
        network.abort(error if isinstance(error, AbcclError) else Aborted(f"rank {rank} of {size} gave up: {error!r}"))
        (joint or network).close()
        if isinstance(carrier, Transport):
            carrier.close()
        raise
    return joint, topology


def _carrier(network: Transport) -> Any:
    """What a bulletin is made on: a store of torch's, or a transport for it alone; None if neither is. Collective."""
    store = getattr(network, "store", None)
    if store is None:
        return network.split(range(network.size), "bulletin")
    # A FileStore grows with each value that is written into it.
    return store if type(innermost(store)).__name__ == "TCPStore" else None


def _bulletin(carrier: Any, local: ShmTransport, rank: int, topology: Topology) -> Bulletin | None:
    hosts = {member: host.name for host in topology.hosts for member in host.ranks}
    native = local.native
    names = [hosts[member] for member in range(len(hosts))]
    if carrier is None:
        return None
    own = Own(rank, len(hosts), names, native.position, native.status_words, native.note)
    if isinstance(carrier, Transport):
        return AskingBulletin(carrier, own)
    prefix = importlib.import_module("torch.distributed").PrefixStore
    return StoreBulletin(prefix("bulletin", carrier), own)


def _check_agreed(wishes: Sequence[bytes]) -> None:
    other = next((rank for rank, wish in enumerate(wishes) if wish != wishes[0]), None)
    if other is not None:
        said = [f"rank {rank} asks for {wishes[rank].decode() or 'the best'}" for rank in (0, other)]
        raise TransportError(
            f"{' and '.join(said)}: all ranks must name the same transport, in abccl.init or by {ENVIRONMENT}"
        )


def _among(members: Sequence[int], exchange: Exchange) -> Exchange:
    """The exchange of some of the ranks, while all others exchange as often."""

    def exchange_among(data: bytes) -> list[bytes]:
        everyone = exchange(data)
        return [everyone[member] for member in members]

    return exchange_among
