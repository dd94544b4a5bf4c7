"""torch's process group, over a communicator.

A synchronous call of `torch.distributed` runs in its caller's thread and returns no Work; an asynchronous one runs on
the native progress thread. On CUDA tensors the first is enqueued on the current stream, the second on one of the
communicator's. Tensors that the communicator can take as they are go to it directly; it refuses all others before
anything is sent, and those are copied to and from flat buffers (see `buffers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import AbcclError, ArgumentError
from .. import Communicator, connect
from ..bootstrap import Alone, Bootstrap, StoreBootstrap
from . import buffers
from .dynamo import hide_from_dynamo
from .errors import torch_error
from .futures import GroupWork, StreamWork, Waited, work_of
from .group import Group
from .options import (
    OPERATORS,
    UNSET,
    c10d,
    check_alike,
    check_alone,
    copy_all,
    elements,
    operator_name,
    sizes_of,
    uneven,
    with_operator,
    with_root,
    with_timeout,
)
from .profiling import profiling
from .sparse import sum_sparse

# Bytes up to which a message is waited for in the caller's thread: a third of the time for 4 bytes (9 us for two, 27
# by the progress thread), and several times longer for a megabyte.
_SHORT = 4096

_AllreduceOptions = c10d.AllreduceOptions


def create(options: Any) -> ProcessGroup:
    """Make the process group that torch asks for. Collective among its ranks."""
    rank, size, store = options.group_rank, options.group_size, options.store
    timeout = options.timeout.total_seconds()
    try:
        later = dist.is_initialized()
        communicator = connect(
            _bootstrap(store, rank, size, options.group_id, timeout),
            timeout=timeout,
            part=later and size < dist.get_world_size(),
            name=f"torch {options.group_id}" if later else "default",
        )
    except AbcclError as error:
        raise torch_error(error) from None
    return ProcessGroup(communicator, store)


def _bootstrap(store: Any, rank: int, size: int, name: str, timeout: float) -> Bootstrap:
    if size == 1:
        return Alone()
    # A store may outlive a group and see another of the same name, so the ranks count who has come: every `size`
    # arrivals are a new group. Counting groups in each process would go wrong where only some were started anew.
    generation = (int(store.add(f"abccl/{name}/arrived", 1)) - 1) // size
    return StoreBootstrap(store, rank, size, f"abccl/{name}/{generation}", timeout)


class ProcessGroup(Group):
    """The ranks of a `torch.distributed` group, CPU and CUDA tensors, over a communicator of their own."""

    # ---- collectives on one tensor

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None, *, op: Any = None) -> Any:
        """Each tensor becomes the reduction of all ranks' tensors."""
        if opts.__class__ is _AllreduceOptions and len(tensors) == 1 and not opts.asyncOp:
            # The fastest way; what it does not take comes out of it with nothing sent.
            operator = OPERATORS.get(hash(opts.reduceOp))
            if operator is not None and opts.timeout == UNSET:
                if profiling() is not self._recorded:
                    self._record()
                try:
                    self._communicator.all_reduce(tensors[0], operator)
                    self._sequence += 1
                    return None
                except ArgumentError:
                    pass
                except AbcclError as error:
                    raise torch_error(error) from None
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        opts = with_operator(c10d.AllreduceOptions(), opts, op, timeout)
        return self._reduce_all(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Each tensor becomes the reduction of all ranks' tensors at its place of the list."""
        return self._reduce_all(tensors, opts or c10d.AllreduceCoalescedOptions())

    def _reduce_all(self, tensors: list[Tensor], opts: Any) -> Any:
        operator = operator_name(opts.reduceOp)
        if any(tensor.layout != torch.strided for tensor in tensors):
            if len(tensors) != 1:
                raise torch_error(ArgumentError("all_reduce: sparse tensors one by one, please"))
            try:
                start, finish = sum_sparse(self._communicator, tensors[0], str(operator))
            except AbcclError as error:
                raise torch_error(error) from None
            return self._issue(opts, start, tensors, finish)
        if len(tensors) > 1:
            buffers.check_one_device(tensors)
        reduce, parts = self._communicator.all_reduce, [buffers.changing(tensor) for tensor in tensors]
        return self._issue(
            opts,
            lambda later: [reduce(flat, operator, async_op=later) for flat, _ in parts],
            tensors,
            copy_all(finish for _, finish in parts),
        )

    def broadcast(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None, *, root: int = 0) -> Any:
        """The tensor becomes the root's."""
        if isinstance(tensors, Tensor):
            tensors, opts = [tensors], with_root(c10d.BroadcastOptions(), opts, root, timeout)
        opts = opts or c10d.BroadcastOptions()
        (tensor,) = tensors
        broadcast, root = self._communicator.broadcast, opts.rootRank
        flat, finish = buffers.changing(tensor)
        flat = buffers.as_bytes(flat)
        finish = finish if self._communicator.rank != root else None
        return self._issue(opts, lambda later: [broadcast(flat, root, async_op=later)], tensors, finish)

    def reduce(
        self, tensors: Any, opts: Any = None, op: Any = None, timeout: timedelta | None = None, *, root: int = 0
    ) -> Any:
        """The root's tensor becomes the reduction of all ranks' tensors; the others stay as they are."""
        if isinstance(tensors, Tensor):
            root = opts if isinstance(opts, int) else root
            tensors, opts = [tensors], with_operator(c10d.ReduceOptions(), None, op, timeout)
            opts.rootRank = root
        opts = opts or c10d.ReduceOptions()
        (tensor,) = tensors
        reduce, root, operator = self._communicator.reduce, opts.rootRank, operator_name(opts.reduceOp)
        flat, finish = buffers.changing(tensor)
        flat = buffers.as_reals(flat, operator)
        finish = finish if self._communicator.rank == root else None
        return self._issue(opts, lambda later: [reduce(flat, operator, root, async_op=later)], tensors, finish)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None, timeout: Any = None) -> Any:
        """The output gets the inputs of all ranks, one after the other."""
        check_alike("all_gather", output, input)
        gather, x = self._communicator.all_gather, buffers.as_bytes(buffers.reading(input))
        out, finish = buffers.writing(output)
        out = buffers.as_bytes(out)
        opts = with_timeout(opts or c10d.AllgatherOptions(), timeout)
        return self._issue(opts, lambda later: [gather(out, x, async_op=later)], [output], finish)

    def reduce_scatter_single(
        self, outputTensor: Tensor, inputTensor: Tensor, opts: Any = None, timeout: Any = None
    ) -> Any:
        """The output becomes this rank's part of the reduction of all inputs."""
        opts = with_timeout(opts or c10d.ReduceScatterOptions(), timeout)
        scatter, operator = self._communicator.reduce_scatter, operator_name(opts.reduceOp)
        x, (out, finish) = buffers.as_reals(buffers.reading(inputTensor), operator), buffers.writing(outputTensor)
        out = buffers.as_reals(out, operator)
        return self._issue(opts, lambda later: [scatter(out, x, operator, async_op=later)], [outputTensor], finish)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] = (),
        input_split_sizes: Sequence[int] = (),
        opts: Any = None,
        timeout: Any = None,
    ) -> Any:
        """Rows of the input go to the ranks, and come from them; equally many unless split sizes say otherwise."""
        x = buffers.as_bytes(buffers.reading(input))
        out, finish = buffers.writing(output)
        out = buffers.as_bytes(out)
        exchange = self._communicator.all_to_all
        splits: tuple[list[int] | None, list[int] | None] = (None, None)
        if len(output_split_sizes) or len(input_split_sizes):
            splits = (
                elements("output", output, out.numel(), output_split_sizes, self._communicator.size),
                elements("input", input, x.numel(), input_split_sizes, self._communicator.size),
            )
        opts = with_timeout(opts or c10d.AllToAllOptions(), timeout)
        return self._issue(opts, lambda later: [exchange(out, x, *splits, async_op=later)], [output], finish)

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Any:
        """All ranks have come; with `device_ids` the host also waits for what the current stream has been given."""
        opts = with_timeout(opts if isinstance(opts, c10d.BarrierOptions) else c10d.BarrierOptions(), timeout)
        if opts.device is not None and opts.device.type == "cuda":
            one, reduce = torch.zeros(1, device=opts.device), self._communicator.all_reduce

            def start(later: bool) -> list[Any]:
                part = Waited(reduce(one, async_op=True), lambda work: work.finishes_within(None))
                if not later:
                    part.wait()
                return [part]

            return self._issue(opts, start, [], None)
        barrier = self._communicator.barrier
        return self._issue(opts, lambda later: [barrier(async_op=later)], [], None)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier whose error names a rank that did not come (every barrier's does)."""
        opts = with_timeout(c10d.BarrierOptions(), timeout)
        self.barrier(opts).wait()

    # ---- collectives on lists of tensors

    def allgather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Any:
        """Every rank gets the inputs of all ranks, in its list of outputs. The inputs may differ in size."""
        if isinstance(input_tensors, Tensor):
            output_tensors, input_tensors = [output_tensors], [input_tensors]
        opts = with_timeout(opts or c10d.AllgatherOptions(), timeout)
        check_alone("all_gather", output_tensors, input_tensors)
        return self._gather_all(output_tensors, input_tensors, output_tensors, opts)

    def allgather_coalesced(self, output_lists: list[list[Tensor]], input_list: list[Tensor], opts: Any = None) -> Any:
        """Every rank gets the inputs of all ranks: rank r's i-th input in the i-th output of the r-th list."""
        buffers.check_one_device([*input_list, *(output for outputs in output_lists for output in outputs)])
        lists = [list(outputs) for outputs in zip(*output_lists)]
        return self._gather_all(lists, input_list, output_lists, opts or c10d.AllgatherOptions())

    def _gather_all(self, lists: Any, inputs: list[Tensor], result: list[Any], opts: Any) -> Any:
        size, calls, copies = self._communicator.size, [], []
        for outputs, input in zip(lists, inputs):
            if len(outputs) != size:
                raise torch_error(ArgumentError(f"all_gather: {size} output tensors wanted, and {len(outputs)} given"))
            x = buffers.as_bytes(buffers.reading(input))
            out, finish = buffers.writing_all(outputs)
            check_alike("all_gather", out, input)
            calls.append((buffers.as_bytes(out), x, uneven(outputs, x.element_size())))
            copies.append(finish)
        gather = self._communicator.all_gather
        return self._issue(
            opts,
            lambda later: [gather(out, x, counts=counts, async_op=later) for out, x, counts in calls],
            result,
            copy_all(copies),
        )

    def all_gather_single_coalesced(
        self, output_lists: list[Tensor], input_list: list[Tensor], opts: Any = None
    ) -> Any:
        """`all_gather_single` of each pair of tensors."""
        buffers.check_one_device([*output_lists, *input_list])
        calls = [(*buffers.writing(out), buffers.reading(x)) for out, x in zip(output_lists, input_list)]
        flats = [(buffers.as_bytes(out), buffers.as_bytes(x)) for out, _, x in calls]
        gather = self._communicator.all_gather
        return self._issue(
            opts or c10d.AllgatherOptions(),
            lambda later: [gather(out, x, async_op=later) for out, x in flats],
            output_lists,
            copy_all(finish for _, finish, _ in calls),
        )

    def reduce_scatter(
        self,
        output_tensors: Any,
        input_tensors: Any,
        opts: Any = None,
        timeout: timedelta | None = None,
        *,
        op: Any = None,
    ) -> Any:
        """The output becomes the reduction of the tensors that all ranks have for this rank."""
        if isinstance(output_tensors, Tensor):
            output_tensors, input_tensors = [output_tensors], [input_tensors]
        opts = with_operator(c10d.ReduceScatterOptions(), opts, op, timeout)
        check_alone("reduce_scatter", output_tensors, input_tensors)
        (output,), (inputs,) = output_tensors, input_tensors
        operator = operator_name(opts.reduceOp)
        x, (out, finish) = buffers.as_reals(buffers.reading_all(inputs), operator), buffers.writing(output)
        out, counts = buffers.as_reals(out, operator), uneven(inputs, x.element_size())
        scatter = self._communicator.reduce_scatter
        return self._issue(
            opts, lambda later: [scatter(out, x, operator, counts=counts, async_op=later)], output_tensors, finish
        )

    def reduce_scatter_single_coalesced(
        self, outputTensors: list[Tensor], inputTensors: list[Tensor], opts: Any = None
    ) -> Any:
        """`reduce_scatter_single` of each pair of tensors."""
        buffers.check_one_device([*outputTensors, *inputTensors])
        opts = opts or c10d.ReduceScatterOptions()
        operator, scatter = operator_name(opts.reduceOp), self._communicator.reduce_scatter
        calls = [(*buffers.writing(out), buffers.reading(x)) for out, x in zip(outputTensors, inputTensors)]
        flats = [(buffers.as_reals(out, operator), buffers.as_reals(x, operator)) for out, _, x in calls]
        return self._issue(
            opts,
            lambda later: [scatter(out, x, operator, async_op=later) for out, x in flats],
            outputTensors,
            copy_all(finish for _, finish, _ in calls),
        )

    def gather(
        self,
        output_tensors: Any,
        input_tensors: Any,
        opts: Any = None,
        timeout: timedelta | None = None,
        *,
        root: int = 0,
    ) -> Any:
        """The root gets the inputs of all ranks, in its list of outputs."""
        if isinstance(input_tensors, Tensor):
            opts = with_root(c10d.GatherOptions(), opts, root, timeout)
            output_tensors, input_tensors = [output_tensors] if output_tensors else [], [input_tensors]
        opts = opts or c10d.GatherOptions()
        (input,), root, gather = input_tensors, opts.rootRank, self._communicator.gather
        x, out, finish, outputs = buffers.as_bytes(buffers.reading(input)), None, None, []
        if self._communicator.rank == root:
            (outputs,) = output_tensors
            whole, finish = buffers.writing_all(outputs)
            check_alike("gather", whole, input)
            out = buffers.as_bytes(whole)
        return self._issue(opts, lambda later: [gather(out, x, root, async_op=later)], [outputs], finish)

    def scatter(
        self,
        output_tensors: Any,
        input_tensors: Any,
        opts: Any = None,
        timeout: timedelta | None = None,
        *,
        root: int = 0,
    ) -> Any:
        """The output becomes the tensor that the root has for this rank in its list of inputs."""
        if isinstance(output_tensors, Tensor):
            opts = with_root(c10d.ScatterOptions(), opts, root, timeout)
            output_tensors, input_tensors = [output_tensors], [input_tensors] if input_tensors else []
        opts = opts or c10d.ScatterOptions()
        (output,), root, scatter = output_tensors, opts.rootRank, self._communicator.scatter
        x = None
        if self._communicator.rank == root:
            (inputs,) = input_tensors
            check_alike("scatter", output, inputs[0])
            x = buffers.as_bytes(buffers.reading_all(inputs))
        out, finish = buffers.writing(output)
        out = buffers.as_bytes(out)
        return self._issue(opts, lambda later: [scatter(out, x, root, async_op=later)], output_tensors, finish)

    def alltoall(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        opts: Any = None,
        timeout: timedelta | None = None,
    ) -> Any:
        """The i-th input goes to rank i, and the i-th output comes from there."""
        x = buffers.as_bytes(buffers.reading_all(input_tensors))
        out, finish = buffers.writing_all(output_tensors)
        check_alike("all_to_all", out, input_tensors[0])
        out = buffers.as_bytes(out)
        received = sizes_of(output_tensors, out.element_size())
        sent = sizes_of(input_tensors, x.element_size())
        exchange = self._communicator.all_to_all
        opts = with_timeout(opts or c10d.AllToAllOptions(), timeout)
        return self._issue(
            opts, lambda later: [exchange(out, x, received, sent, async_op=later)], output_tensors, finish
        )

    # ---- messages

    def send(self, tensors: list[Tensor], dstRank: int, tag: int = 0) -> Any:
        """Start to send the tensor."""
        (tensor,) = tensors
        try:
            x = buffers.as_bytes(buffers.sent(tensor))
            part = self._communicator.send(x, dstRank, tag, async_op=True)
        except AbcclError as error:
            raise torch_error(error) from None
        return work_of([self._message(part, x)], tensors, None, None)

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int = 0) -> Any:
        """Start to receive into the tensor."""
        return self._receive(tensors, srcRank, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Any:
        """Start to receive into the tensor, from whoever sends."""
        return self._receive(tensors, None, tag)

    def _receive(self, tensors: list[Tensor], peer: int | None, tag: int) -> Any:
        (tensor,) = tensors
        try:
            out, finish = buffers.received(tensor)
            part = self._communicator.recv(buffers.as_bytes(out), peer, tag, async_op=True)
        except AbcclError as error:
            raise torch_error(error) from None
        return work_of([self._message(part, out)], tensors, finish, None)

    def _message(self, part: Any, buffer: Tensor) -> Any:
        short = buffer.numel() * buffer.element_size() <= _SHORT
        return Waited(part, self._communicator.wait_message) if short else part

    # ---- how operations run

    def _issue(
        self,
        opts: Any,
        start: Callable[[bool], list[Any]],
        result: list[Any],
        finish: Callable[[], None] | None,
    ) -> GroupWork | None:
        """Run the operations and return None if the caller of `torch.distributed` waits; else start them.

        Args:
            start: starts the operations, and waits for them if its argument is false.
        """
        self._sequence += 1
        if profiling() is not self._recorded:
            self._record()
        try:
            if opts.timeout != UNSET:
                parts = self._start_within(opts.timeout.total_seconds(), start)
            elif opts.asyncOp:
                parts = start(True)
            else:
                start(False)
                if finish is not None:
                    finish()
                return None
        except AbcclError as error:
            raise torch_error(error) from None
        work = work_of(parts, result, finish, self._completion)
        if opts.asyncOp:
            return work
        work.wait()
        return None

    def _start_within(self, seconds: float, start: Callable[[bool], list[Any]]) -> list[Any]:
        with self._timeout_lock:
            usual = self._communicator.timeout
            self._communicator.set_timeout(seconds)
            try:
                return start(True)
            finally:
                self._communicator.set_timeout(usual)

    # Other versions of torch, and some callers of this one, use these names.
    _allgather_base = all_gather_into_tensor = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_tensor = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def communicator_of(group: Any) -> Communicator:
    """The communicator of a process group of abccl's; a communicator is its own.

    Raises:
        ArgumentError: it is neither.
    """
    if isinstance(group, Communicator):
        return group
    if isinstance(group, ProcessGroup):
        return group._communicator
    raise ArgumentError(
        f"a communicator or a process group of abccl's is wanted, and {group!r} given: pass abccl.init(), or start by "
        'init_process_group("abccl")'
    )


hide_from_dynamo(
    getattr(member, "fget", member)
    for kind in (ProcessGroup, Group, GroupWork, StreamWork)
    for member in vars(kind).values()
)
