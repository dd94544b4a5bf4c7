"""What a machine looks like to the simulator: levels of units within units, and what messages between them cost.

    rank  <  node  <  rack  <  system          a level makes a unit of so many units of the level below

Two ranks talk by the level of the smallest unit that holds both: its alpha, its overhead, its beta. They pass the
links of that level, one on the sender's side and one on the receiver's, which the ranks there share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import inf
from operator import mul
from typing import Any

from ...errors import ArgumentError
from ..interpolation import between, log2
from ..words import count, did_you_mean
from . import checks

Constant = float | tuple[float, ...]
"""A number, or one for each of the topology's `sizes`."""


@dataclass(frozen=True)
class Rank:
    """What a rank is and what it costs, in seconds and seconds per byte.

    Attributes:
        name: what it is called ("GPU").
        launch: to start a collective and to end it.
        send: to put out a byte of a message, for all readers of the first level, and again for all others.
        receive: to copy a byte of a message to where it belongs.
        copy: to copy a byte within the rank.
        fold: gamma; to fold a byte of a message into a sum.
        lends: whether messages of the first level that may be read in place are (`lent`, `lent_fold`), instead of
            `send` and `receive`.
        lent: to copy a byte that the sender has not put out but lent.
        lent_fold: to fold a byte that is lent.
        slots: messages that each pair of ranks, and lane, has room for; 0 for any number.
        processors: lanes that it serves at once; 0 for all.
    """

    name: str = "rank"
    launch: Constant = 0.0
    send: Constant = 0.0
    receive: Constant = 0.0
    copy: Constant = 0.0
    fold: Constant = 0.0
    lends: bool = False
    lent: Constant = 0.0
    lent_fold: Constant = 0.0
    slots: int = 0
    processors: int = 1


@dataclass(frozen=True)
class Links:
    """The links of a level: each unit that has them has as many into it as out of it.

    Attributes:
        per: the level whose units have them, or the rank's name.
        number: how many each has. A message takes one of them, the first that is free.
        capacity: bytes per second of each, in each direction; what one message uses, 1 / beta, if nothing is said.
        through: whether messages that go further than this level pass them, too.
    """

    per: str
    number: int = 1
    capacity: float = inf
    through: bool = False


@dataclass(frozen=True)
class Level:
    """A unit of `size` units of the level below, of ranks for the first.

    Attributes:
        size: 0 for as many as there are; only the last level may say so.
        alpha: seconds per message, from when it is put out until its receiver, waiting, sees it.
        overhead: seconds that a message keeps its sender busy, and its receiver again.
        beta: seconds per byte of one message.
        links: what messages between the units share; None if they share nothing.
        cores: how many of them the ranks of a unit share; 0 if each has its own.
    """

    name: str
    size: int
    alpha: Constant = 0.0
    overhead: Constant = 0.0
    beta: Constant = 0.0
    links: Links | None = None
    cores: int = 0


@dataclass(frozen=True)
class Topology:
    """A machine, as one protocol uses it or several do.

    Attributes:
        name: the machine.
        about: what it is, in a line.
        rank, levels: the levels from the innermost to the outermost.
        protocols: by name what is different with each of several ways to move messages: rank and levels. Empty for one
            way only.
        sizes: bytes of vectors, ascending, that constants given as lists are for; between them they are interpolated.
        sources: by the place of a constant ("node.alpha", "LL.node.alpha") where it comes from.
    """

    name: str
    about: str
    rank: Rank
    levels: tuple[Level, ...]
    protocols: Mapping[str, tuple[Rank, tuple[Level, ...]]] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.check(self)

    @property
    def units(self) -> tuple[int, ...]:
        """Ranks of a unit of each level; 0 for a last level of any size."""
        return tuple(accumulate((level.size for level in self.levels), mul))

    @property
    def most(self) -> int | None:
        """The most ranks that there can be; None for any number."""
        return self.units[-1] or None

    def unit_ranks(self, per: str) -> int:
        """Ranks of a unit that is called so: a level, or the rank itself."""
        units = {self.rank.name: 1, **dict(zip((level.name for level in self.levels), self.units))}
        if per not in units:
            raise ArgumentError(f"{self.name} has no unit called {per!r}: {did_you_mean(per, units)}")
        return units[per]

    def check(self, ranks: int) -> None:
        """Raises ArgumentError if it has not so many ranks."""
        if ranks < 1:
            raise ArgumentError(f"wanted is 1 rank or more, and got {ranks}")
        if self.most is not None and ranks > self.most:
            sizes = " x ".join(f"{level.size} in a {level.name}" for level in self.levels)
            raise ArgumentError(f"{self.name} has {count(self.most, 'rank')} ({sizes}), and got {ranks}: ask for fewer")

    @property
    def places(self) -> tuple[str, ...]:
        """What `with_value` can change: "rank.fold", "system.links.number", and "LL.system.alpha" of a protocol."""
        sizes = tuple(f"{level.name}.size" for level in self.levels)
        own = (f"{name}.{place}" for name, way in self.protocols.items() for place in _places(way))
        return (*sizes, *_places((self.rank, self.levels)), *own)

    def with_value(self, place: str, value: Constant) -> Topology:
        """It with another value at one place. Protocols that have there what it had follow.

        Raises:
            ArgumentError: it has no such place, the value is none for it, or every protocol has its own.
        """
        if place not in self.places:
            near = did_you_mean(place, self.places)
            hint = near if near.startswith("did") else did_you_mean(place, _places((self.rank, self.levels)))
            raise ArgumentError(f"{self.name} has no constant {place!r}: {hint}")
        try:
            return self._with_value(place, value)
        except checks.WrongField as error:
            raise ArgumentError(f"{place}: {error.reason}") from None

    def _with_value(self, place: str, value: Constant) -> Topology:
        sources = {name: text for name, text in self.sources.items() if name != place}
        first, _, rest = place.partition(".")
        if first in self.protocols:
            protocols = {**self.protocols, first: _with(self.protocols[first], rest, value)}
            return replace(self, protocols=protocols, sources=sources)
        base = (self.rank, self.levels)
        old = _value(base, place)
        following = [name for name, way in self.protocols.items() if _value(way, place) == old]
        if self.protocols and not following:
            own = ", ".join(f"{name}.{place}" for name in self.protocols)
            raise ArgumentError(f"every protocol of {self.name} has its own {place}: change {own}")
        protocols = {
            name: _with(way, place, value) if name in following else way for name, way in self.protocols.items()
        }
        rank, levels = _with(base, place, value)
        return replace(self, rank=rank, levels=levels, protocols=protocols, sources=sources)

    def without_protocols(self, protocol: str | None, nbytes: int) -> Topology:
        """The machine as one protocol uses it for a vector of so many bytes: all constants are numbers.

        Raises:
            ArgumentError: there is no such protocol, or there are some and none is named.
        """
        if protocol is None and self.protocols:
            raise ArgumentError(f"{self.name} has several protocols: name one of {', '.join(self.protocols)}")
        if protocol is not None and protocol not in self.protocols:
            hint = did_you_mean(protocol, self.protocols) if self.protocols else "leave it out"
            raise ArgumentError(f"{self.name} has no protocol {protocol!r}: {hint}")
        rank, levels = (self.rank, self.levels) if protocol is None else self.protocols[protocol]
        return replace(
            self,
            rank=replace(rank, **self._at(rank, nbytes)),
            levels=tuple(replace(level, **self._at(level, nbytes)) for level in levels),
            protocols={},
            sizes=(),
        )

    def _at(self, part: Rank | Level, nbytes: int) -> dict[str, Any]:
        """The constants that are lists, for a vector of so many bytes."""
        places = [log2(size) for size in self.sizes]
        listed = {name: value for name, value in vars(part).items() if isinstance(value, tuple)}
        return {name: between(places, values, log2(nbytes)) for name, values in listed.items()}


Way = tuple[Rank, tuple[Level, ...]]


def _places(way: Way) -> tuple[str, ...]:
    """The constants of a way to move messages."""
    _, levels = way
    found = [f"rank.{name}" for name in checks.RANK if name != "name"]
    for level in levels:
        found += [f"{level.name}.{name}" for name in checks.LEVEL if name not in ("name", "size")]
        if level.links:
            found += [f"{level.name}.links.{name}" for name in checks.LINKS if name != "per"]
    return tuple(found)


def _value(way: Way, place: str) -> Any:
    rank, levels = way
    unit, *names = place.split(".")
    found: Any = rank if unit == "rank" else next(level for level in levels if level.name == unit)
    for name in names:
        found = getattr(found, name, None)
    return found


def _with(way: Way, place: str, value: Any) -> Way:
    rank, levels = way
    unit, *names = place.split(".")
    if unit == "rank":
        return replace(rank, **{names[0]: value}), levels
    return rank, tuple(_changed(level, names, value) if level.name == unit else level for level in levels)


def _changed(part: Any, names: Sequence[str], value: Any) -> Any:
    """It with another value at the end of this path of names."""
    name, *more = names
    return replace(part, **{name: _changed(getattr(part, name), more, value) if more else value})
