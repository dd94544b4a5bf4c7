"""Messages between two ranks of a communicator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .arrays import CPU, Array, View, bytes_at, view
from .driver import DrivenWork, Driver
from .mailbox import ANY_SOURCE


class MessageCalls(ABC):
    """The calls of a communicator that send and receive messages."""

    rank: int
    size: int
    timeout: float
    _native: Any
    _driver: Driver
    _messages: list[Any]

    @abstractmethod
    def _messages_on_device(self, found: View) -> Any:
        """Those of arrays on the device that this one is on."""

    @abstractmethod
    def _check_usable(self) -> None:
        """Refuse a communicator that is closed, or of the parent process."""

    def send(self, x: Array, peer: int, tag: int = 0, *, async_op: bool = False) -> Any:
        """Send `x` to `peer`, which receives it by `recv` with the same tag. Returns when `x` may be changed.

        Never in the way of a collective. Returns a Work at once with `async_op`.

        Raises:
            ArgumentError, CollectiveError: as in `all_reduce`.
        """
        return self._message("send", x, peer, tag, async_op)

    def recv(self, x: Array, peer: int | None = None, tag: int | None = None, *, async_op: bool = False) -> Any:
        """Receive into `x` what `peer` (any rank if None) sends with `tag` (any if None), in the order sent.

        Returns the rank that it came from; a Work at once with `async_op` (its `source` is that rank, when finished).

        Raises:
            Mismatch: the message has another number of bytes than `x`.
            ArgumentError, CollectiveError: as in `all_reduce`.
        """
        return self._message("recv", x, peer, tag, async_op)

    def wait_message(self, work: Any) -> None:
        """Wait in this thread for a send or recv with `async_op`: for a short message sooner than `work.wait()`."""
        self._check_usable()
        if isinstance(work, DrivenWork):
            work.wait()
        else:
            self._native.wait_message(work)

    def _message(self, call: str, x: Array, peer: int | None, tag: int | None, asynchronous: bool) -> Any:
        self._check_usable()
        sends = call == "send"
        buffer = view(x, "x", call, writable=not sends)
        if peer is None and not sends:
            peer = ANY_SOURCE
        elif not isinstance(peer, (int, np.integer)) or peer == self.rank or not 0 <= peer < self.size:
            raise ArgumentError(
                f"{call}: peer must be another rank from 0 to {self.size - 1}, and is {peer!r} on rank {self.rank}"
            )
        if tag is not None and tag < 0:
            raise ArgumentError(f"{call}: tag must not be negative, and is {tag}")
        if buffer.device != CPU:
            return self._messages_on_device(buffer).message(self._transfer, call, x, buffer, peer, tag, asynchronous)
        return self._transfer(call, peer, tag, buffer.address, buffer.count * buffer.itemsize, x, asynchronous)

    def _transfer(
        self, call: str, peer: int, tag: int | None, address: int, nbytes: int, keep: Any, asynchronous: bool
    ) -> Any:
        work: Any
        if self._native is None:
            data = bytes_at(address, nbytes, keep)
            if call == "send":
                work = self._driver.send(peer, tag or 0, data, self.timeout, keep)
            else:
                work = self._driver.receive(peer, tag, data, self.timeout, keep)
            if asynchronous:
                self._driver.in_background()
        elif call == "send":
            work = self._native.post_send(peer, tag or 0, address, nbytes, keep, self.timeout, asynchronous)
        else:
            work = self._native.post_receive(peer, tag, address, nbytes, keep, self.timeout, asynchronous)
        if asynchronous:
            self._messages = [pending for pending in self._messages if not pending.is_completed()]
            self._messages.append(work)
            return work
        self.wait_message(work)
        return None if call == "send" else work.source
