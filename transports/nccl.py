"""NCCL, by cupy: a plan's messages as ncclSend and ncclRecv on the stream of the run.

A step is one group: NCCL starts all its sends and receives together, so ranks that send to each other do not wait for
each other in vain. Between two ranks NCCL matches messages in their order. It counts bytes by size_t, so no message is
too long for it. Ranks send nothing to themselves.

The first messages from one rank to another make NCCL connect them, and the host waits until both have come to it: it
is not done beforehand for all pairs, since a connection takes some MiB of device memory for each of its channels.

What waits on the device goes on when its communicator is aborted. NCCL frees the communicator's memory then, so an
abort first waits for those who are using it; but not for long, since only an abort frees who hangs in it. NCCL also
waits until all CUDA graphs with the communicator's operations are destroyed. So a thread of its own makes the abort.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..errors import AbcclError, Aborted, PeerLost, TransportError
from .commands import Command, Incoming, Outgoing, StepWire, offsets
from .contract import NativeCall
from .growing import Growing
from .nccl_collectives import COLLECTIVES, Call, NativeCalls
from .nccl_meeting import TIMEOUT, meet, within
from .topology import Exchange

GRACE = 2.0
"""Seconds that an abort waits for those who use the communicator, and `close` for NCCL."""

_REMOTE_ERROR = 6  # ncclRemoteError


def nccl_wire(
    exchange: Exchange, rank: int, size: int, driver: Any, nccl: Any = None, timeout: float = TIMEOUT
) -> NcclWire:
    """The wire of a new communicator of NCCL's. Collective; two exchanges.

    Args:
        nccl: the module cupy.cuda.nccl, or what stands for it; None finds it.
        timeout: seconds to wait for all ranks.

    Raises:
        TransportError: on all ranks, if one has no NCCL, theirs differ, ranks share a GPU where NCCL does not allow it,
            or NCCL fails.
    """
    return NcclWire(*meet(exchange, rank, size, driver, nccl, timeout), driver, rank, size)


class NcclWire(StepWire):
    """A `Wire` over one of NCCL's communicators, which it owns.

    Args:
        nccl: the module cupy.cuda.nccl. Used are groupStart, groupEnd, NcclError, and of a communicator send, recv,
            check_async_error, abort and destroy; and its collectives.
    """

    name = "nccl"
    lanes = 1
    slot_bytes = 1 << 26  # longer messages go in segments: what is received needs memory
    host_driven = False
    collectives = COLLECTIVES

    def __init__(self, nccl: Any, communicator: Any, driver: Any, rank: int, size: int) -> None:
        self.nccl, self.communicator, self.driver, self.rank, self.size = nccl, communicator, driver, rank, size
        self._using = threading.Lock()  # of the communicator
        self._state = threading.Lock()  # of the next two
        self._aborting: threading.Thread | None = None
        self._closed = False
        self._registers = Growing(driver)
        self.token = driver.allocate(2)

    def compile(self, lane: int) -> NcclWirePlan:
        """See `StepWire.compile`."""
        return NcclWirePlan(self)

    def prepare_native(self, call: NativeCall) -> Callable[[int, int], list[list[Command]]]:
        """A collective of NCCL's as commands.

        Raises:
            ArgumentError: NCCL lacks the type or the operator.
        """
        calls = NativeCalls(self, call)
        return lambda input, output: [calls.make(input, output)]

    def grouped(self, calls: Sequence[Call]) -> Command:
        """A command that hands all calls to NCCL in one group."""
        return partial(self._enqueue, tuple(calls))

    def registers(self, nbytes: int) -> int:
        """Device memory for what a run receives."""
        return self._registers.take(nbytes)

    def fail(self) -> None:
        """See `Wire.fail`: abort the communicator."""
        with self._state:
            if self._aborting is not None or self._closed:
                return
            self._aborting = threading.Thread(
                target=self._abort, name=f"abccl nccl abort, rank {self.rank}", daemon=True
            )
        with contextlib.suppress(RuntimeError):  # no threads any more: the process ends
            self._aborting.start()

    def check(self) -> None:
        """Raise NCCL's asynchronous error, if there is one.

        Raises:
            PeerLost: NCCL lost a peer.
            TransportError: anything else.
        """
        # Who has the lock hears of errors by itself.
        if not self._using.acquire(blocking=False):
            return
        try:
            if self._aborting is None and not self._closed:
                self.communicator.check_async_error()
        except (self.nccl.NcclError, KeyError) as error:  # a KeyError is cupy's word for a status that it does not know
            raise self._error(error) from error
        finally:
            self._using.release()

    def close(self) -> None:
        """See `Wire.close`. NCCL wants all ranks of a host to do so, and all CUDA graphs of it to be destroyed: if they
        are not, its memory is left to it."""
        with self._state:
            if self._closed:
                return
            self._closed = True
        if self._aborting is not None:
            with contextlib.suppress(RuntimeError):  # it could not be started
                self._aborting.join(GRACE)
            ended = not self._aborting.is_alive()
        else:
            ended = within(GRACE, self.communicator.destroy)
        if ended:
            self._registers.free()
            self.driver.free(self.token)

    def _enqueue(self, calls: Sequence[Call], stream: int) -> None:
        with self._using:
            if self._aborting is not None or self._closed:
                raise Aborted(
                    f"nccl: rank {self.rank} of {self.size}: the communicator was aborted or closed: make a new one"
                )
            try:
                self.nccl.groupStart()
                try:
                    for call in calls:
                        call(stream)
                finally:
                    self.nccl.groupEnd()
            except (self.nccl.NcclError, KeyError) as error:
                raise self._error(error) from error

    def _abort(self) -> None:
        got = self._using.acquire(timeout=GRACE)
        try:
            with contextlib.suppress(Exception):
                self.communicator.abort()
        finally:
            if got:
                self._using.release()

    def _error(self, error: Exception) -> AbcclError:
        says = f"nccl: rank {self.rank} of {self.size}: NCCL says {error}"
        if getattr(error, "status", (*error.args, None)[0]) == _REMOTE_ERROR:
            return PeerLost(
                f"{says}: a peer has ended, or the network to it has: look at the output of the other ranks"
            )
        return TransportError(f"{says}: NCCL_DEBUG=WARN makes it tell more; close this communicator and make a new one")


class NcclWirePlan:
    """The messages of a run: see `WirePlan`. Parts are sent one by one, empty ones not at all; of a message whose parts
    are all empty a byte is sent, since its receiver waits for it."""

    def __init__(self, wire: NcclWire) -> None:
        self._wire, self._taken = wire, 0

    def step(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> tuple[list[Command], list[int]]:
        """See `WirePlan.step`."""
        wire = self._wire
        byte, send, receive = wire.nccl.NCCL_UINT8, wire.communicator.send, wire.communicator.recv
        calls: list[Call] = []
        for message in sends:
            pieces = [piece for piece in message.pieces if piece[1]] or [(wire.token, 1)]
            calls += [
                partial(send, address, nbytes, byte, peer) for peer in message.peers for address, nbytes in pieces
            ]
        begins = []
        for peer, sizes in receives:
            *starts, end = offsets(sizes)
            begin = self._take(end)
            begins.append(begin)
            pieces = [(begin + start, size) for start, size in zip(starts, sizes) if size] or [(wire.token + 1, 1)]
            calls += [partial(receive, address, nbytes, byte, peer) for address, nbytes in pieces]
        return [wire.grouped(calls)], begins

    def release(self) -> list[Command]:
        """See `WirePlan.release`: the stream's order keeps what comes next behind the reads."""
        self._taken = 0
        return []

    def finish(self) -> list[Command]:
        """See `WirePlan.finish`."""
        return []

    def _take(self, nbytes: int) -> int:
        """Registers beside those of this step."""
        begin = self._wire.registers(self._taken + nbytes) + self._taken
        self._taken += nbytes
        return begin
