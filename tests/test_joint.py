"""Ranks on several hosts, as threads: each host's ranks share memory, and mailboxes in the process are the network."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from abccl.transports import Transport, conformance, inproc
from abccl.transports.joint import JointTransport, joint_order
from abccl.transports.shm import ShmTransport


def hosts_of(size: int) -> list[list[int]]:
    """Up to three ranks on a host, in turn, so that a host's ranks do not follow each other."""
    hosts = -(-size // 3) if size != 2 else 1
    return [list(range(host, size, hosts)) for host in range(hosts)]


def apart(size: int) -> list[list[int]]:
    """Each rank on a host of its own."""
    return [[rank] for rank in range(size)]


def joint_threads(hosts: Sequence[Sequence[int]]) -> list[JointTransport]:
    """The transports of a new group of ranks on these hosts."""
    size = sum(map(len, hosts))
    networks = inproc(size)
    barriers = {tuple(host): threading.Barrier(len(host)) for host in hosts}
    blobs = [b""] * size

    def make(rank: int) -> JointTransport:
        members = next(host for host in hosts if rank in host)
        barrier = barriers[tuple(members)]

        def exchange(data: bytes) -> list[bytes]:
            blobs[rank] = data
            barrier.wait(60)
            everyone = [blobs[member] for member in members]
            barrier.wait(60)
            return everyone

        names = joint_order(members, size)
        local = ShmTransport(members.index(rank), len(members), exchange, names)
        return JointTransport(local, members, networks[rank])

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(make, range(size)))


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("layout", [hosts_of, apart])
def test_conformance(check, layout) -> None:  # type: ignore[no-untyped-def]
    @contextmanager
    def make(size: int) -> Iterator[Sequence[Transport]]:
        transports = joint_threads(layout(size))
        try:
            yield transports
        finally:
            for transport in transports:
                transport.close()

    check(make)
