"""Ranks that call different things: every rank raises Mismatch with both sides' arguments, whatever they differ in.

The communicator is broken from there on and says so, closes at once, and a new one works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

import abccl
from abccl import CollectiveError, Communicator, DeadlineExceeded, Mismatch
from abccl.collectives.binding import _listed
from abccl.transports import Transport
from abccl.transports.inproc import inproc
from abccl.transports.joint import joint_threads
from abccl.transports.shm import NEVER, ShmTransport, shm_threads

LONG, SHORT = 30.0, 0.3
"""Seconds that a call may take: where it must fail by itself, and where only its deadline can end it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flight records of failures are kept; and no links are measured, which takes longer than all else."""
    monkeypatch.setenv("ABCCL_FLIGHT_DIR", "off")
    monkeypatch.setattr(ShmTransport, "_calibrate", lambda transport: NEVER)


class Call(NamedTuple):
    """A call, and what every rank's error says of it."""

    do: Callable[..., Any]
    words: tuple[str, ...]
    reproducible: bool = False


class Pair(NamedTuple):
    """Two calls that do not go together.

    `both_wait`: the rank of two that calls `a` where both only wait for messages, and none can tell over a network.
    """

    a: Call
    b: Call
    both_wait: int | None = None


def vector(count: int = 12, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.ones(count, dtype)


def all_reduce(count: int = 12, dtype: str = "float32", op: Any = "sum", algorithm: str = "ring") -> Callable[..., Any]:
    return lambda c, **how: c.all_reduce(vector(count, dtype), op, algorithm=algorithm, **how)


def gathered(*counts: int) -> Callable[..., Any]:
    return lambda c, **how: c.all_gather(vector(sum(counts)), vector(counts[c.rank]), counts=counts, **how)


def scattered(*counts: int) -> Callable[..., Any]:
    return lambda c, **how: c.reduce_scatter(vector(counts[c.rank]), vector(sum(counts)), counts=counts, **how)


def exchanged(received: Sequence[int] | None, sent: Sequence[int] | None) -> Callable[..., Any]:
    into, of = sum(received or (6, 6)), sum(sent or (6, 6))
    return lambda c, **how: c.all_to_all(vector(into), vector(of), received, sent, **how)


def rooted(name: str, root: int) -> Call:
    calls: dict[str, Callable[..., Any]] = {
        "broadcast": lambda c, **how: c.broadcast(vector(), root, **how),
        "reduce": lambda c, **how: c.reduce(vector(), root=root, **how),
        "gather": lambda c, **how: c.gather(vector(24), vector(), root, **how),
        "scatter": lambda c, **how: c.scatter(vector(), vector(24), root, **how),
    }
    return Call(calls[name], (f"{name}(float32,", f"root {root}"))


SUM = Call(all_reduce(), ("all_reduce(float32, sum, 12 elements, ring)",))

PAIRS = {
    "collective": Pair(SUM, Call(lambda c, **how: c.broadcast(vector(), **how), ("broadcast(float32, 12 elements",))),
    "barrier": Pair(SUM, Call(lambda c, **how: c.barrier(**how), ("called barrier(",))),
    "size": Pair(SUM, Call(all_reduce(6), ("all_reduce(float32, sum, 6 elements, ring)",))),
    "dtype": Pair(SUM, Call(all_reduce(dtype="int32"), ("all_reduce(int32, sum, 12 elements, ring)",))),
    "dtype and size": Pair(SUM, Call(all_reduce(6, "float64"), ("all_reduce(float64, sum, 6 elements, ring)",))),
    "operator": Pair(SUM, Call(all_reduce(op="max"), ("all_reduce(float32, max, 12 elements, ring)",))),
    "factor": Pair(
        Call(all_reduce(op=abccl.premul_sum(2)), ("premul_sum 2.0",)),
        Call(all_reduce(op=abccl.premul_sum(3)), ("premul_sum 3.0",)),
    ),
    "algorithm": Pair(SUM, Call(all_reduce(algorithm="chain"), ("all_reduce(float32, sum, 12 elements, chain)",))),
    "reproducible": Pair(
        Call(all_reduce(algorithm="tree"), ("all_reduce(float32, sum, 12 elements, tree)",)),
        Call(all_reduce(algorithm="tree"), ("all_reduce(float32, reproducible sum, 12 elements, tree)",), True),
    ),
    "root of broadcast": Pair(rooted("broadcast", 0), rooted("broadcast", 1), both_wait=1),
    "root of scatter": Pair(rooted("scatter", 0), rooted("scatter", 1), both_wait=1),
    "root of reduce": Pair(rooted("reduce", 0), rooted("reduce", 1), both_wait=0),
    "root of gather": Pair(rooted("gather", 0), rooted("gather", 1), both_wait=0),
    "counts of all_gather": Pair(
        Call(gathered(5, 10), ("15 elements in parts [5, 10]",)), Call(gathered(6, 9), ("15 elements in parts [6, 9]",))
    ),
    "counts of reduce_scatter": Pair(
        Call(scattered(5, 10), ("15 elements in parts [5, 10]",)),
        Call(scattered(0, 7), ("7 elements in parts [0, 7]",)),
    ),
    "splits": Pair(
        Call(exchanged([4, 5], [4, 5]), ("sends [4, 5], receives [4, 5]",)),
        Call(exchanged([7, 5], [6, 4]), ("sends [6, 4], receives [7, 5]",)),
    ),
    "splits and none": Pair(
        Call(exchanged(None, None), ("sends [6, 6], receives [6, 6]",)),
        Call(exchanged([3, 9], [3, 9]), ("sends [3, 9], receives [3, 9]",)),
    ),
    "messages": Pair(
        Call(lambda c, **how: c.send(vector(5), 1 - c.rank, **how), ("20",)),
        Call(lambda c, **how: c.recv(vector(6), 1 - c.rank, **how), ("24 bytes",)),
    ),
}

MAKERS: dict[str, Callable[[], Sequence[Transport]]] = {
    "shm": lambda: shm_threads(2),
    "joint near": lambda: joint_threads([[0, 1]]),
    "joint": lambda: joint_threads([[0], [1]]),
    "inproc": lambda: inproc(2),
}


def errors(calls: Sequence[Callable[[], Any]]) -> list[Exception | None]:
    """What each of the calls raises."""
    found: list[Exception | None] = []
    for call in calls:
        try:
            call()
            found.append(None)
        except CollectiveError as error:
            found.append(error)
    return found


def run(call: Call, asynchronous: bool, c: Communicator) -> list[Exception | None]:
    """The errors of a barrier, of the call, and of three that follow.

    A rank may learn of the mismatch before the others have left the barrier; one that waits for no message after it.
    """

    def once() -> None:
        work = call.do(c, async_op=asynchronous)
        if asynchronous:
            work.wait()

    return errors([c.barrier, once, c.barrier, c.barrier, lambda: c.recv(vector(), (c.rank + 1) % c.size)])


def communicators(transports: Sequence[Transport], calls: Sequence[Call], timeout: float = LONG) -> list[Communicator]:
    return [
        Communicator(transport, timeout=timeout, reproducible=call.reproducible)
        for transport, call in zip(transports, calls, strict=True)
    ]


def side_by_side(group: Sequence[Communicator], body: Callable[..., Any], *by_rank: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(body, *by_rank, group))


def check(found: list[Exception | None], calls: Sequence[Call], kind: type[Exception]) -> None:
    """One rank's errors: the first says what both called, later ones that the communicator is broken."""
    raised = [error for error in found if error is not None]
    assert len(raised) >= len(found) - 2, found
    first, *later = raised
    assert type(first) is kind, first
    for call in calls:
        for words in call.words:
            assert kind is not Mismatch or words in str(first), first
    for error in later:
        assert type(error) is kind and "since then the communicator is broken: close it and make another" in str(error)


def sum_works(c: Communicator) -> None:
    x = np.full(5, c.rank + 1.0)
    c.all_reduce(x)
    assert np.array_equal(x, np.full(5, c.size * (c.size + 1) / 2))


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", PAIRS)
def test_both_sides_are_told_on_both_ranks(name: str, maker: str, order: int) -> None:
    pair = PAIRS[name]
    calls = (pair.b, pair.a) if order else (pair.a, pair.b)
    silent = pair.both_wait == order and maker in ("joint", "inproc")
    for forms in [(False, False)] if silent else [(False, False), (True, True), (False, True)]:
        group = communicators(MAKERS[maker](), calls, SHORT if silent else LONG)
        for found in side_by_side(group, run, calls, forms):
            check(found, calls, DeadlineExceeded if silent else Mismatch)
        begun = time.monotonic()
        for c in group:
            c.close()
        assert time.monotonic() - begun < 10
    group = [Communicator(transport, timeout=LONG) for transport in MAKERS[maker]()]
    side_by_side(group, sum_works)
    for c in group:
        c.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda: shm_threads(3),
        lambda: joint_threads([[0, 2], [1]]),
        lambda: joint_threads([[0, 1], [2]]),
        lambda: inproc(3),
    ],
    ids=["shm", "joint apart", "joint near", "inproc"],
)
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_third_rank_is_told_too(make: Callable[[], Sequence[Transport]], odd: int) -> None:
    other = PAIRS["size"].b
    calls = [other if rank == odd else SUM for rank in range(3)]
    group = communicators(make(), calls)
    for found in side_by_side(group, run, calls, [False] * 3):
        check(found, [SUM, other], Mismatch)
        assert f"rank {odd}" in str(next(error for error in found if error))
    for c in group:
        c.close()


def test_one_may_wait_and_the_other_not() -> None:
    """The same call is the same whether its caller waits for it or not."""
    for maker in MAKERS.values():
        calls = (SUM, SUM)
        group = communicators(maker(), calls)
        side_by_side(group, lambda asynchronous, c: all_reduce()(c, async_op=asynchronous), (False, True))
        assert side_by_side(group, lambda c: errors([c.barrier])) == [[None]] * 2
        for c in group:
            c.close()


@pytest.mark.parametrize("maker", MAKERS)
def test_sizes_that_change_from_call_to_call_are_the_present_ones(maker: str) -> None:
    """What one exchange sends tells nothing of the next, which is the same call."""
    call = Call(exchanged([7, 5], [6, 4]), ("sends [6, 4], receives [7, 5]",))
    other = Call(exchanged([4, 5], [4, 5]), ("sends [4, 5], receives [4, 5]",))

    def body(mine: Call, c: Communicator) -> list[Exception | None]:
        for _ in range(100):  # longer than what ranks remember of each other
            exchanged([3, 9] if c.rank == 0 else [9, 1], [3, 9] if c.rank == 0 else [9, 1])(c)
        return run(mine, False, c)

    group = communicators(MAKERS[maker](), (call, other))
    for found in side_by_side(group, body, (call, other)):
        check(found, (call, other), Mismatch)
    for c in group:
        c.close()


def test_of_many_sizes_the_first_are_told_and_a_difference_in_the_others_is_seen() -> None:
    many = [1000 + number for number in range(64)]
    other = [*many[:-1], 7]
    assert _listed(many).startswith("[1000, 1001, 1002, ") and len(_listed(many)) <= 50
    assert _listed(many) != _listed(other)
    assert _listed([]) == "[]" and _listed(range(8)) == "[0, 1, 2, 3, 4, 5, 6, 7]"


def differ(name: str) -> tuple[list[str], float]:
    """In a process of its own: the two calls, the end, and another communicator."""
    pair = PAIRS[name]
    c = abccl.init(timeout=LONG)
    found = run((pair.a, pair.b)[c.rank], False, c)
    begun = time.monotonic()
    c.close()
    seconds = time.monotonic() - begun
    with abccl.init(timeout=LONG) as another:
        sum_works(another)
        another.barrier()
    return [repr(error) for error in found if error is not None], seconds


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["splits"])
def test_processes(here: ModuleType, name: str) -> None:
    for texts, seconds in abccl.spawn(here.differ, 2, (name,), timeout=60):
        assert texts[0].startswith("Mismatch(") and seconds < 10
        assert all(words in texts[0] for call in (PAIRS[name].a, PAIRS[name].b) for words in call.words)
