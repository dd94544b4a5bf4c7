"""The chain: each rank hands on to the next. Slow alone; segments and lanes of the plan fill it as a pipeline.

No paper: folklore.
"""

from __future__ import annotations

from fractions import Fraction

from .collective import Collective
from .registry import Counts, algorithm
from .schedule import Program, mirror, recv, send


@algorithm(
    Collective.BROADCAST,
    counts=lambda p: Counts(p - 1, Fraction(min(1, p - 1)), Fraction(0)),
)
def chain_broadcast(rank: int, size: int) -> Program:
    """From rank to rank, whole vector.

    size - 1 steps on the chain, two per rank; each rank but the last sends the vector once.
    """
    if rank > 0:
        yield recv(rank - 1, 0)
    if rank < size - 1:
        yield send(rank + 1, 0)


@algorithm(
    Collective.REDUCE,
    counts=lambda p: Counts(p - 1, Fraction(min(1, p - 1)), Fraction(min(1, p - 1))),
)
def chain_reduce(rank: int, size: int) -> Program:
    """From the last rank to the root, each folding its vector in.

    size - 1 steps on the chain, two per rank; each rank but the root sends the vector once.
    """
    yield from mirror(chain_broadcast(rank, size), reduce=True)


@algorithm(
    Collective.ALL_REDUCE,
    counts=lambda p: Counts(2 * (p - 1), Fraction(min(2, p - 1)), Fraction(min(1, p - 1))),
)
def chain_all_reduce(rank: int, size: int) -> Program:
    """Reduce down the chain to rank 0, then broadcast up it.

    2 (size - 1) steps on the chain, four per rank; a rank sends 2 vectors (1 if there are but 2 ranks), and folds 1.
    """
    yield from chain_reduce(rank, size)
    yield from chain_broadcast(rank, size)
