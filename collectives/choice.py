"""Which algorithm runs a call when the caller does not say: a rule of thumb, in one table, until there is a tuner.

Every rank must choose alike, so a choice depends on the collective, the number of ranks and the bytes only.
"""

from __future__ import annotations

import os

from ..algorithms import Algorithm, Collective, algorithms, lookup
from ..errors import ArgumentError, UnknownAlgorithm

ENVIRONMENT = "ABCCL_ALGORITHM"
"""Forces an algorithm: "ring", or "all_reduce=ring,broadcast=tree". Read when a call of some kind is first seen. An
all_to_all with splits follows only `algorithm=`: others may have to gather all sizes first."""

_ANY = float("inf")

# The first row that holds decides: up to so many ranks, up to so many bytes (of the whole vector), this algorithm.
# In shared memory one copy serves all readers and one pass folds all contributions, so few ranks talk directly; many
# ranks save messages. Figures behind it: docs/performance.md.
_RULES: dict[Collective, tuple[tuple[float, float, str], ...]] = {
    Collective.ALL_REDUCE: (
        (2, 256 << 10, "recursive_doubling"),
        (8, 16 << 10, "direct"),
        (_ANY, 16 << 10, "recursive_doubling"),
        (16, _ANY, "two_shot"),
        (_ANY, 1 << 20, "rabenseifner"),
        (_ANY, _ANY, "ring"),
    ),
    Collective.REDUCE_SCATTER: ((16, _ANY, "direct"), (_ANY, 1 << 20, "recursive_doubling"), (_ANY, _ANY, "ring")),
    Collective.ALL_GATHER: ((16, _ANY, "direct"), (_ANY, 1 << 20, "recursive_doubling"), (_ANY, _ANY, "ring")),
    Collective.BROADCAST: ((16, _ANY, "direct"), (_ANY, 1 << 20, "tree"), (_ANY, _ANY, "chain")),
    Collective.ALL_TO_ALL: ((16, _ANY, "direct"), (_ANY, 64 << 10, "bruck"), (_ANY, _ANY, "pairwise")),
    Collective.REDUCE: ((8, _ANY, "direct"), (_ANY, 1 << 20, "tree"), (_ANY, _ANY, "chain")),
    Collective.GATHER: ((_ANY, _ANY, "direct"),),
    Collective.SCATTER: ((_ANY, _ANY, "direct"),),
    Collective.BARRIER: ((_ANY, _ANY, "recursive_doubling"),),
}


def choose(collective: Collective, size: int, nbytes: int, asked: str | None = None) -> Algorithm:
    """The algorithm for a call: what was asked for, else what the environment forces, else the rule's.

    Raises:
        UnknownAlgorithm: none of that name.
        ArgumentError: the algorithm asked for does not run on `size` ranks.
    """
    name = _forced(collective) if asked is None else asked
    if name is not None:
        try:
            chosen = lookup(collective, name)
        except UnknownAlgorithm as error:
            raise UnknownAlgorithm(f"{error}" if asked is not None else f"{ENVIRONMENT}: {error}") from None
        wants = chosen.refusal(size)
        if wants:
            raise ArgumentError(
                f"{collective.value}: {name} wants {wants}, and there are {size}: choose another algorithm"
            )
        return chosen
    rows = _RULES[collective]
    return lookup(collective, next(name for ranks, most, name in rows if size <= ranks and nbytes <= most))


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
        raise UnknownAlgorithm(f"{ENVIRONMENT}={text!r}: no collective has an algorithm called {general!r}")
    return None
