"""What a topology may say: the fields one by one, and together."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import ArgumentError
from ..words import did_you_mean

if TYPE_CHECKING:
    from .topology import Level, Rank, Topology

Path = tuple[str | int, ...]
"""Keys and indices of the TOML document that a topology would be: ("level", 1, "alpha")."""


class WrongField(ArgumentError):
    """A field of a topology is not as it should be.

    Attributes:
        path: which field.
        reason: what was wanted, and what came.
    """

    def __init__(self, path: Path, reason: str) -> None:
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        super().__init__(f"{name}: {reason}")
        self.path, self.reason = path, reason


class Kind(NamedTuple):
    """What a field may hold, in words and as a test; `listed` if it may be one for each of the topology's sizes."""

    wanted: str
    holds: Callable[[Any], bool]
    listed: bool = False

    def check(self, value: Any, path: Path) -> None:
        """Raises WrongField if it is none."""
        if not self.holds(value):
            raise WrongField(path, f"wanted is {self.wanted}, and got {in_short(value)}")


def is_whole(value: Any, least: int, most: int = sys.maxsize) -> bool:
    """Whether it is an integer, and in these bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any, least: float, most: float = sys.float_info.max) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value == value.strip() and 0 < len(value) <= 60


_LARGEST = 2**31 - 1
_TIME = Kind("seconds, 0 to 1e6", lambda value: _is_number(value, 0, 1e6), listed=True)
_TIME_PER_BYTE = Kind("seconds per byte, 0 to 1e6", lambda value: _is_number(value, 0, 1e6), listed=True)
_COUNT = Kind("an integer, 0 or more", lambda value: is_whole(value, 0, _LARGEST))
ONE_OR_MORE = Kind("an integer, 1 or more", lambda value: is_whole(value, 1, _LARGEST))
_MANY = 65_536
_YES_OR_NO = Kind("true or false", lambda value: isinstance(value, bool))
PART = Kind("a name without a dot", lambda value: _is_name(value) and "." not in value)

TITLE = Kind("a name", _is_name)
ABOUT = Kind("a text", lambda value: isinstance(value, str))

RANK = {
    "name": PART,
    "launch": _TIME,
    "send": _TIME_PER_BYTE,
    "receive": _TIME_PER_BYTE,
    "copy": _TIME_PER_BYTE,
    "fold": _TIME_PER_BYTE,
    "lends": _YES_OR_NO,
    "lent": _TIME_PER_BYTE,
    "lent_fold": _TIME_PER_BYTE,
    "slots": _COUNT,
    "processors": _COUNT,
}
LINKS = {
    "per": PART,
    "number": Kind(f"an integer, 1 to {_MANY}", lambda value: is_whole(value, 1, _MANY)),
    "capacity": Kind("bytes per second, 1 or more", lambda value: _is_number(value, 1, math.inf)),
    "through": _YES_OR_NO,
}
LEVEL = {
    "name": PART,
    "size": _COUNT,
    "alpha": _TIME,
    "overhead": _TIME,
    "beta": _TIME_PER_BYTE,
    "cores": Kind(f"an integer, 0 to {_MANY}", lambda value: is_whole(value, 0, _MANY)),
}


def check(topology: Topology) -> None:
    """Raises WrongField if there is something that the simulator could not go by."""
    TITLE.check(topology.name, ("name",))
    ABOUT.check(topology.about, ("about",))
    _check_sizes(topology.sizes)
    if not topology.levels:
        raise WrongField(("level",), "wanted is a level at least, and there is none")
    _check_names(topology)
    _check_way(topology, topology.rank, topology.levels, (), range(len(topology.levels)))
    _check_levels(topology)
    names = [level.name for level in topology.levels]
    for number, (name, (rank, levels)) in enumerate(topology.protocols.items()):
        path = ("protocol", number)
        PART.check(name, (*path, "name"))
        if name in ("rank", *names):
            raise WrongField((*path, "name"), f"wanted is a new name, and {name!r} is the rank's or a level's")
        if [(level.name, level.size) for level in levels] != [(level.name, level.size) for level in topology.levels]:
            raise WrongField((*path, "level"), "wanted are the levels of the topology, of the same sizes")
        _check_way(topology, rank, levels, path, names)


def _check_sizes(sizes: Sequence[int]) -> None:
    for index, size in enumerate(sizes):
        least = sizes[index - 1] + 1 if index else 1
        if not is_whole(size, least):
            wanted = f"wanted are bytes, whole numbers from 1 up, ascending, and got {in_short(size)}"
            raise WrongField(("sizes", index), wanted + (f" after {sizes[index - 1]}" if index else ""))


def _check_way(topology: Topology, rank: Rank, levels: Sequence[Level], path: Path, keys: Sequence[str | int]) -> None:
    """What one protocol has, field by field; keys are those of the levels."""
    _check_fields(rank, RANK, (*path, "rank"), topology.sizes)
    lower, shared = [topology.rank.name], ""
    for key, level in zip(keys, levels):
        where = (*path, "level", key)
        _check_fields(level, LEVEL, where, topology.sizes)
        if level.links:
            _check_fields(level.links, LINKS, (*where, "links"), topology.sizes)
            if level.links.per not in lower:
                hint = did_you_mean(level.links.per, lower)
                reason = f"no unit below {level.name} is called {level.links.per!r}: {hint}"
                raise WrongField((*where, "links", "per"), reason)
        if level.cores and not level.size:
            raise WrongField((*where, "cores"), f"wanted is a level with a size, and {level.name} has none")
        if level.cores and shared:
            raise WrongField((*where, "cores"), f"wanted are cores on one level only, and {shared} has some already")
        shared = shared or (level.name if level.cores else "")
        lower.append(level.name)


def _check_fields(part: object, kinds: Mapping[str, Kind], path: Path, sizes: Sequence[int]) -> None:
    for name, kind in kinds.items():
        value, where = getattr(part, name), (*path, name)
        if not (kind.listed and isinstance(value, tuple)):
            kind.check(value, where)
            continue
        if len(value) != len(sizes):
            reason = f"wanted is a number, or one for each of the {len(sizes)} sizes" if sizes else "wanted is a number"
            hint = "" if sizes else ": lists are for topologies that say sizes"
            raise WrongField(where, f"{reason}, and got a list of {len(value)}{hint}")
        for index, item in enumerate(value):
            kind.check(item, (*where, index))


def _check_names(topology: Topology) -> None:
    PART.check(topology.rank.name, ("rank", "name"))
    seen = {"rank": "is what every rank is called", topology.rank.name: "is the rank's name"}
    for index, level in enumerate(topology.levels):
        PART.check(level.name, ("level", index, "name"))
        if level.name in seen:
            raise WrongField(("level", index, "name"), f"wanted is a new name, and {level.name!r} {seen[level.name]}")
        seen[level.name] = "is a level already"


def _check_levels(topology: Topology) -> None:
    for index, level in enumerate(topology.levels):
        if level.size == 0 and level is not topology.levels[-1]:
            reason = "wanted is an integer, 1 or more, on every level but the last, and got 0"
            raise WrongField(("level", index, "size"), reason)
        if topology.units[index] > _LARGEST:
            reason = f"wanted are at most {_LARGEST} ranks in all, and up to here there are {topology.units[index]}"
            raise WrongField(("level", index, "size"), reason)


def in_short(value: Any) -> str:
    """A value as a message shows it."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # Python writes no integers of thousands of digits.
        return "something too long to be shown"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
