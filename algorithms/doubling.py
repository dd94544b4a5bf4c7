"""Recursive doubling and halving for any number of ranks: distances 1, 2, 4, ..., the last step cut short."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from .binary import ceil_log, ceil_log2, floor_log2, widest
from .collective import Collective
from .multiplying import recursive_multiplying_all_gather, recursive_multiplying_reduce_scatter
from .parameters import RADIX
from .registry import Counts, algorithm, per_rank
from .schedule import Program, mirror, recv, send
from .tree import tree_scatter


@algorithm(
    Collective.ALL_GATHER,
    largest=widest,
    counts=lambda p: Counts(ceil_log2(p), Fraction(p - 1, p), Fraction(0)),
)
def recursive_doubling_all_gather(rank: int, size: int) -> Program:
    """Every rank holds the blocks from its own on, and takes as many again from the rank that follows them.

    ceil(log2 size) steps; (size - 1)/size of the result sent per rank. The dissemination pattern of
    Bruck et al. 1997, which needs no power of two.
    """
    yield from recursive_multiplying_all_gather(rank, size, 2)


@algorithm(
    Collective.REDUCE_SCATTER,
    largest=widest,
    counts=lambda p: Counts(ceil_log2(p), Fraction(p - 1, p), Fraction(p - 1, p)),
)
def recursive_doubling_reduce_scatter(rank: int, size: int) -> Program:
    """Recursive halving: the mirror image of the all_gather, folding where that copies.

    ceil(log2 size) steps; (size - 1)/size of the vector sent and folded per rank. Traeff 2005 has the
    halving for any number of ranks.
    """
    yield from mirror(recursive_doubling_all_gather(rank, size), reduce=True)


@algorithm(
    Collective.ALL_REDUCE,
    parameters={"radix": replace(RADIX["radix"], default=2)},
    blocks=per_rank,
    largest=widest,
    counts=lambda p, radix: Counts(2 * ceil_log(p, radix), Fraction(2 * (p - 1), p), Fraction(p - 1, p)),
)
def rabenseifner_all_reduce(rank: int, size: int, radix: int) -> Program:
    """Recursive halving reduce_scatter, then recursive doubling all_gather; or dividing and multiplying by the radix.

    2 ceil(log_radix size) steps; 2 (size - 1)/size of the vector sent, half of it folded: the ring's bytes in a
    logarithm of its steps. Rabenseifner 2004; where he folds other sizes than powers of two to one first, this
    uses the dissemination pattern of Bruck et al. 1997.
    """
    yield from recursive_multiplying_reduce_scatter(rank, size, radix)
    yield from recursive_multiplying_all_gather(rank, size, radix)


def _butterfly_rounds(size: int) -> int:
    return floor_log2(size) + (size & (size - 1) != 0)


@algorithm(
    Collective.ALL_REDUCE,
    counts=lambda p: Counts(
        floor_log2(p) + 2 * (p & (p - 1) != 0), Fraction(_butterfly_rounds(p)), Fraction(_butterfly_rounds(p))
    ),
)
def recursive_doubling_all_reduce(rank: int, size: int) -> Program:
    """The butterfly: pairs at distance 1, 2, 4, ... exchange whole vectors and both fold.

    Ranks beyond the largest power of two hand their vector to a twin first and get the result last.
    log2 size steps, and as many vectors sent and folded, for a power of two; for other sizes
    floor(log2 size) + 2 steps, and floor(log2 size) + 1 vectors sent and folded. Thakur, Rabenseifner & Gropp 2005.
    """
    core = 1 << floor_log2(size)
    twin = rank + core
    if rank >= core:
        yield send(rank - core, 0)
        yield recv(rank - core, 0)
        return
    if twin < size:
        yield recv(twin, 0, reduce=True)
    for level in range(floor_log2(size)):
        partner = rank ^ 1 << level
        yield send(partner, 0), recv(partner, 0, reduce=True)
    if twin < size:
        yield send(twin, 0)


@algorithm(
    Collective.BROADCAST,
    blocks=per_rank,
    largest=widest,
    counts=lambda p: Counts(2 * ceil_log2(p), Fraction(2 * (p - 1), p), Fraction(0)),
)
def recursive_doubling_broadcast(rank: int, size: int) -> Program:
    """Scatter down a binomial tree, then all_gather by recursive doubling.

    2 ceil(log2 size) steps; the root sends 2 (size - 1)/size of the vector. Thakur, Rabenseifner &
    Gropp 2005.
    """
    yield from tree_scatter(rank, size)
    yield from recursive_doubling_all_gather(rank, size)


@algorithm(
    Collective.BARRIER,
    largest=widest,
    counts=lambda p: Counts(ceil_log2(p), Fraction(0), Fraction(0)),
)
def recursive_doubling_barrier(rank: int, size: int) -> Program:
    """The dissemination barrier: after step k every rank has heard of 2**k ranks.

    ceil(log2 size) steps, nothing in the messages. Hensgen, Finkel & Manber 1988.
    """
    yield from recursive_doubling_all_gather(rank, size)
