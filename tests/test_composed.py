"""Compositions of two algorithms: all pairs replayed, those with a name of their own compared, some run on data."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from abccl.algorithms import (
    Algorithm,
    Collective,
    Counts,
    algorithms,
    check_counts,
    counts,
    lookup,
    replay,
)
from abccl.errors import ArgumentError, UnknownAlgorithm
from abccl.transports.inproc import inproc
from abccl.transports.trial import Case, Trial

COMPOSED = [a for c in Collective for a in algorithms(c).values() if a.name.startswith("composed")]
each = pytest.mark.parametrize("a", COMPOSED, ids=lambda a: f"{a.collective.value}-{a.name}")


def bound(a: Algorithm) -> list[Algorithm]:
    """All compositions of the library's algorithms."""
    kinds = list(a.declared)
    choices = [[name for name in algorithms(Collective(kind)) if not name.startswith("composed")] for kind in kinds]
    return [a.bind(**dict(zip(kinds, names))) for names in itertools.product(*choices)]


def test_what_is_composed() -> None:
    assert {(a.collective.value, a.name, *a.declared) for a in COMPOSED} == {
        ("all_reduce", "composed", "reduce_scatter", "all_gather"),
        ("all_reduce", "composed_rooted", "reduce", "broadcast"),
        ("reduce", "composed", "reduce_scatter", "gather"),
        ("broadcast", "composed", "scatter", "all_gather"),
        ("all_gather", "composed", "gather", "broadcast"),
        ("reduce_scatter", "composed", "reduce", "scatter"),
    }


@each
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 8])
def test_every_pair_of_algorithms_composes(a: Algorithm, size: int) -> None:
    """With every root; few pairs are refused."""
    pairs = bound(a)
    served = [pair for pair in pairs if pair.refusal(size) is None]
    assert len(served) > len(pairs) * 3 // 5
    for pair in served:
        for root in range(size if a.collective.rooted else 1):
            run = replay(pair, size, root)
            if root == 0:
                check_counts(run)


@each
def test_compositions_of_compositions(a: Algorithm) -> None:
    for kind in a.declared:
        if "composed" in algorithms(Collective(kind)):
            check_counts(replay(a.bind(**{kind: "composed"}), 6))


@pytest.mark.parametrize(
    ("collective", "name", "composed"),
    [
        ("all_reduce", "ring", "composed(ring, ring)"),
        ("all_reduce", "rabenseifner", "composed(recursive_doubling, recursive_doubling)"),
        ("all_reduce", "rabenseifner(4)", "composed(recursive_multiplying(4), recursive_multiplying(radix=4))"),
        ("all_reduce", "two_shot", "composed(direct, direct)"),
        ("all_reduce", "swing", "composed(swing, swing)"),
        ("all_reduce", "tree", "composed_rooted(tree, tree)"),
        ("all_reduce", "chain", "composed_rooted(chain, chain)"),
        ("all_reduce", "double_tree", "composed_rooted(double_tree, double_tree)"),
        ("all_reduce", "knomial", "composed_rooted(knomial, knomial)"),
        ("broadcast", "scatter_all_gather", "composed(tree, ring)"),
        ("broadcast", "recursive_doubling", "composed(tree, recursive_doubling)"),
        ("broadcast", "recursive_multiplying", "composed(knomial, recursive_multiplying)"),
        ("all_gather", "tree", "composed(tree, tree)"),
        ("reduce_scatter", "tree", "composed(tree, tree)"),
    ],
)
def test_what_has_a_name_of_its_own_is_the_same_schedule(collective: str, name: str, composed: str) -> None:
    named, other = lookup(Collective(collective), name), lookup(Collective(collective), composed)
    for size in (1, 2, 5, 8):
        assert named.blocks(size) == other.blocks(size) and named.largest(size) == other.largest(size)
        for rank in range(size):
            assert named.program(rank, size) == other.program(rank, size)


def test_a_part_with_fewer_blocks_moves_several_at_once() -> None:
    a = lookup(Collective.ALL_REDUCE, "composed_rooted(double_tree, ring)")
    assert (a.blocks(3), a.largest(3)) == (6, 3)
    assert counts(a, 3).folded == counts(lookup(Collective.REDUCE, "double_tree"), 3).folded
    half = lookup(Collective.ALL_GATHER, "composed(broadcast=double_tree)")
    assert half.refusal(6) is None and half.largest(6) == 3
    assert half.refusal(5) == (
        "a multiple of as many ranks as gather=tree and broadcast=double_tree cut the vector into blocks"
    )


def test_groups_of_ranks_stay_where_they_are_whatever_the_root() -> None:
    """Only ranks of one group, or at the same place of their groups, meet in the all_gather."""
    a = lookup(Collective.BROADCAST, "composed(scatter=direct, all_gather=hierarchical(levels=2x3))")
    for root in range(6):
        met = [t for t in replay(a, 6, root).transfers if root not in (t.source, t.destination)]
        assert met and all(t.source // 3 == t.destination // 3 or t.source % 3 == t.destination % 3 for t in met)


def test_counts_are_sums_where_all_ranks_do_alike_in_one_part() -> None:
    def declared(collective: Collective, name: str, size: int) -> Counts | None:
        a = lookup(collective, name)
        assert a.counts is not None
        return a.counts(size)

    assert declared(Collective.ALL_REDUCE, "composed", 8) == Counts(7 + 3, Fraction(7, 4), Fraction(7, 8))
    assert declared(Collective.BROADCAST, "composed", 8) == Counts(2, Fraction(7, 4), Fraction(0))
    assert declared(Collective.REDUCE, "composed", 8) == Counts(6, Fraction(7, 8) + Fraction(1, 2), Fraction(7, 8))
    assert declared(Collective.ALL_REDUCE, "composed_rooted", 8) is None
    assert counts(lookup(Collective.ALL_REDUCE, "composed_rooted"), 8) == Counts(10, Fraction(2), Fraction(3))


def test_what_does_not_compose_is_refused() -> None:
    a = lookup(Collective.ALL_REDUCE, "composed(all_gather=neighbor_exchange)")
    wants = "a number of ranks that reduce_scatter=ring and all_gather=neighbor_exchange run on"
    assert (a.refusal(6), a.refusal(5)) == (None, wants)
    with pytest.raises(ArgumentError, match=f"wants {wants}, and there are 5"):
        replay(a, 5)
    with pytest.raises(UnknownAlgorithm, match=r"no reduce_scatter algorithm is called 'rign': did you mean ring\?"):
        lookup(Collective.ALL_REDUCE, "composed(rign)").refusal(4)
    with pytest.raises(UnknownAlgorithm, match="no parameter is called broadcast"):
        lookup(Collective.ALL_REDUCE, "composed(broadcast=tree)")


@each
def test_data_arrive(a: Algorithm) -> None:
    """What the defaults do is tested with those of all algorithms; here are other pairs, of unequal parts."""
    draw = random.Random(a.collective.value)
    for size in (2, 3, 4, 6):
        pair = draw.choice([pair for pair in bound(a) if pair.refusal(size) is None])
        root = draw.randrange(size) if a.collective.rooted else 0
        case = Case(pair, size, draw.choice([1, 7, 1000]), root=root, segment=16, lanes=2, uneven=True)
        trials = [Trial(transport, case) for transport in inproc(size)]
        running = [trial.start() for trial in trials]
        while running := [execution for execution in running if not execution.progress()]:
            pass
        for trial in trials:
            trial.verify()
