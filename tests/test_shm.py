"""The shared-memory transport: the conformance suite, what it leaves behind, and how it refuses to connect."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from abccl.errors import TransportError
from abccl.transports import conformance
from abccl.transports.shm import ShmTransport, shm_threads, slot_bytes


@contextmanager
def make(size: int) -> Iterator[Sequence[ShmTransport]]:
    transports = shm_threads(size)
    yield transports
    for transport in transports:
        transport.close()


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[..., None]) -> None:
    check(make)


def test_the_arenas_of_eight_ranks_fit_eight_mebibytes() -> None:
    with make(8) as transports:
        assert transports[0].geometry.bytes <= 8 << 20
    assert [slot_bytes(size) for size in (2, 4, 8, 64)] == [128 << 10, 64 << 10, 32 << 10, 8 << 10]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The shared memory objects that this process has given a name, and that are there still."""
    draw, drawn = secrets.token_hex, set[str]()

    def noted(nbytes: int) -> str:
        drawn.add(f"abccl-{(token := draw(nbytes))}")
        return token

    monkeypatch.setattr(secrets, "token_hex", noted)
    return lambda: [name for name in os.listdir("/dev/shm") if name in drawn]


def test_nothing_is_left_behind(named: Callable[[], list[str]]) -> None:
    def open_files() -> set[str]:
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return {f"{link} {os.readlink(link)}" for link in links if os.path.islink(link)}

    with make(2):
        pass
    before = open_files()
    for _ in range(3):
        with make(3):
            pass
    assert not [name for name in open_files() - before if "abccl" in name]
    assert not named()


def lonely(change: Callable[[dict[str, object]], None]) -> Callable[[bytes], list[bytes]]:
    """An exchange between rank 0 and a made-up rank 1 whose card is rank 0's, changed."""

    def exchange(data: bytes) -> list[bytes]:
        if not data.startswith(b"{"):
            return [data, b'["", true]']
        card = json.loads(data)
        change(card)
        return [data, json.dumps(card).encode()]

    return exchange


def test_ranks_of_different_hosts_are_refused() -> None:
    with pytest.raises(TransportError, match="rank 0 and rank 1 are on different hosts"):
        ShmTransport(0, 2, lonely(lambda card: card.update(host="elsewhere")))


def test_memory_that_is_not_the_peers_is_refused() -> None:
    with pytest.raises(TransportError, match="not that of rank 1"):
        ShmTransport(0, 2, lonely(lambda card: card.update(token=1)))


def test_named_memory_where_the_process_entry_can_not_be_opened(
    monkeypatch: pytest.MonkeyPatch, named: Callable[[], list[str]]
) -> None:
    """Peers that may not open each other's process entry meet through /dev/shm, which is empty again afterwards."""
    from abccl.transports import _native, shm

    class Region:
        create, create_named = _native.Region.create, _native.Region.create_named
        attach_named = _native.Region.attach_named

        @staticmethod
        def attach(*arguments: object) -> None:
            raise TransportError("not allowed")

    class Native:
        Geometry, Plan, Communicator = _native.Geometry, _native.Plan, _native.Communicator

    Native.Region = Region  # type: ignore[attr-defined]
    monkeypatch.setattr(shm, "_native", Native)
    with make(3) as transports:
        assert not named()
        works = [transports[r].post_send((r + 1) % 3, 300, memoryview(bytes([r]) * 5000)) for r in range(3)]
        buffers = [bytearray(5000) for _ in range(3)]
        works += [transports[r].post_recv((r + 2) % 3, 300, memoryview(buffers[r])) for r in range(3)]
        for _ in range(1000):
            for transport in transports:
                transport.progress()
        assert all(work.done for work in works)
        assert buffers == [bytes([(r + 2) % 3]) * 5000 for r in range(3)]
