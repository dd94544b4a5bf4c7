"""Numbers that recur where ranks are halved, doubled, or divided by another radix."""

from __future__ import annotations


def floor_log2(size: int) -> int:
    """The largest k with 2**k <= size: the depth of a binomial tree of `size` ranks."""
    return size.bit_length() - 1


def ceil_log2(size: int) -> int:
    """The smallest k with 2**k >= size: the steps in which one rank can reach `size` ranks by doubling."""
    return (size - 1).bit_length()


def ceil_log(size: int, radix: int) -> int:
    """The smallest k with radix**k >= size: the digits of the last of `size` ranks."""
    digits, reach = 0, 1
    while reach < size:
        digits, reach = digits + 1, reach * radix
    return digits


def widest(size: int, radix: int = 2) -> int:
    """The largest of the parts min(radix**k, size - radix**k), 1 for a single rank.

    It is the size of the largest subtree below the root of a k-nomial tree, too.
    """
    top: int = radix ** ceil_log(size, radix) // radix
    return max(1, top // radix, min(top, size - top))
