"""What is measured: of each collective the buffers and the bandwidth convention, as one table.

The conventions are those of nccl-tests. `size` is the bytes of a rank's largest buffer, `count` the elements of one
rank's part (of the whole vector for all_reduce, broadcast and reduce). algbw is size / time. busbw is algbw times the
bus factor: the share of `size` that a rank must send at least, so that it compares with what a link can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..algorithms import Collective
from ..transports.types import element_type

OPERATORS = ("sum", "prod", "min", "max", "avg", "band", "bor", "bxor", "premul_sum")
"""What --op may be; premul_sum is measured with the factor 1 / ranks."""


@dataclass(frozen=True)
class Facts:
    """What the benchmark must know of one collective.

    Attributes:
        x_parts: whether the buffer `x` has a part for each rank.
        out_parts: whether `out` has.
        readers: how many ranks' input is needed, by the number of ranks.
        writers: how many ranks' result is not there already.
        both_ways: whether it can be called in place and out of place; else there is one natural form.
        in_place: the form that is measured unless told otherwise.
        chained: whether a rank can not return before every other has entered, so that a loop measures latency.
    """

    x_parts: bool
    out_parts: bool
    readers: Callable[[int], int]
    writers: Callable[[int], int]
    both_ways: bool = False
    in_place: bool = False
    chained: bool = True


def _none(ranks: int) -> int:
    return 0


def _one(ranks: int) -> int:
    return 1


def _all(ranks: int) -> int:
    return ranks


def _all_but_one(ranks: int) -> int:
    return ranks - 1


FACTS = {
    Collective.ALL_REDUCE: Facts(False, False, _all, _all, both_ways=True, in_place=True),
    Collective.REDUCE_SCATTER: Facts(True, False, _all, _all),
    Collective.ALL_GATHER: Facts(False, True, _all, _all),
    Collective.ALL_TO_ALL: Facts(True, True, _all, _all),
    Collective.BROADCAST: Facts(False, False, _one, _all_but_one, in_place=True, chained=False),
    Collective.REDUCE: Facts(False, False, _all, _one, both_ways=True, in_place=True, chained=False),
    Collective.GATHER: Facts(False, True, _all, _one, chained=False),
    Collective.SCATTER: Facts(True, False, _one, _all, chained=False),
    Collective.BARRIER: Facts(False, False, _none, _none),
}


@dataclass(frozen=True)
class Case:
    """One line of the table: a collective on buffers of one size.

    Attributes:
        collective: which.
        dtype: the element type.
        op: the operator; "" where nothing is reduced.
        count: elements of a part (see the module).
        ranks: how many take part.
        in_place: whether the result goes where the input was.
    """

    collective: Collective
    dtype: str
    op: str
    count: int
    ranks: int
    in_place: bool

    @property
    def facts(self) -> Facts:
        """What is known of the collective."""
        return FACTS[self.collective]

    @property
    def x_count(self) -> int:
        """Elements of the buffer `x`."""
        return self.count * (self.ranks if self.facts.x_parts else 1)

    @property
    def out_count(self) -> int:
        """Elements of the buffer `out`."""
        return self.count * (self.ranks if self.facts.out_parts else 1)

    @property
    def size(self) -> int:
        """Bytes of the largest buffer."""
        return max(self.x_count, self.out_count) * element_type(self.dtype).itemsize

    @property
    def least_bytes(self) -> int:
        """The bytes that all ranks together must read and write at least, whatever the algorithm and the transport.

        Every input that the results depend on must be read once, and every result that is not there already must be
        written once. With p ranks and n bytes in the largest buffer:

            all_reduce, all_to_all        2 p n        each rank's n are read, and n written
            reduce_scatter, all_gather    (p + 1) n    n for one of the two, n / p for the other, on each rank
            broadcast                     p n          the root's n are read, n are written on the others
            reduce                        (p + 1) n    each rank's n are read, n are written at the root
            gather, scatter               2 n          p times n / p at the one end, n at the other

        Copies that stay in a cache, and slots in shared memory, are not counted: one could do without them. A single
        rank that works in place has nothing to do.
        """
        if self.ranks == 1 and self.in_place:
            return 0
        elements = self.facts.readers(self.ranks) * self.x_count + self.facts.writers(self.ranks) * self.out_count
        return elements * element_type(self.dtype).itemsize

    @property
    def text(self) -> str:
        """It in words, for messages."""
        data = f"of {self.count} {self.dtype}" if self.count else ""
        return " ".join(filter(None, (self.collective.value, self.op, data)))

    def algbw(self, seconds: float) -> float:
        """Algorithm bandwidth in GB/s."""
        return self.size / seconds / 1e9

    def busbw(self, seconds: float) -> float:
        """Bus bandwidth in GB/s."""
        return self.algbw(seconds) * self.collective.bus_factor(self.ranks)


def cases(
    collective: Collective, ranks: int, sizes: tuple[int, int, int], dtype: str, op: str, in_place: bool
) -> Iterator[Case]:
    """The cases from the smallest to the largest size, each `factor` times the one before.

    A size is rounded down to whole elements, the same number for each rank, but at least one.

    Args:
        sizes: smallest, largest, factor.
    """
    if collective is Collective.BARRIER:
        yield Case(collective, "uint8", "", 0, ranks, in_place)
        return
    facts = FACTS[collective]
    share = element_type(dtype).itemsize * (ranks if facts.x_parts or facts.out_parts else 1)
    for count in counts(sizes, share):
        yield Case(collective, dtype, op if collective.reduces else "", count, ranks, in_place)


def counts(sizes: tuple[int, int, int], share: int) -> Iterator[int]:
    """From the smallest to the largest size how many times `share` bytes it is: rounded down, at least 1, none twice.

    Args:
        sizes: as in `cases`.
    """
    smallest, largest, factor = sizes
    last = 0
    for step in range(1 + int(math.log(largest / smallest, factor) + 1e-9)):
        count = max(1, smallest * factor**step // share)
        if count > last:
            yield count
        last = count
