"""Replay's verdict on mutated schedules, held against an execution that shares nothing with it.

The execution here moves numbers: ranks are coroutines that take turns at random, once with sends that wait for
their receives and once with two slots per pair. Blocks are lists of distinct lengths, so a wrong block is noticed;
a second value, combined by an operation that is neither associative nor commutative, notices unequal reduction trees.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from abccl.algorithms import Algorithm, Collective, Message, Recv, Send, Step, algorithms, lookup, recv, replay, send
from abccl.algorithms.expressions import Expressions
from abccl.algorithms.replay import _Run
from abccl.errors import ScheduleError

ALL = [(a.collective, a.name) for c in Collective for a in algorithms(c).values()]
IDS = [f"{c.value}-{name}" for c, name in ALL]
PRIME = (1 << 61) - 1

Schedule = list[list[Step]]  # of every rank


class Wrong(Exception):
    """What the execution found."""


def combine(values: list[int]) -> int:
    """Neither associative nor commutative."""
    return pow(sum(x * pow(31, i + 1, PRIME) for i, x in enumerate(values)) + len(values), 5, PRIME)


class Execution:
    """One run of a schedule on random integers."""

    def __init__(self, a: Algorithm, schedule: Schedule, room: int | None, rng: random.Random) -> None:
        self.a, self.schedule, self.room, self.rng = a, schedule, room, rng
        self.size = len(schedule)
        self.blocks = a.blocks(self.size)
        self.original: list[dict[Any, list[int]]] = []
        for rank in range(self.size):
            before = a.collective.before(rank, self.size, self.blocks)
            self.original.append({b: [rng.randrange(PRIME) for _ in range(self.length(b))] for b in before})
        self.memory = [dict(blocks) for blocks in self.original]
        self.channels: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)  # messages, never removed
        self.receives: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        self.taken: Counter[tuple[int, int]] = Counter()
        self.freed: Counter[tuple[int, int]] = Counter()
        self.events = 0

    def length(self, block: Any) -> int:
        """Another for every block; the last number of a block is its second value."""
        return 2 + (block if isinstance(block, int) else block[0] * self.size + block[1])

    def run(self) -> None:
        """Let the ranks take turns at random until all have ended or nothing happens any more."""
        live = {rank: self.rank(rank) for rank in range(self.size)}
        while live:
            events, order = self.events, list(live)
            self.rng.shuffle(order)
            for rank in order:
                if next(live[rank], "ended") == "ended":
                    del live[rank]
                    self.events += 1
            if self.events == events:
                raise Wrong(f"deadlock of ranks {sorted(live)}")
        for pair, messages in self.channels.items():
            if self.taken[pair] < len(messages):
                raise Wrong(f"unread message {pair}")
        self.check_result()

    def rank(self, rank: int) -> Iterator[None]:
        for step in self.schedule[rank]:
            self.check_step(rank, step)
            mine = self.memory[rank]
            try:
                letters = [(m, [mine[b] for b in m.blocks]) for m in step if isinstance(m, Send)]
            except KeyError as missing:
                raise Wrong(f"rank {rank} sends {missing}, which it has not") from None
            receives = [m for m in step if isinstance(m, Recv)]
            if self.room is None:
                yield from self.meet(rank, letters, receives)
            else:
                for m, data in letters:
                    pair = (rank, m.peer)
                    while len(self.channels[pair]) - self.freed[pair] >= self.room:
                        yield
                    self.channels[pair].append({"data": data})
                    self.events += 1
            arrived = []
            for m in receives:
                pair = (m.peer, rank)
                while len(self.channels[pair]) <= self.taken[pair]:
                    yield
                arrived.append((m, self.channels[pair][self.taken[pair]]["data"]))
                self.taken[pair] += 1
                self.events += 1
            self.store(rank, arrived)
            for m in receives:
                self.freed[m.peer, rank] += 1
                self.events += 1

    def meet(self, rank: int, letters: list[Any], receives: list[Recv]) -> Iterator[None]:
        """Post all, and wait until every send has a posted receive and every receive a posted send."""
        posted = []
        for m, data in letters:
            self.channels[rank, m.peer].append({"data": data})
            posted.append((self.receives[rank, m.peer], len(self.channels[rank, m.peer])))
        for m in receives:
            self.receives[m.peer, rank].append({})
            posted.append((self.channels[m.peer, rank], len(self.receives[m.peer, rank])))
        self.events += 1
        while any(len(others) < count for others, count in posted):
            yield

    def check_step(self, rank: int, step: Step) -> None:
        pairs = Counter((isinstance(m, Send), m.peer) for m in step)
        if any(peer == rank or not 0 <= peer < self.size or n > 2 for (_, peer), n in pairs.items()):
            raise Wrong(f"rank {rank}: {step}")
        copied = [b for m in step if isinstance(m, Recv) and not m.reduce for b in m.blocks]
        folded = [b for m in step if isinstance(m, Recv) and m.reduce for b in m.blocks]
        if len(set(copied)) < len(copied) or set(copied) & set(folded):
            raise Wrong(f"rank {rank}: {step} writes a block twice")
        if folded and self.a.collective not in (Collective.ALL_REDUCE, Collective.REDUCE, Collective.REDUCE_SCATTER):
            raise Wrong(f"rank {rank}: {step} folds")

    def store(self, rank: int, arrived: list[tuple[Recv, list[list[int]]]]) -> None:
        mine, sources = self.memory[rank], defaultdict(list)
        for m, data in arrived:
            if [len(values) for values in data] != [self.length(b) for b in m.blocks]:
                raise Wrong(f"rank {rank} wants {m}")
            for block, values in zip(m.blocks, data):
                if m.reduce:
                    sources[block].append((m.peer, values))
                else:
                    mine[block] = values
        for block, found in sources.items():
            if block not in mine:
                raise Wrong(f"rank {rank} folds into {block}, which it has not")
            vectors = [v for _, v in sorted([*found, (rank, mine[block])], key=lambda f: f[0])]
            columns = list(zip(*vectors))
            mine[block] = [sum(column) for column in columns[:-1]] + [combine(list(columns[-1]))]

    def check_result(self) -> None:
        c, size = self.a.collective, self.size
        for rank in range(size):
            for block in c.after(rank, size, self.blocks):
                parts = [self.original[r][block] for r in c.contributors(block, size)]
                wanted = [sum(column) for column in zip(*parts)]
                found = self.memory[rank].get(block)
                if found is None or found[:-1] != wanted[:-1]:
                    raise Wrong(f"rank {rank} ends with a wrong {block}")
                if c is Collective.ALL_REDUCE and found != self.memory[0][block]:
                    raise Wrong(f"ranks 0 and {rank} end with different bits of {block}")


def verdict_of_execution(a: Algorithm, schedule: Schedule, rng: random.Random) -> str:
    try:
        for room in (None, 2):
            Execution(a, schedule, room, rng).run()
    except Wrong as wrong:
        return str(wrong)
    return "right"


def verdict_of_replay(a: Algorithm, schedule: Schedule) -> str:
    largest = max((len(m.blocks) for steps in schedule for s in steps for m in s if isinstance(m, Send)), default=1)
    mutant = dataclasses.replace(
        a, function=lambda rank, size, **_: schedule[rank], largest=lambda size: max(1, largest)
    )
    try:
        replay(mutant, len(schedule))
    except ScheduleError as error:
        return str(error)
    return "right"


Place = tuple[int, int, int]  # rank, step, message


def places(schedule: Schedule, kind: type) -> list[Place]:
    return [
        (rank, number, index)
        for rank, steps in enumerate(schedule)
        for number, step in enumerate(steps)
        for index, m in enumerate(step)
        if isinstance(m, kind)
    ]


def at(schedule: Schedule, place: Place) -> Message:
    rank, number, index = place
    return schedule[rank][number][index]


def put(schedule: Schedule, place: Place, *messages: Message) -> None:
    rank, number, index = place
    step = schedule[rank][number]
    schedule[rank][number] = (*step[:index], *messages, *step[index + 1 :])


def matching(schedule: Schedule, place: Place) -> Place | None:
    """The receive of a send: as manieth of its pair as that is."""
    rank, peer = place[0], at(schedule, place).peer
    sends = [p for p in places(schedule, Send) if p[0] == rank and at(schedule, p).peer == peer]
    receives = [p for p in places(schedule, Recv) if p[0] == peer and at(schedule, p).peer == rank]
    index = sends.index(place)
    return receives[index] if index < len(receives) else None


def mutate(schedule: Schedule, names: list[Any], rng: random.Random) -> str:
    """Change a schedule at one place; half of the time its other side too, so that not all mutants are stuck."""
    kind = rng.choice(["drop", "double", "redirect", "swap", "copy", "reorder", "merge", "split", "hasten"])
    if kind in ("reorder", "merge", "split", "hasten"):
        reshape(kind, schedule, rng)
    elif kind == "copy":
        receives = places(schedule, Recv)
        folding = [p for p in receives if at(schedule, p).reduce]
        if receives:
            place = rng.choice(folding or receives)
            put(schedule, place, dataclasses.replace(at(schedule, place), reduce=not at(schedule, place).reduce))
    elif sends := places(schedule, Send):
        place = rng.choice(sends)
        other = matching(schedule, place) if rng.random() < 0.5 else None
        m = at(schedule, place)
        if kind == "drop":
            for p in (place, other):
                if p is not None:
                    put(schedule, p)
        elif kind == "double":
            for p in (place, other):
                if p is not None:
                    put(schedule, p, at(schedule, p), at(schedule, p))
        elif kind == "redirect":
            put(schedule, place, dataclasses.replace(m, peer=rng.randrange(-1, len(schedule) + 1)))
        elif m.blocks:
            blocks = list(m.blocks)
            blocks[rng.randrange(len(blocks))] = rng.choice(names)
            for p in (place, other):
                if p is not None:
                    put(schedule, p, dataclasses.replace(at(schedule, p), blocks=tuple(blocks)))
    for steps in schedule:
        steps[:] = [step for step in steps if step]
    return kind


def reshape(kind: str, schedule: Schedule, rng: random.Random) -> None:
    """Swap, merge or split steps of one rank, or do a send one step earlier."""
    steps = rng.choice(schedule)
    if not steps:
        return
    i = rng.randrange(len(steps))
    j = rng.choice([i - 1, i + 1, rng.randrange(len(steps))]) % len(steps)
    if kind == "reorder":
        steps[i], steps[j] = steps[j], steps[i]
    elif kind == "split":
        cut = rng.randrange(len(steps[i]) + 1)
        steps[i : i + 1] = [steps[i][:cut], steps[i][cut:]]
    elif i + 1 < len(steps) and kind == "merge":
        steps[i : i + 2] = [steps[i] + steps[i + 1]]
    elif i + 1 < len(steps):
        moved = [m for m in steps[i + 1] if isinstance(m, Send)]
        steps[i + 1] = tuple(m for m in steps[i + 1] if isinstance(m, Recv))
        steps[i] = (*steps[i], *moved)


def mutants(a: Algorithm, count: int, seed: str) -> Iterator[tuple[str, Schedule, random.Random]]:
    """Mutants of one algorithm; the first is the schedule as it is."""
    rng = random.Random(seed)
    for number in range(count):
        size = rng.randrange(2, 8)
        if a.refusal(size):
            size -= 1
        schedule = [a.program(rank, size) for rank in range(size)]
        c, blocks = a.collective, a.blocks(size)
        names = sorted({b for r in range(size) for b in (*c.before(r, size, blocks), *c.after(r, size, blocks))})
        kinds = [mutate(schedule, names, rng) for _ in range(min(number, rng.choice([1, 1, 1, 2])))]
        yield f"{size} ranks, mutant {number}: {' and '.join(kinds)}", schedule, rng


def disagreements(a: Algorithm, count: int) -> tuple[list[str], Counter[bool]]:
    found, verdicts = [], Counter[bool]()
    for title, schedule, rng in mutants(a, count, f"{a.collective.value} {a.name}"):
        executed, replayed = verdict_of_execution(a, schedule, rng), verdict_of_replay(a, schedule)
        verdicts[executed == "right"] += 1
        if (executed == "right") != (replayed == "right"):
            found.append(f"{title}\n  executed: {executed}\n  replayed: {replayed}\n  {schedule}")
    return found, verdicts


@pytest.mark.parametrize(("collective", "name"), ALL, ids=IDS)
def test_replay_judges_mutants_as_their_execution_does(collective: Collective, name: str) -> None:
    found, verdicts = disagreements(lookup(collective, name), 300)
    assert not found, "\n".join(found[:3])
    assert verdicts[True] and verdicts[False], "the mutants should be of both kinds"


def forget_the_order(self: Expressions, operands: tuple[int, ...]) -> int:
    """A fold that knows who contributed, not how often nor in which order."""
    union = functools.reduce(int.__or__, (self.contributors[operand] for operand in operands))
    if union not in self.contributors:
        self.contributors.append(union)
        self.doubled.append(False)
    return self.contributors.index(union)


def tangles(count: int) -> Iterator[tuple[Schedule, random.Random]]:
    """All_gathers after messages that change nothing, but wait for each other.

    As they stand, rank 0's third message to rank 1 needs room, which rank 1 makes when it has heard from rank 2,
    which waits for what rank 0 sends after it. Where sends wait for receives, all of rank 0's are offered at once.
    """
    rng = random.Random("tangles")
    finish = lookup(Collective.ALL_GATHER, "ring")
    for _ in range(count):
        schedule: Schedule = [
            [(send(1, 0),), (send(1, 0), send(1, 0), send(2, 0))],
            [(recv(0, 0), recv(2, 2)), (recv(0, 0),), (recv(0, 0),)],
            [(recv(0, 0),), (send(1, 2),)],
        ]
        for _ in range(rng.randrange(4)):
            reshape(rng.choice(["reorder", "merge", "split", "hasten"]), schedule, rng)
        yield [[s for s in steps if s] + finish.program(rank, 3) for rank, steps in enumerate(schedule)], rng


def disagreeing_tangles() -> tuple[int, Counter[str]]:
    a = lookup(Collective.ALL_GATHER, "ring")
    differ, verdicts = 0, Counter[str]()
    for schedule, rng in tangles(500):
        executed, replayed = verdict_of_execution(a, schedule, rng), verdict_of_replay(a, schedule)
        differ += (executed == "right") != (replayed == "right")
        verdicts["right" if replayed == "right" else "room" if "with room for" in replayed else "other"] += 1
    return differ, verdicts


def test_replay_judges_tangles_as_their_execution_does() -> None:
    differ, verdicts = disagreeing_tangles()
    assert differ == 0
    assert verdicts["right"] and verdicts["other"] and verdicts["room"], "a deadlock for want of room is wanted, too"


def test_a_deadlock_overlooked_for_want_of_room_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Run, "_check_room", lambda run, in_place: None)
    assert disagreeing_tangles()[0]


@pytest.mark.parametrize(
    ("owner", "name", "instead"),
    [(_Run, "_check_result", lambda run: None), (Expressions, "fold", forget_the_order)],
    ids=["result", "expression"],
)
def test_a_check_left_out_of_replay_is_noticed(
    owner: type, name: str, instead: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, instead)
    assert any(disagreements(lookup(c, name), 300)[0] for c, name in ALL)


def test_an_unequal_order_of_reduction_is_noticed() -> None:
    """All ranks get the sum of three, rank 0 as (0+1)+2, rank 1 as 0+(1+2)."""
    schedule: Schedule = [
        [(send(1, 0), recv(1, 0, reduce=True)), (recv(2, 0, reduce=True),), (send(2, 0),)],
        [(send(0, 0),), (recv(2, 0, reduce=True),), (recv(0, 0, reduce=True),)],
        [(send(1, 0),), (send(0, 0),), (recv(0, 0),)],
    ]
    a = lookup(Collective.ALL_REDUCE, "tree")
    assert "different bits" in verdict_of_execution(a, schedule, random.Random(0))
    assert "different orders" in verdict_of_replay(a, schedule)
