"""What ranks must have in common before gradients can be averaged: arguments, shapes, and values to start from."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ..communicator import Communicator


def wanting_gradients(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that want gradients, each once.

    Raises:
        ArgumentError: there are none; something else is among them; one is not in host memory.
    """
    found: dict[int, nn.Parameter] = {}
    for parameter in params:
        if not isinstance(parameter, nn.Parameter):
            raise ArgumentError(f"params must be parameters, or a module, and has a {type(parameter).__name__}")
        if parameter.device.type != "cpu":
            raise ArgumentError(
                f"a parameter is on {parameter.device}, and GradientBuckets serves the CPU so far: use "
                "DistributedDataParallel there, with abccl.buckets.hook if its buckets are to be compressed"
            )
        if parameter.requires_grad:
            found[id(parameter)] = parameter
    if not found:
        raise ArgumentError("params has no parameter that wants a gradient")
    return list(found.values())


def agree(comm: Communicator, tensors: Sequence[Tensor], how: str, problem: ArgumentError | None) -> None:
    """Raise on all ranks if one has a problem, other options, or tensors of other shapes or types. Collective."""
    text = repr([how, *((tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors)])
    everyone = np.empty((comm.size, 3), dtype=np.int64)
    mine = np.array([problem is not None, len(tensors), zlib.crc32(text.encode())], dtype=np.int64)
    comm.all_gather(everyone, mine)
    if problem is not None:
        raise problem
    for rank in range(comm.size):
        if everyone[rank][0]:
            raise ArgumentError(f"rank {rank} has refused its arguments: its own error says why")
        if tuple(everyone[rank]) != tuple(everyone[0]):
            raise ArgumentError(
                f"rank {rank} has other parameters or buffers than rank 0 ({everyone[rank][1]} and {everyone[0][1]} of "
                "them), or other options: pass the same on all ranks"
            )


def take_from_root(comm: Communicator, tensors: Iterable[Tensor]) -> None:
    """Make the tensors rank 0's. Collective."""
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        comm.broadcast(flat)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))
