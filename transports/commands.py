"""From a plan to commands on a CUDA stream: copies, folds, and what a wire makes of the messages of a step.

A *wire* says how messages move: read by the peers out of memory that they have mapped (`cuda_ipc.py`), by NCCL
(`nccl.py`), or through host memory (`staged.py`). Every run of a plan on the same buffers is the same list of commands.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from ..algorithms.decoded import Receiving, Reclaim, Release, Sending, Writing, decode
from ..algorithms.plan import Instruction, Operand, Place, Plan
from .contract import Operation
from .types import TYPES

ALIGNMENT = 64
"""Bytes at whose multiples the parts of a message begin, so that they are read 16 bytes at a time."""

Command = Callable[[int], "Iterator[None] | None"]
"""Enqueues something on a stream. One that the host drives returns an iterator, which yields while the host waits."""


Make = Callable[[int, int], list[list[Command]]]
"""Gives the commands of each lane, for the addresses of an input and an output."""


class Outgoing(NamedTuple):
    """A message to each of the peers, made of these parts: (address, bytes)."""

    peers: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]


class Incoming(NamedTuple):
    """A message from the peer, of parts of these bytes."""

    peer: int
    sizes: tuple[int, ...]


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where the parts of a message lie in it, and at last its end."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return starts


class WirePlan(Protocol):
    """The messages of one run of one lane. All that changes during a run is in it: every run of a plan is the same."""

    def step(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> tuple[list[Command], list[int]]:
        """Move the messages of a step.

        Returns:
            The commands; and for each receive the address at which its message begins, parts at their `offsets`.
        """

    def release(self) -> list[Command]:
        """All reads of what was received in this step are enqueued."""

    def finish(self) -> list[Command]:
        """The end of the run."""


class Wire(Protocol):
    """How messages of plans move between devices.

    Attributes:
        name: for messages to people, and the transport's.
        lanes: how many segments may be under way; 1 if commands only enqueue.
        slot_bytes: the longest message of a plan, without what lies between its parts.
        host_driven: whether commands return iterators.
    """

    name: str
    lanes: int
    slot_bytes: int
    host_driven: bool

    def commands(self, runner: Runner, plan: Plan, operation: Operation) -> Make:
        """What makes a plan's commands."""

    def fail(self) -> None:
        """Let all that waits on this device go on, its results worthless. Called again and again until nothing is
        under way. Never raises."""

    def check(self) -> None:
        """Raise what the device or the wire's own library has reported."""

    def close(self) -> None:
        """Give everything back; nothing is under way."""


class StepWire(ABC):
    """A wire that moves messages step by step."""

    lanes: int

    @abstractmethod
    def compile(self, lane: int) -> WirePlan:
        """Begin a run of a lane."""

    def commands(self, runner: Runner, plan: Plan, operation: Operation) -> Make:
        """See `Wire.commands`."""
        return PlanCommands(runner, self, plan, operation).make


class Kernels(Protocol):
    """What runs on the device between messages: see `cuda/compile.py`."""

    def load(self) -> None:
        """Compile and load what every plan wants; nothing if that is done."""

    def folding(self, dtype: str, op: int, destination: int, sources: Sequence[int], count: int) -> Command:
        """destination = source op source op ..., left to right."""

    def scaling(self, dtype: str, destination: int, source: int, factor: float, count: int) -> Command:
        """destination = source * factor."""

    def gathering(self, pieces: Sequence[tuple[int, int, int]]) -> Command:
        """Copy pieces: (destination, source, bytes)."""

    def tick(self, address: int, stream: int) -> None:
        """Add 1 to the word there."""


class Runner(Protocol):
    """What commands are made for: a device transport."""

    driver: Any
    kernels: Kernels

    def scratch(self, nbytes: int) -> int:
        """Device memory for the run under way."""


class PlanCommands:
    """Makes the commands of a plan."""

    def __init__(self, runner: Runner, wire: StepWire, plan: Plan, operation: Operation) -> None:
        self.runner, self.wire, self.plan, self.operation = runner, wire, plan, operation
        self.dtype = TYPES[operation.dtype].name
        self.program = decode(plan.skeleton.code)
        self.table: list[tuple[int, int, int]] = [tuple(row) for row in plan.table.tolist()]
        self.stride = min(plan.lanes, wire.lanes)
        self.lanes = min(self.stride, plan.segments)

    def make(self, input: int, output: int) -> list[list[Command]]:
        """The commands of each lane."""
        slots = self.plan.skeleton.scratch
        slot = -(-self.plan.segment * self.plan.itemsize // ALIGNMENT) * ALIGNMENT
        scratch = self.runner.scratch(self.lanes * slots * slot) if slots else 0
        return [
            _LaneCommands(
                self, lane, {Place.INPUT: input, Place.OUTPUT: output}, scratch + lane * slots * slot, slot
            ).made
            for lane in range(self.lanes)
        ]

    def count(self, block: int, segment: int) -> int:
        """How many elements of the block lie in the segment."""
        return max(0, min(self.plan.segment, self.table[block][0] - segment * self.plan.segment))


class _LaneCommands:
    """The commands of one lane."""

    def __init__(
        self, plan: PlanCommands, lane: int, buffers: dict[Place, int], scratch: int, scratch_slot: int
    ) -> None:
        self.of, self.buffers, self.scratch, self.scratch_slot = plan, buffers, scratch, scratch_slot
        self.kernels, self.driver = plan.runner.kernels, plan.runner.driver
        self.wire = plan.wire.compile(lane)
        self.made: list[Command] = []
        self.copies: list[tuple[int, int, int]] = []
        for segment in range(lane, plan.plan.segments, plan.stride):
            self._segment(segment)
        self._copy()
        self.made += self.wire.finish()

    def _segment(self, segment: int) -> None:
        self.segment = segment
        self.sends: list[Outgoing] = []
        self.receives: list[Incoming] = []
        self.registers: list[tuple[tuple[int, ...], int]] = []  # of what is received: its blocks, and which of receives
        self.arrived: list[int] = []
        for instruction in self.of.program:
            match instruction:
                case Sending():
                    self._send(instruction)
                case Receiving():
                    self._receive(instruction)
                case Writing():
                    self._messages()
                    self._write(instruction)
                case Release():
                    self._messages()
                    self._copy()
                    self.made += self.wire.release()
                    self.registers, self.arrived = [], []
                case Reclaim():
                    pass

    def _send(self, sending: Sending) -> None:
        sizes = self._sizes([part[1] for part in sending.parts])
        if self._is_sent(sizes):
            pieces = tuple((self._address(part), size) for part, size in zip(sending.parts, sizes, strict=True))
            self.sends.append(Outgoing(sending.peers, pieces))

    def _receive(self, receiving: Receiving) -> None:
        sizes = self._sizes(receiving.blocks)
        self.registers.append((receiving.blocks, len(self.receives)))
        if self._is_sent(sizes):
            self.receives.append(Incoming(receiving.peer, tuple(sizes)))

    def _messages(self) -> None:
        if self.sends or self.receives:
            self._copy()
            commands, self.arrived = self.wire.step(self.sends, self.receives)
            self.made += commands
            self.sends, self.receives = [], []

    def _write(self, writing: Writing) -> None:
        count = self.of.count(writing.destination[1], self.segment)
        if count == 0:
            return
        operation, dtype = self.of.operation, self.of.dtype
        to, sources = self._address(writing.destination), [self._address(source) for source in writing.sources]
        if writing.kind is Instruction.COPY:
            self._add_copy(to, sources[0], count * self.of.plan.itemsize)
            return
        self._copy()
        if writing.kind is Instruction.FOLD:
            self.made.append(self.kernels.folding(dtype, operation.op, to, sources, count))
        else:
            self.made.append(self.kernels.scaling(dtype, to, sources[0], operation.factor, count))

    def _add_copy(self, to: int, source: int, nbytes: int) -> None:
        """Copies that follow each other go together, unless one reads or writes what another of them writes."""
        if to == source:
            return
        for other_to, other_source, other in self.copies:
            written = (other_to, other_to + other), (to, to + nbytes)
            read = (other_source, other_source + other), (source, source + nbytes)
            if any(
                a[0] < b[1] and b[0] < a[1]
                for a, b in ((written[0], written[1]), (written[0], read[1]), (read[0], written[1]))
            ):
                self._copy()
                break
        self.copies.append((to, source, nbytes))

    def _copy(self) -> None:
        if self.copies:
            self.made.append(copying(self.driver, self.kernels, self.copies))
            self.copies = []

    def _sizes(self, blocks: Sequence[int]) -> list[int]:
        return [self.of.plan.itemsize * self.of.count(block, self.segment) for block in blocks]

    def _is_sent(self, sizes: Sequence[int]) -> bool:
        return self.segment == 0 or sum(sizes) > 0

    def _address(self, operand: Operand) -> int:
        place, block, index, part = operand
        plan = self.of.plan
        if place == Place.MESSAGE:
            blocks, number = self.registers[index]
            return self.arrived[number] + offsets(self._sizes(blocks))[part]
        if place == Place.SCRATCH:
            return self.scratch + index * self.scratch_slot
        offset = self.of.table[block][1 if place == Place.INPUT else 2] + self.segment * plan.segment
        return self.buffers[Place(place)] + offset * plan.itemsize


def copying(driver: Any, kernels: Kernels, pieces: Sequence[tuple[int, int, int]]) -> Command:
    """A command that copies pieces (destination, source, bytes) which do not overlap."""
    pieces = tuple(piece for piece in pieces if piece[2])
    if len(pieces) == 1:
        return partial(driver.copy, *pieces[0])
    return kernels.gathering(pieces)
