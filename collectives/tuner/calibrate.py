"""Calibration: the model's constants, measured among the communicator's own ranks, all of them active.

The ranks run a few collectives that differ in what they are made of, over vectors from some bytes to some megabytes.
The constants are those that explain their times best: the walk (`algorithms/model.py`) says by which counts a run's
time is made up, least squares say what each of them costs, and as the critical path depends on that, both are repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import numpy as np

from ...algorithms import Collective, lookup
from ...transports.shm import PROTOCOLS, ShmTransport
from ...transports.topology import Exchange
from .agreement import from_rank_0
from .candidates import LENT_FROM, Place, block_bytes, on_hosts
from .choice import Choice
from .fit import BYTES, LATENCIES, NETWORK, Sample, constants_at, fit, merged
from .stopwatch import Stopwatch
from .table import Table, built_in

BUDGET = 2.0
"""Seconds that a calibration may take."""

SIZES = (8, 2 << 10, 16 << 10, 96 << 10, 512 << 10, 3 << 20, 16 << 20)
"""Bytes of the vectors on one host; each above the first has constants per byte of its own."""

ACROSS_SIZES = (8, 256 << 10, 32 << 10, 1 << 20, 4 << 20)
"""The same for several hosts, what matters most first: as many as there is time for."""

MEMORY = 512 << 20
"""Bytes of the vectors of all ranks of a host together, at most."""

ROUNDS = 3

SHARE = 0.2
"""Of the budget, what the vectors of one size may take where it is for the number of calls to say."""

# Exchanges and one-way traffic, with folds and without, in one step and in two: so that constants can be told apart.
_ON_A_HOST = (
    (Collective.ALL_GATHER, "direct"),
    (Collective.ALL_TO_ALL, "direct"),
    (Collective.BROADCAST, "direct"),
    (Collective.REDUCE_SCATTER, "direct"),
    (Collective.ALL_REDUCE, "direct"),
    (Collective.ALL_REDUCE, "two_shot"),
    (Collective.ALL_REDUCE, "tree"),
)
_ACROSS_HOSTS = (
    (Collective.ALL_GATHER, "ring"),
    (Collective.ALL_TO_ALL, "direct"),
    (Collective.BROADCAST, "tree"),
    (Collective.ALL_REDUCE, "recursive_doubling"),
    (Collective.ALL_REDUCE, "hierarchical"),
    (Collective.ALL_REDUCE, "hierarchical_leaders"),
)
_NATIVE = (
    Collective.ALL_REDUCE,
    Collective.REDUCE_SCATTER,
    Collective.ALL_GATHER,
    Collective.BROADCAST,
    Collective.ALL_TO_ALL,
)


def calibrate(
    stopwatch: Stopwatch,
    place: Place,
    exchange: Exchange,
    link: str,
    progress: Callable[[str], None] = lambda _: None,
    budget: float = BUDGET,
) -> Table:
    """Measure and fit. Collective; some hundred milliseconds, `budget` seconds at most. The same table on all ranks.

    Args:
        exchange: an all-gather of blobs among the ranks.
        progress: told what is being done.
        budget: in more seconds there are more rounds.
    """
    more = max(1, round(budget / BUDGET))
    start = time.perf_counter()
    samples: list[Sample] = []
    natives: dict[str, list[tuple[int, float]]] = {}
    # A network connects ranks when they first talk to each other; the second time tells what a call takes.
    first = stopwatch.subject(Collective.ALL_TO_ALL, 8, Choice(lookup(Collective.ALL_TO_ALL, "direct")))
    stopwatch.seconds(first, 1)
    mine = json.dumps([time.perf_counter() - start, stopwatch.seconds(first, 4)]).encode()
    spent, call = map(max, zip(*(json.loads(blob) for blob in exchange(mine))))
    last, before = 0.0, 1
    several = len(place.hosts) > 1
    short = 256 << 10 if several else 16 << 10
    for nbytes in ACROSS_SIZES if several else SIZES:
        # What was measured says what more bytes will take; short vectors take as long as the shortest.
        expected = last * max(nbytes, short) / max(before, short)
        if nbytes * max(map(len, place.hosts)) > MEMORY or (last and spent + expected > 0.75 * budget):
            break
        progress(f"{nbytes} bytes")
        calls = list(_calls(nbytes, place))
        calls += [(one, Choice("native")) for one in _NATIVE if one in place.natives]
        # Where ranks share cores a call of some bytes may take as long as one of a megabyte elsewhere.
        most = max(1, int(SHARE * budget / (call * ROUNDS * more * len(calls))))
        times = [_time(stopwatch, collective, nbytes, choice, more, most) for collective, choice in calls]
        mine = json.dumps([time.perf_counter() - start, times]).encode()
        everyone = [json.loads(blob) for blob in exchange(mine)]
        for index, (collective, choice) in enumerate(calls):
            took = median(max(rounds) for rounds in zip(*(theirs[1][index] for theirs in everyone)))
            if choice.algorithm == "native":
                natives.setdefault(collective.value, []).append((nbytes, took))
            else:
                samples.append(Sample(nbytes, choice, took))
        elapsed = max(theirs[0] for theirs in everyone)
        call = median(sample.seconds for sample in samples[-len(calls) :])
        last, spent, before = elapsed - spent, elapsed, nbytes
    progress("fitting")
    rank = stopwatch.transport.rank
    return Table.from_json(from_rank_0(rank, exchange, lambda: _fitted(samples, natives, place, link, start).to_json()))


def _calls(nbytes: int, place: Place) -> Iterator[tuple[Collective, Choice]]:
    several = len(place.hosts) > 1
    for collective, name in _ACROSS_HOSTS if several else _ON_A_HOST:
        algorithm = on_hosts(lookup(collective, name), place.hosts)
        if several:
            yield collective, Choice(algorithm)
            continue
        lends = block_bytes(algorithm, nbytes, place.size) >= LENT_FROM
        for protocol in PROTOCOLS if lends else PROTOCOLS[:2]:
            yield collective, Choice(algorithm, protocol)
        if collective is Collective.ALL_GATHER and nbytes > place.slot_bytes // 4:
            yield collective, Choice(algorithm, PROTOCOLS[0], place.slot_bytes // 4, 1)


def _time(
    stopwatch: Stopwatch, collective: Collective, nbytes: int, choice: Choice, more: int = 1, most: int = 50
) -> list[float]:
    """This rank's seconds for a call, a number for each round, of at most so many calls each."""
    subject = stopwatch.subject(collective, nbytes, choice)
    calls, rounds = max(1, min(50, most, (128 << 10) // nbytes)), ROUNDS if nbytes < 8 << 20 else 2
    if isinstance(stopwatch.transport, ShmTransport):
        stopwatch.seconds(subject, 1 + calls // 4)
    else:
        calls, rounds = min(2, calls), 2
    return [stopwatch.seconds(subject, calls) for _ in range(more * rounds)]


def _fitted(
    samples: Sequence[Sample], natives: dict[str, list[tuple[int, float]]], place: Place, link: str, start: float
) -> Table:
    before, several = built_in(link), len(place.hosts) > 1
    sizes = sorted({sample.nbytes for sample in samples})
    # What no byte costs is found with short vectors, and then known for all.
    short = sizes[:1] if several else sizes[:2]
    known = constants_at(before, short[-1])
    first = [sample for sample in samples if sample.nbytes in short]
    known, errors = fit(first, place, known, NETWORK if several else (*LATENCIES, *BYTES))
    found, every = [(short[-1], known)], [errors]
    for nbytes in sizes[len(short) :]:
        thought = constants_at(before, nbytes)
        for name, ways in NETWORK[:2] if several else LATENCIES:
            thought[list(ways), name] = known[list(ways), name]
        there = [sample for sample in samples if sample.nbytes == nbytes]
        constants, errors = fit(there, place, thought, NETWORK[2:] if several else BYTES)
        found.append((nbytes, constants))
        every.append(errors)
    took = time.perf_counter() - start
    origin = f"measured on {time.strftime('%Y-%m-%d %H:%M')} in {took:.1f} s"
    residual = float(np.median(np.abs(np.concatenate(every))))
    measured_natives = {name: tuple(sorted(points)) for name, points in natives.items()}
    return Table(origin, tuple(n for n, _ in found), merged(found), residual, measured_natives)
