"""Gradients averaged in flat buckets, while backward goes on: for training loops without DistributedDataParallel."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import ArgumentError
from ..communicator import Communicator
from ..torch.process_group import communicator_of
from .agreement import agree, take_from_root, wanting_gradients
from .averages import Average, Averages, Pending
from .layout import Layout, lay_out
from .partition import Partition
from .report import Iteration, Report, summarise
from .sizing import SMALLEST, AlphaBeta, best_bytes, exposed, measure

_WATCHED = 3
"""The backwards, after the first, whose times decide on the size of buckets."""

_REPORTED = 50
"""The iterations that a report looks back on."""


@dataclass
class _Bucket:
    layout: Layout
    flat: Tensor
    views: dict[int, Tensor]  # each gradient's place, by its parameter
    average: Average
    missing: int = 0
    ready: float = 0.0
    pending: Pending | None = None


@dataclass
class _Backward:
    """What has come since the last `finish`."""

    arrived: dict[int, float] = field(default_factory=dict)  # when each gradient came, by its parameter
    taken: set[int] = field(default_factory=set)  # the parameters whose gradients lie in their buckets
    used: set[int] = field(default_factory=set)  # those that have one at all
    sent: int = 0  # buckets


class GradientBuckets:
    """Averages the gradients of all ranks, bucket by bucket, while backward goes on.

        buckets = GradientBuckets(model.parameters(), abccl.init())
        loss.backward()
        buckets.finish()
        optimizer.step()
        optimizer.zero_grad()

    The first backward is only watched: buckets are made of the order in which its gradients came, the same on all
    ranks, in registered memory. From then on a bucket is all_reduced the moment it is full. After `finish` each `.grad`
    is a view of its bucket. Parameters that got no gradient on this rank count as zeros there, and have the average of
    the others'; those that got none anywhere keep `.grad` as it is. All ranks call `finish` the same number of times;
    a rank without a batch just calls it.

    Making it is collective: the parameters, and a module's buffers, become rank 0's. Cost of an iteration: each
    bucket's reduction (see `averages`), and an all_reduce of one byte a parameter.

    Args:
        params: the parameters, or the module that has them. Those that want no gradient are left out.
        comm: the ranks, or a process group of backend "abccl"; the buckets get a communicator of their own.
        bucket_bytes: a bucket ends with the gradient that brings it to so many bytes; "auto" measures, and takes what
            leaves the least communication exposed.
        compress: None; "bf16" or "fp16", half the bytes; "int8", a quarter, with error feedback (see `Quantized`).
        partition: reduce_scatter in backward, an optimizer that updates this rank's part (see `optimizer`), and
            all_gather before the parameters' next use. Wants a module: a parameter is whole when the forward of a
            module that owns it begins, or any forward, if its owner's never ran; before other uses call `gathered`.
        overlap: False starts all reductions in `finish`, to compare.

    Raises:
        ArgumentError: bad arguments, or parameters that differ between the ranks (then on all of them).
        CollectiveError: as all collectives.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | nn.Module,
        comm: Communicator | dist.ProcessGroup,
        bucket_bytes: int | Literal["auto"] = "auto",
        compress: str | None = None,
        *,
        partition: bool = False,
        overlap: bool = True,
    ) -> None:
        parent = communicator_of(comm)
        own = parent.split(0, parent.rank)
        assert own is not None
        self._comm = own
        module = params if isinstance(params, nn.Module) else None
        shared = [*module.parameters(), *module.buffers()] if module is not None else []
        problem = None
        try:
            self._parameters = wanting_gradients(params.parameters() if isinstance(params, nn.Module) else params)
            self._averages = Averages(own, compress)
            if bucket_bytes != "auto" and (type(bucket_bytes) is not int or bucket_bytes < 1):
                raise ArgumentError(f'bucket_bytes must be a positive number or "auto", and is {bucket_bytes!r}')
            if partition and module is None:
                raise ArgumentError("partition wants the module, to know when its parameters are used: pass model")
        except ArgumentError as error:
            problem = error
        how = f"{bucket_bytes}, {compress}, {partition}, {overlap}"
        agree(own, [] if problem else shared or self._parameters, how, problem)
        take_from_root(own, shared or self._parameters)
        self._asked, self._overlap = bucket_bytes, overlap
        self._counts = [parameter.numel() for parameter in self._parameters]
        self._dtypes = [parameter.dtype for parameter in self._parameters]
        # Decided by rank 0: the order in which gradients come, the model of a reduction, and the buckets' size.
        self._order = list(reversed(range(len(self._parameters))))
        self._model = AlphaBeta(0.0, 0.0)
        self._bytes = SMALLEST if bucket_bytes == "auto" else bucket_bytes
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[int, _Bucket] = {}
        self._settled, self._resized, self._syncing = False, False, True
        self._ever_used: set[int] = set()
        self._backward = _Backward()
        self._iterations: deque[Iteration] = deque(maxlen=_REPORTED)
        self._partition = Partition(module, self._parameters, own) if partition and module is not None else None
        if self._partition is not None:
            self._build()
        self._hooks: list[Any] = []
        if module is not None:
            on_load: Any = module.register_load_state_dict_pre_hook
            self._hooks.append(on_load(_refuse_assignment))
        for number, parameter in enumerate(self._parameters):
            register: Any = parameter.register_post_accumulate_grad_hook
            self._hooks.append(register(partial(self._arrive, number)))

    # ---- what a training loop calls

    def finish(self) -> None:
        """Send what is not sent yet, and wait for all: behind backward, before the optimizer."""
        if self._partition is not None and not self._partition.has_optimizer:
            raise ArgumentError("partition: no optimizer updates this rank's part: make one by buckets.optimizer(...)")
        called, backward, watched_only = time.monotonic(), self._backward, not self._settled
        with torch.no_grad():
            if watched_only:
                self._settle()
            for bucket in self._buckets[backward.sent :]:
                for number in bucket.views.keys() - backward.taken:
                    self._take(bucket, number)
                self._send(bucket)
            runs = [self._wait(bucket) for bucket in self._buckets]
            self._hand_out()
        if not watched_only:
            self._record(called, runs)
        self._backward = _Backward()
        for bucket in self._buckets:
            bucket.missing = len(bucket.views)
        if not self._resized and len(self._iterations) == _WATCHED:
            self._resized = True
            self._resize()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the backwards inside only add up on this rank; they are sent with the next backward outside."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def optimizer(self, kind: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        """An optimizer of the parameters: with `partition`, of this rank's part of them.

        Then it must treat elements alike, whatever tensor they are in, as SGD and Adam do: it sees flat buckets, and a
        gradient of zeros where there was none. Its state is this rank's part, in an order that another run may not
        have. The parameters are gathered after each step.
        """
        if self._partition is None:
            return kind(self._parameters, **options)
        return self._partition.optimizer(kind, options)

    def clip_grad_norm_(self, most: float) -> Tensor:
        """Scale all gradients so that their 2-norm is at most `most`, and return the norm before. Collective."""
        if self._partition is None:
            return nn.utils.clip_grad_norm_(self._parameters, most)
        return self._partition.clip_grad_norm_(most)

    def gathered(self) -> None:
        """Wait until all parameters are whole, with `partition`."""
        if self._partition is not None:
            self._partition.wait()

    def report(self) -> Report:
        """What of the last iterations' communication was hidden, and what was not; `print` it.

        Raises:
            ArgumentError: there was no iteration since the buckets were made.
        """
        if not self._iterations:
            raise ArgumentError("report: no iteration with these buckets yet: train a few steps first")
        layouts, ready = [bucket.layout for bucket in self._buckets], self._typical()
        half, total = self._model.half(), sum(layout.nbytes for layout in layouts)
        # Forward uses the last bucket first; the other gathers hide behind it, unless they take its cores.
        gathered = total if self._model.shares else layouts[-1].nbytes
        predicted = {
            "after": self._model.seconds(total),
            "overlapped": exposed(layouts, ready, self._model),
            "partition": exposed(layouts, ready, half) + half.seconds(gathered),
        }
        return summarise(list(self._iterations), layouts, self._model, predicted)

    def close(self) -> None:
        """Take the hooks off, make partitioned parameters whole, give everything back. Gradients stay."""
        self._let_go()
        try:
            self.gathered()
        finally:
            self._averages.close()

    def __enter__(self) -> GradientBuckets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # peers may never come, and the error that is under way says more
            self._let_go()
            self._averages.close()

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._partition is not None:
            self._partition.let_go()

    # ---- while gradients come

    def _arrive(self, number: int, parameter: nn.Parameter) -> None:
        backward = self._backward
        if number in backward.arrived:
            raise ArgumentError(
                f"parameter {number} of shape {tuple(parameter.shape)} got a second gradient before finish(): call "
                "finish() after each backward, also after one that is dropped; go through no_sync() for all backwards "
                "before the last; checkpoint with use_reentrant=False"
            )
        gradient, wanted = parameter.grad, self._dtypes[number]
        if gradient is None or gradient.layout != torch.strided or gradient.dtype != wanted:
            found = "none" if gradient is None else f"one of {gradient.dtype}, {gradient.layout}"
            raise ArgumentError(
                f"parameter {number} of shape {tuple(parameter.shape)} wants a gradient of {wanted}, torch.strided and "
                f"has {found}: convert a model before its buckets are made, make gradients dense (sparse=False)"
            )
        if self._partition is not None:
            self._partition.check_was_whole(number)
        if not self._syncing:
            return
        backward.arrived[number] = time.monotonic()
        if not self._settled:
            return
        bucket = self._bucket_of[number]
        with torch.no_grad():
            self._take(bucket, number)
            while self._overlap and backward.sent < len(self._buckets) and not self._buckets[backward.sent].missing:
                self._send(self._buckets[backward.sent])

    def _take(self, bucket: _Bucket, number: int) -> None:
        """Bring the gradient to its place in the bucket: zeros if there is none."""
        parameter, view = self._parameters[number], bucket.views[number]
        gradient = parameter.grad
        self._backward.taken.add(number)
        bucket.missing -= 1
        bucket.ready = self._backward.arrived.get(number) or time.monotonic()
        if gradient is None:
            view.zero_()
            return
        self._backward.used.add(number)
        if gradient.data_ptr() != view.data_ptr() or gradient.stride() != view.stride():
            view.copy_(gradient)
        parameter.grad = None if self._partition is not None else view

    def _send(self, bucket: _Bucket) -> None:
        start = bucket.average.all_reduce if self._partition is None else bucket.average.reduce_scatter
        bucket.pending = start(bucket.flat)
        self._backward.sent += 1

    def _wait(self, bucket: _Bucket) -> tuple[float, float]:
        assert bucket.pending is not None
        bucket.pending.wait()
        return bucket.pending.times

    def _hand_out(self) -> None:
        """Give the averages to who uses them."""
        if self._partition is not None:
            self._partition.hand_out([bucket.average.own(bucket.flat) for bucket in self._buckets])
            return
        used = torch.zeros(len(self._parameters), dtype=torch.uint8)
        used[list(self._backward.used)] = 1
        self._comm.all_reduce(used, "max")
        handed = set(used.nonzero().flatten().tolist())
        if self._averages.compress == "int8":
            # What was kept of earlier gradients has been sent: nobody's gradient may be somebody's still.
            self._ever_used |= handed
            handed = self._ever_used
        for number in handed:
            parameter = self._parameters[number]
            if parameter.grad is None:
                parameter.grad = self._bucket_of[number].views[number]

    def _record(self, called: float, runs: list[tuple[float, float]]) -> None:
        arrived = self._backward.arrived
        first = min(arrived.values(), default=called)
        times = [arrived.get(number, called) - first for number in range(len(self._parameters))]
        waited, gathers = self._partition.take_times() if self._partition is not None else (0.0, [])
        ready = [bucket.ready for bucket in self._buckets]
        self._iterations.append(Iteration(first, times, ready, called, runs, gathers, time.monotonic(), waited))

    # ---- how buckets are made

    def _settle(self) -> None:
        """After the first backward: make the buckets of what it has shown."""
        arrived = self._backward.arrived
        late = [number for number in self._order if number not in arrived]
        order = np.array([*arrived, *late], dtype=np.int64)
        self._comm.broadcast(order)
        self._order = order.tolist()
        total = sum(count * dtype.itemsize for count, dtype in zip(self._counts, self._dtypes))
        self._model = measure(self._averages, total, self._dtypes[self._order[0]])
        if self._asked == "auto":
            first = min(arrived.values(), default=0.0)
            last = max(arrived.values(), default=0.0)
            self._decide([arrived.get(number, last) - first for number in range(len(self._parameters))])
        self._build()
        self._settled = True

    def _resize(self) -> None:
        """Look at the size once more, now that backward is warm; an optimizer of shards has state by now."""
        if self._asked != "auto" or self._partition is not None:
            return
        before = self._bytes
        self._decide(self._typical())
        if self._bytes != before:
            self._build()

    def _decide(self, ready: Sequence[float]) -> None:
        """Set the buckets' size to what rank 0 finds best for gradients that come at these times."""
        total = sum(layout.nbytes for layout in self._lay_out(1))
        model = self._model if self._partition is None else self._model.half()
        best = np.array([best_bytes(self._lay_out, total, ready, model) if self._overlap else total])
        self._comm.broadcast(best)
        self._bytes = int(best[0])

    def _typical(self) -> list[float]:
        """When each gradient came, seconds from the first: medians over the iterations."""
        return [median(times) for times in zip(*(each.arrived for each in self._iterations))]

    def _lay_out(self, nbytes: int) -> list[Layout]:
        return lay_out(self._counts, self._dtypes, self._order, nbytes, self._averages.multiple)

    def _build(self) -> None:
        layouts = self._lay_out(self._bytes)
        if self._partition is not None:
            layouts = self._partition.move(layouts)
        self._buckets, self._bucket_of = [], {}
        for layout in layouts:
            flat: Tensor = self._comm.empty(layout.count, layout.dtype)
            flat.zero_()
            views = {
                piece.parameter: piece.view(flat, self._parameters[piece.parameter].shape) for piece in layout.pieces
            }
            average = self._averages.make(layout.count, layout.dtype)
            bucket = _Bucket(layout, flat, views, average, len(views))
            self._buckets.append(bucket)
            self._bucket_of.update(dict.fromkeys(views, bucket))
        self._iterations.clear()


def _refuse_assignment(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    if local_metadata.get("assign_to_params_buffers"):
        raise ArgumentError(
            "load_state_dict(assign=True) gives the model other parameters than those in the buckets: load before "
            "GradientBuckets(model, ...), or without assign"
        )
