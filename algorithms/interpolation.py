"""Values between those that are known."""

from __future__ import annotations

import math
from collections.abc import Sequence


def log2(number: float) -> float:
    """The logarithm, straight between powers of two: exact arithmetic, so that all processors agree."""
    fraction, exponent = math.frexp(max(number, 1))
    return exponent - 2 + 2 * fraction


def between(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """The value at a place: straight between its neighbours; that of the nearest beyond the ends."""
    after = next((index for index, place in enumerate(places) if place >= at), len(places))
    if after == 0 or len(places) == 1:
        return values[0]
    if after == len(places):
        return values[-1]
    left, right = places[after - 1], places[after]
    share = (at - left) / (right - left)
    return values[after - 1] + share * (values[after] - values[after - 1])
