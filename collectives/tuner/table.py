"""A table: the constants of the model, as they were measured among some ranks, and what else was measured there."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...algorithms.interpolation import between, log2
from ...algorithms.model import NAMES, Floats
from ...errors import ArgumentError
from ...transports.shm import PROTOCOLS

FORMAT = 1
"""Grows when older tables can not be read any more."""

NEAR, FAR = "near", "far"
LINKS = (NEAR, FAR)
"""The link classes of a host: cores that share a cache, and cores that do not."""


@dataclass(frozen=True)
class Measured:
    """A candidate's time for vectors of so many bytes."""

    nbytes: int
    algorithm: str
    protocol: str | None
    segment: int | None
    lanes: int | None
    seconds: float


@dataclass(frozen=True)
class Table:
    """What is known of some ranks, the same on all of them.

    Attributes:
        origin: where it comes from, in words.
        sizes: bytes of the vectors that the constants were measured with, ascending. A byte costs more where vectors
            leave the caches.
        constants: for each protocol and each of `NAMES` the constants at these sizes.
        residual: the median relative error of the fit, over what it was fitted to.
        natives: for each collective that the engine has of its own, bytes and seconds.
        measured: for each collective, candidates that were timed (`abccl tune`).
        chosen: what tuners have found to be the fastest by this table; those of one process share it.
    """

    origin: str
    sizes: tuple[int, ...]
    constants: Mapping[str, tuple[tuple[float, ...], ...]]
    residual: float = 0.0
    natives: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    measured: Mapping[str, tuple[Measured, ...]] = field(default_factory=dict)
    chosen: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def told(self) -> str:
        """Its origin, and how well the constants explain what they were fitted to."""
        if not self.residual:
            return self.origin
        return f"{self.origin}; half of the times that they come from are met within {self.residual:.0%}"

    def at(self, protocol: str, nbytes: int) -> Floats:
        """The constants (`NAMES`) for vectors of so many bytes, between those that were measured."""
        place = [log2(size) for size in self.sizes]
        return np.array([between(place, values, log2(nbytes)) for values in self.constants[protocol]])

    def native_seconds(self, collective: str, nbytes: int) -> float | None:
        """What the engine's own collective takes; None if it was not measured for two sizes at least."""
        points = self.natives.get(collective, ())
        if len(points) < 2:
            return None
        largest, last = points[-1]
        if nbytes > largest:
            return last * nbytes / largest
        # A longer vector takes no less time, whatever a disturbed measurement says.
        rising = itertools.accumulate((seconds for _, seconds in points), max)
        return between([size for size, _ in points], list(rising), nbytes)

    def to_json(self) -> dict[str, Any]:
        """It as JSON has it."""
        return {
            "origin": self.origin,
            "sizes": list(self.sizes),
            "constants": {name: dict(zip(NAMES, map(list, rows))) for name, rows in self.constants.items()},
            "residual": self.residual,
            "natives": {name: [list(point) for point in points] for name, points in self.natives.items()},
            "measured": {name: [vars(one) for one in found] for name, found in self.measured.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> Table:
        """The table that `to_json` gave.

        Raises:
            ArgumentError: it is none.
        """
        try:
            sizes = tuple(int(size) for size in data["sizes"])
            constants = {
                str(name): tuple(tuple(map(float, rows[word])) for word in NAMES)
                for name, rows in data["constants"].items()
            }
            natives = {
                str(name): tuple((int(size), float(seconds)) for size, seconds in points)
                for name, points in data["natives"].items()
            }
            measured = {str(name): tuple(Measured(**one) for one in found) for name, found in data["measured"].items()}
            residual = float(data["residual"])
            numbers = [residual, *(x for rows in constants.values() for row in rows for x in row)]
            numbers += [seconds for points in natives.values() for _, seconds in points]
            numbers += [one.seconds for found in measured.values() for one in found]
            for ascending in (sizes, *([size for size, _ in points] for points in natives.values())):
                if sorted(set(ascending)) != list(ascending) or not all(0 < size <= sys.maxsize for size in ascending):
                    raise ValueError(f"sizes must ascend, and are {ascending}")
            if not sizes or not all(_is_whole(one) for found in measured.values() for one in found):
                raise ValueError("there are no sizes, or a measured time lacks what was measured")
            if set(constants) != set(PROTOCOLS) or any(len(row) != len(sizes) for r in constants.values() for row in r):
                raise ValueError("constants want a row of as many numbers as there are sizes, for each protocol")
            if not all(math.isfinite(x) and x >= 0 for x in numbers):
                raise ValueError("a constant is negative, or no number")
            return cls(str(data["origin"]), sizes, constants, residual, natives, measured)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArgumentError(f"this is no table of the tuner: {type(error).__name__}: {error}") from error


@lru_cache(64)
def table_of(text: str) -> Table:
    """The table that this JSON is; one object for all who have the same, so that they share what it has chosen.

    Raises:
        ArgumentError: it is none.
    """
    return Table.from_json(json.loads(text))


@cache
def built_in(link: str) -> Table:
    """The table that is used where nothing was measured: of two ranks on two cores."""
    tables = json.loads((Path(__file__).parent / "built_in.json").read_text(encoding="utf-8"))
    return Table.from_json(tables[link])


def _is_whole(one: Measured) -> bool:
    """Whether the fields that say what was measured are of their types."""
    counts = (one.segment, one.lanes)
    named = isinstance(one.algorithm, str) and one.protocol in (None, *PROTOCOLS)
    return named and isinstance(one.nbytes, int) and all(c is None or isinstance(c, int) for c in counts)
