"""Which algorithm runs a call when the caller does not say: a rule of thumb, in one table, until there is a tuner.

Every rank must choose alike, so a choice depends on the collective, the number of ranks and the bytes only.
"""

from __future__ import annotations

import os

from ..algorithms import Algorithm, Collective, algorithms, lookup
from ..errors import ArgumentError

ENVIRONMENT = "ABCCL_ALGORITHM"
"""Forces an algorithm: "ring", or "all_reduce=ring,broadcast=tree"."""

# For each collective: up to so many bytes (of the largest buffer of a rank) this algorithm. Figures behind it:
# docs/performance.md.
_RULES: dict[Collective, tuple[tuple[float, str], ...]] = {
    Collective.ALL_REDUCE: ((16 << 10, "recursive_doubling"), (float("inf"), "two_shot")),
    Collective.REDUCE_SCATTER: ((float("inf"), "direct"),),
    Collective.ALL_GATHER: ((float("inf"), "direct"),),
    Collective.BROADCAST: ((64 << 10, "tree"), (float("inf"), "direct")),
    Collective.ALL_TO_ALL: ((float("inf"), "pairwise"),),
    Collective.REDUCE: ((64 << 10, "tree"), (float("inf"), "direct")),
    Collective.GATHER: ((float("inf"), "direct"),),
    Collective.SCATTER: ((float("inf"), "direct"),),
    Collective.BARRIER: ((float("inf"), "recursive_doubling"),),
}


def choose(collective: Collective, size: int, nbytes: int, asked: str | None = None) -> Algorithm:
    """The algorithm for a call: what was asked for, else what the environment forces, else the rule's.

    Raises:
        UnknownAlgorithm: none of that name.
        ArgumentError: the algorithm asked for does not run on `size` ranks.
    """
    name = asked or _forced(collective)
    if name is not None:
        chosen = lookup(collective, name)
        wants = chosen.refusal(size)
        if wants:
            raise ArgumentError(
                f"{collective.value}: {name} wants {wants}, and there are {size}: choose another algorithm"
            )
        return chosen
    return lookup(collective, next(name for limit, name in _RULES[collective] if nbytes <= limit))


def _forced(collective: Collective) -> str | None:
    """The environment's wish for this collective; a name without a collective is for those that know it."""
    text = os.environ.get(ENVIRONMENT, "")
    general = None
    for part in filter(None, (part.strip() for part in text.split(","))):
        left, equals, right = part.partition("=")
        if equals and left not in {c.value for c in Collective}:
            raise ArgumentError(f"{ENVIRONMENT}={text!r}: {left!r} is no collective: write all_reduce=ring, or ring")
        if equals and left == collective.value:
            return right
        if not equals:
            general = left
    if general is None or general in algorithms(collective):
        return general
    if not any(general in algorithms(other) for other in Collective):
        lookup(collective, general)
    return None
