"""How ranks of the gloo transport meet: by which address each is reached, and who did not come."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

from ..errors import DeadlineExceeded, TransportError


def meet(store: Any, rank: int, size: int, timeout: float) -> str:
    """Wait for all ranks; returns this rank's address, empty if only its host name tells.

    Raises:
        DeadlineExceeded: ranks did not come; the message names them.
        TransportError: the store can not be reached.
    """
    own = address_towards(host_of(store))
    keys = [f"address/{each}" for each in range(size)]
    try:
        store.set(keys[rank], own)
        try:
            store.wait(keys, timedelta(seconds=timeout))
        except RuntimeError as error:
            missing = [each for each, key in enumerate(keys) if not store.check([key])]
            if missing:
                raise DeadlineExceeded(
                    f"gloo: rank {rank} of {size} waited {timeout:g} s in vain for ranks {missing}: are they alive, "
                    f"and do they make the same transport?"
                ) from error
        everyone = [bytes(store.get(key)).decode() for key in keys]
    except RuntimeError as error:
        raise TransportError(
            f"gloo: rank {rank} of {size} lost the store it meets its peers by ({reason(error)}): "
            f"is the process that keeps it still running?"
        ) from error
    # The host of the store may know itself by a loopback address, by which others do not reach it.
    if _is_loopback(own):
        own = next((address_towards(other) for other in everyone if other and not _is_loopback(other)), own)
    return own


def device(kind: Any, address: str) -> Any:
    """What ProcessGroupGloo (`kind`) listens on: GLOO_SOCKET_IFNAME, else the address, else the host name's."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        return kind.create_device(interface=interface, lazy_init=False)
    if address:
        return kind.create_device(hostname=address, lazy_init=False)
    return kind.create_default_device(lazy_init=False)


def host_of(store: Any) -> str:
    """The host of the store's server; of one in this process's memory this host; empty if there is none."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return "127.0.0.1" if type(store).__name__ == "HashStore" else str(getattr(store, "host", ""))


def address_towards(host: str) -> str:
    """The address of this host from which another is reached; empty if there is no way. Nothing is sent."""
    if not host:
        return ""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def reason(error: BaseException) -> str:
    """An error of Gloo's or of a store's in one line, without the place in the source and the advice."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text.rpartition("] ")[2].partition(". This is typically")[0]


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
