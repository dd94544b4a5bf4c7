"""Algorithms with a radix: right, and with exact counts, for every radix; radix 2 is what has its own name."""

from __future__ import annotations

from fractions import Fraction

import pytest

from abccl.algorithms import Algorithm, Collective, Counts, algorithms, check_counts, counts, lookup, replay

RADIX = [a for c in Collective for a in algorithms(c).values() if "radix" in dict(a.parameters)]


@pytest.mark.parametrize("a", RADIX, ids=lambda a: f"{a.collective.value}-{a.name}")
def test_every_radix_is_right_and_counted(a: Algorithm) -> None:
    for radix in range(2, 9):
        for size in (*range(1, 19), 24, 25, 26, 27, 36, 64):
            run = replay(a.bind(radix=radix), size)
            check_counts(run)
            if a.collective.rooted and size < 8:
                for root in range(1, size):
                    assert replay(a.bind(radix=radix), size, root).steps == run.steps


def test_what_there_is_with_a_radix() -> None:
    names = {(a.collective.value, a.name) for a in RADIX}
    for collective in ("broadcast", "reduce", "gather", "scatter", "all_reduce", "all_gather", "reduce_scatter"):
        assert (collective, "knomial") in names
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier"):
        assert (collective, "recursive_multiplying") in names
    assert ("all_reduce", "rabenseifner") in names and ("all_to_all", "bruck") in names


@pytest.mark.parametrize(
    ("with_radix", "plain"), [("knomial", "tree"), ("recursive_multiplying", "recursive_doubling")]
)
def test_radix_two_is_binary(with_radix: str, plain: str) -> None:
    pairs = [(c, lookup(c, f"{with_radix}(2)")) for c in Collective if with_radix in algorithms(c)]
    assert len(pairs) > 4
    for collective, a in pairs:
        for size in (1, 2, 6, 8, 11):
            b = lookup(collective, plain)
            for rank in range(size):
                assert list(map(set, a.program(rank, size))) == list(map(set, b.program(rank, size)))


@pytest.mark.parametrize(
    ("collective", "name", "size", "wanted"),
    [
        ("broadcast", "knomial(3)", 9, Counts(2, Fraction(4), Fraction(0))),
        ("broadcast", "knomial(64)", 64, Counts(1, Fraction(63), Fraction(0))),
        ("reduce", "knomial(4)", 16, Counts(2, Fraction(1), Fraction(6))),
        ("gather", "knomial(4)", 16, Counts(2, Fraction(1, 4), Fraction(0))),
        ("all_reduce", "recursive_multiplying(4)", 16, Counts(2, Fraction(6), Fraction(6))),
        ("all_reduce", "recursive_multiplying(3)", 6, Counts(2, Fraction(3), Fraction(3))),
        ("all_reduce", "recursive_multiplying(3)", 7, Counts(3, Fraction(4), Fraction(4))),
        ("all_reduce", "recursive_multiplying(8)", 11, Counts(3, Fraction(5), Fraction(5))),
        ("all_gather", "recursive_multiplying(3)", 27, Counts(3, Fraction(26, 27), Fraction(0))),
        ("all_reduce", "rabenseifner(4)", 16, Counts(4, Fraction(15, 8), Fraction(15, 16))),
    ],
)
def test_counts_known_by_hand(collective: str, name: str, size: int, wanted: Counts) -> None:
    assert counts(lookup(Collective(collective), name), size) == wanted


def test_a_group_is_folded_in_one_pass() -> None:
    run = replay(lookup(Collective.ALL_REDUCE, "recursive_multiplying(3)"), 9)
    assert {run.expressions.text(value) for value in run.results} == {"(0+1+2)+(3+4+5)+(6+7+8)"}
