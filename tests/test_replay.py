"""Replay: the whole library passes, and each kind of mistake is refused with a message that says where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from abccl.algorithms import Algorithm, Collective, Message, algorithms, lookup, measured, recv, replay, send
from abccl.errors import ArgumentError, ScheduleError
from abccl.tools.verify import EVERY_ROOT, roots

EVERY = [a for c in Collective for a in algorithms(c).values()]
SIZES = (*range(1, 41), 64)
OPEN = ("hierarchical", "composed")
"""Compositions may leave their counts open."""


@pytest.mark.parametrize("a", EVERY, ids=lambda a: f"{a.collective.value}-{a.name}")
def test_the_library_is_right(a: Algorithm) -> None:
    """For 1 to 40 ranks and 64, every root up to 17 ranks, then rank 0 and another; `abccl verify` tries more. And it
    has exactly the declared counts."""
    assert a.counts is not None
    for size in (size for size in SIZES if a.refusal(size) is None):
        tried = roots(a, size)
        for root in tried if size <= EVERY_ROOT else {0, tried[size % len(tried)]}:
            run = replay(a, size, root)
            if root == 0:
                declared = a.counts(size)
                assert measured(run) == declared or (declared is None and a.name.startswith(OPEN)), f"{size} ranks"


def made(collective: Collective, *programs: list[Any], blocks: int = 0, largest: int = 1) -> Algorithm:
    """An algorithm of these programs, one per rank."""
    parts: Callable[[int], int] = (lambda size: blocks) if blocks else (lambda size: size if not collective.cut else 1)
    return Algorithm("mine", collective, lambda rank, size: programs[rank], parts, lambda size: largest)


def refused(a: Algorithm, size: int, *words: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        replay(a, size)
    for word in (f"{a.collective.value} mine, {size} ranks: ", *words):
        assert word in str(caught.value)


def swap(peer: int, *blocks: Any, reduce: bool = True) -> tuple[Message, Message]:
    return send(peer, *blocks), recv(peer, *blocks, reduce=reduce)


def test_history_tells_what_was_held_when() -> None:
    run = replay(lookup(Collective.ALL_REDUCE, "tree"), 3)
    assert run.steps == 3
    start, one, two, end = run.history()
    assert [run.expressions.text(value) for (value,) in (held.values() for held in start)] == ["0", "1", "2"]
    assert run.expressions.ranks(one[0][0]) == [0, 1, 2]
    assert two[1] == run.before[1]
    assert len({tuple(held.items()) for held in end}) == 1
    assert len(run.transfers) == 4


def test_a_fold_of_many_is_one_expression_in_rank_order() -> None:
    run = replay(lookup(Collective.ALL_REDUCE, "direct"), 4)
    assert {run.expressions.text(value) for held in list(run.history())[1] for value in held.values()} == {"0+1+2+3"}


def test_missing_contribution() -> None:
    a = made(Collective.ALL_REDUCE, [swap(1, 0)], [swap(0, 0)], [])
    refused(a, 3, "at the end rank 0's block 0 lacks rank 2", "rank 0 changed it last in step 1")


def test_contribution_counted_twice_names_the_place() -> None:
    a = made(Collective.ALL_REDUCE, [swap(1, 0), swap(1, 0)], [swap(0, 0), swap(0, 0)])
    refused(a, 2, "counted twice", "folded at rank 0, step 2, block 0")


def test_a_double_count_that_reaches_no_result_is_no_mistake() -> None:
    """Rank 0 spoils a block that it has sent already, and that is rank 1's to keep."""
    exchange = [(send(1 - rank, 1 - rank), recv(1 - rank, rank, reduce=True)) for rank in range(2)]
    twice = [recv(1, 1, reduce=True)] * 2
    replay(made(Collective.REDUCE_SCATTER, [exchange[0], *twice], [exchange[1], send(0, 1), send(0, 1)]), 2)


UNEQUAL = (
    [(send(1, 0), recv(1, 0, reduce=True)), recv(2, 0, reduce=True), send(2, 0)],
    [send(0, 0), recv(2, 0, reduce=True), recv(0, 0, reduce=True)],
    [send(1, 0), send(0, 0), recv(0, 0)],
)


def test_unequal_reduction_orders() -> None:
    a = made(Collective.ALL_REDUCE, *UNEQUAL)
    refused(a, 3, "ranks 0 and 1 reduce block 0 in different orders", "(0+1)+2 and 0+(1+2)")


def test_the_order_of_two_counts() -> None:
    """min(0.0, -0.0) is -0.0, min(-0.0, 0.0) is 0.0."""
    programs = (
        [recv(1, 0, reduce=True), send(2, 0), swap(3, 0)],
        [send(0, 0), recv(3, 0), swap(2, 0)],
        [send(3, 0), recv(0, 0), swap(1, 0)],
        [recv(2, 0, reduce=True), send(1, 0), swap(0, 0)],
    )
    a = made(Collective.ALL_REDUCE, *programs)
    refused(a, 4, "ranks 0 and 1 reduce block 0 in different orders", "(0+1)+(2+3) and (2+3)+(0+1)")


def test_block_not_held() -> None:
    a = made(Collective.BROADCAST, [recv(1, 0)], [send(0, 0)])
    refused(a, 2, "rank 1, step 1: send block 0 to rank 0, but it does not hold block 0 then")


def test_block_never_arrives() -> None:
    a = made(Collective.BROADCAST, [send(1, 0)], [recv(0, 0)], [])
    refused(a, 3, "at the end rank 2 does not hold block 0, wanted from rank 0")


def test_names_differ() -> None:
    a = made(Collective.ALL_REDUCE, [send(1, 0), recv(1, 1)], [recv(0, 1), send(0, 1)], blocks=2)
    refused(a, 2, "rank 1, step 1 wants block 1 from rank 0, which sends block 0 (its step 1)")


def test_deadlock_names_all_who_wait() -> None:
    a = made(Collective.ALL_REDUCE, [send(1, 0), recv(1, 0)], [send(0, 0), recv(0, 0)])
    refused(
        a,
        2,
        "deadlock when a send waits for its receive",
        "rank 0 waits at step 1 to send block 0 to rank 1 (which is at step 1)",
        "rank 1 waits at step 1 to send block 0 to rank 0",
    )


def test_unread_message() -> None:
    a = made(Collective.BROADCAST, [send(1, 0), send(1, 0)], [recv(0, 0)])
    refused(a, 2, "rank 0 waits at step 2 to send block 0 to rank 1 (which has ended)")


def test_deadlock_for_want_of_room_only() -> None:
    a = made(
        Collective.BROADCAST,
        [send(1, 0), (send(1, 0), send(1, 0), send(2, 0))],
        [(recv(0, 0), recv(2)), recv(0, 0), recv(0, 0)],
        [recv(0, 0), send(1)],
    )
    refused(a, 3, "room for 2 unread messages", "rank 0 waits at step 2 for room: send block 0 to rank 1")


def test_deadlock_only_where_messages_are_read_in_place() -> None:
    a = made(
        Collective.ALL_REDUCE,
        [send(1, 0), recv(1, 0), send(2, 0)],
        [(send(0, 0), recv(0, 0, reduce=True), recv(2, 0, reduce=True))],
        [recv(0, 0), send(1, 0)],
    )
    refused(a, 3, "messages per pair that are read in place", "rank 0 waits at step 2 for rank 1 to have read block 0")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ([send(2, 0)], "rank 0, step 1: send block 0 to rank 2, but ranks go from 0 to 1"),
        ([send(0, 0)], "that is to itself"),
        ([(send(1, 0), send(1, 0), send(1, 0))], "is message 3 of the pair"),
        ([(recv(1, 0), recv(1, 0, reduce=True))], "block 0 is received already in this step"),
        ([(recv(1, 0), recv(1, 0))], "block 0 is received already in this step"),
        ([recv(1, 0, 0)], "block 0 is received already in this step"),
        ([("send", 1)], "rank 0, step 1 wants send(...) or recv(...), and there is 'send'"),
        ([5], "the program of rank 0 raised TypeError"),
        (None, "it must yield messages"),
    ],
)
def test_steps_that_break_the_rules(program: Any, words: str) -> None:
    refused(made(Collective.ALL_REDUCE, program, []), 2, words)


def test_folding_where_there_is_no_operator() -> None:
    a = made(Collective.BROADCAST, [send(1, 0)], [recv(0, 0, reduce=True)])
    refused(a, 2, "rank 1, step 1: receive block 0 from rank 0 wants to fold, but broadcast has no operator")


def test_folding_into_nothing() -> None:
    a = made(Collective.ALL_REDUCE, [(send(1, 7))], [recv(0, 7, reduce=True)])
    refused(a, 2, "does not hold block 7")


@pytest.mark.parametrize("declared", [1, 3])
def test_largest_must_be_exact(declared: int) -> None:
    a = made(Collective.ALL_REDUCE, [swap(1, 0, 1)], [swap(0, 0, 1)], blocks=2, largest=declared)
    refused(a, 2, f"has 2 blocks, declared is largest={declared}", "rank 0, step 1")


def test_a_vector_is_cut_into_one_block_or_more() -> None:
    a = Algorithm("mine", Collective.BROADCAST, lambda rank, size: [], lambda size: size - 2, lambda size: 1)
    refused(a, 2, "cut into 0 blocks")


def test_an_exception_in_a_program_says_where() -> None:
    def program(rank: int, size: int) -> Any:
        yield send(1 // rank, 0)

    a = Algorithm("mine", Collective.BROADCAST, program, lambda size: 1, lambda size: 1)
    refused(a, 2, "the program of rank 0 raised ZeroDivisionError", "(test_replay.py, line ")


@pytest.mark.parametrize(("size", "root"), [(0, 0), (3, 3), (3, -1)])
def test_no_such_root(size: int, root: int) -> None:
    with pytest.raises(ArgumentError, match="there is no root"):
        replay(lookup(Collective.BROADCAST, "tree"), size, root)
