"""Swing: a rank's partners are 1, 1, 3, 5, 11, ... ranks away, now on one side and now on the other.

On a ring of wires, or where near ranks share a host, the large messages go to near partners and only small ones far.
No distance is a power of two but the first, and the number of ranks need be none.

The exchange of whole vectors between these partners (the paper's latency-optimal all_reduce) is not here: its ranks
fold in different orders, so from 8 ranks on their bits would differ.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

from .binary import ceil_log2, widest
from .collective import Collective
from .registry import Counts, algorithm, per_rank
from .schedule import Message, Program, mirror, recv, send


def partner(rank: int, size: int, step: int) -> int:
    """Whom a rank meets at that step, one of an even number of ranks: 1 - 2 + 4 - ... ahead, or behind if it is odd."""
    distance: int = (1 - (-2) ** (step + 1)) // 3
    return (rank + distance if rank % 2 == 0 else rank - distance) % size


@cache
def edges(size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """How rank 0's block reaches an even number of ranks: at each step who hands it to whom, the farthest first.

    The block of another even rank goes the same way further on, that of an odd rank the same way backwards.
    """
    held, found = {0}, []
    for step in reversed(range(ceil_log2(size) if size else 0)):
        met = [(rank, partner(rank, size, step)) for rank in sorted(held)]
        found.append(tuple((rank, other) for rank, other in met if other not in held))
        held.update(other for _, other in met)
    return tuple(found)


def even(size: int) -> int:
    """How many ranks swing: an odd last one exchanges its blocks with each of the others directly."""
    return size - size % 2


def _largest(size: int) -> int:
    ranks = even(size)
    return ranks // 2 if ranks and ranks % 4 == 0 else widest(max(1, ranks))


def rounds(size: int) -> int:
    """In how many steps the blocks reach all ranks."""
    return ceil_log2(even(size)) if size > 1 else 0


@algorithm(
    Collective.ALL_GATHER,
    largest=_largest,
    counts=lambda p: Counts(rounds(p), Fraction(p - 1, p), Fraction(0)),
)
def swing_all_gather(rank: int, size: int) -> Program:
    """Partners exchange the blocks that the other lacks, the farthest partners first with one block.

    ceil(log2 size) steps, one less for one more than a power of two ranks; (size - 1)/size of the result sent per rank.
    The last of an odd number of ranks exchanges blocks with each of the others directly, with some at each step.
    De Sensi et al. 2024.
    """
    ranks = even(size)
    steps = edges(ranks)
    for number, step in enumerate(steps):
        senders = [x for x, _ in step]

        def leaving(holder: int, senders: list[int] = senders) -> list[int]:
            """What a rank hands on: blocks of even ranks have gone ahead to reach it, those of odd ranks back."""
            return [(holder - x if x % 2 == holder % 2 else holder + x) % ranks for x in senders]

        last = size - 1
        if rank < ranks:
            other = partner(rank, ranks, len(steps) - 1 - number)
            exchange: list[Message] = [send(other, *leaving(rank)), recv(other, *leaving(other))]
            if ranks < size and rank % len(steps) == number:
                exchange += [send(last, rank), recv(last, last)]
            yield exchange
        else:
            peers = range(number, ranks, len(steps))
            yield [*(send(peer, last) for peer in peers), *(recv(peer, peer) for peer in peers)]


@algorithm(
    Collective.REDUCE_SCATTER,
    largest=_largest,
    counts=lambda p: Counts(rounds(p), Fraction(p - 1, p), Fraction(p - 1, p)),
)
def swing_reduce_scatter(rank: int, size: int) -> Program:
    """The mirror image of the all_gather: the nearest partners first, with half of the vector.

    ceil(log2 size) steps, one less for one more than a power of two ranks; (size - 1)/size of the vector sent and
    folded per rank. De Sensi et al. 2024.
    """
    yield from mirror(swing_all_gather(rank, size), reduce=True)


@algorithm(
    Collective.ALL_REDUCE,
    blocks=per_rank,
    largest=_largest,
    counts=lambda p: Counts(2 * rounds(p), Fraction(2 * (p - 1), p), Fraction(p - 1, p)),
)
def swing_all_reduce(rank: int, size: int) -> Program:
    """Reduce-scatter among swinging partners, then all-gather among them: the paper's bandwidth-optimal version.

    Two times as many steps as either has; 2 (size - 1)/size of the vector sent, half of it folded.
    De Sensi et al. 2024.
    """
    yield from swing_reduce_scatter(rank, size)
    yield from swing_all_gather(rank, size)
