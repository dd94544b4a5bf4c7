"""The sum of sparse tensors over all ranks.

Ranks have different non-zero elements, so everybody gathers everybody's, and adds them up: as many bytes as all ranks
have non-zero elements, which is less than a dense all-reduce as long as they are few.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..communicator import Communicator
from ..work import Work
from . import streams


def sum_sparse(
    communicator: Communicator, tensor: Tensor, op: str
) -> tuple[Callable[[bool], list[Work]], Callable[[], None]]:
    """Prepare the all-reduce of a sparse COO tensor. Waits for all ranks to say how many elements they have.

    Returns:
        What gathers them (asynchronously if told), and what makes the sum of them in `tensor`.
    """
    if tensor.layout != torch.sparse_coo:
        raise ArgumentError(f"all_reduce: a tensor of layout {tensor.layout}: pass x.to_sparse_coo() or x.to_dense()")
    if op not in ("sum", "avg"):
        raise ArgumentError(f"all_reduce: {op} of sparse tensors, which have sum and avg only: pass x.to_dense()")
    own = tensor.detach().coalesce()
    indices, values = own.indices().contiguous(), own.values().contiguous()
    width = values[0].numel() if values.shape[0] else values.new_empty((1, *values.shape[1:])).numel()
    found = torch.empty(communicator.size, dtype=torch.int64)
    communicator.all_gather(found, torch.tensor([values.shape[0]]))
    counts: list[int] = found.tolist()
    dimensions = indices.shape[0]
    all_indices = indices.new_empty(sum(counts) * dimensions)
    all_values = values.new_empty((sum(counts), *values.shape[1:]))

    def start(asynchronous: bool) -> list[Work]:
        pairs = (
            (all_indices, indices.view(-1), dimensions),
            (all_values.view(-1), values.view(-1), width),
        )
        return [
            communicator.all_gather(out, x, counts=[count * each for count in counts], async_op=asynchronous)
            for out, x, each in pairs
        ]

    def finish() -> None:
        pieces = torch.split(all_indices, [count * dimensions for count in counts])
        joined = torch.cat([piece.view(dimensions, -1) for piece in pieces], dim=1)
        if communicator.reproducible:
            total = _add_in_rank_order(joined, all_values, counts, tensor.shape)
        else:
            total = torch.sparse_coo_tensor(joined, all_values, tensor.shape, check_invariants=False).coalesce()
        if op == "avg":
            total = total / communicator.size
        with torch.no_grad():
            tensor.copy_(total)
        streams.keep(all_indices, all_values)

    return start, finish


def _add_in_rank_order(indices: Tensor, values: Tensor, counts: list[int], shape: torch.Size) -> Tensor:
    """What coalesce makes of the elements of all ranks, which adds up in the order of a sort that is not stable.

    Up to twice as slow for float32, six times for half types, which are added up in float32 and rounded once.
    """
    flat = indices[0]
    for extent, row in zip(shape[1:], indices[1:]):
        flat = flat * extent + row
    places, where = torch.unique(flat, return_inverse=True)
    wide = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
    total = torch.zeros((len(places), *values.shape[1:]), dtype=wide, device=values.device)
    for rows, part in zip(torch.split(where, counts), torch.split(values, counts)):
        total[rows] += part  # a rank has one element at a place
    sparse = torch.stack(torch.unravel_index(places, shape[: len(indices)]))
    return torch.sparse_coo_tensor(sparse, total.to(values.dtype), shape, is_coalesced=True, check_invariants=False)
