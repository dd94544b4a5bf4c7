"""Groups of processes on one device: how they meet, and the transport among them.

A process started by `abccl.spawn` makes a `World`, which gives each check of the conformance suite a group of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpu.device import make_driver, make_kernels

from abccl.collectives.bootstrap import find
from abccl.errors import AbcclError, TransportError
from abccl.transports import USER_TAGS, Transport
from abccl.transports.conformance import Group
from abccl.transports.cuda_ipc import CudaIpcTransport
from abccl.transports.shm import ShmTransport

PATIENCE = 60.0

Exchange = Callable[[bytes], list[bytes]]


def cuda_ipc(rank: int, size: int, exchange: Exchange, driver: Any, kernels: Any, timeout: float = PATIENCE) -> Any:
    """The transport of ranks that share a host."""
    host = ShmTransport(rank, size, exchange)
    try:
        return CudaIpcTransport(host, driver, kernels, exchange, timeout=timeout)
    except BaseException:
        host.close()
        raise


def exchange_among(transport: Transport, members: Sequence[int], patience: float = PATIENCE) -> Exchange:
    """An all-gather of small blobs among some ranks of a transport, by its messages."""
    peers = [member for member in members if member != transport.rank]

    def swap(mine: bytes, theirs: dict[int, bytearray]) -> None:
        sends = [transport.post_send(peer, USER_TAGS, memoryview(mine)) for peer in peers]
        receives = [transport.post_recv(peer, USER_TAGS, memoryview(theirs[peer])) for peer in peers]
        transport.wait([*sends, *receives], time.monotonic() + patience)

    def exchange(blob: bytes) -> list[bytes]:
        lengths = {peer: bytearray(8) for peer in peers}
        swap(len(blob).to_bytes(8, "little"), lengths)
        blobs = {peer: bytearray(int.from_bytes(length, "little")) for peer, length in lengths.items()}
        swap(blob, blobs)
        return [blob if member == transport.rank else bytes(blobs[member]) for member in members]

    return exchange


class World:
    """All processes, each with the device's driver."""

    def __init__(self) -> None:
        bootstrap = find()
        self.rank, self.size, self.exchange = bootstrap.rank, bootstrap.size, bootstrap.exchange
        self.all = ShmTransport(self.rank, self.size, self.exchange)
        self.driver = make_driver()
        self.kernels = make_kernels(self.driver)

    @contextlib.contextmanager
    def make(self, size: int) -> Iterator[Group]:
        """A group of the first ranks, for the conformance suite."""
        own, problem = None, ""
        if self.rank < size:
            try:
                among = exchange_among(self.all, range(size))
                own = cuda_ipc(self.rank, size, among, self.driver, self.kernels)
            except AbcclError as error:
                problem = f"rank {self.rank}: {type(error).__name__}: {error}"
        # Or a process that has no rank of it would go on by itself.
        problems = [blob.decode() for blob in self.exchange(problem.encode()) if blob]
        try:
            if problems:
                raise TransportError("; ".join(problems))
            yield Group([own if rank == self.rank else None for rank in range(size)], self.exchange)
        finally:
            if own is not None:
                own.close()

    def close(self) -> None:
        """Give all back."""
        self.driver.close_all()
        self.all.close()
