"""The MPI library's own collectives, non-blocking, on the buffers of a plan."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..algorithms import Collective
from ..errors import ArgumentError, CollectiveError, Mismatch, PeerLost
from .contract import Execution, NativeCall
from .running import Running
from .types import OPERATORS, element_type

if TYPE_CHECKING:
    from .mpi import MPITransport

COLLECTIVES = frozenset(Collective)
"""What MPI has of its own: everything."""

_TYPES = {"float32": "FLOAT", "float64": "DOUBLE", "bool": "C_BOOL"}
_TYPES |= {"complex64": "C_FLOAT_COMPLEX", "complex128": "C_DOUBLE_COMPLEX"}
_OF_BYTES = {1: "BYTE", 2: "UINT16_T", 4: "UINT32_T", 8: "UINT64_T", 16: "C_DOUBLE_COMPLEX"}
_LOGICAL = {"sum": "LOR", "max": "LOR", "bor": "LOR", "prod": "LAND", "min": "LAND", "band": "LAND", "bxor": "LXOR"}


def mpi_type(mpi: Any, dtype: str, reduces: bool = True) -> Any:
    """MPI's predefined type for an element type of abccl.

    A duplicate, as mpi4py.util.dtlib makes, would be refused by MPI's operators. What is only moved may be any type.

    Raises:
        ArgumentError: MPI can not reduce it.
    """
    element = element_type(dtype)
    name = _TYPES.get(dtype) or (f"{dtype.upper()}_T" if element.kind in "iu" else None)
    if name is None and not reduces:
        name = _OF_BYTES[element.itemsize]
    if name is None:
        raise ArgumentError(f"MPI does not reduce {dtype}: take another algorithm, or convert to float32")
    return getattr(mpi, name)


def mpi_operator(mpi: Any, op: str, dtype: str) -> Any:
    """MPI's operator; a bool is a truth value, as in `transports.types`.

    Raises:
        ArgumentError: MPI has none of that name.
    """
    if op not in OPERATORS:
        raise ArgumentError(f"MPI has no operator {op}: take another algorithm, or one of {', '.join(OPERATORS)}")
    return getattr(mpi, _LOGICAL[op] if dtype == "bool" else op.upper())


class NativePlan:
    """One of MPI's collectives, made ready.

    Raises:
        ArgumentError: MPI lacks the type or the operator, or counts by too small numbers.
    """

    def __init__(self, transport: MPITransport, call: NativeCall) -> None:
        self.transport, self.call = transport, call
        mpi, longest = transport.mpi, max(call.input_count, call.output_count)
        if longest >= 1 << 31 and mpi.Get_version() < (4, 0):
            raise ArgumentError(
                f"{call.text}: this MPI counts to {2**31 - 1}, and these are {longest} elements: take another algorithm"
            )
        self.itemsize, self.type, self.op = 0, None, None
        if call.collective is not Collective.BARRIER:
            self.itemsize = element_type(call.dtype).itemsize
            self.type = mpi_type(mpi, call.dtype, bool(call.op))
        if call.op:
            self.op = mpi_operator(mpi, call.op, call.dtype)

    def start(self, input: int, output: int) -> Execution:
        """See `Prepared.start`. MPI can not take a call back: keep the buffers of one that failed for good."""
        self.transport.check_state()
        return NativeRun(self, input, output)

    def post(self, input: int, output: int) -> tuple[Any, Any]:
        """MPI's request, and what must be kept until it is done."""
        call, comm, rank = self.call, self.transport.comm, self.transport.rank
        given, result = self._bytes(call.input_count), self._bytes(call.output_count)
        # All ranks of an all_reduce must be in place or none, or Open MPI 5.0 gives wrong numbers: so none is. At the
        # root of a reduce it is nobody else's business.
        in_place = kept = None
        if call.collective is Collective.REDUCE and input == output:
            in_place = self.transport.mpi.IN_PLACE
        elif input and (input == output or (input < output + result and output < input + given)):
            kept = np.empty(given, np.uint8)
            ctypes.memmove(kept.ctypes.data, input, given)
            input = kept.ctypes.data
        x, out = self._buffer(input, call.input_count), self._buffer(output, call.output_count)
        at_root = rank == call.root
        match call.collective:
            case Collective.ALL_REDUCE:
                return comm.Iallreduce(x, out, self.op), kept
            case Collective.REDUCE:
                return comm.Ireduce((at_root and in_place) or x, out if at_root else None, self.op, call.root), kept
            case Collective.REDUCE_SCATTER if call.counts is not None:
                return comm.Ireduce_scatter(x, out, call.counts, self.op), kept
            case Collective.REDUCE_SCATTER:
                return comm.Ireduce_scatter_block(x, out, self.op), kept
            case Collective.ALL_GATHER if call.counts is not None:
                return comm.Iallgatherv(x, self._parts(out, call.counts)), kept
            case Collective.ALL_GATHER:
                return comm.Iallgather(x, out), kept
            case Collective.ALL_TO_ALL if call.sent is not None and call.received is not None:
                return comm.Ialltoallv(self._parts(x, call.sent), self._parts(out, call.received)), kept
            case Collective.ALL_TO_ALL:
                return comm.Ialltoall(x, out), kept
            case Collective.BROADCAST:
                if at_root and output and output != input:
                    ctypes.memmove(output, input, self._bytes(call.input_count))
                return comm.Ibcast(x if at_root else out, call.root), kept
            case Collective.GATHER:
                return comm.Igather(x, out if at_root else None, call.root), kept
            case Collective.SCATTER:
                return comm.Iscatter(x if at_root else None, out, call.root), kept
            case Collective.BARRIER:
                return comm.Ibarrier(), kept

    def _bytes(self, count: int) -> int:
        return count * self.itemsize

    def _buffer(self, address: int, count: int) -> list[Any]:
        return [self.transport.mpi.buffer.fromaddress(address, self._bytes(count)), self.type]

    def _parts(self, buffer: list[Any], counts: Sequence[int]) -> list[Any]:
        starts = [0, *itertools.accumulate(counts)]
        return [buffer[0], (counts, starts[:-1]), buffer[1]]


class NativeRun(Running):
    """One call of MPI's."""

    def __init__(self, plan: NativePlan, input: int, output: int) -> None:
        self.plan, self.transport = plan, plan.transport
        self.mpi = plan.transport.mpi
        try:
            self.request, self.kept = plan.post(input, output)
        except self.mpi.Exception as error:
            failed = self._failed(error)
            self.transport.abort(failed)
            raise failed from error
        self.plan.transport.native_runs += 1

    def _advance(self) -> bool:
        try:
            done = bool(self.request.Test())
        except self.mpi.Exception as error:
            raise self._failed(error) from error
        if done:
            self.plan.transport.native_runs -= 1
        else:
            self.transport.progress()
        return done

    def _fail(self, error: BaseException) -> None:
        self.plan.transport.unfinished.append((self.request, self.kept))
        super()._fail(error)

    def _late(self) -> str:
        if self.transport.explain is not None:
            return self.transport.explain(f"rank {self.transport.rank} waits in MPI's own collective")
        return (
            f"{self.plan.call.text}: rank {self.transport.rank} of {self.transport.size} is not done at its deadline: "
            f"have all ranks called it, are they alive? If they are only slow, give a longer timeout"
        )

    def _failed(self, error: Any) -> CollectiveError:
        if error.Get_error_class() == getattr(self.mpi, "ERR_PROC_FAILED", None):
            return PeerLost(f"{self.plan.call.text}: {self.plan.transport.lost(error)}")
        kind = Mismatch if error.Get_error_class() == self.mpi.ERR_TRUNCATE else CollectiveError
        return kind(f"{self.plan.call.text}: {error}: have all ranks called the same, with the same counts?")
