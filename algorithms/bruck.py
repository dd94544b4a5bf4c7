"""All-to-all by digits: blocks travel together for a while, so messages are few and large."""

from __future__ import annotations

from fractions import Fraction

from .collective import Collective
from .parameters import RADIX
from .registry import Counts, algorithm
from .schedule import Message, Program, recv, send


def _distances(size: int, radix: int, weight: int, digit: int) -> list[int]:
    return [distance for distance in range(size) if distance // weight % radix == digit]


def digit_routing(rank: int, size: int, radix: int) -> Program:
    """Route every block by the digits of its distance (destination - source): one step per digit.

    Blocks whose digit at `weight` is j move j * weight ranks on, together.
    """
    weight = 1
    while weight < size:

        def moving(holder: int, digit: int, weight: int = weight) -> list[tuple[int, int]]:
            """What `holder` passes on: by now a block is its distance's lower digits away from its source."""
            blocks = []
            for distance in _distances(size, radix, weight, digit):
                source = holder - distance % weight
                blocks.append((source % size, (source + distance) % size))
            return blocks

        step: list[Message] = []
        for digit in range(1, radix):
            if digit * weight < size:
                ahead, behind = (rank + digit * weight) % size, (rank - digit * weight) % size
                step += [send(ahead, *moving(rank, digit)), recv(behind, *moving(behind, digit))]
        yield step
        weight *= radix


def _messages(size: int, radix: int) -> list[list[int]]:
    """Blocks in every message that a rank sends, step by step."""
    weights = [radix**k for k in range(size) if radix**k < size]
    return [[len(_distances(size, radix, weight, digit)) for digit in range(1, radix)] for weight in weights]


def _largest(size: int, radix: int) -> int:
    return max((blocks for step in _messages(size, radix) for blocks in step), default=1)


def _counts(size: int, radix: int) -> Counts:
    messages = _messages(size, radix)
    return Counts(len(messages), Fraction(sum(map(sum, messages)), size), Fraction(0))


@algorithm(Collective.ALL_TO_ALL, parameters=RADIX, largest=_largest, counts=_counts)
def bruck_all_to_all(rank: int, size: int, radix: int) -> Program:
    """Digit routing: up to radix - 1 messages per step.

    ceil(log_radix size) steps; every block is sent as often as its distance has digits other than 0, about
    (radix - 1)/radix log_radix size send buffers in all. Bruck et al. 1997.
    """
    yield from digit_routing(rank, size, radix)


@algorithm(Collective.ALL_TO_ALL, largest=lambda p: _largest(p, 2), counts=lambda p: _counts(p, 2))
def recursive_doubling_all_to_all(rank: int, size: int) -> Program:
    """Digit routing with radix 2: one message per step.

    ceil(log2 size) steps; every block is sent as often as its distance has ones, about 1/2 log2 size send
    buffers in all. Bruck et al. 1997.
    """
    yield from digit_routing(rank, size, 2)
