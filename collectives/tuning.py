"""How a communicator comes by its tuner: the table on disk, or a calibration; and what it tells its users of it."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..algorithms import Collective, to_collective
from ..algorithms.words import to_bytes
from ..errors import AbcclError, ArgumentError
from ..transports import Transport
from ..transports.joint import JOINT, JointTransport
from ..transports.shm import ShmTransport
from ..transports.topology import Exchange, Topology
from .binding import Binder
from .tuner import store
from .tuner.calibrate import BUDGET, calibrate
from .tuner.candidates import Place
from .tuner.explanation import Explanation
from .tuner.rules import ENVIRONMENT as RULES
from .tuner.rules import Rule, from_environment, parse
from .tuner.stopwatch import Stopwatch
from .tuner.table import FAR, FORMAT, NEAR, Table, built_in
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
        what = to_collective(collective) if isinstance(collective, str) else collective
        return self.tuner.explain(what, to_size(nbytes), algorithm)


def to_size(nbytes: int | str) -> int:
    """A number of bytes, also as people write it: 64K, 25MB.

    Raises:
        ArgumentError: it is none.
    """
    if isinstance(nbytes, str):
        return to_bytes(nbytes)
    if nbytes < 0:
        raise ArgumentError(f"a vector can not have {nbytes} bytes")
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


def tuned(transport: Transport, topology: Topology, reproducible: bool, exchange: Exchange) -> Tuner:
    """The tuner of these ranks, with one table and one text of rules on all of them: rank 0's. Collective.

    The ranks calibrate if rank 0 finds no table: up to two seconds, once for such ranks on such a machine.

    Raises:
        ArgumentError: rank 0 can not use its rule file, or ABCCL_TUNER is not what is wanted.
    """
    place = place_of(transport, topology, reproducible)
    told = json.loads(exchange(json.dumps(_told(transport, place)).encode() if transport.rank == 0 else b"")[0])
    if "error" in told:
        raise ArgumentError(told["error"])
    # Hosts may have different numbers of cores, and all ranks must price alike.
    place = replace(place, cores=told["cores"])
    rules = parse(told["rules"], told["source"]) if told["rules"] else ()
    if told["table"] is not None:
        return Tuner(place, Table.from_json(told["table"]), rules, told["link"])
    link, table = _measured(transport, place, told["link"], exchange)
    return Tuner(place, table, rules, link)


def _measured(transport: Transport, place: Place, link: str, exchange: Exchange) -> tuple[str, Table]:
    """The link class of the ranks, and a table that was measured in it; rank 0 keeps it for others. Collective."""
    start = time.monotonic()
    with measuring(transport, place, link) as (stopwatch, everything), _progress(transport) as progress:
        while True:
            table = calibrate(stopwatch, everything, exchange, link, progress)
            local = local_part(transport)
            now = FAR if local is not None and local.probe_link() else NEAR
            settled, spent = now == link and table.residual < POOR, time.monotonic() - start
            # A hypervisor moves cores at any time, and others may use them: once more, as long as there is time.
            verdict = [now, settled, settled or spent > BUDGET / 2]
            now, settled, done = json.loads(exchange(json.dumps(verdict).encode())[0])
            if done:
                break
            link = now
    if transport.rank == 0 and now == link:
        store.save(key_of(place, link, carriers(transport)), table.to_json())
    return now, table


@contextmanager
def measuring(transport: Transport, place: Place, link: str) -> Iterator[tuple[Stopwatch, Place]]:
    """A stopwatch for these ranks, and the place with all candidates in it, those that are not reproducible too."""
    everything = replace(place, reproducible=False)
    yield Stopwatch(transport, Binder(transport, Tuner(everything, built_in(link))).bind), everything
    local = local_part(transport)
    if local is not None:
        local.native.number_from_here()


def carriers(transport: Transport) -> str:
    """What carries messages there, in words: "shm", "joint mpi"."""
    return f"{transport.name} {transport.network.name}" if isinstance(transport, JointTransport) else transport.name


def key_of(place: Place, link: str, transports: str) -> dict[str, Any]:
    """What a table is kept under: all that its constants depend on.

    Args:
        transports: as `carriers` names them.
    """
    return {
        "cpu": _cpu(),
        "cores": place.cores,
        "ranks": sorted(map(len, place.hosts)),
        "link": link,
        "transports": transports,
        "version": importlib.import_module(__package__.rpartition(".")[0]).__version__,
        "format": FORMAT,
    }


def _told(transport: Transport, place: Place) -> dict[str, Any]:
    """What rank 0 tells all others: its rules, and the table, or None if one must be measured."""
    link = link_of(transport)
    try:
        text, source = from_environment(), os.environ.get(RULES, "")
        parse(text, source)
        table = built_in(link) if not reads_tables() or local_part(transport) is None else None
        if table is None and (stored := store.load(key_of(place, link, carriers(transport)))) is not None:
            table = Table.from_json(stored)
    except AbcclError as error:
        return {"error": f"rank 0: {error}"}
    about = {"link": link, "cores": place.cores, "rules": text, "source": source}
    return {**about, "table": table and table.to_json()}


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
