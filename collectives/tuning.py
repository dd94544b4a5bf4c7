"""How a communicator comes by its tuner: the table on disk, or a calibration; and what it tells its users of it."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..algorithms import Collective, to_collective
from ..algorithms.words import to_bytes
from ..errors import ArgumentError
from ..transports import Transport
from ..transports.joint import JOINT, JointTransport
from ..transports.shm import ShmTransport
from ..transports.topology import Exchange, Topology
from .binding import Binder
from .tuner import store
from .tuner.agreement import from_rank_0
from .tuner.calibrate import BUDGET, calibrate
from .tuner.candidates import Place
from .tuner.explanation import Explanation
from .tuner.rules import ENVIRONMENT as RULES
from .tuner.rules import Rule, from_environment, parse
from .tuner.stopwatch import Stopwatch
from .tuner.table import FAR, FORMAT, NEAR, Table, built_in, table_of
from .tuner.tuner import AlgorithmLike, Tuner

ENVIRONMENT = "ABCCL_TUNER"
"""What a communicator knows of its ranks: "auto", what was measured on this machine, now if it never was; "built-in",
what the library brings, and nothing is measured or read."""


POOR = 0.3
"""The median error of a fit from which on it is tried again: something else used the machine."""


class TunerCalls:
    """What a communicator tells of its choices."""

    _binder: Binder

    @property
    def tuner(self) -> Tuner:
        """Who chooses algorithms here: `tuner.report()` compares its predictions with what calls took."""
        return self._binder.tuner

    def explain(
        self, collective: Collective | str, nbytes: int | str, *, algorithm: AlgorithmLike = None
    ) -> Explanation:
        """Every candidate for a call with its predicted time, and why one was chosen. Print it. Not collective.

        Args:
            collective: what is called: "all_reduce".
            nbytes: bytes of the whole vector (the concatenation, for what gathers or scatters), also as "25MB".
            algorithm: as one would pass it to the call.

        Raises:
            ArgumentError: there is no such collective, or it is no size.
        """
        return explained(self.tuner, collective, nbytes, algorithm)


def explained(
    tuner: Tuner, collective: Collective | str, nbytes: int | str, algorithm: AlgorithmLike = None
) -> Explanation:
    """What a tuner says of a call: see `TunerCalls.explain`."""
    what = collective if isinstance(collective, Collective) else to_collective(f"{collective}")
    return tuner.explain(what, to_size(nbytes), algorithm)


def to_size(nbytes: int | str) -> int:
    """A number of bytes, also as people write it: 64K, 25MB.

    Raises:
        ArgumentError: it is none.
    """
    if isinstance(nbytes, str):
        return to_bytes(nbytes) if nbytes.strip() != "0" else 0
    if isinstance(nbytes, bool) or not isinstance(nbytes, (int, np.integer)) or nbytes < 0:
        raise ArgumentError(f"a vector has a whole number of bytes, and {nbytes!r} is none")
    return int(nbytes)


def place_of(transport: Transport, topology: Topology, reproducible: bool) -> Place:
    """Where a transport's ranks are."""
    local = local_part(transport)
    # Over a network only, every rank is a host of its own, whatever it shares with others.
    alone = isinstance(transport, JointTransport) and transport.name != JOINT
    hosts = tuple((rank,) for rank in range(transport.size)) if alone else topology.groups
    largest = max(map(len, hosts))
    return Place(
        hosts,
        min(largest, local.cores if local else os.cpu_count() or 1),
        transport.slot_bytes,
        transport.lanes,
        local is not None and largest > 1,
        frozenset(transport.collectives),
        reproducible,
        local.protocol if local else None,
    )


def local_part(transport: Transport) -> ShmTransport | None:
    """What reaches the ranks of this host."""
    if isinstance(transport, JointTransport):
        return transport.local
    return transport if isinstance(transport, ShmTransport) else None


def built_in_tuner(transport: Transport, topology: Topology, reproducible: bool) -> Tuner:
    """A tuner that knows what the library brings, and this process's rules."""
    link = link_of(transport)
    return Tuner(place_of(transport, topology, reproducible), built_in(link), own_rules(), link)


def own_rules() -> tuple[Rule, ...]:
    """The rules of the file that this process's environment names.

    Raises:
        ArgumentError: it can not be read, or is not as it should be.
    """
    text = from_environment()
    return parse(text, os.environ.get(RULES, "")) if text else ()


def reads_tables() -> bool:
    """Whether the environment leaves it to the tuner to measure and to read what was measured.

    Raises:
        ArgumentError: it says neither auto nor built-in.
    """
    wanted = os.environ.get(ENVIRONMENT) or "auto"
    if wanted not in ("auto", "built-in"):
        raise ArgumentError(f"{ENVIRONMENT} must be auto or built-in, and is {wanted!r}")
    return wanted == "auto"


def tuned(
    transport: Transport, topology: Topology, reproducible: bool, exchange: Exchange, part: bool = False
) -> Tuner:
    """The tuner of these ranks, with one table and one text of rules on all of them: rank 0's. Collective.

    The ranks calibrate if rank 0 finds no table: up to two seconds, once for such ranks on such a machine.

    Args:
        exchange: an all-gather of blobs among the ranks.
        part: whether other ranks of the same job may be at work beside these, which then share their cores and caches:
            such groups have tables of their own.

    Raises:
        ArgumentError: rank 0 can not use its rule file, or ABCCL_TUNER is not what is wanted.
    """
    place = place_of(transport, topology, reproducible)
    told = from_rank_0(transport.rank, exchange, lambda: _told(transport, place, part))
    # Hosts may have different numbers of cores, and all ranks must price alike.
    place = replace(place, cores=told["cores"], protocol=told["protocol"])
    rules = parse(told["rules"], told["source"]) if told["rules"] else ()
    if told["table"] is not None:
        return Tuner(place, table_of(json.dumps(told["table"])), rules, told["link"], told["how"])
    link, table, how = _measured(transport, place, told["link"], exchange, part)
    return Tuner(place, table, rules, link, how)


def _measured(transport: Transport, place: Place, link: str, exchange: Exchange, part: bool) -> tuple[str, Table, str]:
    """The link class of the ranks, a table that was measured in it, and how; rank 0 keeps it for others. Collective."""
    start = time.monotonic()
    with measuring(transport, place, link) as (stopwatch, everything), _progress(transport) as progress:
        left = BUDGET
        while True:
            table = calibrate(stopwatch, everything, exchange, link, progress, left)
            now = link_now(transport, exchange)
            spent = time.monotonic() - start
            left = BUDGET - float(from_rank_0(transport.rank, exchange, partial(float, spent)))
            # A hypervisor moves cores at any time, and others may use them: once more, as long as there is time. Ranks
            # that share cores, and networks, are never met well.
            good = table.residual < POOR or len(place.hosts) > 1 or place.size > place.cores
            if (now == link and good) or left < BUDGET / 2:
                break
            link = now
    how = f"measured now, in {spent:.1f} s: there was no table of such ranks"
    if now != link or not good:
        return now, table, f"{how}; not kept, as something else used the machine or its cores moved"
    file = store.save(key_of(place, link, carriers(transport), part), table.to_json()) if transport.rank == 0 else None
    return now, table, f"{how}; kept in {file}" if file else how


@contextmanager
def measuring(transport: Transport, place: Place, link: str) -> Iterator[tuple[Stopwatch, Place]]:
    """A stopwatch for these ranks, and the place with all candidates in it, those that are not reproducible too."""
    everything, local = replace(place, reproducible=False, protocol=None), local_part(transport)
    forced = local.protocol if local else None
    if local is not None:
        local.set_protocol(None)
    try:
        binder = Binder(transport, Tuner(everything, built_in(link)), transport.recorder)
        yield Stopwatch(transport, binder.bind), everything
    finally:
        if local is not None:
            local.set_protocol(forced)
            local.native.number_from_here()
        transport.runs = 0


def carriers(transport: Transport) -> str:
    """What carries messages there, in words: "shm", "joint mpi"."""
    return f"{transport.name} {transport.network.name}" if isinstance(transport, JointTransport) else transport.name


def key_of(place: Place, link: str, transports: str, part: bool = False) -> dict[str, Any]:
    """What a table is kept under: all that its constants depend on.

    Args:
        transports: as `carriers` names them.
        part: whether others of the same job are at work beside these ranks.
    """
    return {
        "cpu": _cpu(),
        "cores": place.cores,
        "ranks": sorted(map(len, place.hosts)),
        "link": link,
        "transports": transports,
        "version": importlib.import_module(__package__.rpartition(".")[0]).__version__,
        "format": FORMAT,
    } | ({"part": True} if part else {})


def _told(transport: Transport, place: Place, part: bool) -> dict[str, Any]:
    """What rank 0 tells all others: its rules, and the table, or None if one must be measured."""
    link = link_of(transport)
    text, source = from_environment(), os.environ.get(RULES, "")
    parse(text, source)
    table: Table | None = built_in(link)
    if not reads_tables():
        how = f"built-in: {ENVIRONMENT} asks for it"
    elif local_part(transport) is None:
        how = "built-in: ranks that are threads of a process are not measured"
    else:
        key = key_of(place, link, carriers(transport), part)
        table = kept_table(key)
        how = f"kept in {store.path(key)}" if table else ""
    about = {"link": link, "cores": place.cores, "protocol": place.protocol, "rules": text, "source": source}
    return {**about, "table": table and table.to_json(), "how": how}


def kept_table(key: dict[str, Any]) -> Table | None:
    """The table that is kept under this key; None, with a warning, if what is kept is none."""
    stored = store.load(key)
    try:
        return None if stored is None else Table.from_json(stored)
    except ArgumentError as error:
        warnings.warn(f"{store.path(key)}: {error}. It is passed over.", RuntimeWarning, stacklevel=2)
        return None


def link_now(transport: Transport, exchange: Exchange) -> str:
    """The class of the links on rank 0's host, measured anew: a hypervisor moves cores at any time. Collective."""
    local = local_part(transport)
    now = FAR if local is not None and local.probe_link() else NEAR
    return str(from_rank_0(transport.rank, exchange, lambda: now))


def link_of(transport: Transport) -> str:
    """The class of the links on this host, "near" or "far"."""
    local = local_part(transport)
    return FAR if local is not None and local.far else NEAR


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "?"
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU implementer")))
    return next(named, "?")


@contextmanager
def _progress(transport: Transport) -> Iterator[Any]:
    """Tells an interactive user what is going on, and for how long it took."""
    if transport.rank != 0 or not sys.stderr.isatty():
        yield lambda doing: None
        return
    start = time.monotonic()

    def say(doing: str) -> None:
        print(
            f"\r\033[Kabccl: measuring these {transport.size} ranks, once: {doing}", end="", file=sys.stderr, flush=True
        )

    yield say
    print(f"\r\033[Kabccl: measured these {transport.size} ranks in {time.monotonic() - start:.1f} s", file=sys.stderr)
