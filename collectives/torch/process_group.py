"""torch's process group, over a communicator.

A synchronous call of `torch.distributed` runs in its caller's thread and returns no Work; an asynchronous one runs on
the native progress thread. Tensors that the communicator can take as they are go to it directly; it refuses all others
before anything is sent, and those are copied to and from flat buffers (see `buffers`).
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from ...errors import AbcclError, ArgumentError
from .. import Communicator, connect, premul_sum
from ..bootstrap import Alone, Bootstrap, StoreBootstrap
from . import buffers
from .errors import torch_error
from .futures import Completion, GroupWork, ShortMessage
from .sparse import sum_sparse

# Without types: torch's stubs give most methods as overloads, and this class takes them all in one signature.
_ProcessGroup: Any = dist.ProcessGroup
c10d: Any = dist.distributed_c10d

_UNSET = timedelta(milliseconds=-1)

# Bytes up to which a message is waited for in the caller's thread: a third of the time for 4 bytes (9 us for two, 27
# by the progress thread), and several times longer for a megabyte.
_SHORT = 4096

# torch's operators by hash, which is their number: the cheapest that a ReduceOp can be asked for.
_OPERATORS: dict[int, str] = {
    hash(ReduceOp(getattr(ReduceOp, theirs))): ours
    for theirs, ours in {
        "SUM": "sum",
        "AVG": "avg",
        "PRODUCT": "prod",
        "MIN": "min",
        "MAX": "max",
        "BAND": "band",
        "BOR": "bor",
        "BXOR": "bxor",
    }.items()
}
_premul_sums: dict[float, Any] = {}

_open: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


def create(options: Any) -> ProcessGroup:
    """Make the process group that torch asks for. Collective among its ranks."""
    rank, size, store = options.group_rank, options.group_size, options.store
    timeout = options.timeout.total_seconds()
    try:
        communicator = connect(_bootstrap(store, rank, size, options.group_id, timeout), timeout=timeout)
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


class _Backend:
    """What torch sees as the group's backend for a device: it asks what that can do."""

    supports_splitting = supports_coalescing = supports_time_estimate = supports_shrinking = False

    def __init__(self, group: ProcessGroup) -> None:
        self._group = weakref.ref(group)

    def name(self) -> str:
        return "abccl"

    def supports_tensor_alloc(self, device: Any = None) -> bool:
        return False

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: Any = None) -> Tensor:
        return torch.empty(size, dtype=dtype)

    def _set_default_timeout(self, timeout: timedelta) -> None:
        group = self._group()
        if group is not None:
            group.set_timeout(timeout)


class ProcessGroup(_ProcessGroup):  # type: ignore[misc]
    """The ranks of a `torch.distributed` group, CPU tensors, over a communicator of their own."""

    def __init__(self, communicator: Communicator, store: Any) -> None:
        super().__init__(communicator.rank, communicator.size)
        self._communicator, self._store = communicator, store
        self._name, self._description = "", "undefined"
        self._sequence = 0
        self._timeout_lock = threading.Lock()
        self._completion = Completion(f"abccl futures of rank {communicator.rank}")
        self._backend = _Backend(self)
        _open.add(self)

    # ---- collectives on one tensor

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None, *, op: Any = None) -> Any:
        """Each tensor becomes the reduction of all ranks' tensors."""
        if opts.__class__ is c10d.AllreduceOptions and len(tensors) == 1 and not opts.asyncOp:
            # The fastest way; what it does not take comes out of it with nothing sent.
            operator = _OPERATORS.get(hash(opts.reduceOp))
            if operator is not None and opts.timeout == _UNSET:
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
        opts = _with_operator(c10d.AllreduceOptions(), opts, op, timeout)
        return self._reduce_all(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Each tensor becomes the reduction of all ranks' tensors at its place of the list."""
        return self._reduce_all(tensors, opts or c10d.AllreduceCoalescedOptions())

    def _reduce_all(self, tensors: list[Tensor], opts: Any) -> Any:
        operator = _operator(opts.reduceOp)
        if any(tensor.layout != torch.strided for tensor in tensors):
            if len(tensors) != 1:
                raise torch_error(ArgumentError("all_reduce: sparse tensors one by one, please"))
            try:
                start, finish = sum_sparse(self._communicator, tensors[0], str(operator))
            except AbcclError as error:
                raise torch_error(error) from None
            return self._issue(opts, start, tensors, finish)
        reduce, parts = self._communicator.all_reduce, [buffers.changing(tensor) for tensor in tensors]
        return self._issue(
            opts,
            lambda later: [reduce(flat, operator, async_op=later) for flat, _ in parts],
            tensors,
            _all(finish for _, finish in parts),
        )

    def broadcast(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None, *, root: int = 0) -> Any:
        """The tensor becomes the root's."""
        if isinstance(tensors, Tensor):
            tensors, opts = [tensors], _with_root(c10d.BroadcastOptions(), opts, root, timeout)
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
            tensors, opts = [tensors], _with_operator(c10d.ReduceOptions(), None, op, timeout)
            opts.rootRank = root
        opts = opts or c10d.ReduceOptions()
        (tensor,) = tensors
        reduce, root, operator = self._communicator.reduce, opts.rootRank, _operator(opts.reduceOp)
        flat, finish = buffers.changing(tensor)
        finish = finish if self._communicator.rank == root else None
        return self._issue(opts, lambda later: [reduce(flat, operator, root, async_op=later)], tensors, finish)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None, timeout: Any = None) -> Any:
        """The output gets the inputs of all ranks, one after the other."""
        _alike("all_gather", output, input)
        gather, x = self._communicator.all_gather, buffers.as_bytes(buffers.reading(input))
        out, finish = buffers.writing(output)
        out = buffers.as_bytes(out)
        opts = _with_timeout(opts or c10d.AllgatherOptions(), timeout)
        return self._issue(opts, lambda later: [gather(out, x, async_op=later)], [output], finish)

    def reduce_scatter_single(
        self, outputTensor: Tensor, inputTensor: Tensor, opts: Any = None, timeout: Any = None
    ) -> Any:
        """The output becomes this rank's part of the reduction of all inputs."""
        opts = _with_timeout(opts or c10d.ReduceScatterOptions(), timeout)
        scatter, operator, x = self._communicator.reduce_scatter, _operator(opts.reduceOp), buffers.reading(inputTensor)
        out, finish = buffers.writing(outputTensor)
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
                _elements("output", output, out.numel(), output_split_sizes, self._communicator.size),
                _elements("input", input, x.numel(), input_split_sizes, self._communicator.size),
            )
        opts = _with_timeout(opts or c10d.AllToAllOptions(), timeout)
        return self._issue(opts, lambda later: [exchange(out, x, *splits, async_op=later)], [output], finish)

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Any:
        """All ranks have come."""
        opts = _with_timeout(opts if isinstance(opts, c10d.BarrierOptions) else c10d.BarrierOptions(), timeout)
        barrier = self._communicator.barrier
        return self._issue(opts, lambda later: [barrier(async_op=later)], [], None)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier whose error names a rank that did not come (every barrier's does)."""
        opts = _with_timeout(c10d.BarrierOptions(), timeout)
        self.barrier(opts).wait()

    # ---- collectives on lists of tensors

    def allgather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> Any:
        """Every rank gets the inputs of all ranks, in its list of outputs. The inputs may differ in size."""
        if isinstance(input_tensors, Tensor):
            output_tensors, input_tensors = [output_tensors], [input_tensors]
        opts = _with_timeout(opts or c10d.AllgatherOptions(), timeout)
        _alone("all_gather", output_tensors, input_tensors)
        return self._gather_all(output_tensors, input_tensors, output_tensors, opts)

    def allgather_coalesced(self, output_lists: list[list[Tensor]], input_list: list[Tensor], opts: Any = None) -> Any:
        """Every rank gets the inputs of all ranks: rank r's i-th input in the i-th output of the r-th list."""
        lists = [list(outputs) for outputs in zip(*output_lists)]
        return self._gather_all(lists, input_list, output_lists, opts or c10d.AllgatherOptions())

    def _gather_all(self, lists: Any, inputs: list[Tensor], result: list[Any], opts: Any) -> Any:
        size, calls, copies = self._communicator.size, [], []
        for outputs, input in zip(lists, inputs):
            if len(outputs) != size:
                raise torch_error(ArgumentError(f"all_gather: {size} output tensors wanted, and {len(outputs)} given"))
            x = buffers.as_bytes(buffers.reading(input))
            out, finish = buffers.writing_all(outputs)
            _alike("all_gather", out, input)
            calls.append((buffers.as_bytes(out), x, _uneven(outputs, x.element_size())))
            copies.append(finish)
        gather = self._communicator.all_gather
        return self._issue(
            opts,
            lambda later: [gather(out, x, counts=counts, async_op=later) for out, x, counts in calls],
            result,
            _all(copies),
        )

    def all_gather_single_coalesced(
        self, output_lists: list[Tensor], input_list: list[Tensor], opts: Any = None
    ) -> Any:
        """`all_gather_single` of each pair of tensors."""
        calls = [(*buffers.writing(out), buffers.reading(x)) for out, x in zip(output_lists, input_list)]
        flats = [(buffers.as_bytes(out), buffers.as_bytes(x)) for out, _, x in calls]
        gather = self._communicator.all_gather
        return self._issue(
            opts or c10d.AllgatherOptions(),
            lambda later: [gather(out, x, async_op=later) for out, x in flats],
            output_lists,
            _all(finish for _, finish, _ in calls),
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
        opts = _with_operator(c10d.ReduceScatterOptions(), opts, op, timeout)
        _alone("reduce_scatter", output_tensors, input_tensors)
        (output,), (inputs,) = output_tensors, input_tensors
        x, counts, operator = buffers.reading_all(inputs), _uneven(inputs), _operator(opts.reduceOp)
        out, finish = buffers.writing(output)
        scatter = self._communicator.reduce_scatter
        return self._issue(
            opts, lambda later: [scatter(out, x, operator, counts=counts, async_op=later)], output_tensors, finish
        )

    def reduce_scatter_single_coalesced(
        self, outputTensors: list[Tensor], inputTensors: list[Tensor], opts: Any = None
    ) -> Any:
        """`reduce_scatter_single` of each pair of tensors."""
        opts = opts or c10d.ReduceScatterOptions()
        operator, scatter = _operator(opts.reduceOp), self._communicator.reduce_scatter
        calls = [(*buffers.writing(out), buffers.reading(x)) for out, x in zip(outputTensors, inputTensors)]
        return self._issue(
            opts,
            lambda later: [scatter(out, x, operator, async_op=later) for out, _, x in calls],
            outputTensors,
            _all(finish for _, finish, _ in calls),
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
            opts = _with_root(c10d.GatherOptions(), opts, root, timeout)
            output_tensors, input_tensors = [output_tensors] if output_tensors else [], [input_tensors]
        opts = opts or c10d.GatherOptions()
        (input,), root, gather = input_tensors, opts.rootRank, self._communicator.gather
        x, out, finish, outputs = buffers.as_bytes(buffers.reading(input)), None, None, []
        if self._communicator.rank == root:
            (outputs,) = output_tensors
            whole, finish = buffers.writing_all(outputs)
            _alike("gather", whole, input)
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
            opts = _with_root(c10d.ScatterOptions(), opts, root, timeout)
            output_tensors, input_tensors = [output_tensors], [input_tensors] if input_tensors else []
        opts = opts or c10d.ScatterOptions()
        (output,), root, scatter = output_tensors, opts.rootRank, self._communicator.scatter
        x = None
        if self._communicator.rank == root:
            (inputs,) = input_tensors
            _alike("scatter", output, inputs[0])
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
        _alike("all_to_all", out, input_tensors[0])
        out = buffers.as_bytes(out)
        received = _sizes(output_tensors, out.element_size())
        sent = _sizes(input_tensors, x.element_size())
        exchange = self._communicator.all_to_all
        opts = _with_timeout(opts or c10d.AllToAllOptions(), timeout)
        return self._issue(
            opts, lambda later: [exchange(out, x, received, sent, async_op=later)], output_tensors, finish
        )

    # ---- messages

    def send(self, tensors: list[Tensor], dstRank: int, tag: int = 0) -> Any:
        """Start to send the tensor."""
        (tensor,) = tensors
        try:
            x = buffers.as_bytes(buffers.reading(tensor))
            part = self._communicator.send(x, dstRank, tag, async_op=True)
        except AbcclError as error:
            raise torch_error(error) from None
        return GroupWork([self._message(part, x)], tensors, None, None)

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int = 0) -> Any:
        """Start to receive into the tensor."""
        return self._receive(tensors, srcRank, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Any:
        """Start to receive into the tensor, from whoever sends."""
        return self._receive(tensors, None, tag)

    def _receive(self, tensors: list[Tensor], peer: int | None, tag: int) -> Any:
        (tensor,) = tensors
        try:
            out, finish = buffers.writing(tensor)
            part = self._communicator.recv(buffers.as_bytes(out), peer, tag, async_op=True)
        except AbcclError as error:
            raise torch_error(error) from None
        return GroupWork([self._message(part, out)], tensors, finish, None)

    def _message(self, part: Any, buffer: Tensor) -> Any:
        short = buffer.numel() * buffer.element_size() <= _SHORT
        return ShortMessage(part, self._communicator.wait_message) if short else part

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
        try:
            if opts.timeout != _UNSET:
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
        work = GroupWork(parts, result, finish, self._completion)
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

    # ---- what torch asks of a group beside its operations

    def getBackendName(self) -> str:
        """For C++."""
        return "abccl"

    _get_backend_name = name = getBackendName

    def getRank(self) -> int:
        """For C++."""
        return self._communicator.rank

    def getSize(self) -> int:
        """For C++."""
        return self._communicator.size

    rank = getRank
    size = getSize

    @property
    def group_name(self) -> Any:
        """The name that torch has given the group."""
        return self._name

    @property
    def group_desc(self) -> str:
        """What the user has said the group is for."""
        return self._description

    def getGroupName(self) -> str:
        """For C++."""
        return self._name

    def setGroupName(self, name: str) -> None:
        """For C++."""
        self._name = name

    def getGroupDesc(self) -> str:
        """For C++."""
        return self._description

    def setGroupDesc(self, desc: str) -> None:
        """For C++."""
        self._description = desc

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc

    def get_group_store(self) -> Any:
        """The store that the group was made with."""
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: Any) -> Any:
        return self._backend

    def _set_sequence_number_for_group(self) -> None:
        self._sequence = 0

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def _start_coalescing(self, device: Any) -> None:
        """Nothing: a raise here would leave torch queueing for ever."""

    def _end_coalescing(self, device: Any) -> None:
        """Nothing."""

    def _has_hooks(self) -> bool:
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        """How long operations that start from now on wait for their peers."""
        self._communicator.set_timeout(timeout.total_seconds())

    def abort(self) -> None:
        """Make the present and future operations of all ranks fail."""
        self._communicator.abort("the process group was aborted")
        self.shutdown()

    def shutdown(self) -> None:
        """Give everything back; pending operations fail."""
        self._communicator.close()
        self._completion.stop()

    # Other versions of torch, and some callers of this one, use these names.
    _allgather_base = all_gather_into_tensor = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_tensor = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _operator(op: Any) -> Any:
    name = _OPERATORS.get(hash(op))
    if name is not None:
        return name
    factor = getattr(op, "factor", None)
    if op != ReduceOp.PREMUL_SUM or factor is None:
        raise torch_error(ArgumentError(f"{op} is not served: use {', '.join(sorted(_OPERATORS.values()))}"))
    # One object for equal factors: the communicator tells operators apart by identity.
    return _premul_sums.setdefault(float(factor), premul_sum(float(factor)))


def _with_timeout(opts: Any, timeout: timedelta | None) -> Any:
    if timeout is not None:
        opts.timeout = timeout
    return opts


def _with_operator(fresh: Any, opts: Any, op: Any, timeout: timedelta | None) -> Any:
    """Options, whether they came as such, as an operator, or as nothing."""
    if hasattr(opts, "reduceOp"):
        return _with_timeout(opts, timeout)
    wanted = opts if opts is not None else op
    if wanted is not None:
        fresh.reduceOp = wanted
    return _with_timeout(fresh, timeout)


def _with_root(fresh: Any, opts: Any, root: int, timeout: timedelta | None) -> Any:
    """Options, whether they came as such, as a root, or as nothing."""
    if hasattr(opts, "rootRank"):
        return opts
    fresh.rootRank = root if opts is None else opts
    return _with_timeout(fresh, timeout)


def _all(finishes: Any) -> Callable[[], None] | None:
    """One copy back for several."""
    needed = [finish for finish in finishes if finish is not None]
    if not needed:
        return None

    def finish() -> None:
        for each in needed:
            each()

    return finish


def _sizes(tensors: Sequence[Tensor], itemsize: int) -> list[int]:
    """How many elements of `itemsize` bytes each tensor has."""
    return [tensor.numel() * tensor.element_size() // itemsize for tensor in tensors]


def _uneven(tensors: Sequence[Tensor], itemsize: int | None = None) -> list[int] | None:
    """The tensors' numbers of elements; None if all are equal."""
    sizes = _sizes(tensors, itemsize or tensors[0].element_size())
    return None if sizes.count(sizes[0]) == len(sizes) else sizes


def _elements(name: str, tensor: Tensor, count: int, splits: Sequence[int], size: int) -> list[int]:
    """Split sizes in rows of a tensor as split sizes in elements."""
    rows = tensor.shape[0] if tensor.dim() else 1
    if not len(splits):
        if rows % size:
            raise torch_error(ArgumentError(f"all_to_all: {rows} rows of {name} do not split into {size} equal parts"))
        splits = [rows // size] * size
    if len(splits) != size or sum(splits) != rows:
        raise torch_error(
            ArgumentError(
                f"all_to_all: {name}_split_sizes must be {size} sizes that add up to the {rows} rows of {name}, and "
                f"is {list(splits)}"
            )
        )
    row = count // rows if rows else 0
    return [split * row for split in splits]


def _alike(call: str, one: Tensor, other: Tensor) -> None:
    """Refuse tensors of two element types before their bytes are taken for numbers."""
    if one.dtype != other.dtype:
        raise torch_error(ArgumentError(f"{call}: tensors of {one.dtype} and {other.dtype}: all must be of one type"))


def _alone(call: str, outputs: Any, inputs: Any) -> None:
    if len(outputs) != 1 or len(inputs) != 1:
        raise torch_error(ArgumentError(f"{call}: one tensor of each rank, and {len(inputs)} given"))


def _hide_from_dynamo() -> None:
    """torch.compile must call these functions, not trace into them: they end in native code that it can not see."""
    try:
        from torch._C._dynamo import eval_frame
    except ImportError:
        return
    skip = eval_frame._FrameAction.SKIP
    strategy = eval_frame._FrameExecStrategy(skip, skip)
    for kind in (ProcessGroup, GroupWork):
        for member in vars(kind).values():
            function = getattr(member, "fget", member)
            if hasattr(function, "__code__"):
                eval_frame.set_code_exec_strategy(function.__code__, strategy)


@atexit.register
def _shut_down_all() -> None:
    """A program may end without destroy_process_group; a thread in native code must not see the interpreter go."""
    for group in list(_open):
        group.shutdown()


_hide_from_dynamo()
