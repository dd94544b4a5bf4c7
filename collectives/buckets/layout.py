"""Which parameters' gradients travel together, and where they lie: pure functions of sizes and an order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes. Gradients begin on cache lines."""


@dataclass(frozen=True)
class Piece:
    """Where the gradient of a parameter lies in its bucket, in elements."""

    parameter: int
    offset: int
    count: int

    def view(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """The place in the bucket, in the parameter's shape."""
        return flat[self.offset : self.offset + self.count].view(shape)


@dataclass(frozen=True)
class Layout:
    """One bucket: gradients of one element type, one behind the other, padded with zeros."""

    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    count: int

    @property
    def nbytes(self) -> int:
        """All of it, padding included."""
        return self.count * self.dtype.itemsize


def lay_out(
    counts: Sequence[int], dtypes: Sequence[torch.dtype], order: Sequence[int], bucket_bytes: int, multiple: int
) -> list[Layout]:
    """Fill buckets with gradients in the order in which backward brings them.

    A bucket ends with the gradient that brings it to `bucket_bytes`. Buckets come in the order in which they are full.

    Args:
        counts, dtypes: of the parameters.
        order: the parameters' numbers, first the one whose gradient comes first.
        multiple: a bucket's elements are a multiple of it.
    """
    full: list[Layout] = []
    open_pieces: dict[torch.dtype, list[Piece]] = {}
    last: dict[torch.dtype, int] = {}

    def close(dtype: torch.dtype) -> Layout:
        pieces = open_pieces.pop(dtype)
        return Layout(dtype, tuple(pieces), -(-_end(pieces, dtype) // multiple) * multiple)

    for place, parameter in enumerate(order):
        dtype = dtypes[parameter]
        pieces = open_pieces.setdefault(dtype, [])
        pieces.append(Piece(parameter, _end(pieces, dtype), counts[parameter]))
        last[dtype] = place
        if _end(pieces, dtype) * dtype.itemsize >= bucket_bytes:
            full.append(close(dtype))
    return full + [close(dtype) for dtype in sorted(open_pieces, key=last.__getitem__)]


def own_part(flat: Tensor, rank: int, size: int) -> Tensor:
    """A rank's part of a bucket, one of `size` equal ones."""
    part = flat.numel() // size
    return flat[rank * part : (rank + 1) * part]


def _end(pieces: Sequence[Piece], dtype: torch.dtype) -> int:
    """The first aligned element behind the pieces."""
    if not pieces:
        return 0
    align = max(1, ALIGNMENT // dtype.itemsize)
    return -(-(pieces[-1].offset + pieces[-1].count) // align) * align
