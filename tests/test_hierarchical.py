"""Hierarchical schedules: compositions replayed, what crosses between groups counted, some of them run on data."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abccl.algorithms import (
    Algorithm,
    Collective,
    Counts,
    Program,
    Restriction,
    algorithm,
    algorithms,
    check_counts,
    hierarchical,
    lookup,
    measured,
    recv,
    registry,
    replay,
    send,
)
from abccl.algorithms.groups import Levels, grouped, square, written
from abccl.algorithms.plan import lower
from abccl.errors import ArgumentError, ScheduleError, UnknownAlgorithm
from abccl.transports.inproc import inproc
from abccl.transports.trial import Case, Trial

KNOWN = [(c, False) for c in Collective if "hierarchical" in algorithms(c)] + [(Collective.ALL_REDUCE, True)]
IDS = [f"{c.value}{'-leaders' if leaders else ''}" for c, leaders in KNOWN]
each_way = pytest.mark.parametrize(("collective", "leaders"), KNOWN, ids=IDS)

SHAPES = [
    "4x2",
    "3+2",
    "2+1+1",
    "5",
    "1+1",
    "1",
    "8+1",
    "3+2:cyclic",
    "2+1+2:cyclic",
    "2x2:0.3.1.2",
    "3x3:8.1.5.2.0.7.3.6.4",
    "5+6+7",
    "2x2x2",
    "2x2x2:cyclic",
    "(2+2)+(2+1)",
    "(3+1)+(2+2+1)+(1)",
    "(2x2)+3",
    "(2x2)+2",
    "2x2x2x2",
]


def inner_of(collective: Collective, leaders: bool) -> list[str]:
    """All that may run below the top."""
    if collective is not Collective.ALL_REDUCE:
        return plain(collective)
    up, down = (
        (Collective.REDUCE, Collective.BROADCAST) if leaders else (Collective.REDUCE_SCATTER, Collective.ALL_GATHER)
    )
    return [name for name in plain(up) if name in algorithms(down)]


def plain(collective: Collective) -> list[str]:
    return [name for name in algorithms(collective) if not name.startswith("hierarchical")]


def prove(a: Algorithm, size: int) -> None:
    """Replay with every root."""
    for root in range(size if a.collective.rooted else 1):
        run = replay(a, size, root)
        if root == 0:
            check_counts(run)


def crossing(a: Algorithm, of: Counter[str] | None = None) -> dict[int, Fraction]:
    """For each top group the part of the whole that it sends to the others; the messages are counted in `of`."""
    top = grouped(str(dict(a.parameters)["levels"]))
    run = replay(a, len(top.ranks))
    sent = dict.fromkeys(range(len(top.children)), Fraction(0))
    for t in run.transfers:
        if top.child_of[t.source] != top.child_of[t.destination]:
            sent[top.child_of[t.source]] += Fraction(len(t.blocks), run.blocks)
            if of is not None:
                of["messages"] += 1
    return sent


# ---- the groups in writing


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("3+2", [[0, 1, 2], [3, 4]]),
        ("3x2", [[0, 1], [2, 3], [4, 5]]),
        ("3", [[0, 1, 2]]),
        ("1", [[0]]),
        ("2x2+1", [[0, 1], [2, 3], [4]]),
        ("2x2x2", [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        ("(2+1)+(1+2)", [[[0, 1], [2]], [[3], [4, 5]]]),
        ("(2x2)+3", [[[0, 1], [2, 3]], [4, 5, 6]]),
        ("(2+1)", [[[0, 1], [2]]]),
        ("((2))+(2)+2", [[[[0, 1]]], [[2, 3]], [4, 5]]),
        ("2x(2+1)", [[[0, 1], [2]], [[3, 4], [5]]]),
        ("2x2x(1+2)+(1+2)", [[[[0], [1, 2]], [[3], [4, 5]]], [[[6], [7, 8]], [[9], [10, 11]]], [[12], [13, 14]]]),
        ("2x(2x1+2)+2x1", [[[0], [1], [2, 3]], [[4], [5], [6, 7]], [8], [9]]),
        ("3+2:cyclic", [[0, 2, 4], [1, 3]]),
        ("1+3+2:cyclic", [[0], [1, 3, 5], [2, 4]]),
        ("2x2x2:cyclic", [[[0, 4], [1, 5]], [[2, 6], [3, 7]]]),
        ("3+2:2-4.0-1", [[2, 3, 4], [0, 1]]),
        ("2x2:3.0.2.1", [[3, 0], [2, 1]]),
    ],
)
def test_groups_are_written_and_read(text: str, levels: Levels) -> None:
    assert written(levels) == text
    assert grouped(text).levels == levels


def test_other_spellings_are_read() -> None:
    assert grouped("1+1x2").levels == grouped(" 1 + 2 ").levels == [[0], [1, 2]]
    assert grouped("(2+2)+(2x2)").levels == grouped("2x2x2").levels == grouped("2x(2x2)").levels
    assert grouped("2x1x2").levels == [[[0, 1]], [[2, 3]]]
    assert grouped("2+2:0.2.1.3").levels == grouped("2x2:cyclic").levels
    assert written(np.arange(6).reshape(3, 2)) == "3x2"  # type: ignore[arg-type]
    assert written(((0, 1), range(2, 5))) == "2+3"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3+",
        "a",
        "3*2",
        "0x2",
        "2+0",
        "(2+2",
        "2+2)",
        "()",
        "2x",
        "x2",
        "(2)x2",
        "2+2:",
        "2+2:x",
        "2+2:0.1.2",
        "2+2:0.1.1.2",
    ],
)
def test_what_are_no_groups_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="wants|do not match"):
        grouped(text)
    with pytest.raises(ArgumentError, match="levels"):
        hierarchical(Collective.BROADCAST, text)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([], "one at least"),
        ([0, 1, 2], r"as in \[\[0, 1, 2\], \[3, 4\]\]"),
        (3, r"as in \[\[0, 1, 2\], \[3, 4\]\]"),
        ([[0, 1], []], "one at least"),
        ([[0, 1], 2], "either ranks or groups"),
        ([[0, "1"]], "there is '1' in it"),
        ([[0, 1], [1, 2]], "each of the ranks 0 to 3 once"),
        ([[1, 2]], "each of the ranks 0 to 1 once"),
    ],
)
def test_what_are_no_levels_is_refused(levels: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        hierarchical(Collective.ALL_REDUCE, levels)


def test_the_levels_for_any_number_of_ranks() -> None:
    assert [square(size) for size in (1, 2, 3, 4, 5, 7, 9, 12)] == [
        "1", "2", "2+1", "2x2", "3+2", "2x3+1", "3x3", "3x4"
    ]  # fmt: skip
    for size in range(1, 200):
        assert len(grouped(square(size)).ranks) == size


# ---- the proof


@each_way
@pytest.mark.parametrize("levels", SHAPES)
def test_every_pair_of_algorithms_composes(collective: Collective, leaders: bool, levels: str) -> None:
    """All pairs for few ranks, some for more, other ones with other groups; with every root."""
    size, refused = len(grouped(levels).ranks), 0
    pairs = list(itertools.product(inner_of(collective, leaders), plain(collective)))
    if size > 5:
        pairs = random.Random(levels).sample(pairs, min(10, len(pairs)))
    for inner, outer in pairs:
        a = hierarchical(collective, levels, inner, outer, leaders)
        if a.refusal(size):
            refused += 1
        else:
            prove(a, size)
    assert refused < len(pairs) / 2


@each_way
def test_compositions_of_compositions(collective: Collective, leaders: bool) -> None:
    for levels in ("4+3", "2x2x3:cyclic"):
        size = len(grouped(levels).ranks)
        prove(hierarchical(collective, levels, outer="hierarchical", leaders=leaders), size)
        prove(hierarchical(collective, levels, inner="hierarchical", leaders=leaders), size)


def test_each_level_may_have_an_algorithm_of_its_own() -> None:
    a = hierarchical(Collective.ALL_REDUCE, "2x2x4", ["tree", "ring"], "recursive_doubling")
    assert a.name == "hierarchical(levels=2x2x4,inner=tree/ring,outer=recursive_doubling)"
    prove(a, 16)
    program = a.program(0, 16)
    assert [m.peer for m in program[0]] == [1, 3]  # the ring of 0, 1, 2, 3
    assert len(replay(a, 16).programs[0]) == 3 + 2 + 1 + 2 + 3
    deep = hierarchical(Collective.ALL_GATHER, "2x2x2x2", "ring/direct/tree")
    prove(deep, 16)
    with pytest.raises(
        ArgumentError, match=r"inner=ring/tree names 2 algorithms, and there are 1 levels below the top"
    ):
        hierarchical(Collective.ALL_REDUCE, "3+2", ["ring", "tree"]).refusal(5)


@st.composite
def nested(draw: st.DrawFn, ranks: list[int], height: int) -> Levels:
    """A random partition of the ranks."""
    if height == 0:
        return ranks
    parts = draw(st.integers(1, min(4, len(ranks))))
    cuts = (
        sorted(draw(st.sets(st.integers(1, len(ranks) - 1), min_size=parts - 1, max_size=parts - 1)))
        if parts > 1
        else []
    )
    pieces = [ranks[a:b] for a, b in itertools.pairwise([0, *cuts, len(ranks)])]
    below = height - 1 if draw(st.integers(0, 3)) else 0
    return [draw(nested(piece, below if height > 1 else 0)) for piece in pieces]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_groups_compose(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 13), "size")
    order = data.draw(st.permutations(range(size)), "order")
    levels = data.draw(nested(list(order), data.draw(st.integers(1, 3), "height")), "levels")
    text = written(levels)
    assert grouped(text).levels == levels
    collective, leaders = data.draw(st.sampled_from(KNOWN), "collective")
    inner = data.draw(st.sampled_from(inner_of(collective, leaders)), "inner")
    outer = data.draw(st.sampled_from(plain(collective)), "outer")
    a = hierarchical(collective, levels, inner, outer, leaders)
    if not a.refusal(size):
        prove(a, size)


def test_ranks_that_would_fold_in_different_orders_are_refused() -> None:
    """Where groups lie in another order for each slice, a butterfly's pairs fold differently; a ring folds once."""
    levels = [[4, 1], [5, 6], [7, 2], [0, 3]]
    butterfly = hierarchical(Collective.ALL_REDUCE, levels, outer="recursive_doubling")
    assert butterfly.refusal(8) == (
        "another outer than recursive_doubling, whose ranks would not all fold in the same order with "
        "levels=4x2:4.1.5-7.2.0.3"
    )
    with pytest.raises(ArgumentError, match="wants another outer than recursive_doubling"):
        replay(butterfly, 8)
    with pytest.raises(ScheduleError, match="in different orders, so their bits differ"):
        replay(unrestricted(butterfly), 8)
    for outer in ("ring", "two_shot", "direct", "tree", "rabenseifner"):
        prove(hierarchical(Collective.ALL_REDUCE, levels, outer=outer), 8)
    shuffle, refused = list(range(12)), 0
    for seed in range(60):
        random.Random(seed).shuffle(shuffle)
        a = hierarchical(
            Collective.ALL_REDUCE, [shuffle[i : i + 3] for i in range(0, 12, 3)], outer="recursive_doubling"
        )
        if a.refusal(12):
            refused += 1
            with pytest.raises(ScheduleError, match="in different orders"):
                replay(unrestricted(a), 12)
        else:
            replay(a, 12)
    assert 0 < refused < 60


def test_algorithms_that_do_not_run_on_groups_of_these_lengths_are_refused(private_registry: None) -> None:
    @algorithm(Collective.BROADCAST, restrictions=[Restriction("an even number of ranks", lambda size: size % 2 == 0)])
    def even_broadcast(rank: int, size: int) -> Program:
        yield [send(peer, 0) for peer in range(1, size)] if rank == 0 else [recv(0, 0)]

    prove(hierarchical(Collective.BROADCAST, "3x4", "even"), 12)
    prove(hierarchical(Collective.BROADCAST, "4+1", "even"), 5)  # one rank by itself needs no algorithm
    a = hierarchical(Collective.BROADCAST, "3+2", "even")
    assert a.refusal(5) == "groups on which inner=even and outer=ring run, other than levels=3+2"
    assert hierarchical(Collective.BROADCAST, "3x4", outer="even").refusal(12)


def test_another_number_of_ranks_is_refused() -> None:
    a = hierarchical(Collective.ALL_TO_ALL, "3+2")
    with pytest.raises(ArgumentError, match="wants as many ranks as levels=3.2 has, and there are 6"):
        replay(a, 6)


def test_unknown_algorithms_bring_near_names() -> None:
    with pytest.raises(UnknownAlgorithm, match=r"no all_gather algorithm is called 'rign': did you mean ring\?"):
        hierarchical(Collective.ALL_GATHER, "3+2", outer="rign").refusal(5)
    with pytest.raises(UnknownAlgorithm, match="no gather algorithm is called 'hierarchical'"):
        hierarchical(Collective.GATHER, "3+2")


def test_a_redefined_algorithm_is_used_anew(private_registry: None) -> None:
    def define(peers: int) -> None:
        @algorithm(Collective.BROADCAST)
        def mine_broadcast(rank: int, size: int) -> Program:
            yield [send(peer, 0) for peer in range(1, peers)] if rank == 0 else [recv(0, 0)]

    define(1)
    a = hierarchical(Collective.BROADCAST, "2x2", outer="mine", inner="tree")
    with pytest.raises(ScheduleError, match="deadlock"):
        replay(a, 4)
    define(2)
    replay(a, 4)


# ---- what is declared


def test_the_name_tells_all_that_differs() -> None:
    a = hierarchical(Collective.ALL_REDUCE, [[0, 2, 4], [1, 3]], "ring", "knomial(radix=3)")
    assert a.name == "hierarchical(levels=3+2:cyclic,inner=ring,outer=knomial(radix=3))"
    assert (
        lookup(Collective.ALL_REDUCE, a.name)
        is a
        is hierarchical(Collective.ALL_REDUCE, "3+2:cyclic", "ring", "knomial(radix=3)")
    )
    leaders = hierarchical(Collective.ALL_REDUCE, "3+2", leaders=True)
    assert leaders.name == "hierarchical_leaders(levels=3+2)"


@pytest.mark.parametrize(
    ("collective", "levels", "wanted"),
    [
        ("all_reduce", "4x2", Counts(8, Fraction(1, 2) * 2 + Fraction(3, 4), Fraction(1, 2) + Fraction(3, 8))),
        ("all_reduce", "2x4", Counts(4, Fraction(3, 4) * 2 + Fraction(1, 4), Fraction(3, 4) + Fraction(1, 8))),
        ("all_reduce", "2x2x2", Counts(6, 1 + Fraction(1, 2) + Fraction(1, 4), Fraction(7, 8))),
        ("reduce_scatter", "4x2", Counts(4, Fraction(7, 8), Fraction(7, 8))),
        ("all_gather", "2x2x2", Counts(3, Fraction(7, 8), Fraction(0))),
        ("all_to_all", "4x2", Counts(4, Fraction(1, 2) + Fraction(3, 4), Fraction(0))),
        ("barrier", "4x2", Counts(3, Fraction(0), Fraction(0))),
    ],
)
def test_counts_of_alike_groups_are_known(collective: str, levels: str, wanted: Counts) -> None:
    a = hierarchical(Collective(collective), levels)
    assert a.counts is not None and a.counts(8) == wanted == measured(replay(a, 8))


def test_counts_are_left_open_where_phases_overlap_or_groups_differ() -> None:
    for levels, inner in (("3+2", "ring"), ("2x3", "tree")):
        a = hierarchical(Collective.REDUCE_SCATTER, levels, inner)
        size = len(grouped(levels).ranks)
        assert a.counts is not None and a.counts(size) is None
        check_counts(replay(a, size))
    outside = hierarchical(Collective.REDUCE_SCATTER, "3x2", "ring", "tree")
    assert outside.counts is not None and outside.counts(6) == measured(replay(outside, 6))


@pytest.mark.parametrize(
    ("levels", "blocks"),
    [("4x2", 8), ("2x4", 8), ("2x2x2", 8), ("3+2", 12), ("8+7", 28), ("7x8+7", 8 * 14), ("5+6+7", 36)],
)
def test_a_vector_is_cut_into_few_slices(levels: str, blocks: int) -> None:
    """Groups among whom slices come out even, or nearly so, times the blocks of the ring between the groups."""
    assert hierarchical(Collective.ALL_REDUCE, levels).blocks(len(grouped(levels).ranks)) == blocks


@each_way
@pytest.mark.parametrize("levels", ["64x8", "63x8+7", "8x8x8", "1x512", "512x1", "64x8:cyclic"])
def test_lowering_stays_small_for_many_ranks(collective: Collective, leaders: bool, levels: str) -> None:
    size = len(grouped(levels).ranks)
    a = hierarchical(collective, levels, leaders=leaders)
    assert a.refusal(size) is None
    skeleton = lower(a, size - 1, size)
    assert 1 <= skeleton.largest <= a.blocks(size)
    assert skeleton.scratch <= a.blocks(size) * (8 if collective is Collective.ALL_TO_ALL else 1)


# ---- what crosses between groups


@pytest.mark.parametrize(("groups", "ranks"), [(2, 2), (4, 2), (3, 4), (2, 5), (5, 3)])
@pytest.mark.parametrize("order", ["", ":cyclic"])
def test_no_more_than_must_crosses_between_alike_groups(groups: int, ranks: int, order: str) -> None:
    levels, others = f"{groups}x{ranks}{order}", Fraction(groups - 1, groups)
    for outer in ("ring", "rabenseifner", "two_shot"):
        assert set(crossing(hierarchical(Collective.ALL_REDUCE, levels, outer=outer)).values()) == {2 * others}
    for collective in (Collective.REDUCE_SCATTER, Collective.ALL_GATHER):
        for outer in ("ring", "direct", "recursive_doubling"):
            assert set(crossing(hierarchical(collective, levels, outer=outer)).values()) == {others}
    for outer in ("pairwise", "direct"):
        sent = crossing(hierarchical(Collective.ALL_TO_ALL, levels, outer=outer))
        assert set(sent.values()) == {ranks * others}
    for collective in (Collective.BROADCAST, Collective.REDUCE):
        for outer in plain(collective):
            if outer in ("ring", "chain", "tree", "direct"):
                assert sum(crossing(hierarchical(collective, levels, outer=outer)).values()) == groups - 1


@pytest.mark.parametrize("levels", ["3+2", "2+1+1", "5+3+4", "3+2:cyclic", "(2+2)+(2+1)"])
def test_no_more_than_must_crosses_between_groups_of_unequal_length(levels: str) -> None:
    top = grouped(levels)
    size, lengths = len(top.ranks), [len(child.ranks) for child in top.children]
    others = len(lengths) - 1
    gathered = crossing(hierarchical(Collective.ALL_GATHER, levels, outer="direct"))
    assert list(gathered.values()) == [Fraction(length * others, size) for length in lengths]
    scattered = crossing(hierarchical(Collective.REDUCE_SCATTER, levels, outer="direct"))
    assert list(scattered.values()) == [Fraction(size - length, size) for length in lengths]
    exchanged = crossing(hierarchical(Collective.ALL_TO_ALL, levels))
    assert list(exchanged.values()) == [Fraction(length * (size - length), size) for length in lengths]
    reduced = crossing(hierarchical(Collective.ALL_REDUCE, levels))
    assert set(reduced.values()) == {Fraction(2 * others, len(lengths))}


def test_few_messages_cross_and_the_ranks_of_a_group_share_them() -> None:
    def messages(a: Algorithm) -> int:
        crossing(a, of := Counter[str]())
        return of["messages"]

    assert messages(hierarchical(Collective.ALL_REDUCE, "4x8")) == 4 * 8 * 2 * 3
    assert messages(hierarchical(Collective.ALL_REDUCE, "4x8", leaders=True)) == 4 * 2
    assert messages(hierarchical(Collective.ALL_TO_ALL, "4x8")) == 4 * 8 * 3
    assert messages(hierarchical(Collective.BROADCAST, "4x8", outer="tree")) == 3
    top, sent = grouped("4x8"), Counter[int]()
    for t in replay(hierarchical(Collective.ALL_REDUCE, "4x8"), 32).transfers:
        if top.child_of[t.source] != top.child_of[t.destination]:
            sent[t.source] += len(t.blocks)
    assert set(sent.values()) == {6} and len(sent) == 32


def test_ranks_that_stand_for_a_root_lie_where_it_does() -> None:
    a = hierarchical(Collective.BROADCAST, "3x4", "tree", "direct")
    for root in range(12):
        (first,) = [a.program(rank, 12, root)[0] for rank in range(12) if rank == root]
        assert {m.peer for m in first} == {rank for rank in range(12) if rank % 4 == root % 4 and rank != root}


# ---- data


@pytest.mark.parametrize("levels", ["3+2", "2x2:cyclic", "2+1+1", "2x2x2", "(2+1)+(1+2):5.3.1.0.2.4"])
@each_way
def test_data_arrive(collective: Collective, leaders: bool, levels: str) -> None:
    size = len(grouped(levels).ranks)
    draw = random.Random(f"{collective.value} {levels}")
    for count in (0, 1, 7, 1000):
        a = hierarchical(
            collective, levels, draw.choice(inner_of(collective, leaders)), draw.choice(plain(collective)), leaders
        )
        if a.refusal(size):
            continue
        root = draw.randrange(size) if collective.rooted else 0
        case = Case(a, size, count, root=root, segment=draw.choice([None, 16]), lanes=2, uneven=draw.random() < 0.5)
        trials = [Trial(transport, case) for transport in inproc(size)]
        executions = [trial.start() for trial in trials]
        while executions:
            executions = [execution for execution in executions if not execution.progress()]
        for trial in trials:
            trial.verify()


def unrestricted(a: Algorithm) -> Algorithm:
    """The algorithm on any number of ranks and groups."""
    return dataclasses.replace(a, restrictions=())


@pytest.fixture
def private_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone when it ends."""
    copies = {collective: dict(known) for collective, known in registry._registry.items()}
    monkeypatch.setattr(registry, "_registry", copies)
