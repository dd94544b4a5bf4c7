"""What the memory can do, measured beside the collectives: every rank adds one array to another, all at once.

A reduction of two vectors is the same loop, without a peer: `a[i] += b[i]` on float32, by the kernel that abccl itself
folds with. It reads two numbers and writes one, so each rank moves 3 n bytes. (Whether the line that is written has to
be fetched first does not matter: it has been read.) A collective is held against this by `Case.least_bytes`.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ..transports import _native
from ..transports.types import NUMBERS, OPERATORS
from .data import Values
from .measure import Call
from .messages import AnyCase

ITEMSIZE = 4


def roofline_bytes(case: AnyCase) -> int:
    """The bytes that all ranks together move in one call: 3 n each, n being the case's size."""
    return 3 * _count(case) * ITEMSIZE * case.ranks


def operands(case: AnyCase, rank: int) -> tuple[Values, Values]:
    """`a` and `b` of this rank, of the case's size. Sums of millions of calls stay finite, and none is denormal."""
    random = np.random.default_rng([rank, case.size])
    a, b = (random.random(_count(case), dtype=np.float32) + np.float32(1) for _ in range(2))
    return a, b


def addition(a: Values, b: Values) -> Call:
    """The call a += b. It does not keep the arrays alive."""
    # Addresses, not arrays: at small sizes numpy's own += takes three times as long, and none of it is memory.
    first, second = a.ctypes.data, b.ctypes.data
    return partial(_native.fold, NUMBERS["float32"], OPERATORS["sum"], first, (first, second), a.size)


def _count(case: AnyCase) -> int:
    return max(1, case.size // ITEMSIZE)
