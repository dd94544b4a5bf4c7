"""The agreement of survivors, step by step: whoever dies, comes late, is suspected or gives up, no two groups are made.

What happens in a case follows from its seed, which is in the message of a failure.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from simulated_ranks import TIMEOUT, Rank, World, check, in_any_order, run

from abccl.errors import Aborted, TransportError

SEED = int(os.environ.get("ABCCL_TEST_SEED", "0"))
"""Of the first case."""

CASES = int(os.environ.get("ABCCL_TEST_CASES", "600"))


@contextmanager
def told(*facts: object) -> Iterator[None]:
    """Say what the case was if it fails."""
    try:
        yield
    except Exception as error:
        error.add_note(f"case: {facts}")
        raise


def cases(case: Callable[[random.Random], int], number: int = CASES) -> int:
    """Try a case with so many seeds; the sum of what it counts."""
    total = 0
    for seed in range(SEED, SEED + number):
        with told("ABCCL_TEST_SEED", seed):
            total += case(random.Random(seed))
    return total


def in_turn(preempted: int = -1) -> Callable[[list[Rank]], Rank]:
    """Each rank goes on until it waits, then the next one; but one is interrupted after so many steps of all."""
    state = {"current": 0, "steps": 0}

    def choose(running: list[Rank]) -> Rank:
        now = next((rank for rank in running if rank.rank == state["current"]), None)
        if now is None or now.waits or state["steps"] == preempted:
            later = [rank for rank in running if rank.rank > state["current"]]
            now = (later or running)[0]
            state["current"] = now.rank
        state["steps"] += 1
        return now

    return choose


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_all_remain_where_nobody_is_lost(size: int) -> None:
    world = World(size)
    ranks = [Rank(world, rank) for rank in range(size)]
    run(ranks, in_turn())
    assert [rank.group for rank in ranks] == [tuple(range(size))] * size
    assert check(ranks, world) == set(range(size))


@pytest.mark.parametrize("size", [2, 3])
def test_a_death_at_every_step(size: int) -> None:
    """Of each rank, with a change of ranks at every step before or after it."""
    for victim in range(size):
        for death in range(70):
            for preempted in range(-1, 70 * size, 5 * size + death % 7):
                with told(f"rank {victim} of {size} dies at its step {death}, preempted at {preempted}"):
                    world = World(size)
                    ranks = [Rank(world, rank) for rank in range(size)]
                    run(ranks, in_turn(preempted), [(victim, death)])
                    assert check(ranks, world) == set(range(size)) - world.dead
                    assert world.now < TIMEOUT / 2, "a deadline passed"


def test_deaths_in_any_order() -> None:
    """All who live return, however late they see that others died."""

    def case(rng: random.Random) -> int:
        size = rng.choice([2, 3, 3, 4, 5])
        world = World(size, sees=lambda observer, rank: rng.random() < 0.5)
        ranks = [Rank(world, rank) for rank in range(size)]
        deaths = [(rank, rng.randint(0, 150)) for rank in rng.sample(range(size), rng.randint(0, size - 1))]
        run(ranks, in_any_order(rng), deaths)
        assert check(ranks, world) == set(range(size)) - world.dead
        return len(world.dead)

    assert cases(case) > CASES / 2


def test_suspected_and_late() -> None:
    """Living ranks that are held for lost, and ranks that come at any time: they return with all others, or say why."""

    def case(rng: random.Random) -> int:
        left_out = 0
        size = rng.choice([2, 3, 4, 5])
        chance = rng.choice([0.0, 0.01, 0.1])
        # So many attempts fail at most: the 256 are for real ranks.
        suspects = (rng.random() < chance for _ in range(300))
        world = World(size, sees=lambda *_: rng.random() < 0.5, suspects=lambda *_: next(suspects, False))
        ranks = [Rank(world, rank) for rank in range(size)]
        come = [rng.choice([0.0, 0.0, rng.random() * 3 * TIMEOUT]) for _ in ranks]
        order = in_any_order(rng)

        def choose(running: list[Rank]) -> Rank:
            if rng.random() < 0.001:
                world.now += TIMEOUT
            here = [rank for rank in running if come[rank.rank] <= world.now]
            if not here:
                world.now = min(come[rank.rank] for rank in running)
                here = [rank for rank in running if come[rank.rank] <= world.now]
            return order(here)

        deaths = [(rank, rng.randint(0, 300)) for rank in rng.sample(range(size), rng.randint(0, size - 1))]
        run(ranks, choose, deaths)
        returned = check(ranks, world)
        for rank in ranks:
            if rank.rank not in returned | world.dead:
                assert isinstance(rank.error, Aborted), rank.error
                assert "left out" in str(rank.error)
                left_out += 1
        return left_out

    assert cases(case) > 10


def test_a_rank_that_stands_still_is_left_out() -> None:
    """Wherever it does, and it is told so when it goes on; nobody waits for ever."""

    def case(rng: random.Random) -> int:
        alone = 0
        size = rng.choice([2, 3, 4])
        world = World(size)
        ranks = [Rank(world, rank) for rank in range(size)]
        still = {rank: rng.randint(0, 60) for rank in rng.sample(range(size), rng.randint(1, size - 1))}
        order = in_any_order(rng)

        def choose(running: list[Rank]) -> Rank:
            able = [rank for rank in running if rank.taken < still.get(rank.rank, rank.taken + 1)]
            return order(able or running)

        run(ranks, choose, [(rng.randrange(size), rng.randint(0, 300))])
        returned = check(ranks, world)
        for rank in set(range(size)) - returned - world.dead:
            assert rank in still and "left out" in str(ranks[rank].error)
            alone += 1
        assert world.now < 3 * size * TIMEOUT
        return alone

    assert cases(case, CASES // 8) > CASES / 32


def test_who_is_left_out_goes_on_alone_if_the_others_stand_still() -> None:
    world = World(2)
    ranks = [Rank(world, rank) for rank in range(2)]
    ranks[0].agreement.board.decide(0, 1)  # its proposal holds
    ranks[0].agreement.board.publish(1 << 20, b"")
    ranks[0].agreement.board.publish((1 << 20) + 1, b"\x01")
    run(ranks[1:], in_turn())
    assert ranks[1].group == (1,)
    run(ranks[:1], in_turn())
    assert ranks[0].group is None and "left out" in str(ranks[0].error)


def test_an_error_of_one_rank_is_its_own() -> None:
    """A rank that can not make its communicator raises, after a second attempt; the others go on without it."""

    def case(rng: random.Random) -> int:
        world = World(3)
        ranks = [Rank(world, rank, refuses=100 * (rank == 1)) for rank in range(3)]
        run(ranks, in_any_order(rng))
        assert check(ranks, world) == {0, 2}
        assert world.now < TIMEOUT / 2, "the others waited for it"
        assert isinstance(ranks[1].error, TransportError) and str(ranks[1].error) == "no room"
        assert ranks[1].refuses == 98
        return 0

    cases(case, CASES // 4)


def test_an_error_that_passes_is_tried_once_more() -> None:

    def case(rng: random.Random) -> int:
        world = World(3)
        ranks = [Rank(world, rank, refuses=1) for rank in range(3)]
        run(ranks, in_any_order(rng))
        assert check(ranks, world) == {0, 1, 2}
        return 0

    cases(case, CASES // 4)


def test_an_error_of_all_is_raised_on_all() -> None:

    def case(rng: random.Random) -> int:
        world = World(3)
        ranks = [Rank(world, rank, refuses=100) for rank in range(3)]
        run(ranks, in_any_order(rng))
        assert [str(rank.error) for rank in ranks] == ["no room"] * 3
        return 0

    cases(case, CASES // 4)


def test_abort_at_any_step_ends_it_everywhere() -> None:
    """On all ranks or on none, also while ranks die."""

    def case(rng: random.Random) -> int:
        size = rng.choice([2, 3, 4])
        world = World(size)
        ranks = [Rank(world, rank) for rank in range(size)]
        author, when = rng.randrange(size), rng.randint(0, 60)
        order = in_any_order(rng)

        def choose(running: list[Rank]) -> Rank:
            ranks[author].agreement.is_aborted |= ranks[author].taken == when
            return order(running)

        run(ranks, choose, [(rng.randrange(size), rng.randint(0, 300))])
        living = set(range(size)) - world.dead
        assert check(ranks, world) in (set(), living)
        for rank in ranks:
            if rank.error is not None:
                assert isinstance(rank.error, Aborted) and f"rank {author} called abort()" in str(rank.error)
        return any(rank.error is not None for rank in ranks)

    assert cases(case) > CASES / 4


def test_a_rank_that_waits_for_one_that_never_comes_hears_an_abort() -> None:
    world = World(3)
    ranks = [Rank(world, rank) for rank in range(2)]
    ranks[1].agreement.is_aborted = True
    run(ranks, in_turn())
    assert world.now < TIMEOUT / 2
    assert all("rank 1 called abort()" in str(rank.error) for rank in ranks)


def test_who_comes_after_the_others_have_shrunk_is_told_so() -> None:
    world = World(3)
    ranks = [Rank(world, rank) for rank in range(2)]
    run(ranks, in_turn())
    assert [rank.group for rank in ranks] == [(0, 1)] * 2
    late = Rank(world, 2)
    run([late], in_turn())
    assert isinstance(late.error, Aborted) and "left out" in str(late.error)
    again = Rank(world, 0)
    run([again], in_turn())
    assert isinstance(again.error, Aborted)
