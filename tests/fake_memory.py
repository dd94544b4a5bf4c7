"""Memory of the fake CUDA driver: what it knows, and mappings whose addresses are never used twice."""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from fake_streams import Context, refuse

PROT_NONE, READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
SHARED, PRIVATE, ANONYMOUS = mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS
FIXED, NORESERVE = 0x10, 0x4000  # which Python's mmap does not name

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def map_memory(
    nbytes: int, flags: int, file: int = -1, address: int | None = None, protection: int = READ_WRITE
) -> int:
    """mmap at any address, or at one: Python's own can not."""
    mapped: int = _libc.mmap(address, nbytes, protection, flags, file, 0)
    if mapped == ctypes.c_void_p(-1).value:
        refuse("OUT_OF_MEMORY", f"mapping {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
    return mapped


@dataclass
class Region:
    """Memory that the driver knows. `source` is "allocated", "opened", "pinned", "registered", or "freed"."""

    base: int
    nbytes: int
    source: str
    file: int = -1  # of what was allocated
    handle: bytes = b""  # of what was opened

    def retire(self) -> None:
        """Give the memory back, and keep its addresses from being used again."""
        map_memory(self.nbytes, PRIVATE | FIXED | ANONYMOUS | NORESERVE, address=self.base, protection=PROT_NONE)
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
        self.source = "freed"


class Memory:
    """The regions that a driver knows, by address."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._bases: list[int] = []
        self._regions: list[Region] = []

    def __iter__(self) -> Iterator[Region]:
        return iter(list(self._regions))

    def add(self, region: Region) -> int:
        with self._context.lock:
            index = bisect_right(self._bases, region.base)
            self._bases.insert(index, region.base)
            self._regions.insert(index, region)
        return region.base

    def remove(self, region: Region) -> None:
        with self._context.lock:
            index = self._regions.index(region)
            del self._bases[index], self._regions[index]

    def find(self, address: int) -> Region | None:
        with self._context.lock:
            index = bisect_right(self._bases, address) - 1
            region = self._regions[index] if index >= 0 else None
        return region if region and address < region.base + region.nbytes else None

    def overlaps(self, address: int, nbytes: int) -> bool:
        return any(r.base < address + nbytes and address < r.base + r.nbytes for r in self if r.source != "freed")

    def check(self, what: str, address: int, nbytes: int) -> None:
        """Refuse what is not known as a whole; the use of what was freed is a sticky error."""
        region = self.find(address)
        if region is None:
            refuse("INVALID_VALUE", f"{what}: {address:#x} was neither allocated, opened nor registered here")
        if region.source == "freed":
            self._context.fail(f"CUDA_ERROR_ILLEGAL_ADDRESS: {what}: {address:#x} was freed or closed")
            self._context.check()
        if address + nbytes > region.base + region.nbytes:
            room = region.base + region.nbytes - address
            refuse("INVALID_VALUE", f"{what}: {nbytes} bytes at {address:#x}, where there are {room}")
