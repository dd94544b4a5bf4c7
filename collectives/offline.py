"""A tuner without its ranks: what a communicator of so many would choose, by the tables that are kept here."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..algorithms.words import count
from ..errors import ArgumentError
from ..transports import Transport
from ..transports.joint import JOINT, joint_slot_bytes
from ..transports.shm import LANES, PROTOCOL, ShmTransport, slot_bytes
from .reach import ENVIRONMENT as TRANSPORT
from .reach import wanted_transport
from .reproducible import is_reproducible
from .tuner import store
from .tuner.candidates import Place
from .tuner.table import LINKS, NEAR, Table, built_in
from .tuner.tuner import Tuner
from .tuning import key_of, own_rules, reads_tables

_MOST = 1 << 20
"""Ranks of a table that anybody has measured."""


@dataclass(frozen=True)
class _Known:
    """A table that is kept, where it holds, and since when."""

    table: Table
    place: Place
    link: str
    since: float


def offline_tuner(ranks: int, hosts: int = 1, link: str | None = None, file: Path | None = None) -> Tuner:
    """The tuner that a communicator of so many ranks would have if it were made here, with this environment.

    Its table is the newest that was measured among such ranks on this machine, else the built-in one; the table's
    origin says which, and how to measure.

    Args:
        hosts: on which the ranks are, in equal blocks; the first have one more where they do not come out even.
        link: only tables of this class of links, "near" or "far".
        file: a table's file, from any machine, instead of those kept here.

    Raises:
        ArgumentError: the ranks can not be so; the file is no table; the rule file or the environment is wrong.
    """
    sizes = _blocks(ranks, hosts)
    if file is not None:
        known = [_kept(*_read(file), sizes)]
    else:
        known = [one for place, name in _places(sizes) for one in _tables(place, name, link or "")]
    if known:
        newest = max(known, key=lambda one: one.since)
        return Tuner(newest.place, newest.table, own_rules(), newest.link)
    place, _ = _places(sizes)[0]
    table = built_in(link or NEAR)
    return Tuner(place, replace(table, origin=_nothing(place, link)), own_rules(), link or NEAR)


def layout_of(file: Path) -> tuple[int, int]:
    """Among how many ranks on how many hosts a table's file was measured.

    Raises:
        ArgumentError: the file is no table.
    """
    key, _ = _read(file)
    sizes = key["ranks"]
    return sum(sizes), len(sizes)


def _read(file: Path) -> tuple[dict[str, Any], Table]:
    """What a table's file was measured with, and the table.

    Raises:
        ArgumentError: the file is no table.
    """
    key, content = store.read(file)
    try:
        sizes, cores = key["ranks"], key["cores"]
        if not all(isinstance(key[name], str) and key[name].strip() for name in ("transports", "link")):
            raise ArgumentError("transports and link must be words")
        if not (isinstance(sizes, list) and sizes and all(map(_is_count, [*sizes, cores])) and sum(sizes) <= _MOST):
            raise ArgumentError("ranks of each host, and cores, must be numbers from 1 up")
        return key, Table.from_json(content)
    except KeyError as error:
        raise ArgumentError(f"{file} is no table of the tuner: its key lacks {error}") from None
    except ArgumentError as error:
        raise ArgumentError(f"{file}: {error}") from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _blocks(ranks: int, hosts: int) -> list[int]:
    """How many ranks each host has."""
    if ranks < 1 or not 1 <= hosts <= ranks:
        raise ArgumentError(f"{count(ranks, 'rank')} on {count(hosts, 'host')}: a host has one rank at least")
    return [ranks // hosts + (host < ranks % hosts) for host in range(hosts)]


def _places(sizes: Sequence[int]) -> list[tuple[Place, str]]:
    """Where such ranks would be on hosts like this one, and what would carry between them: all that is possible."""
    wanted = wanted_transport(None)
    if wanted == ShmTransport.name and len(sizes) > 1:
        raise ArgumentError(f"{TRANSPORT}=shm serves one host, and these are {len(sizes)}: unset it")
    if wanted in (None, ShmTransport.name) and len(sizes) == 1:
        return [(_place(sizes, ShmTransport.name), ShmTransport.name)]
    if wanted is None:
        return [(_place(sizes, name), name) for name in (f"{JOINT} mpi", f"{JOINT} gloo")]
    name = f"{wanted} {wanted}"
    return [(_place([1] * sum(sizes), name), name)]


def _place(sizes: Sequence[int], transports: str, cores: int | None = None) -> Place:
    starts = list(itertools.accumulate(sizes, initial=0))
    hosts = tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes))
    largest = max(sizes)
    network = _network(transports)
    return Place(
        hosts,
        cores or min(largest, len(os.sched_getaffinity(0))),
        joint_slot_bytes(largest, network) if network else slot_bytes(largest),
        LANES,
        largest > 1,
        network.collectives if network else frozenset(),
        is_reproducible(None),
        os.environ.get(PROTOCOL) or None,
    )


def _network(transports: str) -> type[Transport] | None:
    """What carries between hosts."""
    if transports.endswith(" mpi"):
        from ..transports.mpi import MPITransport

        return MPITransport
    if transports.endswith(" gloo"):
        from ..transports.gloo import GlooTransport

        return GlooTransport
    return None


def _tables(place: Place, transports: str, link: str) -> list[_Known]:
    """What is kept of such ranks."""
    found = []
    for one in [link] if link else LINKS:
        key = key_of(place, one, transports)
        if reads_tables() and (content := store.load(key)) is not None:
            with contextlib.suppress(OSError):  # it has just been removed
                found.append(_Known(Table.from_json(content), place, one, store.path(key).stat().st_mtime))
    return found


def _kept(key: Mapping[str, Any], table: Table, sizes: Sequence[int]) -> _Known:
    """A table of some machine, for ranks on such hosts as it was measured on."""
    name = str(key["transports"])
    alone = name.split()[0] == name.split()[-1] != ShmTransport.name
    return _Known(table, _place([1] * sum(sizes) if alone else sizes, name, key["cores"]), str(key["link"]), 0.0)


def _nothing(place: Place, link: str | None) -> str:
    """Why it is the built-in table, and what to do about it."""
    if place.size == 1:
        return "built in; one rank has nothing to choose"
    if not reads_tables():
        return "built in, as ABCCL_TUNER says"
    where = f"{count(place.size, 'rank')} on {count(len(place.hosts), 'host')}" + (f", {link} cores" if link else "")
    command = f"abccl tune --ranks {place.size}"
    if len(place.hosts) > 1:
        command = f"mpirun -n {place.size} abccl tune"
    network = " (assumed between hosts: TCP on 10 Gbit/s)" if len(place.hosts) > 1 else ""
    return f"built in{network}; nothing was measured here for {where}: run `{command}`"
