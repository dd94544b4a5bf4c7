"""A process group without operations: its names, its end, and what torch asks of it beside operations."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import ArgumentError
from .. import Communicator
from .errors import torch_error
from .futures import Completion, join_completions
from .profiling import profiling, record

# Without types: torch's stubs give most methods as overloads, and subclasses take them all in one signature.
_ProcessGroup: Any = dist.ProcessGroup

_open: weakref.WeakSet[Group] = weakref.WeakSet()


@cache
def _devices() -> tuple[torch.device, ...]:
    """What torch may be told. With the CPU among them, it sends objects as CPU tensors."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    return (cpu, cuda) if torch.cuda.is_available() else (cpu,)


class _Backend:
    """What torch sees as the group's backend for a device: it asks what that can do."""

    supports_splitting = supports_coalescing = supports_time_estimate = supports_shrinking = False

    def __init__(self, group: Group) -> None:
        self._group = weakref.ref(group)

    def name(self) -> str:
        return "abccl"

    def supports_tensor_alloc(self, device: Any = None) -> bool:
        return device is None or torch.device(device).type == "cpu"

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: Any = None) -> Tensor:
        if not self.supports_tensor_alloc(device):
            raise torch_error(ArgumentError(f"registered memory is the host's, and {device} wanted: use torch.empty"))
        group = self._group()
        assert group is not None, "the process group is gone"
        return group.empty(size, dtype)

    def _set_default_timeout(self, timeout: timedelta) -> None:
        group = self._group()
        if group is not None:
            group.set_timeout(timeout)


class Group(_ProcessGroup):  # type: ignore[misc]
    """The ranks of a `torch.distributed` group, over a communicator of their own."""

    def __init__(self, communicator: Communicator, store: Any) -> None:
        super().__init__(communicator.rank, communicator.size)
        self._communicator, self._store = communicator, store
        self._name, self._description = "", "undefined"
        self._sequence = 0
        self._timeout_lock = threading.Lock()
        self._completion = Completion(f"abccl futures of rank {communicator.rank}")
        self._recorded = False
        self._backend = _Backend(self)
        _open.add(self)

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
        return list(_devices())

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

    def _record(self) -> None:
        """Start or stop to tell torch's profiler of collectives, as it has started or stopped."""
        self._recorded = profiling()
        self._communicator.observe(record if self._recorded else None)

    def set_timeout(self, timeout: timedelta) -> None:
        """How long operations that start from now on wait for their peers."""
        self._communicator.set_timeout(timeout.total_seconds())

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in registered memory: see `Communicator.empty`."""
        tensor: Tensor = self._communicator.empty(shape, dtype)
        return tensor

    def abort(self) -> None:
        """Make the present and future operations of all ranks fail."""
        self._communicator.abort("the process group was aborted")
        self.shutdown()

    def shutdown(self) -> None:
        """Give everything back; pending operations fail."""
        self._communicator.close()
        self._completion.stop()


@atexit.register
def _shut_down_all() -> None:
    """A program may end without destroy_process_group; a thread in native code must not see the interpreter go."""
    for group in list(_open):
        group.shutdown()
    join_completions()
