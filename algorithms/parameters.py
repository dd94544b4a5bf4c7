"""Parameters of algorithms: what is declared of them, and how they are written behind a name, as in "knomial(8)"."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import index
from typing import Any

from ..errors import ArgumentError

Value = int | str


@dataclass(frozen=True)
class Parameter:
    """What an algorithm lets its caller choose: a number or a word, as the default is, and what is asked of it."""

    default: Value
    wants: str = ""
    holds: Callable[[Any], bool] = field(default=lambda value: True, repr=False)

    def converted(self, value: object) -> Value:
        """The value, a number also if it is written in digits.

        Raises:
            ArgumentError: it is of another type, or not what is asked for.
        """
        word = isinstance(self.default, str)
        found = _word(value) if word else _number(value)
        if found is None or not self.holds(found):
            wants = self.wants or ("a word" if word else "a number")
            raise ArgumentError(f"wants {wants}, and got {value!r}")
        return found


RADIX = {"radix": Parameter(4, "a number from 2 on", lambda radix: radix >= 2)}
"""Into how many parts each step divides the ranks, as most algorithms that have a radix declare it."""


def _number(value: Any) -> int | None:
    try:
        return int(value) if isinstance(value, str) else index(value)
    except (TypeError, ValueError):
        return None


def _word(value: object) -> str | None:
    """A word that can stand among parameters: without commas, but for those in parentheses."""
    return value if isinstance(value, str) and value and len(split_outside(value, ",")) == 1 else None


def split_outside(text: str, separator: str) -> list[str]:
    """The text's parts between separators that stand outside of parentheses, without spaces around them.

    Raises:
        ArgumentError: the parentheses do not match.
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise ArgumentError(f"the parentheses of {text!r} do not match: write as in knomial(radix=8)")
    return [part.strip() for part in parts]


def arguments(text: str, order: Iterable[str]) -> dict[str, Value]:
    """Parameters in writing, "8" or "radix=8", by name; those without a name come in this order.

    Raises:
        ArgumentError: there are too many, or one twice, or the parentheses do not match.
    """
    names = list(order)
    found: dict[str, Value] = {}
    for place, part in enumerate(split_outside(text, ",") if text.strip() else []):
        left, *right = split_outside(part, "=")
        if not right and place >= len(names):
            raise ArgumentError(f"wanted is {', '.join(names) or 'no parameter'}, and got ({text})")
        name, value = (left, "=".join(right)) if right else (names[place], left)
        if name in found:
            raise ArgumentError(f"{name} is given twice: leave one out")
        found[name] = value
    return found
