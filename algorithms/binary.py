"""Numbers that recur where ranks are halved or doubled."""

from __future__ import annotations


def floor_log2(size: int) -> int:
    """The largest k with 2**k <= size: the depth of a binomial tree of `size` ranks."""
    return size.bit_length() - 1


def ceil_log2(size: int) -> int:
    """The smallest k with 2**k >= size: the steps in which one rank can reach `size` ranks by doubling."""
    return (size - 1).bit_length()


def widest(size: int) -> int:
    """The largest of the doubling distances min(2**k, size - 2**k), 1 for a single rank.

    It is the size of the largest subtree below the root of a binomial tree, too.
    """
    half = 1 << ceil_log2(size) >> 1
    return max(1, half // 2, size - half)
