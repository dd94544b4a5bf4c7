"""Ranks on several hosts, as threads: each host's ranks share memory, and mailboxes in the process are the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from few_plans import few_plans

from abccl.transports import Transport, conformance
from abccl.transports.joint import joint_threads


def hosts_of(size: int) -> list[list[int]]:
    """Up to three ranks on a host, in turn, so that a host's ranks do not follow each other."""
    hosts = -(-size // 3) if size != 2 else 1
    return [list(range(host, size, hosts)) for host in range(hosts)]


def apart(size: int) -> list[list[int]]:
    """Each rank on a host of its own."""
    return [[rank] for rank in range(size)]


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

    few_plans(check, (2, 4, 5) if layout is hosts_of else (1, 3))(make)
