"""Which transport serves whom: on one host that pretends to be several, by processes that `spawn` starts."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import abccl
from abccl import ArgumentError, TransportError
from abccl.transports import _native, topology
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
        pytest.param(
            lambda: abccl.init(comm=5),
            ArgumentError,
            "comm must be an intra-communicator of mpi4py's",
            marks=pytest.mark.mpi,
        ),
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


def test_ranks_are_grouped_by_what_their_cores_share() -> None:
    assert topology._cores("0-3,8") == {0, 1, 2, 3, 8}
    assert topology._only({1, 2}, [{0}, {1, 2, 3}]) == "1"
    assert topology._only({0, 1}, [{0}, {1, 2, 3}]) == ""
    cards = [{"name": name, "place": ["0", cache]} for name, cache in (("a", "0"), ("a", "4"), ("b", "0"), ("a", "0"))]
    hosts = topology._hosts([[0, 1, 3], [2]], cards)
    assert [host.domains for host in hosts] == [((0, 3), (1,)), ((2,),)]
    text = str(topology.Topology(tuple(hosts)))
    assert "a: ranks 0-1, 3; of one cache or NUMA node: ranks 0, 3 | rank 1" in text


def test_hosts_of_one_name_are_told_apart() -> None:
    cards = [{"name": "same", "place": ["", ""]}] * 3
    assert [host.name for host in topology._hosts([[0], [1, 2]], cards)] == ["same (1)", "same (2)"]


def test_memory_without_names_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nameless:
        """Like the core's, where no memory can be given a name."""

        create = staticmethod(_native.Region.create)
        attach = staticmethod(_native.Region.attach)

        @staticmethod
        def create_named(size: int, name: str) -> Any:
            raise TransportError("shm_open: read-only file system")

    monkeypatch.setattr(topology._native, "Region", Nameless)
    found = topology.find_topology(0, 1, lambda blob: [blob])
    assert found.groups == ((0,),) and not found.named


def test_a_wish_for_native_is_passed_over_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_ALGORITHM", "native")
    with abccl.init("shm") as comm:
        comm.barrier()
        with pytest.raises(TransportError, match="shm has no collectives of its own"):
            comm.barrier(algorithm="native")
