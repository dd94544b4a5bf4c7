"""Groups of ranks, in two levels or more, and how they are written: "4x2", "3+2", "7x8+4", "(2+2)+(2+1)", "3+2:cyclic".

A number is a group of that many ranks, parentheses make one group of several, + stands between groups, and Ax before a
group is A of them (so 2x4x8 is 2 groups, each of 4 groups of 8). The ranks follow one another from group to group,
unless something stands behind a colon: "cyclic" deals them out in turn to the groups that are not full yet; else it is
their list in the order of the groups, "0.2.4.1.3" or with runs "4-7.0-3".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import isqrt
from operator import index
from typing import Any

from ..errors import ArgumentError
from .parameters import split_outside

Levels = int | Sequence["Levels"]
"""Groups of ranks as nested sequences: [[0, 1, 2], [3, 4]]; with three levels [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]."""

WANTED = "groups of ranks such as 4x2, 3+2, 7x8+4, (2+2)+(2+1) or 3+2:cyclic"

_CYCLIC = "cyclic"


@dataclass(frozen=True, eq=False)
class Group:
    """A node of the tree of groups; a single rank has no children and height 0."""

    ranks: tuple[int, ...]
    children: tuple[Group, ...] = field(default=(), repr=False)

    @cached_property
    def height(self) -> int:
        """How many levels there are down to the ranks."""
        return 1 + max(child.height for child in self.children) if self.children else 0

    @cached_property
    def child_of(self) -> dict[int, int]:
        """For every rank the number of the child that it is in."""
        return {rank: place for place, child in enumerate(self.children) for rank in child.ranks}

    @cached_property
    def form(self) -> tuple[int, ...] | None:
        """If all groups of a level are alike, how many parts they have, from this one down."""
        forms = {child.form for child in self.children} or {()}
        (form, *others) = forms
        return None if others or form is None else (len(self.children), *form) if self.children else ()

    @property
    def levels(self) -> Levels:
        """The group as nested sequences."""
        return [child.levels for child in self.children] if self.children else self.ranks[0]

    def groups(self) -> Iterator[Group]:
        """This group and all below it that are no single ranks, the lower ones first."""
        for child in self.children:
            yield from child.groups()
        if self.children:
            yield self

    def around(self, rank: int) -> list[Group]:
        """The groups that a rank is in, from this one down."""
        found, group = [], self
        while group.children:
            found.append(group)
            group = group.children[group.child_of[rank]]
        return found


@lru_cache(maxsize=256)
def grouped(text: str) -> Group:
    """The groups that are written so.

    Raises:
        ArgumentError: it is no such text.
    """
    shape_text, colon, order_text = text.partition(":")
    shape = _shapes(text, shape_text)
    sizes = list(_sizes(shape))
    if not colon:
        order = list(range(sum(sizes)))
    elif order_text == _CYCLIC:
        order = _dealt(sizes)
    else:
        order = _listed(text, order_text)
    if sorted(order) != list(range(sum(sizes))):
        raise ArgumentError(f"wants each of the ranks 0 to {sum(sizes) - 1} once behind the colon, and got {text!r}")
    return _group(_numbered(shape, iter(order)))


def written(levels: Levels) -> str:
    """The text of groups that are given as nested sequences.

    Raises:
        ArgumentError: a group is empty, has both ranks and groups in it, or the ranks are not 0, 1, ..., each once.
    """
    plain = _plain(levels)
    if isinstance(plain, int) or isinstance(plain[0], int):
        raise ArgumentError(f"levels wants groups of ranks, as in [[0, 1, 2], [3, 4]], and got {levels!r}")
    group = _group(plain)
    order = list(group.ranks)
    if sorted(order) != list(range(len(order))):
        raise ArgumentError(f"levels wants each of the ranks 0 to {len(order) - 1} once, and got {order}")
    if order == sorted(order):
        return _text(group)
    dealt = order == _dealt([len(lowest.ranks) for lowest in group.groups() if lowest.height == 1])
    return f"{_text(group)}:{_CYCLIC if dealt else _runs(order)}"


def square(size: int) -> str:
    """Consecutive groups of about the square root of `size`, the last one with what is left."""
    side = isqrt(size - 1) + 1
    return written([list(range(start, min(start + side, size))) for start in range(0, size, side)])


Shape = int | tuple["Shape", ...]  # the length of a lowest group, or groups


def _shapes(text: str, part: str) -> tuple[Shape, ...]:
    return tuple(shape for term in split_outside(part, "+") for shape in _copies(text, term))


def _copies(text: str, term: str) -> tuple[Shape, ...]:
    if term.startswith("(") and term.endswith(")"):
        return (_shapes(text, term[1:-1]),)
    number, times, rest = term.partition("x")
    if not re.fullmatch(r"[1-9]\d{0,5}", number):
        raise ArgumentError(f"wants {WANTED}, and got {text!r}")
    if not times:
        return (int(number),)
    copies = _copies(text, rest)
    return (copies if "x" in rest and not rest.startswith("(") else copies[0],) * int(number)


def _sizes(shape: Shape) -> Iterator[int]:
    """The lengths of the lowest groups."""
    if isinstance(shape, int):
        yield shape
    else:
        for part in shape:
            yield from _sizes(part)


def _numbered(shape: Shape, ranks: Iterator[int]) -> list[Levels]:
    """The shape with ranks in it, taken in order."""
    if isinstance(shape, int):
        return list(itertools.islice(ranks, shape))
    return [_numbered(part, ranks) for part in shape]


def _listed(text: str, part: str) -> list[int]:
    order: list[int] = []
    for run in part.split("."):
        if not re.fullmatch(r"\d{1,6}(-\d{1,6})?", run):
            raise ArgumentError(f"wants cyclic behind the colon, or ranks as in 0.2.4.1.3 or 4-7.0-3, and got {text!r}")
        first, _, last = run.partition("-")
        order += range(int(first), int(last or first) + 1)
    return order


def _dealt(sizes: Sequence[int]) -> list[int]:
    """Ranks dealt out in turn to groups of these sizes, group after group."""
    turns = sorted((turn, group) for group, size in enumerate(sizes) for turn in range(size))
    rank_of = {place: rank for rank, place in enumerate(turns)}
    return [rank_of[turn, group] for group, size in enumerate(sizes) for turn in range(size)]


def _runs(order: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for rank in order:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ".".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _text(group: Group) -> str:
    """The group's parts in writing."""
    if group.height == 1:
        return str(len(group.children))
    terms = []
    for (height, text), run in itertools.groupby(group.children, lambda child: (child.height, _text(child))):
        number = len(list(run))
        product = re.match(r"\d+x", text) and len(split_outside(text, "+")) == 1
        part = text if height == 1 or (product and number > 1) else f"({text})"
        terms.append(f"{number}x{part}" if number > 1 else part)
    return "+".join(terms)


def _plain(levels: Any) -> Levels:
    """The same as lists, whoever's integers and sequences they are."""
    with suppress(TypeError):
        return index(levels)
    if isinstance(levels, str) or not hasattr(levels, "__iter__"):
        raise ArgumentError(f"levels wants groups of ranks, as in [[0, 1, 2], [3, 4]], and there is {levels!r} in it")
    inside = [_plain(part) for part in levels]
    if len({isinstance(part, int) for part in inside}) != 1:
        raise ArgumentError(f"a group holds either ranks or groups, one at least, and levels has the group {inside}")
    return inside


def _group(levels: Levels) -> Group:
    if isinstance(levels, int):
        return Group((levels,))
    children = tuple(map(_group, levels))
    return Group(tuple(rank for child in children for rank in child.ranks), children)
