"""Reproducible communicators: how one becomes such, and what it refuses."""

from __future__ import annotations

import os

from ..algorithms import Algorithm, canonical, lookup
from ..errors import ArgumentError
from .tuner.candidates import CANONICAL

REPRODUCIBLE = "ABCCL_REPRODUCIBLE"
"""Whether communicators are reproducible, 0 or 1, where their maker does not say. Read when one is made."""

_HALVES = ("float16", "bfloat16")


def is_reproducible(asked: bool | None) -> bool:
    """Whether a communicator is to be reproducible: as its maker has asked for, else as the environment says.

    Raises:
        ArgumentError: what was asked for is no bool, or the environment says neither 0 nor 1.
    """
    if asked is None:
        text = os.environ.get(REPRODUCIBLE) or "0"
        if text not in ("0", "1"):
            raise ArgumentError(f"{REPRODUCIBLE} must be 0 or 1, and is {text!r}")
        return text == "1"
    if not isinstance(asked, bool):
        raise ArgumentError(f"reproducible must be True, False or None, and is {asked!r}")
    return asked


def check_reproducible(algorithm: Algorithm, size: int, root: int, dtype: str) -> None:
    """Refuse an algorithm that does not reduce by the canonical fold. It is replayed, once in a process.

    Raises:
        ArgumentError: with those that would do.
        ScheduleError: it is wrong.
    """
    names = CANONICAL.get(algorithm.collective, ())
    if not names or algorithm in (lookup(algorithm.collective, name) for name in names):
        return
    # Half types are folded in float32 and rounded after each pass, so that it matters how many passes there are.
    rounds = dtype in _HALVES
    if not canonical(algorithm, size, root, nested=not rounds):
        raise ArgumentError(
            f"{algorithm.collective.value}: this communicator is reproducible, and {algorithm.name} does not fold the "
            f"values of {size} ranks in ascending order{' in one pass' * rounds}: choose {' or '.join(names)}"
        )
