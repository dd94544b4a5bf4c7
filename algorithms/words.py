"""Numbers and names in writing: for messages to people, and as people write them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from ..errors import ArgumentError


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


_UNITS = {"": 0, "K": 1, "M": 2, "G": 3}


def to_bytes(text: str) -> int:
    """A size as users write it: 4, 64K, 1.5M, 1KiB. K, M and G are powers of 1024, as in nccl-tests.

    Raises:
        ArgumentError: it is no size.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.ASCII | re.IGNORECASE)
    size = float(found[1]) * 1024 ** _UNITS[found[2].upper()] if found else 0.0
    if size < 1 or size != int(size):
        raise ArgumentError(f"{text!r} is no size: wanted is a whole number of bytes, written as 4, 64K, 16MiB or 1G")
    return int(size)


def in_words(size: int) -> str:
    """Bytes in the largest unit that gives a whole number: 65536 -> 64 KiB."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power} {unit}"
    return f"{size} B"
