"""The portable engine: runs any plan over the verbs of any transport.

It walks the plan's code (format: `algorithms/plan.py`) with one program counter per lane, so `progress` never waits.
A program counter is a generator that stops where a message is missing.

Every message begins with a head (`message.py`). A value is copied out when it is sent: what comes after the send may
change it while the message waits.
Not promised: that a mismatch of collectives that exchange no message is seen before the deadline, or the next message.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from ..algorithms.decoded import Receiving, Reclaim, Release, Sending, Writing, decode
from ..algorithms.plan import Instruction, Operand, Place, Plan, Skeleton
from .contract import Operation, Request, Transport
from .message import HEAD_BYTES, Heads, Wanted
from .running import Running


class Kernels(Protocol):
    """What the engine asks of the native core: arithmetic on addresses."""

    def fold(self, type: int, op: int, destination: int, sources: Sequence[int], count: int) -> None:
        """destination = source op source op ..., left to right; the destination may be one of the sources."""

    def scale(self, type: int, destination: int, source: int, factor: float, count: int) -> None:
        """destination = source * factor; both may be the same."""


def kernels() -> Kernels:
    """The native core's kernels, loaded when the first plan is prepared."""
    return cast(Kernels, importlib.import_module("._native", __package__))


class PortablePlan:
    """A plan made ready to run over a transport's verbs. It keeps its buffers from run to run."""

    def __init__(self, transport: Transport, plan: Plan, operation: Operation) -> None:
        self.transport, self.plan, self.operation = transport, plan, operation
        self.kernels = kernels()
        self.program = decode(plan.skeleton.code)
        self.table: list[tuple[int, int, int]] = [tuple(row) for row in plan.table.tolist()]
        self.heads = Heads(operation, f"rank {transport.rank} of {transport.size}")
        self.lanes = [_Lane(self, number) for number in range(min(plan.lanes, plan.segments))]

    def start(self, input: int, output: int) -> PortableExecution:
        """Start a run on the buffers at these addresses."""
        return PortableExecution(self, input, output)

    def count(self, block: int, segment: int) -> int:
        """How many elements of the block lie in the segment."""
        return max(0, min(self.plan.segment, self.table[block][0] - segment * self.plan.segment))

    def length(self, blocks: Sequence[int], segment: int) -> int:
        """How many bytes of the blocks lie in the segment."""
        return self.plan.itemsize * sum(self.count(block, segment) for block in blocks)

    def is_sent(self, blocks: Sequence[int], segment: int) -> bool:
        """Empty messages of the first segment carry the signature; later ones are left out."""
        return segment == 0 or self.length(blocks, segment) > 0


class PortableExecution(Running):
    """One run of a plan: a generator for each lane, each going as far as its messages let it."""

    def __init__(self, prepared: PortablePlan, input: int, output: int) -> None:
        self.prepared, self.transport = prepared, prepared.transport
        self.number = self.transport.begin_run(prepared.operation.text)
        self.running = [(lane, lane.run(self.number, input, output)) for lane in prepared.lanes]

    def _advance(self) -> bool:
        if self.running:
            self.transport.progress()
        self.running = [(lane, counter) for lane, counter in self.running if next(counter, "end") != "end"]
        return not self.running

    def _late(self) -> str:
        waits = [what for lane, _ in self.running if (what := lane.waits_for()) is not None]
        recorder = self.transport.recorder
        title = recorder.title() if recorder else f"{self.prepared.operation.text} #{self.number + 1}"
        return (
            f"{title}: rank {self.transport.rank} of {self.transport.size} "
            f"{waits[0] if waits else 'is not done'} at its deadline: has that rank called it, is it alive? "
            f"If it is only slow, give a longer timeout"
        )


class _Arrival(NamedTuple):
    request: Request
    position: int
    register: int


class _Departure(NamedTuple):
    requests: list[Request]
    position: int
    buffer: npt.NDArray[np.uint8]


class _Lane:
    """What one lane needs: scratch, a buffer for each register, and buffers for messages that leave."""

    def __init__(self, prepared: PortablePlan, number: int) -> None:
        self.prepared, self.transport, self.number = prepared, prepared.transport, number
        skeleton, plan = prepared.plan.skeleton, prepared.plan
        longest, burst, run = 0, 0, 0
        for instruction in prepared.program:
            run = run + 1 if isinstance(instruction, Sending) else 0
            burst = max(burst, run)
            if isinstance(instruction, Sending):
                longest = max(longest, prepared.length([part[1] for part in instruction.parts], 0))
            elif isinstance(instruction, Receiving):
                longest = max(longest, prepared.length(instruction.blocks, 0))
        self.buffer_bytes = HEAD_BYTES + longest
        self.scratch = _aligned(skeleton.scratch * plan.segment * plan.itemsize)
        self.registers = [_aligned(self.buffer_bytes) for _ in range(skeleton.registers)]
        self.free: list[npt.NDArray[np.uint8]] = []
        # Enough for all sends of any step: so what waits for a buffer waits for the sends of earlier steps only, and
        # these end by themselves in every schedule that replay passes.
        self.to_allocate = burst + 1
        self.arrivals: list[_Arrival] = []
        self.departures: list[_Departure] = []
        self.segment = 0

    def run(self, number: int, input: int, output: int) -> Iterator[None]:
        """Run the lane's segments; yields where it has to wait."""
        prepared, plan = self.prepared, self.prepared.plan
        self.arrivals, self.departures = [], []
        self.bases = {Place.INPUT: input, Place.OUTPUT: output, Place.SCRATCH: _address(self.scratch)}
        self.received: dict[int, tuple[int, ...]] = {}
        for segment in range(self.number, plan.segments, plan.lanes):
            self.segment = segment
            for position, instruction in enumerate(prepared.program):
                match instruction:
                    case Sending():
                        if prepared.is_sent([part[1] for part in instruction.parts], self.segment):
                            buffer = yield from self._buffer()
                            self._send(number, position, instruction, buffer)
                    case Receiving():
                        register = len(self.received)
                        self.received[register] = instruction.blocks
                        if prepared.is_sent(instruction.blocks, self.segment):
                            self._receive(position, instruction, register)
                    case Writing():
                        yield from self._all_arrived(number)
                        self._write(instruction)
                    case Release():
                        yield from self._all_arrived(number)
                        self.received = {}
                    case Reclaim():
                        pass
        while self._departing():
            yield

    def _buffer(self) -> Generator[None, None, npt.NDArray[np.uint8]]:
        while not self.free and not self.to_allocate:
            self._departing()
            if not self.free:
                yield
        if not self.free:
            self.to_allocate -= 1
            self.free.append(_aligned(self.buffer_bytes))
        return self.free.pop()

    def _departing(self) -> bool:
        """Whether messages are still on their way out; the buffers of the others are free again."""
        done = [departure for departure in self.departures if all(request.done for request in departure.requests)]
        if done:
            self.departures = [departure for departure in self.departures if departure not in done]
            self.free += (departure.buffer for departure in done)
        return bool(self.departures)

    def _send(self, number: int, position: int, sending: Sending, buffer: npt.NDArray[np.uint8]) -> None:
        start = _address(buffer)
        ctypes.memmove(start, self.prepared.heads.make(number, sending.tag, self.segment), HEAD_BYTES)
        end = HEAD_BYTES
        for part in sending.parts:
            length = self.prepared.length([part[1]], self.segment)
            ctypes.memmove(start + end, self._operand(part), length)
            end += length
        data = buffer[:end].data
        requests = [self.transport.post_send(peer, self.number, data) for peer in sending.peers]
        self.departures.append(_Departure(requests, position, buffer))

    def _receive(self, position: int, receiving: Receiving, register: int) -> None:
        length = HEAD_BYTES + self.prepared.length(receiving.blocks, self.segment)
        into = self.registers[register][:length].data
        request = self.transport.post_recv(receiving.peer, self.number, into)
        self.arrivals.append(_Arrival(request, position, register))

    def _all_arrived(self, number: int) -> Iterator[None]:
        while self.arrivals:
            while not self.arrivals[0].request.done:
                yield
            self._check(number, self.arrivals.pop(0))

    def _check(self, number: int, arrival: _Arrival) -> None:
        """Raise Mismatch unless the message is the one that was wanted."""
        prepared = self.prepared
        receiving = prepared.program[arrival.position]
        assert isinstance(receiving, Receiving)
        request, head = arrival.request, bytes(self.registers[arrival.register][:HEAD_BYTES])
        if request.length == request.wanted and head == prepared.heads.make(number, receiving.tag, self.segment):
            return
        wanted = Wanted(
            receiving.peer,
            receiving.tag,
            self.segment,
            request.wanted - HEAD_BYTES,
            _step(prepared, arrival.position),
            _names(prepared.plan.skeleton, receiving.blocks),
        )
        raise prepared.heads.mismatch(number, wanted, head, request.length, self.transport.called)

    def _write(self, writing: Writing) -> None:
        prepared, operation = self.prepared, self.prepared.operation
        count = prepared.count(writing.destination[1], self.segment)
        if count == 0:
            return
        to, sources = self._operand(writing.destination), [self._operand(source) for source in writing.sources]
        if writing.kind is Instruction.FOLD:
            prepared.kernels.fold(operation.dtype, operation.op, to, sources, count)
        elif writing.kind is Instruction.SCALE:
            prepared.kernels.scale(operation.dtype, to, sources[0], operation.factor, count)
        elif to != sources[0]:
            ctypes.memmove(to, sources[0], count * prepared.plan.itemsize)

    def _operand(self, operand: Operand) -> int:
        """The address of an operand in the segment under way."""
        place, block, index, part = operand
        plan, table = self.prepared.plan, self.prepared.table
        if place == Place.MESSAGE:
            before = self.prepared.length(self.received[index][:part], self.segment)
            return _address(self.registers[index]) + HEAD_BYTES + before
        if place == Place.SCRATCH:
            return self.bases[Place.SCRATCH] + index * plan.segment * plan.itemsize
        offset = table[block][1 if place == Place.INPUT else 2] + self.segment * plan.segment
        return self.bases[Place(place)] + offset * plan.itemsize

    def waits_for(self) -> str | None:
        """What the lane waits for, in words."""
        skeleton = self.prepared.plan.skeleton
        segment = f" of segment {self.segment}" if self.prepared.plan.segments > 1 else ""
        for arrival in self.arrivals:
            receiving = self.prepared.program[arrival.position]
            if isinstance(receiving, Receiving) and not arrival.request.done:
                blocks, step = _names(skeleton, receiving.blocks), _step(self.prepared, arrival.position)
                return f"waits at step {step} for blocks {blocks}{segment} from rank {receiving.peer}"
        for departure in self.departures:
            sending = self.prepared.program[departure.position]
            assert isinstance(sending, Sending)
            for peer, request in zip(sending.peers, departure.requests, strict=True):
                if not request.done:
                    blocks = _names(skeleton, [part[1] for part in sending.parts])
                    step = _step(self.prepared, departure.position)
                    return f"waits since step {step} for rank {peer} to take blocks {blocks}{segment}"
        return None


def _names(skeleton: Skeleton, blocks: Sequence[int]) -> str:
    return str(tuple(skeleton.blocks[block] for block in blocks))


def _step(prepared: PortablePlan, position: int) -> int:
    """The schedule's step that an instruction is from, the first being 1."""
    return 1 + sum(isinstance(instruction, Release) for instruction in prepared.program[:position])


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _aligned(length: int) -> npt.NDArray[np.uint8]:
    memory = np.empty(length + 64, np.uint8)
    start = -_address(memory) % 64
    return memory[start : start + length]
