"""What documents that commands write have in common."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def wrapped(words: str) -> str:
    """A paragraph in lines."""
    return "\n".join(textwrap.wrap(" ".join(words.split()), 120, break_long_words=False, break_on_hyphens=False))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
