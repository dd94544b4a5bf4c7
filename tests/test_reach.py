"""Which transport serves whom: on one host that pretends to be several, by processes that `spawn` starts."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import abccl
from abccl import ArgumentError, TransportError
from abccl.transports.topology import HOST, topology_of


def on_hosts(hosts: list[int]) -> tuple[str, str]:
    """What a rank sees; the ranks of a host bear its number."""
    rank = abccl.collectives.bootstrap.spawned.rank  # type: ignore[union-attr]
    os.environ[HOST] = str(hosts[rank])
    with abccl.init(timeout=60) as comm:
        x = np.full(1001, float(rank))
        comm.all_reduce(x)
        assert (x == sum(range(comm.size))).all()
        part = comm.split(rank % 2)
        assert part is not None
        with part:
            y = np.ones(3)
            part.all_reduce(y)
            assert (y == part.size).all()
            kind = part._transport.name
            part.barrier()
        comm.barrier()
        return f"{comm._transport.name} {[list(host.ranks) for host in comm.topology.hosts]}", kind


@pytest.mark.ranks
@pytest.mark.torch
@pytest.mark.parametrize(
    ("hosts", "found", "parts"),
    [
        ([0, 0], "shm [[0, 1]]", ["shm", "shm"]),
        ([0, 1], "joint [[0], [1]]", ["shm", "shm"]),
        ([0, 1, 0, 2], "joint [[0, 2], [1], [3]]", ["shm", "joint", "shm", "joint"]),
    ],
)
def test_ranks_that_share_a_host_use_its_memory(
    here: ModuleType, hosts: list[int], found: str, parts: list[str]
) -> None:
    results = abccl.spawn(here.on_hosts, len(hosts), (hosts,))
    assert results == [(found, part) for part in parts]


def different() -> str:
    rank = abccl.collectives.bootstrap.spawned.rank  # type: ignore[union-attr]
    try:
        abccl.init("shm" if rank else None)
    except TransportError as error:
        return str(error)
    return "no error"


@pytest.mark.ranks
def test_different_wishes_are_an_error_on_every_rank(here: ModuleType) -> None:
    first, second = abccl.spawn(here.different, 2)
    assert first == second
    assert first.startswith("rank 0 asks for the best and rank 1 asks for shm: all ranks must name the same transport")


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: abccl.init("nonsense"),
            ArgumentError,
            "transport='nonsense': no transport is called so: there are shm",
        ),
        (lambda: abccl.init("mpi"), TransportError, "mpi: MPI did not start these ranks"),
        (lambda: abccl.init(comm=5), ArgumentError, "comm must be an intra-communicator of mpi4py's"),
    ],
)
def test_what_can_not_be_is_said(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert text in str(raised.value)


def test_the_environment_names_a_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_TRANSPORT", "nonsense")
    with pytest.raises(ArgumentError, match="ABCCL_TRANSPORT='nonsense'"):
        abccl.init()
    with abccl.init("shm") as comm:
        assert comm._transport.name == "shm"


def test_a_topology_is_printed() -> None:
    text = str(topology_of([[0, 1, 2, 5], [3, 4]]))
    assert text.splitlines() == ["6 ranks on 2 hosts", "  host 0: ranks 0-2, 5", "  host 1: ranks 3-4"]
