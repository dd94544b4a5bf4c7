"""The rule file: a user's own choices, as TOML. `docs/rules.md` tells the format.

Text and parsing are apart: rank 0 reads the file, all ranks parse its text, and so all have the same rules.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ...algorithms import Algorithm, Collective, algorithms, lookup, to_collective
from ...algorithms.toml_file import Lines, load, read_text
from ...algorithms.words import did_you_mean, to_bytes
from ...errors import ArgumentError
from ...transports.shm import PROTOCOLS
from .asked import NATIVE
from .choice import Choice

T = TypeVar("T")

ENVIRONMENT = "ABCCL_RULES"
"""Names the rule file; read on rank 0 when a communicator is made."""

_FIELDS = ("collective", "from", "to", "ranks", "hosts", "algorithm", "protocol", "segment", "lanes")
_END = sys.maxsize
_ANY = range(_END)


@dataclass(frozen=True)
class Rule:
    """A choice, and the calls that it is for.

    Attributes:
        collective: what is called.
        nbytes: sizes of the whole vector.
        ranks: how many take part, as spans.
        hosts: on how many hosts.
        choice: how they are done.
        source: where it stands, in words.
    """

    collective: Collective
    nbytes: range
    ranks: tuple[range, ...]
    hosts: tuple[range, ...]
    choice: Choice
    source: str

    def holds(self, collective: Collective, nbytes: int, ranks: int, hosts: int) -> bool:
        """Whether it is for such a call."""
        return (
            collective is self.collective
            and nbytes in self.nbytes
            and any(ranks in span for span in self.ranks)
            and any(hosts in span for span in self.hosts)
        )


def from_environment() -> str:
    """The text of the file that the environment names, "" if it names none.

    Raises:
        ArgumentError: it can not be read.
    """
    path = os.environ.get(ENVIRONMENT)
    try:
        return read(path) if path else ""
    except ArgumentError as error:
        raise ArgumentError(f"{ENVIRONMENT}: {error}: name another file, or unset it") from None


def read(path: str | Path) -> str:
    """The text of a rule file.

    Raises:
        ArgumentError: it can not be read.
    """
    return read_text(path, "rule file")


def parse(text: str, source: str) -> tuple[Rule, ...]:
    """The rules, in the order in which they are asked; one that lists several collectives is one for each.

    Args:
        source: what messages call the file.

    Raises:
        ArgumentError: the file is not as it should be. The message names the rule, its line and the field.
    """
    try:
        return tuple(_rules(load(text, source), Lines(text), source))
    except ArgumentError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{source} is no TOML: {error}") from None


def _rules(document: dict[str, Any], lines: Lines, source: str) -> Iterator[Rule]:
    begin = "begin each rule with a line [[rule]]"
    for name in document:
        if name != "rule":
            raise ArgumentError(f"{source}: {name!r} stands outside of the rules: {begin}")
    tables = document.get("rule", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ArgumentError(f"{source}: rule must be an array of tables: {begin}")
    for number, table in enumerate(tables, 1):
        where = f"{source}, rule {number} (line {lines['rule', number - 1]})"
        try:
            yield from _for_each_collective(table, where)
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from None


def _for_each_collective(table: dict[str, Any], where: str) -> Iterator[Rule]:
    for field in table:
        if field not in _FIELDS:
            raise ArgumentError(f"no field is called {field!r}: {did_you_mean(field, _FIELDS)}")
    for field, example in (("collective", "all_reduce"), ("algorithm", "ring")):
        if field not in table:
            raise ArgumentError(f'it lacks {field}: write {field} = "{example}"')

    def given(field: str, convert: Callable[[Any], T]) -> T:
        try:
            return convert(table[field])
        except ArgumentError as error:
            raise ArgumentError(f"{field}: {error}") from None

    def optional(field: str, convert: Callable[[Any], T]) -> T | None:
        return given(field, convert) if field in table else None

    start = optional("from", partial(_size, least=0)) or 0
    end = optional("to", _size) or _END
    if start >= end:
        raise ArgumentError(f"no size is from {start} to below {end} bytes: from must be less than to")
    ranks = optional("ranks", _spans) or (_ANY,)
    hosts = optional("hosts", _spans) or (_ANY,)
    protocol = optional("protocol", _protocol)
    segment = optional("segment", _size)
    lanes = optional("lanes", _lanes)
    for collective in given("collective", _collectives):
        algorithm = given("algorithm", partial(_algorithm, collective))
        extras = [field for field in ("protocol", "segment", "lanes") if field in table]
        if algorithm == NATIVE and extras:
            raise ArgumentError(f"{NATIVE} is the engine's own algorithm: leave out {', '.join(extras)}")
        yield Rule(
            collective, range(start, end), ranks, hosts, Choice(algorithm, protocol, segment, lanes), source=where
        )


# ---- the values of fields


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _collectives(value: Any) -> tuple[Collective, ...]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"wanted is a name or a list of names, and got {value!r}")
    return tuple(map(to_collective, names))


def _algorithm(collective: Collective, value: Any) -> Algorithm | str:
    if not isinstance(value, str):
        raise ArgumentError(f'wanted is a name, as "ring" or "knomial(radix=8)", and got {value!r}')
    if value == NATIVE:
        return NATIVE
    family = value.partition("(")[0]
    having = [other for other in Collective if family in algorithms(other)]
    if having and collective not in having:
        names = ", ".join(other.value for other in having)
        there = ", ".join(algorithms(collective))
        raise ArgumentError(f"{family} is for {names}, not for {collective.value}, which has {there}")
    return lookup(collective, value)


def _size(value: Any, least: int = 1) -> int:
    if isinstance(value, str):
        return to_bytes(value)
    if not _whole(value, least):
        raise ArgumentError(f'wanted is a number of bytes, {least} or more, or a size as "64KiB", and got {value!r}')
    return int(value)


def _spans(value: Any) -> tuple[range, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ArgumentError("the list is empty, so the rule would never hold: leave it out for any number")
    return tuple(map(_span, values))


def _span(value: Any) -> range:
    found = re.fullmatch(r"([0-9]{1,9})(-([0-9]{1,9})?)?", value) if isinstance(value, str) else None
    if found:
        first = int(found[1])
        end = int(found[3] or first) + 1 if found[3] or not found[2] else _END
        span = range(first, end)
    else:
        span = range(value, value + 1) if _whole(value, 1) else range(0)
    if not span or span[0] < 1:
        raise ArgumentError(f'wanted is a number, 1 or more, or "2-16", or "2-", or a list of these, and got {value!r}')
    return span


def _protocol(value: Any) -> str:
    if value not in PROTOCOLS:
        hint = did_you_mean(value, PROTOCOLS) if isinstance(value, str) else f"there are {', '.join(PROTOCOLS)}"
        raise ArgumentError(f"no protocol is called {value!r}: {hint}")
    return str(value)


def _lanes(value: Any) -> int:
    if not _whole(value, 1):
        raise ArgumentError(f"wanted is a number, 1 or more, and got {value!r}")
    return int(value)
