"""Replay: the proof that a schedule does what its collective promises, for one number of ranks.

What is proved:

- every rank ends with the blocks of the postcondition, with every wanted contribution exactly once;
- on all ranks of an all_reduce a block is reduced by the same expression, so all get the same bits (`canonical` tells
  whether it is the one that a reproducible communicator wants);
- no deadlock (a) when a send waits for its receive, and (b) with room for two unread messages per ordered
  pair of ranks, where a step does its sends in order, then its receives, and frees their room at its end, and (c)
  like (b) where messages are read in place: what was sent is not changed before its readers' steps have ended;
- every message is received, by a receive that names the same blocks;
- each step keeps the vocabulary's rules, and the declared `largest` is right.

Channels that block and keep order are confluent (Kahn 1974): whatever order the events come in, the same
messages meet. So one order covers all.
"""

from __future__ import annotations

import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..errors import AbcclError, ArgumentError, ScheduleError
from . import registry, schedule
from .collective import Block, Collective
from .expressions import Expressions, Value
from .registry import Algorithm
from .schedule import Message, Recv, Send, Step
from .words import count

ROOM = 2  # unread messages per ordered pair that every engine has room for


class Transfer(NamedTuple):
    """One message of a replayed schedule; steps are the ranks' own, from 0."""

    source: int
    source_step: int
    destination: int
    destination_step: int
    blocks: tuple[Block, ...]
    reduce: bool


@dataclass(frozen=True)
class Replay:
    """A schedule that was found right, and its history.

    Attributes:
        algorithm, size, root: what was replayed.
        blocks: the number of blocks of the vector.
        programs: the steps of every rank.
        before: what every rank holds at the start.
        changes: what every rank's step changed, [rank][step][block].
        starts, ends: when a rank's step starts and ends, [rank][step], in units of one message.
        transfers: all messages.
        expressions: what the values mean.
        results: the values at the end, of the blocks of the postcondition.
    """

    algorithm: Algorithm
    size: int
    root: int
    blocks: int
    programs: list[list[Step]]
    before: list[dict[Block, Value]]
    changes: list[list[dict[Block, Value]]]
    starts: list[list[int]]
    ends: list[list[int]]
    transfers: list[Transfer]
    expressions: Expressions
    results: frozenset[Value]

    @property
    def steps(self) -> int:
        """The longest chain of dependent messages."""
        return max((end for ends in self.ends for end in ends), default=0)

    def history(self) -> Iterator[list[dict[Block, Value]]]:
        """What every rank holds after each unit of time, from 0 (the start) to `steps` (the end)."""
        due: list[list[tuple[int, dict[Block, Value]]]] = [[] for _ in range(self.steps + 1)]
        for rank, changes in enumerate(self.changes):
            for end, change in zip(self.ends[rank], changes):
                due[end].append((rank, change))
        held = [dict(blocks) for blocks in self.before]
        for news in due:
            for rank, change in news:
                held[rank] = held[rank] | change
            yield list(held)


def replay(algorithm: Algorithm, size: int, root: int = 0) -> Replay:
    """Prove a schedule for `size` ranks, linear in its messages and the blocks they carry.

    Raises:
        ScheduleError: it is wrong; the message names rank, step (the rank's own, from 1), block and peer.
        ArgumentError: the algorithm does not run on `size` ranks, or there is no such root.
    """
    if size < 1 or not 0 <= root < size:
        raise ArgumentError(f"there is no root {root} among {size} ranks: the root is one of 0 to {size - 1}")
    return _Run(algorithm, size, root).prove()


@cache
def canonical(algorithm: Algorithm, size: int, root: int = 0, nested: bool = False) -> bool:
    """Whether all that the algorithm reduces is the canonical fold: see `Expressions.is_canonical`. Replays it once.

    Raises:
        ScheduleError, ArgumentError: as `replay`.
    """
    run = replay(algorithm, size, root)
    return all(run.expressions.is_canonical(value, nested) for value in run.results)


class _Run:
    def __init__(self, algorithm: Algorithm, size: int, root: int) -> None:
        self.algorithm, self.size, self.root = algorithm, size, root
        self.collective = algorithm.collective
        self.blocks = algorithm.blocks(size)
        if self.blocks < 1:
            self.fail(f"the vector is cut into {self.blocks} blocks: declare one or more for every number of ranks")
        self.programs = [self._program(rank) for rank in range(size)]
        self.expressions = Expressions(size)
        self.before: list[dict[Block, Value]] = [
            dict.fromkeys(self.collective.before(rank, size, self.blocks, root), rank) for rank in range(size)
        ]
        self.held = [dict(blocks) for blocks in self.before]
        self.changes: list[list[dict[Block, Value]]] = [[] for _ in range(size)]
        self.starts: list[list[int]] = [[] for _ in range(size)]
        self.ends: list[list[int]] = [[] for _ in range(size)]
        self.transfers: list[Transfer] = []
        self.twice: dict[tuple[Value, Block], str] = {}
        self.results: set[Value] = set()

    def prove(self) -> Replay:
        for rank, program in enumerate(self.programs):
            for number, step in enumerate(program):
                self._check_step(rank, number, step)
        self._check_largest()
        self._meet()
        self._check_room(in_place=False)
        self._check_room(in_place=True)
        self._check_result()
        return Replay(
            self.algorithm,
            self.size,
            self.root,
            self.blocks,
            self.programs,
            self.before,
            self.changes,
            self.starts,
            self.ends,
            self.transfers,
            self.expressions,
            frozenset(self.results),
        )

    def fail(self, what: str) -> NoReturn:
        root = f", root {self.root}" if self.root else ""
        raise ScheduleError(f"{self.collective.value} {self.algorithm.name}, {count(self.size, 'rank')}{root}: {what}")

    # Each step by itself.

    def _program(self, rank: int) -> list[Step]:
        try:
            return self.algorithm.program(rank, self.size, self.root)
        except ScheduleError as error:
            self.fail(f"the program of rank {rank}: {error}{_line(error)}")
        except AbcclError:
            raise
        except (Exception, SystemExit) as error:
            self.fail(
                f"the program of rank {rank} raised {type(error).__name__}: {error}{_line(error)}; "
                "it must yield messages, or tuples of them"
            )

    def _check_step(self, rank: int, number: int, step: Step) -> None:
        here = f"rank {rank}, step {number + 1}"
        pairs: dict[tuple[type, int], int] = {}
        received: dict[Block, bool] = {}
        for m in step:
            if not isinstance(m, (Send, Recv)):
                self.fail(f"{here} wants send(...) or recv(...), and there is {m!r}")
            if not 0 <= m.peer < self.size:
                self.fail(f"{here}: {_say(m)}, but ranks go from 0 to {self.size - 1}")
            if m.peer == rank:
                self.fail(f"{here}: {_say(m)}, that is to itself: leave it out, a rank has its own blocks")
            pairs[type(m), m.peer] = pairs.get((type(m), m.peer), 0) + 1
            if pairs[type(m), m.peer] > ROOM:
                self.fail(f"{here}: {_say(m)} is message {ROOM + 1} of the pair, {ROOM} are allowed: take two steps")
            if isinstance(m, Send):
                continue
            if m.reduce and not self.collective.reduces:
                self.fail(f"{here}: {_say(m)} wants to fold, but {self.collective.value} has no operator")
            for block in m.blocks:
                if block in received and not (m.reduce and received[block]):
                    self.fail(f"{here}: {_say(m)}, but block {block} is received already in this step")
                received[block] = m.reduce

    def _check_largest(self) -> None:
        declared = self.algorithm.largest(self.size)
        sends = (
            (len(m.blocks), rank, number, m)
            for rank, program in enumerate(self.programs)
            for number, step in enumerate(program)
            for m in step
            if isinstance(m, Send)
        )
        blocks, rank, number, m = max(sends, key=lambda found: found[0], default=(1, 0, 0, None))
        if max(1, blocks) != declared:
            where = f"rank {rank}, step {number + 1}: {_say(m)}" if m else "there is no message"
            self.fail(
                f"the largest message has {count(max(1, blocks), 'block')}, declared is largest={declared} ({where})"
            )

    # All ranks together, a send waiting for its receive.

    def _meet(self) -> None:
        """Run all programs; a message is exchanged when both its sides have been offered."""
        size = self.size
        self.unmatched = [0] * size
        self.arrived: list[list[tuple[int, Recv, list[Value], int]]] = [[] for _ in range(size)]
        self.clock = [0] * size
        self.offered: dict[tuple[int, int], deque[tuple[Send, int, list[Value]]]] = {}
        self.awaited: dict[tuple[int, int], deque[Recv]] = {}
        self.number = [0] * size
        ready = deque(range(size))
        while ready:
            rank = ready.popleft()
            if self.number[rank] == len(self.programs[rank]):
                continue
            step = self.programs[rank][self.number[rank]]
            self.unmatched[rank] = len(step)
            for m in step:
                partner = self._offer(rank, m) if isinstance(m, Send) else self._await(rank, m)
                if partner is not None:
                    self.unmatched[rank] -= 1
                    self.unmatched[partner] -= 1
                    if self.unmatched[partner] == 0:
                        self._end_step(partner)
                        ready.append(partner)
            if self.unmatched[rank] == 0:
                self._end_step(rank)
                ready.append(rank)
        stuck = [rank for rank in range(size) if self.number[rank] < len(self.programs[rank])]
        if stuck:
            self.fail(f"deadlock when a send waits for its receive: {self._why_stuck(stuck)}")

    def _offer(self, rank: int, m: Send) -> int | None:
        held = self.held[rank]
        try:
            values = [held[block] for block in m.blocks]
        except KeyError as missing:
            number = self.number[rank] + 1
            self.fail(f"rank {rank}, step {number}: {_say(m)}, but it does not hold block {missing.args[0]} then")
        awaited = self.awaited.get((rank, m.peer))
        if awaited:
            self._exchange(rank, m, self.number[rank], values, awaited.popleft())
            return m.peer
        self.offered.setdefault((rank, m.peer), deque()).append((m, self.number[rank], values))
        return None

    def _await(self, rank: int, m: Recv) -> int | None:
        offered = self.offered.get((m.peer, rank))
        if offered:
            sent, number, values = offered.popleft()
            self._exchange(m.peer, sent, number, values, m)
            return m.peer
        self.awaited.setdefault((m.peer, rank), deque()).append(m)
        return None

    def _exchange(self, source: int, sent: Send, number: int, values: list[Value], wanted: Recv) -> None:
        rank = sent.peer
        if sent.blocks != wanted.blocks:
            self.fail(
                f"rank {rank}, step {self.number[rank] + 1} wants {_names(wanted.blocks)} from rank {source}, "
                f"which sends {_names(sent.blocks)} (its step {number + 1})"
            )
        self.arrived[rank].append((source, wanted, values, self.clock[source]))
        self.transfers.append(Transfer(source, number, rank, self.number[rank], sent.blocks, wanted.reduce))

    def _end_step(self, rank: int) -> None:
        """Fold and store what has arrived, and move the rank's clock."""
        held, number = self.held[rank], self.number[rank]
        change: dict[Block, Value] = {}
        folds: dict[Block, list[tuple[int, Value]]] = {}
        start = end = self.clock[rank]
        for source, m, values, departure in self.arrived[rank]:
            end = max(end, departure + 1)
            if m.reduce:
                for block, value in zip(m.blocks, values):
                    folds.setdefault(block, []).append((source, value))
            else:
                change.update(zip(m.blocks, values))
        for block, sources in folds.items():
            if block not in held:
                self.fail(f"rank {rank}, step {number + 1} folds into block {block}, which it does not hold then")
            sources.append((rank, held[block]))
            sources.sort(key=lambda found: found[0])
            value = self.expressions.fold(tuple(operand for _, operand in sources))
            if self.expressions.doubled[value]:
                self._trace_double(rank, number, block, value, [operand for _, operand in sources])
            change[block] = value
        if len(self.arrived[rank]) < len(self.programs[rank][number]):
            end = max(end, start + 1)
        held.update(change)
        self.arrived[rank].clear()
        self.changes[rank].append(change)
        self.starts[rank].append(start)
        self.ends[rank].append(end)
        self.clock[rank] = end
        self.number[rank] += 1

    def _trace_double(self, rank: int, number: int, block: Block, value: Value, operands: list[Value]) -> None:
        """Remember where a contribution was folded a second time: it matters if it reaches a result."""
        earlier = next((self.twice[v, block] for v in operands if self.expressions.doubled[v]), None)
        self.twice.setdefault((value, block), earlier or f"at rank {rank}, step {number + 1}, block {block}")

    def _why_stuck(self, stuck: list[int]) -> str:
        waits: dict[int, str] = {}
        for (source, destination), offers in self.offered.items():
            for m, _, _ in offers:
                waits.setdefault(source, f"to send {_names(m.blocks)} to rank {destination}" + self._at(destination))
        for (source, destination), receives in self.awaited.items():
            for r in receives:
                waits.setdefault(destination, f"for {_names(r.blocks)} from rank {source}" + self._at(source))
        return _some(f"rank {rank} waits at step {self.number[rank] + 1} {waits[rank]}" for rank in stuck)

    def _at(self, rank: int) -> str:
        ended = self.number[rank] == len(self.programs[rank])
        return " (which has ended)" if ended else f" (which is at step {self.number[rank] + 1})"

    # All ranks together, with little room.

    def _check_room(self, in_place: bool) -> None:
        """Run all programs once more as engines with ROOM slots per ordered pair do; messages read in place or not."""
        filled: Counter[tuple[int, int]] = Counter()
        taken: Counter[tuple[int, int]] = Counter()
        freed: Counter[tuple[int, int]] = Counter()
        waiting: dict[tuple[int, int], list[int]] = {}
        at: dict[int, tuple[int, str]] = {}

        def engine(rank: int) -> Iterator[tuple[int, int]]:
            lent: dict[Block, list[tuple[int, int]]] = {}
            for number, step in enumerate(self.programs[rank]):
                arrivals = [m for m in step if isinstance(m, Recv)]
                changed = [block for m in arrivals for block in m.blocks]
                for m in step:
                    if isinstance(m, Recv):
                        continue
                    pair = (rank, m.peer)
                    while filled[pair] - freed[pair] >= ROOM:
                        at[rank] = (number, f"room: {_say(m)}")
                        yield pair
                    filled[pair] += 1
                    wake(pair)
                    # What its own step changes is never lent.
                    if in_place and not set(m.blocks) & set(changed):
                        for block in m.blocks:
                            lent.setdefault(block, []).append((m.peer, filled[pair]))
                for block in changed:
                    for peer, message in lent.pop(block, ()):
                        while freed[rank, peer] < message:
                            at[rank] = (number, f"rank {peer} to have read block {block}, which it changes")
                            yield rank, peer
                for m in arrivals:
                    pair = (m.peer, rank)
                    while taken[pair] >= filled[pair]:
                        at[rank] = (number, f"a message: {_say(m)}")
                        yield pair
                    taken[pair] += 1
                for m in arrivals:
                    freed[m.peer, rank] += 1
                    wake((m.peer, rank))

        def wake(pair: tuple[int, int]) -> None:
            ready.extend(waiting.pop(pair, ()))

        engines = [engine(rank) for rank in range(self.size)]
        ready = deque(range(self.size))
        while ready:
            rank = ready.popleft()
            pair = next(engines[rank], None)
            if pair is not None:
                waiting.setdefault(pair, []).append(rank)
        if waiting:
            stuck = (
                f"rank {rank} waits at step {at[rank][0] + 1} for {at[rank][1]}"
                for rank in sorted(rank for ranks in waiting.values() for rank in ranks)
            )
            how = " that are read in place" if in_place else ""
            self.fail(f"deadlock with room for {ROOM} unread messages per pair{how}: {_some(stuck)}")

    # The end.

    def _check_result(self) -> None:
        expressions = self.expressions
        first: dict[Block, tuple[int, Value]] = {}
        for rank in range(self.size):
            for block in self.collective.after(rank, self.size, self.blocks, self.root):
                wanted = self.collective.contributors(block, self.size, self.root)
                value = self.held[rank].get(block)
                if value is None:
                    self.fail(f"at the end rank {rank} does not hold block {block}, wanted from {_ranks(wanted)}")
                if expressions.doubled[value]:
                    self.fail(
                        f"at the end rank {rank} holds block {block} with a contribution counted twice: "
                        f"{expressions.text(value)}, folded {self.twice[value, block]}"
                    )
                if expressions.contributors[value] != self._mask(wanted):
                    self._fail_contributors(rank, block, value, wanted)
                self.results.add(value)
                if self.collective is Collective.ALL_REDUCE:
                    other, same = first.setdefault(block, (rank, value))
                    if same != value:
                        self.fail(
                            f"ranks {other} and {rank} reduce block {block} in different orders, so their bits differ: "
                            f"{expressions.text(same)} and {expressions.text(value)} ({self._last(rank, block)})"
                        )

    def _mask(self, ranks: Sequence[int]) -> int:
        return (1 << self.size) - 1 if len(ranks) == self.size else sum(1 << rank for rank in ranks)

    def _fail_contributors(self, rank: int, block: Block, value: Value, wanted: Sequence[int]) -> NoReturn:
        found = self.expressions.ranks(value)
        lacks = [r for r in wanted if r not in found]
        excess = [r for r in found if r not in wanted]
        say = f"lacks {_ranks(lacks)}" if lacks else f"has {_ranks(excess)} too"
        self.fail(f"at the end rank {rank}'s block {block} {say} ({self._last(rank, block)})")

    def _last(self, rank: int, block: Block) -> str:
        numbers = [number for number, change in enumerate(self.changes[rank]) if block in change]
        return f"rank {rank} changed it last in step {numbers[-1] + 1}" if numbers else f"rank {rank} never changed it"


def _line(error: BaseException) -> str:
    """Where in the program it was raised; nothing if the program was not running."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if f.filename not in (__file__, registry.__file__, schedule.__file__)]
    return f" ({Path(inside[-1].filename).name}, line {inside[-1].lineno})" if inside else ""


def _say(m: Message) -> str:
    if isinstance(m, Send):
        return f"send {_names(m.blocks)} to rank {m.peer}"
    return f"receive {_names(m.blocks)} from rank {m.peer}"


def _names(blocks: Sequence[Block]) -> str:
    if not blocks:
        return "an empty message"
    shown = ", ".join(map(str, blocks[:6])) + (", ..." if len(blocks) > 6 else "")
    return f"block{'s' if len(blocks) > 1 else ''} {shown}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _some(reasons: Iterator[str]) -> str:
    every = list(reasons)
    return "; ".join(every[:4]) + (f"; and {len(every) - 4} more" if len(every) > 4 else "")
