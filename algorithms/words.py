"""Numbers and names in writing, for messages to people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def count(number: int, noun: str) -> str:
    """So many of them: 1 rank, 2 ranks."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def ranges(numbers: Iterable[int], dash: str = "-", comma: str = ", ") -> str:
    """Ascending numbers, as in 1-40, 64."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return comma.join(str(a) if a == b else f"{a}{dash}{b}" for a, b in runs)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint after a name that is nobody's: the near ones, or else all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
