"""Which ranks share a host: found by trying to attach to each other's memory.

Ranks in different containers or network namespaces, or of different users, are apart, however near they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from glob import glob
from typing import Any

from ..errors import AbcclError
from . import _native

Exchange = Callable[[bytes], list[bytes]]
"""An all-gather of small blobs among the ranks, in rank order."""

HOST = "ABCCL_HOST"
"""A name for the host of this process: ranks with different ones are apart. To try several hosts on one."""

_NAME = re.compile(r"/abccl-[0-9a-f]{16}")

_TOKEN = ctypes.c_uint64


@dataclass(frozen=True)
class Host:
    """Ranks that share memory.

    Attributes:
        name: the host's.
        ranks: ascending.
        domains: the same ranks by the NUMA node, and in it the last-level cache, that all their cores belong to: one
            domain if no such thing parts them.
    """

    name: str
    ranks: tuple[int, ...]
    domains: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Topology:
    """Where the ranks are. Print it.

    Attributes:
        hosts: ordered by their lowest rank.
        named: whether some attach only to memory that has a name.
    """

    hosts: tuple[Host, ...]
    named: bool = False

    def host_of(self, rank: int) -> Host:
        """The host of a rank."""
        return next(host for host in self.hosts if rank in host.ranks)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks by host."""
        return tuple(host.ranks for host in self.hosts)

    def __str__(self) -> str:
        size = sum(len(host.ranks) for host in self.hosts)
        lines = [f"{_count(size, 'rank')} on {_count(len(self.hosts), 'host')}"]
        for host in self.hosts:
            lines.append(f"  {host.name}: {_ranks(host.ranks)}")
            if len(host.domains) > 1:
                lines[-1] += "; of one cache or NUMA node: " + " | ".join(map(_ranks, host.domains))
        return "\n".join(lines)


def topology_of(hosts: Iterable[Iterable[int]]) -> Topology:
    """Ranks that are known to be on these hosts, of which nothing else is known."""
    return Topology(tuple(Host(f"host {n}", (r := tuple(ranks)), (r,)) for n, ranks in enumerate(hosts)))


def find_topology(rank: int, size: int, exchange: Exchange) -> Topology:
    """Find out where the ranks are. Collective; two exchanges, four where process entries can not be opened."""
    card = {
        "host": host_identity(),
        "name": os.environ.get(HOST) or socket.gethostname(),
        "place": _place(),
        "pid": os.getpid(),
    }
    cards, met = _meet(False, card, exchange)
    named = not _all_met(cards, met)
    if named:
        again = _meet(True, card, exchange)[1]
        met = [one | other for one, other in zip(met, again, strict=True)]
    groups: list[list[int]] = []
    for one in range(size):
        for group in groups:
            if all(other in met[one] and one in met[other] for other in group):
                group.append(one)
                break
        else:
            groups.append([one])
    return Topology(tuple(_hosts(groups, cards)), named and any(len(group) > 1 for group in groups))


def _meet(named: bool, card: dict[str, Any], exchange: Exchange) -> tuple[list[dict[str, Any]], list[set[int]]]:
    """All ranks' cards, and whose pages each has found. Collective; two exchanges.

    Nothing with a name is left behind by a rank that dies meanwhile, as long as one other lives.
    """
    with contextlib.ExitStack() as regions:
        trial = None
        with contextlib.suppress(AbcclError):  # /dev/shm may be read-only, full, or not there
            trial = _Trial(named)
            regions.callback(trial.region.unlink_name)
        cards = [json.loads(blob) for blob in exchange(json.dumps(card | {"trial": trial and trial.card}).encode())]
        found = [peer for peer, theirs in enumerate(cards) if _attaches(card, theirs)]
        try:
            everyone = [set(json.loads(blob)) for blob in exchange(json.dumps(found).encode())]
        except BaseException:
            _unlink_all(cards)  # a rank that has died can not do it
            raise
    return cards, everyone


def _all_met(cards: Sequence[dict[str, Any]], met: Sequence[set[int]]) -> bool:
    """Whether all that seem to be on one host have found each other."""
    hosts: dict[str, set[int]] = {}
    for rank, card in enumerate(cards):
        hosts.setdefault(card["host"], set()).add(rank)
    return all(hosts[card["host"]] <= found for card, found in zip(cards, met, strict=True))


def _unlink_all(cards: Sequence[dict[str, Any]]) -> None:
    for name in (card["trial"]["name"] for card in cards if card["trial"]):
        if isinstance(name, str) and _NAME.fullmatch(name):  # others' words: no way out of the folder
            with contextlib.suppress(OSError):
                os.unlink(f"/dev/shm{name}")


def host_identity() -> str:
    """What must be equal for two processes to be on one host: kernel, network and process namespaces, user.

    Processes of different network namespaces can open each other's memory, and still are different hosts to all that
    talks over a network.
    """

    def namespace(name: str) -> str:
        try:
            return os.readlink(f"/proc/self/ns/{name}")
        except OSError:
            return "?"

    parts: Sequence[str] = (
        _read("/proc/sys/kernel/random/boot_id"),
        namespace("net"),
        namespace("pid"),
        namespace("user"),
        str(os.getuid()),
        os.environ.get(HOST, ""),
    )
    return " ".join(parts)


class _Trial:
    """A page with a random number in it, for peers to find."""

    def __init__(self, named: bool) -> None:
        name = f"/abccl-{secrets.token_hex(8)}"
        size = os.sysconf("SC_PAGE_SIZE")
        self.region = _native.Region.create_named(size, name) if named else _native.Region.create(size)
        token = secrets.randbits(63)
        _TOKEN.from_address(self.region.address).value = token
        self.card = {"bytes": size, "fd": self.region.fd, "name": name if named else "", "token": token}


def _attaches(own: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether this process finds the other's page."""
    trial = theirs["trial"]
    if own["host"] != theirs["host"] or trial is None:
        return False
    try:
        region = (
            _native.Region.attach_named(trial["name"], trial["bytes"])
            if trial["name"]
            else _native.Region.attach(theirs["pid"], trial["fd"], trial["bytes"])
        )
    except AbcclError:
        return False
    return bool(_TOKEN.from_address(region.address).value == trial["token"])


def _place() -> list[str]:
    """The NUMA node and the last-level cache that all cores of this process belong to; "" where there is none such."""
    cores = os.sched_getaffinity(0)
    nodes = [_cores(_read(f"{path}/cpulist")) for path in glob("/sys/devices/system/node/node[0-9]*")]
    caches = []
    for core in cores:
        indices = sorted(glob(f"/sys/devices/system/cpu/cpu{core}/cache/index[0-9]*"))
        caches += [_cores(_read(f"{indices[-1]}/shared_cpu_list"))] if indices else []
    return [_only(cores, nodes), _only(cores, caches)]


def _only(cores: set[int], domains: Iterable[set[int]]) -> str:
    return next((f"{min(domain)}" for domain in domains if cores <= domain), "")


def _cores(text: str) -> set[int]:
    """The numbers of a list such as 0-3,8."""
    found: set[int] = set()
    for word in filter(str.strip, text.split(",")):
        first, dash, last = word.partition("-")
        with contextlib.suppress(ValueError):
            found.update(range(int(first), int(last if dash else first) + 1))
    return found


def _hosts(groups: Sequence[Sequence[int]], cards: Sequence[dict[str, Any]]) -> list[Host]:
    names = [cards[group[0]]["name"] for group in groups]
    hosts = []
    for index, group in enumerate(groups):
        twin = f" ({names[:index].count(names[index]) + 1})" if names.count(names[index]) > 1 else ""
        domains: dict[tuple[str, ...], list[int]] = {}
        for rank in group:
            domains.setdefault(tuple(cards[rank]["place"]), []).append(rank)
        hosts.append(Host(names[index] + twin, tuple(group), tuple(map(tuple, domains.values()))))
    return hosts


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "?"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _ranks(ranks: Sequence[int]) -> str:
    """Ranks with runs shortened: 0-3, 8."""
    words: list[str] = []
    start = 0
    for end in range(1, len(ranks) + 1):
        if end == len(ranks) or ranks[end] != ranks[end - 1] + 1:
            words.append(f"{ranks[start]}" + f"-{ranks[end - 1]}" * (end - 1 > start))
            start = end
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(words)}"
