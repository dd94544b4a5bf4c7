"""A communication hook for DistributedDataParallel: its buckets, averaged by abccl, compressed if wanted."""

# No `from __future__ import annotations`: DDP compares the hook's annotations with the classes themselves.

import atexit
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..communicator import Communicator
from ..torch.futures import Completion, work_of
from ..torch.process_group import communicator_of
from .averages import Average, Averages


class HookState:
    """What the hook keeps from step to step, one for each model. Making it is collective: it splits the group.

    Args:
        group: whose ranks average: a process group of backend "abccl", or a communicator; the default group if None.
        compress: None, "bf16", "fp16" or "int8", as for `GradientBuckets`.

    Raises:
        ArgumentError: the group is not abccl's; no such compression.
    """

    def __init__(self, group: Any = None, compress: str | None = None) -> None:
        communicator = _communicator(group)
        # Of its own: DDP and the user make calls on theirs, in an order that has nothing to do with the buckets'.
        own = communicator.split(0, communicator.rank)
        assert own is not None
        self._averages = Averages(own, compress)
        self._buckets: dict[int, tuple[list[torch.Size], Average]] = {}
        self._completion = Completion(f"abccl bucket futures of rank {own.rank}")
        _open.add(self)

    def close(self) -> None:
        """Give everything back; what is under way fails. Done at exit, and when nobody refers to the state."""
        self._averages.close()
        self._completion.stop()

    def __del__(self) -> None:
        if hasattr(self, "_completion"):
            self.close()

    def start(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Start to average the bucket's gradients; the future's value is their flat tensor."""
        flat = bucket.buffer()
        # DDP makes its buckets anew after the first step: what was rounded off in the old ones belongs to no other.
        shapes = [parameter.shape for parameter in bucket.parameters()]
        known = self._buckets.get(bucket.index())
        if known is None or known[0] != shapes:
            known = self._buckets[bucket.index()] = (shapes, self._averages.make(flat.numel(), flat.dtype, flat.device))
        work = work_of([known[1].all_reduce(flat)], [flat], None, self._completion)
        value: torch.futures.Future[Tensor] = work.get_future().then(_first)
        return value


def hook(
    state: HookState | Communicator | dist.ProcessGroup | None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Average a bucket of DistributedDataParallel over abccl: `model.register_comm_hook(state, abccl.buckets.hook)`.

    Cost: that of the average in `averages`, in the background of backward.

    Args:
        state: a HookState; or a group, the default one if None, of which one is made at the first call (collective).
    """
    kept = state if isinstance(state, HookState) else _state_of(state)
    average: torch.futures.Future[Tensor] = kept.start(bucket)
    return average


_open: "weakref.WeakSet[HookState]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for state in list(_open):
        state.close()


_states: "weakref.WeakKeyDictionary[Communicator, HookState]" = weakref.WeakKeyDictionary()


def _state_of(group: Any) -> HookState:
    communicator = _communicator(group)
    state = _states.get(communicator)
    if state is None:
        state = _states[communicator] = HookState(communicator)
    return state


def _communicator(group: Any) -> Communicator:
    return communicator_of(dist.group.WORLD if group is None else group)


def _first(future: Any) -> Tensor:
    tensor: Tensor = future.value()[0]
    return tensor
