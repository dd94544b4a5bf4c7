"""Faults at every step and every wait: no rank hangs, what ends is right, the error is the right one, nothing is left.

Every pass of every point in one small program, and random programs from a seed, which is in the message of a failure:
`python tests/soak_faults.py --trials 1 --seed N` repeats that trial. `make soak` runs thousands.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from statistics import median
from typing import Any

import fault_trials
import faults
import pytest
from fault_trials import AT_INIT, FIXED, PAIRS, Op, Spec, random_spec
from faulty_transport import FaultyTransport

from abccl import Communicator
from abccl.transports import Transport
from abccl.transports.inproc import inproc
from abccl.transports.joint import joint_threads
from abccl.transports.shm import NEVER, ShmTransport

SEED = int(os.environ.get("ABCCL_TEST_SEED", "0")) or int(time.time())
RANDOM = 24
BOUND = 10.0
"""Seconds within which a death must have been noticed on a machine that does other things, too; 1 is promised."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Zygote]:
    with closing(faults.Zygote("fault_trials", log=tmp_path_factory.mktemp("ranks") / "errors")) as zygote:
        yield zygote


@pytest.fixture(scope="module")
def passes(zygote: faults.Zygote) -> list[dict[str, int]]:
    """How often each of three ranks passes each point in the small program."""
    return fault_trials.counted(zygote, Spec(0, 3, fixed=True))


def check(zygote: faults.Zygote, specs: Sequence[Spec], record: Callable[[str, Any], None]) -> int:
    """Run the trials; how many met their fault."""
    met, seconds = 0, []
    for spec in specs:
        verdict = fault_trials.trial(zygote, spec)
        assert not verdict.faults, f"{spec}: {verdict.faults}\n{zygote.said()}"
        met += verdict.met
        seconds += verdict.seconds
    if seconds:
        record("seconds to notice a death", {"median": median(seconds), "max": max(seconds)})
        assert max(seconds) < BOUND
    return met


@pytest.mark.ranks
@pytest.mark.parametrize(("point", "action"), PAIRS)
def test_every_pass_of_a_small_program(
    point: str, action: str, zygote: faults.Zygote, passes: list[dict[str, int]], record_property: Any
) -> None:
    specs = [
        Spec(0, 3, point, action, victim, at, fixed=True)
        for victim in range(3)
        for at in range(max(1, passes[victim][point]))
    ]
    met = check(zygote, specs, record_property)
    record_property("trials", len(specs))
    if point == "step" and action in ("die", "abort"):
        assert met == len(specs)  # steps are the same in every run; waits are not, nor is a deadline always waited for


@pytest.mark.ranks
@pytest.mark.parametrize(("point", "action"), AT_INIT)
def test_while_ranks_meet(point: str, action: str, zygote: faults.Zygote, record_property: Any) -> None:
    check(zygote, [Spec(0, 3, point, action, victim, at) for victim in (0, 2) for at in (0, 1, 2)], record_property)


@pytest.mark.ranks
def test_random_programs(zygote: faults.Zygote, record_property: Any) -> None:
    met = check(zygote, [random_spec(SEED + number) for number in range(RANDOM)], record_property)
    assert met >= RANDOM // 4


# ---- transports that Python drives: every verb


def make_inproc(victim: int, fault: Callable[[Transport], FaultyTransport]) -> list[Transport]:
    return [fault(each) if each.rank == victim else each for each in inproc(3, room=1)]


def make_joint(victim: int, fault: Callable[[Transport], FaultyTransport]) -> list[Transport]:
    return list(joint_threads([[0, 2], [1]], make_inproc(victim, fault)))


@pytest.fixture(autouse=True)
def records(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flight records of failures are kept."""
    monkeypatch.setenv("ABCCL_FLIGHT_DIR", "off")


VERBS = ("post_send", "post_recv", "progress", "idle")
OPS = [op for op in FIXED if op.group == 0] + [Op("all_gather", "ring", 500, 0, 0, 1)]
WANTED = {"abort": "rank {victim}: an injected fault", "refuse": "an injected fault"}


def run_threads(make: Callable[..., list[Transport]], verb: str, action: str, victim: int, at: int) -> tuple[Any, int]:
    """What each rank, a thread, found; and how often the verb was passed."""
    faulty: list[FaultyTransport] = []

    def wrap(inner: Transport) -> FaultyTransport:
        faulty.append(FaultyTransport(inner, verb, action, at))
        return faulty[0]

    transports = make(victim, wrap)
    group = [Communicator(transport, timeout=fault_trials.TIMEOUT) for transport in transports]
    pool = ThreadPoolExecutor(3)
    futures = [pool.submit(fault_trials.run_program, c, OPS, {}) for c in group]
    found = [future.result(2 * fault_trials.TIMEOUT) for future in futures]
    for c in group:
        c.close()
    pool.shutdown()
    return found, faulty[0].passes


@pytest.mark.parametrize("make", [make_inproc, make_joint])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("action", ["delay", "abort", "refuse", "close"])
def test_every_verb(
    make: Callable[..., list[Transport]], verb: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShmTransport, "_calibrate", lambda transport: NEVER)
    met = 0
    for victim in (0, 1):
        _, passes = run_threads(make, verb, "", victim, 0)
        for at in {0, 1, passes // 2, passes - 1} & set(range(passes)):
            found, _ = run_threads(make, verb, action, victim, at)
            assert not any(each["wrong"] for each in found), (verb, action, victim, at, found)
            texts = [each["errors"].get(0) for each in found]
            met += any(texts)
            judge(action, victim, texts, (verb, action, victim, at))
    until = time.monotonic() + 5
    while drivers() and time.monotonic() < until:
        time.sleep(0.01)
    assert not drivers()
    if action in ("abort", "refuse", "close") and verb != "idle":
        assert met


def drivers() -> list[threading.Thread]:
    """Threads that drive what nobody waits for."""
    return [thread for thread in threading.enumerate() if thread.name == "abccl driver"]


def judge(action: str, victim: int, texts: list[str | None], about: Any) -> None:
    """Nobody fails by a delay; else each rank that was not done tells the reason."""
    for text in filter(None, texts):
        if action == "close":  # its own calls fail, or others miss it: whichever is told first
            right = f"rank {victim}" in text and ("closed" in text or "ended" in text)
        else:  # shared memory, which has no word for other errors, tells them as an abort
            right = action in WANTED and text.split(": ", 1)[1].startswith(WANTED[action].format(victim=victim))
        assert right, (about, texts)
