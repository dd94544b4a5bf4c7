"""What somebody has asked for by name: the caller, or the environment."""

from __future__ import annotations

import os
from typing import Any

from ...algorithms import Algorithm, Collective, algorithms, lookup
from ...algorithms.parameters import split_outside
from ...errors import ArgumentError, UnknownAlgorithm

ENVIRONMENT = "ABCCL_ALGORITHM"
"""Forces an algorithm: "ring", or "all_reduce=ring,broadcast=knomial(radix=8)". Read when a call of some kind is first
seen. An all_to_all with splits follows only `algorithm=`: others may have to gather all sizes first."""

NATIVE = "native"
"""In the place of an algorithm's name: the collective that the transport's engine has of its own, MPI's or Gloo's."""


def algorithm(collective: Collective, wanted: Any, size: int) -> Algorithm | str:
    """The algorithm that was asked for, or NATIVE.

    Raises:
        UnknownAlgorithm: none of that name.
        ArgumentError: it is for another collective, or does not run on `size` ranks.
    """
    if wanted == NATIVE:
        return NATIVE
    if not isinstance(wanted, (Algorithm, str)):
        raise ArgumentError(
            f"{collective.value}: algorithm must be an algorithm, its name or a Choice, and is {wanted!r}"
        )
    found = wanted if isinstance(wanted, Algorithm) else lookup(collective, wanted)
    if found.collective is not collective:
        raise ArgumentError(f"{collective.value}: the algorithm given is one for {found.collective.value}")
    wants = found.refusal(size)
    if wants:
        raise ArgumentError(
            f"{collective.value}: {found.name} wants {wants}, and there are {size}: choose another algorithm"
        )
    return found


def by_environment(collective: Collective) -> str | None:
    """The environment's wish for this collective; a name without a collective is for those that know it."""
    text = os.environ.get(ENVIRONMENT, "")
    general = None
    for part in filter(None, split_outside(text, ",")):
        left, *right = split_outside(part, "=")
        if right and left not in {c.value for c in Collective}:
            raise ArgumentError(f"{ENVIRONMENT}={text!r}: {left!r} is no collective: write all_reduce=ring, or ring")
        if right and left == collective.value:
            return "=".join(right)
        if not right:
            general = left
    family = general and general.partition("(")[0]
    if general in (None, NATIVE) or family in algorithms(collective):
        return general
    if not any(family in algorithms(other) for other in Collective):
        raise UnknownAlgorithm(f"{ENVIRONMENT}={text!r}: no collective has an algorithm called {general!r}")
    return None
