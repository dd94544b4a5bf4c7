"""Pinned host memory, which a device copies to and from without the host's help; kept and used again."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from ..errors import AbcclError

_LEAST = 4096


class PinnedMemory:
    """Buffers for one device, in sizes of powers of two."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._free: dict[int, list[tuple[int, int]]] = {}
        self._lock = threading.RLock()  # buffers come back in any thread, also in the middle of `take`
        self._closed = False

    def take(self, nbytes: int) -> PinnedBuffer:
        """A buffer of so many bytes at least; it comes back when the last reference to it goes."""
        size = max(_LEAST, 1 << max(0, nbytes - 1).bit_length())
        with self._lock:
            free, busy = self._free.pop(size, []), list[tuple[int, int]]()
            while free:
                address, event = free.pop()
                if self._driver.is_done(event):
                    self._free.setdefault(size, []).extend([*free, *busy])
                    return PinnedBuffer(self, size, address, event)
                busy.append((address, event))
            if busy:
                self._free.setdefault(size, []).extend(busy)
        return PinnedBuffer(self, size, self._driver.allocate_pinned(size), self._driver.create_event())

    def close(self) -> None:
        """Give all buffers back that are not in use; the others when they come back."""
        with self._lock:
            self._closed = True
            for size, buffers in self._free.items():
                for address, event in buffers:
                    self._give_up(size, address, event)
            self._free.clear()

    def _put(self, size: int, address: int, event: int) -> None:
        with self._lock:
            if self._closed:
                self._give_up(size, address, event)
            else:
                self._free.setdefault(size, []).append((address, event))

    def _give_up(self, size: int, address: int, event: int) -> None:
        # Of a device that has failed nothing can be given back.
        with contextlib.suppress(AbcclError), self._driver.as_current():
            self._driver.synchronize_event(event)
            self._driver.free_pinned(address)
            self._driver.destroy_event(event)


class PinnedBuffer:
    """One buffer.

    Attributes:
        address: where it begins.
    """

    def __init__(self, memory: PinnedMemory, size: int, address: int, event: int) -> None:
        self._memory, self._size, self.address, self._event = memory, size, address, event

    def used_on(self, stream: int) -> int:
        """The last copy to or from it is enqueued there: the event behind that, good for as long as the buffer."""
        self._memory._driver.record(self._event, stream)
        return self._event

    def __del__(self) -> None:
        self._memory._put(self._size, self.address, self._event)
