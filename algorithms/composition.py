"""Compositions: algorithms run among groups of ranks as if each group were one rank.

A *phase* runs an algorithm among the parts of one group. For every item (a slice of the vector, or what belongs to one
rank) one rank of each part, its *holder*, stands for the part; so a message between two parts becomes one message
between each pair of holders. All ranks of a part walk the same program in step, so what does not deadlock among single
ranks does not among groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import NamedTuple

from ..errors import ArgumentError, ScheduleError
from .collective import Block, Collective
from .groups import Group
from .parameters import split_outside
from .registry import Algorithm, lookup
from .replay import replay
from .schedule import Message, Program, Send, Step, relabel


class Way(NamedTuple):
    """What is done up to the top, there, and down from it; `single` if one rank stands for all that its group holds."""

    collective: Collective
    up: Collective | None
    top: Collective
    down: Collective | None
    single: bool = False


Holders = Sequence[int]


class _Phase:
    """An algorithm among the children of a group.

    Attributes:
        holders: for every child and item the rank of the child that holds it.
        contents: for each of the algorithm's blocks (of an all_to_all: its destinations) the items that it stands for.
    """

    def __init__(
        self, algorithm: Algorithm, group: Group, holders: list[Holders], contents: list[list[int]], root: int
    ) -> None:
        self.algorithm, self.group, self.root = algorithm, group, root
        self.holders, self.contents = holders, contents

    def program(self, rank: int) -> Iterator[Step]:
        """The steps of a rank of the group; a message without items is left out on both its ends."""
        if len(self.group.children) == 1:
            return
        place = self.group.child_of[rank]
        own = self.holders[place]
        held = [[item for item in items if own[item] == rank] for items in self.contents]
        for step in self._steps(place):
            yield tuple(message for virtual in step for message in self._messages(virtual, held))

    def _steps(self, place: int) -> list[Step]:
        return self.algorithm.program(place, len(self.group.children), self.root)

    def _messages(self, virtual: Message, held: list[list[int]]) -> Iterator[Message]:
        theirs = self.holders[virtual.peer]
        cargo: dict[int, list[Block]] = {}
        for block in virtual.blocks:
            for item in held[_number(block)]:
                cargo.setdefault(theirs[item], []).extend(self._blocks(block, item))
        for peer, blocks in cargo.items():
            yield replace(virtual, peer=peer, blocks=tuple(blocks))

    def _blocks(self, block: Block, item: int) -> Sequence[Block]:
        """The blocks that an item stands for: itself, or in an all_to_all what a whole part sends to it."""
        if isinstance(block, int):
            return (item,)
        return [(source, item) for source in self.group.children[block[0]].ranks]

    def _weight(self, block: Block) -> int:
        """How many blocks each item stands for."""
        return 1 if isinstance(block, int) else len(self.group.children[block[0]].ranks)

    def largest(self, even: bool) -> int:
        """The number of blocks in the largest message; `even` if all parts are alike and hold their items alike."""
        parts = len(self.group.children)
        if parts == 1:
            return 1
        if even and len(set(map(len, self.contents))) == 1:
            (_, items), *_ = Counter(self.holders[0][item] for item in self.contents[0]).most_common(1)
            block = (0, 1) if self.algorithm.collective is Collective.ALL_TO_ALL else 0
            return self.algorithm.largest(parts) * items * self._weight(block)
        return max((max(self._lengths(place), default=1) for place in range(parts)), default=1)

    def _lengths(self, place: int) -> Iterator[int]:
        """The largest message of a child's ranks, for each message of the child."""
        own, alone = self.holders[place], self.group.height == 1
        for message in (m for step in self._steps(place) for m in step if isinstance(m, Send)):
            theirs = self.holders[message.peer]
            lengths: Counter[tuple[int, int]] = Counter()
            for block in message.blocks:
                items, weight = self.contents[_number(block)], self._weight(block)
                if alone:
                    lengths[0, 0] += len(items)
                else:
                    for item in items:
                        lengths[own[item], theirs[item]] += weight
            yield max(lengths.values(), default=1)


def _number(block: Block) -> int:
    return block if isinstance(block, int) else block[1]


class Composition:
    """The phases of all ranks, for one root."""

    def __init__(self, way: Way, top: Group, inner: str, outer: str, root: int) -> None:
        self.way, self.top, self.outer, self.root = way, top, outer, root
        self.size = len(top.ranks)
        names = split_outside(inner, "/")
        self.inner = names * (top.height - 1) if len(names) == 1 else names
        if len(self.inner) != top.height - 1 and len(names) > 1:
            raise ArgumentError(
                f"inner={inner} names {len(names)} algorithms, and there are {top.height - 1} levels below the top: "
                f"name one for all, or one for each from the top down"
            )
        self.cut = way.collective.cut
        self.known_holders: dict[Group, list[int]] = {}
        self.known_phases: dict[tuple[Group, Collective], _Phase] = {}

    def program(self, rank: int) -> Iterator[Step]:
        """The steps of a rank."""
        top, *below = self.top.around(rank)
        if self.way.up:
            for group in reversed(below):
                yield from self._phase(group, self.way.up).program(rank)
        yield from self._phase(top, self.way.top).program(rank)
        if self.way.down:
            for group in below:
                yield from self._phase(group, self.way.down).program(rank)

    def parts(self) -> Iterator[tuple[Algorithm, int]]:
        """All algorithms and among how many they run."""
        for group in self.top.groups():
            for kind in self.kinds(group):
                yield self.algorithm(group, kind), len(group.children)

    def kinds(self, group: Group) -> list[Collective]:
        """What a group does."""
        return [self.way.top] if group is self.top else [c for c in (self.way.up, self.way.down) if c]

    def algorithm(self, group: Group, collective: Collective) -> Algorithm:
        """What runs among the children of a group."""
        return lookup(collective, self.outer if group is self.top else self.inner[self.top.height - 1 - group.height])

    def _phase(self, group: Group, collective: Collective) -> _Phase:
        known = self.known_phases.get((group, collective))
        if known is None:
            algorithm = self.algorithm(group, collective)
            root = self._place(group, self.root) if collective.rooted else 0
            holders: list[Holders] = [self.holders(child) for child in group.children]
            contents = self._contents(algorithm, group)
            known = self.known_phases[group, collective] = _Phase(algorithm, group, holders, contents, root)
        return known

    @cached_property
    def largest(self) -> int:
        """The number of blocks in the largest message of any rank."""
        even = self.way.single or self.top.form is not None
        phases = (self._phase(group, kind) for group in self.top.groups() for kind in self.kinds(group))
        return max(phase.largest(even) for phase in phases)

    @cached_property
    def serves(self) -> bool:
        """Whether every algorithm runs on the groups that it is meant for."""
        return all(count == 1 or not algorithm.refusal(count) for algorithm, count in self.parts())

    @cached_property
    def folds_alike(self) -> bool:
        """Whether all ranks of an all_reduce fold in the same order.

        Engines fold in ascending rank order, which need not be that of the groups, nor the same for all slices.
        """
        parts = len(self.top.children)
        orders = {
            tuple(sorted(range(parts), key=holders.__getitem__))
            for holders in set(zip(*(self.holders(child) for child in self.top.children)))
        }
        outer = self.algorithm(self.top, self.way.top)
        return all(order == tuple(range(parts)) or _agrees(outer, order) for order in orders)

    # Who stands for a group.

    @cached_property
    def _places(self) -> list[list[tuple[int, int]]]:
        """By height and rank: in the highest group around the rank no higher, its child and their number."""
        around = [self.top.around(rank) for rank in range(self.size)]

        def place(rank: int, height: int) -> tuple[int, int]:
            group = next((g for g in around[rank] if g.height <= height), self.top)
            return group.child_of[rank], len(group.children)

        return [[place(rank, height) for rank in range(self.size)] for height in range(self.top.height + 1)]

    def _place(self, group: Group, rank: int) -> int:
        """The child that stands for a rank: its own, or in other groups the one at the corresponding position."""
        place, parts = self._places[group.height][rank]
        return place * len(group.children) // parts

    def holders(self, group: Group) -> list[int]:
        """For every item the rank that holds it once the group has done its phase."""
        items = self.blocks
        if not group.children:
            return [group.ranks[0]] * items
        known = self.known_holders.get(group)
        if known is None:
            below = [self.holders(child) for child in group.children]
            known = [below[place][item] for item, place in enumerate(self._shares(group))]
            self.known_holders[group] = known
        return known

    def _shares(self, group: Group) -> list[int]:
        """For every item the child whose holder becomes the group's."""
        if self.way.single:
            return [self._place(group, self.root)] * self.blocks
        if not self.cut:
            return [self._place(group, rank) for rank in range(self.size)]
        shares, columns = [0] * self.blocks, self._columns[group.height]
        for alike in self._alike(group):
            for number, item in enumerate(alike):
                shares[item] = number * columns // len(alike) * len(group.children) // columns
        return shares

    def _alike(self, group: Group) -> list[list[int]]:
        """The items in lists, those together that are held by the same rank of each child."""
        found: dict[tuple[int, ...], list[int]] = {}
        for item, holders in enumerate(zip(*(self.holders(child) for child in group.children))):
            found.setdefault(holders, []).append(item)
        return list(found.values())

    def _contents(self, algorithm: Algorithm, group: Group) -> list[list[int]]:
        """For every block of the algorithm the items that it stands for."""
        blocks = algorithm.blocks(len(group.children))
        contents: list[list[int]] = [[] for _ in range(blocks)]
        if algorithm.collective.cut:
            for alike in self._alike(group):
                for number, item in enumerate(alike):
                    contents[number * blocks // len(alike)].append(item)
        else:
            for item, place in enumerate(self._shares(group)):
                contents[place].append(item)
        return contents

    # Into how many slices the vector is cut.

    @cached_property
    def blocks(self) -> int:
        """The ranks' parts, or as many slices as serve all groups and algorithms about evenly."""
        if not self.cut:
            return self.size
        if self.way.single:
            return _columns({a.blocks(count) for a, count in self.parts() if a.collective.cut})
        across = self.algorithm(self.top, self.way.top).blocks(len(self.top.children))
        return across * prod(self._columns.values())

    @cached_property
    def _columns(self) -> dict[int, int]:
        """By height below the top: into how many slices all groups of that height cut what they share out."""
        lengths: dict[int, set[int]] = {}
        for group in self.top.groups():
            lengths.setdefault(group.height, set()).add(len(group.children))
        return {height: _columns(found) for height, found in lengths.items() if height < self.top.height}


def _columns(lengths: set[int]) -> int:
    """Into how many slices to cut what groups of these lengths share out: few, yet about as many for each rank."""

    def unevenness(columns: int) -> Fraction:
        return max(Fraction(-(-columns // length) * length, columns) for length in lengths)

    longest = max(lengths)
    return min(range(longest, 2 * longest + 1), key=lambda columns: (unevenness(columns), columns))


def _agrees(outer: Algorithm, order: tuple[int, ...]) -> bool:
    """Whether an all_reduce is right if the ranks' messages are folded in another order than theirs."""
    turned = {place: number for number, place in enumerate(order)}

    def program(rank: int, size: int) -> Program:
        return relabel(outer.program(order[rank], size), turned.__getitem__)

    try:
        replay(replace(outer, function=program, parameters=()), len(order))
    except ScheduleError:
        return False
    return True
