"""Kernels that wait for each other: a launch is a rank's whole run of a plan. Only where every rank has its own GPU.

The ranks map each other's workspaces. An all_reduce `direct` or `two_shot` of a short vector is a kernel of its own
(`cuda/shots.cu`), which folds in the same order: so the results have the same bits. Everything else is run by the
interpreter of the plan's table (`cuda/interpreter.cu`), each lane by a block. What ranks tell each other is counted in
the workspaces from run to run, so launches may be captured in a graph and repeated.

Every wait of a kernel ends at the timeout, at an abort, and at `Spin.fail`. Then the results are worthless, and so are
the counts: who has failed makes a new transport.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..algorithms.collective import Collective
from ..algorithms.decoded import Writing, decode
from ..algorithms.plan import Instruction, Plan
from ..errors import ArgumentError
from .commands import Command
from .contract import Operation
from .growing import Growing
from .types import TYPES

RANKS, SOURCES, REGISTERS, SLOTS = 32, 64, 64, 2
"""At most, in the kernels: ranks, sources of a fold, messages received in a step. And the slots between two ranks."""

SHOT_BLOCKS, SHOT_BYTES = 32, 32768
"""Of the kernels for short vectors: blocks, and what a block takes at a time."""

SHOT_LIMIT = 8 * SHOT_BLOCKS * SHOT_BYTES
"""The longest vector for them, in bytes. Longer ones go through the interpreter, whose segments overlap."""

BLOCK = 512
"""Threads of a block."""

CHUNK = 1 << 20
"""Device memory is allocated so many bytes at a time for what plans are made of."""

FAILED = 1
"""A report of the host's own: let all waits end."""

_ALIGNMENT = 128
_SHOTS = {"direct": "one_shot", "two_shot": "two_shot"}
_NO, _BEFORE, _AFTER = 0, 1, 2
_WAITS = (
    "rank {rank} of {size}: block {block} of an all_reduce waited {seconds:g} s for rank {peer}, in vain",
    "rank {rank} of {size}: lane {block} waited {seconds:g} s for a message from rank {peer}, in vain",
    "rank {rank} of {size}: lane {block} waited {seconds:g} s for rank {peer} to take a message, in vain",
)


class _Rank(ctypes.Structure):
    """`Rank` of cuda/signals.cuh."""

    _fields_ = (
        ("timeout", ctypes.c_uint64),
        ("abort", ctypes.c_uint64),
        ("report", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("lanes", ctypes.c_uint32),
        ("slot_bytes", ctypes.c_uint32),
        ("workspaces", ctypes.c_uint64 * RANKS),
    )


class Call(ctypes.Structure):
    """`Call` of cuda/signals.cuh: one rank's part of a launch."""

    _fields_ = (
        ("rank", ctypes.c_uint64),
        ("plan", ctypes.c_uint64),
        ("input", ctypes.c_uint64),
        ("output", ctypes.c_uint64),
    )


class Calls(ctypes.Structure):
    """`Calls` of cuda/signals.cuh."""

    _fields_ = (("call", Call * 8),)


class _Reduction(ctypes.Structure):
    """`Reduction` of cuda/shots.cu."""

    _fields_ = (
        ("count", ctypes.c_uint64),
        ("factor", ctypes.c_double),
        ("op", ctypes.c_int32),
        ("scaled", ctypes.c_int32),
    )


class _Plan(ctypes.Structure):
    """`Plan` of cuda/interpreter.cu."""

    _fields_ = (
        ("code", ctypes.c_uint64),
        ("table", ctypes.c_uint64),
        ("scratch", ctypes.c_uint64),
        ("segment", ctypes.c_int64),
        ("factor", ctypes.c_double),
        ("length", ctypes.c_uint32),
        ("segments", ctypes.c_uint32),
        ("lanes", ctypes.c_uint32),
        ("scratch_slots", ctypes.c_uint32),
        ("op", ctypes.c_int32),
        ("padding", ctypes.c_uint32),
    )


def workspace_bytes(size: int, lanes: int, slot_bytes: int) -> int:
    """The bytes of a rank's workspace, which is all zero at first (layout: cuda/signals.cuh)."""
    words = 4 * (SHOT_BLOCKS * (size + 1) + 4 * lanes * size)
    return _up(words, _ALIGNMENT) + 2 * SHOT_BLOCKS * SHOT_BYTES + lanes * size * SLOTS * _up(slot_bytes, _ALIGNMENT)


class Spin:
    """What one rank needs to run plans by kernels that wait.

    Args:
        driver: of the rank's device (`cuda/driver.py`).
        workspaces: of every rank, by rank, as this device has them; of `workspace_bytes` each.
        abort: where the device finds a word of host memory; all waits end when it is not 0.
        timeout: seconds that a wait may take.
        lanes, slot_bytes: as of the workspaces; the longest message of a plan is of slot_bytes.
        image: makes a cubin of sources, an architecture and options: `cuda.compile.compile`.

    Raises:
        ArgumentError: more ranks than the kernels serve.
    """

    def __init__(
        self,
        driver: Any,
        rank: int,
        workspaces: Sequence[int],
        abort: int,
        timeout: float,
        lanes: int,
        slot_bytes: int,
        image: Callable[[Sequence[str], str, Sequence[str]], bytes],
    ) -> None:
        size = len(workspaces)
        if size > RANKS:
            raise ArgumentError(f'sync="spin" serves at most {RANKS} ranks, and there are {size}: choose "stream"')
        self.driver, self.rank, self.size, self.timeout = driver, rank, size, timeout
        self.lanes, self.slot_bytes, self._image = lanes, slot_bytes, image
        self._functions: dict[str, int] = {}
        self._memory: list[int] = []
        self._placed: dict[bytes, int] = {}
        self._room = (0, 0)  # an address, and the bytes there
        self._scratch = Growing(driver)
        self._pinned = driver.allocate_pinned(8)
        self._report = ctypes.c_uint64.from_address(self._pinned)
        self._report.value = 0
        nanoseconds = min(int(timeout * 1e9), 2**63)
        card = _Rank(nanoseconds, abort, self._pinned, rank, size, lanes, _up(slot_bytes, _ALIGNMENT))
        card.workspaces[:size] = workspaces
        self.card = self.place(bytes(card))

    def prepare(self, plan: Plan, operation: Operation) -> SpinPlan:
        """Make a plan ready to run. It allocates memory: not while a stream is captured.

        Raises:
            ArgumentError: the kernels do not serve such a plan; what they do is in the message.
        """
        return SpinPlan(self, plan, operation)

    def fail(self) -> None:
        """Let all waits of this rank's kernels end, now and from now on. Never raises."""
        if self._report.value == 0:
            self._report.value = FAILED

    def error(self) -> str | None:
        """What a kernel said when it gave up a wait at its timeout; None if none did."""
        report = self._report.value
        if report <= FAILED:
            return None
        said = _WAITS[report >> 48 & 0x7FFF].format(
            rank=self.rank, size=self.size, block=report >> 16 & 0xFFFFFFFF, peer=report & 0xFFFF, seconds=self.timeout
        )
        return f"{said}: has that rank called the same, is it alive? If it is only slow, give a longer timeout"

    def close(self) -> None:
        """Give the memory back; nothing is under way."""
        for address in self._memory:
            self.driver.free(address)
        self._memory.clear()
        self._scratch.free()
        if self._pinned:
            # A copy of the report, which `error` may still be asked for.
            self._report = ctypes.c_uint64(self._report.value)
            self.driver.free_pinned(self._pinned)
            self._pinned = 0

    def function(self, source: str, kernel: str, dtype: str) -> int:
        """The kernel of that element type. Compiled, or taken from the cache, when it is first asked for."""
        name = f"{kernel}_{dtype}"
        if name not in self._functions:
            image = self._image([source], self.driver.architecture, [f"-DABCCL_TYPE={dtype}"])
            self._functions[name] = self.driver.function(self.driver.load(image), name)
        return self._functions[name]

    def place(self, data: bytes) -> int:
        """Where the device finds these bytes. They stay until `close`, since graphs may go on using them; the same
        bytes are placed once."""
        if data not in self._placed:
            nbytes = _up(len(data), _ALIGNMENT)
            if nbytes > self._room[1]:
                self._room = self._allocate(max(nbytes, CHUNK)), max(nbytes, CHUNK)
            address, room = self._room
            self._room = address + nbytes, room - nbytes
            held = ctypes.create_string_buffer(data, len(data))
            self.driver.copy_now(address, ctypes.addressof(held), len(data))
            self._placed[data] = address
        return self._placed[data]

    def scratch(self, nbytes: int) -> int:
        """Device memory for the run under way."""
        return self._scratch.take(nbytes)

    def _allocate(self, nbytes: int) -> int:
        self._memory.append(int(self.driver.allocate(nbytes)))
        return self._memory[-1]


class SpinPlan:
    """A plan made ready to run by one launch.

    Attributes:
        kernel: what runs it: "one_shot", "two_shot" or "interpret".
        function, blocks: of the launch.
        plan: where the interpreter's plan lies; 0 for others.
        arguments: of the kernel, those behind the `Calls`.
    """

    def __init__(self, spin: Spin, plan: Plan, operation: Operation) -> None:
        self.spin, dtype = spin, TYPES[operation.dtype].name
        self.plan = 0
        algorithm = plan.skeleton.algorithm
        shot = _SHOTS.get(algorithm.name) if algorithm.collective is Collective.ALL_REDUCE else None
        nbytes = plan.input_count * plan.itemsize
        if shot is not None and nbytes <= SHOT_LIMIT:
            self.kernel, source = shot, "shots.cu"
            # A thread has 16 bytes, until the blocks are used up.
            self.blocks = min(SHOT_BLOCKS, max(1, -(-nbytes // (16 * BLOCK))))
            scaled = _scaled(plan)
            reduction = _Reduction(plan.input_count, operation.factor, operation.op, scaled)
            self.arguments: tuple[Any, ...] = (ctypes.c_uint32(self.blocks), reduction)
        else:
            self.kernel, source = "interpret", "interpreter.cu"
            self.blocks = min(plan.lanes, plan.segments)
            self.plan = self._encode(plan, operation)
            self.arguments = (ctypes.c_uint32(self.blocks),)
        self.function = spin.function(source, self.kernel, dtype)

    def call(self, input: int, output: int) -> Call:
        """This rank's part of a launch on these buffers."""
        return Call(self.spin.card, self.plan, input, output)

    def commands(self, input: int, output: int) -> list[Command]:
        """What is enqueued on a stream for a run on these buffers."""
        calls = Calls()
        calls.call[0] = self.call(input, output)
        return [partial(self._launch, (calls, *self.arguments))]

    def _launch(self, arguments: Sequence[Any], stream: int) -> None:
        self.spin.driver.launch(self.function, self.blocks, BLOCK, arguments, stream)

    def _encode(self, plan: Plan, operation: Operation) -> int:
        """Where the interpreter's plan lies."""
        spin, skeleton = self.spin, plan.skeleton
        _check(plan, spin.lanes)
        scratch = self.blocks * skeleton.scratch * _up(plan.segment * plan.itemsize, 16)
        return spin.place(
            bytes(
                _Plan(
                    spin.place(np.ascontiguousarray(skeleton.code, np.int32).tobytes()),
                    spin.place(np.ascontiguousarray(plan.table, np.int64).tobytes()),
                    spin.scratch(scratch),
                    plan.segment,
                    operation.factor,
                    len(skeleton.code),
                    plan.segments,
                    plan.lanes,
                    skeleton.scratch,
                    operation.op,
                )
            )
        )


def _check(plan: Plan, lanes: int) -> None:
    """Refuse what has no room in the interpreter."""
    if plan.lanes > lanes:
        raise ArgumentError(f'sync="spin": a plan of {plan.lanes} lanes, and the workspace has {lanes}: take fewer')
    sources = max((len(i.sources) for i in decode(plan.skeleton.code) if isinstance(i, Writing)), default=0)
    if plan.skeleton.registers > REGISTERS or sources > SOURCES:
        raise ArgumentError(
            f'sync="spin" receives at most {REGISTERS} messages in a step and folds {SOURCES} sources at a time; '
            f"{plan.skeleton.algorithm.name} has {plan.skeleton.registers} and {sources}: choose another algorithm"
        )


def _scaled(plan: Plan) -> int:
    """Whether the input is scaled, or the result: what a plan of `direct` or `two_shot` says by where it scales."""
    kinds = [i.kind if isinstance(i, Writing) else None for i in decode(plan.skeleton.code)]
    if Instruction.SCALE not in kinds:
        return _NO
    return _BEFORE if kinds[0] is Instruction.SCALE else _AFTER


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
