"""A topology as the text of a TOML file, which `parse` reads back to an equal one."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...errors import ArgumentError
from . import checks
from .topology import Level, Rank, Topology


def to_toml(topology: Topology) -> str:
    """The text of its file. Fields that are as they would be without it are left out, unless they have a source.

    Raises:
        ArgumentError: a protocol has another name for the rank, or lacks links that the topology has.
    """
    sources = topology.sources
    head = {name: getattr(topology, name) for name in ("name", "about", "sizes")}
    lines = [f"{name} = {_value(value)}" for name, value in head.items() if value]
    lines += ["", "[rank]", *_fields(topology.rank, Rank(), checks.RANK, "rank.", sources)]
    lines += _sources("[rank.sources]", "rank.", sources)
    for level in topology.levels:
        lines += ["", "[[level]]", *_fields(level, Level("", 0), (*checks.LEVEL, "links"), f"{level.name}.", sources)]
        lines += _sources("[level.sources]", f"{level.name}.", sources)
    for name in topology.protocols:
        lines += ["", "[[protocol]]", f"name = {_value(name)}", *_changes(name, topology)]
        lines += _sources("[protocol.sources]", f"{name}.", sources)
    return "\n".join(lines) + "\n"


def _changes(name: str, topology: Topology) -> Iterator[str]:
    """What a protocol has that is not as the topology's."""
    rank, levels = topology.protocols[name]
    if rank.name != topology.rank.name:
        raise ArgumentError(
            f"protocol {name} calls a rank {rank.name!r}, and in a file all protocols have the topology's name for it, "
            f"{topology.rank.name!r}: take that"
        )
    for field in _fields(rank, topology.rank, checks.RANK, f"{name}.rank.", topology.sources):
        yield f"rank.{field}"
    for level, base in zip(levels, topology.levels):
        if base.links and not level.links:
            raise ArgumentError(
                f"protocol {name} has no links at {level.name}, and a file gives it the topology's: give it some"
            )
        before = f"{name}.{level.name}."
        for field in _fields(level, base, (*checks.LEVEL, "links"), before, topology.sources):
            yield f"level.{_key(level.name)}.{field}"


def _fields(part: Any, base: Any, names: Collection[str], before: str, sources: Mapping[str, str]) -> Iterator[str]:
    """Those fields that are not as the base has them, or have a source."""
    for name in names:
        value, place = getattr(part, name), f"{before}{name}"
        if value != getattr(base, name) or any(one == place or one.startswith(f"{place}.") for one in sources):
            yield f"{name} = {_value(value)}"


def _sources(head: str, before: str, sources: Mapping[str, str]) -> Iterator[str]:
    found = {place[len(before) :]: text for place, text in sources.items() if place.startswith(before)}
    if found:
        yield from (head, *(f"{_key(place)} = {_value(text)}" for place, text in found.items()))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return f"{{ {', '.join(f'{name} = {_value(getattr(value, name))}' for name in checks.LINKS)} }}"
