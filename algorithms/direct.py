"""Direct exchange: every block goes straight to where it is needed. One step where the links allow it.

No paper unless one is named: folklore.
"""

from __future__ import annotations

from fractions import Fraction

from .collective import Collective
from .registry import Counts, algorithm, per_rank
from .schedule import Program, mirror, recv, send


def _others(rank: int, size: int) -> list[int]:
    """The other ranks, each rank's list starting behind itself, so that not all turn to the same one first."""
    return [(rank + distance) % size for distance in range(1, size)]


@algorithm(
    Collective.BROADCAST,
    counts=lambda p: Counts(min(1, p - 1), Fraction(p - 1), Fraction(0)),
)
def direct_broadcast(rank: int, size: int) -> Program:
    """The root sends to all in one step.

    1 step; the root sends size - 1 vectors (in shared memory: one copy that all read).
    """
    yield [send(peer, 0) for peer in range(1, size)] if rank == 0 else [recv(0, 0)]


@algorithm(
    Collective.REDUCE,
    counts=lambda p: Counts(min(1, p - 1), Fraction(min(1, p - 1)), Fraction(p - 1)),
)
def direct_reduce(rank: int, size: int) -> Program:
    """All send to the root, which folds all vectors in one pass in ascending rank order.

    1 step; 1 vector sent, size - 1 folded by the root.
    """
    yield from mirror(direct_broadcast(rank, size), reduce=True)


@algorithm(
    Collective.SCATTER,
    counts=lambda p: Counts(min(1, p - 1), Fraction(p - 1, p), Fraction(0)),
)
def direct_scatter(rank: int, size: int) -> Program:
    """The root sends every rank its block in one step.

    1 step; the root sends (size - 1)/size of its vector.
    """
    yield [send(peer, peer) for peer in range(1, size)] if rank == 0 else [recv(0, rank)]


@algorithm(
    Collective.GATHER,
    counts=lambda p: Counts(min(1, p - 1), Fraction(min(1, p - 1), p), Fraction(0)),
)
def direct_gather(rank: int, size: int) -> Program:
    """Every rank sends the root its block.

    1 step; 1/size of the result sent per rank.
    """
    yield from mirror(direct_scatter(rank, size))


@algorithm(
    Collective.ALL_GATHER,
    counts=lambda p: Counts(min(1, p - 1), Fraction(p - 1, p), Fraction(0)),
)
def direct_all_gather(rank: int, size: int) -> Program:
    """Everyone sends its block to everyone.

    1 step of size - 1 messages; (size - 1)/size of the result sent per rank.
    """
    others = _others(rank, size)
    yield [send(peer, rank) for peer in others] + [recv(peer, peer) for peer in others]


@algorithm(
    Collective.REDUCE_SCATTER,
    counts=lambda p: Counts(min(1, p - 1), Fraction(p - 1, p), Fraction(p - 1, p)),
)
def direct_reduce_scatter(rank: int, size: int) -> Program:
    """Everyone sends each block to its owner, who folds all in one pass in ascending rank order.

    1 step of size - 1 messages; (size - 1)/size of the vector sent and folded per rank.
    """
    others = _others(rank, size)
    yield [send(peer, peer) for peer in others] + [recv(peer, rank, reduce=True) for peer in others]


@algorithm(
    Collective.ALL_REDUCE,
    counts=lambda p: Counts(min(1, p - 1), Fraction(p - 1), Fraction(p - 1)),
)
def direct_all_reduce(rank: int, size: int) -> Program:
    """One shot: everyone sends its whole vector to everyone and folds all in ascending rank order.

    1 step of size - 1 messages; size - 1 vectors sent and folded per rank: for small vectors.
    """
    others = _others(rank, size)
    yield [send(peer, 0) for peer in others] + [recv(peer, 0, reduce=True) for peer in others]


@algorithm(
    Collective.ALL_REDUCE,
    blocks=per_rank,
    counts=lambda p: Counts(2 * min(1, p - 1), Fraction(2 * (p - 1), p), Fraction(p - 1, p)),
)
def two_shot_all_reduce(rank: int, size: int) -> Program:
    """Direct reduce_scatter, then direct all_gather.

    2 steps of size - 1 messages; 2 (size - 1)/size of the vector sent, half of it folded.
    """
    yield from direct_reduce_scatter(rank, size)
    yield from direct_all_gather(rank, size)


@algorithm(
    Collective.ALL_TO_ALL,
    counts=lambda p: Counts(min(1, p - 1), Fraction(p - 1, p), Fraction(0)),
)
def direct_all_to_all(rank: int, size: int) -> Program:
    """Every block straight to its destination, all at once.

    1 step of size - 1 messages; (size - 1)/size of the send buffer sent per rank.
    """
    others = _others(rank, size)
    yield [send(peer, (rank, peer)) for peer in others] + [recv(peer, (peer, rank)) for peer in others]


@algorithm(
    Collective.ALL_TO_ALL,
    counts=lambda p: Counts(p - 1, Fraction(p - 1, p), Fraction(0)),
)
def pairwise_all_to_all(rank: int, size: int) -> Program:
    """Every block straight to its destination, one per step: in step k to the rank k ahead.

    size - 1 steps; (size - 1)/size of the send buffer sent per rank. Thakur, Rabenseifner & Gropp 2005.
    """
    for distance in range(1, size):
        ahead, behind = (rank + distance) % size, (rank - distance) % size
        yield send(ahead, (rank, ahead)), recv(behind, (behind, rank))
