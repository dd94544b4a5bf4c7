"""TOML files that people write: their text, and on which line of it a value stands."""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Key = tuple[str | int, ...]
"""Keys of tables and indices of arrays, from the outside: ("level", 1, "alpha")."""


def read_text(path: str | Path, what: str) -> str:
    """The text of a file.

    Args:
        what: what messages call it: "rule file".

    Raises:
        ArgumentError: it can not be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"the {what} {path} can not be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ArgumentError(f"the {what} {path} is no text in UTF-8: {error}") from None


def load(text: str, source: str) -> dict[str, Any]:
    """The document.

    Args:
        source: what messages call the file.

    Raises:
        ArgumentError: it is no TOML. The message names the line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last = text.count("\n") + 1
        reason = str(error).replace("(at end of document)", f"(at line {last}, the end)")
    except (ValueError, RecursionError) as error:
        # A number of too many digits, tables within too many tables: the parser does not say where.
        reason = f"{error} (at line {_line_of(type(error), text)})"
    raise ArgumentError(f"{source} is no TOML: {reason}")


def _line_of(error: type[Exception], text: str) -> int:
    """The last line of the shortest beginning of a text that raises such an error."""
    lines = text.split("\n")

    def raises(end: int) -> bool:
        try:
            tomllib.loads("\n".join(lines[:end]))
        except (ValueError, RecursionError) as other:
            return type(other) is error
        return False

    return bisect_left(range(1, len(lines) + 1), True, key=raises) + 1


_PART = r"""(?:[\w-]+|"(?:\\.|[^"\\])*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"(\[\[?)[ \t]*({_DOTTED})[ \t]*\]\]?")
_KEY = re.compile(rf"({_DOTTED})[ \t]*=[ \t]*")
_BETWEEN = re.compile(r"(?:[\s,]|#[^\n]*)*")
_SCALAR = re.compile(
    r'"""(?:\\.|[^\\])*?""""{0,2}' r"|'''.*?''''{0,2}" r'|"(?:\\.|[^"\\])*"' r"|'[^']*'" r"|[^,\]}#\n]+", re.DOTALL
)


class Lines:
    """Where in a TOML text each table, key and item of an array begins; the text must be one that parses."""

    def __init__(self, text: str) -> None:
        self._newlines = [at for at, character in enumerate(text) if character == "\n"]
        self._at: dict[Key, int] = {(): 0}
        self._tables: dict[Key, int] = {}
        self._scan(text)

    def __getitem__(self, key: Key) -> int:
        """The line, from 1 up. Of what is not there, that of the innermost table or array where it could be."""
        while key not in self._at:
            key = key[:-1]
        return bisect_left(self._newlines, self._at[key]) + 1

    def keys(self) -> set[Key]:
        """All that is there."""
        return set(self._at)

    def _scan(self, text: str) -> None:
        # What is open, the innermost last: its key, and of an array the index that comes next.
        opened: list[tuple[Key, int | None]] = [((), None)]
        at = 0
        while (at := _match(_BETWEEN, text, at).end()) < len(text):
            outer, index = opened[-1]
            if text[at] in "]}":
                opened.pop()
                at += 1
                continue
            if index is not None:
                opened[-1] = (outer, index + 1)
                key = (*outer, index)
                self._at[key] = at
            elif len(opened) == 1 and (header := _HEADER.match(text, at)):
                opened = [(self._table(_names(header[2]), at, header[1] == "[["), None)]
                at = header.end()
                continue
            else:
                key = outer
                assigned = _match(_KEY, text, at)
                for name in _names(assigned[1]):
                    key = (*key, name)
                    self._at.setdefault(key, at)
                at = assigned.end()
            if text[at] in "[{":
                opened.append((key, 0 if text[at] == "[" else None))
                at += 1
            else:
                at = _match(_SCALAR, text, at).end()

    def _table(self, names: Sequence[str], at: int, one_of_many: bool) -> Key:
        """The key of a table whose header is here."""
        key: Key = ()
        for depth, name in enumerate(names, 1):
            key = (*key, name)
            self._at.setdefault(key, at)
            if one_of_many and depth == len(names):
                self._tables[key] = self._tables.get(key, -1) + 1
            if key in self._tables:
                key = (*key, self._tables[key])
        self._at[key] = at
        return key


def _match(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    found = pattern.match(text, at)
    assert found, "a text that parses has it here"
    return found


def _names(dotted: str) -> list[str]:
    """The parts of a key, as the parser reads them."""
    names = []
    inner: Any = tomllib.loads(f"{dotted} = 0")
    while isinstance(inner, dict):
        ((name, inner),) = inner.items()
        names.append(name)
    return names
