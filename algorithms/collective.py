"""The collectives, each as a precondition and a postcondition over blocks.

A block names data, not a place. What a block is follows from the collective:

- all_reduce, broadcast, reduce: the vector is cut into as many blocks as the algorithm declares, 0, 1, ...
- reduce_scatter, all_gather, gather, scatter, barrier: block i is rank i's part (barrier's are empty);
- all_to_all: block (s, d) goes from rank s to rank d.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ..errors import ArgumentError
from .words import did_you_mean

Block = int | tuple[int, int]


class Collective(Enum):
    """A collective operation. `before` and `after` state what it does; all else is how."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    BROADCAST = "broadcast"
    ALL_TO_ALL = "all_to_all"
    REDUCE = "reduce"
    GATHER = "gather"
    SCATTER = "scatter"
    BARRIER = "barrier"

    @property
    def reduces(self) -> bool:
        """Whether contributions of all ranks are combined by an operator."""
        return self in _REDUCING

    @property
    def rooted(self) -> bool:
        """Whether one rank, the root, plays a part of its own."""
        return self in _ROOTED

    @property
    def cut(self) -> bool:
        """Whether the algorithm declares into how many blocks the vector is cut."""
        return self in _CUT

    def before(self, rank: int, size: int, blocks: int, root: int = 0) -> Sequence[Block]:
        """The blocks that `rank` holds at the start, each with its own contribution only."""
        match self:
            case Collective.ALL_REDUCE | Collective.REDUCE | Collective.REDUCE_SCATTER:
                return range(blocks)
            case Collective.ALL_GATHER | Collective.GATHER | Collective.BARRIER:
                return (rank,)
            case Collective.ALL_TO_ALL:
                return [(rank, destination) for destination in range(size)]
            case Collective.BROADCAST | Collective.SCATTER:
                return range(blocks) if rank == root else ()

    def after(self, rank: int, size: int, blocks: int, root: int = 0) -> Sequence[Block]:
        """The blocks that `rank` must hold at the end, with the contributions of `contributors`."""
        match self:
            case Collective.ALL_REDUCE | Collective.BROADCAST | Collective.ALL_GATHER | Collective.BARRIER:
                return range(blocks)
            case Collective.REDUCE_SCATTER | Collective.SCATTER:
                return (rank,)
            case Collective.ALL_TO_ALL:
                return [(source, rank) for source in range(size)]
            case Collective.REDUCE | Collective.GATHER:
                return range(blocks) if rank == root else ()

    def contributors(self, block: Block, size: int, root: int = 0) -> Sequence[int]:
        """The ranks whose contributions a finished `block` holds, each once."""
        match self:
            case Collective.ALL_REDUCE | Collective.REDUCE | Collective.REDUCE_SCATTER:
                return range(size)
            case Collective.BROADCAST | Collective.SCATTER:
                return (root,)
            case Collective.ALL_TO_ALL:
                assert isinstance(block, tuple)
                return (block[0],)
            case Collective.ALL_GATHER | Collective.GATHER | Collective.BARRIER:
                assert isinstance(block, int)
                return (block,)

    def bus_factor(self, size: int) -> float:
        """What makes algorithm bandwidth a bus bandwidth, which tells what a link carries (nccl-tests)."""
        match self:
            case Collective.ALL_REDUCE:
                return 2 * (size - 1) / size
            case Collective.BROADCAST | Collective.REDUCE:
                return 1.0
            case Collective.BARRIER:
                return 0.0
            case _:
                return (size - 1) / size


_REDUCING = frozenset({Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.REDUCE})
_ROOTED = frozenset({Collective.BROADCAST, Collective.REDUCE, Collective.GATHER, Collective.SCATTER})
_CUT = frozenset({Collective.ALL_REDUCE, Collective.BROADCAST, Collective.REDUCE})


def to_collective(name: str) -> Collective:
    """The collective of that name; `all-reduce` and `AllReduce` are understood.

    Raises:
        ArgumentError: there is none; near names are in the message.
    """
    plain = name.replace("-", "").replace("_", "").lower()
    for collective in Collective:
        if collective.value.replace("_", "") == plain:
            return collective
    raise ArgumentError(f"no collective is called {name!r}: {did_you_mean(name, [c.value for c in Collective])}")
