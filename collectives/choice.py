"""Which algorithm runs a call when the caller does not say: a rule of thumb, in one table, until there is a tuner.

Every rank must choose alike, so a choice depends on the collective, the number of ranks and the bytes only, and on
whether the communicator is reproducible. Such a one runs only algorithms that reduce by the canonical fold.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from ..algorithms import Algorithm, Collective, algorithms, canonical, lookup
from ..algorithms.groups import written
from ..algorithms.parameters import split_outside
from ..errors import ArgumentError, UnknownAlgorithm

ENVIRONMENT = "ABCCL_ALGORITHM"
"""Forces an algorithm: "ring", or "all_reduce=ring,broadcast=knomial(radix=8)". Read when a call of some kind is first
seen. An all_to_all with splits follows only `algorithm=`: others may have to gather all sizes first."""

AlgorithmLike = Algorithm | str | None
"""An algorithm, its name, or None: let the library choose."""

NATIVE = "native"
"""In the place of an algorithm's name: the collective that the transport's engine has of its own, MPI's or Gloo's."""

REPRODUCIBLE = "ABCCL_REPRODUCIBLE"
"""Whether communicators are reproducible, 0 or 1, where their maker does not say. Read when one is made."""

_HALVES = ("float16", "bfloat16")
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

# The same for ranks on several hosts, by the number of hosts. What crosses between them is what costs, so all goes
# through the hosts; a short vector through one rank of each, so that it crosses in one step.
_HOSTS_RULES: dict[Collective, tuple[tuple[float, float, str], ...]] = {
    **_RULES,
    Collective.ALL_REDUCE: (
        (2, 512 << 10, "hierarchical_leaders"),
        (_ANY, 128 << 10, "hierarchical_leaders"),
        (_ANY, _ANY, "hierarchical"),
    ),
    Collective.REDUCE_SCATTER: ((_ANY, _ANY, "hierarchical"),),
    Collective.ALL_GATHER: ((_ANY, _ANY, "hierarchical"),),
    Collective.BROADCAST: ((_ANY, _ANY, "hierarchical"),),
    # A rank that gives splits knows only its own: all take what forwards nothing, whether they give them or not.
    Collective.ALL_TO_ALL: ((_ANY, _ANY, "direct"),),
    Collective.REDUCE: ((_ANY, _ANY, "hierarchical"),),
    Collective.BARRIER: ((_ANY, _ANY, "hierarchical"),),
}

# The same for reproducible communicators: each is canonical for as many ranks, so that none needs to be replayed.
_REPRODUCIBLE_RULES: dict[Collective, tuple[tuple[float, float, str], ...]] = {
    Collective.ALL_REDUCE: (
        (2, 256 << 10, "recursive_doubling"),
        (_ANY, 16 << 10, "direct"),
        (_ANY, _ANY, "two_shot"),
    ),
    Collective.REDUCE_SCATTER: ((_ANY, _ANY, "direct"),),
    Collective.REDUCE: ((_ANY, _ANY, "direct"),),
}


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


def choose(
    collective: Collective,
    size: int,
    nbytes: int,
    asked: AlgorithmLike = None,
    reproducible: bool = False,
    hosts: Sequence[Sequence[int]] = (),
    natives: Collection[Collective] = (),
) -> Algorithm | str:
    """The algorithm for a call: what was asked for, else what the environment forces, else the rule's.

    What a user has named need not be reproducible: `check_reproducible` tells.

    Args:
        hosts: the ranks by host; what goes through groups of ranks goes through these, unless its name tells others.
        natives: what the engine has of its own: where it has nothing, the environment's wish for it is passed over.

    Returns:
        The algorithm; NATIVE for the engine's own collective.

    Raises:
        UnknownAlgorithm: none of that name.
        ArgumentError: the algorithm asked for does not run on `size` ranks.
    """
    name = _forced(collective) if asked is None else asked
    if asked is None and name == NATIVE and (reproducible or collective not in natives):
        name = None
    if name is not None:
        if name == NATIVE:
            return NATIVE
        try:
            chosen = _of(collective, name, hosts)
        except UnknownAlgorithm as error:
            raise UnknownAlgorithm(f"{error}" if asked is not None else f"{ENVIRONMENT}: {error}") from None
        wants = chosen.refusal(size)
        if wants:
            raise ArgumentError(
                f"{collective.value}: {chosen.name} wants {wants}, and there are {size}: choose another algorithm"
            )
        return chosen
    rows, parts = _RULES[collective], size
    if reproducible and collective in _REPRODUCIBLE_RULES:
        rows = _REPRODUCIBLE_RULES[collective]
    elif len(hosts) > 1:
        rows, parts = _HOSTS_RULES[collective], len(hosts)
    return _of(collective, next(name for up_to, most, name in rows if parts <= up_to and nbytes <= most), hosts)


def _of(collective: Collective, name: str | Algorithm, hosts: Sequence[Sequence[int]]) -> Algorithm:
    """The algorithm of that name, among the groups of ranks that the hosts are if it says nothing of groups."""
    found = name if isinstance(name, Algorithm) else lookup(collective, name)
    if found.collective is not collective:
        raise ArgumentError(f"{collective.value}: the algorithm given is one for {found.collective.value}")
    levels = dict(found.parameters).get("levels")
    if levels is None or levels != found.declared["levels"].default or len(hosts) < 2:
        return found
    return found.bind(levels=written(hosts))


def check_reproducible(algorithm: Algorithm, size: int, root: int, dtype: str) -> None:
    """Refuse an algorithm that does not reduce by the canonical fold. It is replayed, once in a process.

    Raises:
        ArgumentError: with those that would do.
        ScheduleError: it is wrong.
    """
    rows = _REPRODUCIBLE_RULES.get(algorithm.collective, ())
    names = dict.fromkeys(name for ranks, _, name in rows if size <= ranks)
    if not rows or algorithm in (lookup(algorithm.collective, name) for name in names):
        return
    # Half types are folded in float32 and rounded after each pass, so that it matters how many passes there are.
    rounds = dtype in _HALVES
    if not canonical(algorithm, size, root, nested=not rounds):
        raise ArgumentError(
            f"{algorithm.collective.value}: this communicator is reproducible, and {algorithm.name} does not fold the "
            f"values of {size} ranks in ascending order{' in one pass' * rounds}: choose {' or '.join(names)}"
        )


def _forced(collective: Collective) -> str | None:
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
