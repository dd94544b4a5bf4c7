"""The ring: each rank talks to its two neighbours. Least bytes, most steps."""

from __future__ import annotations

from fractions import Fraction

from .collective import Collective
from .registry import Counts, algorithm, per_rank
from .schedule import Program, recv, send


@algorithm(
    Collective.REDUCE_SCATTER,
    counts=lambda p: Counts(p - 1, Fraction(p - 1, p), Fraction(p - 1, p)),
)
def ring_reduce_scatter(rank: int, size: int) -> Program:
    """Every block walks once round the ring and gathers a contribution at each stop.

    size - 1 steps; (size - 1)/size of the vector sent and folded per rank. Patarasuk & Yuan 2009.
    """
    left, right = (rank - 1) % size, (rank + 1) % size
    for hop in range(1, size):
        yield send(right, (rank - hop) % size), recv(left, (rank - hop - 1) % size, reduce=True)


@algorithm(
    Collective.ALL_GATHER,
    counts=lambda p: Counts(p - 1, Fraction(p - 1, p), Fraction(0)),
)
def ring_all_gather(rank: int, size: int) -> Program:
    """Every block walks once round the ring and leaves a copy at each stop.

    size - 1 steps; (size - 1)/size of the result sent per rank. Patarasuk & Yuan 2009.
    """
    left, right = (rank - 1) % size, (rank + 1) % size
    for hop in range(size - 1):
        yield send(right, (rank - hop) % size), recv(left, (rank - hop - 1) % size)


@algorithm(
    Collective.ALL_REDUCE,
    blocks=per_rank,
    counts=lambda p: Counts(2 * (p - 1), Fraction(2 * (p - 1), p), Fraction(p - 1, p)),
)
def ring_all_reduce(rank: int, size: int) -> Program:
    """Reduce-scatter round the ring, then all-gather round it.

    2 (size - 1) steps; 2 (size - 1)/size of the vector sent, half of it folded. Patarasuk & Yuan 2009.
    """
    yield from ring_reduce_scatter(rank, size)
    yield from ring_all_gather(rank, size)


@algorithm(
    Collective.BROADCAST,
    blocks=per_rank,
    counts=lambda p: Counts(2 * (p - 1), Fraction(min(1, p - 1)), Fraction(0)),
)
def ring_broadcast(rank: int, size: int) -> Program:
    """The blocks follow one another round the ring, so that all its links carry at the same time.

    2 (size - 1) steps; the vector is sent once per rank, which no broadcast can undercut at the root.
    The pipelined broadcast of Watts & van de Geijn 1995, with as many packets as ranks.
    """
    for block in range(size + 1):
        arriving = [recv(rank - 1, block)] if rank > 0 and block < size else []
        leaving = [send(rank + 1, block - 1)] if rank < size - 1 and block > 0 else []
        yield (*leaving, *arriving)


@algorithm(
    Collective.ALL_TO_ALL,
    largest=lambda p: max(1, p - 1),
    counts=lambda p: Counts(p - 1, Fraction(p - 1, 2), Fraction(0)),
)
def ring_all_to_all(rank: int, size: int) -> Program:
    """Store and forward: what is not for the right neighbour travels on with the next hop.

    size - 1 steps; (size - 1)/2 of the send buffer sent per rank: for rings of wires, where a far rank
    is reached only through the near ones. Grama et al. 2003, section 4.5.
    """
    left, right = (rank - 1) % size, (rank + 1) % size
    for hop in range(1, size):
        yield (
            send(right, *_travelling((rank - hop + 1) % size, hop, size)),
            recv(left, *_travelling((rank - hop) % size, hop, size)),
        )


def _travelling(source: int, hop: int, size: int) -> list[tuple[int, int]]:
    return [(source, (source + distance) % size) for distance in range(hop, size)]
