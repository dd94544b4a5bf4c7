"""Messages of arrays in the memory of a CUDA device: through pinned host memory, by the host side's messages.

So they have tags, may come from anybody, and are in nobody's way. A send waits for the current stream, which must have
made the array; what is received is brought to the device by the stream that is current when somebody waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..transports import device
from .arrays import Array, View, current_stream
from .pinned import PinnedBuffer, PinnedMemory
from .work import Work


def ordinal_of(found: View) -> int:
    """The number of the device that an array is on.

    Raises:
        TransportError: the array does not tell, and there is no driver to ask.
    """
    ordinal = found.device.partition(":")[2]
    return int(ordinal) if ordinal else device.device_of(found.address)


class DeviceMessages:
    """A communicator's messages of arrays on one device. Local: ranks need not meet.

    Args:
        ordinal: the device.
    """

    def __init__(self, ordinal: int) -> None:
        self._driver = device.driver_of(ordinal)
        self._pinned = PinnedMemory(self._driver)

    def message(
        self,
        transfer: Callable[..., Any],
        call: str,
        x: Array,
        found: View,
        peer: int,
        tag: int | None,
        asynchronous: bool,
    ) -> Any:
        """A send or a recv: see `Communicator.send`, `Communicator.recv`.

        Args:
            transfer: the host side's: (call, peer, tag, address, bytes, what to keep, asynchronous) -> work.
        """
        nbytes, sends = found.count * found.itemsize, call == "send"
        with self._driver.as_current():
            buffer = self._pinned.take(nbytes)
            if sends:
                stream = current_stream(x)
                self._driver.copy(buffer.address, found.address, nbytes, stream)
                self._driver.synchronize(stream)
        work = transfer(call, peer, tag, buffer.address, nbytes, buffer, True)
        if not sends:
            work = Arrival(work, self._driver, x, found, buffer)
        if asynchronous:
            return work
        work.wait()
        return None if sends else work.source

    def close(self) -> None:
        """Give everything back."""
        self._pinned.close()


class Arrival(Work):
    """A message that is received, and how it gets to the device."""

    def __init__(self, work: Any, driver: Any, x: Array, found: View, buffer: PinnedBuffer) -> None:
        self._work, self._driver, self._x = work, driver, x
        self._address, self._nbytes = found.address, found.count * found.itemsize
        self._buffer, self._event, self._lock = buffer, 0, threading.Lock()

    def finishes_within(self, timeout: float | None) -> bool:
        """See `Work.finishes_within`: the host waits for the message, then the current stream brings it."""
        if not self._work.finishes_within(timeout):
            return False
        stream = current_stream(self._x)
        with self._lock, self._driver.as_current():
            if self._event:  # it is brought, maybe by another stream
                self._driver.wait_event(stream, self._event)
            else:
                self._driver.copy(self._address, self._buffer.address, self._nbytes, stream)
                self._event = self._buffer.used_on(stream)
        return True

    def is_completed(self) -> bool:
        """See `Work.is_completed`: whether waiting would not wait for a peer."""
        return bool(self._work.is_completed())

    @property
    def source(self) -> int:
        """The rank that a finished receive came from."""
        return int(self._work.source)
