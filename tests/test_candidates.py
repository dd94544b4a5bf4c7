"""The candidates: all that the tuner may choose can be bound and run, wherever the ranks are, and none comes twice."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from abccl import Communicator
from abccl.algorithms import Algorithm, Collective, canonical, lookup
from abccl.algorithms.model import NAMES
from abccl.algorithms.plan import Sizes, bind, cut, exchange, lower, parts
from abccl.collectives.tuner.candidates import (
    FORWARDING_FREE,
    Candidate,
    Place,
    candidates,
    on_hosts,
    priced,
    schedules,
)
from abccl.collectives.tuner.choice import Choice
from abccl.collectives.tuner.table import built_in
from abccl.transports.shm import PROTOCOLS, shm_threads, slot_bytes

C = Collective
FIVE = (C.ALL_REDUCE, C.REDUCE_SCATTER, C.ALL_GATHER, C.BROADCAST, C.ALL_TO_ALL)
TABLE = built_in("near")


def place(*hosts: int, reproducible: bool = False) -> Place:
    """So many ranks on each host."""
    starts = np.cumsum([0, *hosts]).tolist()
    ranks = tuple(tuple(range(start, start + here)) for start, here in zip(starts, hosts))
    return Place(ranks, min(2, max(hosts)), slot_bytes(max(hosts)), 4, max(hosts) > 1, reproducible=reproducible)


PLACES = [
    place(*hosts)
    for hosts in (
        *((size,) for size in (1, 2, 3, 5, 8, 17, 64)),
        *((size - size // 2, size // 2) for size in (2, 3, 5, 8, 17, 64)),
        *((size - size // 2 - 1, size // 2, 1) for size in (3, 5, 8, 17, 64)),
    )
]
at_each_place = pytest.mark.parametrize("where", PLACES, ids=lambda where: "+".join(map(str, map(len, where.hosts))))


def sizes_of(collective: Collective, rank: int, size: int, elements: int, blocks: int, itemsize: int) -> Sizes:
    if collective.cut:
        return cut(elements, blocks, itemsize)
    each = [elements // size] * size
    return exchange(rank, each, each) if collective is C.ALL_TO_ALL else parts(collective, rank, each)


def assert_priced(one: Candidate, collective: Collective, nbytes: int, where: Place) -> None:
    prices = np.array([one.alpha, one.beta, one.gamma])
    assert np.isfinite(prices).all()
    assert one.predicted == one.alpha + one.beta + one.gamma > 0
    assert (one.measured, one.seconds) == (None, one.predicted)
    assert collective.reduces or one.gamma == 0
    if len(where.hosts) == 1:
        assert (prices >= 0).all()
        assert nbytes or one.beta == one.gamma == 0


# ---- all places


@at_each_place
@pytest.mark.parametrize("collective", Collective, ids=lambda c: c.value)
def test_every_candidate_can_be_priced_and_bound(collective: Collective, where: Place) -> None:
    """For the widest elements, on the first, the middle and the last rank."""
    skeletons: dict[tuple[Algorithm, int], Any] = {}
    for nbytes in (0, 100_000, 64 << 20):
        found = candidates(collective, nbytes, where, TABLE)
        assert found
        for one in found:
            assert_priced(one, collective, nbytes, where)
            choice = one.choice
            assert isinstance(choice.algorithm, Algorithm)
            a = choice.algorithm
            assert a.refusal(where.size) is None
            for rank in {0, where.size // 2, where.size - 1} if where.size <= 8 else {where.size // 2}:
                skeleton = skeletons.get((a, rank)) or lower(a, rank, where.size)
                skeletons[a, rank] = skeleton
                plan = bind(
                    skeleton,
                    sizes_of(collective, rank, where.size, nbytes // 16, a.blocks(where.size), 16),
                    16,
                    slot_bytes=where.slot_bytes,
                    lanes=choice.lanes or where.lanes,
                    segment_bytes=choice.segment,
                    protocol=choice.protocol,
                )
                assert plan.segment * 16 * skeleton.largest <= min(where.slot_bytes, choice.segment or where.slot_bytes)


@at_each_place
def test_an_exchange_is_not_forwarded_where_ranks_may_give_splits(where: Place) -> None:
    for nbytes in (8, 100_000):
        names = {one.choice.algorithm_name for one in candidates(C.ALL_TO_ALL, nbytes, where, TABLE)}
        if where.size < 17 or len(where.hosts) > 1:
            assert names <= set(FORWARDING_FREE)
        else:
            assert names > set(FORWARDING_FREE)


@at_each_place
@pytest.mark.parametrize("collective", [C.ALL_REDUCE, C.REDUCE_SCATTER, C.REDUCE], ids=lambda c: c.value)
def test_reproducible_ranks_choose_among_what_folds_canonically(collective: Collective, where: Place) -> None:
    strict = place(*map(len, where.hosts), reproducible=True)
    for nbytes in (8, 1 << 20):
        found = {one.choice.algorithm for one in candidates(collective, nbytes, strict, TABLE)}
        assert found
        if where.size <= 8:
            assert all(isinstance(a, Algorithm) and canonical(a, where.size) for a in found)


@at_each_place
def test_hierarchies_follow_the_hosts(where: Place) -> None:
    found = [one.choice.algorithm for one in candidates(C.ALL_REDUCE, 1 << 16, where, TABLE)]
    levels = {
        dict(a.parameters)["levels"] for a in found if isinstance(a, Algorithm) and "levels" in dict(a.parameters)
    }
    if where.size > len(where.hosts) > 1:
        assert levels == {dict(on_hosts(lookup(C.ALL_REDUCE, "hierarchical"), where.hosts).parameters)["levels"]}
    elif levels:  # no other algorithm has the same schedule
        assert levels == {lookup(C.ALL_REDUCE, "hierarchical").declared["levels"].default}


@pytest.mark.parametrize("where", [one for one in PLACES if one.size <= 8], ids=lambda one: str(one.hosts))
@pytest.mark.parametrize("collective", FIVE, ids=lambda c: c.value)
def test_one_schedule_comes_once(collective: Collective, where: Place) -> None:
    for nbytes in (1000, 1 << 20):
        found = candidates(collective, nbytes, where, TABLE)
        assert len({one.choice for one in found}) == len(found)
        algorithms = {one.choice.algorithm for one in found}
        programs = set()
        for a in algorithms:
            assert isinstance(a, Algorithm)
            steps = tuple(tuple(a.program(rank, where.size)) for rank in range(where.size))
            programs.add((a.blocks(where.size), a.largest(where.size), steps))
        assert len(programs) == len(algorithms)


def test_the_plainest_name_stands_for_one_schedule() -> None:
    known = {a.name: same for a, same in schedules(C.ALL_REDUCE, place(2))}
    assert "recursive_doubling" in known["direct"]
    assert {name for names in known.values() for name in names}.isdisjoint(known)
    assert not any(same for _, same in schedules(C.ALL_REDUCE, place(64)))


@pytest.mark.parametrize(
    ("where", "nbytes", "there"),
    [(place(4), 1 << 20, True), (place(2, 2), 1 << 20, False), (place(17), 1 << 20, False)],
)
def test_compositions(where: Place, nbytes: int, there: bool) -> None:
    """Of the best of each part, on one host, where their schedule is no other candidate's."""
    found = candidates(C.ALL_REDUCE, nbytes, where, TABLE)
    composed = {one.choice.algorithm for one in found if one.choice.algorithm_name.startswith("composed")}
    assert bool(composed) == there
    for a in composed:
        assert isinstance(a, Algorithm)
        for kind, name in dict(a.parameters).items():
            best = min(candidates(Collective(kind), nbytes, where, TABLE), key=lambda one: one.predicted)
            rivals = {b.name for b, _ in schedules(Collective(kind), where)}
            assert name == best.choice.algorithm_name or best.choice.algorithm_name not in rivals


def test_protocols_segments_and_lanes() -> None:
    """Where they matter only: short messages travel in their descriptors, between hosts there are none."""

    def ways(where: Place, nbytes: int) -> set[tuple[str | None, int | None, int | None]]:
        found = candidates(C.ALL_GATHER, nbytes, where, TABLE)
        return {(c.protocol, c.segment, c.lanes) for c in (one.choice for one in found) if c.algorithm_name == "direct"}

    two = place(2)
    assert ways(two, 64) == {(None, None, None)}
    assert ways(two, 4096) == {(name, None, None) for name in PROTOCOLS[:2]}
    assert ways(two, 32768) == {(name, None, None) for name in PROTOCOLS}
    quarter = two.slot_bytes // 4
    assert ways(two, 8 << 20) == {
        (name, segment, lanes) for name in PROTOCOLS for segment in (None, quarter) for lanes in (None, 1)
    }
    assert {protocol for protocol, _, _ in ways(place(1, 1), 8 << 20)} == {None}


def test_what_is_priced_is_what_runs() -> None:
    """More segments than lanes, blocks of whole cache lines: twice the bytes take twice the time, beyond latencies."""
    a = lookup(C.ALL_GATHER, "direct")
    where, choice = place(2), Choice(a, "cached")
    small, large = (priced(a, [choice], nbytes, where, TABLE)[0] for nbytes in (64 << 20, 128 << 20))
    assert large.beta == pytest.approx(2 * small.beta, rel=0.01)
    assert large.alpha == pytest.approx(2 * small.alpha, rel=0.01)
    pulled = priced(a, [Choice(a, "lent")], 1 << 20, where, TABLE)[0]
    pushed = priced(a, [choice], 1 << 20, where, TABLE)[0]
    rate = {name: TABLE.at("lent", 1 << 20)[NAMES.index(name)] for name in ("send", "receive", "copy", "lent")}
    # Its own half is copied to where it belongs.
    assert pulled.beta == pytest.approx((1 << 19) * (rate["copy"] + rate["lent"]))
    assert pushed.beta == pytest.approx((1 << 19) * (rate["copy"] + rate["send"] + rate["receive"]))


# ---- on data


def together(size: int, body: Callable[[Communicator], Any]) -> list[Any]:
    """What `body` returns on each of so many ranks, which are threads."""
    communicators = [Communicator(transport, timeout=60) for transport in shm_threads(size)]

    def run(communicator: Communicator) -> Any:
        with communicator:
            result = body(communicator)
            communicator.barrier()
            return result

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, communicators))


def values(rank: int, count: int) -> Any:
    return np.random.default_rng([rank, count]).integers(0, 100, count).astype("int64")


def is_right(c: Communicator, collective: Collective, part: int, choice: Choice) -> bool:
    """Whether a call on parts of so many elements does what it should; what is rooted, at the last rank."""
    r, size, root = c.rank, c.size, c.size - 1
    whole = [values(rank, part * size) for rank in range(size)]
    x, total, mine = whole[r].copy(), sum(whole), slice(part * r, part * (r + 1))
    out, short = np.zeros(part * size, "int64"), np.zeros(part, "int64")
    match collective:
        case C.ALL_REDUCE:
            c.all_reduce(x, algorithm=choice)
            return bool((x == total).all())
        case C.REDUCE:
            c.reduce(x, root=root, algorithm=choice)
            return bool((x == (total if r == root else whole[r])).all())
        case C.BROADCAST:
            c.broadcast(x, root, algorithm=choice)
            return bool((x == whole[root]).all())
        case C.REDUCE_SCATTER:
            c.reduce_scatter(short, x, algorithm=choice)
            return bool((short == total[mine]).all())
        case C.SCATTER:
            c.scatter(short, x if r == root else None, root, algorithm=choice)
            return bool((short == whole[root][mine]).all())
        case C.ALL_GATHER:
            c.all_gather(out, x[mine], algorithm=choice)
            return bool((out == np.concatenate([whole[s][part * s : part * (s + 1)] for s in range(size)])).all())
        case C.GATHER:
            c.gather(out if r == root else None, x[mine], root, algorithm=choice)
            gathered = np.concatenate([whole[s][part * s : part * (s + 1)] for s in range(size)])
            return bool((out == (gathered if r == root else 0)).all())
        case C.ALL_TO_ALL:
            c.all_to_all(out, x, algorithm=choice)
            return bool((out == np.concatenate([whole[s][mine] for s in range(size)])).all())
        case _:
            c.barrier(algorithm=choice)
            return True


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("part", [0, 700, 20_011])
def test_every_candidate_runs(ranks: int, part: int) -> None:
    """Forced as a caller would; and as what the tuner itself would run, of which no rank may deviate."""

    def body(c: Communicator) -> tuple[int, list[str]]:
        number, wrong = 0, []
        for collective in Collective:
            for one in c.tuner.candidates(collective, 8 * part * ranks):
                number += 1
                if not is_right(c, collective, part, one.choice):
                    wrong.append(f"{collective.value} {one.choice.name}")
        return number, wrong

    for number, wrong in together(ranks, body):
        assert wrong == []
        assert number > len(Collective)


def test_candidates_are_data() -> None:
    a = lookup(C.ALL_REDUCE, "ring")
    one = Candidate(Choice(a, "cached", 65536, 2), 1.0, 2.0, 3.0)
    assert one.choice.name == "ring, cached, 64 KiB segments, 2 lanes"
    assert (one.predicted, one.seconds) == (6.0, 6.0)
    measured = Candidate(Choice(a, lanes=1), 1.0, 2.0, 3.0, measured=5.0)
    assert (measured.predicted, measured.seconds, measured.choice.name) == (6.0, 5.0, "ring, 1 lane")
