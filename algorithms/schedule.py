"""The vocabulary of a schedule: sends and receives of blocks, yielded step by step.

A program is a generator over (rank, size). What it yields is one step of that rank: a message or a tuple of
messages. A step offers all its sends, waits for all its receives, folds, and releases; so a send takes the
value as it stood before the step. The reducing receives of one block in one step are folded with the rank's
own value in ascending rank order in one pass. At most two messages per ordered pair of ranks in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import index

from ..errors import ScheduleError
from .collective import Block

LIMIT = 1_000_000
"""The steps after which a program is taken for one that never ends."""


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
    return Send(*_checked("send", peer, blocks))


def recv(peer: int, *blocks: Block, reduce: bool = False) -> Recv:
    """A message from `peer`, blocks as the sender names them. With `reduce`, it is folded into the own value."""
    return Recv(*_checked("recv", peer, blocks), reduce)


def _checked(call: str, peer: int, blocks: tuple[Block, ...]) -> tuple[int, tuple[Block, ...]]:
    """Peer and blocks as ints of Python, whoever's integers they are."""
    try:
        return index(peer), tuple(block if type(block) is int else _block(block) for block in blocks)
    except TypeError:
        got = ", ".join(map(repr, (peer, *blocks)))
        raise ScheduleError(
            f"{call} wants a rank and blocks, which are integers or (source, destination), as in {call}(1, 0) or "
            f"{call}(1, (0, 1)), and got {call}({got}): several blocks are written {call}(1, *blocks), and // divides "
            f"to an integer"
        ) from None


def _block(block: Block) -> Block:
    if not isinstance(block, tuple):
        return index(block)
    source, destination = block if len(block) == 2 else (None, None)
    return index(source), index(destination)


def steps(program: Program) -> Iterator[Step]:
    """The program's steps in one form: tuples of messages, empty steps left out.

    Raises:
        ScheduleError: it seems never to end.
    """
    for number, yielded in enumerate(program):
        if number == LIMIT:
            raise ScheduleError(f"it yielded {LIMIT:,} steps and did not end: give its loop an end")
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
            send(ranks(m.peer), *map(blocks, m.blocks))
            if isinstance(m, Send)
            else recv(ranks(m.peer), *map(blocks, m.blocks), reduce=m.reduce)
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
