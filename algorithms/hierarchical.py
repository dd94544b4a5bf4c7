"""Hierarchical schedules: any registered algorithms, composed over groups of ranks in two levels or more.

What goes up, across and down:

    all_reduce       reduce_scatter from the lowest groups up, all_reduce between the top groups, all_gather down
    reduce_scatter   from the lowest groups up; all_gather and barrier: down; all_to_all: up
    broadcast        down, between ranks that stand for their whole group; reduce: up

The algorithm between the top groups is `outer`, that of the groups below is `inner`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

from .collective import Collective
from .composition import Composition, Way
from .cost import is_balanced
from .groups import Levels, grouped, square, written
from .parameters import Parameter
from .registry import Algorithm, Counts, ProgramFunction, Restriction, algorithm, lookup, on_redefinition
from .schedule import Program

HOSTS = "hosts"
"""The levels that a communicator puts its hosts in the place of; without it they are SQUARE."""

SQUARE = "square"
"""The levels that serve any number of ranks: groups of about its square root."""

_ANY = (HOSTS, SQUARE)


def among(algorithm: Algorithm, levels: Callable[[], str]) -> Algorithm:
    """The algorithm among such groups, if it is one of groups and says nothing of them."""
    return algorithm.bind(levels=levels()) if dict(algorithm.parameters).get("levels") == HOSTS else algorithm


@lru_cache(maxsize=64)
def _compose(way: Way, size: int, levels: str, inner: str, outer: str, root: int = 0) -> Composition:
    return Composition(way, grouped(square(size) if levels in _ANY else levels), inner, outer, root)


on_redefinition.append(_compose.cache_clear)


def _counts(composition: Composition) -> Counts | None:
    """The counts, if groups are alike and below the top all ranks do alike: then phases add up, else they overlap."""
    way, top = composition.way, composition.top
    if top.form is None or way.single or way.collective.rooted:
        return None
    steps, sent, folded = 0, Fraction(0), Fraction(0)
    for group in top.around(0):
        ranks = len(group.children)
        for kind in composition.kinds(group) if ranks > 1 else ():
            part = composition.algorithm(group, kind)
            counts = part.counts(ranks) if part.counts else None
            if counts is None or (group is not top and not is_balanced(part, ranks, counts.steps)):
                return None
            share = 1 if kind is Collective.ALL_TO_ALL else Fraction(1, len(group.children[0].ranks))
            steps += counts.steps
            sent += share * counts.sent
            folded += share * counts.folded
    return Counts(steps, sent, folded)


def _composed(way: Way, inner: str, outer: str) -> Callable[[ProgramFunction], ProgramFunction]:
    """Register the composition, with these algorithms if nothing is said."""

    def composed(size: int, levels: str, inner: str, outer: str) -> Composition:
        return _compose(way, size, levels, inner, outer)

    restrictions = [
        Restriction(
            "as many ranks as levels={levels} has",
            lambda size, levels: levels in _ANY or len(grouped(levels).ranks) == size,
            told="",
        ),
        Restriction(
            "groups on which inner={inner} and outer={outer} run, other than levels={levels}",
            lambda size, levels, inner, outer: composed(size, levels, inner, outer).serves,
            told="Every group must have as many parts as the algorithm named for it can serve.",
        ),
    ]
    if way.top is Collective.ALL_REDUCE:
        restrictions.append(
            Restriction(
                "another outer than {outer}, whose ranks would not all fold in the same order with levels={levels}",
                lambda size, levels, inner, outer: composed(size, levels, inner, outer).folds_alike,
                told="Where groups are shuffled, an `outer` whose result depends on their order is refused.",
            )
        )
    return algorithm(
        way.collective,
        blocks=(lambda size, levels, inner, outer: composed(size, levels, inner, outer).blocks)
        if way.collective.cut
        else None,
        largest=lambda size, levels, inner, outer: composed(size, levels, inner, outer).largest,
        restrictions=restrictions,
        counts=lambda size, levels, inner, outer: _counts(composed(size, levels, inner, outer)),
        parameters={
            "levels": Parameter(HOSTS, "groups of ranks", lambda text: text in _ANY or bool(grouped(text))),
            "inner": inner,
            "outer": outer,
        },
        placed=way.collective.rooted,
    )


_ALL_REDUCE = Way(Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE, Collective.ALL_GATHER)
_LEADERS = Way(Collective.ALL_REDUCE, Collective.REDUCE, Collective.ALL_REDUCE, Collective.BROADCAST, single=True)
_REDUCE_SCATTER = Way(Collective.REDUCE_SCATTER, Collective.REDUCE_SCATTER, Collective.REDUCE_SCATTER, None)
_ALL_GATHER = Way(Collective.ALL_GATHER, None, Collective.ALL_GATHER, Collective.ALL_GATHER)
_BROADCAST = Way(Collective.BROADCAST, None, Collective.BROADCAST, Collective.BROADCAST, single=True)
_REDUCE = Way(Collective.REDUCE, Collective.REDUCE, Collective.REDUCE, None, single=True)
_ALL_TO_ALL = Way(Collective.ALL_TO_ALL, Collective.ALL_TO_ALL, Collective.ALL_TO_ALL, None)
_BARRIER = Way(Collective.BARRIER, None, Collective.BARRIER, Collective.BARRIER)


@_composed(_ALL_REDUCE, inner="direct", outer="ring")
def hierarchical_all_reduce(rank: int, size: int, levels: str, inner: str, outer: str) -> Program:
    """Reduce_scatter within the groups, all_reduce between equals of the groups, all_gather within them.

    The steps of its parts; 2 (h - 1)/h of the vector leaves each of h groups (outer=ring), spread over its ranks.
    Folklore.
    """
    return _compose(_ALL_REDUCE, size, levels, inner, outer).program(rank)


@_composed(_LEADERS, inner="direct", outer="recursive_doubling")
def hierarchical_leaders_all_reduce(rank: int, size: int, levels: str, inner: str, outer: str) -> Program:
    """Reduce to a leader in each group, all_reduce among the leaders, broadcast within the groups.

    The steps of its parts, and few messages: for short vectors. Folklore.
    """
    return _compose(_LEADERS, size, levels, inner, outer).program(rank)


@_composed(_REDUCE_SCATTER, inner="direct", outer="ring")
def hierarchical_reduce_scatter(rank: int, size: int, levels: str, inner: str, outer: str) -> Program:
    """Reduce_scatter within the groups, so that each rank has what its equals in all groups want, then among equals.

    The steps of its parts; of h groups each sends (h - 1)/h of the vector to others (outer=ring), no more than it must.
    Folklore.
    """
    return _compose(_REDUCE_SCATTER, size, levels, inner, outer).program(rank)


@_composed(_ALL_GATHER, inner="direct", outer="ring")
def hierarchical_all_gather(rank: int, size: int, levels: str, inner: str, outer: str) -> Program:
    """All_gather among equals of the groups, then within the groups.

    The steps of its parts; of h groups each sends (h - 1)/h of the result to others (outer=ring), no more than it must.
    Folklore.
    """
    return _compose(_ALL_GATHER, size, levels, inner, outer).program(rank)


@_composed(_BROADCAST, inner="direct", outer="ring")
def hierarchical_broadcast(rank: int, size: int, levels: str, inner: str, outer: str, root: int = 0) -> Program:
    """Broadcast to one rank of each group, then within the groups.

    The steps of its parts; each group gets the vector once. Folklore.
    """
    return _compose(_BROADCAST, size, levels, inner, outer, root).program(rank)


@_composed(_REDUCE, inner="direct", outer="chain")
def hierarchical_reduce(rank: int, size: int, levels: str, inner: str, outer: str, root: int = 0) -> Program:
    """Reduce to one rank of each group, then among these.

    The steps of its parts; each group but the root's sends the vector once. Folklore.
    """
    return _compose(_REDUCE, size, levels, inner, outer, root).program(rank)


@_composed(_ALL_TO_ALL, inner="direct", outer="pairwise")
def hierarchical_all_to_all(rank: int, size: int, levels: str, inner: str, outer: str) -> Program:
    """Within the groups each block goes to the equal of its destination, then among equals to the destination.

    The steps of its parts; each block is sent twice, and between groups a rank sends one message to each group instead
    of one to each rank. Folklore.
    """
    return _compose(_ALL_TO_ALL, size, levels, inner, outer).program(rank)


@_composed(_BARRIER, inner="recursive_doubling", outer="recursive_doubling")
def hierarchical_barrier(rank: int, size: int, levels: str, inner: str, outer: str) -> Program:
    """A barrier among equals of the groups, then one within each group.

    The steps of its parts, nothing in the messages. Folklore.
    """
    return _compose(_BARRIER, size, levels, inner, outer).program(rank)


def hierarchical(
    collective: Collective,
    levels: Levels | str,
    inner: str | Sequence[str] | None = None,
    outer: str | None = None,
    leaders: bool = False,
) -> Algorithm:
    """The algorithm that composes others over groups of ranks.

    Args:
        collective: what it does.
        levels: the groups, as nested sequences of ranks or in writing (`groups.written` turns the one into the other).
        inner: the algorithm within the groups: a name, or one for each level below the top, from the top down.
        outer: the algorithm between the top groups.
        leaders: of all_reduce, the way for short vectors: only one rank of each group talks to the other groups.

    Raises:
        ArgumentError: these are no groups.
        UnknownAlgorithm: the collective has no hierarchical algorithm.
    """
    chosen = {
        "levels": levels if isinstance(levels, str) else written(levels),
        "inner": inner if inner is None or isinstance(inner, str) else "/".join(inner),
        "outer": outer,
    }
    known = lookup(collective, "hierarchical_leaders" if leaders else "hierarchical")
    return known.bind(**{name: value for name, value in chosen.items() if value is not None})
