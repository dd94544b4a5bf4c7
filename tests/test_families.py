"""Swing, Bine trees, PAT and neighbour exchange: what sets each of them apart."""

from __future__ import annotations

from fractions import Fraction

import pytest

from abccl.algorithms import (
    Algorithm,
    Collective,
    Counts,
    Program,
    Send,
    check_counts,
    counts,
    lookup,
    recv,
    replay,
    send,
)
from abccl.algorithms.swing import edges, partner
from abccl.errors import ScheduleError


def sends(a: Algorithm, rank: int, size: int) -> list[tuple[int, int]]:
    """To whom, and how many blocks, step by step."""
    return [(m.peer, len(m.blocks)) for step in a.program(rank, size) for m in step if isinstance(m, Send)]


def test_partners_swing() -> None:
    assert [partner(0, 64, step) for step in range(6)] == [1, 63, 3, 59, 11, 43]
    assert [partner(7, 64, step) for step in range(6)] == [6, 8, 4, 12, 60, 28]
    for size in range(2, 65, 2):
        for step in range(size.bit_length()):
            assert all(partner(partner(rank, size, step), size, step) == rank for rank in range(size))


def test_swinging_reaches_every_even_number_of_ranks_once() -> None:
    for size in range(2, 400, 2):
        reached = [other for step in edges(size) for _, other in step]
        assert sorted(reached) == list(range(1, size))


def test_swing_sends_much_near_and_little_far() -> None:
    a = lookup(Collective.REDUCE_SCATTER, "swing")
    assert sends(a, 0, 16) == [(1, 8), (15, 4), (3, 2), (11, 1)]
    assert sends(a, 5, 16) == [(4, 8), (6, 4), (2, 2), (10, 1)]


def test_swing_with_whole_vectors_would_give_ranks_different_bits() -> None:
    """Why the paper's latency-optimal version is not in the library."""

    def whole(rank: int, size: int) -> Program:
        for step in range(size.bit_length() - 1):
            other = partner(rank, size, step)
            yield send(other, 0), recv(other, 0, reduce=True)

    a = Algorithm("whole", Collective.ALL_REDUCE, whole, lambda size: 1, lambda size: 1)
    replay(a, 2)
    with pytest.raises(ScheduleError, match="in different orders, so their bits differ"):
        replay(a, 8)


def test_bine_edges_are_shorter_than_binomial_ones() -> None:
    def reach(name: str, size: int) -> int:
        run = replay(lookup(Collective.BROADCAST, name), size)
        return sum(min(d, size - d) for t in run.transfers for d in [(t.destination - t.source) % size])

    assert reach("bine", 64) < reach("tree", 64)
    assert [m for m, _ in sends(lookup(Collective.BROADCAST, "bine"), 0, 16)] == [11, 3, 15, 1]
    assert [m for m, _ in sends(lookup(Collective.BROADCAST, "bine"), 0, 17)] == [11, 16, 3, 15, 1]


@pytest.mark.parametrize(
    ("collective", "name", "size", "wanted"),
    [
        ("all_reduce", "swing", 16, Counts(8, Fraction(15, 8), Fraction(15, 16))),
        ("all_gather", "swing", 6, Counts(3, Fraction(5, 6), Fraction(0))),
        ("all_gather", "swing", 17, Counts(4, Fraction(16, 17), Fraction(0))),
        ("broadcast", "bine", 16, Counts(4, Fraction(4), Fraction(0))),
        ("broadcast", "bine", 6, Counts(3, Fraction(3), Fraction(0))),
        ("broadcast", "bine", 10, Counts(4, Fraction(3), Fraction(0))),
        ("reduce", "bine", 16, Counts(4, Fraction(1), Fraction(4))),
        ("gather", "bine", 12, Counts(3, Fraction(1, 2), Fraction(0))),
        ("all_gather", "pat", 16, Counts(4, Fraction(15, 16), Fraction(0))),
        ("all_gather", "pat(span=4)", 16, Counts(5, Fraction(15, 16), Fraction(0))),
        ("reduce_scatter", "pat(span=16)", 16, Counts(15, Fraction(15, 16), Fraction(15, 16))),
        ("all_gather", "neighbor_exchange", 10, Counts(5, Fraction(9, 10), Fraction(0))),
    ],
)
def test_counts_known_by_hand(collective: str, name: str, size: int, wanted: Counts) -> None:
    assert counts(lookup(Collective(collective), name), size) == wanted


def test_pat_sends_little_far_and_much_near() -> None:
    a = lookup(Collective.ALL_GATHER, "pat")
    assert sends(a, 3, 16) == [(11, 1), (7, 2), (5, 4), (4, 8)]
    assert sends(a.bind(span=4), 3, 16) == [(11, 1), (7, 2), (5, 4), (4, 4), (4, 4)]
    assert sends(a, 0, 5) == [(4, 1), (2, 1), (1, 2)]


@pytest.mark.parametrize("collective", [Collective.ALL_GATHER, Collective.REDUCE_SCATTER])
def test_pat_with_every_span(collective: Collective) -> None:
    for span in (2, 4, 8, 16, 32, 64):
        a = lookup(collective, f"pat(span={span})")
        for size in (*range(1, 18), 31, 32, 33, 40, 64):
            check_counts(replay(a, size))


def test_neighbours_are_the_only_peers() -> None:
    a = lookup(Collective.ALL_GATHER, "neighbor_exchange")
    assert sends(a, 0, 8) == [(1, 1), (7, 2), (1, 2), (7, 2)]
    assert [size for size in range(1, 9) if a.refusal(size) is None] == [1, 2, 4, 6, 8]
