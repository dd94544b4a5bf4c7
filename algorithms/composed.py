"""A collective made of two others, one after the other: any registered algorithm of each.

    composed           all_reduce       reduce_scatter, then all_gather
                       reduce           reduce_scatter, then gather at the root
                       broadcast        scatter from the root, then all_gather
                       all_gather       gather at rank 0, then broadcast
                       reduce_scatter   reduce at rank 0, then scatter
    composed_rooted    all_reduce       reduce at rank 0, then broadcast

Each parameter names an algorithm of the collective that it is called after; they run in the order declared. Some
algorithms with a name of their own are such pairs, too: ring, two_shot, rabenseifner, scatter_all_gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import lcm

from .collective import Block, Collective
from .cost import is_balanced
from .parameters import Parameter
from .registry import Algorithm, Counts, ProgramFunction, Restriction, algorithm, lookup
from .schedule import Program


def _parts(names: dict[str, str]) -> list[Algorithm]:
    return [lookup(Collective(kind), name) for kind, name in names.items()]


def _blocks(size: int, **names: str) -> int:
    """So many that each block of a part stands for a whole number of them."""
    return lcm(*(part.blocks(size) for part in _parts(names)))


def _largest(size: int, **names: str) -> int:
    total = _blocks(size, **names)
    return max(part.largest(size) * total // part.blocks(size) for part in _parts(names)) if size > 1 else 1


def _counts(size: int, **names: str) -> Counts | None:
    """The sums, if in one of the parts all ranks do alike and end together: else the parts may overlap."""
    parts = _parts(names)
    first, second = (part.counts(size) if part.counts else None for part in parts)
    if first is None or second is None:
        return None
    if not any(is_balanced(part, size, counts.steps) for part, counts in zip(parts, (first, second))):
        return None
    return Counts(first.steps + second.steps, first.sent + second.sent, first.folded + second.folded)


def _program(rank: int, size: int, names: dict[str, str], root: int = 0) -> Program:
    total = _blocks(size, **names)
    for part in _parts(names):
        width = total // part.blocks(size)
        for step in part.program(rank, size, root if part.collective.rooted else 0):
            yield [replace(m, blocks=tuple(_stands_for(m.blocks, width))) for m in step]


def _stands_for(blocks: Sequence[Block], width: int) -> Iterator[Block]:
    """The composition's blocks, so many for each of a part's."""
    for block in blocks:
        assert isinstance(block, int)
        yield from range(block * width, (block + 1) * width)


def _composed(collective: Collective, **defaults: str) -> Callable[[ProgramFunction], ProgramFunction]:
    """Register the composition, with these algorithms if nothing is said."""
    words = " and ".join(f"{kind}={{{kind}}}" for kind in defaults)
    restrictions = [
        Restriction(
            f"a number of ranks that {words} run on",
            lambda size, **names: not any(part.refusal(size) for part in _parts(names)),
            told="Both parts must run on that number of ranks.",
        )
    ]
    if not collective.cut:
        restrictions.append(
            Restriction(
                f"a multiple of as many ranks as {words} cut the vector into blocks",
                lambda size, **names: size == 1 or _blocks(size, **names) == size,
                told="If a part cuts the vector into a fixed number of blocks, the number of ranks must be a multiple.",
            )
        )
    return algorithm(
        collective,
        blocks=_blocks if collective.cut else None,
        largest=_largest,
        restrictions=restrictions,
        counts=_counts,
        parameters={kind: Parameter(name, f"an algorithm of {kind}") for kind, name in defaults.items()},
        placed=collective.rooted,
    )


@_composed(Collective.ALL_REDUCE, reduce_scatter="ring", all_gather="recursive_doubling")
def composed_all_reduce(rank: int, size: int, **names: str) -> Program:
    """Any reduce_scatter, then any all_gather.

    The steps of both; 2 (size - 1)/size of the vector sent, half of it folded, if each part moves no more than it must.
    Chan et al. 2007.
    """
    return _program(rank, size, names)


@_composed(Collective.ALL_REDUCE, reduce="tree", broadcast="chain")
def composed_rooted_all_reduce(rank: int, size: int, **names: str) -> Program:
    """Any reduce to rank 0, then any broadcast from there.

    The steps of both; the vector passes through rank 0 as a whole, so few messages for short vectors. Chan et al. 2007.
    """
    return _program(rank, size, names)


@_composed(Collective.REDUCE, reduce_scatter="recursive_doubling", gather="tree")
def composed_reduce(rank: int, size: int, root: int, **names: str) -> Program:
    """Any reduce_scatter, then any gather at the root.

    The steps of both; a rank folds (size - 1)/size of the vector, where the root of a tree folds whole ones. As
    declared, recursive halving and a binomial tree, it is that of Rabenseifner 2004.
    """
    return _program(rank, size, names, root)


@_composed(Collective.BROADCAST, scatter="direct", all_gather="direct")
def composed_broadcast(rank: int, size: int, root: int, **names: str) -> Program:
    """Any scatter from the root, then any all_gather.

    The steps of both; the root sends 2 (size - 1)/size of the vector. Barnett, van de Geijn et al. 1994.
    """
    return _program(rank, size, names, root)


@_composed(Collective.ALL_GATHER, gather="tree", broadcast="chain")
def composed_all_gather(rank: int, size: int, **names: str) -> Program:
    """Any gather at rank 0, then any broadcast from there.

    The steps of both; the result passes through rank 0 as a whole. Chan et al. 2007.
    """
    return _program(rank, size, names)


@_composed(Collective.REDUCE_SCATTER, reduce="chain", scatter="tree")
def composed_reduce_scatter(rank: int, size: int, **names: str) -> Program:
    """Any reduce to rank 0, then any scatter from there.

    The steps of both; the vector passes through rank 0 as a whole. Chan et al. 2007.
    """
    return _program(rank, size, names)
