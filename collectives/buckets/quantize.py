"""Block-scaled 8-bit integers: a block of 256 numbers travels as 256 signed bytes and one float32 scale.

The scale of a block is its largest magnitude / 127, so a number is off by at most that magnitude / 254. A block with a
NaN or an infinity in it comes out without a finite number, so that who looks for overflow finds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
LEVELS = 127
_SCALE_BYTES = torch.float32.itemsize

# The reciprocal of what is smaller is no longer finite.
_TINY = torch.finfo(torch.float32).tiny


def packed_bytes(count: int) -> int:
    """The bytes of `count` numbers, a multiple of BLOCK: 1.016 a number."""
    return count + count // BLOCK * _SCALE_BYTES


def quantize(values: Tensor, packed: Tensor) -> None:
    """Write the rows of `values` into the rows of `packed`; leave in `values` what was rounded off.

    Args:
        values: float32, (rows, count); count a multiple of BLOCK. What is not finite leaves nothing.
        packed: uint8, (rows, packed_bytes(count)): the integers of a row, then its scales.
    """
    rows, count = values.shape
    blocks = values.view(rows, count // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=2) / LEVELS
    scales = torch.where(scales < _TINY, 0.0, scales)
    integers = (blocks * torch.where(scales > 0, 1 / scales, 0.0).unsqueeze(2)).round_()
    packed[:, :count].view(torch.int8).copy_(integers.view(rows, count))
    packed[:, count:].view(torch.float32).copy_(scales)
    blocks.addcmul_(integers, scales.unsqueeze(2), value=-1).nan_to_num_(0.0, 0.0, 0.0)


def dequantize(packed: Tensor, out: Tensor) -> None:
    """The numbers of one packed row, in `out` (float32, contiguous)."""
    count = out.numel()
    integers = packed[:count].view(torch.int8).view(-1, BLOCK)
    scales = packed[count:].view(torch.float32).unsqueeze(1)
    torch.mul(integers, scales, out=out.view(-1, BLOCK))
