"""Messages between two ranks, as `p2p` measures them: the patterns, their cases, the calls they are made of.

The patterns are those of osu_latency, osu_bw and osu_bibw. The first rank of the pair is the sender of `bandwidth`.

    latency         one sends and the other answers by a message of the same size; the time is half of that
    bandwidth       WINDOW sends are posted, all are waited for, then a short message says that they have arrived
    bidirectional   both post WINDOW receives and WINDOW sends, and wait for all

As there, every message of a window is of the same buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from ..transports.types import element_type
from .collectives import Case, counts
from .measure import Call

WINDOW = 64
"""Messages that are under way at a time, as in osu_bw."""

DATA, DONE = 1, 2
"""Tags: of a message, and of the one that says that a window has arrived."""


class Pattern(Enum):
    """How messages follow each other."""

    LATENCY = "latency"
    BANDWIDTH = "bandwidth"
    BIDIRECTIONAL = "bidirectional"


@dataclass(frozen=True)
class Exchange:
    """One line of the table: a pattern with messages of one size.

    Attributes:
        pattern: which.
        dtype: the element type.
        count: elements of a message.
        ranks: how many were started; all but two are idle.
        pair: the two.
    """

    pattern: Pattern
    dtype: str
    count: int
    ranks: int
    pair: tuple[int, int]
    op = ""
    in_place = False
    least_bytes = 0

    @property
    def x_count(self) -> int:
        """Elements of the buffer `x`, which is sent."""
        return self.count

    @property
    def out_count(self) -> int:
        """Elements of the buffer `out`, into which is received."""
        return self.count

    @property
    def size(self) -> int:
        """Bytes of a message."""
        return self.count * element_type(self.dtype).itemsize

    @property
    def text(self) -> str:
        """It in words, for messages."""
        return f"messages of {self.count} {self.dtype}"

    @property
    def messages(self) -> int:
        """The messages that follow each other in one call, so that a message takes that part of its time."""
        return 2 if self.pattern is Pattern.LATENCY else WINDOW

    def source(self, rank: int) -> int | None:
        """The rank whose message `rank` has in the end, if it gets one."""
        first, second = self.pair
        if rank == second:
            return first
        return second if rank == first and self.pattern is not Pattern.BANDWIDTH else None

    def algbw(self, seconds: float) -> float:
        """The bandwidth in GB/s, both ways together where messages go both ways at a time."""
        return self.size * (2 if self.pattern is Pattern.BIDIRECTIONAL else 1) / seconds / 1e9

    def busbw(self, seconds: float) -> float:
        """The same: what a message needs of its link."""
        return self.algbw(seconds)


AnyCase = Case | Exchange


def exchanges(ranks: int, pair: tuple[int, int], sizes: tuple[int, int, int], dtype: str) -> Iterator[Exchange]:
    """The cases, pattern by pattern, from the smallest to the largest size."""
    for pattern in Pattern:
        for count in counts(sizes, element_type(dtype).itemsize):
            yield Exchange(pattern, dtype, count, ranks, pair)


class Endpoint(NamedTuple):
    """How a library sends to the other rank and receives from it; the calls get a message and a tag.

    Attributes:
        x, out: what is sent, and into what is received.
        ends: the first element of each: the message that ends a window.
        send, receive: return when that is done.
        post_send, post_receive: return what `wait_all` waits for.
    """

    x: Any
    out: Any
    ends: tuple[Any, Any]
    send: Callable[[Any, int], object]
    receive: Callable[[Any, int], object]
    post_send: Callable[[Any, int], Any]
    post_receive: Callable[[Any, int], Any]
    wait_all: Callable[[list[Any]], object]


def exchange(case: Exchange, rank: int, end: Endpoint) -> Call:
    """The rank's part, ready to be made."""
    x, out, (done, was_done), send, receive, post_send, post_receive, wait_all = end
    sends = rank == case.pair[0]

    def ping() -> None:
        send(x, DATA)
        receive(out, DATA)

    def pong() -> None:
        receive(out, DATA)
        send(x, DATA)

    def send_window() -> None:
        wait_all([post_send(x, DATA) for _ in range(WINDOW)])
        receive(was_done, DONE)

    def receive_window() -> None:
        wait_all([post_receive(out, DATA) for _ in range(WINDOW)])
        send(done, DONE)

    def both() -> None:
        requests = [post_receive(out, DATA) for _ in range(WINDOW)]
        wait_all([*requests, *(post_send(x, DATA) for _ in range(WINDOW))])

    if case.pattern is Pattern.LATENCY:
        return ping if sends else pong
    if case.pattern is Pattern.BANDWIDTH:
        return send_window if sends else receive_window
    return both


def idle() -> None:
    """The part of all other ranks."""
