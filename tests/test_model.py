"""The model: its walk held against replay, lowering and what pipelines, cores and network cards allow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abccl.algorithms import Algorithm, Collective, Replay, algorithms, counts, lookup, replay
from abccl.algorithms.decoded import Sending, Writing, decode
from abccl.algorithms.model import (
    ALPHA,
    COPY,
    FAR_ALPHA,
    FAR_BETA,
    FAR_OVERHEAD,
    FOLD,
    KINDS,
    LAUNCH,
    LENT,
    LENT_FOLD,
    NAMES,
    OVERHEAD,
    RECEIVE,
    SEND,
    Constants,
    Floats,
    Outline,
    Runs,
    Walk,
    seconds,
    slowest,
)
from abccl.algorithms.plan import Instruction, Place, lower

C = Collective
EVERY = [a for c in Collective for a in algorithms(c).values()]
each = pytest.mark.parametrize("a", EVERY, ids=lambda a: f"{a.collective.value}-{a.name}")


def constants(**named: float) -> Floats:
    given = Constants(**named)
    return np.array([getattr(given, name) for name in NAMES])


def one(block: float = 1, segments: int = 1, lanes: int = 1, lends: bool = False, **named: float) -> Runs:
    """One way of running a schedule, with these constants and all others 0."""
    block_, segments_, lanes_, lent_ = (np.array([float(value)]) for value in (block, segments, lanes, lends))
    return Runs(block_, segments_, lanes_, lent_, constants(**named)[:, None])


def counted(walk: Walk | Outline, runs: Runs, cores: Sequence[int] | None = None) -> dict[int, float]:
    """How often each constant counts that costs something; without limits to cores if none are given."""
    found = walk.counts(runs, cores or [walk.size] * len(walk.hosts))[:, 0]
    return {name: float(found[name]) for name in range(len(NAMES)) if found[name] and runs.constants[name, 0]}


def took(walk: Walk | Outline, runs: Runs, cores: Sequence[int] | None = None) -> float:
    """What a run takes."""
    return float(seconds(walk.counts(runs, cores or [walk.size] * len(walk.hosts)), runs.constants)[0])


def waits(run: Replay) -> int:
    """The longest chain of messages of which each is sent after the one before has arrived. Sending takes no time."""
    arrives: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for t in run.transfers:
        arrives.setdefault((t.destination, t.destination_step), []).append((t.source, t.source_step))
    ends: dict[tuple[int, int], int] = {}

    def begin(rank: int, step: int) -> int:
        for number in range(step):
            if (rank, number) not in ends:
                found = begin(rank, number)
                ends[rank, number] = max([found, *(begin(*sent) + 1 for sent in arrives.get((rank, number), ()))])
        return ends[rank, step - 1] if step else 0

    return max(begin(rank, len(program)) for rank, program in enumerate(run.programs))


# ---- the path


@each
def test_with_alpha_alone_messages_count_that_wait_for_each_other(a: Algorithm) -> None:
    """A rank that sends to several in steps of its own waits for none of them: that is overhead."""
    for size, root in itertools.product(range(2, 10), (0, 1)):
        if a.refusal(size) is not None or (root and not a.collective.rooted):
            continue
        run = replay(a, size, root)
        found = counted(Walk(a, size, root), one(alpha=1))
        assert found == {ALPHA: waits(run)}
        assert found[ALPHA] <= run.steps


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("name", ["direct", "two_shot", "ring", "rabenseifner", "chain", "swing"])
def test_with_alpha_alone_it_is_the_steps_where_all_wait_in_each(name: str, size: int) -> None:
    a = lookup(C.ALL_REDUCE, name)
    found = counted(Walk(a, size), one(alpha=1))
    assert found == {ALPHA: replay(a, size).steps}


@each
@pytest.mark.parametrize("size", [2, 5, 8])
def test_the_path_is_no_shorter_than_any_ranks_work(a: Algorithm, size: int) -> None:
    """And folds are those of the schedule, a send one copy for all its readers."""
    if a.refusal(size):
        return
    walk, declared, blocks = Walk(a, size), counts(a, size), a.blocks(size)
    for name, word in ((SEND, "send"), (RECEIVE, "receive"), (FOLD, "fold"), (OVERHEAD, "overhead")):
        runs = one(**{word: 1.0})
        busiest = max(float(walk.work(rank, runs)[name, 0]) for rank in range(size))
        on_path = counted(walk, runs).get(name, 0.0)
        assert on_path >= busiest
        if name == FOLD and a.collective.reduces:
            assert busiest == declared.folded * blocks
        if name == SEND and a.collective is not C.BARRIER:
            assert busiest <= declared.sent * blocks


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    ("collective", "name"),
    [
        (C.ALL_REDUCE, "direct"),
        (C.ALL_REDUCE, "ring"),
        (C.ALL_REDUCE, "two_shot"),
        (C.ALL_REDUCE, "recursive_doubling"),
        (C.ALL_REDUCE, "rabenseifner"),
        (C.REDUCE_SCATTER, "ring"),
        (C.REDUCE_SCATTER, "direct"),
    ],
)
def test_the_path_is_the_schedules_count_where_all_ranks_do_alike(collective: Collective, name: str, size: int) -> None:
    a = lookup(collective, name)
    walk, declared, blocks = Walk(a, size), counts(a, size), a.blocks(size)
    assert counted(walk, one(fold=1))[FOLD] / blocks == declared.folded
    readers = {"direct": size - 1, "two_shot": 1}.get(name, 1)
    if collective is C.ALL_REDUCE and name == "two_shot":
        # p - 1 parts to be reduced, each for one reader; then one part for all.
        assert counted(walk, one(send=1))[SEND] == (size - 1) + 1
    elif collective is C.ALL_REDUCE:
        assert counted(walk, one(send=1))[SEND] / blocks == declared.sent / readers
    else:
        assert counted(walk, one(send=1))[SEND] / blocks == declared.sent


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_known_paths(size: int) -> None:
    """Written out by hand, for blocks of 10 bytes."""
    gather = Walk(lookup(C.ALL_GATHER, "direct"), size, in_place=False)
    runs = one(10, launch=1, alpha=1, overhead=1, send=1, receive=1, copy=1)
    messages = 2 * (size - 1)
    assert counted(gather, runs) == {
        LAUNCH: 1, ALPHA: 1, OVERHEAD: messages, SEND: 10, RECEIVE: 10 * (size - 1), COPY: 10,
    }  # fmt: skip
    chain = Walk(lookup(C.BROADCAST, "chain"), size)
    hops = size - 1
    assert counted(chain, one(10, launch=1, alpha=1, overhead=1, send=1, receive=1)) == {
        LAUNCH: 1, ALPHA: hops, OVERHEAD: 2 * hops, SEND: 10 * hops, RECEIVE: 10 * hops,
    }  # fmt: skip


def test_what_lies_where_it_belongs_is_not_copied_in_place() -> None:
    a = lookup(C.ALL_GATHER, "ring")
    runs = one(copy=1)
    assert counted(Walk(a, 4, in_place=False), runs)[COPY] == 1
    assert COPY not in counted(Walk(a, 4, in_place=True), runs)


# ---- pipelines


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_chain_grows_by_its_busiest_rank_for_every_segment(size: int, lanes: int) -> None:
    """Not by its length: a rank sends a segment on while the next one comes."""
    walk = Walk(lookup(C.BROADCAST, "chain"), size)
    bottleneck = 2.0 if size > 2 else 1.0  # who passes on receives and sends, the ends do one of them
    for segments in (1, 2, 10, 100):
        assert took(walk, one(1, segments, lanes, send=1, receive=1)) == 2 * (size - 1) + (segments - 1) * bottleneck
        assert took(walk, one(1, segments, lanes, alpha=1)) == size - 1


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_lanes_share_the_latency_of_an_exchange(lanes: int) -> None:
    walk = Walk(lookup(C.ALL_GATHER, "direct"), 4)
    assert took(walk, one(1, 9, lanes, alpha=1)) == 1 + 8 / lanes
    ring = Walk(lookup(C.ALL_GATHER, "ring"), 4)
    assert took(ring, one(1, 9, lanes, alpha=1)) == 3 + 8 * 3 / lanes


def test_lanes_share_no_work() -> None:
    walk = Walk(lookup(C.ALL_GATHER, "direct"), 4)
    times = [took(walk, one(1, 9, lanes, receive=1, overhead=1)) for lanes in (1, 2, 4)]
    assert times[1] == times[2] == 9 * (3 + 6)
    assert times[0] >= times[1]


# ---- what ranks share


@pytest.mark.parametrize("name", ["direct", "ring", "two_shot", "tree", "double_tree"])
@pytest.mark.parametrize("segments", [1, 8])
def test_few_cores_share_all_work(name: str, segments: int) -> None:
    walk = Walk(lookup(C.ALL_REDUCE, name), 4)
    runs = one(100, segments, 4, overhead=5, send=1, receive=2, fold=3, copy=1)
    busy = [float(seconds(walk.work(rank, runs), runs.constants)[0]) for rank in range(4)]
    times = [took(walk, runs, [cores]) for cores in (4, 3, 2, 1)]
    assert times == sorted(times)
    for cores, time in zip((4, 3, 2, 1), times):
        assert time >= segments * sum(busy) / cores * (1 - 1e-12)
    assert times[-1] == pytest.approx(segments * sum(busy))
    if name in ("direct", "ring", "two_shot"):  # whose ranks are busy all the time
        assert times[2] > times[0]


HOSTS = [[0, 1], [2, 3]]


def test_a_network_card_sends_one_byte_after_the_other() -> None:
    """Two ranks of a host send 2 blocks each to the other host; both hosts do so at once."""
    walk = Walk(lookup(C.ALL_TO_ALL, "direct"), 4, hosts=HOSTS)
    assert walk.leaving.tolist() == [2, 2, 2, 2]
    assert counted(walk, one(10, far_beta=1)) == {FAR_BETA: pytest.approx(40)}
    assert took(walk, one(10, 7, 4, far_beta=1)) == pytest.approx(7 * 40)
    assert took(walk, one(10, far_alpha=3, far_beta=1)) == pytest.approx(43)
    apart = Walk(lookup(C.ALL_TO_ALL, "direct"), 4, hosts=[[0], [1], [2], [3]])
    assert took(apart, one(10, far_beta=1)) == pytest.approx(30)


def test_only_what_leaves_the_host_is_far() -> None:
    walk = Walk(lookup(C.ALL_TO_ALL, "direct"), 4, hosts=HOSTS)
    work = walk.work(0, one(10))[:, 0]
    assert (work[OVERHEAD], work[FAR_OVERHEAD]) == (2, 4)
    assert counted(walk, one(alpha=1)) == {ALPHA: 1}
    assert counted(walk, one(far_alpha=1)) == {FAR_ALPHA: 1}
    together = Walk(lookup(C.ALL_TO_ALL, "direct"), 4)
    assert took(together, one(10, far_alpha=1, far_beta=1, far_overhead=1)) == 0
    groups = Walk(lookup(C.ALL_REDUCE, "hierarchical(levels=2x2)"), 4, hosts=HOSTS)
    flat = Walk(lookup(C.ALL_REDUCE, "ring"), 4, hosts=HOSTS)
    leaves = sum(groups.leaving[:2]) / 4, sum(flat.leaving[:2]) / 4
    assert leaves == (1, 1.5)


# ---- what is lent


@each
def test_what_may_be_lent_is_not_put_out(a: Algorithm) -> None:
    """As lowering says; sums and parts on their way to others are put out all the same."""
    size = 4 if not a.refusal(4) else 3
    walk = Walk(a, size)
    programs = [decode(lower(a, rank, size).code) for rank in range(size)]
    for rank, program in enumerate(programs):
        copied, lent = walk.work(rank, one(10))[:, 0], walk.work(rank, one(10, lends=True))[:, 0]
        sends = [found for found in program if isinstance(found, Sending)]
        assert copied[SEND] == 10 * sum(len(found.parts) for found in sends)
        assert lent[SEND] == 10 * sum(len(found.parts) for found in sends if not found.lends)
        taken = [
            (found.kind, sum(source[0] == Place.MESSAGE for source in found.sources))
            for found in program
            if isinstance(found, Writing)
        ]
        for name, lent_name, kind in ((RECEIVE, LENT, Instruction.COPY), (FOLD, LENT_FOLD, Instruction.FOLD)):
            assert copied[name] == 10 * sum(number for which, number in taken if which is kind)
            assert copied[lent_name] == 0
            assert lent[name] + lent[lent_name] == copied[name]
    readers = sum(len(found.peers) * len(found.parts) for p in programs for found in p if isinstance(found, Sending))
    if all(found.lends for p in programs for found in p if isinstance(found, Sending)):
        lent_all = sum(walk.work(rank, one(10, lends=True))[:, 0] for rank in range(size))
        assert lent_all[LENT] + lent_all[LENT_FOLD] == 10 * readers
        assert lent_all[RECEIVE] == lent_all[FOLD] == 0


def test_the_path_of_what_is_lent() -> None:
    walk = Walk(lookup(C.ALL_REDUCE, "two_shot"), 4)
    everything = {"send": 1.0, "receive": 1.0, "lent": 1.0, "fold": 1.0, "lent_fold": 1.0}
    # Parts to be reduced lie in the input: read there. The sums are lent where they lie, or put out once.
    found = counted(walk, one(10, lends=True, **everything))
    assert (found[LENT_FOLD], FOLD in found) == (30, False)
    assert found.get(LENT, 0) + found.get(RECEIVE, 0) == 30
    assert counted(walk, one(10, **everything)) == {SEND: 40, RECEIVE: 30, FOLD: 30}


def test_sums_on_their_way_are_put_out() -> None:
    """A rank lends its own part, which it keeps; the sums that it passes on lie where the next one will."""
    walk = Walk(lookup(C.REDUCE_SCATTER, "ring"), 4)
    for rank in range(4):
        work = walk.work(rank, one(10, lends=True))[:, 0]
        assert (work[SEND], work[FOLD], work[LENT_FOLD]) == (20, 20, 10)


def test_nothing_is_lent_to_another_host() -> None:
    walk = Walk(lookup(C.BROADCAST, "direct"), 4, hosts=HOSTS)
    assert walk.work(0, one(10, lends=True))[SEND, 0] == 10  # for the far readers, not for the near one
    assert walk.work(1, one(10, lends=True))[LENT, 0] == 10
    assert walk.work(2, one(10, lends=True))[LENT, 0] == 0


# ---- the arithmetic

POSITIVE = st.floats(1e-12, 1e3)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_runs_do_not_depend_on_each_other(data: st.DataObject) -> None:
    """Bit for bit, in any order and alone: ranks that price other candidates beside one must agree on it."""
    number = data.draw(st.integers(2, 6))
    column = st.lists(POSITIVE, min_size=number, max_size=number)
    runs = Runs(
        np.array(data.draw(column)),
        np.array(data.draw(st.lists(st.integers(1, 9), min_size=number, max_size=number)), float),
        np.array(data.draw(st.lists(st.integers(1, 4), min_size=number, max_size=number)), float),
        np.array(data.draw(st.lists(st.integers(0, 1), min_size=number, max_size=number)), float),
        np.array([data.draw(column) for _ in NAMES]),
    )
    name = data.draw(st.sampled_from(["two_shot", "tree", "ring"]))
    hosts = data.draw(st.sampled_from([[], [[0, 1], [2]]]))
    a = lookup(C.ALL_REDUCE, name)
    order = np.array(data.draw(st.permutations(range(number))))
    for priced in (Walk(a, 3, hosts=hosts), Outline(a, 3, replay(a, 3).steps, hosts)):
        cores = [data.draw(st.integers(1, 3))] * len(priced.hosts)
        together = seconds(priced.counts(runs, cores), runs.constants)
        for chosen in (order, *([index] for index in range(number))):
            some = Runs(*(field[..., chosen] for field in runs))
            assert (seconds(priced.counts(some, cores), some.constants) == together[chosen]).all()


@given(st.data())
def test_seconds_are_added_in_one_order(data: st.DataObject) -> None:
    rows = [data.draw(st.lists(POSITIVE, min_size=3, max_size=3)) for _ in NAMES]
    times = [data.draw(st.lists(POSITIVE, min_size=3, max_size=3)) for _ in NAMES]
    expected = [0.0] * 3
    for row, time in zip(rows, times):
        expected = [total + count * what for total, count, what in zip(expected, row, time)]
    found = seconds(np.array(rows), np.array(times))
    assert found.tolist() == expected
    order = np.array([2, 0, 1])
    assert seconds(np.array(rows)[:, order], np.array(times)[:, order]).tolist() == [expected[i] for i in order]
    parts = [seconds(np.array(rows), np.array(times), names) for names in KINDS.values()]
    assert sum(parts) == pytest.approx(found)


def test_every_constant_is_of_one_kind() -> None:
    assert sorted(name for names in KINDS.values() for name in names) == list(range(len(NAMES)))
    assert NAMES[ALPHA] == "alpha" and NAMES[FAR_BETA] == "far_beta" and NAMES[LENT_FOLD] == "lent_fold"


def test_slowest_takes_all_counts_of_one_path() -> None:
    first, second = np.zeros((len(NAMES), 2)), np.zeros((len(NAMES), 2))
    first[SEND], second[FOLD] = [3, 3], [2, 4]
    found = slowest([first, second], np.ones((len(NAMES), 2)))
    assert (found[SEND].tolist(), found[FOLD].tolist()) == ([3, 0], [0, 4])


# ---- the outline

TYPICAL = {
    "launch": 3e-7, "alpha": 3e-7, "overhead": 1e-7, "send": 1e-10, "receive": 1e-10, "copy": 5e-11, "fold": 2e-10,
}  # fmt: skip
ALIKE = ("ring", "recursive_doubling", "rabenseifner", "swing", "pairwise", "pat", "neighbor_exchange")


def steps(a: Algorithm, size: int) -> int:
    found = a.counts(size) if a.counts else None
    return (found or counts(a, size)).steps


@each
@pytest.mark.parametrize("size", [4, 8])
def test_the_outline_is_near_the_walk(a: Algorithm, size: int) -> None:
    """Where ranks do unlike work in one step, as in trees, chains and scatters, it is up to 2.6 times as fast or 1.5
    times as slow; compositions of these are worse, and none is tried among as many ranks as have an outline.

    An outline knows no lanes: it holds where there are enough of them.
    """
    if a.refusal(size) or a.collective is C.BARRIER:
        return
    walk, outline = Walk(a, size), Outline(a, size, steps(a, size))
    assert counted(outline, one(alpha=1)) == {ALPHA: steps(a, size)}
    assert counted(walk, one(alpha=1))[ALPHA] <= steps(a, size)
    alike = a.name in ALIKE and a.collective not in (C.BROADCAST, C.REDUCE)
    low, high = (0.85, 1.05) if alike else (0.38, 1.5)
    for nbytes, segments in ((64, 1), (4096, 1), (1 << 16, 1), (1 << 20, 8), (16 << 20, 128)):
        runs = one(nbytes / a.blocks(size) / segments, segments, 4, **TYPICAL)
        if not a.name.startswith("composed"):
            assert low < took(outline, runs) / took(walk, runs) < high


@pytest.mark.parametrize("name", ["ring", "recursive_doubling", "hierarchical(levels=2x2)"])
def test_the_outline_on_several_hosts(name: str) -> None:
    """In a ring some rank of a host talks to another host in every step, though a block only sometimes crosses."""
    a = lookup(C.ALL_REDUCE, name)
    walk, outline = Walk(a, 4, hosts=HOSTS), Outline(a, 4, steps(a, 4), HOSTS)
    assert outline.leaving == sum(walk.leaving[:2])
    far = {"far_alpha": 2e-5, "far_overhead": 5e-6, "far_beta": 1e-9}
    for nbytes in (64, 1 << 16, 1 << 20):
        runs = one(nbytes / a.blocks(4), 1, 4, **TYPICAL, **far)
        assert 0.55 < took(outline, runs) / took(walk, runs) < 2


def test_the_outline_shares_few_cores() -> None:
    a = lookup(C.ALL_REDUCE, "ring")
    outline = Outline(a, 8, steps(a, 8))
    runs = one(1 << 16, **TYPICAL)
    assert took(outline, runs, [2]) > 2 * took(outline, runs, [8])
