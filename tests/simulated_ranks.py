"""Ranks that agree step by step, in an order that a test decides, on a board in memory. They die where it says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from abccl.collectives.board import Board
from abccl.collectives.survivors import Agreement, Group, Steps
from abccl.errors import TransportError

TIMEOUT = 100.0
LONG = 3 * 8 + 5
"""Bytes that take several rounds of this board."""


@dataclass
class World:
    """What all see, and what the test knows.

    Attributes:
        sees: whether the first rank has seen the death of the second; asked for dead ranks only.
        suspects: whether the first rank wrongly holds the second for lost.
    """

    size: int
    sees: Callable[[int, int], bool] = lambda observer, rank: True
    suspects: Callable[[int, int], bool] = lambda observer, rank: False
    now: float = 0.0
    dead: set[int] = field(default_factory=set)
    answers: dict[int, int] = field(default_factory=dict)
    blobs: dict[tuple[int, int], tuple[int, bytes]] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)


class MemoryBoard(Board):
    """Two blobs of each rank, and the answers."""

    room = 8

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size

    def publish(self, round: int, blob: bytes) -> None:
        assert len(blob) <= self.room
        latest, _ = self.read(self.rank, round)
        assert round > latest, "rounds ascend"
        self.world.blobs[self.rank, round % 2] = round, blob

    def read(self, rank: int, round: int) -> tuple[int, bytes | None]:
        slots = [self.world.blobs.get((rank, parity), (0, b"")) for parity in range(2)]
        latest = max(number for number, _ in slots)
        number, blob = slots[round % 2]
        return latest, blob if number == round else None

    def decide(self, question: int, value: int) -> int:
        assert 0 <= question < 512 and value != 0
        return self.world.answers.setdefault(question, value)

    def decided(self, question: int) -> int | None:
        return self.world.answers.get(question)

    def lost(self, rank: int) -> bool:
        if rank in self.world.dead:
            return self.world.sees(self.rank, rank)
        return rank != self.rank and self.world.suspects(self.rank, rank)


@dataclass
class Made:
    """In place of a communicator."""

    members: tuple[int, ...]
    owner: int
    closed: bool = False

    def close(self) -> None:
        self.closed = True


class Rank:
    """One rank's steps, and how they ended: `group` if it returned, `error` if it raised."""

    def __init__(self, world: World, rank: int, refuses: int = 0) -> None:
        self.world, self.rank, self.refuses = world, rank, refuses
        self.agreement = Agreement(MemoryBoard(world, rank), self.build, TIMEOUT, lambda: world.now)
        self.steps = self._run()
        self.taken = 0
        self.is_running, self.waits = True, False
        self.group: tuple[int, ...] | None = None
        self.error: Exception | None = None

    def build(self, group: Group) -> Steps[Made]:
        words = yield from group.exchange(bytes([group.members[group.rank]]) * LONG)
        assert words == [bytes([member]) * LONG for member in group.members]
        if self.refuses:
            self.refuses -= 1
            raise TransportError("no room")
        yield from group.exchange(b"")
        made = Made(group.members, self.rank)
        self.world.made.append(made)
        return made

    def step(self) -> None:
        """Take one."""
        self.taken += 1
        try:
            self.waits = next(self.steps)
        except StopIteration:
            self.is_running = False

    def die(self) -> None:
        """Take no more."""
        self.is_running = False
        self.world.dead.add(self.rank)

    def _run(self) -> Steps[None]:
        try:
            made, self.group = yield from self.agreement.steps()
            assert made.members == self.group
        except Exception as error:  # what is no mistake of the test is looked at by it
            self.error = error
            yield from self.agreement.leave()


def run(ranks: list[Rank], choose: Callable[[list[Rank]], Rank], deaths: Iterable[tuple[int, int]] = ()) -> None:
    """Take steps until all have ended. A death is a rank, and after how many of its steps it dies.

    Time passes as ranks wait.
    """
    world, dying = ranks[0].world, dict(deaths)
    for _ in range(200_000):
        for rank in ranks:
            if rank.is_running and dying.get(rank.rank) == rank.taken:
                rank.die()
        running = [rank for rank in ranks if rank.is_running]
        if not running:
            return
        rank = choose(running)
        rank.step()
        if rank.waits:
            world.now += TIMEOUT / 1000
    raise AssertionError("it does not end")


def check(ranks: list[Rank], world: World) -> set[int]:
    """That all who returned have the same group, with all of them in it, and nothing is left open; who returned."""
    returned = {rank.rank for rank in ranks if rank.group is not None}
    groups = {rank.group for rank in ranks if rank.group is not None}
    assert len(groups) <= 1, f"different groups: {groups}"
    for group in groups:
        assert returned <= set(group)
    for made in world.made:
        kept = ranks[made.owner].group == made.members and made is world.made[_last(world.made, made.owner)]
        assert made.closed != kept or made.owner in world.dead, f"{made} of {ranks[made.owner].group}"
    return returned


def _last(made: list[Made], owner: int) -> int:
    return max(index for index, one in enumerate(made) if one.owner == owner)


def in_any_order(rng: random.Random) -> Callable[[list[Rank]], Rank]:
    """A scheduler that lets a rank go on for a while, then another."""
    current: list[Rank] = []

    def choose(running: list[Rank]) -> Rank:
        if not current or current[0] not in running or rng.random() < 0.2:
            current[:] = [rng.choice(running)]
        return current[0]

    return choose
