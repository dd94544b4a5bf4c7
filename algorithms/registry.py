"""The registry: `@algorithm(Collective.X)` above a function makes it known under its own name.

`ring_all_reduce` is known as "ring" among the all_reduce algorithms: the collective's name is taken off the
function's. Everything that a caller must know beside the schedule is declared here, as data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import index
from typing import Any, NamedTuple, TypeVar

from ..errors import AbcclError, ArgumentError, ScheduleError, UnknownAlgorithm
from .collective import Block, Collective, to_collective
from .schedule import Program, Step, relabel, steps
from .words import did_you_mean

T = TypeVar("T")

SizeFunction = Callable[[int], int]


class Counts(NamedTuple):
    """What a schedule costs, free of any machine.

    `steps` is the longest chain of dependent messages. `sent` and `folded` are the largest of any rank, as
    parts of the whole vector (the concatenation, for a collective that gathers or scatters; one rank's send
    buffer for all_to_all).
    """

    steps: int
    sent: Fraction
    folded: Fraction


@dataclass(frozen=True)
class Restriction:
    """What an algorithm asks of the number of ranks."""

    wants: str
    holds: Callable[[int], bool]


power_of_two = Restriction("a power of two ranks", lambda size: size & (size - 1) == 0)


def at_least(ranks: int) -> Restriction:
    """The restriction to `ranks` ranks or more."""
    return Restriction(f"at least {ranks} ranks", lambda size: size >= ranks)


def per_rank(size: int) -> int:
    """As many blocks as ranks."""
    return size


@dataclass(frozen=True)
class Algorithm:
    """One registered algorithm.

    Attributes:
        name: its name within the collective ("ring").
        collective: what it does.
        function: the program over (rank, size), written for root 0.
        blocks: into how many blocks the vector is cut, from the number of ranks.
        largest: how many blocks the largest message of any rank holds, from the number of ranks.
        restrictions: what it asks of the number of ranks.
        counts: the closed form of its cost; tests hold it against the schedule.
    """

    name: str
    collective: Collective
    function: Callable[[int, int], Program]
    blocks: SizeFunction
    largest: SizeFunction
    restrictions: tuple[Restriction, ...] = ()
    counts: Callable[[int], Counts] | None = None

    def refusal(self, size: int) -> str | None:
        """What `size` ranks lack for this algorithm, or None if it runs on them."""
        return next((r.wants for r in self.restrictions if not r.holds(size)), None)

    def program(self, rank: int, size: int, root: int = 0) -> list[Step]:
        """The steps of `rank`; for another root than 0 the ranks (and blocks that name ranks) are rotated.

        Raises:
            ArgumentError: the algorithm does not run on `size` ranks.
        """
        wants = self.refusal(size)
        if wants:
            raise ArgumentError(f"{self.collective.value} {self.name} wants {wants}, and there are {size}")
        program = self.function((rank - root) % size, size)
        if root == 0:
            return list(steps(program))

        def real(virtual: int) -> int:
            return (virtual + root) % size

        def real_block(block: Block) -> Block:
            return real(block) if isinstance(block, int) and not self.collective.cut else block

        return list(relabel(program, real, real_block))


_registry: dict[Collective, dict[str, Algorithm]] = {collective: {} for collective in Collective}

on_redefinition: list[Callable[[], None]] = []
"""Called when a function is registered anew, as in a notebook: whoever keeps plans forgets them."""


def algorithm(
    collective: Collective,
    *,
    blocks: int | SizeFunction | None = None,
    largest: int | SizeFunction = 1,
    restrictions: Sequence[Restriction] = (),
    counts: Callable[[int], Counts] | None = None,
    name: str | None = None,
) -> Callable[[Callable[[int, int], Program]], Callable[[int, int], Program]]:
    """Register the decorated program; the function itself is returned unchanged.

    Args:
        collective: what the program does.
        blocks: into how many blocks the vector is cut (a number, or a function of the number of ranks). Only
            for all_reduce, broadcast and reduce; elsewhere the blocks are the ranks' parts.
        largest: the number of blocks in the largest message of any rank.
        restrictions: what the program asks of the number of ranks.
        counts: the closed form of steps, bytes sent and bytes folded.
        name: another name than the function's.

    Raises:
        ArgumentError: something declared is not what is wanted, `blocks` are given where the collective fixes them,
            or the name is taken by another function.
    """
    _check_declared(collective, blocks, largest, restrictions, counts)
    if blocks is not None and not collective.cut:
        raise ArgumentError(f"{collective.value} fixes its blocks (one per rank): leave out blocks={blocks!r}")

    def register(function: Callable[[int, int], Program]) -> Callable[[int, int], Program]:
        key = name or function.__name__.removesuffix(f"_{collective.value}")
        known = _registry[collective].get(key)
        if known and _origin(known.function) != _origin(function):
            raise ArgumentError(
                f"{collective.value} {key} is taken by {_origin(known.function)}: give the new function another name"
            )

        def declared(what: str, value: Any, convert: Callable[[Any], T]) -> Callable[[int], T]:
            function = value if callable(value) else lambda size: value
            return _readable(f"{collective.value} {key}: {what}", function, convert)

        _registry[collective][key] = Algorithm(
            key,
            collective,
            function,
            declared("blocks", blocks if blocks is not None else (1 if collective.cut else per_rank), index),
            declared("largest", largest, index),
            tuple(replace(r, holds=declared(f"restriction to {r.wants}", r.holds, bool)) for r in restrictions),
            declared("counts", counts, _as_counts) if counts else None,
        )
        if known:
            for forget in on_redefinition:
                forget()
        return function

    return register


def algorithms(collective: Collective) -> dict[str, Algorithm]:
    """All algorithms of a collective by name, in order of registration."""
    return dict(_registry[collective])


def lookup(collective: Collective, name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        UnknownAlgorithm: there is none; near names are in the message.
    """
    known = _registry[collective]
    if name in known:
        return known[name]
    raise UnknownAlgorithm(f"no {collective.value} algorithm is called {name!r}: {did_you_mean(name, known)}")


def _check_declared(collective: Any, blocks: Any, largest: Any, restrictions: Any, counts: Any) -> None:
    """Refuse what can be seen to be wrong before there is a number of ranks."""
    if not isinstance(collective, Collective):
        wanted = to_collective(collective) if isinstance(collective, str) else Collective.ALL_REDUCE
        raise ArgumentError(
            f"@algorithm wants a collective in parentheses, and got {collective!r}: "
            f"write @algorithm(Collective.{wanted.name})"
        )
    for what, value in (("blocks", blocks), ("largest", largest)):
        if not (value is None or callable(value) or hasattr(value, "__index__")):
            raise ArgumentError(f"{what} wants a number, or a function of the number of ranks, and got {value!r}")
    if not isinstance(restrictions, Sequence) or not all(isinstance(r, Restriction) for r in restrictions):
        raise ArgumentError(
            f"restrictions wants a list of Restriction, and got {restrictions!r}: write [power_of_two], [at_least(4)] "
            f"or [Restriction('an even number of ranks', lambda size: size % 2 == 0)]"
        )
    if not (counts is None or callable(counts)):
        raise ArgumentError(f"counts wants a function of the number of ranks, and got {counts!r}: write lambda p: ...")


def _readable(what: str, function: Callable[[int], Any], convert: Callable[[Any], T]) -> Callable[[int], T]:
    """What an algorithm's author declared, with errors that say so."""

    def checked(size: int) -> T:
        try:
            return convert(function(size))
        except AbcclError:
            raise
        except Exception as error:
            raise ScheduleError(f"{what} for {size} ranks: {type(error).__name__}: {error}") from error

    return checked


def _as_counts(value: Any) -> Counts:
    if not isinstance(value, Counts):
        raise TypeError(f"wanted is Counts(steps, sent, folded), and it is {value!r}")
    return value


def _origin(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"
