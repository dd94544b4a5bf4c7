"""Neighbour exchange: like the ring, but both neighbours in turn, and pairs of blocks."""

from __future__ import annotations

from fractions import Fraction

from .collective import Collective
from .registry import Counts, Restriction, algorithm
from .schedule import Program, recv, send

even_or_alone = Restriction("an even number of ranks", lambda size: size == 1 or size % 2 == 0)


@algorithm(
    Collective.ALL_GATHER,
    restrictions=[even_or_alone],
    largest=lambda p: 2 if p > 2 else 1,
    counts=lambda p: Counts(p // 2, Fraction(p - 1, p), Fraction(0)),
)
def neighbor_exchange_all_gather(rank: int, size: int) -> Program:
    """Pairs swap their blocks, then each rank turns to its two neighbours in turn with what it got last, in pairs.

    size/2 steps, half of the ring's; (size - 1)/size of the result sent per rank. Chen et al. 2005.
    """
    side = 1 if rank % 2 == 0 else -1

    def pair(step: int) -> tuple[int, int]:
        """The blocks that come at a step: those of the pairs 0, -1, 1, -2, 2, ... away on the side of the partner."""
        distance = step // 2 if step % 2 == 0 else -(step + 1) // 2
        first = (rank - rank % 2 + 2 * side * distance) % size
        return first, first + 1

    for step in range(size // 2):
        peer = (rank + (side if step % 2 == 0 else -side)) % size
        if step == 0:
            yield send(peer, rank), recv(peer, peer)
        else:
            yield send(peer, *pair(step - 1)), recv(peer, *pair(step))
