"""A long run of random collectives and messages: every result is checked, and nothing may grow.

    python tests/soak.py --calls 12500 --ranks 4 --seed 1    (four of five calls are collectives)
    python tests/soak.py --calls 1000 --transport gloo --slack 128
    python tests/soak.py --calls 1000 --transport mpi --slack 128    (starts itself by mpirun)
    python tests/soak.py --communicators 200                 (made, used and closed one after the other)

Sizes grow from 4 bytes to 8 MiB and shrink again. Calls wait or do not, on all ranks or on some (communicators are
made and closed on the way), on registered memory or not, with algorithms forced or chosen. All ranks draw the same from
one seed, which is printed. Every so many calls all is waited for, communicators of some ranks are closed, what is kept
for later calls is dropped, and what the process holds is noted; after a warm-up nothing may grow (LIMITS).
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import random_calls
from random_runs import Attempt
from resources import Held, growth, held

import abccl
from abccl import Collective, Communicator

LEAST, MOST = 4, int(os.environ.get("ABCCL_SOAK_MOST", 8 << 20))
PERIOD = 400
"""Calls in which sizes grow and shrink once."""
CYCLES = 4
"""The same calls are drawn so often: what is made for a first call is there after the first cycle, and what still grows
is lost."""
TIMEOUT = 120.0

BLURRED = ("resident", "heap", "shared", "objects", "maps")
LIMITS = {
    "resident": 64 << 10,
    "heap": 64 << 10,
    "shared": 64 << 10,
    "objects": 500.0,
    "files": 0.2,
    "threads": 0.2,
    "maps": 2.0,
}
"""What each may grow by in 1,000 calls, after the first cycle: 64 bytes lost in every call are found. Less may be pages
that malloc and the kernel have just taken; and a file, a thread or a mapping lost in 1,000 calls is found."""


@dataclass(eq=False)
class Part:
    """A communicator of some ranks, on one of these; None where this rank is not among them."""

    communicator: Communicator | None
    size: int


@dataclass
class Summary:
    """What a rank has done.

    Attributes:
        nbytes: of its buffers, all calls together.
        grown: what it holds more after 1,000 calls, see `resources.Held`.
        last: what it holds at the end.
    """

    rank: int
    calls: int
    messages: int
    parts: int
    nbytes: int
    seconds: float
    grown: dict[str, float]
    last: Held


class Soak:
    """One rank's run. All decisions come from `draw`, which all ranks have alike."""

    def __init__(self, world: Communicator, seed: int) -> None:
        self.world, self.seed = world, seed
        self.draw = random.Random(seed)
        self.parts: list[list[Part]] = []
        self.pending: deque[tuple[Part, Attempt]] = deque()
        self.kept: deque[tuple[Part, Attempt | None]] = deque(maxlen=16)
        self.arrays: deque[Any] = deque(maxlen=8)
        self.calls = self.messages = self.made = self.nbytes = 0
        self.sums = 0
        self.whole = Part(world, world.size)
        self.slot_bytes = world._transport.slot_bytes
        self.natives = world._transport.collectives

    def step(self, number: int) -> None:
        """One call, or two messages of each rank, or another group of ranks.

        Raises:
            AssertionError: a result is wrong.
        """
        wave = abs((number % PERIOD) / (PERIOD / 2) - 1)  # 1, 0, 1
        nbytes = int(LEAST * (MOST / LEAST) ** ((1 - wave) * self.draw.uniform(0.9, 1.0)))
        what = self.draw.choices(("call", "again", "messages", "split", "close", "memory"), (70, 12, 10, 3, 2, 5))[0]
        if what == "call":
            self.call(nbytes)
        elif what == "again" and self.kept:
            part, attempt = self.kept[self.draw.randrange(len(self.kept))]
            self.run(part, attempt)
        elif what == "messages" and self.world.size > 1:
            self.exchange(nbytes)
        elif what == "split":
            self.split()
        elif what == "close" and self.parts:
            self.close(self.parts.pop(self.draw.randrange(len(self.parts))))
        elif what == "memory":
            self.arrays.append(self.world.empty(nbytes, "uint8"))
            self.arrays[-1][:] = 1

    def call(self, nbytes: int) -> None:
        """A collective among all ranks, or among some."""
        groups = [self.whole, *(part for parts in self.parts for part in parts)]
        part = self.draw.choice([self.whole, *groups])
        drawn = random_calls.draw(
            self.draw.choice,
            part.size,
            slot_bytes=self.slot_bytes,
            most_bytes=MOST,
            natives=self.natives,
            count_bytes=nbytes,
        )
        attempt = None if part.communicator is None else Attempt(part.communicator, drawn)
        self.run(part, attempt)
        if self.draw.random() < 0.2:
            self.kept.append((part, attempt))

    def run(self, part: Part, attempt: Attempt | None) -> None:
        """Start it; wait for it now or later."""
        self.calls += 1
        later = self.draw.random() < 0.5
        if attempt is None:
            return
        with suppress(ValueError):  # it is still under way
            self.finish_until([pending for _, pending in self.pending].index(attempt))
        if attempt.start():
            self.pending.append((part, attempt))
            self.nbytes += sum(memory.nbytes for memory in attempt.memories)
            self.finish_until(len(self.pending) - 1 if not later else len(self.pending) - 7)

    def finish_until(self, last: int) -> None:
        """Finish those under way, the oldest first, up to this one."""
        for _ in range(last + 1):
            part, attempt = self.pending.popleft()
            try:
                found = attempt.finish()
            except AssertionError as error:
                raise AssertionError(f"{error}; seed {self.seed}, call {self.calls}, {attempt.call}") from error
            if part is self.whole and attempt.call.collective is Collective.ALL_REDUCE:
                self.sums = (self.sums * 31 + found) % (1 << 32)

    def exchange(self, nbytes: int) -> None:
        """Some messages to one rank and as many from another, read in another order than sent."""
        world, shift = self.world, self.draw.randrange(1, self.world.size)
        to, source = (world.rank + shift) % world.size, (world.rank - shift) % world.size
        lengths = [max(1, nbytes >> self.draw.randrange(6)) for _ in range(self.draw.randrange(1, 4))]
        order = self.draw.sample(range(len(lengths)), len(lengths))
        background = self.draw.random() < 0.5
        sent = [np.full(length, world.rank + tag, np.uint8) for tag, length in enumerate(lengths)]
        works = [world.send(data, to, tag, async_op=True) for tag, data in enumerate(sent)]
        read = [(tag, np.empty(lengths[tag], np.uint8)) for tag in order]
        works += [world.recv(into, source, tag, async_op=True) for tag, into in read if background]
        for tag, into in read:
            if not background:
                assert world.recv(into, source, tag) == source
        for work in works:
            work.wait(TIMEOUT)
        for tag, into in read:
            assert (into == source + tag).all(), f"rank {world.rank}: a message from rank {source} came otherwise"
        self.messages += len(lengths)
        self.nbytes += 2 * sum(lengths)

    def split(self) -> None:
        """Communicators of some ranks: of one half or more, or of two groups."""
        if len(self.parts) == 3:
            self.close(self.parts.pop(0))
        ranks = range(self.world.size)
        colors = [self.draw.choice((0, 0, 1, None)) for _ in ranks]
        keys = self.draw.sample(ranks, len(ranks))
        own = self.world.split(colors[self.world.rank], keys[self.world.rank])
        here = colors[self.world.rank]
        self.parts.append([Part(own if here == c else None, colors.count(c)) for c in (0, 1) if c in colors])
        self.made += 1

    def close(self, parts: list[Part]) -> None:
        """Close the communicators of a split."""
        self.finish_until(len(self.pending) - 1)
        self.kept = deque((kept for kept in self.kept if kept[0] not in parts), maxlen=self.kept.maxlen)
        for part in parts:
            if part.communicator is not None:
                part.communicator.barrier()
                part.communicator.close()

    def settle(self) -> Held:
        """Finish and close all but the communicator of all ranks, drop what is kept for later; what is held then."""
        while self.parts:
            self.close(self.parts.pop())
        self.finish_until(len(self.pending) - 1)
        self.kept.clear()
        self.arrays.clear()
        sums = np.empty(self.world.size, np.int64)
        self.world.all_gather(sums, np.array([self.sums]))
        assert (sums == self.sums).all(), f"ranks have other bits after the same reductions: {sums}"
        forget(self.world)
        self.world.barrier()
        return held()


def forget(c: Communicator) -> None:
    """Drop what a communicator keeps for calls to come, which has bounds of its own that would take hours to reach.

    4,096 plans, 1,024 lists of parts, a schedule for each algorithm, root and scaling, and what was chosen and watched
    for each collective and class of sizes, four in an octave.
    """
    c._dispatcher.forget()
    c._interned.clear()
    c._binder._skeletons.clear()
    c.tuner._watched.clear()
    c.tuner.table.chosen.clear()
    random_calls._choice.cache_clear()


def soak(calls: int, seed: int, transport: str | None = None, every: int = 500, slack: float = 1.0) -> Summary:
    """A rank's part in a run of so many steps.

    Args:
        every: after so many the rank looks at what it holds.
        slack: what the limits of memory are multiplied by: a short run sees the noise of few pages.

    Raises:
        AssertionError: a result was wrong, or something has grown.
    """
    cycle = -(-calls // CYCLES // every) * every
    with abccl.init(transport, timeout=TIMEOUT) as world:
        start = said = time.monotonic()
        run, marks, samples = Soak(world, seed), [], []
        for number in range(1, calls + 1):
            if number % cycle == 1:
                run.draw.seed(seed)
            run.step(number % cycle)
            if number % every == 0 or number == calls:
                marks.append(number)
                samples.append(run.settle())
            if world.rank == 0 and (time.monotonic() - said > 5 or number == calls):
                said = time.monotonic()
                print(_line(run, number, calls, said - start, samples), flush=True)
        warm = next(i for i, mark in enumerate(marks) if mark >= cycle)
        grown = growth(marks[warm:], samples[warm:])
        # A network's library opens connections when they are first needed, some of them late.
        blurred = BLURRED if transport is None else LIMITS.keys()
        limits = {name: limit * (slack if name in blurred else 1) for name, limit in LIMITS.items()}
        check(world.rank, grown, limits, samples[warm:], f"in 1,000 calls; seed {seed}")
        world.barrier()
        seconds = time.monotonic() - start
    return Summary(world.rank, run.calls, run.messages, run.made, run.nbytes, seconds, grown, samples[-1])


def check(rank: int, grown: dict[str, float], limits: dict[str, float], samples: list[Held], when: str) -> None:
    """Hold what has grown against its limits.

    Raises:
        AssertionError: it has grown by more.
    """
    for name, slope in grown.items():
        assert slope <= limits[name], (
            f"rank {rank}: {name} grows by {slope:.1f} (the limit is {limits[name]:.1f}) {when}: "
            f"{[getattr(sample, name) for sample in samples]}"
        )


def lifecycles(count: int, transport: str | None = None, every: int = 10) -> Summary:
    """Communicators of all ranks, with one of some ranks each, made, used and closed one after the other.

    Raises:
        AssertionError: something has grown.
    """
    start, marks, samples, nbytes = time.monotonic(), [], [], 0
    rank = 0
    for number in range(1, count + 1):
        with abccl.init(transport, timeout=TIMEOUT) as world:
            rank = world.rank
            part = world.split(world.rank % 2)
            assert part is not None
            with part:
                for c in (world, part):
                    x = c.empty(50_000, "float32")
                    x[:] = 1
                    c.all_reduce(x)
                    work = c.all_reduce(x, async_op=True)
                    work.wait(TIMEOUT)
                    assert (x == c.size**2).all()
                    nbytes += 2 * x.nbytes
                    del x, work
                part.barrier()
            world.barrier()
        if number % every == 0:
            marks.append(number)
            samples.append(held())
    warm = len(marks) // 4
    grown = growth(marks[warm:], samples[warm:])
    grown = {name: slope / 1000 for name, slope in grown.items()}  # of one communicator
    check(rank, grown, CLOSED, samples[warm:], "with each communicator made and closed")
    return Summary(rank, 4 * count, 0, 2 * count, nbytes, time.monotonic() - start, grown, samples[-1])


CLOSED = {"resident": 4096, "heap": 1024, "shared": 0.0, "objects": 20.0, "files": 0.0, "threads": 0.0, "maps": 0.1}
"""What one communicator that was made and closed may leave behind, by the fit."""


def _line(run: Soak, number: int, calls: int, seconds: float, samples: list[Held]) -> str:
    now = samples[-1] if samples else None
    holds = f", {now.resident >> 20} MiB, {now.files} files, {now.threads} threads, {now.maps} maps" if now else ""
    return f"{number:6} of {calls} in {seconds:.0f} s: {run.calls} calls, {run.messages} messages{holds}"


def told(summaries: list[Summary], ranks: int) -> str:
    """The run in a few lines, as some or all of the ranks saw it."""
    first = summaries[0]
    lines = [
        f"{first.calls} collectives, {first.messages} messages and {first.parts} splits on each of {ranks} "
        f"ranks in {first.seconds:.0f} s, {first.nbytes / 2**30:.1f} GiB of buffers each; all right"
    ]
    for name in first.grown:
        most = max(s.grown[name] for s in summaries)
        lines.append(
            f"  {name:9} grows by at most {most:.1f}; at the end {max(asdict(s.last)[name] for s in summaries)}"
        )
    return "\n".join(lines)


def _by_mpirun(ranks: int) -> int:
    """This command again, under mpirun."""
    beside = Path(sys.executable).parent / "mpirun"
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mapping = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    command = [str(beside) if beside.exists() else "mpirun", "-n", str(ranks), sys.executable, *sys.argv]
    return subprocess.run(command, env={**os.environ, **allowed, **mapping}).returncode


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=12_500)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=None, help="drawn, and printed, if not given")
    parser.add_argument("--transport", choices=("shm", "mpi", "gloo"), default="shm")
    parser.add_argument(
        "--every", type=int, help="calls between two looks at what is held: 500, 20 or more in short runs"
    )
    parser.add_argument("--slack", type=float, default=1.0, help="multiplies the limits of memory, for short runs")
    parser.add_argument("--communicators", type=int, default=0, help="make so many instead, one after the other")
    options = parser.parse_args()
    os.environ.setdefault("ABCCL_TUNER", "built-in")  # measuring is another matter
    by_mpirun = "OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ
    if options.seed is None:
        if by_mpirun:
            parser.error("give --seed, the same on all ranks")
        options.seed = random.SystemRandom().randrange(1 << 30)
        sys.argv += ["--seed", str(options.seed)]
    if not by_mpirun:
        print(f"seed {options.seed}", flush=True)
    every = options.every or max(20, min(500, options.calls // 20))
    function, args = soak, (options.calls, options.seed, options.transport, every, options.slack)
    if options.communicators:
        function, args = lifecycles, (options.communicators, options.transport)
    if options.transport == "mpi":
        if not by_mpirun:
            return _by_mpirun(options.ranks)
        summary = function(*args)
        if summary.rank == 0:
            print(told([summary], options.ranks))
        return 0
    print(told(abccl.spawn(function, options.ranks, args), options.ranks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
