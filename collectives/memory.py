"""Registered memory: arrays that peers read where they lie, so that collectives on them copy nothing on the way.

A rank's arrays are cut from one heap, address space that is backed by memory only where it was touched. Peers map it
once. The pages of an array go back to the system when the last reference to it goes.
"""

from __future__ import annotations

import bisect
import math
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, TransportError
from ..transports import Transport, _native
from ..transports.joint import JointTransport
from ..transports.shm import ShmTransport

PAGE = mmap.PAGESIZE
LEAST_HEAP = 1 << 30


def heap_bytes(ranks: int) -> int:
    """The address space of one rank's heap: its share of the machine's memory, 1 GiB at least."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(LEAST_HEAP, memory // ranks // PAGE * PAGE)


def registered_memory(transport: Transport) -> RegisteredMemory | None:
    """Memory that the ranks of the own host can map, if they can."""
    local = transport.local if isinstance(transport, JointTransport) else transport
    if not isinstance(local, ShmTransport) or not local.registers:
        return None
    return RegisteredMemory(local.native, heap_bytes(transport.size))


def empty(shape: int | Sequence[int], dtype: Any, allocate: Callable[[int], npt.NDArray[np.uint8]]) -> Any:
    """An array on allocated bytes, its elements undefined: a torch tensor if `dtype` is torch's, else numpy's.

    Raises:
        ArgumentError: that is no shape.
    """
    torch = sys.modules.get("torch")
    of_torch = torch is not None and isinstance(dtype, torch.dtype)
    dims = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if any(not isinstance(dim, (int, np.integer)) or dim < 0 for dim in dims):
        raise ArgumentError(f"empty: shape must be sizes that are not negative, and is {shape!r}")
    itemsize = dtype.itemsize if of_torch else np.dtype(dtype).itemsize
    nbytes = math.prod(int(dim) for dim in dims) * itemsize
    if torch is not None and of_torch:
        return torch.from_numpy(allocate(nbytes)).view(dtype).view(dims) if nbytes else torch.empty(dims, dtype=dtype)
    return allocate(nbytes).view(dtype).reshape(dims) if nbytes else np.empty(dims, dtype)


class RegisteredMemory:
    """Hands out arrays of one rank's heap, in whole pages.

    Args:
        native: the rank's native communicator.
        capacity: the heap's bytes.
    """

    def __init__(self, native: Any, capacity: int) -> None:
        self._native, self._capacity = native, capacity
        self._region: Any = None
        self._lock = threading.Lock()
        self._free = [(0, capacity)]  # (offset, bytes), ascending; never two that touch
        # Finalizers run at any moment, in the middle of `_take` too: what they bring waits here.
        self._returned: deque[tuple[int, int]] = deque()

    def allocate(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """So many bytes, one at least, undefined.

        Raises:
            TransportError: no room is left.
        """
        return np.asarray(_Block(self, nbytes))

    def _take(self, nbytes: int) -> int:
        """The offset of free bytes, the first that suffice."""
        with self._lock:
            if self._region is None:
                self._region = self._map()
            return self._take_first(nbytes)

    def _map(self) -> Any:
        try:
            return self._native.heap(self._capacity)
        except TransportError as error:
            raise TransportError(
                f"registered memory wants {self._capacity >> 20} MiB of address space ({error}): lift the limit that "
                "`ulimit -v` shows, or pass ordinary arrays"
            ) from None

    def _take_first(self, nbytes: int) -> int:
        while self._returned:
            self._merge(*self._returned.popleft())
        for index, (offset, available) in enumerate(self._free):
            if available >= nbytes:
                rest = [(offset + nbytes, available - nbytes)] if available > nbytes else []
                self._free[index : index + 1] = rest
                return offset
        raise TransportError(
            f"empty: no {nbytes >> 20} MiB in one piece are left of this rank's {self._region.bytes >> 20} MiB of "
            "registered memory: drop arrays that are not used, or pass ordinary ones"
        )

    def _merge(self, offset: int, nbytes: int) -> None:
        index = bisect.bisect(self._free, (offset, nbytes))
        if index < len(self._free) and self._free[index][0] == offset + nbytes:
            nbytes += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            index -= 1
            before, length = self._free.pop(index)
            offset, nbytes = before, length + nbytes
        self._free.insert(index, (offset, nbytes))


class _Block:
    """Bytes of the heap, as numpy asks for them; arrays on it keep it alive."""

    def __init__(self, memory: RegisteredMemory, nbytes: int) -> None:
        taken = -(-nbytes // PAGE) * PAGE
        offset = memory._take(taken)
        region = memory._region
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (region.address + offset, False),
        }
        weakref.finalize(
            self, _give_back, region, memory._returned, _native.fork_generation(), offset, taken
        ).atexit = False


def _give_back(region: Any, returned: deque[tuple[int, int]], generation: int, offset: int, nbytes: int) -> None:
    if generation != _native.fork_generation():
        return  # a forked child shares the pages, and they are its parent's
    region.forget(offset, nbytes)
    returned.append((offset, nbytes))
