"""Schedules in GOAL, the Group Operation Assembly Language of other simulators: LogGOPSim and what came of it.

Hoefler, Siebert & Lumsdaine 2009. Each rank's part is a graph of sends, receives and calculations:

    rank 1 {
    l1: send 64b to 2 tag 0
    l2: recv 64b from 0 tag 0
    l3: calc 51
    l3 requires l2                 begins when l2 is done
    l4: send 64b to 2 tag 1
    l4 requires l3
    l4 irequires l1                begins when l1 has begun
    }
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..algorithms import Algorithm
from ..algorithms.decoded import Decoded, Receiving, Release, Sending, Writing, decode
from ..algorithms.plan import Instruction, Place, lower
from ..algorithms.simulator import cut
from ..errors import ArgumentError

CPUS = 256
"""Of a rank: LogGOPSim's binary format has a byte for them."""


def goal(
    algorithm: Algorithm,
    ranks: int,
    nbytes: int,
    *,
    root: int = 0,
    segment: int | None = None,
    lanes: int = 1,
    processors: int = 1,
    fold: float = 0.0,
    unit: float = 1e-9,
) -> Iterator[str]:
    """The lines of the schedule in GOAL, with the order that the event engine keeps.

    In a lane of a rank sends begin in order, none before what the steps before it receive and fold is done; receives
    and folds are done in order. Lanes know nothing of each other. The messages of two ranks have tags of their own, so
    that each matches one receive. A message has a byte at least, as the simulators want it; others are rounded.

    Args:
        segment: the longest message wanted; not cut if None.
        lanes: segments under way at a time.
        processors: lanes that a rank serves at once, 0 for all; lane l runs on cpu l mod processors.
        fold: seconds per byte of a message that is folded into a sum; no calculation if 0.
        unit: seconds of the simulator's unit of time.

    Raises:
        ArgumentError: the algorithm does not run on so many ranks, or a number is out of bounds.
    """
    block, segments = cut(algorithm, ranks, nbytes, segment)
    lanes = min(lanes, segments)
    cpus = min(processors or lanes, lanes)
    if lanes < 1 or processors < 0 or fold < 0 or unit <= 0:
        raise ArgumentError(
            f"wanted are lanes from 1, processors and fold from 0 and a unit above 0, and got {lanes}, {processors}, "
            f"{fold} and {unit}"
        )
    if cpus > CPUS:
        raise ArgumentError(f"{cpus} lanes run at once, and readers of GOAL know {CPUS} cpus: take fewer lanes")
    yield f"num_ranks {ranks}\n"
    for rank in range(ranks):
        steps = _steps(decode(lower(algorithm, rank, ranks, root).code))
        lines = _Lines(rank, block, fold / unit)
        yield f"\nrank {rank} {{\n"
        for lane in range(lanes):
            yield from lines.of(steps, range(lane, segments, lanes), lane, lanes, lane % cpus)
        yield "}\n"


@dataclass
class _Step:
    """Messages as (peer, blocks), and how many blocks are folded."""

    sends: list[tuple[int, int]] = field(default_factory=list)
    receives: list[tuple[int, int]] = field(default_factory=list)
    folded: int = 0


def _steps(program: Sequence[Decoded]) -> list[_Step]:
    steps = [_Step()]
    for instruction in program:
        match instruction:
            case Sending(_, peers, parts):
                steps[-1].sends += [(peer, len(parts)) for peer in peers]
            case Receiving(_, peer, blocks):
                steps[-1].receives.append((peer, len(blocks)))
            case Writing(Instruction.FOLD, _, sources):
                steps[-1].folded += sum(source[0] == Place.MESSAGE for source in sources)
            case Release():
                steps.append(_Step())
    return steps


class _Lines:
    """The lines of a rank.

    Args:
        block: bytes of a block in a segment.
        fold: units of time per byte.
    """

    def __init__(self, rank: int, block: float, fold: float) -> None:
        self.rank, self.block, self.fold = rank, block, fold
        self.labels = 0

    def of(self, steps: Sequence[_Step], segments: Sequence[int], lane: int, lanes: int, cpu: int) -> Iterator[str]:
        """The lines of a lane."""
        where = f" cpu {cpu}" if cpu else ""
        messages: Counter[tuple[str, int]] = Counter()
        sent, done, known = "", "", ""

        def message(kind: str, way: str, peer: int, blocks: int) -> str:
            tag = messages[kind, peer] * lanes + lane
            messages[kind, peer] += 1
            return self._labelled(f"{kind} {max(1, round(blocks * self.block))}b {way} {peer} tag {tag}{where}")

        for _ in segments:
            for step in steps:
                for peer, blocks in step.sends:
                    yield message("send", "to", peer, blocks)
                    if done != known:
                        yield f"{self._label} requires {done}\n"
                        known = done
                    if sent:
                        yield f"{self._label} irequires {sent}\n"
                    sent = self._label
                for peer, blocks in step.receives:
                    yield message("recv", "from", peer, blocks)
                    if done:
                        yield f"{self._label} requires {done}\n"
                    done = self._label
                units = round(step.folded * self.block * self.fold)
                if units:
                    yield self._labelled(f"calc {units}{where}")
                    yield f"{self._label} requires {done}\n"
                    done = self._label

    @property
    def _label(self) -> str:
        return f"l{self.labels}"

    def _labelled(self, operation: str) -> str:
        self.labels += 1
        return f"{self._label}: {operation}\n"
