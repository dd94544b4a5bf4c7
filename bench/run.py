"""The benchmark from end to end, on every rank: who is measured, the cases one by one, checks around the timing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..collectives import Communicator, bootstrap
from ..errors import AbcclError
from ..transports.topology import Host
from .buffers import Buffers, take_gpu
from .data import calls_until_overflow, count_wrong, fill, poison
from .machine import cores_of_this_rank, machine
from .measure import Call, Meter, Subject, Timing
from .messages import AnyCase, Exchange
from .options import Options
from .peers import MPI, AbcclDirect, AbcclTorch, Gloo, Peer
from .regime import Probe, Regime
from .roofline import addition, operands, roofline_bytes
from .world import World, joined, launcher, on_ranks

DEFAULT_RANKS = 2


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
    """A case and its figures; `roofline` is the time of the additions beside it, if they were asked for."""

    case: AnyCase
    ours: tuple[Measured, ...]
    rivals: tuple[Measured, ...]
    roofline: Timing | None = None

    def ratio(self, rival: Measured, ours: Measured) -> float | None:
        """The rival's time by ours, if they were called in the same way."""
        return rival.timing.seconds / ours.timing.seconds if rival.door == ours.door else None

    @property
    def memory_bandwidth(self) -> float | None:
        """Of the roofline, in GB/s."""
        return None if self.roofline is None else roofline_bytes(self.case) / self.roofline.seconds / 1e9

    def part(self, measured: Measured) -> float | None:
        """The part of the roofline's bandwidth that it reaches, counting the bytes that must be moved at least."""
        if self.memory_bandwidth is None:
            return None
        return self.case.least_bytes / measured.timing.seconds / 1e9 / self.memory_bandwidth


@dataclass(frozen=True)
class Report:
    """Where and with what it was measured, the rows, and the cache regimes: before the first row, after the last.

    Attributes:
        machine: the host of rank 0, and the cores of all ranks.
        hosts: where the ranks are.
        transport: abccl's.
        names: the algorithms that will run.
    """

    options: Options
    started_by: str
    machine: dict[str, Any]
    about: dict[str, dict[str, str]]
    rows: list[Row]
    regimes: list[Regime | None]
    hosts: tuple[Host, ...] = ()
    transport: str = ""
    names: frozenset[str] = frozenset()

    @property
    def wrong(self) -> int:
        """Elements that were wrong, of all peers."""
        return sum(m.wrong or 0 for row in self.rows for m in (*row.ours, *row.rivals))


class Listener:
    """Told by rank 0 what happens; this one does nothing."""

    def begins(self, report: Report, cases: list[AnyCase]) -> None:
        """Before the first case."""

    def works_on(self, case: AnyCase) -> None:
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
    options.settled(own.size)
    with joined(own, options.transport) as world:
        options = options.settled(own.size, world.natives)
        return _measure(options, world, listener if own.rank == 0 else Listener())


def _measure(options: Options, world: World, listener: Listener) -> Report:
    if options.library == "cupy":
        take_gpu(world.local_rank)
    ours, rivals = peers(options, world)
    facts = {**machine(), "cores_of_ranks": world.tell(cores_of_this_rank())}
    about = {peer.name if peer in rivals else f"abccl {peer.door}": peer.about() for peer in (*ours, *rivals)}
    probe = Probe(world)
    todo = list(options.cases())
    names = frozenset(_ran(peer, case, world.comm) for peer in ours for case in todo)
    report = Report(options, world.launcher, facts, about, [], [probe.measure()], world.hosts, world.transport, names)
    listener.begins(report, todo)
    try:
        for number, case in enumerate(todo):
            listener.works_on(case)
            row = measure_case(options, world, case, number, ours, rivals)
            report.rows.append(row)
            listener.has(row)
        report.regimes.append(probe.measure())
    finally:
        listener.ends(report)
    return report


def peers(options: Options, world: World) -> tuple[list[Peer], list[Peer]]:
    """abccl in all the ways asked for, and the libraries to compare it with.

    Raises:
        AbcclError: one can not be had here.
    """
    ours: list[Peer] = []
    array = options.array or "numpy"
    rivals: list[Peer] = [
        MPI(world, array, options.persistent) if name == "mpi" else Gloo(world) for name in options.rivals
    ]
    for rival in rivals:
        rival.door = options.door(rival.name)
    for door in options.doors():
        for name in options.algorithms:
            if door == "torch":
                ours.append(AbcclTorch(world, name))
            else:
                ours.append(AbcclDirect(world, name, array, options.persistent))
    return ours, rivals


def measure_case(
    options: Options, world: World, case: AnyCase, number: int, ours: list[Peer], rivals: list[Peer]
) -> Row:
    """Measure one case, the peers in turn. All call it.

    Args:
        number: of the case; other data for each.

    Raises:
        ArgumentError: a peer refuses it.
    """
    everyone = [*ours, *rivals]
    buffers = Buffers(case, options.library, world.comm)
    calls = [[peer.call(case, buffers, root) for root in options.roots] for peer in everyone]
    wrong = [0] * len(everyone)

    def check(seed: int, which: int) -> None:
        for index, peer in enumerate(everyone):
            wrong[index] += check_call(peer, calls[index][which], case, buffers, world, options.roots[which], seed)

    if options.check:
        check(2 * number, 0)
    fill(case, buffers.x, 2 * number, world.rank, timing=True)
    buffers.to_device()
    limit = calls_until_overflow(case)
    refill: Call = buffers.keep() if limit else lambda: None
    for index, peer in enumerate(everyone):
        for call in calls[index]:
            refill()
            peer.first(call, case)
    meter = Meter(world.comm.barrier, world.slowest, world.all, isolated=options.loop == "isolated")
    subjects = [Subject(of_peer, refill, limit) for of_peer in calls]
    if options.roofline:
        a, b = operands(case, world.rank)
        subjects.append(Subject([addition(a, b)], lambda: None, None))
    timings = meter.measure(subjects, options.budget)
    if options.check:
        check(2 * number + 1, -1)
    totals = [world.total(number) if options.check else None for number in wrong]
    if isinstance(case, Exchange):
        timings = [timing.divided(case.messages) for timing in timings]
    measured = [
        Measured(peer.name, peer.door, peer.algorithm, _ran(peer, case, world.comm), timing, total)
        for peer, timing, total in zip(everyone, timings, totals)
    ]
    roofline = timings[-1] if options.roofline else None
    return Row(case, tuple(measured[: len(ours)]), tuple(measured[len(ours) :]), roofline)


def check_call(peer: Peer, call: Call, case: AnyCase, buffers: Buffers, world: World, root: int, seed: int) -> int:
    """Make the call on random data: how many elements of this rank's result are wrong.

    Raises:
        ArgumentError: the library refuses it.
    """
    fill(case, buffers.x, seed, world.rank)
    if not case.in_place:
        poison(buffers.result)
    buffers.to_device()
    peer.first(call, case)
    buffers.to_host()
    return count_wrong(case, buffers.result, seed, world.rank, root)


def _ran(peer: Peer, case: AnyCase, comm: Communicator) -> str:
    """The algorithm that the communicator takes, as far as that is known."""
    if peer.name != "abccl" or isinstance(case, Exchange):
        return ""
    asked = None if peer.algorithm == "auto" else peer.algorithm
    return comm.tuner.decide(case.collective, case.size, asked).choice.algorithm_name


def geometric_mean(ratios: list[float], cap: float = math.inf) -> float:
    """Of the ratios, each at most `cap`."""
    return math.exp(sum(math.log(min(ratio, cap)) for ratio in ratios) / len(ratios))


# ---- on ranks of our own


def measure(options: Options, make_listener: Callable[[], Listener]) -> tuple[Report | None, AbcclError | None]:
    """Measure among the ranks that were started or, alone, among new ones.

    Args:
        options: as the user gave them.
        make_listener: makes rank 0's listener, where rank 0 is; a function that a new process can import.

    Returns:
        The report, on rank 0 and where the ranks were started from; or what to tell the user about a failure. Neither
        on a rank that has nothing to tell.
    """
    own, ranks = bootstrap.find(), options.ranks or DEFAULT_RANKS
    if not launcher(own):
        if "mpi" in options.rivals:
            World.wants_mpi(own)
        options.settled(ranks)
    return on_ranks(own, _on_rank, (options, make_listener), ranks)


def _on_rank(own: bootstrap.Bootstrap, options: Options, make_listener: Callable[[], Listener]) -> Report:
    return measure_here(options, own, make_listener() if own.rank == 0 else Listener())
