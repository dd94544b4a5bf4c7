"""What goes wrong, and what the errors say: bad input, mismatched calls, deadlines, lost peers, interrupts, forks."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import abccl
from abccl import Communicator
from abccl.collectives import launch
from abccl.transports.shm import shm_threads


def outcome(call: Callable[[], Any]) -> str:
    """The error of a call as text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def threads(size: int, body: Callable[[Communicator], Any]) -> list[Any]:
    """What `body` returns on each rank; the ranks are threads."""
    communicators = [Communicator(transport, timeout=60) for transport in shm_threads(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(body, communicators))


def frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


X = np.ones(6, "float32")

BAD: list[tuple[Callable[[Communicator], Any], str]] = [
    (lambda c: c.all_reduce(np.ones((4, 4))[:, ::2]), "not contiguous"),
    (lambda c: c.all_reduce(frozen(np.ones(3))), "read-only"),
    (lambda c: c.all_reduce([1, 2]), "must be a numpy array, torch tensor or CuPy array, and is list"),
    (lambda c: c.all_reduce(np.ones(3, "U2")), "element type str"),
    (lambda c: c.all_reduce(X.astype(">f4")), "byte order"),
    (lambda c: c.all_reduce(X, "summ"), "no operator is called 'summ'"),
    (lambda c: c.all_reduce(X, "band"), "band is defined for"),
    (lambda c: c.all_reduce(X.astype("int32"), "avg"), "avg is defined for"),
    (lambda c: c.all_reduce(X, "premul_sum"), "wants its factor"),
    (lambda c: c.all_reduce(X, algorithm="rign"), "did you mean ring"),
    (lambda c: c.all_reduce(X, out=np.empty(5, "float32")), "out must have 6 elements"),
    (lambda c: c.all_reduce(X, out=np.empty(6)), "both must be of one type"),
    (lambda c: c.broadcast(X, 7), "root must be a rank from 0 to 1, and is 7"),
    (lambda c: c.broadcast(X, -1), "root must be a rank"),
    (lambda c: c.all_gather(np.empty(3, "float32"), X), "out must have 2 x 6 = 12 elements, and has 3"),
    (lambda c: c.reduce_scatter(np.empty(2, "float32"), X), "x must have 2 x 2 = 4 elements, and has 6"),
    (lambda c: c.gather(None, X, c.rank), "out must be an array"),
    (lambda c: c.scatter(np.empty(3, "float32"), None, c.rank), "x must be an array"),
    (lambda c: c.all_to_all(X, X), "overlap"),
    (lambda c: c.all_to_all(np.empty(6, "float32"), X, [1, 2], [3, 3]), "add up to 3"),
    (lambda c: c.all_to_all(np.empty(5, "float32"), np.ones(5, "float32")), "pass out_splits"),
    (lambda c: c.send(X, c.rank), "peer must be another rank"),
    (lambda c: c.recv(np.empty(3), 5), "peer must be another rank"),
    (lambda c: c.send(X, 1 - c.rank, -3), "tag must not be negative"),
]


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    def body(c: Communicator) -> list[str]:
        texts = [outcome(lambda call=call: call(c)) for call, _ in BAD]
        c.barrier()  # still usable
        return texts

    for texts in threads(2, body):
        for text, (_, wanted) in zip(texts, BAD, strict=True):
            assert wanted in text and text.split(":")[0] in ("ArgumentError", "UnknownAlgorithm"), text


def mismatch(case: int) -> list[str]:
    """Rank 0 and rank 1 call different things."""
    c = abccl.init(timeout=20)
    x = np.ones(12, "float32")
    c.barrier()
    first = c.rank == 0
    calls: list[Callable[[], Any]] = [
        lambda: c.all_reduce(x) if first else c.broadcast(x),
        lambda: c.all_reduce(x) if first else c.all_reduce(x[:6]),
        lambda: c.all_reduce(x) if first else c.all_reduce(x.astype("float64")),
        lambda: c.all_reduce(x) if first else c.all_reduce(x, "max"),
        lambda: c.all_reduce(x) if first else c.all_reduce(x, algorithm="chain"),
        lambda: c.barrier() if first else c.all_reduce(x),
        lambda: c.broadcast(x, c.rank),
        lambda: c.reduce(x, root=c.rank),
        lambda: c.broadcast(x, 1 - c.rank),
    ]
    texts = [outcome(calls[case]), outcome(c.barrier)]
    c.close()
    return texts


@pytest.mark.ranks
@pytest.mark.parametrize("case", range(9))
def test_a_mismatch_is_raised_on_both_ranks_and_names_both_calls(here: ModuleType, case: int) -> None:
    for texts in abccl.spawn(here.mismatch, 2, (case,), timeout=60):
        found = [text for text in texts if text.startswith("Mismatch: ")]
        assert found, texts
        assert 'collective #2 in group "default": ' in found[0]
        assert "rank 0 called " in found[0] and "rank 1 called " in found[0]


def waits_for_an_absent_rank() -> list[str]:
    c = abccl.init(timeout=60)
    c.barrier()
    if c.rank == 1:  # is there, and does something else until the others have given up
        return [outcome(lambda: c.recv(np.ones(5), 0))]
    c.set_timeout(0.3)
    x = np.ones(5)
    return [outcome(lambda: c.all_reduce(x, algorithm="ring")), outcome(c.barrier)]


@pytest.mark.ranks
def test_a_deadline_names_who_is_missing_on_every_rank(here: ModuleType) -> None:
    for texts in abccl.spawn(here.waits_for_an_absent_rank, 3, timeout=60):
        title = 'all_reduce #2 (float64, sum, 5 elements, ring) in group "default"'
        assert texts[0].startswith(f"DeadlineExceeded: {title}: rank ")
        assert " waits at step " in texts[0]
        assert "rank 1" in texts[0]
        assert re.search(r"rank 1(, which|) has not entered #2 \(last: barrier #1, finished \d+\.\d s ago\)", texts[0])
        assert all("broken: close it" in later for later in texts[1:])


def loses_a_peer(folder: str) -> None:
    c = abccl.init(timeout=60)
    c.barrier()
    if c.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    text = outcome(lambda: c.all_reduce(np.ones(5)))
    with open(f"{folder}/{c.rank}", "w") as file:
        file.write(text)


@pytest.mark.ranks
def test_a_dead_peer_is_named(here: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 60.0)  # the survivors may tell
    with pytest.raises(abccl.RankFailed, match="rank 1 of 3 was ended by SIGKILL"):
        abccl.spawn(here.loses_a_peer, 3, (str(tmp_path),), timeout=60)
    for rank in (0, 2):
        assert (tmp_path / str(rank)).read_text().startswith("PeerLost: rank 1 ended (process ")


def closes_early() -> str:
    c = abccl.init(timeout=60)
    c.barrier()
    if c.rank == 1:
        c.close()
        c.close()
    return outcome(lambda: c.all_reduce(np.ones(5)))


@pytest.mark.ranks
def test_a_closed_peer_and_use_after_close(here: ModuleType) -> None:
    left, closed = abccl.spawn(here.closes_early, 2, timeout=60)
    assert left.startswith("PeerLost: rank 1 closed its communicator")
    assert closed.startswith("ClosedError: the communicator is closed")


def is_interrupted(kind: str) -> str:
    c = abccl.init(timeout=60)
    c.barrier()
    x = np.ones(5)
    if c.rank == 1:  # waits for what never comes, and learns of the interrupt
        return outcome(lambda: c.recv(x, 0, tag=1) if kind != "recv" else c.barrier())
    waits = {
        "all_reduce": lambda: c.all_reduce(x),
        "barrier": c.barrier,
        "recv": lambda: c.recv(x, 1),
        "Work.wait": lambda: c.all_reduce(x, async_op=True).wait(),
    }
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        waits[kind]()
    except KeyboardInterrupt:
        c.close()
        return "KeyboardInterrupt"
    return "no error"


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["all_reduce", "barrier", "recv", "Work.wait"])
def test_control_c_ends_every_wait_and_peers_learn_of_it(here: ModuleType, kind: str) -> None:
    first, second = abccl.spawn(here.is_interrupted, 2, (kind,), timeout=60)
    assert first == "KeyboardInterrupt"
    assert second.startswith(("Aborted: rank 0 was interrupted", "PeerLost: rank 0 closed"))


def forks() -> str:
    c = abccl.init(timeout=60)
    c.barrier()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, outcome(lambda: c.all_reduce(np.ones(3))).encode())
        c.close()
        os._exit(0)
    os.waitpid(child, 0)
    c.barrier()  # the child's end has not touched it
    return os.read(read, 1000).decode()


@pytest.mark.ranks
def test_use_in_a_forked_child(here: ModuleType) -> None:
    for text in abccl.spawn(here.forks, 2, timeout=60):
        assert text.startswith("ClosedError: this communicator belongs to the parent")


def test_abort_wakes_every_rank() -> None:
    def body(c: Communicator) -> str:
        if c.rank == 2:
            c.abort("enough")
        return outcome(lambda: c.all_reduce(np.ones(5)))

    assert all(text.startswith("Aborted: rank 2: enough") for text in threads(3, body))
