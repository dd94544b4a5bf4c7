"""The benchmark from end to end, on every rank: who is measured, the cases one by one, checks around the timing."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..algorithms import Collective, algorithms, lookup
from ..collectives import bootstrap, spawn
from ..collectives.choice import choose
from ..errors import AbcclError, ArgumentError, CollectiveError
from ..transports.types import check_operator, element_type
from .collectives import FACTS, Case, cases
from .data import calls_until_overflow, count_wrong, fill, poison
from .machine import cores_of_this_rank, machine
from .measure import Budget, Call, Meter, Subject, Timing
from .peers import RIVALS, RIVALS_DOORS, AbcclDirect, AbcclTorch, Buffers, Peer
from .world import World, launcher

DEFAULT_RANKS = 2
LOOPS = ("latency", "isolated", "throughput")


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        collective: what is measured.
        ranks: how many to start; None to take those that were started.
        sizes: smallest, largest, factor between.
        dtype: the element type.
        op: the operator; None for sum, or for none where nothing is reduced.
        algorithms: names, "auto" for the library's choice, "all" for each that runs on so many ranks.
        rivals: the libraries to compare with.
        through: the way to abccl, "direct" or "torch"; None for the one that each rival is called by.
        array: "numpy" or "torch", what abccl's own calls get; None for numpy.
        in_place: None for the natural form.
        root: None for any.
        loop: one of LOOPS; None for latency, or isolated where a root is given.
        check: whether results are checked.
        budget: how long.
        command: what the user typed.
    """

    collective: Collective
    ranks: int | None = None
    sizes: tuple[int, int, int] = (4, 64 << 20, 4)
    dtype: str = "float32"
    op: str | None = None
    algorithms: tuple[str, ...] = ("auto",)
    rivals: tuple[str, ...] = ()
    through: str | None = None
    array: str | None = None
    in_place: bool | None = None
    root: int | None = None
    loop: str | None = None
    check: bool = True
    budget: Budget = field(default_factory=lambda: Budget(0.25))
    command: str = ""

    def settled(self, ranks: int) -> Options:
        """The same with every default filled in for so many ranks.

        Raises:
            ArgumentError: they contradict each other, or abccl has no such thing.
        """
        call, facts = self.collective.value, FACTS[self.collective]
        if self.ranks not in (None, ranks):
            raise ArgumentError(f"{ranks} ranks were started, and --ranks says {self.ranks}: leave it out")
        if self.op is not None and not self.collective.reduces:
            raise ArgumentError(f"{call} has no operator: leave out --op {self.op}")
        op = (self.op or "sum") if self.collective.reduces else ""
        element_type(self.dtype)
        if op:
            check_operator(op, self.dtype)
        if self.in_place not in (None, facts.in_place) and not facts.both_ways:
            form = "in place" if facts.in_place else "out of place"
            raise ArgumentError(f"{call} is measured {form} only: leave out the option")
        if self.sizes[0] > self.sizes[1]:
            raise ArgumentError(f"--min is {self.sizes[0]} bytes and --max is {self.sizes[1]}: it must not be less")
        if self.root is not None and not (self.collective.rooted and 0 <= self.root < ranks):
            wanted = f"a rank from 0 to {ranks - 1}" if self.collective.rooted else f"left out: {call} has no root"
            raise ArgumentError(f"--root {self.root}: it must be {wanted}")
        if self.loop == "latency" and self.root is not None:
            raise ArgumentError("--loop latency changes the root from call to call: leave out --root, or --loop isolated")
        loop = self.loop or ("latency" if self.root is None else "isolated")
        named = tuple(dict.fromkeys(self._named(ranks)))
        if len(named) > 1 and "torch" in self._doors():
            raise ArgumentError(
                "torch.distributed's calls do not name an algorithm: give one, or measure abccl's own calls by "
                "--through direct"
            )
        root = 0 if self.root is None and loop != "latency" and self.collective.rooted else self.root
        in_place = facts.in_place if self.in_place is None else self.in_place
        return replace(self, ranks=ranks, op=op, algorithms=named, in_place=in_place, root=root, loop=loop)

    def _named(self, ranks: int) -> list[str]:
        """The algorithms by name, without those that do not run on so many ranks if all were asked for."""
        found = []
        for name in self.algorithms:
            if name == "all":
                found += [a.name for a in algorithms(self.collective).values() if not a.refusal(ranks)]
            else:
                wants = None if name == "auto" else lookup(self.collective, name).refusal(ranks)
                if wants:
                    raise ArgumentError(f"{self.collective.value} {name} wants {wants}, and there are {ranks}")
                found.append(name)
        return found

    def _doors(self) -> list[str]:
        """The ways by which abccl is called."""
        return list(dict.fromkeys(self.through or RIVALS_DOORS[name] for name in self.rivals)) or [
            self.through or "direct"
        ]

    def peers(self, world: World) -> tuple[list[Peer], list[Peer]]:
        """abccl in all the ways asked for, and the libraries to compare it with.

        Raises:
            AbcclError: one can not be had here.
        """
        ours: list[Peer] = []
        rivals = [RIVALS[name](world) for name in self.rivals]
        for rival in rivals:
            rival.door = self.through or rival.door
        for door in self._doors():
            for name in self.algorithms:
                if door == "torch":
                    ours.append(AbcclTorch(world, name))
                else:
                    ours.append(AbcclDirect(world, name, self.array or "numpy"))
        return ours, rivals

    @property
    def library(self) -> str:
        """Who allocates the buffers."""
        uses_torch = "torch" in self._doors() or any(RIVALS_DOORS[name] == "torch" for name in self.rivals)
        return self.array or ("torch" if uses_torch else "numpy")

    @property
    def roots(self) -> list[int]:
        """The roots that the loop goes through."""
        assert self.ranks is not None
        changes = self.collective.rooted and self.loop == "latency"
        return list(range(self.ranks)) if changes else [self.root or 0]


@dataclass(frozen=True)
class Measured:
    """One peer's figures for one case.

    Attributes:
        library, door: of the peer.
        algorithm: the one asked for.
        ran: the one that ran, where that is known.
        timing: the times.
        wrong: elements that were wrong, on all ranks and in both checks; None if unchecked.
    """

    library: str
    door: str
    algorithm: str
    ran: str
    timing: Timing
    wrong: int | None


@dataclass(frozen=True)
class Row:
    """A case and its figures."""

    case: Case
    ours: tuple[Measured, ...]
    rivals: tuple[Measured, ...]

    def ratio(self, rival: Measured, ours: Measured) -> float | None:
        """The rival's time by ours, if they were called in the same way."""
        return rival.timing.seconds / ours.timing.seconds if rival.door == ours.door else None


@dataclass(frozen=True)
class Report:
    """Where and with what it was measured, and the rows."""

    options: Options
    started_by: str
    machine: dict[str, Any]
    about: dict[str, dict[str, str]]
    rows: list[Row]

    @property
    def wrong(self) -> int:
        """Elements that were wrong, of all peers."""
        return sum(m.wrong or 0 for row in self.rows for m in (*row.ours, *row.rivals))


class Listener:
    """Told by rank 0 what happens; this one does nothing."""

    def begins(self, report: Report, cases: list[Case]) -> None:
        """Before the first case."""

    def works_on(self, case: Case) -> None:
        """A case begins. Nothing may run in the background from here to `has`."""

    def has(self, row: Row) -> None:
        """A case is done."""

    def ends(self, report: Report) -> None:
        """All is done, well or not."""


def measure_here(options: Options, own: bootstrap.Bootstrap, listener: Listener) -> Report:
    """Measure among the ranks that were started. All call it; all return the same figures.

    Args:
        options: as the user gave them.
        own: this rank.
        listener: used on rank 0.

    Raises:
        AbcclError: it can not be done; on all ranks.
    """
    options = options.settled(own.size)
    world = World(own)
    try:
        report = _measure(options, world, listener if own.rank == 0 else Listener())
        world.close()
        return report
    except BaseException as error:
        world.abort(str(error))
        if world.launcher == "mpirun" and not isinstance(error, AbcclError):
            # Ranks that wait in MPI do not notice that this one is gone.
            traceback.print_exc()
            sys.stderr.flush()
            world.mpi().COMM_WORLD.Abort(1)
        raise


def _measure(options: Options, world: World, listener: Listener) -> Report:
    assert options.op is not None and options.in_place is not None
    ours, rivals = options.peers(world)
    facts = {**machine(), "cores_of_ranks": world.tell(cores_of_this_rank())}
    about = {peer.name if peer in rivals else f"abccl {peer.door}": peer.about() for peer in (*ours, *rivals)}
    report = Report(options, world.launcher, facts, about, [])
    todo = list(cases(options.collective, world.size, options.sizes, options.dtype, options.op, options.in_place))
    listener.begins(report, todo)
    try:
        for number, case in enumerate(todo):
            listener.works_on(case)
            row = _measure_case(options, world, case, number, ours, rivals)
            report.rows.append(row)
            listener.has(row)
    finally:
        listener.ends(report)
    return report


def _measure_case(
    options: Options, world: World, case: Case, number: int, ours: list[Peer], rivals: list[Peer]
) -> Row:
    peers = [*ours, *rivals]
    buffers = Buffers(case, options.library)
    calls = [[peer.prepare(case, buffers, root) for root in options.roots] for peer in peers]
    wrong = [0] * len(peers)

    def check(seed: int, which: int) -> None:
        for index, peer in enumerate(peers):
            wrong[index] += _check(peer, calls[index][which], case, buffers, world, options.roots[which], seed)

    if options.check:
        check(2 * number, 0)
    fill(case, buffers.x, 2 * number, world.rank, timing=True)
    limit = calls_until_overflow(case)
    fresh = buffers.x.copy() if limit else None

    def refill() -> None:
        if fresh is not None:
            np.copyto(buffers.x, fresh)

    for index, peer in enumerate(peers):
        for call in calls[index]:
            refill()
            peer.first(call, case)
    meter = Meter(world.comm.barrier, world.slowest, world.all, isolated=options.loop == "isolated")
    timings = meter.measure([Subject(of_peer, refill, limit) for of_peer in calls], options.budget)
    if options.check:
        check(2 * number + 1, -1)
    measured = [
        Measured(peer.name, peer.door, peer.algorithm, _ran(peer, case), timing, world.total(w) if options.check else None)
        for peer, timing, w in zip(peers, timings, wrong)
    ]
    return Row(case, tuple(measured[: len(ours)]), tuple(measured[len(ours) :]))


def _check(peer: Peer, call: Call, case: Case, buffers: Buffers, world: World, root: int, seed: int) -> int:
    """Elements of this rank's result that are wrong."""
    fill(case, buffers.x, seed, world.rank)
    if not case.in_place:
        poison(buffers.result)
    peer.first(call, case)
    return count_wrong(case, buffers.result, seed, world.rank, root)


def _ran(peer: Peer, case: Case) -> str:
    if peer.name != "abccl":
        return ""
    return choose(case.collective, case.ranks, case.size, None if peer.algorithm == "auto" else peer.algorithm).name


def geometric_mean(ratios: list[float], cap: float = math.inf) -> float:
    """Of the ratios, each at most `cap`."""
    return math.exp(sum(math.log(min(ratio, cap)) for ratio in ratios) / len(ratios))


# ---- on ranks of our own

Outcome = tuple[Report | None, AbcclError | None]


def measure(options: Options, make_listener: Callable[[], Listener]) -> tuple[Report | None, AbcclError | None]:
    """Measure among the ranks that were started or, alone, among new ones.

    Args:
        options: as the user gave them.
        make_listener: makes rank 0's listener, where rank 0 is; a function that a new process can import.

    Returns:
        The report, on rank 0 and where the ranks were started from; or what to tell the user about a failure. Neither on
        another rank that has nothing to tell.
    """
    own = bootstrap.find()
    if launcher(own):
        report, error = _outcome(options, own, make_listener)
        tells = own.rank == 0 or isinstance(error, CollectiveError)
        return (report if own.rank == 0 else None), (error if tells else None)
    ranks = options.ranks or DEFAULT_RANKS
    if "mpi" in options.rivals:
        World.wants_mpi(own)
    options.settled(ranks)
    outcomes = spawn(_spawned, ranks, (options, make_listener))
    errors = [error for _, error in outcomes if error is not None]
    # A rank that failed by itself knows more than those that were let down.
    errors.sort(key=lambda error: isinstance(error, CollectiveError))
    return outcomes[0][0], errors[0] if errors else None


def _spawned(options: Options, make_listener: Callable[[], Listener]) -> Outcome:
    return _outcome(options, bootstrap.find(), make_listener)


def _outcome(options: Options, own: bootstrap.Bootstrap, make_listener: Callable[[], Listener]) -> Outcome:
    try:
        report = measure_here(options, own, make_listener() if own.rank == 0 else Listener())
    except AbcclError as error:
        return None, error
    return (report if own.rank == 0 else None), None
