"""One run of an algorithm held against numpy: what the conformance suite and the tests of plans are made of."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..algorithms import Algorithm, Collective, algorithms
from ..algorithms.plan import Scaling, Sizes, bind, cut, exchange_matrix, lower, parts
from ..errors import ArgumentError
from .contract import Execution, NativeCall, Operation, Placed, Prepared, Transport
from .types import NUMBERS, OPERATORS, check_operator, numpy_dtype, numpy_operator

Array = npt.NDArray[Any]

_GUARD = 64


@dataclass(frozen=True)
class Case:
    """One run of one algorithm. `count` is the vector's length, or that of a rank's part.

    `uneven` makes the parts of different lengths, some of them empty; `segment` is the elements of each block in a
    segment; the result is written over the input if `in_place`.
    """

    algorithm: Algorithm
    size: int
    count: int
    dtype: str = "float32"
    op: str = "sum"
    root: int = 0
    segment: int | None = None
    lanes: int = 1
    scaling: Scaling = Scaling.NONE
    uneven: bool = False
    in_place: bool = False

    @property
    def collective(self) -> Collective:
        """What is run."""
        return self.algorithm.collective

    @property
    def text(self) -> str:
        """The operation's text."""
        return f"{self.collective.value}({self.dtype}, {self.op}, {self.count} elements, {self.algorithm.name})"

    def operation(self) -> Operation:
        """The operation; what scales multiplies by a half, which is exact."""
        key = f"{self.text} {self.root} {self.uneven}".encode()
        return Operation(NUMBERS[self.dtype], OPERATORS[self.op], 0.5, zlib.crc32(key), self.text)

    def counts(self) -> list[int]:
        """The lengths of the ranks' parts."""
        if self.collective is Collective.BARRIER:
            return [0] * self.size
        return [0 if self.uneven and rank % 3 == 1 else self.count + self.uneven * rank for rank in range(self.size)]

    def matrix(self) -> list[list[int]]:
        """What goes from whom to whom in an all_to_all."""
        ranks = range(self.size)
        return [[self.count + self.uneven * ((2 * s + d) % 3) * ((s + d) % 4 != 3) for d in ranks] for s in ranks]

    def sizes(self, rank: int) -> Sizes:
        """The block table."""
        if self.collective.cut:
            return cut(self.count, self.algorithm.blocks(self.size), numpy_dtype(self.dtype).itemsize)
        if self.collective is Collective.ALL_TO_ALL:
            return exchange_matrix(rank, self.matrix())
        return parts(self.collective, rank, self.counts())

    def native_call(self, rank: int) -> NativeCall:
        """The same as a call of the engine's own."""
        wanted, gives = self.wanted(rank), self.gives(rank)
        parts = self.uneven and self.collective in (Collective.REDUCE_SCATTER, Collective.ALL_GATHER)
        pairs = self.uneven and self.collective is Collective.ALL_TO_ALL
        return NativeCall(
            collective=self.collective,
            dtype=self.dtype,
            op=self.op if self.collective.reduces else "",
            root=self.root,
            input_count=len(self.given(rank)) if gives else 0,
            output_count=0 if wanted is None else len(wanted),
            counts=tuple(self.counts()) if parts else None,
            sent=tuple(self.matrix()[rank]) if pairs else None,
            received=tuple(row[rank] for row in self.matrix()) if pairs else None,
            text=self.text,
        )

    def gives(self, rank: int) -> bool:
        """Whether the rank has an input."""
        return self.collective not in (Collective.BROADCAST, Collective.SCATTER) or rank == self.root

    def given(self, rank: int) -> Array:
        """What a rank contributes (were it the root): small numbers, so that all results are exact."""
        match self.collective:
            case Collective.ALL_TO_ALL:
                length = sum(self.matrix()[rank])
            case Collective.REDUCE_SCATTER | Collective.SCATTER:
                length = sum(self.counts())
            case Collective.ALL_GATHER | Collective.GATHER | Collective.BARRIER:
                length = self.counts()[rank]
            case _:
                length = self.count
        values = (np.arange(length) * 7 + rank * 3) % 5
        if self.op == "prod":
            values = 1 + values % 2
        dtype = numpy_dtype(self.dtype)
        if dtype.kind == "b":
            return np.equal(values % 2, 0)
        given: Array = values.astype(dtype)
        return given * dtype.type(1 + 1j) if dtype.kind == "c" else given

    def wanted(self, rank: int) -> Array | None:
        """What a rank must end with."""
        starts = np.cumsum([0, *self.counts()])
        own = slice(starts[rank], starts[rank + 1])
        match self.collective:
            case Collective.ALL_REDUCE:
                return self._reduced()
            case Collective.REDUCE:
                return self._reduced() if rank == self.root else None
            case Collective.REDUCE_SCATTER:
                return self._reduced()[own]
            case Collective.BROADCAST:
                return self.given(self.root)
            case Collective.SCATTER:
                return self.given(self.root)[own]
            case Collective.ALL_GATHER | Collective.GATHER | Collective.BARRIER:
                if self.collective is Collective.GATHER and rank != self.root:
                    return None
                return np.concatenate([self.given(other) for other in range(self.size)])
            case Collective.ALL_TO_ALL:
                rows = [np.split(self.given(s), np.cumsum(row)[:-1])[rank] for s, row in enumerate(self.matrix())]
                return np.concatenate(rows)

    def _reduced(self) -> Array:
        dtype, fold = numpy_dtype(self.dtype), numpy_operator(self.op, self.dtype)
        half = dtype.type(0.5) if self.scaling is not Scaling.NONE else None
        total: Array | None = None
        for rank in range(self.size):
            values = self.given(rank)
            if self.scaling is Scaling.BEFORE:
                values = values * half
            total = values if total is None else fold(total, values).astype(dtype)
        assert total is not None
        return total * half if self.scaling is Scaling.AFTER else total


class Trial:
    """One rank's part in a case: its buffers with guards around them, and the plan (or the native call) made ready."""

    def __init__(self, transport: Transport, case: Case, native: bool = False) -> None:
        self.case, self.rank = case, transport.rank
        self.prepared = (
            transport.prepare_native(case.native_call(self.rank)) if native else self._prepare_plan(transport)
        )
        dtype, wanted = numpy_dtype(case.dtype), case.wanted(self.rank)
        self.memories: list[Array] = []
        self.places: list[Placed] = []
        self.transport = transport
        self.input = self._guarded(case.given(self.rank)) if case.gives(self.rank) else None
        self.output = None
        if wanted is not None and case.in_place and self.input is not None:
            start = int(np.cumsum([0, *case.counts()])[self.rank])
            if case.collective is Collective.REDUCE_SCATTER:
                self.output = self.input[start : start + len(wanted)]
            elif case.collective is Collective.ALL_GATHER:
                self.output = self._guarded(np.zeros(len(wanted), dtype))
                self.output[start : start + len(self.input)] = self.input
                self.input = self.output[start : start + len(self.input)]
            else:
                self.output = self.input
        elif wanted is not None:
            self.output = self._guarded(np.zeros(len(wanted), dtype))

    def start(self) -> Execution:
        """Start the run."""
        for placed in self.places:
            placed.store()
        return self.prepared.start(self._address(self.input), self._address(self.output))

    def fetch(self) -> None:
        """Once the run is done: look at what it has made of the buffers."""
        for placed in self.places:
            placed.fetch()

    def verify(self) -> None:
        """Compare with numpy; nothing but the output may have changed."""
        self.fetch()
        wanted, me = self.case.wanted(self.rank), f"rank {self.rank} in {self.case}"
        if wanted is not None and self.output is not None and not np.array_equal(self.output, wanted):
            wrong = np.flatnonzero(self.output != wanted)
            raise AssertionError(
                f"{me}: {len(wrong)} of {len(wanted)} elements are wrong, the first is {wrong[0]}: "
                f"wanted {wanted[wrong[0]]}, came {self.output[wrong[0]]}"
            )
        if self.input is not None and not (self.case.in_place and wanted is not None):
            assert np.array_equal(self.input, self.case.given(self.rank)), f"{me}: the input was written"
        for memory in self.memories:
            guards = np.concatenate([memory[:_GUARD], memory[-_GUARD:]])
            assert (guards == 0xA5).all(), f"{me}: bytes beside a buffer were written"

    def _prepare_plan(self, transport: Transport) -> Prepared:
        case = self.case
        skeleton = lower(case.algorithm, self.rank, case.size, case.root, case.scaling)
        itemsize = numpy_dtype(case.dtype).itemsize
        segment_bytes = case.segment and case.segment * max(1, skeleton.largest) * itemsize
        plan = bind(
            skeleton,
            case.sizes(self.rank),
            itemsize,
            slot_bytes=transport.slot_bytes,
            lanes=case.lanes,
            segment_bytes=segment_bytes,
        )
        return transport.prepare(plan, case.operation())

    def _address(self, array: Array | None) -> int:
        """Where plans find the array: in the image of the memory that it is a part of."""
        if array is None:
            return 0
        start = int(array.ctypes.data)
        for memory, placed in zip(self.memories, self.places, strict=True):
            if memory.ctypes.data <= start <= memory.ctypes.data + memory.nbytes - _GUARD:
                return placed.address + start - int(memory.ctypes.data)
        raise AssertionError("an array of a trial lies in none of its memories")

    def _guarded(self, values: Array) -> Array:
        memory = np.full(values.nbytes + 2 * _GUARD, 0xA5, np.uint8)
        self.memories.append(memory)
        self.places.append(self.transport.place(memory))
        inner = memory[_GUARD : _GUARD + values.nbytes].view(values.dtype)
        inner[:] = values
        return inner


def pairs() -> list[tuple[str, str]]:
    """The element types and operators that can be tested here: bfloat16 needs ml_dtypes."""

    def defined(dtype: str, op: str) -> bool:
        try:
            check_operator(op, dtype)
            numpy_dtype(dtype)
        except ArgumentError:
            return False
        return True

    return [(dtype, op) for dtype in NUMBERS for op in OPERATORS if defined(dtype, op)]


def cases(size: int, lanes: int) -> Iterator[Case]:
    """Every algorithm that runs on `size` ranks, with empty, tiny and odd counts; the rest is drawn, always alike."""
    every = [algorithm for collective in Collective for algorithm in algorithms(collective).values()]
    for algorithm in every:
        if algorithm.refusal(size):
            continue
        collective = algorithm.collective
        draw = random.Random(f"{collective.value} {algorithm.name} {size}")
        for count in (0, 1, 5, 131):
            dtype, op = draw.choice([pair for pair in pairs() if collective.reduces or pair[1] == "sum"])
            scales = collective.reduces and op == "sum" and numpy_dtype(dtype).kind not in "iub"
            yield Case(
                algorithm,
                size,
                count,
                dtype,
                op,
                root=draw.randrange(size) if collective.rooted else 0,
                segment=draw.choice([None, 3, 16]),
                lanes=draw.randint(1, lanes),
                scaling=draw.choice(list(Scaling)) if scales else Scaling.NONE,
                uneven=draw.random() < 0.5,
                in_place=draw.random() < 0.5 and can_be_in_place(collective),
            )


def native_cases(size: int) -> Iterator[Case]:
    """Every collective with every type and operator, equal and other parts, in place and not."""
    for collective in Collective:
        any_algorithm = next(iter(algorithms(collective).values()))
        draw = random.Random(f"native {collective.value} {size}")
        for dtype, op in [pair for pair in pairs() if collective.reduces or pair[1] == "sum"]:
            yield Case(
                any_algorithm,
                size,
                draw.choice([0, 1, 5, 131]) if (dtype, op) != ("float32", "sum") else 1000,
                dtype,
                op,
                root=draw.randrange(size) if collective.rooted else 0,
                uneven=collective in UNEVEN and draw.random() < 0.5,
                in_place=draw.random() < 0.5 and can_be_in_place(collective),
            )


UNEVEN = (Collective.REDUCE_SCATTER, Collective.ALL_GATHER, Collective.ALL_TO_ALL)
"""The collectives whose native calls take parts of different lengths."""


def can_be_in_place(collective: Collective) -> bool:
    """Whether the result may be written over the input."""
    return collective.cut or collective in (Collective.REDUCE_SCATTER, Collective.ALL_GATHER)
