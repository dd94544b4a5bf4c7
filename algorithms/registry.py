"""The registry: `@algorithm(Collective.X)` above a function makes it known under its own name.

`ring_all_reduce` is known as "ring" among the all_reduce algorithms: the collective's name is taken off the
function's. Everything that a caller must know beside the schedule is declared here, as data. An algorithm may have
parameters: "knomial(radix=8)" is "knomial" with another radix than the declared one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from operator import index
from typing import Any, NamedTuple, TypeVar

from ..errors import AbcclError, ArgumentError, ScheduleError, UnknownAlgorithm
from .collective import Block, Collective, to_collective
from .parameters import Parameter, Value, arguments
from .schedule import Program, Step, relabel, steps
from .words import did_you_mean

T = TypeVar("T")

SizeFunction = Callable[[int], int]
ProgramFunction = Callable[..., Program]


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
    """What an algorithm asks of the number of ranks; `holds` may take the algorithm's parameters by name, too.

    `wants` is what a refusal says, `told` what documents say where that reads otherwise.
    """

    wants: str
    holds: Callable[..., bool]
    told: str | None = None


power_of_two = Restriction("a power of two ranks", lambda size: size & (size - 1) == 0)


def at_least(ranks: int) -> Restriction:
    """The restriction to `ranks` ranks or more."""
    return Restriction(f"at least {ranks} ranks", lambda size: size >= ranks)


def per_rank(size: int) -> int:
    """As many blocks as ranks."""
    return size


@dataclass(frozen=True)
class Algorithm:
    """One registered algorithm, with its parameters bound.

    Attributes:
        name: its name within the collective ("ring"), and those parameters that differ from the declared ones.
        collective: what it does.
        function: the program over (rank, size) and the parameters, written for root 0.
        blocks: into how many blocks the vector is cut, from the number of ranks.
        largest: how many blocks the largest message of any rank holds, from the number of ranks.
        restrictions: what it asks of the number of ranks.
        counts: the closed form of its cost, None for numbers of ranks that have none; tests hold it against the
            schedule.
        parameters: their names and values, in the order declared.
        placed: whether the program wants to know where the root really is, see `program`.
    """

    name: str
    collective: Collective
    function: ProgramFunction
    blocks: SizeFunction
    largest: SizeFunction
    restrictions: tuple[Restriction, ...] = ()
    counts: Callable[[int], Counts | None] | None = None
    parameters: tuple[tuple[str, Value], ...] = ()
    placed: bool = False
    _declaration: _Declaration | None = field(default=None, repr=False, compare=False)

    @property
    def declared(self) -> Mapping[str, Parameter]:
        """The parameters as they were declared."""
        return self._declaration.parameters if self._declaration else {}

    def bind(self, **values: Value) -> Algorithm:
        """The algorithm with other values of some parameters; the same values give the same object.

        Raises:
            ArgumentError: there is no such parameter, or the value is not what it wants.
        """
        found = dict(self.parameters)
        for name, value in values.items():
            if name not in found:
                there = did_you_mean(name, found) if found else f"{self.name} has none, leave it out"
                raise ArgumentError(f"no parameter is called {name}: {there}")
            try:
                found[name] = self.declared[name].converted(value)
            except ArgumentError as error:
                raise ArgumentError(f"{name} {error}") from None
        return _bound(self._declaration, tuple(found.values())) if self._declaration and values else self

    def refusal(self, size: int) -> str | None:
        """What `size` ranks lack for this algorithm, or None if it runs on them."""
        return next((r.wants for r in self.restrictions if not r.holds(size)), None)

    def program(self, rank: int, size: int, root: int = 0) -> list[Step]:
        """The steps of `rank`; for another root than 0 the ranks (and blocks that name ranks) are rotated.

        A `placed` program is not rotated but told of the root.

        Raises:
            ArgumentError: the algorithm does not run on `size` ranks.
        """
        wants = self.refusal(size)
        if wants:
            raise ArgumentError(f"{self.collective.value} {self.name} wants {wants}, and there are {size}")
        parameters: dict[str, Any] = dict(self.parameters)
        if self.placed:
            return list(steps(self.function(rank, size, root=root, **parameters)))
        program = self.function((rank - root) % size, size, **parameters)
        if root == 0:
            return list(steps(program))

        def real(virtual: int) -> int:
            return (virtual + root) % size

        def real_block(block: Block) -> Block:
            return real(block) if isinstance(block, int) and not self.collective.cut else block

        return list(relabel(program, real, real_block))


@dataclass(frozen=True, eq=False)
class _Declaration:
    """What `@algorithm` was told: an algorithm whose parameters are still open."""

    name: str
    collective: Collective
    function: ProgramFunction
    blocks: Any
    largest: Any
    restrictions: tuple[Restriction, ...]
    counts: Callable[..., Counts | None] | None
    parameters: dict[str, Parameter]
    placed: bool


@cache
def _bound(declaration: _Declaration, values: tuple[Value, ...]) -> Algorithm:
    """The algorithm with these values of its parameters."""
    d = declaration
    bound = dict(zip(d.parameters, values, strict=True))
    others = [f"{name}={value}" for name, value in bound.items() if value != d.parameters[name].default]
    name = f"{d.name}({','.join(others)})" if others else d.name

    def declared(what: str, value: Any, convert: Callable[[Any], T]) -> Callable[[int], T]:
        function = _given(value, bound) if callable(value) else lambda size: value
        return _readable(f"{d.collective.value} {name}: {what}", function, convert)

    def restricted(restriction: Restriction) -> Restriction:
        wants = restriction.wants.format(**bound) if bound else restriction.wants
        return Restriction(wants, declared(f"restriction to {wants}", restriction.holds, bool), restriction.told)

    return Algorithm(
        name,
        d.collective,
        d.function,
        declared("blocks", d.blocks if d.blocks is not None else (1 if d.collective.cut else per_rank), index),
        declared("largest", d.largest, index),
        tuple(map(restricted, d.restrictions)),
        declared("counts", d.counts, _as_counts) if d.counts else None,
        tuple(bound.items()),
        d.placed,
        d,
    )


def _given(function: Callable[..., Any], values: Mapping[str, Value]) -> Callable[..., Any]:
    """The function with those of the parameters that it takes."""
    return partial(function, **{name: value for name, value in values.items() if _takes(function, name)})


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether it may be called with an argument of that name; what can not be inspected may not."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


_registry: dict[Collective, dict[str, Algorithm]] = {collective: {} for collective in Collective}

on_redefinition: list[Callable[[], None]] = []
"""Called when a function is registered anew, as in a notebook: whoever keeps plans forgets them."""


def algorithm(
    collective: Collective,
    *,
    blocks: int | Callable[..., int] | None = None,
    largest: int | Callable[..., int] = 1,
    restrictions: Sequence[Restriction] = (),
    counts: Callable[..., Counts | None] | None = None,
    parameters: Mapping[str, Value | Parameter] | None = None,
    placed: bool = False,
    name: str | None = None,
) -> Callable[[ProgramFunction], ProgramFunction]:
    """Register the decorated program; the function itself is returned unchanged.

    Args:
        collective: what the program does.
        blocks: into how many blocks the vector is cut (a number, or a function of the number of ranks). Only
            for all_reduce, broadcast and reduce; elsewhere the blocks are the ranks' parts.
        largest: the number of blocks in the largest message of any rank.
        restrictions: what the program asks of the number of ranks.
        counts: the closed form of steps, bytes sent and bytes folded.
        parameters: what its caller may choose, by name: a default, or a `Parameter` that says what values it wants.
            The program gets all of them by name; the functions above get those that they name.
        placed: the program is called as function(rank, size, root=root) and never rotated: for rooted collectives
            whose ranks are not all alike.
        name: another name than the function's.

    Raises:
        ArgumentError: something declared is not what is wanted, `blocks` are given where the collective fixes them,
            or the name is taken by another function.
    """
    _check_declared(collective, blocks, largest, restrictions, counts)
    if blocks is not None and not collective.cut:
        raise ArgumentError(f"{collective.value} fixes its blocks (one per rank): leave out blocks={blocks!r}")
    if placed and not collective.rooted:
        raise ArgumentError(f"{collective.value} has no root, which a placed program is told: leave out placed=True")
    declared = {word: p if isinstance(p, Parameter) else Parameter(p) for word, p in (parameters or {}).items()}

    def register(function: ProgramFunction) -> ProgramFunction:
        key = name or function.__name__.removesuffix(f"_{collective.value}")
        known = _registry[collective].get(key)
        if known and _origin(known.function) != _origin(function):
            raise ArgumentError(
                f"{collective.value} {key} is taken by {_origin(known.function)}: give the new function another name"
            )
        for word in [*declared, *["root"] * placed]:
            if not _takes(function, word):
                raise ArgumentError(f"{function.__name__} does not take {word}, which is declared: add the argument")
        declaration = _Declaration(
            key, collective, function, blocks, largest, tuple(restrictions), counts, declared, placed
        )
        _registry[collective][key] = _bound(declaration, _defaults(key, declared))
        if known:
            for forget in on_redefinition:
                forget()
        return function

    return register


def algorithms(collective: Collective) -> dict[str, Algorithm]:
    """All algorithms of a collective by name, in order of registration, their parameters as declared."""
    return dict(_registry[collective])


def lookup(collective: Collective, name: str) -> Algorithm:
    """The algorithm of that name; parameters may follow, as in "knomial(radix=8)" or "knomial(8)".

    Raises:
        UnknownAlgorithm: there is none, near names are in the message; or its parameters are not as it wants them.
    """
    known = _registry[collective]
    key, parenthesis, rest = name.partition("(")
    if key not in known:
        raise UnknownAlgorithm(f"no {collective.value} algorithm is called {key!r}: {did_you_mean(key, known)}")
    if not parenthesis:
        return known[key]
    if not rest.endswith(")"):
        raise UnknownAlgorithm(f"{collective.value} {name!r} lacks a parenthesis at its end: write {key}(name=value)")
    try:
        return known[key].bind(**arguments(rest[:-1], known[key].declared))
    except ArgumentError as error:
        raise UnknownAlgorithm(f"{collective.value} {name!r}: {error}") from None


def _defaults(key: str, parameters: Mapping[str, Parameter]) -> tuple[Value, ...]:
    """The default values.

    Raises:
        ArgumentError: one is not what its own parameter wants.
    """
    for name, parameter in parameters.items():
        if type(parameter.default) not in (int, str):
            raise ArgumentError(f"{key}: the default of {name} must be an int or a str, and is {parameter.default!r}")
        try:
            parameter.converted(parameter.default)
        except ArgumentError as error:
            raise ArgumentError(f"{key}: {name} {error} as its default") from None
    return tuple(parameter.default for parameter in parameters.values())


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


def _as_counts(value: Any) -> Counts | None:
    if value is not None and not isinstance(value, Counts):
        raise TypeError(f"wanted is Counts(steps, sent, folded), and it is {value!r}")
    return value


def _origin(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"
