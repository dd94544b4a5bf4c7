"""Parameters of which every rank updates its part, and which are gathered before they are used again.

Centauri (ASPLOS 2024) splits the all_reduce of gradients into a reduce_scatter during backward and an all_gather during
the next forward; between the two each rank's optimizer updates 1/size of the parameters, and holds 1/size of the state.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ..communicator import Communicator
from .layout import Layout, own_part
from .module_hook import ModuleHook


class Partition:
    """The parameters of a module, moved to flat buckets in registered memory.

    Attributes:
        shards: this rank's part of each bucket, a Parameter that an optimizer updates.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
        self._comm, self._parameters = comm, parameters
        self._optimizers: list[torch.optim.Optimizer] = []
        self._layouts: list[Layout] = []
        self._values: list[Tensor] = []
        self._pending: dict[int, Any] = {}  # the gathers under way, by the number of their bucket
        self._bucket_of: dict[int, int] = {}
        # Parameters of modules whose forward has never run: if they are used at all, then by other modules.
        self._elsewhere = set(range(len(parameters)))
        self.shards: list[nn.Parameter] = []
        self._waited, self._gathers = 0.0, list[tuple[float, float]]()
        self._hooks = self._watch(module)

    def _watch(self, module: nn.Module) -> list[Any]:
        numbers = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        hooks: list[Any] = []
        wait: Any = ModuleHook(self.wait)
        for part in module.modules():
            own = [numbers[id(p)] for p in part.parameters(recurse=False) if id(p) in numbers]
            if own or part is module:
                hooks.append(part.register_forward_pre_hook(ModuleHook(partial(self._before_use, own))))
            registers: list[Any] = [part.register_state_dict_pre_hook, part.register_load_state_dict_pre_hook]
            hooks += [register(wait) for register in registers]
        return hooks

    def _before_use(self, own: Sequence[int]) -> None:
        self._elsewhere.difference_update(own)
        if self._pending:
            started = time.monotonic()
            self.wait({self._bucket_of[number] for number in self._elsewhere.union(own)})
            self._waited += time.monotonic() - started

    def move(self, layouts: list[Layout]) -> list[Layout]:
        """Lay the parameters out anew; optimizers follow. If one has state, it belongs to the present layout: stay.

        Returns:
            The layout that holds now.
        """
        self.wait()
        if any(optimizer.state for optimizer in self._optimizers):
            return self._layouts
        values = []
        for layout in layouts:
            flat: Tensor = self._comm.empty(layout.count, layout.dtype)
            flat.zero_()
            for piece in layout.pieces:
                parameter = self._parameters[piece.parameter]
                view = piece.view(flat, parameter.shape)
                view.copy_(parameter.detach())
                parameter.data = view
            values.append(flat)
        self._values = values
        self._bucket_of = {piece.parameter: k for k, layout in enumerate(layouts) for piece in layout.pieces}
        self.shards = [nn.Parameter(own_part(flat, self._comm.rank, self._comm.size)) for flat in values]
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["params"] = list(self.shards)
        self._layouts = layouts
        return layouts

    @property
    def has_optimizer(self) -> bool:
        """Whether somebody updates the shards."""
        return bool(self._optimizers)

    def optimizer(self, kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> torch.optim.Optimizer:
        """An optimizer of the shards; when it has made a step, the gathers begin."""
        optimizer = kind(self.shards, **options)
        if len(optimizer.param_groups) != 1:
            raise ArgumentError(f"partition: {kind.__name__} makes several parameter groups: one is wanted")
        optimizer.register_step_pre_hook(lambda *_: self._check_places())
        optimizer.register_step_post_hook(lambda *_: self.gather())
        self._optimizers.append(optimizer)
        return optimizer

    def hand_out(self, parts: Sequence[Tensor]) -> None:
        """Give the shards their gradients.

        What is not finite on one rank is so on all: a gradient scaler skips its step on all or on none.
        """
        largest = torch.tensor([float(torch.linalg.vector_norm(part, float("inf"))) for part in parts])
        odd = torch.logical_not(torch.isfinite(largest)).any().view(1).to(torch.uint8)
        self._comm.all_reduce(odd, "max")
        for shard, part in zip(self.shards, parts):
            shard.grad = part
            if odd.item():
                part[:1] = float("nan")

    def take_times(self) -> tuple[float, list[tuple[float, float]]]:
        """The seconds that forward has waited, and when gathers ran, since this was called last."""
        times = self._waited, self._gathers
        self._waited, self._gathers = 0.0, []
        return times

    def clip_grad_norm_(self, most: float) -> Tensor:
        """Scale the shards' gradients so that the 2-norm of all ranks' is at most `most`; the norm before."""
        gradients = [shard.grad for shard in self.shards if shard.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        square = torch.stack([norm.double() for norm in norms]).square().sum().view(1)
        self._comm.all_reduce(square)
        norm = square.sqrt()[0]
        nn.utils.clip_grads_with_norm_(self.shards, most, norm)
        return norm

    def gather(self) -> None:
        """Start to gather all parts, first those that backward brought last: forward uses them first."""
        self.wait()
        torch.autograd.graph.increment_version(self._parameters)  # what was saved of them is of the past
        for number in reversed(range(len(self._values))):
            whole, own = self._values[number], self.shards[number].detach()
            self._pending[number] = self._comm.all_gather(whole, own, async_op=True)

    def _check_places(self) -> None:
        """Refuse parameters that have been given other memory: an optimizer of shards does not see them."""
        for flat, layout in zip(self._values, self._layouts):
            for piece in layout.pieces:
                parameter = self._parameters[piece.parameter]
                if piece.count and parameter.data_ptr() != flat.data_ptr() + piece.offset * layout.dtype.itemsize:
                    raise ArgumentError(
                        f"parameter {piece.parameter} of shape {tuple(parameter.shape)} has left its bucket: move or "
                        "convert the model before GradientBuckets(model, ...), not after"
                    )

    def check_was_whole(self, number: int) -> None:
        """Refuse the gradient of a parameter that nobody has waited for: what was used may have been half old."""
        if self._bucket_of[number] in self._pending:
            raise ArgumentError(
                f"parameter {number} of shape {tuple(self._parameters[number].shape)} was used while it was being "
                "gathered, and no hook of its module has run: call buckets.gathered() before forward. (torch.compile "
                "leaves out hooks that came after it: torch._dynamo.reset() behind GradientBuckets(...))"
            )

    def wait(self, buckets: Iterable[int] | None = None) -> None:
        """Wait until the parameters of these buckets are whole; of all if None."""
        for number in list(self._pending) if buckets is None else buckets:
            pending = self._pending.pop(number, None)
            if pending is not None:
                pending.wait()
                self._gathers.append(pending.times)

    def let_go(self) -> None:
        """Take the hooks off the module."""
        for hook in self._hooks:
            hook.remove()
