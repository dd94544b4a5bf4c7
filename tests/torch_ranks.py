"""Runs checks on the ranks of a torch.distributed world: all checks of a file in one start of processes.

Starting processes and making worlds takes seconds. So a file of tests has a dictionary of checks, which all run in one
process of each rank, over each backend that is asked for, and its tests look at what a check returned or raised. Not
named test_: pytest does not collect it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import pytest

import abccl

torch = pytest.importorskip("torch")
dist = torch.distributed

LIMIT = timedelta(seconds=60)
"""How long a collective of a check may wait, over either backend."""

START = 150
"""How long all checks of a start may take, in seconds: many times what they take on an idle machine."""

PRELOADED = ["torch._dynamo", *(f"torch.distributed.{name}" for name in ("checkpoint", "fsdp", "pipelining", "tensor"))]
"""What takes seconds to import: once, in the process that all ranks are forked from."""

MARKS = [pytest.mark.torch, pytest.mark.timeout(START + 20)]


class Checks(dict[str, Callable[[], Any]]):
    """Functions without arguments, by their names."""

    def add(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A decorator."""
        self[function.__name__] = function
        return function


# ---- on the ranks


class Groups:
    """The groups that all checks share: the world's, and one of Gloo beside it."""

    world: Any = None
    gloo: Any = None


def here() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def a_group(seconds: float = 2.0, ranks: list[int] | None = None) -> Any:
    return dist.new_group(ranks, backend="abccl", timeout=timedelta(seconds=seconds))


@contextmanager
def raises(kind: type[BaseException], words: str = "") -> Iterator[None]:
    """Like pytest.raises, and the error is one that torch's users expect."""
    with pytest.raises(kind, match=words) as caught:
        yield
    assert isinstance(caught.value, RuntimeError), type(caught.value).__mro__


@dataclass(frozen=True)
class Raised:
    """What a check ended with that did not return."""

    text: str


def rank_main(file: str, worlds: tuple[tuple[str, str], ...], folder: str) -> dict[str, dict[str, Any]]:
    """One rank: what every check came to over every backend."""
    from abccl.collectives.torch.register import register

    register()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for backend, checks in worlds:
        with _world(backend, f"{folder}/{backend}"):
            own: Checks = getattr(importlib.import_module(file), checks)
            found[backend] = {name: _outcome(function) for name, function in own.items()}
    return found


@contextmanager
def _world(backend: str, path: str) -> Iterator[None]:
    from abccl.collectives.bootstrap import spawned

    assert spawned is not None
    store = dist.FileStore(path, spawned.size)
    dist.init_process_group(backend, store=store, rank=spawned.rank, world_size=spawned.size, timeout=LIMIT)
    Groups.world, Groups.gloo = dist.group.WORLD, dist.new_group(backend="gloo", timeout=LIMIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except BaseException:
        return Raised(traceback.format_exc())


# ---- in the tests


def outcomes(file: str, ranks: int, **checks: str) -> Any:
    """What each rank's checks came to, by backend and name.

    Args:
        checks: the backends of the worlds, one after the other, and for each the dictionary of the file that has its
            checks.
    """
    found = _start(file, ranks, tuple(checks.items()))
    if isinstance(found, Exception):
        raise found
    return found


@cache
def _start(file: str, ranks: int, worlds: tuple[tuple[str, str], ...]) -> Any:
    """An error is kept, or each test would start them all again."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (file, worlds, folder)
            found = abccl.spawn(rank_main, ranks, arguments, timeout=START, start_method="forkserver")
    except abccl.AbcclError as error:
        return error
    return {
        backend: {check: [rank[backend][check] for rank in found] for check in checks}
        for backend, checks in found[0].items()
    }


def returned(values: list[Any]) -> list[Any]:
    """The values of all ranks; fails if one of them raised. A check that broke the world breaks those after it."""
    failed = [f"rank {rank}:\n{value.text}" for rank, value in enumerate(values) if isinstance(value, Raised)]
    assert not failed, "\n".join(failed)
    return values


def assert_passes(file: str, name: str, ranks: int) -> None:
    """A check of a file whose CHECKS run over abccl must return on all ranks; it wants two."""
    if ranks < 2:
        pytest.skip("wants two ranks")
    returned(outcomes(file, ranks, abccl="CHECKS")["abccl"][name])
