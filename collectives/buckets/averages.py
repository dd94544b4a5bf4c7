"""How one flat bucket is averaged over all ranks: as it is, in half precision, or in 8-bit integers.

An average is started, goes on in the background, and is finished by whoever waits for it. Averages of a group are
started in the same order on all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..binding import premul_sum
from ..communicator import Communicator
from ..work import QueuedWork, Times, timed
from .layout import own_part
from .quantize import BLOCK, dequantize, packed_bytes, quantize

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPRESSIONS = (None, *HALVES, "int8")
CPU = torch.device("cpu")


class Pending:
    """An average under way.

    Args:
        work: has `wait`, `finishes_within`, `is_completed`; `times` if it is of CPU tensors, `stream` if it is enqueued
            on a device.
        finish: puts the result where it belongs.
    """

    def __init__(self, work: Any, finish: Callable[[], None] | None = None) -> None:
        self._work, self._finish = work, finish
        self.is_completed, self.finishes_within = work.is_completed, work.finishes_within
        if hasattr(work, "stream"):
            self.stream = work.stream

    def wait(self) -> None:
        """Wait until the bucket holds the result. Raises what the operation failed with."""
        self._work.wait()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()

    @property
    def times(self) -> Times:
        """When it ran; only once it is finished."""
        times: Times = self._work.times
        return times


class Average(ABC):
    """Averages the values of one bucket, again and again.

    Args:
        comm: the ranks.
        count: the bucket's elements; to reduce-scatter, a multiple of `Averages.multiple`.
        dtype: its element type.
    """

    def __init__(self, comm: Communicator, count: int, dtype: torch.dtype) -> None:
        self.comm, self.count, self.dtype = comm, count, dtype

    @abstractmethod
    def all_reduce(self, flat: Tensor) -> Pending:
        """Start to make `flat` the average of all ranks' `flat`."""

    @abstractmethod
    def reduce_scatter(self, flat: Tensor) -> Pending:
        """Start to make this rank's part of `flat` the average of all ranks' parts there. The rest is undefined."""

    def own(self, flat: Tensor) -> Tensor:
        """This rank's part of a bucket."""
        return own_part(flat, self.comm.rank, self.comm.size)


class Exact(Average):
    """In the bucket's own type. 2 (size - 1)/size of its bytes per rank, half of that to reduce-scatter.

    Args:
        thread: where the collectives run, in line with those of 8-bit buckets; None for the native progress thread.
    """

    def __init__(
        self, comm: Communicator, count: int, dtype: torch.dtype, thread: ThreadPoolExecutor | None = None
    ) -> None:
        super().__init__(comm, count, dtype)
        self._thread = thread
        # A sum of halves overflows sooner than their average.
        self._op: Any = premul_sum(1 / comm.size) if dtype == torch.float16 else "avg"

    def all_reduce(self, flat: Tensor) -> Pending:
        """See `Average`."""
        return self._start(partial(self.comm.all_reduce, flat, self._op))

    def reduce_scatter(self, flat: Tensor) -> Pending:
        """See `Average`."""
        return self._start(partial(self.comm.reduce_scatter, self.own(flat), flat, self._op))

    def _start(self, collective: Callable[..., Any]) -> Pending:
        if self._thread is not None:
            return _submit(self._thread, collective)
        return Pending(collective(async_op=True))


class Halved(Average):
    """In 16-bit floating point: half of float32's bytes. Divided by the size first, or the sum might overflow."""

    def __init__(
        self, comm: Communicator, count: int, dtype: torch.dtype, half: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(comm, count, dtype)
        on_host = device.type == "cpu"
        self._half: Tensor = comm.empty(count, half) if on_host else torch.empty(count, dtype=half, device=device)

    def all_reduce(self, flat: Tensor) -> Pending:
        """See `Average`."""
        torch.mul(flat, 1 / self.comm.size, out=self._half)
        return Pending(self.comm.all_reduce(self._half, async_op=True), lambda: _copy(flat, self._half))

    def reduce_scatter(self, flat: Tensor) -> Pending:
        """See `Average`."""
        torch.mul(flat, 1 / self.comm.size, out=self._half)
        part, half = self.own(flat), self.own(self._half)
        return Pending(self.comm.reduce_scatter(half, self._half, async_op=True), lambda: _copy(part, half))


class Quantized(Average):
    """In block-scaled 8-bit integers, as ZeRO++ (arXiv 2306.10209, section 3.3) does it: 0.25 of float32's bytes.

    Every rank quantises its bucket and sends each rank its part (all_to_all); who gets them dequantises and folds them
    in float32, in the order of the ranks; to all-reduce, it quantises its part of the average and all_gathers it.

    Error feedback: what is rounded off stays, and is added to the next gradient.

    Error: let M be the largest magnitude of an element's block, with what was kept: its mean over the ranks, or that of
    their average if it is larger. Each of the two roundings keeps M / 254 at most. So the sum over all steps is off by
    M / 127 of the last step, and one step by M / 127 of its own and of the one before. (Up to float32's own rounding.)
    """

    def __init__(self, comm: Communicator, count: int, dtype: torch.dtype, thread: ThreadPoolExecutor) -> None:
        super().__init__(comm, count, dtype)
        self._thread = thread
        part = -(-count // (comm.size * BLOCK)) * BLOCK
        row = packed_bytes(part)
        # What was rounded off: of this rank's values, and of its part of the average.
        self._left, self._left_of_part = torch.zeros(comm.size, part), torch.zeros(1, part)
        self._part = torch.empty(1, part)
        fits = dtype == torch.float32 and count == comm.size * part
        self._padded = None if fits else torch.zeros(comm.size, part)
        self._sent: Tensor = comm.empty((comm.size, row), torch.uint8)
        self._received: Tensor = comm.empty((comm.size, row), torch.uint8)

    def all_reduce(self, flat: Tensor) -> Pending:
        """See `Average`."""
        return _submit(self._thread, lambda: self._all_reduce(flat))

    def reduce_scatter(self, flat: Tensor) -> Pending:
        """See `Average`. One rounding, so half the error."""
        return _submit(self._thread, lambda: self._reduce_scatter(flat))

    def _all_reduce(self, flat: Tensor) -> None:
        self._exchange(flat)
        own = self._sent[self.comm.rank : self.comm.rank + 1]
        quantize(self._left_of_part, self._part, own)
        self.comm.all_gather(self._received, own)
        values = flat.view_as(self._left) if self._padded is None else self._padded
        for row, part in zip(self._received, values):
            dequantize(row.unsqueeze(0), part)
        if self._padded is not None:
            flat.copy_(values.view(-1)[: self.count])

    def _reduce_scatter(self, flat: Tensor) -> None:
        self._exchange(flat)
        self.own(flat).copy_(self._part[0])

    def _exchange(self, flat: Tensor) -> None:
        """Make `_part` this rank's part of the average."""
        if self._padded is None:
            values = flat.view_as(self._left)
        else:
            values = self._padded
            values.view(-1)[: self.count].copy_(flat)
        quantize(self._left, values, self._sent)
        self.comm.all_to_all(self._received, self._sent)
        dequantize(self._received, self._part, 1 / self.comm.size)


class Averages:
    """Makes averages for the buckets of one group.

    Args:
        comm: the ranks; no others may use this communicator.
        compress: None, "bf16", "fp16" or "int8".

    Raises:
        ArgumentError: no such compression.
    """

    def __init__(self, comm: Communicator, compress: str | None) -> None:
        if compress not in COMPRESSIONS:
            known = ", ".join(repr(name) for name in COMPRESSIONS)
            raise ArgumentError(f"compress must be one of {known}, and is {compress!r}")
        self.comm, self.compress = comm, compress
        self.multiple = comm.size * BLOCK
        self._thread = ThreadPoolExecutor(1, f"abccl buckets of rank {comm.rank}") if compress == "int8" else None

    def make(self, count: int, dtype: torch.dtype, device: torch.device = CPU) -> Average:
        """For a bucket. Complex numbers, what is no wider than the compressed type, and one rank's go as they are.

        Raises:
            ArgumentError: 8 bits, and the bucket is not on the CPU, which quantises.
        """
        if self._thread is not None and device.type != "cpu":
            raise ArgumentError(
                f'compress="int8" quantises on the CPU, and the gradients are on {device}: take "bf16", "fp16" or None'
            )
        if self.compress is None or self.comm.size == 1 or dtype.is_complex or dtype.itemsize <= 1:
            return Exact(self.comm, count, dtype, self._thread)
        if self._thread is not None:
            return Quantized(self.comm, count, dtype, self._thread)
        half = HALVES[self.compress]
        return Exact(self.comm, count, dtype) if dtype.itemsize <= 2 else Halved(self.comm, count, dtype, half, device)

    def close(self) -> None:
        """Give everything back; what is under way fails."""
        self.comm.close()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


def _submit(thread: ThreadPoolExecutor, operation: Callable[[], None]) -> Pending:
    def without_gradients() -> None:
        with torch.no_grad():
            operation()

    return Pending(QueuedWork(thread.submit(timed, without_gradients)))


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
