"""Pinned host memory, which a device copies to and from without the host's help; kept and used again."""

from __future__ import annotations

from typing import Any

_LEAST = 4096


class PinnedMemory:
    """Buffers for one device, in sizes of powers of two."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._free: dict[int, list[tuple[int, int]]] = {}
        self._closed = False

    def take(self, nbytes: int) -> PinnedBuffer:
        """A buffer of so many bytes at least; it comes back when the last reference to it goes."""
        size = max(_LEAST, 1 << max(0, nbytes - 1).bit_length())
        for index, (address, event) in enumerate(self._free.get(size, ())):
            if self._driver.is_done(event):
                del self._free[size][index]
                return PinnedBuffer(self, size, address, event)
        return PinnedBuffer(self, size, self._driver.allocate_pinned(size), self._driver.create_event())

    def close(self) -> None:
        """Give all buffers back that are not in use; the others when they come back."""
        self._closed = True
        for size, buffers in self._free.items():
            for address, event in buffers:
                self._give_up(size, address, event)
        self._free.clear()

    def _put(self, size: int, address: int, event: int) -> None:
        if self._closed:
            self._give_up(size, address, event)
        else:
            self._free.setdefault(size, []).append((address, event))

    def _give_up(self, size: int, address: int, event: int) -> None:
        with self._driver.as_current():
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
