"""The nccl transport on the one GPU: with one rank, and with two where the installed NCCL lets them share it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fake_nccl import connect
from gpu.device import FAKE
from gpu.groups import PATIENCE, World, exchange_among

import abccl
from abccl.errors import TransportError
from abccl.transports import conformance
from abccl.transports.device import DeviceTransport
from abccl.transports.nccl import nccl_wire
from abccl.transports.nccl_meeting import SHARE, SHARING, find_nccl
from abccl.transports.shm import ShmTransport

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.ranks,
    pytest.mark.skipif(FAKE, reason="NCCL needs a GPU"),
]

PLANS = (conformance.check_plans, conformance.check_native)
OF_TWO = (conformance.check_progress, conformance.check_mismatch)


class NcclWorld(World):
    """All processes, each a rank of NCCL's."""

    @contextmanager
    def make(self, size: int) -> Iterator[conformance.Group]:
        own = None
        if self.rank < size:
            among = exchange_among(self.all, range(size))
            host = ShmTransport(self.rank, size, among)
            wire = nccl_wire(among, self.rank, size, self.driver, timeout=PATIENCE)
            own = DeviceTransport(host, self.driver, self.kernels, wire)
            connect(own)
        try:
            yield conformance.Group([own if rank == self.rank else None for rank in range(size)], self.exchange)
        finally:
            if own is not None:
                own.close()


def conform() -> dict[str, str]:
    """What went wrong in each check that so many ranks can make."""
    world, found = NcclWorld(), {}
    for check in PLANS + OF_TWO * (world.size > 1):
        try:
            check(world.make, PATIENCE, *([range(1, world.size + 1)] if check in PLANS else []))
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc()
    world.close()
    return found


def refusal() -> str:
    """Why two ranks get no wire on one GPU."""
    world = World()
    try:
        nccl_wire(world.exchange, world.rank, world.size, world.driver, timeout=PATIENCE).close()
        return ""
    except TransportError as error:
        return str(error)
    finally:
        world.close()


@pytest.fixture(scope="module")
def version() -> int:
    """NCCL's."""
    try:
        return int(find_nccl().get_version())
    except TransportError as error:
        pytest.skip(str(error))


def test_one_rank(version: int) -> None:
    for check, problem in abccl.spawn(conform, 1, timeout=300)[0].items():
        assert not problem, f"{check}: {problem}"


def test_two_ranks(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if version < SHARING:
        pytest.skip(f"NCCL {version} lets no two ranks share a GPU: nvidia-nccl-cu13 2.30 or newer does")
    monkeypatch.setenv(SHARE, "1")
    for check, problem in abccl.spawn(conform, 2, timeout=500)[0].items():
        assert not problem, f"{check}: {problem}"


def test_two_ranks_are_refused_unless_asked_for(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARE, raising=False)
    for said in abccl.spawn(refusal, 2, timeout=120):
        assert "ranks 0 and 1 share a GPU" in said, said
