"""Device memory for the run under way, which all runs of a transport share, as they follow each other."""

from __future__ import annotations

from typing import Any


class Growing:
    """Memory that grows to the most that was asked for.

    Args:
        driver: of the device.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._address, self._nbytes = 0, 0
        self._blocks: list[int] = []

    def take(self, nbytes: int) -> int:
        """So many bytes, undefined. What was given before stays valid: commands and graphs were made with it; it is
        less than this one together."""
        if nbytes > self._nbytes:
            self._nbytes = max(nbytes, 2 * self._nbytes)
            self._address = int(self._driver.allocate(self._nbytes))
            self._blocks.append(self._address)
        return self._address

    def free(self) -> None:
        """Give it back; nothing uses it any more."""
        for address in self._blocks:
            self._driver.free(address)
        self._blocks.clear()
        self._address, self._nbytes = 0, 0
