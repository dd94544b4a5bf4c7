"""The candidates for a call, and what the model says of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...algorithms import Algorithm, Collective, algorithms, lookup, registry
from ...algorithms.cost import counts as measured_counts
from ...algorithms.groups import written
from ...algorithms.hierarchical import among
from ...algorithms.model import KINDS, Floats, Outline, Runs, Walk, seconds
from ...algorithms.plan import ALIGNMENT
from ...transports.shm import PROTOCOLS
from .choice import Choice
from .table import Table

RADICES = (2, 3, 4, 8)
"""Tried of algorithms that have a radix."""

OUTER = ("ring", "recursive_doubling", "direct")
"""Tried between the groups of hierarchical algorithms."""

CANONICAL = {
    Collective.ALL_REDUCE: ("direct", "two_shot"),
    Collective.REDUCE_SCATTER: ("direct",),
    Collective.REDUCE: ("direct",),
}
"""Algorithms that fold canonically, of as many ranks as one likes: all that reproducible communicators choose among."""

FORWARDING_FREE = ("direct", "pairwise")
"""The all_to_all algorithms that send every part straight to where it goes, so that a rank's own splits suffice."""

FORWARDING_FROM = 17
"""Ranks from which on an all_to_all may be forwarded: below, a rank may give splits where others do not."""

WALKED = 8
"""Up to so many ranks all of a schedule is walked; of 64 ranks that would take a quarter of a second for some."""


@dataclass(frozen=True)
class Place:
    """Where a communicator's ranks are, as far as a choice depends on it.

    Attributes:
        hosts: the ranks by host.
        cores: of a host, for its ranks; no more than the largest host has ranks.
        slot_bytes, lanes: the transport's.
        shared: whether ranks of a host share memory, so that protocols matter.
        natives: what the engine has of its own.
        reproducible: whether only canonical algorithms will do.
        protocol: the only one, where somebody has named it for all plans.
    """

    hosts: tuple[tuple[int, ...], ...]
    cores: int
    slot_bytes: int
    lanes: int
    shared: bool = True
    natives: frozenset[Collective] = frozenset()
    reproducible: bool = False
    protocol: str | None = None

    @property
    def size(self) -> int:
        """The number of ranks."""
        return sum(map(len, self.hosts))

    @property
    def cores_by_host(self) -> list[int]:
        """The same of every host."""
        return [self.cores] * len(self.hosts)


@dataclass(frozen=True)
class Candidate:
    """A choice and its time in seconds.

    Attributes:
        alpha, beta, gamma: the predicted parts: of messages, of bytes moved, of bytes folded.
        same: algorithms whose schedules are the same on so many ranks.
        measured: the time that was measured.
    """

    choice: Choice
    alpha: float
    beta: float
    gamma: float
    same: tuple[str, ...] = ()
    measured: float | None = None

    @property
    def predicted(self) -> float:
        """What the model says."""
        return self.alpha + self.beta + self.gamma

    @property
    def seconds(self) -> float:
        """What was measured, else what is predicted."""
        return self.predicted if self.measured is None else self.measured


def on_hosts(algorithm: Algorithm, hosts: Sequence[Sequence[int]]) -> Algorithm:
    """The algorithm among the groups of ranks that the hosts are, if it says nothing of groups."""
    return among(algorithm, lambda: written(hosts)) if len(hosts) > 1 else algorithm


Pricing = Walk | Outline


@lru_cache(1024)
def pricing(algorithm: Algorithm, place: Place) -> Pricing:
    """What prices the algorithm among these ranks."""
    in_place = algorithm.collective.cut
    if place.size <= WALKED:
        return Walk(algorithm, place.size, hosts=place.hosts, in_place=in_place)
    declared = algorithm.counts(place.size) if algorithm.counts else None
    steps = (declared or measured_counts(algorithm, place.size)).steps
    return Outline(algorithm, place.size, steps, place.hosts, in_place)


@lru_cache(256)
def schedules(collective: Collective, place: Place) -> tuple[tuple[Algorithm, tuple[str, ...]], ...]:
    """The library's algorithms for these ranks, and which others have the same schedule."""
    found: dict[object, tuple[Algorithm, list[str]]] = {}
    for algorithm in sorted(_variants(collective, place), key=_plainness):
        found.setdefault(_schedule(algorithm, place), (algorithm, []))[1].append(algorithm.name)
    return tuple((algorithm, tuple(names[1:])) for algorithm, names in found.values())


def _schedule(algorithm: Algorithm, place: Place) -> object:
    """What is equal for algorithms that do the same; beyond WALKED ranks each is taken to be one of its own."""
    priced = pricing(algorithm, place)
    events = tuple(priced.events) if isinstance(priced, Walk) else algorithm.name
    return algorithm.blocks(place.size), algorithm.largest(place.size), events


def _plainness(algorithm: Algorithm) -> tuple[bool, int, str]:
    """Of algorithms with one schedule the plainest one's name is shown, and it runs."""
    return algorithm.name not in FORWARDING_FREE, len(algorithm.parameters), algorithm.name


def _variants(collective: Collective, place: Place) -> Iterator[Algorithm]:
    """The algorithms that may be chosen, with the parameters that are tried."""
    size, hosts = place.size, place.hosts
    if place.reproducible and collective in CANONICAL:
        yield from (lookup(collective, name) for name in CANONICAL[collective])
        return
    forwards = size >= FORWARDING_FROM and len(hosts) == 1
    for name, declared in algorithms(collective).items():
        if not declared.function.__module__.startswith(_LIBRARY):
            continue
        if collective is Collective.ALL_TO_ALL and name not in FORWARDING_FREE and not forwards:
            continue
        variants = [declared]
        parameters = dict(declared.parameters)
        if is_composed(declared):
            continue
        if "radix" in parameters:
            variants += [declared.bind(radix=radix) for radix in RADICES if radix < size]
        if "levels" in parameters and len(hosts) == 1:
            continue  # the constants do not tell groups of a host apart
        if "levels" in parameters:
            known = [outer for outer in OUTER if outer in algorithms(collective)]
            variants = [on_hosts(declared, hosts), *(on_hosts(declared, hosts).bind(outer=o) for o in known)]
        for variant in dict.fromkeys(variants):
            if variant.refusal(size) is None and variant.largest(size) * ALIGNMENT <= place.slot_bytes:
                yield variant


_LIBRARY = Algorithm.__module__.rpartition(".")[0]


def _forget() -> None:
    schedules.cache_clear()
    pricing.cache_clear()


registry.on_redefinition.append(_forget)


def candidates(collective: Collective, nbytes: int, place: Place, table: Table) -> list[Candidate]:
    """All candidates for a call on a vector of so many bytes, priced."""
    found = _plain(collective, nbytes, place, table)
    for algorithm in _compositions(collective, nbytes, place, table):
        found += priced(algorithm, _choices(algorithm, nbytes, place), nbytes, place, table)
    return found


def priced(
    algorithm: Algorithm,
    choices: Sequence[Choice],
    nbytes: int,
    place: Place,
    table: Table,
    same: tuple[str, ...] = (),
) -> list[Candidate]:
    """Choices of one algorithm with their prices."""
    runs = runs_of(algorithm, [(nbytes, choice) for choice in choices], place, constants_of(choices, nbytes, table))
    counts = pricing(algorithm, place).counts(runs, place.cores_by_host)
    parts = [seconds(counts, runs.constants, names).tolist() for names in KINDS.values()]
    return [Candidate(choice, a, b, c, same) for choice, a, b, c in zip(choices, *parts, strict=True)]


def _plain(collective: Collective, nbytes: int, place: Place, table: Table) -> list[Candidate]:
    """Those that are no compositions."""
    found: list[Candidate] = []
    for algorithm, same in schedules(collective, place):
        found += priced(algorithm, _choices(algorithm, nbytes, place), nbytes, place, table, same)
    return found


def _compositions(collective: Collective, nbytes: int, place: Place, table: Table) -> Iterator[Algorithm]:
    """The collective as two others one after the other, each done by its fastest algorithm."""
    if place.reproducible or place.size > WALKED or len(place.hosts) > 1:
        return
    known = {_schedule(algorithm, place) for algorithm, _ in schedules(collective, place)}
    for declared in filter(is_composed, algorithms(collective).values()):
        best = {kind: _fastest(Collective(kind), nbytes, place, table) for kind in declared.declared}
        algorithm = declared.bind(**best)
        if algorithm.refusal(place.size) is None and algorithm.largest(place.size) * ALIGNMENT <= place.slot_bytes:
            schedule = _schedule(algorithm, place)
            if schedule not in known:
                yield algorithm
            known.add(schedule)


def _fastest(collective: Collective, nbytes: int, place: Place, table: Table) -> str:
    best = min(_plain(collective, nbytes, place, table), key=lambda candidate: candidate.predicted)
    return best.choice.algorithm_name


def is_composed(algorithm: Algorithm) -> bool:
    """Whether its parameters name an algorithm for each of the collectives that it is made of."""
    return bool(algorithm.declared) and set(algorithm.declared) <= {collective.value for collective in Collective}


def constants_of(choices: Sequence[Choice], nbytes: int, table: Table) -> Floats:
    """The constants for each choice, in columns."""
    at = {protocol: table.at(protocol, nbytes) for protocol in {choice.protocol or PROTOCOLS[0] for choice in choices}}
    return np.array([at[choice.protocol or PROTOCOLS[0]] for choice in choices]).T


def block_bytes(algorithm: Algorithm, nbytes: int, size: int) -> int:
    """The longest block of a vector of so many bytes."""
    blocks = algorithm.blocks(size) if algorithm.collective.cut else size
    block = -(-nbytes // blocks)
    aligned = algorithm.collective.cut and blocks > 1
    return min(nbytes, -(-block // ALIGNMENT) * ALIGNMENT) if aligned else block


def runs_of(algorithm: Algorithm, calls: Sequence[tuple[int, Choice]], place: Place, constants: Floats) -> Runs:
    """Calls on so many bytes as the model takes them, with the constants of each in columns."""
    rows = []
    for nbytes, choice in calls:
        block = block_bytes(algorithm, nbytes, place.size)
        longest = min(place.slot_bytes, choice.segment or place.slot_bytes) // algorithm.largest(place.size)
        number = max(1, -(-block // max(ALIGNMENT, longest // ALIGNMENT * ALIGNMENT)))
        lanes = min(choice.lanes or place.lanes, number)
        rows.append((block / number, number, lanes, (choice.protocol or "").startswith("lent")))
    blocks, segments, under_way, lent = np.array(rows, dtype=float).T
    return Runs(blocks, segments, under_way, lent, constants)


def native(collective: Collective, nbytes: int, place: Place, table: Table) -> list[Candidate]:
    """The engine's own collective, if there is one and it was measured."""
    took = table.native_seconds(collective.value, nbytes)
    if took is None or collective not in place.natives or place.reproducible:
        return []
    return [Candidate(Choice("native"), took, 0.0, 0.0, measured=took)]


def _choices(algorithm: Algorithm, nbytes: int, place: Place) -> list[Choice]:
    """The ways of running it that are tried."""
    largest, block = algorithm.largest(place.size), block_bytes(algorithm, nbytes, place.size)
    protocols: tuple[str | None, ...] = (None,)
    if place.shared and block * largest > INLINE:
        protocols = PROTOCOLS if block * largest >= LENT_FROM else PROTOCOLS[:2]
        if place.protocol is not None:
            protocols = (place.protocol,)
    whole = place.slot_bytes // largest
    # A longest message matters where some are longer.
    segments = [None, place.slot_bytes // 4] if block > whole // 4 >= ALIGNMENT else [None]
    found = []
    for protocol, segment in itertools.product(protocols, segments):
        several = block > (whole if segment is None else whole // 4)
        found += [Choice(algorithm, protocol, segment, lanes) for lanes in [None, *[1] * (several and place.lanes > 1)]]
    return found


INLINE, LENT_FROM = 304, 8192
"""Bytes of a message up to which it lies in its descriptor, and from which on it may be lent."""
