"""Gloo's own collectives, run by ProcessGroupGloo's threads on torch tensors over the buffers' addresses.

Gloo reduces what it has kernels for (see REDUCED); what is only moved goes as bytes, whatever its type. A run that
fails breaks the transport's connections, so that Gloo's threads let go of the buffers before the caller is told.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from ..algorithms import Collective
from ..errors import ArgumentError
from .contract import Execution, NativeCall
from .running import Running
from .types import element_type

if TYPE_CHECKING:
    from .gloo import GlooTransport

_FOLDS = ("sum", "prod", "min", "max")
_BITS = ("band", "bor", "bxor")
_TRUTH = {"sum": "bor", "max": "bor", "prod": "band", "min": "band"}

COLLECTIVES = frozenset(Collective)
"""What Gloo has of its own: everything, its reduce_scatter being an all_reduce of which a part is kept."""

REDUCED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("float16", "bfloat16", "float32", "float64"), _FOLDS),
    **dict.fromkeys(("int8", "uint8", "int32", "int64"), _FOLDS + _BITS),
    "bool": (*_TRUTH, "band", "bor", "bxor"),
    "complex64": ("sum",),
    "complex128": ("sum",),
}
"""The operators that Gloo has, by element type."""

GRACE = 0.2
"""Seconds for the reason to come after a connection was lost: who aborts tells why, then closes."""

TICK = 0.05
"""Seconds between looks for an abort while Gloo works."""

LINGER = 1.0
"""Seconds that Gloo has to let go of the buffers of a call that failed."""


class NativePlan:
    """A collective of Gloo's made ready to run."""

    def __init__(self, transport: GlooTransport, call: NativeCall) -> None:
        self.transport, self.call = transport, call
        if call.collective.reduces and call.op not in REDUCED.get(call.dtype, ()):
            have = REDUCED.get(call.dtype)
            raise ArgumentError(
                f"{call.text}: Gloo has no {call.op} for {call.dtype} (there: {', '.join(have or REDUCED)}): "
                f"leave out algorithm='native'"
            )
        # What is only moved goes as bytes; a truth value as a byte of 0 or 1.
        torch = transport.torch
        as_bytes = not call.collective.reduces or call.dtype == "bool"
        self.scale = 1 if call.collective.reduces else element_type(call.dtype).itemsize
        self.dtype = torch.uint8 if as_bytes else getattr(torch, call.dtype)
        self.nbytes = [count * element_type(call.dtype).itemsize for count in (call.input_count, call.output_count)]

    def start(self, input: int, output: int) -> Execution:
        """Start a run on the buffers at these addresses."""
        self.transport.progress()  # an abort is raised here
        given, result = self._tensor(input, self.nbytes[0]), self._tensor(output, self.nbytes[1])
        try:
            return NativeRun(self, *self._launch(given, result))
        except RuntimeError as error:
            raise self.transport.lost("its peers", error) from error

    def _tensor(self, address: int, nbytes: int) -> Any:
        if not address or not nbytes:
            return self.transport.torch.empty(0, dtype=self.dtype)
        return self.transport.torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=self.dtype)

    def _launch(self, given: Any, result: Any) -> tuple[Any, Callable[[], object]]:
        """Hand the collective to Gloo: its work, and what is left to do after it."""
        group, size, rank, call = self.transport.group, self.transport.size, self.transport.rank, self.call
        is_root, ends = rank == call.root, _nothing
        match call.collective:
            case Collective.ALL_REDUCE:
                _copy(result, given)
                work = group.allreduce([result], self._options("AllreduceOptions", reduceOp=self._operator()))
            case Collective.REDUCE:
                # Gloo reduces in place on all ranks, and an input is not ours to write.
                tensor = result if is_root else given.clone()
                _copy(tensor, given)
                options = self._options("ReduceOptions", reduceOp=self._operator(), rootRank=call.root)
                work = group.reduce([tensor], options)
            case Collective.REDUCE_SCATTER:
                # What torch's Gloo does too, but not before somebody waits for it.
                whole = given.clone()
                counts = call.counts or (call.output_count,) * size
                part = whole[sum(counts[:rank]) :][: call.output_count]
                work = group.allreduce([whole], self._options("AllreduceOptions", reduceOp=self._operator()))
                ends = partial(result.copy_, part)
            case Collective.BROADCAST:
                if is_root and result.numel():
                    _copy(result, given)
                tensor = given if is_root else result
                work = group.broadcast([tensor], self._options("BroadcastOptions", rootRank=call.root))
            case Collective.ALL_GATHER if call.counts is not None:
                # torch has Gloo's allgather for equal parts only; its alltoall serves any.
                received, sent = [count * self.scale for count in call.counts], [given.numel()] * size
                options = self._options("AllToAllOptions")
                work = group.alltoall_base(result, given.repeat(size), received, sent, options)
            case Collective.ALL_GATHER:
                work = group._allgather_base(result, _apart(given, result), self._options("AllgatherOptions"))
            case Collective.ALL_TO_ALL:
                sent, received = ([part * self.scale for part in parts or ()] for parts in (call.sent, call.received))
                options = self._options("AllToAllOptions")
                work = group.alltoall_base(result, _apart(given, result), received, sent, options)
            case Collective.GATHER:
                parts = [list(result.chunk(size))] if is_root else []
                work = group.gather(parts, [_apart(given, result)], self._options("GatherOptions", rootRank=call.root))
            case Collective.SCATTER:
                parts = [list(_apart(given, result).chunk(size))] if is_root else []
                work = group.scatter([result], parts, self._options("ScatterOptions", rootRank=call.root))
            case Collective.BARRIER:
                work = group.barrier(self._options("BarrierOptions"))
        return work, ends

    def _options(self, kind: str, **values: Any) -> Any:
        options = getattr(self.transport.torch._C._distributed_c10d, kind)()
        for name, value in values.items():
            setattr(options, name, value)
        return options

    def _operator(self) -> Any:
        name = _TRUTH.get(self.call.op, self.call.op) if self.call.dtype == "bool" else self.call.op
        return getattr(self.transport.distributed.ReduceOp, {"prod": "PRODUCT"}.get(name, name.upper()))


class NativeRun(Running):
    """One call of Gloo's, which its threads carry out."""

    transport: GlooTransport

    def __init__(self, prepared: NativePlan, work: Any, ends: Callable[[], object]) -> None:
        self.call, self.transport, self.work, self.ends = prepared.call, prepared.transport, work, ends
        self.future = work.get_future()  # done a moment before the work is
        self._rings = False

    def progress(self) -> bool:
        """See `Execution.progress`. The transport's bell rings at the end."""
        done = super().progress()
        if not done and not self._rings:
            self._rings = True
            self.future.add_done_callback(lambda _: self.transport.ring())
        return done

    def _advance(self) -> bool:
        self.transport.progress()
        if not self.future.done():
            return False
        try:
            self.work.wait()
        except RuntimeError as error:
            self.transport.broken.wait(GRACE)
            self.transport.progress()
            raise self.transport.lost("its peers", error) from error
        self.ends()
        return True

    def _idle(self, deadline: float) -> None:
        # Gloo wakes who waits in it sooner than its callbacks get the interpreter.
        with contextlib.suppress(RuntimeError):
            self.work.wait(timedelta(seconds=max(1e-3, min(TICK, deadline - time.monotonic()))))

    def _late(self) -> str:
        if self.transport.explain is not None:
            return self.transport.explain(f"rank {self.transport.rank} waits in Gloo's own collective")
        return (
            f"{self.call.text}: rank {self.transport.rank} of {self.transport.size} waits in vain for Gloo: has every "
            f"rank called it? If one is only slow, give a longer timeout"
        )

    def _fail(self, error: BaseException) -> None:
        """Tell everybody, and take the buffers away from Gloo."""
        super()._fail(error)
        self.transport.sever()
        with contextlib.suppress(RuntimeError):
            self.work.wait(timedelta(seconds=LINGER))


def _nothing() -> None:
    pass


def _apart(given: Any, result: Any) -> Any:
    """The input, copied if it shares memory with the output."""
    starts, ends = zip(
        *((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in (given, result)), strict=True
    )
    return given.clone() if max(starts) < min(ends) else given


def _copy(result: Any, given: Any) -> None:
    if result.data_ptr() != given.data_ptr():
        result.copy_(given)
