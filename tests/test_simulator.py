"""The simulator: its times against closed forms, the tuner's walk and itself; symmetry; what it refuses."""

from __future__ import annotations

import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abccl.algorithms import Algorithm, Collective, algorithms, lookup, recv, send
from abccl.algorithms.model import NAMES, Runs, Walk, seconds
from abccl.algorithms.registry import _bound, _Declaration
from abccl.algorithms.simulator import (
    KINDS,
    Level,
    Links,
    Rank,
    Topology,
    read,
    simulate,
)
from abccl.algorithms.simulator.symmetry import Symmetry, find
from abccl.errors import ArgumentError, ScheduleError

EVERY = [a for c in Collective for a in algorithms(c).values()]
ALPHA, OVERHEAD, BETA, GAMMA = 2e-6, 0.25e-6, 1e-9, 0.5e-9


def flat(**rank: object) -> Topology:
    """A machine of one level and no links."""
    return Topology(
        "flat",
        "",
        Rank(**{"fold": GAMMA, **rank}),
        (Level("system", 0, ALPHA, OVERHEAD, BETA),),  # type: ignore[arg-type]
    )


def cluster(unit: int, through: bool = False, **rank: object) -> Topology:
    """Nodes of so many ranks, two of which make a rack, with links on every level."""
    return Topology(
        "cluster",
        "",
        Rank(**{"name": "GPU", "fold": GAMMA / 4, "slots": 4, "processors": 0, **rank}),  # type: ignore[arg-type]
        (
            Level("node", unit, 1e-6, 0.1e-6, 2e-11, Links("GPU", 2, 50e9)),
            Level("rack", 2, 3e-6, 0.2e-6, 8e-11, Links("node", 2, 12.5e9, through)),
            Level("system", 0, 5e-6, 0.2e-6, 8e-11, Links("rack", 1, 20e9)),
        ),
    )


def crowded(unit: int, cores: int) -> Topology:
    """Hosts of so many ranks that share cores."""
    host = Level("host", unit, 1e-6, 0.3e-6, cores=cores)
    return Topology("crowded", "", Rank(fold=GAMMA, receive=GAMMA), (host, Level("system", 0, ALPHA, OVERHEAD, BETA)))


def runs_on(algorithm: Algorithm, ranks: int) -> bool:
    return algorithm.refusal(ranks) is None


# ---- times


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("nbytes", [0, 8, 1 << 20])
def test_what_closed_forms_say_where_nothing_is_shared(ranks: int, nbytes: int) -> None:
    latency = ALPHA + 2 * OVERHEAD
    part = nbytes / ranks
    steps = (ranks - 1).bit_length()

    def took(collective: Collective, name: str) -> float:
        return simulate(lookup(collective, name), ranks, flat(), nbytes).seconds

    ring = (ranks - 1) * (2 * (latency + part * BETA) + part * GAMMA)
    assert took(Collective.ALL_REDUCE, "ring") == pytest.approx(ring, rel=1e-12)
    doubling = steps * (latency + nbytes * (BETA + GAMMA))
    if ranks & (ranks - 1) == 0:
        assert took(Collective.ALL_REDUCE, "recursive_doubling") == pytest.approx(doubling, rel=1e-12)
    chain = (ranks - 1) * (latency + nbytes * BETA)
    assert took(Collective.BROADCAST, "chain") == pytest.approx(chain, rel=1e-12)


def by_the_walk(algorithm: Algorithm, ranks: int, nbytes: int, rank: Rank, level: Level) -> float:
    """What the tuner's model says, for a vector that is not cut."""
    at = {**vars(rank), **vars(level), "beta": 0.0}
    constants = np.array([[at.get(name, 0.0)] for name in NAMES])
    blocks = algorithm.blocks(ranks) if algorithm.collective.cut else ranks
    block = 0.0 if algorithm.collective is Collective.BARRIER else nbytes / blocks
    one = np.ones(1)
    runs = Runs(block * one, one, one, float(rank.lends) * one, constants)
    return float(seconds(Walk(algorithm, ranks).counts(runs, [ranks]), constants)[0])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(EVERY),
    st.integers(2, 13),
    st.integers(0, 1 << 20),
    st.booleans(),
    st.lists(st.floats(0, 1e-6), min_size=8, max_size=8),
)
def test_the_tuners_walk_agrees_where_nothing_is_shared(
    algorithm: Algorithm, ranks: int, nbytes: int, lends: bool, costs: list[float]
) -> None:
    if not runs_on(algorithm, ranks):
        return
    launch, send_, receive, copy, fold, lent, lent_fold, overhead = costs
    rank = Rank("rank", launch, send_, receive, copy, fold, lends, lent, lent_fold)
    level = Level("host", 0, 1e-6, overhead)
    found = simulate(algorithm, ranks, Topology("host", "", rank, (level,)), nbytes, method="events").seconds
    assert found == pytest.approx(by_the_walk(algorithm, ranks, nbytes, rank, level), rel=1e-9)


def test_messages_and_events_are_those_of_the_schedule() -> None:
    ring = lookup(Collective.ALL_REDUCE, "ring")
    found = simulate(ring, 8, flat(), 8 << 10, segment=256, lanes=2, method="events")
    assert (found.segments, found.lanes, found.simulated) == (4, 2, 8)
    assert found.messages == 8 * 14 * 4
    assert found.events > 2 * found.messages


def test_lanes_fill_a_pipeline() -> None:
    double_tree = lookup(Collective.ALL_REDUCE, "double_tree")
    one, several = (
        simulate(double_tree, 64, cluster(8), 1 << 26, segment=1 << 20, lanes=lanes).seconds for lanes in (1, 16)
    )
    assert several < one / 2


def test_uneven_segments_are_counted_up() -> None:
    found = simulate(lookup(Collective.BROADCAST, "chain"), 4, flat(), 1000, segment=300)
    assert found.segments == 4  # of 256 bytes, whole cache lines, at most


def test_what_is_busy() -> None:
    found = simulate(lookup(Collective.ALL_TO_ALL, "direct"), 16, cluster(8), 1 << 24)
    assert found.utilisation is not None
    assert set(found.utilisation) == {"node", "rack", "system", "GPU"} and found.utilisation["system"] == 0
    assert found.utilisation["rack"] == pytest.approx(1, abs=0.05)
    assert all(0 <= part <= 1 for part in found.utilisation.values())


def test_bandwidths() -> None:
    found = simulate(lookup(Collective.ALL_REDUCE, "ring"), 4, flat(), 1 << 20)
    assert found.algbw == (1 << 20) / found.seconds
    assert found.busbw == found.algbw * 1.5


def test_the_fastest_protocol_is_taken() -> None:
    base = flat()
    slow = (replace(base.rank, launch=1.0), base.levels)
    both = replace(base, protocols={"slow": slow, "fast": (base.rank, base.levels)})
    ring = lookup(Collective.ALL_REDUCE, "ring")
    best = simulate(ring, 4, both, 1024, record=True)
    assert best.protocol == "fast" and best.timeline is not None
    assert simulate(ring, 4, both, 1024, protocol="slow").seconds == pytest.approx(1 + best.seconds)


def test_the_fastest_cut_is_taken() -> None:
    double_tree = lookup(Collective.ALL_REDUCE, "double_tree")
    cut, whole = (simulate(double_tree, 64, cluster(8), 1 << 26, segment=segment) for segment in ("auto", None))
    assert cut.seconds < whole.seconds / 2
    same = simulate(double_tree, 64, cluster(8), 1 << 26, segment=cut.segment, lanes=cut.lanes)
    assert (same.seconds, same.segments) == (cut.seconds, cut.segments)
    short = simulate(double_tree, 64, cluster(8), 8, segment="auto")
    assert (short.segment, short.segments) == (None, 1)


# ---- ranks that stand for others


@pytest.mark.parametrize("collective", list(Collective), ids=lambda collective: collective.value)
@pytest.mark.parametrize("ranks", [24, 32, 36])
def test_some_ranks_stand_for_all(collective: Collective, ranks: int) -> None:
    stood = []
    for algorithm in algorithms(collective).values():
        for topology in (flat(), flat(processors=2), cluster(4), cluster(6, through=True), crowded(6, 4)):
            if not runs_on(algorithm, ranks) or find(algorithm, ranks, topology) is None:
                continue
            all_, some = (
                simulate(algorithm, ranks, topology, 48 << 10, segment=8 << 10, lanes=3, method=method)
                for method in ("events", "symmetry")
            )
            assert some.simulated < all_.simulated == ranks
            assert some.seconds == pytest.approx(all_.seconds, rel=1e-9), f"{algorithm.name} on {topology.levels[0]}"
            stood.append(algorithm.name)
    assert stood or collective.rooted


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_hosts_that_lack_cores_are_no_symmetry_of_one_rank(cores: int) -> None:
    direct = lookup(Collective.ALL_TO_ALL, "direct")
    host = Level("host", 4, 1e-6, 1e-6, cores=cores)
    for levels in ((host,), (host, Level("system", 0, 5e-6, 1e-6))):
        for ranks in (4, 8) if len(levels) > 1 else (4,):
            crowd = Topology("crowd", "", Rank(fold=GAMMA, receive=GAMMA), levels)
            all_, auto = (simulate(direct, ranks, crowd, 1 << 20, method=method) for method in ("events", "auto"))
            assert auto.seconds == pytest.approx(all_.seconds)
            assert auto.simulated == 4


def test_lending_is_for_the_first_level() -> None:
    """A root with a reader on its host and one elsewhere: the one is lent to, for the other a copy is put out."""
    rank = Rank(send=1.0, receive=2.0, lends=True, lent=4.0)
    hosts = Topology("hosts", "", rank, (Level("host", 2, 10.0), Level("system", 2, 100.0)))
    found = simulate(lookup(Collective.BROADCAST, "direct"), 4, hosts, 1)
    # Rank 1 lent; ranks 2 and 3 from one copy.
    assert found.seconds == 1 + 100 + 2
    only = simulate(lookup(Collective.BROADCAST, "direct"), 2, hosts, 1)
    assert only.seconds == 10 + 4


def is_symmetric(algorithm: Algorithm, ranks: int, symmetry: Symmetry) -> bool:
    """Whether all ranks, and not only some, have their images' peers."""

    def place(peer: int, of: int) -> int:
        return peer ^ of if symmetry.mirrored else (peer - of) % ranks

    programs = [
        [[(type(m), place(m.peer, rank), len(m.blocks)) for m in step] for step in algorithm.program(rank, ranks)]
        for rank in range(ranks)
    ]
    return all(programs[rank] == programs[rank % symmetry.period] for rank in range(ranks))


@pytest.mark.parametrize("ranks", [2, 7, 12, 16, 40, 64])
def test_symmetry_that_some_ranks_show_is_that_of_all(ranks: int) -> None:
    found = {}
    for algorithm in EVERY:
        if runs_on(algorithm, ranks) and (symmetry := find(algorithm, ranks, flat())):
            assert is_symmetric(algorithm, ranks, symmetry), algorithm
            found[algorithm.collective.value, algorithm.name] = symmetry.period
    assert found["all_reduce", "ring"] == found["all_to_all", "direct"] == 1
    assert ("all_reduce", "tree") not in found or ranks == 2


def test_a_mirror_is_found() -> None:
    def swap(rank: int, size: int) -> list[object]:
        return [
            (send(rank ^ 1, 0), recv(rank ^ 1, 0, reduce=True)),
            (send(rank ^ 2, 0), recv(rank ^ 2, 0, reduce=True)),
        ]

    algorithm = own(swap)
    assert find(algorithm, 4, flat()) == Symmetry(1, True)
    assert simulate(algorithm, 4, flat(), 64, method="symmetry").seconds == pytest.approx(
        simulate(algorithm, 4, flat(), 64, method="events").seconds
    )


def own(function: object) -> Algorithm:
    """An all_reduce of a user's, that is not registered."""
    return _bound(_Declaration("own", Collective.ALL_REDUCE, function, None, 1, (), None, {}, False), ())  # type: ignore[arg-type]


def test_thousands_of_ranks_by_some() -> None:
    found = simulate(lookup(Collective.ALL_REDUCE, "recursive_doubling"), 4096, flat(), 1 << 10)
    assert (found.method, found.simulated) == ("symmetry", 1)
    assert found.seconds == pytest.approx(12 * (ALPHA + 2 * OVERHEAD + (1 << 10) * (BETA + GAMMA)))


# ---- closed forms


@pytest.mark.parametrize("ranks", [12, 48])
@pytest.mark.parametrize("cut", [{}, {"segment": 64 << 10, "lanes": 4}], ids=["whole", "cut"])
def test_closed_forms_come_near(ranks: int, cut: dict[str, int]) -> None:
    for algorithm in EVERY:
        if not runs_on(algorithm, ranks) or not (algorithm.counts and algorithm.counts(ranks)):
            continue
        for nbytes in (8, 1 << 20, 1 << 26):
            rough, exact = (
                simulate(algorithm, ranks, cluster(6), nbytes, method=method, **cut).seconds  # type: ignore[arg-type]
                for method in ("closed form", "auto")
            )
            assert 0.45 < rough / exact < 2.7, (algorithm, nbytes)


@pytest.mark.parametrize("ranks", [48, 205])
def test_closed_forms_of_hosts_that_are_not_full_come_near(ranks: int) -> None:
    for name, nbytes in (("ring", 8 << 10), ("ring", 1 << 20), ("recursive_doubling", 1 << 20)):
        rough, exact = (
            simulate(lookup(Collective.ALL_REDUCE, name), ranks, read("ethernet"), nbytes, method=method).seconds
            for method in ("closed form", "events")
        )
        assert 0.45 < rough / exact < 2.7, name


def test_groups_are_the_units_of_the_topology() -> None:
    hierarchical = lookup(Collective.ALL_REDUCE, "hierarchical")
    for ranks, levels in ((48, "6x8"), (50, "6x8+2")):
        found = simulate(hierarchical, ranks, cluster(4), 1 << 20)
        assert found.algorithm is hierarchical.bind(levels=levels)
    assert simulate(hierarchical.bind(levels="2x4"), 8, cluster(4), 8).algorithm.name == "hierarchical(levels=2x4)"
    assert simulate(hierarchical, 8, flat(), 8).algorithm is hierarchical


def test_one_odd_pair_is_no_symmetry() -> None:
    def odd(rank: int, size: int) -> list[object]:
        ring = lookup(Collective.ALL_REDUCE, "ring").program(rank, size)
        pair = (size // 3 + 2, size - size // 3)
        other = {pair[0]: pair[1], pair[1]: pair[0]}.get(rank)
        return [*ring, (send(other, 0), recv(other, 0))] if other is not None else list(ring)

    algorithm = replace(own(odd), blocks=lambda size: size)
    for ranks in (24, 96):
        assert find(algorithm, ranks, cluster(6)) is None


def test_too_much_is_left_to_the_closed_form() -> None:
    ring = lookup(Collective.ALL_REDUCE, "ring")
    found = simulate(ring, 1_000_000, flat(), 1 << 30)
    assert (found.method, found.simulated, found.events) == ("closed form", 0, 0)
    part = (1 << 30) / 1_000_000
    assert found.seconds == pytest.approx(999_999 * (2 * (ALPHA + 2 * OVERHEAD + part * BETA) + part * GAMMA))


def test_a_closed_form_needs_counts() -> None:
    with pytest.raises(ArgumentError, match="own declares no counts for 4 ranks"):
        simulate(own(lambda rank, size: []), 4, flat(), 8, method="closed form")


# ---- the timeline


def test_a_timeline_adds_up() -> None:
    found = simulate(
        lookup(Collective.ALL_REDUCE, "tree"), 7, cluster(8), 1 << 16, record=True, segment=16 << 10, lanes=2
    )
    t = found.timeline
    assert t is not None and t.end.max() <= found.seconds
    assert (t.end >= t.start).all()
    messages = t.kind == KINDS.index("message")
    assert messages.sum() == found.messages
    assert t.nbytes[messages].sum() == 2 * 6 * (1 << 16)
    assert t.nbytes[t.kind == KINDS.index("fold")].sum() == 6 * (1 << 16)
    for rank in range(7):
        for lane in range(2):
            mine = (t.rank == rank) & (t.lane == lane) & ~messages
            order = np.argsort(t.start[mine])
            assert (t.end[mine][order][:-1] <= t.start[mine][order][1:] + 1e-15).all()


# ---- what is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nbytes": -1}, "nbytes is -1: wanted is an integer, 0 or more"),
        ({"lanes": 0}, "lanes is 0: wanted is an integer, 1 or more"),
        ({"segment": 0}, "segment is 0"),
        ({"segment": "64K"}, "segment is '64K': wanted is a number of bytes"),
        ({"root": 1}, "all_reduce has no root 1"),
        ({"protocol": "LL"}, "flat has no protocol 'LL': it has none, leave it out"),
        ({"method": "guess"}, "no method is called 'guess'"),
        ({"ranks": 0}, "ranks is 0: wanted is an integer, 1 or more"),
    ],
)
def test_wrong_arguments(changed: dict[str, object], message: str) -> None:
    wanted = {"ranks": 4, "nbytes": 8, **changed}
    with pytest.raises(ArgumentError, match=message):
        simulate(lookup(Collective.ALL_REDUCE, "ring"), topology=flat(), **wanted)  # type: ignore[arg-type]


def test_refusals_that_need_the_schedule() -> None:
    with pytest.raises(ArgumentError, match="tree shows no symmetry on 12 ranks of flat"):
        simulate(lookup(Collective.ALL_REDUCE, "tree"), 12, flat(), 8, method="symmetry")
    with pytest.raises(ArgumentError, match="a closed form has no timeline: take fewer ranks or segments$"):
        simulate(lookup(Collective.ALL_REDUCE, "ring"), 4, flat(), 8, method="closed form", record=True)
    with pytest.raises(ArgumentError, match="wants an even number of ranks, and there are 5"):
        simulate(lookup(Collective.ALL_GATHER, "neighbor_exchange"), 5, flat(), 8)


def test_what_memory_does_not_hold_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match="direct on 16384 ranks has about .* can be held in memory: take fewer ranks"
    ):
        simulate(lookup(Collective.ALL_TO_ALL, "direct"), 16384, flat(), 1 << 20, method="events")


def test_a_schedule_that_never_ends_is_an_error() -> None:
    waits = own(lambda rank, size: [recv((rank + 1) % size, 0, reduce=True), send((rank - 1) % size, 0)])
    for method in ("events", "symmetry"):
        with pytest.raises(ScheduleError, match="own on 3 ranks is wrong: rank 0 waits for rank 1 to send"):
            simulate(waits, 3, flat(), 8, method=method)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda rank, size: [send((rank + 1) % size, 0)], "rank [0-2] does not take a message that was sent to it"),
        (
            lambda rank, size: [(send((rank + 1) % size, 0), recv((rank - 1) % size, 0, 1, reduce=True))],
            "rank [0-2] wants 2 blocks from rank [0-2], which sent 1",
        ),
        (lambda rank, size: [send(rank, 0)], "rank 0: the code names no peer"),
        (lambda rank, size: [send(size, 0)], "rank 0: the code names no peer"),
    ],
)
def test_wrong_schedules(program: object, message: str) -> None:
    algorithm = replace(own(program), blocks=lambda size: 2)
    with pytest.raises(ScheduleError, match=message):
        simulate(algorithm, 3, flat(), 8, method="events")


def test_blocks_are_too_much_as_messages_are() -> None:
    """Ranks of a tree have few messages, but all blocks of the result."""
    found = simulate(lookup(Collective.ALL_GATHER, "tree"), 24576, flat(), 1 << 20)
    assert found.method == "closed form"


def test_threads_may_simulate_the_same() -> None:
    double_tree = lookup(Collective.ALL_REDUCE, "double_tree")
    found: list[float] = []
    threads = [
        threading.Thread(target=lambda: found.append(simulate(double_tree, 61, flat(), 1 << 20).seconds))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({*found, simulate(double_tree, 61, flat(), 1 << 20).seconds}) == 1


def test_progress_is_told() -> None:
    told: list[float] = []
    simulate(lookup(Collective.ALL_REDUCE, "ring"), 256, cluster(8), 1 << 20, method="events", progress=told.append)
    assert told and told == sorted(told) and 0 < told[0] < 1


def test_fractions_of_a_block_are_bytes() -> None:
    """The declared counts and the walked messages are the same bytes."""
    ring = lookup(Collective.ALL_REDUCE, "ring")
    found = simulate(ring, 6, flat(), 100, record=True, method="events")
    assert found.timeline is not None and ring.counts is not None
    sent = found.timeline.nbytes[(found.timeline.rank == 0) & (found.timeline.kind == KINDS.index("message"))].sum()
    declared = ring.counts(6)
    assert declared is not None
    assert sent == pytest.approx(float(declared.sent * Fraction(100)))
