"""A document that several commands write parts of: each keeps to its own.

A part stands between `<!-- part: NAME -->` and `<!-- end of NAME -->`; what is around them is written by hand.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ArgumentError


def write_part(document: Path, name: str, text: str) -> None:
    """Put a text in the place of the document's part of that name.

    Raises:
        ArgumentError: the document has no such part, or several.
    """
    begin, end = f"<!-- part: {name} -->\n", f"<!-- end of {name} -->\n"
    before = document.read_text(encoding="utf-8")
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ArgumentError(f"{document} has no part {name}: write the lines {begin.strip()} and {end.strip()} into it")
    head, rest = before.split(begin)
    _, tail = rest.split(end)
    document.write_text(f"{head}{begin}{text.strip()}\n{end}{tail}", encoding="utf-8")
