"""Recursive multiplying: in every step a rank has radix - 1 peers at once, where recursive doubling has one."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from math import prod
from typing import NamedTuple

from .binary import ceil_log, widest
from .collective import Collective
from .knomial import knomial_scatter
from .parameters import RADIX
from .registry import Counts, algorithm, per_rank
from .schedule import Message, Program, mirror, recv, send


@algorithm(
    Collective.ALL_GATHER,
    parameters=RADIX,
    largest=widest,
    counts=lambda p, radix: Counts(ceil_log(p, radix), Fraction(p - 1, p), Fraction(0)),
)
def recursive_multiplying_all_gather(rank: int, size: int, radix: int) -> Program:
    """Every rank holds the blocks from its own on, and takes as many from each of the radix - 1 ranks that follow.

    ceil(log_radix size) steps, the last cut short; (size - 1)/size of the result sent per rank. The all_gather
    for several ports of Bruck et al. 1997, which needs no power of the radix.
    """
    weight = 1
    while weight < size:
        step: list[Message] = []
        for distance in range(weight, min(radix * weight, size), weight):
            taken = range(min(weight, size - distance))
            before, behind = (rank - distance) % size, (rank + distance) % size
            step.append(send(before, *((rank + i) % size for i in taken)))
            step.append(recv(behind, *((behind + i) % size for i in taken)))
        yield step
        weight *= radix


@algorithm(
    Collective.REDUCE_SCATTER,
    parameters=RADIX,
    largest=widest,
    counts=lambda p, radix: Counts(ceil_log(p, radix), Fraction(p - 1, p), Fraction(p - 1, p)),
)
def recursive_multiplying_reduce_scatter(rank: int, size: int, radix: int) -> Program:
    """Recursive dividing: the mirror image of the all_gather, folding up to radix - 1 messages in one pass.

    ceil(log_radix size) steps; (size - 1)/size of the vector sent and folded per rank.
    """
    yield from mirror(recursive_multiplying_all_gather(rank, size, radix), reduce=True)


@algorithm(
    Collective.BROADCAST,
    parameters=RADIX,
    blocks=per_rank,
    largest=widest,
    counts=lambda p, radix: Counts(2 * ceil_log(p, radix), Fraction(2 * (p - 1), p), Fraction(0)),
)
def recursive_multiplying_broadcast(rank: int, size: int, radix: int) -> Program:
    """Scatter down a k-nomial tree, then all_gather by recursive multiplying.

    2 ceil(log_radix size) steps; the root sends 2 (size - 1)/size of the vector. Wilkins et al. 2023.
    """
    yield from knomial_scatter(rank, size, radix)
    yield from recursive_multiplying_all_gather(rank, size, radix)


@algorithm(
    Collective.BARRIER,
    parameters=RADIX,
    largest=widest,
    counts=lambda p, radix: Counts(ceil_log(p, radix), Fraction(0), Fraction(0)),
)
def recursive_multiplying_barrier(rank: int, size: int, radix: int) -> Program:
    """The dissemination barrier with radix - 1 messages at once: after step k a rank has heard of radix**k ranks.

    ceil(log_radix size) steps, nothing in the messages. Hoefler et al. 2006.
    """
    yield from recursive_multiplying_all_gather(rank, size, radix)


class _Core(NamedTuple):
    """The ranks 0 to core - 1, which multiply; the others hand their vector to rank % core."""

    size: int
    factors: tuple[int, ...]

    def twins(self, size: int) -> int:
        """The most others that a rank of the core has."""
        return -(-(size - self.size) // self.size)

    def steps(self, size: int) -> int:
        return len(self.factors) + 2 * min(1, self.twins(size))

    def sent(self, size: int) -> int:
        return sum(self.factors) - len(self.factors) + self.twins(size)


@cache
def _core(size: int, radix: int) -> _Core:
    """The core with the fewest steps, then with the fewest vectors sent, then the largest."""
    cores = (_Core(core, factors) for core in range(1, size + 1) for factors in _factors(core, radix))
    allowed = (core for core in cores if core.twins(size) < radix)
    return min(allowed, key=lambda core: (core.steps(size), core.sent(size), -core.size, core.factors))


def _factors(number: int, most: int, least: int = 2) -> Iterator[tuple[int, ...]]:
    """The ways to write a number as a product of ascending factors from `least` to `most`."""
    if number == 1:
        yield ()
    for factor in range(least, min(number, most) + 1):
        if number % factor == 0:
            yield from ((factor, *rest) for rest in _factors(number // factor, most, factor))


def _all_reduce_counts(size: int, radix: int) -> Counts:
    core = _core(size, radix)
    return Counts(core.steps(size), Fraction(core.sent(size)), Fraction(core.sent(size)))


@algorithm(Collective.ALL_REDUCE, parameters=RADIX, counts=_all_reduce_counts)
def recursive_multiplying_all_reduce(rank: int, size: int, radix: int) -> Program:
    """Groups of up to radix ranks, ever farther apart, exchange whole vectors and each rank folds all of its group.

    log_radix size steps, and radix - 1 times as many vectors sent and folded, for a power of the radix; a step per
    factor for products of smaller factors. Of other sizes a core of such a size multiplies, and the other ranks hand
    it their vectors first and get the result last; it is the core with the fewest steps, then the fewest vectors.
    Ruefenacht, Bull & Booth 2017.
    """
    core = _core(size, radix)
    if rank >= core.size:
        yield send(rank % core.size, 0)
        yield recv(rank % core.size, 0)
        return
    twins = range(rank + core.size, size, core.size)
    yield [recv(twin, 0, reduce=True) for twin in twins]
    for level, factor in enumerate(core.factors):
        weight = prod(core.factors[:level])
        first = rank - rank // weight % factor * weight
        peers = [peer for peer in range(first, first + factor * weight, weight) if peer != rank]
        yield [*(send(peer, 0) for peer in peers), *(recv(peer, 0, reduce=True) for peer in peers)]
    yield [send(twin, 0) for twin in twins]
