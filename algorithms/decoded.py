"""The code of a skeleton as objects, for those who read it in Python (format: `plan.py`)."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from .plan import Instruction, Operand


class Sending(NamedTuple):
    """The parts as one message to each of the peers; `lends` if they may be read in place."""

    tag: int
    peers: tuple[int, ...]
    parts: tuple[Operand, ...]
    lends: bool


class Receiving(NamedTuple):
    """The next message from the peer, into the next register."""

    tag: int
    peer: int
    blocks: tuple[int, ...]


class Writing(NamedTuple):
    """A fold, a copy or a scaling."""

    kind: Instruction
    destination: Operand
    sources: tuple[Operand, ...]


class Release(NamedTuple):
    """The end of a step."""


class Reclaim(NamedTuple):
    """Before a change of what the sends of these numbers named. Nothing to do for who sends copies."""

    sends: tuple[int, ...]


Decoded = Sending | Receiving | Writing | Release | Reclaim


def decode(code: npt.NDArray[np.int32]) -> list[Decoded]:
    """The code of a skeleton, one tuple for each instruction."""
    integers = iter(code.tolist())

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(integers) for _ in range(count))

    def operands(count: int) -> tuple[Operand, ...]:
        return tuple(cast(Operand, take(4)) for _ in range(count))

    program: list[Decoded] = []
    for number in integers:
        kind = Instruction(number)
        match kind:
            case Instruction.SEND:
                tag, lends, peers = take(3)
                program.append(Sending(tag, take(peers), operands(next(integers)), bool(lends)))
            case Instruction.RECV:
                tag, peer, blocks = take(3)
                program.append(Receiving(tag, peer, take(blocks)))
            case Instruction.FOLD:
                (destination,) = operands(1)
                program.append(Writing(kind, destination, operands(next(integers))))
            case Instruction.COPY | Instruction.SCALE:
                destination, source = operands(2)
                program.append(Writing(kind, destination, (source,)))
            case Instruction.RELEASE:
                program.append(Release())
            case Instruction.RECLAIM:
                program.append(Reclaim(take(next(integers))))
    return program
