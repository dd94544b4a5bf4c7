"""A store of torch's for ranks that have none, on any number of hosts: rank 0 serves it and says where."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

from ..errors import TransportError

PATIENCE = 3.0
"""Seconds that an address has to answer."""

TIMEOUT = 300.0
"""Seconds that a rank waits for what another writes into the store."""

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def make_store(rank: int, exchange: Callable[[bytes], list[bytes]]) -> Any:
    """A TCPStore that all ranks share. All call it; rank 0 must live as long as the others need it.

    Args:
        exchange: an all-gather of small blobs among the ranks.

    Raises:
        TransportError: there is no torch, or no address of rank 0 answers here.
    """
    try:
        distributed = importlib.import_module("torch.distributed")
    except ImportError as error:
        if rank == 0:
            exchange(json.dumps([0, []]).encode())  # the others must not wait
        raise TransportError("gloo: it is torch's, and torch can not be imported: pip install torch") from error
    timeout = timedelta(seconds=TIMEOUT)
    if rank == 0:
        store = distributed.TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
        exchange(json.dumps([store.port, addresses()]).encode())
        return store
    port, known = json.loads(exchange(b"")[0])
    return distributed.TCPStore(first_that_answers(known, port), port, None, False, timeout)


def addresses(environment: Mapping[str, str] = os.environ) -> list[str]:
    """This host's IPv4 addresses: those of GLOO_SOCKET_IFNAME first, then those that others may reach."""
    preferred = environment.get("GLOO_SOCKET_IFNAME", "").split(",")
    found = {name: address for _, name in socket.if_nameindex() if (address := _address(name))}
    ordered = sorted(found, key=lambda name: (name not in preferred, found[name].startswith("127.")))
    return [found[name] for name in ordered]


def _address(interface: str) -> str:
    """The interface's IPv4 address; "" if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control, contextlib.suppress(OSError):
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(control.fileno(), _GET_ADDRESS, request)[20:24])
    return ""


def first_that_answers(known: Iterable[str], port: int) -> str:
    """The first of the addresses where somebody listens on the port.

    Raises:
        TransportError: none does.
    """
    tried = []
    for address in known:
        try:
            socket.create_connection((address, port), PATIENCE).close()
        except OSError as error:
            tried.append(f"{address}: {error.strerror or error}")
        else:
            return address
    raise TransportError(
        f"no address of rank 0's host answers here on port {port} ({'; '.join(tried) or 'it has none'}): name the "
        f"interface that all hosts share by GLOO_SOCKET_IFNAME, and open its ports"
    )
