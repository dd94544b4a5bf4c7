"""One fault in a random program: what the ranks run, and what must have come of it.

A `Spec` says all; from its seed come the calls, their sizes, algorithms and groups. `run_trial` is what each rank runs
(in a process that `faults.Zygote` forked, or in a thread); `judge` looks at what all ranks returned.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import faults
import numpy as np

from abccl import Communicator
from abccl.transports import _native

POINTS = ("step", "wait")
ACTIONS = ("delay", "die", "abort", "deadline")
PAIRS = [(point, action) for point in POINTS for action in ACTIONS]
AT_INIT = [("create", "refuse"), ("attach", "refuse"), ("create", "die"), ("attach", "die"), ("attach", "delay")]

DELAY = 15
"""Milliseconds that a delayed rank sleeps."""

TIMEOUT = 20.0
"""Seconds that an operation may take; no fault makes it last so long, so a run into it is a fault of the library."""

GIVEN_UP = "the communicator of all ranks has failed"
"""What a rank says then in all others, whose ranks would wait for it."""

ALGORITHMS = {
    "all_reduce": ("ring", "direct", "recursive_doubling", "tree", "two_shot", "chain"),
    "reduce_scatter": ("ring", "direct"),
    "all_gather": ("ring", "direct", "tree"),
    "broadcast": ("direct", "tree", "chain", "ring"),
    "all_to_all": ("direct", "pairwise", "ring"),
    "reduce": ("direct", "tree"),
    "gather": ("direct", "tree"),
    "scatter": ("direct", "tree"),
    "barrier": ("recursive_doubling", "tree"),
    "messages": ("",),
}


@dataclass(frozen=True)
class Spec:
    """A trial.

    Attributes:
        seed: of the program.
        victim: the rank with the fault; -1: none, but passes are counted.
        at: the number of the pass of the point, from 0, since the communicators were made; or since the start, for the
            points that are passed only then.
        fixed: the small program instead of a random one.
        idle: seconds that each survivor watches its own processor time.
    """

    seed: int
    size: int
    point: str = "step"
    action: str = ""
    victim: int = -1
    at: int = 0
    fixed: bool = False
    idle: float = 0.02

    @property
    def at_init(self) -> bool:
        """Whether the fault comes while the ranks meet."""
        return (self.point, self.action) in AT_INIT


@dataclass(frozen=True)
class Op:
    """One call: in which group (0 all ranks, 1 those of one parity, 2 all in reverse), and after how many further calls
    it is waited for, 0 if it is not asynchronous."""

    kind: str
    algorithm: str
    count: int
    root: int
    group: int
    waited: int


FIXED = [
    Op("all_reduce", "ring", 3000, 0, 0, 0),
    Op("all_to_all", "direct", 10, 0, 2, 1),
    Op("broadcast", "tree", 40_000, 0, 1, 0),
    Op("messages", "", 5, 0, 0, 0),
]


def program(spec: Spec) -> list[Op]:
    """The calls of a trial; the same on all ranks."""
    if spec.fixed:
        return FIXED
    source = random.Random(spec.seed)
    ops = []
    for _ in range(source.randint(1, 8)):
        kind = source.choice(list(ALGORITHMS))
        # From nothing to 1 MiB of float32, short ones as often as long ones.
        count = source.choice([0, 1, int(2 ** source.uniform(0, 12)), int(2 ** source.uniform(0, 18))])
        parts = kind in ("reduce_scatter", "all_gather", "all_to_all", "gather", "scatter")
        count = count // spec.size if parts else count
        waited = source.choice([0, 0, 0, 1, 3])
        algorithm = source.choice(ALGORITHMS[kind])
        ops.append(Op(kind, algorithm, count, source.randrange(1000), source.choice([0, 0, 0, 1, 2]), waited))
    return ops


def vector(number: int, rank: int, count: int) -> np.ndarray[Any, Any]:
    """What a rank gives to a call: small integers, whose sums are exact."""
    return ((np.arange(count) * 7 + 5 * number + 11 * rank) % 13).astype(np.float32)


def start(c: Communicator, op: Op, number: int, asynchronous: bool) -> tuple[Any, Callable[[], bool]]:
    """Make the call; its work, and what tells whether the result is right."""
    n, size, rank = op.count, c.size, c.rank
    root = op.root % size
    how: dict[str, Any] = {"algorithm": op.algorithm, "async_op": asynchronous}
    each = [vector(number, r, n) for r in range(size)]
    whole = [vector(number, r, n * size) for r in range(size)]
    x, out, out_whole = each[rank].copy(), np.zeros(n, np.float32), np.zeros(n * size, np.float32)

    def part(source: int, of: int) -> np.ndarray[Any, Any]:
        return whole[source][of * n : (of + 1) * n]

    right = partial(np.array_equal, x)
    match op.kind:
        case "all_reduce":
            return c.all_reduce(x, **how), partial(right, sum(each))
        case "reduce_scatter":
            work = c.reduce_scatter(out, whole[rank], **how)
            return work, partial(np.array_equal, out, sum(part(r, rank) for r in range(size)))
        case "all_gather":
            return c.all_gather(out_whole, x, **how), partial(np.array_equal, out_whole, np.concatenate(each))
        case "broadcast":
            return c.broadcast(x, root, **how), partial(right, each[root])
        case "all_to_all":
            wanted = np.concatenate([part(r, rank) for r in range(size)])
            return c.all_to_all(out_whole, whole[rank], **how), partial(np.array_equal, out_whole, wanted)
        case "reduce":
            return c.reduce(x, root=root, **how), partial(right, sum(each) if rank == root else each[rank])
        case "gather":
            wanted = np.concatenate(each) if rank == root else np.zeros_like(out_whole)
            work = c.gather(out_whole if rank == root else None, x, root, **how)
            return work, partial(np.array_equal, out_whole, wanted)
        case "scatter":
            work = c.scatter(out, whole[rank] if rank == root else None, root, **how)
            return work, partial(np.array_equal, out, part(root, rank))
        case "barrier":
            return c.barrier(**how), lambda: True
    if size == 1:
        return None, lambda: True
    right_hand, left_hand = (rank + 1) % size, (rank - 1) % size
    sent = c.send(x, right_hand, number, async_op=True)
    got = c.recv(out, left_hand, number, async_op=asynchronous)
    return _Both(sent, got if asynchronous else None), partial(np.array_equal, out, each[left_hand])


class _Both:
    def __init__(self, *works: Any) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            if work is not None:
                work.wait()


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def run_program(world: Communicator, ops: Sequence[Op], parts: dict[int, Communicator]) -> dict[str, Any]:
    """The errors of the groups by number, and the calls whose results were wrong.

    A group that has failed is used no more; the others go on, until that of all ranks fails.
    """
    groups = {0: world, **parts}
    errors: dict[int, str] = {}
    times: dict[int, float] = {}
    wrong: list[int] = []
    pending: list[tuple[int, int, int, Any, Callable[[], bool]]] = []

    def attempt(group: int, number: int, step: Callable[[], Callable[[], bool] | None]) -> None:
        if group in errors:
            return
        try:
            right = step()
        except Exception as error:
            errors[group], times[group] = in_words(error), time.monotonic()
            return
        if right is not None and not right():
            wrong.append(number)

    def begin(op: Op, number: int) -> Callable[[], bool] | None:
        work, right = start(groups[op.group], op, number, op.waited > 0)
        if op.waited:
            pending.append((number + op.waited, op.group, number, work, right))
            return None
        if work is not None:
            work.wait()
        return right

    def finish(work: Any, right: Callable[[], bool]) -> Callable[[], bool]:
        if work is not None:
            work.wait()
        return right

    last = [Op("barrier", "recursive_doubling", 0, 0, 0, 0)] * 2
    tail: dict[str, int] = {}
    for number, op in enumerate([*ops, *last]):
        if number == len(ops):
            tail = {point: _native.passes(point) for point in POINTS}
        if number > len(ops):
            _native.inject("", "", 0)  # no rank can miss a death after which it has nothing to do
        due = [each for each in pending if each[0] <= number or number >= len(ops)]
        for each in due:
            pending.remove(each)
            attempt(each[1], each[2], partial(finish, each[3], each[4]))
        attempt(op.group, number, partial(begin, op, number))
        if 0 in errors:
            for part in parts.values():
                part.abort(GIVEN_UP)
            break
    return {"errors": errors, "times": times, "wrong": wrong, "tail": tail}


def parts_of(world: Communicator) -> dict[int, Communicator]:
    """The groups beside that of all ranks."""
    halves, reverse = world.split(world.rank % 2), world.split(0, -world.rank)
    assert halves is not None and reverse is not None
    return {1: halves, 2: reverse}


def run_trial(plain: dict[str, Any]) -> dict[str, Any]:
    """What one rank, a process of its own, does; plain data on what came of it."""
    spec = Spec(**plain)
    before = faults.inventory()

    def suffer() -> dict[str, Any]:
        if faults.rank == spec.victim and spec.at_init:
            _native.inject(spec.point, spec.action, spec.at, DELAY)
        try:
            world = faults.joined(timeout=TIMEOUT)
            parts = parts_of(world)
        except Exception as error:
            return {"errors": {0: in_words(error)}, "times": {0: time.monotonic()}, "wrong": [], "tail": {}}
        if faults.rank == spec.victim and not spec.at_init:
            _native.inject(spec.point, spec.action, spec.at, DELAY)
        elif spec.action == "deadline" and faults.rank == (spec.victim + 1) % spec.size:
            _native.inject("step", "delay", spec.at, 4 * DELAY)  # so that there is something to wait for
        elif not spec.at_init:
            _native.inject("", "", 0)
        found = run_program(world, program(spec), parts)
        if spec.action == "die" and 0 in found["errors"]:
            found["shrunk"] = goes_on(world.shrink)
        found["busy"] = faults.idle_seconds(spec.idle) if spec.idle else 0.0
        begun = time.monotonic()
        for c in (*parts.values(), world):
            c.close()
        found["closing"] = time.monotonic() - begun
        return found

    found = suffer()
    _native.inject("", "", 0)
    found["left"] = faults.left_since(before)
    found["again"] = goes_on(partial(faults.joined, timeout=TIMEOUT))
    return found


def goes_on(make: Callable[[], Communicator]) -> Any:
    """The size of a new communicator and the sum of its ranks, each plus 1; or the error."""
    try:
        with make() as again:
            x = np.array([again.rank + 1.0])
            again.all_reduce(x, algorithm="direct")
            again.barrier(algorithm="recursive_doubling")
            return [again.size, float(x[0])]
    except Exception as error:
        return in_words(error)


# ---- what must have come of it


KINDS = {"die": "PeerLost", "abort": "Aborted", "deadline": "DeadlineExceeded"}


@dataclass
class Verdict:
    """Of one trial: what was wrong, whether the fault was met, and how long each survivor took to notice a death."""

    faults: list[str]
    met: bool
    seconds: list[float]


def members(spec: Spec, rank: int, group: int) -> list[int]:
    """The ranks of a group of this rank's, in its order."""
    everyone = list(range(spec.size))
    return [everyone, [r for r in everyone if r % 2 == rank % 2], everyone[::-1]][group]


def judge(spec: Spec, job: faults.Job) -> Verdict:
    """Hold what came of a trial against what is promised."""
    victim = job.ranks[spec.victim] if spec.victim >= 0 else None
    died = victim is not None and spec.action == "die" and victim.status == -9 and victim.state == "ended"
    wrong = [f"left behind: {each}" for each in job.left]
    living = [rank for rank in job.ranks if not (died and rank is victim)]
    raised = [rank for rank in living if rank.result and rank.result["errors"]]
    is_over = any("0" in rank.result["errors"] for rank in raised)
    met = died or bool(raised) or spec.action in ("delay", "refuse")
    seconds = []
    for rank in living:
        found = rank.result
        if rank.state != "ended" or found is None:
            wrong.append(f"rank {rank.rank} {rank.state} (status {rank.status}) without a result")
            continue
        wrong += [f"rank {rank.rank}: {fault}" for fault in _faults_of(spec, rank.rank, found, died, is_over)]
        right = [len(living), len(living) * (len(living) + 1) / 2]
        for how in ("again", "shrunk"):
            if found.get(how, right) != right:
                wrong.append(f"rank {rank.rank}: the survivors can not go on ({how}): {found[how]}")
        if died and victim is not None:
            seconds += [max(0.0, at - victim.at) for group, at in found["times"].items() if group == "0"]
    return Verdict(wrong, met, seconds)


def _faults_of(spec: Spec, rank: int, found: dict[str, Any], died: bool, is_over: bool) -> list[str]:
    faults = [f"call {number} has a wrong result" for number in found["wrong"]]
    kind = KINDS.get(spec.action)
    for group, text in found["errors"].items():
        if spec.at_init:
            if not text.startswith(("PeerLost: ", "TransportError: ") if died else "TransportError: "):
                faults.append(f"init raised {text}")
            continue
        if group != "0" and is_over and ("closed its communicator while" in text or GIVEN_UP in text):
            continue
        order = members(spec, rank, int(group))
        if kind is None or spec.victim not in order:
            faults.append(f"group {group} raised {text}")
            continue
        name = f"rank {order.index(spec.victim)}"
        words = {
            "die": f"PeerLost: {name} ended (process ",
            "abort": f"Aborted: {name}: an injected fault",
            "deadline": "DeadlineExceeded: ",
        }[spec.action]
        if not text.startswith(words) or (spec.action == "deadline" and f"{name} waits " not in text):
            faults.append(f"group {group} raised {text!r}, wanted {words!r}")
    if died and not spec.at_init and "0" not in found["errors"]:
        faults.append("did not notice the death")
    left = found["left"]
    if left["files"] or left["maps"] or left["threads"] > 1:  # the process's progress thread stays
        faults.append(f"left behind: {left}")
    if spec.idle and found.get("busy", 0) > max(0.25 * spec.idle, 0.01):
        faults.append(f"was busy for {found['busy']:.3f} s of {spec.idle} s in which it slept")
    if found.get("closing", 0.0) > 5.0:
        faults.append(f"took {found['closing']:.1f} s to close")
    return faults


def counted(zygote: faults.Zygote, spec: Spec) -> list[dict[str, int]]:
    """How often each rank passes each point in a run without a fault, before its last barriers; it must be right."""
    job = zygote.run("fault_trials:run_trial", spec.size, asdict(replace(spec, action="", victim=-1, at=0)))
    verdict = judge(replace(spec, action="", victim=-1), job)
    assert not verdict.faults, (spec, verdict.faults, zygote.said())
    return [rank.result["tail"] for rank in job.ranks]


def random_spec(seed: int) -> Spec:
    """A trial by its number alone: a random program with any fault at any pass."""
    source = random.Random(seed)
    size = source.randint(2, 5)
    point, action = source.choice(PAIRS)
    # Early passes as often as late ones; a pass that does not come is a trial without a fault.
    return Spec(seed, size, point, action, source.randrange(size), int(2 ** source.uniform(0, 5)) - 1)


def trial(zygote: faults.Zygote, spec: Spec) -> Verdict:
    """Run and judge."""
    return judge(spec, zygote.run("fault_trials:run_trial", spec.size, asdict(spec)))
