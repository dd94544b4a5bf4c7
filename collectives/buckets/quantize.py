"""Block-scaled 8-bit integers: a block of 256 numbers travels as 256 signed bytes and one float32 scale.

The scale of a block is its largest magnitude / 127, so a number is off by at most that magnitude / 254. A block with a
NaN or an infinity in it comes out without a finite number, so that who looks for overflow finds it. The arithmetic is
the native core's (`quantize.hpp`), the same bits with all instruction sets.
"""

from __future__ import annotations

from torch import Tensor

from ...transports import _native

BLOCK = _native.QUANTIZED_BLOCK
_SCALE_BYTES = 4


def packed_bytes(count: int) -> int:
    """The bytes of `count` numbers, a multiple of BLOCK: 1.016 a number."""
    return count + count // BLOCK * _SCALE_BYTES


def quantize(values: Tensor, added: Tensor, packed: Tensor) -> None:
    """Write the rows of `values + added` into the rows of `packed`; leave in `values` what was rounded off.

    Args:
        values, added: contiguous float32, (rows, count); count a multiple of BLOCK.
        packed: contiguous uint8, (rows, packed_bytes(count)): the integers of a row, then its scales.
    """
    for row, more, target in zip(values, added, packed):
        _native.quantize(row.data_ptr(), more.data_ptr(), target.data_ptr(), row.numel())


def dequantize(packed: Tensor, out: Tensor, factor: float = 1.0) -> None:
    """Write `factor` times the sum of the packed rows, in their order, into `out` (contiguous float32)."""
    _native.dequantize(out.data_ptr(), [row.data_ptr() for row in packed], factor, out.numel())
