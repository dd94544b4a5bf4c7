"""Ranks that end in every way a process can end: survivors raise PeerLost with the rank's name, and nothing is left.

What happens to a rank at every single step is in test_faults.py; here the endings are real.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import faults
import numpy as np
import pytest
from torch_programs import program, python, torchrun

import abccl
from abccl import Communicator
from abccl.collectives import bootstrap
from abccl.transports import _native

SIZE, VICTIM = 3, 1
BOUND = 10.0
"""Seconds within which a dead rank must have been noticed on a machine that does other things, too; 1 is promised."""

pytestmark = pytest.mark.ranks

# ---- how a rank ends


def runs_out_of_memory() -> None:
    """As in a program that no longer gets memory, and does not expect it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
    np.ones(64 << 20, np.uint8)


def fails() -> NoReturn:
    raise RuntimeError("this rank has a fault")


ENDINGS: dict[str, Callable[[], Any]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),  # as the kernel does where memory is short
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "segmentation fault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "os._exit": lambda: os._exit(3),
    "sys.exit": lambda: sys.exit(0),
    "exception": fails,
    "MemoryError": runs_out_of_memory,
}

GOODBYE = ("sys.exit", "exception", "MemoryError")
"""Endings in which the interpreter ends in order, and the communicators are closed."""


# ---- where


def waits(c: Communicator) -> Any:
    return c.all_reduce(np.ones(1000), algorithm="ring")


def polls(c: Communicator) -> Any:
    """Nobody waits for it: a look now and then finds that it has ended."""
    work = c.all_reduce(np.ones(100_000), algorithm="ring", async_op=True)
    while not work.is_completed():
        time.sleep(0.001)
    work.wait()


def sends_until_there_is_no_room(c: Communicator) -> Any:
    x = np.ones(1 << 18)
    while True:
        c.send(x, VICTIM)


def receives_from_anybody(c: Communicator) -> Any:
    """All others must have gone before such a receive is in vain: it fails with what else this rank waits for."""
    pending = c.recv(np.ones(5), None, async_op=True)
    try:
        c.barrier()
    finally:
        pending.wait()


def misses(c: Communicator) -> None:
    """Come only when the rank has gone."""
    while not c._transport.native.gone(VICTIM):  # type: ignore[attr-defined]
        time.sleep(0.001)


def receives_what_was_never_sent_in_full(c: Communicator) -> Any:
    misses(c)
    return c.recv(np.ones(1 << 20), VICTIM)


class Place(NamedTuple):
    """What the others do while the rank ends, and what it has done before."""

    do: Callable[[Communicator], Any]
    before: Callable[[Communicator], Any] = lambda c: None


PLACES = {
    "all_reduce": Place(waits),
    "recv": Place(lambda c: c.recv(np.ones(5), VICTIM)),
    "a long recv": Place(receives_what_was_never_sent_in_full, lambda c: c.send(np.ones(1 << 20), 0, async_op=True)),
    "recv from any": Place(receives_from_anybody),
    "send": Place(sends_until_there_is_no_room),
    "async": Place(polls),
    "split": Place(lambda c: c.split(0)),
    "a part": Place(lambda c: waits(c.split(0)), lambda c: c.split(0)),
}


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """The error of a call in words, and when it was raised."""
    text = "no error"
    try:
        call()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return {"text": text, "at": time.monotonic()}


def survive(do: Callable[[Communicator], Any], timeout: float = 60.0) -> dict[str, Any]:
    """What a survivor raises, what is left of its communicator, and whether the survivors can go on."""

    def suffer() -> dict[str, Any]:
        c = faults.joined(timeout=timeout)

        def call() -> None:
            c.barrier()  # which a survivor may still be in when another has seen the death
            do(c)

        found = outcome(call) | {"again": outcome(c.barrier)["text"], "busy": faults.idle_seconds(0.1)}
        begun = time.monotonic()
        c.close()
        return found | {"closing": time.monotonic() - begun}

    before = faults.inventory()
    found = suffer()
    found["left"] = faults.left_since(before)
    return found | {"sum": go_on()}


def go_on() -> list[float]:
    """The size of a communicator of the survivors, and the sum of all ranks from 1."""
    with faults.joined(timeout=60) as again:
        x = np.full(4, again.rank + 1.0)
        again.all_reduce(x)
        again.barrier()
        return [again.size, float(x[0])]


def ends_between_collectives(ending: str, place: str) -> Any:
    if faults.rank != VICTIM:
        return survive(PLACES[place].do)
    c = faults.joined(timeout=60)
    c.barrier()
    kept = PLACES[place].before(c)
    ENDINGS[ending]()
    return f"survived, with {kept}"


def ends_in_a_collective(ending: str) -> Any:
    """Another of its threads ends the rank while it waits as rank 0 does: for the last rank, which is late."""

    def do(c: Communicator) -> Any:
        if c.rank == SIZE - 1:
            misses(c)
        return waits(c)

    if faults.rank != VICTIM:
        return survive(do)
    c = faults.joined(timeout=60)
    c.barrier()
    threading.Timer(0.02, ENDINGS[ending]).start()
    waits(c)
    return "survived"


def stops() -> Any:
    """It is not dead, and may go on: only the deadline helps."""
    if faults.rank != VICTIM:
        return survive(waits, timeout=0.5)
    c = faults.joined(timeout=60)
    c.barrier()
    os.kill(os.getpid(), signal.SIGSTOP)
    return outcome(c.barrier)


# ---- the tests


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flight records of failures go where pytest forgets them."""
    monkeypatch.setenv("ABCCL_FLIGHT_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Zygote]:
    with closing(faults.Zygote("test_dead_peers", log=tmp_path_factory.mktemp("ranks") / "errors")) as zygote:
        yield zygote


def check(job: faults.Job, zygote: faults.Zygote, words: str, is_part: bool = False) -> list[float]:
    """Every survivor names the rank, and nothing is left; the seconds that it took them to notice."""
    assert not job.left
    victim = job.ranks[VICTIM]
    seconds = []
    for ended in job.ranks:
        if ended is victim:
            continue
        found = ended.result
        assert ended.state == "ended" and found is not None, f"rank {ended.rank} {ended.state}: {zygote.said()}"
        assert found["text"].startswith(words), found
        assert found["again"].startswith(words.split(":")[0])
        assert "broken: close it and make another" in found["again"] or is_part, found
        assert found["left"]["files"] == found["left"]["maps"] == 0 and found["left"]["threads"] <= 1, found
        assert found["busy"] < 0.05 and found["closing"] < BOUND, found
        assert found["sum"] == [SIZE - 1, sum(range(1, SIZE))]
        seconds.append(max(0.0, found["at"] - victim.at))
    assert max(seconds) < BOUND, seconds
    return seconds


CASES = [(ending, "all_reduce") for ending in ENDINGS]
CASES += [(ending, place) for place in list(PLACES)[1:] for ending in ("SIGKILL", "sys.exit")]


@pytest.mark.parametrize(("ending", "place"), CASES)
def test_a_rank_that_ends_is_named(ending: str, place: str, zygote: faults.Zygote, record_property: Any) -> None:
    job = zygote.run("test_dead_peers:ends_between_collectives", SIZE, ending, place)
    how = "closed its communicator while" if ending in GOODBYE else "ended (process"
    record_property("seconds to notice", check(job, zygote, f"PeerLost: rank {VICTIM} {how}", place == "a part"))
    assert job.ranks[VICTIM].state == "ended" and job.ranks[VICTIM].result is None


@pytest.mark.parametrize("ending", [ending for ending in ENDINGS if ending not in (*GOODBYE, "SIGTERM")])
def test_a_rank_that_ends_in_a_collective(ending: str, zygote: faults.Zygote, record_property: Any) -> None:
    job = zygote.run("test_dead_peers:ends_in_a_collective", SIZE, ending)
    record_property("seconds to notice", check(job, zygote, f"PeerLost: rank {VICTIM} ended (process"))


def test_a_stopped_rank_is_no_dead_one(zygote: faults.Zygote) -> None:
    job = zygote.run("test_dead_peers:stops", SIZE)
    assert job.ranks[VICTIM].state == "stopped"
    for ended in job.ranks:
        if ended.rank != VICTIM:
            text = ended.result["text"]
            assert text.startswith("DeadlineExceeded: all_reduce") and f"rank {VICTIM}" in text
            assert " has not entered #2 (last: barrier #1, finished " in text


def dies_while_ranks_meet(when: str) -> str:
    """As users start ranks. The rank dies before it meets the others, or in the middle of that; or of a split."""
    victim = bootstrap.spawned.rank == VICTIM

    def inject(point: str, after: int) -> None:
        if victim:
            _native.inject(point, "die", after)

    def meet() -> Communicator:
        return abccl.init(timeout=60)

    match when:
        case "before init":
            if victim:
                os.kill(os.getpid(), signal.SIGKILL)
            return outcome(meet)["text"]
        case "attaching":
            inject("attach", 1)
            return outcome(meet)["text"]
        case "calibrating":
            inject("step", 5)
            return outcome(meet)["text"]
    with meet() as c:
        c.barrier()
        inject("attach", 1)
        return outcome(lambda: c.split(0))["text"]


@pytest.mark.parametrize("when", ["before init", "attaching", "calibrating", "splitting"])
def test_a_rank_that_dies_while_ranks_meet(when: str, here: ModuleType) -> None:
    results = abccl.spawn(here.dies_while_ranks_meet, SIZE, (when,), timeout=60, on_failure="continue")
    for rank, found in enumerate(results):
        if rank == VICTIM:
            assert isinstance(found, abccl.RankFailed) and "SIGKILL" in str(found)
        else:
            # Who hears of it late may find that another survivor has ended since: "ranks 1, 2 ended".
            assert re.match(rf"PeerLost: .*ranks? (\d, )*{VICTIM}\b", str(found)), found


@pytest.mark.torch
def test_torchrun(tmp_path: Path) -> None:
    """Torchrun ends the other workers; one that takes its time says what it has raised."""

    code = """
import pathlib, signal, time
dist.init_process_group("abccl")
dist.barrier()
folder = pathlib.Path(sys.argv[1])
if dist.get_rank() == 1:
    (folder / "at").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    dist.all_reduce(torch.ones(1000))
except RuntimeError as error:
    (folder / "said").write_text(f"{time.monotonic()} {type(error).__name__}: {error}")
"""
    done = torchrun(program(tmp_path, code), tmp_path)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    at, _, said = (tmp_path / "said").read_text().partition(" ")
    assert "rank 1 ended (process " in said, said
    assert float(at) - float((tmp_path / "at").read_text()) < BOUND


def test_a_program_may_end_while_its_failure_is_recorded() -> None:
    """The progress thread is in Python then, and wants its lock as the interpreter ends: the process ends well."""
    code = """
import threading, time, numpy as np
from abccl import Communicator
from abccl.transports.shm import shm_threads
here, there = (Communicator(transport) for transport in shm_threads(2))
recording = threading.Event()
def record(*error):
    recording.set()
    while True:
        time.sleep(0)
here._transport.native.set_recorder_failure(record)
work = here.all_reduce(np.ones(5), algorithm="ring", async_op=True)
there.abort()
assert recording.wait(60)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
