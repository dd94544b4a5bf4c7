"""A topology as a TOML file. `docs/topologies.md` tells the format."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import ArgumentError
from ..toml_file import Key, Lines, load, read_text
from ..words import did_you_mean
from . import checks
from .checks import WrongField
from .topology import Level, Links, Rank, Topology, Way

_FOLDER = Path(__file__).parent / "topologies"
_EXAMPLES = {
    "name": 'name = "..."',
    "per": 'per = "...", the level whose units have these links, or the rank\'s name',
    "size": "size = 8, say; only the last level may leave it out",
}


def shipped() -> tuple[str, ...]:
    """The names of the topologies that come with the library."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def read(name_or_path: str | Path) -> Topology:
    """The topology of a file; or a shipped one by its name, with or without .toml.

    Raises:
        ArgumentError: there is none, or it is not as it should be. The message names the file, the line and the field.
    """
    name = str(name_or_path)
    stem = name.removesuffix(".toml")
    if stem in shipped() and (stem == name or not Path(name).exists()):
        return parse(read_text(_FOLDER / f"{stem}.toml", "topology"), f"{stem}.toml")
    if not Path(name).exists():
        raise ArgumentError(f"no topology and no file is called {name!r}: {did_you_mean(stem, shipped())}")
    return parse(read_text(name, "topology"), name)


def parse(text: str, source: str) -> Topology:
    """The topology that a text in TOML tells.

    Args:
        source: what messages call the file.

    Raises:
        ArgumentError: it is not as it should be. The message names the file, the line and the field.
    """
    document = load(text, source)
    try:
        return _topology(document)
    except RecursionError:
        raise ArgumentError(f"{source}: tables within tables within tables, too deep to be read") from None
    except WrongField as error:
        keys = (part for part in error.path if isinstance(part, str))
        field = ".".join(key if re.fullmatch(r"[\w-]{1,60}", key) else checks.in_short(key) for key in keys)
        raise ArgumentError(f"{source}, line {Lines(text)[error.path]}, {field}: {error.reason}") from None


def _topology(document: dict[str, Any]) -> Topology:
    _check_fields(document, ("name", "about", "sizes", "rank", "level", "protocol"), ("name",), ())
    sizes = document.get("sizes", [])
    if not isinstance(sizes, list):
        raise WrongField(("sizes",), f"wanted is a list of bytes, and got {checks.in_short(sizes)}")
    tables = _tables(document, "level")
    base = Topology(
        document["name"],
        document.get("about", ""),
        _rank(document, ()),
        tuple(_level(table, ("level", index), last=index == len(tables) - 1) for index, table in enumerate(tables)),
        sizes=tuple(sizes),
    )
    rank = _table(document, "rank", ())
    sources = {f"rank.{place}": text for place, text in _sources(rank, rank, ("rank",))}
    for index, (table, level) in enumerate(zip(tables, base.levels)):
        found = _sources(table, table, ("level", index))
        sources.update({f"{level.name}.{place}": text for place, text in found})
    protocols: dict[str, Way] = {}
    for index, table in enumerate(_tables(document, "protocol")):
        path = ("protocol", index)
        _check_fields(table, ("name", "rank", "level", "sources"), ("name",), path)
        name = table["name"]
        checks.PART.check(name, (*path, "name"))
        if name in protocols:
            raise WrongField((*path, "name"), f"wanted is a new name, and {name!r} is a protocol already")
        protocols[name] = _protocol(table, base, path)
        parts = {"rank": table.get("rank", {}), **table.get("level", {})}
        sources.update({f"{name}.{place}": text for place, text in _sources(table, parts, path)})
    return replace(base, protocols=protocols, sources=sources)


def _rank(document: Mapping[str, Any], path: Key) -> Rank:
    table = _table(document, "rank", path)
    _check_fields(table, (*checks.RANK, "sources"), (), (*path, "rank"))
    return Rank(**_values(table, checks.RANK))


def _level(table: dict[str, Any], path: Key, last: bool) -> Level:
    needed = ("name",) if last else ("name", "size")
    _check_fields(table, (*checks.LEVEL, "links", "sources"), needed, path)
    if "size" in table:
        checks.ONE_OR_MORE.check(table["size"], (*path, "size"))
    return Level(**{"size": 0, **_values(table, checks.LEVEL), **_links(table, None, path)})


def _links(table: Mapping[str, Any], before: Links | None, path: Key) -> dict[str, Any]:
    """The links that a table tells of, as it says it or on top of what was said before."""
    if "links" not in table:
        return {}
    given = _table(table, "links", path)
    _check_fields(given, tuple(checks.LINKS), () if before else ("per",), (*path, "links"))
    values = _values(given, checks.LINKS)
    return {"links": replace(before, **values) if before else Links(**values)}


def _protocol(table: Mapping[str, Any], base: Topology, path: Key) -> Way:
    """The topology's rank and levels with what this protocol says of them."""
    rank = _table(table, "rank", path)
    changes = _table(table, "level", path)
    _check_fields(rank, [name for name in checks.RANK if name != "name"], (), (*path, "rank"))
    names = [level.name for level in base.levels]
    _check_fields(changes, names, (), (*path, "level"))
    levels = []
    for level in base.levels:
        change, where = _table(changes, level.name, (*path, "level")), (*path, "level", level.name)
        fields = [name for name in checks.LEVEL if name not in ("name", "size")]
        _check_fields(change, (*fields, "links"), (), where)
        levels.append(replace(level, **_values(change, checks.LEVEL), **_links(change, level.links, where)))
    return replace(base.rank, **_values(rank, checks.RANK)), tuple(levels)


def _values(table: Mapping[str, Any], kinds: Mapping[str, checks.Kind]) -> dict[str, Any]:
    """The fields of these kinds, lists of constants as tuples."""
    return {
        name: tuple(value) if kinds[name].listed and isinstance(value, list) else value
        for name, value in table.items()
        if name in kinds
    }


def _sources(table: Mapping[str, Any], parts: Mapping[str, Any], path: Key) -> Iterator[tuple[str, str]]:
    """By the place of each constant of these parts the text that says where it comes from."""
    given = list(_given(parts))

    def inner(texts: Mapping[str, Any], before: str, path: Key) -> Iterator[tuple[str, str]]:
        for name, text in texts.items():
            place, where = f"{before}{name}", (*path, name)
            if isinstance(text, dict):
                yield from inner(text, f"{place}.", where)
                continue
            if place not in given:
                hint = did_you_mean(place, given) if given else "nothing that has a source is"
                raise WrongField(where, f"no {checks.in_short(place)} is given here: {hint}")
            if not isinstance(text, str) or not text.strip():
                reason = f"wanted is a text that says where {place} comes from, and got {checks.in_short(text)}"
                raise WrongField(where, reason)
            yield place, text

    return inner(_table(table, "sources", path), "", (*path, "sources"))


def _given(parts: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The places of constants; links may have a source together, too."""
    for name, value in parts.items():
        if not isinstance(value, dict):
            yield from [before + name] if name not in ("name", "per") else []
        elif name != "sources":
            yield from [before + name] if name == "links" else []
            yield from _given(value, f"{before}{name}.")


# ---- tables


def _check_fields(table: Mapping[str, Any], known: Collection[str], needed: Collection[str], path: Key) -> None:
    for name in table:
        if name not in known:
            raise WrongField((*path, name), f"there is no such field: {did_you_mean(name, known)}")
    for name in needed:
        if name not in table:
            raise WrongField((*path, name), f"it is missing: write {_EXAMPLES[name]}")


def _table(outer: Mapping[str, Any], name: str, path: Key) -> dict[str, Any]:
    """The table of that name, empty if there is none."""
    table = outer.get(name, {})
    if not isinstance(table, dict):
        raise WrongField((*path, name), f"wanted is a table, and got {checks.in_short(table)}")
    return table


def _tables(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The tables [[name]]."""
    tables = document.get(name, [])
    if not isinstance(tables, list):
        raise WrongField((name,), f"wanted are tables that begin with [[{name}]], and got {checks.in_short(tables)}")
    for index, table in enumerate(tables):
        if not isinstance(table, dict):
            raise WrongField((name, index), f"wanted is a table, and got {checks.in_short(table)}")
    return tables
