"""The vocabulary of a schedule: sends and receives of blocks, yielded step by step.

A program is a generator over (rank, size). What it yields is one step of that rank: a message or a tuple of
messages. A step offers all its sends, waits for all its receives, folds, and releases; so a send takes the
value as it stood before the step. The reducing receives of one block in one step are folded with the rank's
own value in ascending rank order in one pass. At most two messages per ordered pair of ranks in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .collective import Block


@dataclass(frozen=True, slots=True)
class Send:
    """One message to `peer` that carries `blocks` in that order."""

    peer: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Recv:
    """One message from `peer`; `reduce` folds its blocks into the rank's own values instead of replacing them."""

    peer: int
    blocks: tuple[Block, ...]
    reduce: bool = False


Message = Send | Recv
Step = tuple[Message, ...]
Program = Iterable[Message | Iterable[Message]]


def send(peer: int, *blocks: Block) -> Send:
    """A message to `peer`. Several blocks travel together, in the order named."""
    return Send(peer, blocks)


def recv(peer: int, *blocks: Block, reduce: bool = False) -> Recv:
    """A message from `peer`, blocks as the sender names them. With `reduce`, it is folded into the own value."""
    return Recv(peer, blocks, reduce)


def steps(program: Program) -> Iterator[Step]:
    """The program's steps in one form: tuples of messages, empty steps left out."""
    for yielded in program:
        step = (yielded,) if isinstance(yielded, (Send, Recv)) else tuple(yielded)
        if step:
            yield step


def relabel(
    program: Program,
    ranks: Callable[[int], int] = lambda rank: rank,
    blocks: Callable[[Block], Block] = lambda block: block,
) -> Iterator[Step]:
    """The same program among other ranks on other blocks.

    `ranks` maps the program's rank to the real one, `blocks` its block to the real one. Roots other than 0,
    groups of ranks and hierarchies are made of it.
    """
    for step in steps(program):
        yield tuple(
            Send(ranks(m.peer), tuple(map(blocks, m.blocks)))
            if isinstance(m, Send)
            else Recv(ranks(m.peer), tuple(map(blocks, m.blocks)), m.reduce)
            for m in step
        )


def mirror(program: Program, reduce: bool = False) -> Iterator[Step]:
    """The program backwards in time, every send a receive and every receive a send.

    The mirror image of a broadcast is a reduce, of an all_gather a reduce_scatter (with `reduce`), of a
    scatter a gather. Messages and their blocks are those of the original.
    """
    for step in reversed(list(steps(program))):
        yield tuple(
            Recv(m.peer, m.blocks, reduce) if isinstance(m, Send) else Send(m.peer, m.blocks) for m in reversed(step)
        )
