"""Lowering: from a schedule to a plan, a flat table that engines run.

A plan is a *skeleton* plus a *block table*. The skeleton is what one rank does, in integers, whatever the sizes;
the table says for each block that the rank touches how many elements it has and where they lie. One skeleton
serves all sizes.

Lowering is copy-on-write: a block is read from the user's input until its first change, then it lives in the
output if it ends there, else in scratch. So the input is never written, and nothing is copied that need not be.

The code of a skeleton is a sequence of instructions of int32:

    SEND    tag, lends, peers n, peer * n, parts k, operand * k   the parts as one message, to each of the peers
    RECV    tag, peer, parts k, block * k                    the next message from peer, into the next register
    FOLD    destination, sources k, operand * k              sources in ascending rank order, left to right
    COPY    destination, source
    SCALE   destination, source                              times the operation's factor
    RELEASE                                                  ends a step: all registers are given back
    RECLAIM sends n, send * n                                waits until what these sends lent has been read

An operand is four integers: place, block, index, part. INPUT and OUTPUT are the user's buffers; SCRATCH has
`index` as its slot; MESSAGE is part number `part` of the message in register `index`. A tag is a checksum of
the blocks' names: both ends of a message have the same, so a swapped message does not go unnoticed.

Lending: a send whose `lends` is 1 names memory of the user that its step does not change, so an engine may let the
receiver read it in place. RECLAIM names sends by their number in the code, from 0, and stands before what changes the
memory that they lent; a run ends when all that was lent has been read. An engine that copies what it sends passes over
it.

Segments: segment s takes elements [s c, (s+1) c) of every block, c being small enough that the largest message
of any rank fits one slot. Each segment runs the whole code on its part; messages with no bytes are sent in
segment 0 (they carry the signature, and make barrier) and left out later. Lane l runs the segments l, l + lanes,
... in order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ScheduleError
from .collective import Block, Collective
from .registry import Algorithm
from .schedule import Recv, Send, Step

ALIGNMENT = 64
"""Blocks and segments are cut at multiples of this many bytes: a cache line, and the width of a streaming store."""


class Instruction(IntEnum):
    """The first integer of an instruction."""

    SEND = 0
    RECV = 1
    FOLD = 2
    COPY = 3
    SCALE = 4
    RELEASE = 5
    RECLAIM = 6


class Place(IntEnum):
    """Where an operand lies."""

    INPUT = 0
    OUTPUT = 1
    SCRATCH = 2
    MESSAGE = 3


class Scaling(Enum):
    """Whether the reduction scales: premul_sum BEFORE the first use of the input, avg AFTER the last fold."""

    NONE = "none"
    BEFORE = "before"
    AFTER = "after"


Operand = tuple[int, int, int, int]


@dataclass(frozen=True)
class Skeleton:
    """What one rank does in one collective, whatever the sizes.

    Attributes:
        code: the instructions.
        blocks: the names of the blocks that the code's block numbers stand for.
        scratch: how many scratch slots (of one segment of one block each) a lane needs.
        registers: how many messages a step receives at most.
        largest: the number of blocks in the largest message of any rank.
    """

    algorithm: Algorithm
    rank: int
    size: int
    root: int
    code: npt.NDArray[np.int32]
    blocks: tuple[Block, ...]
    scratch: int
    registers: int
    largest: int


def lower(algorithm: Algorithm, rank: int, size: int, root: int = 0, scaling: Scaling = Scaling.NONE) -> Skeleton:
    """Lower the schedule of one rank. Linear in the number of blocks moved.

    Raises:
        ArgumentError: the algorithm does not run on `size` ranks.
        ScheduleError: the rank sends or folds a block that it does not hold.
    """
    return _Lowering(algorithm, rank, size, root, scaling).skeleton()


class _Lowering:
    def __init__(self, algorithm: Algorithm, rank: int, size: int, root: int, scaling: Scaling) -> None:
        blocks = algorithm.blocks(size)
        self.algorithm, self.rank, self.size, self.root, self.scaling = algorithm, rank, size, root, scaling
        self.before = algorithm.collective.before(rank, size, blocks, root)
        self.after = dict.fromkeys(algorithm.collective.after(rank, size, blocks, root))
        self.code: list[int] = []
        self.number: dict[Block, int] = {}
        self.where: dict[Block, Operand] = {}
        self.last_use: dict[Block, int] = {}
        self.free: list[int] = []
        self.lent: dict[Block, list[int]] = {}  # the sends that lent the block's present place
        self.sends = 0
        self.scratch = 0
        self.registers = 0

    def skeleton(self) -> Skeleton:
        program = self.algorithm.program(self.rank, self.size, self.root)
        for index, step in enumerate(program):
            for message in step:
                if isinstance(message, Send) or message.reduce:
                    self.last_use.update(dict.fromkeys(message.blocks, index))
        for block in self.before:
            self.where[block] = (Place.INPUT, self._number(block), 0, 0)
            if self.scaling is Scaling.BEFORE:
                self._write(Instruction.SCALE, block, self.where[block])
        for index, step in enumerate(program):
            self._sends(index, step)
            self._receives(index, step)
        for block in self.after:
            source = self._value(block, len(program))
            home: Operand = (Place.OUTPUT, self._number(block), 0, 0)
            if self.scaling is Scaling.AFTER:
                self._reclaim([block])
                self.code += (Instruction.SCALE, *home, *source)
            elif source != home:
                self.code += (Instruction.COPY, *home, *source)
        return Skeleton(
            self.algorithm,
            self.rank,
            self.size,
            self.root,
            np.array(self.code, dtype=np.int32),
            tuple(self.number),
            self.scratch,
            self.registers,
            self.algorithm.largest(self.size),
        )

    def _sends(self, index: int, step: Step) -> None:
        sends = [message for message in step if isinstance(message, Send)]
        peers = [message.peer for message in sends]
        groups: dict[tuple[Block, ...], list[int]] = {}
        if len(set(peers)) == len(peers):
            # One arena copy serves all readers of the same blocks. With one message per peer no order can change.
            for message in sends:
                groups.setdefault(message.blocks, []).append(message.peer)
            batches = list(groups.items())
        else:
            batches = [(message.blocks, [message.peer]) for message in sends]
        changed = {block for message in step if isinstance(message, Recv) for block in message.blocks}
        for blocks, readers in batches:
            values = [self._value(block, index) for block in blocks]
            lends = bool(blocks) and changed.isdisjoint(blocks) and all(v[0] != Place.SCRATCH for v in values)
            self.code += (Instruction.SEND, _tag(blocks), int(lends), len(readers), *readers, len(blocks))
            for block, value in zip(blocks, values, strict=True):
                self.code += value
                if lends:
                    self.lent.setdefault(block, []).append(self.sends)
            self.sends += 1

    def _receives(self, index: int, step: Step) -> None:
        receives = [message for message in step if isinstance(message, Recv)]
        self.registers = max(self.registers, len(receives))
        # Before the messages are taken, so that an engine may read them to where they belong.
        self._reclaim([block for message in receives for block in message.blocks])
        folds: dict[Block, list[tuple[int, Operand]]] = {}
        copies: dict[Block, Operand] = {}
        for register, message in enumerate(receives):
            numbers = [self._number(block) for block in message.blocks]
            self.code += (Instruction.RECV, _tag(message.blocks), message.peer, len(numbers), *numbers)
            for part, (block, number) in enumerate(zip(message.blocks, numbers, strict=True)):
                operand: Operand = (Place.MESSAGE, number, register, part)
                if message.reduce:
                    folds.setdefault(block, []).append((message.peer, operand))
                else:
                    copies[block] = operand
        for block, contributions in folds.items():
            own = (self.rank, self._value(block, index))
            if self._is_read_after(block, index):
                sources = [operand for _, operand in sorted([own, *contributions])]
                self._write(Instruction.FOLD, block, *sources)
        for block, operand in copies.items():
            if self._is_read_after(block, index):
                self._write(Instruction.COPY, block, operand)
        self.code.append(Instruction.RELEASE)
        for sent_or_received in step:
            for block in sent_or_received.blocks:
                if not self._is_read_after(block, index):
                    self._forget(block)

    def _write(self, instruction: Instruction, block: Block, *sources: Operand) -> None:
        """The instruction, with its destination at the block's home: output if it ends there, else scratch."""
        home = self.where.get(block)
        if block in self.after:
            home = (Place.OUTPUT, self._number(block), 0, 0)
        elif home is None or home[0] != Place.SCRATCH:
            if not self.free:
                self.free.append(self.scratch)
                self.scratch += 1
            home = (Place.SCRATCH, self._number(block), self.free.pop(), 0)
        count = (len(sources),) if instruction is Instruction.FOLD else ()
        self.code += (instruction, *home, *count)
        for source in sources:
            self.code += source
        self.where[block] = home

    def _reclaim(self, blocks: Sequence[Block]) -> None:
        """Let the coming change of these blocks wait for those who read them in place."""
        sends = sorted({send for block in blocks if block in self.after for send in self.lent.pop(block, ())})
        if sends:
            self.code += (Instruction.RECLAIM, len(sends), *sends)

    def _forget(self, block: Block) -> None:
        place = self.where.get(block)
        if place and place[0] == Place.SCRATCH:
            del self.where[block]
            self.free.append(place[2])

    def _is_read_after(self, block: Block, index: int) -> bool:
        return block in self.after or self.last_use.get(block, -1) > index

    def _number(self, block: Block) -> int:
        return self.number.setdefault(block, len(self.number))

    def _value(self, block: Block, index: int) -> Operand:
        try:
            return self.where[block]
        except KeyError:
            a = self.algorithm
            raise ScheduleError(
                f"{a.collective.value} {a.name}: rank {self.rank} of {self.size} uses block {block} at step "
                f"{index + 1} and does not hold it: run `abccl verify` on the algorithm"
            ) from None


def _tag(blocks: tuple[Block, ...]) -> int:
    return zlib.crc32(repr(blocks).encode()) & 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a block lies, in elements: its length, and its offsets in the input and the output (-1: not there)."""

    count: int
    input: int = -1
    output: int = -1


Sizes = Callable[[Block], Extent]


def cut(count: int, blocks: int, itemsize: int) -> Sizes:
    """A vector of `count` elements in nearly equal blocks that start at cache lines; the last ones may be empty."""
    align = max(1, ALIGNMENT // itemsize)
    chunk = -(-count // blocks)
    chunk = -(-chunk // align) * align if blocks > 1 else chunk

    def extent(block: Block) -> Extent:
        assert isinstance(block, int)
        start = min(block * chunk, count)
        return Extent(min(start + chunk, count) - start, start, start)

    return extent


def parts(collective: Collective, rank: int, counts: Sequence[int]) -> Sizes:
    """The blocks of a collective that gathers or scatters: block i is rank i's part, of `counts[i]` elements.

    The concatenation lies in the input of reduce_scatter and scatter, in the output of all_gather and gather; the
    other buffer is the rank's own part.
    """
    starts = np.concatenate(([0], np.cumsum(counts))).tolist()
    scatters = collective in (Collective.REDUCE_SCATTER, Collective.SCATTER)

    def extent(block: Block) -> Extent:
        assert isinstance(block, int)
        whole, own = starts[block], 0 if block == rank else -1
        return Extent(counts[block], whole, own) if scatters else Extent(counts[block], own, whole)

    return extent


def exchange(rank: int, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Sizes:
    """The blocks of an all_to_all, of which a rank knows its own row and column.

    For the blocks of others, that some schedules forward, all rows must be equal: use `exchange_matrix` if not.
    """
    even = send_counts[0] if len({*send_counts, *receive_counts}) == 1 else None

    def count(source: int, destination: int) -> int:
        if source == rank:
            return send_counts[destination]
        if destination == rank:
            return receive_counts[source]
        if even is None:
            raise ArgumentError("an all_to_all with splits forwards blocks of unknown size: choose pairwise or direct")
        return even

    return _exchange(rank, send_counts, receive_counts, count)


def exchange_matrix(rank: int, counts: Sequence[Sequence[int]]) -> Sizes:
    """The blocks of an all_to_all, `counts[s][d]` elements going from s to d, all of them known."""
    return _exchange(rank, counts[rank], [row[rank] for row in counts], lambda s, d: counts[s][d])


def _exchange(
    rank: int, send_counts: Sequence[int], receive_counts: Sequence[int], count: Callable[[int, int], int]
) -> Sizes:
    input_starts = np.concatenate(([0], np.cumsum(send_counts))).tolist()
    output_starts = np.concatenate(([0], np.cumsum(receive_counts))).tolist()

    def extent(block: Block) -> Extent:
        assert isinstance(block, tuple)
        source, destination = block
        return Extent(
            count(source, destination),
            input_starts[destination] if source == rank else -1,
            output_starts[source] if destination == rank else -1,
        )

    return extent


@dataclass(frozen=True)
class Plan:
    """A skeleton with its block table, cut into segments: all that an engine needs besides the buffers.

    Attributes:
        table: for each of the skeleton's blocks its count and its offsets in input and output, in elements.
        itemsize: bytes of an element.
        segment: elements of each block in one segment.
        segments: how many segments this rank runs.
        lanes: how many segments are under way at a time.
        input_count, output_count: elements of the buffers; an engine refuses a table that reaches beyond.
        protocol: how long messages travel, for an engine that knows several ways; it may find a better one in time.
        forced: whether it must keep to the protocol.
    """

    skeleton: Skeleton
    table: npt.NDArray[np.int64]
    itemsize: int
    segment: int
    segments: int
    lanes: int
    input_count: int
    output_count: int
    protocol: str | None = None
    forced: bool = False

    @property
    def scratch_bytes(self) -> int:
        """The scratch memory that all lanes need together."""
        return self.lanes * self.skeleton.scratch * self.segment * self.itemsize


def bind(
    skeleton: Skeleton,
    sizes: Sizes,
    itemsize: int,
    *,
    slot_bytes: int,
    lanes: int = 1,
    segment_bytes: int | None = None,
    counts: tuple[int, int] | None = None,
    protocol: str | None = None,
    forced: bool = False,
) -> Plan:
    """Give a skeleton its sizes. Cost: linear in the blocks that the rank touches.

    Args:
        slot_bytes: the longest message that the transport takes.
        segment_bytes: the longest message wanted, if that is less.
        counts: elements of the input and the output buffer; what the table needs, if None.
        protocol, forced: see `Plan`.

    Raises:
        ArgumentError: not even one element of each block of the largest message fits a slot.
    """
    extents = [sizes(block) for block in skeleton.blocks]
    table = np.array([(e.count, e.input, e.output) for e in extents], dtype=np.int64).reshape(-1, 3)
    segment = min(slot_bytes, segment_bytes or slot_bytes) // (max(1, skeleton.largest) * itemsize)
    align = max(1, ALIGNMENT // itemsize)
    if segment > align:
        segment -= segment % align
    if segment == 0:
        a = skeleton.algorithm
        raise ArgumentError(
            f"{a.collective.value} {a.name} sends {skeleton.largest} blocks of {itemsize}-byte elements as one "
            f"message, which must fit {slot_bytes} bytes: choose another algorithm, or larger slots"
        )
    longest = int(table[:, 0].max(initial=0))
    segment = max(1, min(segment, longest))
    if counts is None:
        ends = np.where(table[:, 1:] >= 0, table[:, :1] + table[:, 1:], 0).max(axis=0, initial=0)
        counts = (int(ends[0]), int(ends[1]))
    return Plan(skeleton, table, itemsize, segment, max(1, -(-longest // segment)), lanes, *counts, protocol, forced)
