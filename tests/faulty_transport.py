"""A transport with one fault: at the n-th pass of one of its verbs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from abccl.errors import Aborted, TransportError
from abccl.transports import Transport
from abccl.transports.portable import PortablePlan

DELAY = 0.01
"""Seconds."""


class FaultyTransport(Transport):
    """As another transport, but for one call of one verb.

    Args:
        inner: the other.
        verb: "post_send", "post_recv", "progress" or "idle".
        action: "delay"; "abort", by this rank; "refuse", the verb raises; "close", this rank leaves. "" counts only.
        at: the number of the call, from 0.

    Attributes:
        passes: how often the verb was called.
    """

    name = "faulty"

    def __init__(self, inner: Transport, verb: str, action: str, at: int) -> None:
        self.inner, self.verb, self.action, self.at = inner, verb, action, at
        self.rank, self.size = inner.rank, inner.size
        self.slot_bytes, self.lanes = inner.slot_bytes, inner.lanes
        self.passes = 0

    def _pass(self, verb: str) -> None:
        if verb != self.verb:
            return
        self.passes += 1
        if self.passes - 1 != self.at:
            return
        if self.action == "delay":
            time.sleep(DELAY)
        elif self.action == "abort":
            self.inner.abort(Aborted(f"rank {self.rank}: an injected fault"))
        elif self.action == "refuse":
            raise TransportError("an injected fault")
        elif self.action == "close":
            self.inner.close()

    def post_send(self, peer: int, tag: int, data: memoryview) -> Any:
        self._pass("post_send")
        return self.inner.post_send(peer, tag, data)

    def post_recv(self, peer: int, tag: int, into: memoryview) -> Any:
        self._pass("post_recv")
        return self.inner.post_recv(peer, tag, into)

    def progress(self) -> None:
        self._pass("progress")
        self.inner.progress()

    def idle(self, deadline: float) -> None:
        self._pass("idle")
        self.inner.idle(deadline)

    def abort(self, error: Exception) -> None:
        self.inner.abort(error)

    def close(self) -> None:
        self.inner.close()

    def prepare(self, plan: Any, operation: Any) -> Any:
        return PortablePlan(self, plan, operation)

    def set_bell(self, ring: Callable[[], None]) -> bool:
        return self.inner.set_bell(ring)
