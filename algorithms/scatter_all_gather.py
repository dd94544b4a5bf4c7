"""Broadcast for long vectors: scatter, then all_gather."""

from __future__ import annotations

from fractions import Fraction

from .binary import ceil_log2, widest
from .collective import Collective
from .registry import Counts, algorithm, per_rank
from .ring import ring_all_gather
from .schedule import Program
from .tree import tree_scatter


@algorithm(
    Collective.BROADCAST,
    blocks=per_rank,
    largest=widest,
    counts=lambda p: Counts(ceil_log2(p) + p - 1, Fraction(2 * (p - 1), p), Fraction(0)),
)
def scatter_all_gather_broadcast(rank: int, size: int) -> Program:
    """Scatter down a binomial tree, then all_gather round the ring.

    ceil(log2 size) + size - 1 steps; the root sends 2 (size - 1)/size of the vector. Barnett, van de Geijn
    et al. 1994.
    """
    yield from tree_scatter(rank, size)
    yield from ring_all_gather(rank, size)
