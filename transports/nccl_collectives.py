"""NCCL's own collectives on the buffers of a call.

Where NCCL has none, a group stands for it: of reduces or broadcasts for parts of different lengths, of sends and
receives for all_to_all, gather and scatter. What is only moved goes as bytes, whatever its type. A rank's part for
itself is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..algorithms import Collective
from ..errors import ArgumentError
from .contract import NativeCall
from .types import element_type

if TYPE_CHECKING:
    from .commands import Command
    from .nccl import NcclWire

COLLECTIVES = frozenset(Collective)
"""What NCCL has of its own, or groups of its calls do: everything."""

Call = Callable[[int], object]
"""A call of NCCL's that still wants its stream."""

Part = tuple[int, int]
"""An address, and how many of NCCL's elements are there."""

_FOLDS = ("sum", "prod", "min", "max")
_NUMBERS = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "uint32", "int64", "uint64")
_TRUTH = {"sum": "max", "max": "max", "bor": "max", "prod": "min", "min": "min", "band": "min"}
_HALVES = {"complex64": "float32", "complex128": "float64"}

REDUCED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_NUMBERS, _FOLDS),
    "bool": tuple(_TRUTH),
    **dict.fromkeys(_HALVES, ("sum",)),
}
"""The operators that NCCL has, by element type: a truth value is a byte of 0 or 1, a complex number two others."""


class NativeCalls:
    """The calls that make up a collective.

    Raises:
        ArgumentError: NCCL lacks the type or the operator.
    """

    def __init__(self, wire: NcclWire, call: NativeCall) -> None:
        self.wire, self.call = wire, call
        nccl, dtype, op = wire.nccl, call.dtype, call.op
        if call.collective.reduces and op not in REDUCED.get(dtype, ()):
            raise ArgumentError(
                f"{call.text}: NCCL has no {op} for {dtype} (there: {', '.join(REDUCED.get(dtype, REDUCED))}): leave "
                "out algorithm='native'"
            )
        self.type, self.op = nccl.NCCL_UINT8, nccl.NCCL_MAX
        self.itemsize = 1 if call.collective is Collective.BARRIER else element_type(dtype).itemsize
        self.scale = self.itemsize  # NCCL's elements in one of ours
        if call.collective.reduces:
            self.scale = 2 if dtype in _HALVES else 1
            if dtype != "bool":
                self.type = getattr(nccl, f"NCCL_{_HALVES.get(dtype, dtype).upper()}")
            self.op = getattr(nccl, f"NCCL_{(_TRUTH[op] if dtype == 'bool' else op).upper()}")

    def make(self, input: int, output: int) -> list[Command]:
        """The commands on these buffers."""
        call, comm, rank, size = self.call, self.wire.communicator, self.wire.rank, self.wire.size
        root, given, result = call.root, call.input_count * self.scale, call.output_count * self.scale
        match call.collective:
            case Collective.ALL_REDUCE:
                return self._grouped(partial(comm.allReduce, input, output, given, self.type, self.op))
            case Collective.REDUCE:
                return self._grouped(partial(comm.reduce, input, output, given, self.type, self.op, root))
            case Collective.BROADCAST:
                count = max(given, result)
                return self._grouped(partial(comm.broadcast, input, output or input, count, self.type, root))
            case Collective.REDUCE_SCATTER if call.counts is not None:
                parts = self._parts(input, call.counts)
                return self._grouped(
                    *(
                        partial(comm.reduce, p, output if r == rank else 0, n, self.type, self.op, r)
                        for r, (p, n) in parts.items()
                    )
                )
            case Collective.REDUCE_SCATTER:
                return self._grouped(partial(comm.reduceScatter, input, output, result, self.type, self.op))
            case Collective.ALL_GATHER if call.counts is not None:
                parts = self._parts(output, call.counts)
                return self._grouped(
                    *(partial(comm.broadcast, input, p, n, self.type, r) for r, (p, n) in parts.items())
                )
            case Collective.ALL_GATHER:
                return self._grouped(partial(comm.allGather, input, output, given, self.type))
            case Collective.ALL_TO_ALL:
                sent = call.sent or (call.input_count // size,) * size
                received = call.received or (call.output_count // size,) * size
                return self._exchange(self._parts(input, sent), self._parts(output, received))
            case Collective.GATHER:
                parts = self._parts(output, (call.input_count,) * size) if rank == root else {}
                return self._exchange({root: (input, given)}, parts)
            case Collective.SCATTER:
                parts = self._parts(input, (call.output_count,) * size) if rank == root else {}
                return self._exchange(parts, {root: (output, result)})
            case Collective.BARRIER:
                token = self.wire.token
                return self._grouped(partial(comm.allReduce, token, token, 1, self.type, self.op))

    def _exchange(self, sent: dict[int, Part], received: dict[int, Part]) -> list[Command]:
        """Send and receive parts by peer; both sides leave out empty ones."""
        rank, comm = self.wire.rank, self.wire.communicator
        commands: list[Command] = []
        if rank in sent and rank in received:
            own, to = sent.pop(rank), received.pop(rank)
            if own != to:
                commands.append(partial(self.wire.driver.copy, to[0], *own))
        calls = [partial(comm.send, part, count, self.type, peer) for peer, (part, count) in sent.items() if count]
        calls += [partial(comm.recv, part, count, self.type, peer) for peer, (part, count) in received.items() if count]
        return commands + self._grouped(*calls)

    def _grouped(self, *calls: Call) -> list[Command]:
        return [self.wire.grouped(calls)] if calls else []

    def _parts(self, address: int, counts: Sequence[int]) -> dict[int, Part]:
        """The ranks' parts, which lie there one behind the other."""
        starts = itertools.accumulate(counts, initial=0)
        return {
            rank: (address + start * self.itemsize, count * self.scale)
            for rank, (start, count) in enumerate(zip(starts, counts))
        }
