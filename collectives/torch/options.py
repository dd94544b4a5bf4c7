"""What comes with a call beside its tensors: torch's options and operators, and sizes of parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from ...errors import ArgumentError
from .. import premul_sum
from .errors import torch_error

c10d: Any = dist.distributed_c10d

UNSET = timedelta(milliseconds=-1)
"""A timeout in options that stands for the group's."""

# torch's operators by hash, which is their number: the cheapest that a ReduceOp can be asked for.
OPERATORS: dict[int, str] = {
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


def operator_name(op: Any) -> Any:
    name = OPERATORS.get(hash(op))
    if name is not None:
        return name
    factor = getattr(op, "factor", None)
    if op != ReduceOp.PREMUL_SUM or factor is None:
        raise torch_error(ArgumentError(f"{op} is not served: use {', '.join(sorted(OPERATORS.values()))}"))
    # One object for equal factors: the communicator tells operators apart by identity.
    return _premul_sums.setdefault(float(factor), premul_sum(float(factor)))


def with_timeout(opts: Any, timeout: timedelta | None) -> Any:
    if timeout is not None:
        opts.timeout = timeout
    return opts


def with_operator(fresh: Any, opts: Any, op: Any, timeout: timedelta | None) -> Any:
    """Options, whether they came as such, as an operator, or as nothing."""
    if hasattr(opts, "reduceOp"):
        return with_timeout(opts, timeout)
    wanted = opts if opts is not None else op
    if wanted is not None:
        fresh.reduceOp = wanted
    return with_timeout(fresh, timeout)


def with_root(fresh: Any, opts: Any, root: int, timeout: timedelta | None) -> Any:
    """Options, whether they came as such, as a root, or as nothing."""
    if hasattr(opts, "rootRank"):
        return opts
    fresh.rootRank = root if opts is None else opts
    return with_timeout(fresh, timeout)


def copy_all(finishes: Any) -> Callable[[], None] | None:
    """One copy back for several."""
    needed = [finish for finish in finishes if finish is not None]
    if not needed:
        return None

    def finish() -> None:
        for each in needed:
            each()

    return finish


def sizes_of(tensors: Sequence[Tensor], itemsize: int) -> list[int]:
    """How many elements of `itemsize` bytes each tensor has."""
    return [tensor.numel() * tensor.element_size() // itemsize for tensor in tensors]


def uneven(tensors: Sequence[Tensor], itemsize: int | None = None) -> list[int] | None:
    """The tensors' numbers of elements; None if all are equal."""
    sizes = sizes_of(tensors, itemsize or tensors[0].element_size())
    return None if sizes.count(sizes[0]) == len(sizes) else sizes


def elements(name: str, tensor: Tensor, count: int, splits: Sequence[int], size: int) -> list[int]:
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


def check_alike(call: str, one: Tensor, other: Tensor) -> None:
    """Refuse tensors of two element types before their bytes are taken for numbers."""
    if one.dtype != other.dtype:
        raise torch_error(ArgumentError(f"{call}: tensors of {one.dtype} and {other.dtype}: all must be of one type"))


def check_alone(call: str, outputs: Any, inputs: Any) -> None:
    if len(outputs) != 1 or len(inputs) != 1:
        raise torch_error(ArgumentError(f"{call}: one tensor of each rank, and {len(inputs)} given"))
