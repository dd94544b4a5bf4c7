"""Counts, measured and declared (of the whole library: test_replay.py), and the time they take."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest

from abccl.algorithms import Collective, Counts, Link, algorithms, check_counts, counts, lookup, replay
from abccl.errors import ScheduleError


@pytest.mark.parametrize(
    ("collective", "name", "size", "wanted"),
    [
        ("all_reduce", "ring", 4, Counts(6, Fraction(3, 2), Fraction(3, 4))),
        ("all_reduce", "rabenseifner", 8, Counts(6, Fraction(7, 4), Fraction(7, 8))),
        ("all_reduce", "recursive_doubling", 5, Counts(4, Fraction(3), Fraction(3))),
        ("all_reduce", "direct", 4, Counts(1, Fraction(3), Fraction(3))),
        ("all_reduce", "double_tree", 8, Counts(6, Fraction(2), Fraction(1))),
        ("broadcast", "chain", 5, Counts(4, Fraction(1), Fraction(0))),
        ("broadcast", "tree", 5, Counts(3, Fraction(3), Fraction(0))),
        ("reduce", "tree", 5, Counts(2, Fraction(1), Fraction(3))),
        ("all_to_all", "recursive_doubling", 8, Counts(3, Fraction(3, 2), Fraction(0))),
        ("all_to_all", "bruck", 16, Counts(2, Fraction(3, 2), Fraction(0))),
        ("barrier", "recursive_doubling", 6, Counts(3, Fraction(0), Fraction(0))),
    ],
)
def test_counts_known_from_the_literature(collective: str, name: str, size: int, wanted: Counts) -> None:
    assert counts(lookup(Collective(collective), name), size) == wanted


def test_a_wrong_closed_form_is_refused() -> None:
    ring = lookup(Collective.ALL_GATHER, "ring")
    wrong = dataclasses.replace(ring, counts=lambda p: Counts(p, Fraction(1), Fraction(0)))
    with pytest.raises(ScheduleError, match=r"3 ranks: the schedule has 2 steps, 2/3 .* are 3 steps, 1 sent"):
        check_counts(replay(wrong, 3))
    check_counts(replay(dataclasses.replace(ring, counts=None), 3))


def test_time_is_alpha_and_beta_and_gamma() -> None:
    link = Link(alpha=1e-6, beta=1e-9, gamma=1e-10)
    assert link.seconds(Counts(6, Fraction(3, 2), Fraction(3, 4)), 1000) == pytest.approx(6e-6 + 1.5e-6 + 0.075e-6)


def test_the_model_prefers_few_steps_for_small_and_few_bytes_for_large_vectors() -> None:
    link = Link(alpha=1e-6, beta=1e-10, gamma=1e-10)

    def best(size_in_bytes: int) -> str:
        known = algorithms(Collective.ALL_REDUCE)
        return min(("ring", "recursive_doubling"), key=lambda n: link.seconds(counts(known[n], 8), size_in_bytes))

    assert best(8) == "recursive_doubling"
    assert best(1 << 26) == "ring"
