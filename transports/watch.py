"""The watch of a device transport: a thread that looks after what the host does not wait for.

Nothing on the device's way asks the host, so somebody else must see that a peer is lost, that a rank has called
something else, that a run takes too long, and then let go what waits on the device. Ranks tell the next one, over the
host transport, what they have called; each compares it with its own calls. That costs the calls themselves a line in a
list: the watch sends what has gathered, and it looks only while something is under way.

The thread calls the driver for nothing: a call that frees memory, or finds a queue full, waits for the device, others
wait for that call, and the device may wait for a rank that is dead. What has ended the device writes in host memory.

Not promised: that what a run left behind is not read before the watch has seen that the ranks called different things.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import AbcclError, Aborted, ClosedError, DeadlineExceeded, Mismatch, PeerLost
from .contract import USER_TAGS, Request

if TYPE_CHECKING:
    from .device import DeviceExecution, DeviceTransport

TAG = USER_TAGS - 1
"""Of what ranks tell each other."""

TICK, NAP = 0.002, 0.02
"""Seconds between looks, while runs are under way, and where only graphs may be, or a rank has not called yet."""

LETTING_GO = 0.0005
"""Seconds between two times that what waits on the device is let go, at first; TICK after GRACE."""

GRACE = 10.0
"""Seconds that the end of a transport waits for what is under way."""

_LENGTH = 8
_MASK = 0xFFFFFFFF


class _Called(NamedTuple):
    """What a rank has called."""

    number: int
    signature: int
    text: str


class Entry:
    """A run under way."""

    def __init__(self, execution: DeviceExecution, timeout: float) -> None:
        self.text, self.number = execution.prepared.text, execution.number
        self.deadline = time.monotonic() + timeout
        self.late = execution._late


class Watch:
    """Looks after one transport's runs.

    Attributes:
        error: what the transport has failed with.
        begun, ended: where the device counts the runs in graphs.
        done: where it writes which run has ended, the first being 1.
        in_graphs: whether runs have been captured.
    """

    def __init__(self, transport: DeviceTransport) -> None:
        self._transport = transport
        self._left, self._right = (transport.rank - 1) % transport.size, (transport.rank + 1) % transport.size
        self.error: AbcclError | None = None
        self._thread: threading.Thread | None = None
        self._news = threading.Event()
        self._state = threading.Lock()
        self._entries: list[Entry] = []
        self._ending = False
        # What is told, and what is compared.
        self._outbox: deque[_Called] = deque()
        self._mine: dict[int, _Called] = {}
        self._theirs: dict[int, _Called] = {}
        self._heard: _Called | None = None
        self._compared = 0
        self._quiet_since = 0.0
        self._last_heard = -1
        self._bye = False
        self._sending: list[tuple[Request, bytes]] = []
        self._receiving: tuple[Request, bytearray, bool] | None = None
        self._words = transport.driver.allocate_pinned(12)
        self.begun, self.ended, self.done = (self._words + 4 * word for word in range(3))
        ctypes.memset(self._words, 0, 12)
        self.in_graphs = False
        self._counted, self._since = (0, 0), 0.0

    # ---- for the transport

    def begin(self, execution: DeviceExecution) -> None:
        """A run begins."""
        called = _Called(execution.number, execution.prepared.signature, execution.prepared.text)
        entry = Entry(execution, self._transport.timeout)
        with self._state:
            self.in_graphs = self.in_graphs or execution.capture is not None
            if self._transport.size == 1:
                return  # who waits for nobody needs nobody to look after it
            self._outbox.append(called)
            if execution.capture is None:
                self._entries.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name=f"abccl watch of {self._transport.name}")
                self._thread.daemon = True
                self._thread.start()
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """The transport has failed; the first error stays. From any thread."""
        with self._state:
            if self.error is not None:
                return
            self.error = error if isinstance(error, AbcclError) else Aborted(f"the watch failed: {error!r}")
        self._news.set()
        self._transport.on_failure(self.error)

    def about(self, number: int) -> str:
        """What is known of the rank before this one, for a run of this number that is late."""
        if self._heard is None:
            return f"; rank {self._left} has called nothing yet" if self._transport.size > 1 else ""
        return f"; rank {self._left} has last called {self._heard.text} #{self._heard.number + 1}"

    def has_compared(self, number: int) -> bool:
        """Whether the rank before this one is known to have called the same.

        Raises:
            PeerLost: it has closed, and has not.
        """
        if self._transport.size == 1 or number < self._compared:
            return True
        if self._bye and number > self._last_heard:
            raise PeerLost(
                f"{self._transport.name}: rank {self._left} of {self._transport.size} has closed, and called only "
                f"{self._last_heard + 1} collectives: close only after all ranks are done"
            )
        return False

    def is_done(self, number: int) -> bool:
        """Whether the device has ended this run, and so all before it. No call of the driver."""
        return not self._words or 0 < (self._word(2) - number) & _MASK <= _MASK >> 1

    def stop(self) -> bool:
        """What is under way is waited for, for a moment, or let go; then the thread ends. Whether nothing is left."""
        deadline = time.monotonic() + GRACE
        while self._under_way() and not self._transport.is_broken() and time.monotonic() < deadline + GRACE:
            if time.monotonic() > deadline and self.error is None:
                error = ClosedError(f"{self._transport.name} was closed while runs were under way")
                self._transport.host.abort(error)
                self.fail(error)
            time.sleep(LETTING_GO)
        drained = not self._under_way()
        self._ending = True
        self._news.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * GRACE)
        return drained

    def free(self) -> None:
        """Give the words back: nothing is under way, and the device writes them no more."""
        words, self._words = self._words, 0
        self._transport.driver.free_pinned(words)

    # ---- the thread

    def _look(self) -> None:
        try:
            while not self._ending and self.error is None:
                self._news.wait(self._pause())
                self._news.clear()
                self._once()
            if self.error is None:
                self._say_goodbye()
        except BaseException as error:
            self.fail(error)
        if self.error is not None:
            self._transport.host.abort(self.error)
            self._let_go()

    def _once(self) -> None:
        transport = self._transport
        with transport.lock:
            transport.host.progress()
            self._talk()
        transport.wire.check()
        now = time.monotonic()
        for entry in self._entries:
            if now > entry.deadline and not self.is_done(entry.number):
                raise DeadlineExceeded(entry.late())
        if self.in_graphs:
            counted = self._counts()
            if counted != self._counted or counted[0] == counted[1]:
                self._counted, self._since = counted, now
            elif now - self._since > transport.timeout:
                raise DeadlineExceeded(
                    f"{transport.name}: a collective in a CUDA graph is not done after {transport.timeout:g} s on rank "
                    f"{transport.rank} of {transport.size}: has every rank launched its graph?"
                )

    def _pause(self) -> float | None:
        """Seconds until the next look; None: until there is news."""
        if self._under_way():
            self._quiet_since = time.monotonic()
        elif not (self._mine or self._sending or self.in_graphs):
            return None
        return TICK if time.monotonic() - self._quiet_since < 1.0 else NAP

    def _under_way(self) -> bool:
        """Whether runs are; forgets those that have ended."""
        with self._state:
            if self.error is not None:
                self._outbox.clear()
            self._entries = [entry for entry in self._entries if not self.is_done(entry.number)]
            in_graphs = self.in_graphs and len(set(self._counts())) > 1
            return bool(self._entries) or bool(self._outbox) or in_graphs

    def _counts(self) -> tuple[int, int]:
        return self._word(0), self._word(1)

    def _word(self, index: int) -> int:
        return ctypes.c_uint32.from_address(self._words + 4 * index).value

    def _let_go(self) -> None:
        """Let what waits on the device go on, whatever it is, until the transport ends."""
        begin = time.monotonic()
        while not self._ending:
            self._transport.wire.fail()
            time.sleep(LETTING_GO if time.monotonic() - begin < GRACE else TICK)

    # ---- what ranks tell each other

    def _talk(self) -> None:
        """Say what was called since the last time, hear what the rank before has called. The lock is held."""
        called = []
        while self._outbox:
            one = self._outbox.popleft()
            self._mine[one.number] = one
            called.append(one)
        if called:
            self._send(called)
        self._sending = [(request, data) for request, data in self._sending if not request.done]
        while (heard := self._receive()) is not None:
            if not heard:
                self._bye = True
            for number, signature, text in heard:
                self._heard = self._theirs[number] = _Called(number, signature, text)
                self._last_heard = number
        if self._receiving is not None:
            # Who has said goodbye, and who is not needed, may go.
            self._receiving[0].standing = self._bye or not self._entries
        for number in sorted(self._mine.keys() & self._theirs.keys()):
            self._compare(self._mine.pop(number), self._theirs.pop(number))

    def _send(self, called: list[_Called]) -> None:
        body = json.dumps(called).encode()
        for data in (len(body).to_bytes(_LENGTH, "little"), body):
            request = self._transport.host.post_send(self._right, TAG, memoryview(data))
            request.standing = True
            self._sending.append((request, data))

    def _receive(self) -> list[Any] | None:
        """The next words of the rank before this one, if they are there."""
        while True:
            if self._receiving is None:
                self._post(_LENGTH, False)
            assert self._receiving is not None
            request, data, is_body = self._receiving
            if not request.done:
                return None
            if is_body:
                self._post(_LENGTH, False)
                words: list[Any] = json.loads(bytes(data))
                return words
            self._post(int.from_bytes(data, "little"), True)

    def _post(self, length: int, is_body: bool) -> None:
        data = bytearray(length)
        request = self._transport.host.post_recv(self._left, TAG, memoryview(data))
        request.standing = True
        self._receiving = (request, data, is_body)

    def _compare(self, mine: _Called, theirs: _Called) -> None:
        if mine.signature == theirs.signature:
            self._compared = mine.number + 1
            return
        transport = self._transport
        raise Mismatch(
            f"rank {transport.rank} of {transport.size} called {mine.text} #{mine.number + 1}, "
            f"rank {self._left} called {theirs.text} #{theirs.number + 1}: "
            f"all ranks must call the same collectives in the same order"
        )

    def _say_goodbye(self) -> None:
        """Peers that still wait for others need not think that this rank is lost."""
        transport, deadline = self._transport, time.monotonic() + 1.0
        with transport.lock:
            self._send([])
        while self._sending and time.monotonic() < deadline:
            with transport.lock:
                transport.host.progress()
                self._sending = [(request, data) for request, data in self._sending if not request.done]
            time.sleep(0)
