"""What a schedule takes on given links: the alpha-beta-gamma model, walked along its critical path.

    seconds = messages * alpha + bytes * beta + folded * gamma

The walk follows the lowered code of every rank. A rank is one processor: what it copies out, takes in and folds comes
one after the other, and a message is there `alpha` after its sender has put it out; so the time of the slowest rank is
a sum of counts along one path, times constants: `Counts.seconds` is that one line. Hockney 1994; LogGP (Alexandrov et
al. 1995) for what keeps a processor busy; gamma from Thakur, Rabenseifner & Gropp 2005.

A vector goes through the schedule in segments: the first one takes the path, every further one what the busiest
resource needs for a segment, or the path again, shared by the lanes. Resources that ranks share are capacities: the
cores of a host, and its network card.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ScheduleError
from .decoded import Decoded, Receiving, Release, Sending, Writing, decode
from .plan import Instruction, Place, lower
from .registry import Algorithm
from .schedule import Send

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Constants:
    """What one link class and one way of moving messages cost, in seconds and seconds per byte.

    Attributes:
        launch: alpha; to start a collective and to end it.
        alpha: from when a message has been put out until its receiver, waiting, has seen it; on one host.
        overhead: alpha; a message keeps its sender busy for so long, and its receiver again.
        send: beta; to put a byte out, for one reader or for several.
        receive: beta; to copy a byte of a message to where it belongs.
        lent: beta; to copy a byte that the sender has not put out but lent.
        copy: beta; to copy a byte within a rank.
        fold: gamma; to fold a byte of a message into a sum.
        lent_fold: gamma; to fold a byte of a message that is lent.
        far_alpha: alpha, of a message to another host.
        far_overhead: its overhead, on each side.
        far_beta: beta; a byte on the network card of a host, which its ranks share. Both ways at once.
    """

    launch: float = 0.0
    alpha: float = 0.0
    overhead: float = 0.0
    send: float = 0.0
    receive: float = 0.0
    lent: float = 0.0
    copy: float = 0.0
    fold: float = 0.0
    lent_fold: float = 0.0
    far_alpha: float = 0.0
    far_overhead: float = 0.0
    far_beta: float = 0.0


NAMES = tuple(field.name for field in fields(Constants))
LAUNCH, ALPHA, OVERHEAD, SEND, RECEIVE, LENT, COPY, FOLD, LENT_FOLD, FAR_ALPHA, FAR_OVERHEAD, FAR_BETA = range(
    len(NAMES)
)
KINDS = {
    "alpha": [LAUNCH, ALPHA, OVERHEAD, FAR_ALPHA, FAR_OVERHEAD],
    "beta": [SEND, RECEIVE, LENT, COPY, FAR_BETA],
    "gamma": [FOLD, LENT_FOLD],
}
"""Which constants are an alpha, a beta, a gamma."""


class Runs(NamedTuple):
    """Ways of running a schedule, as arrays of one length.

    Attributes:
        block: bytes of a block in a segment.
        segments: how many there are.
        lanes: how many are under way at a time.
        lent: whether what may be lent is lent, 0 or 1.
        constants: by name (`NAMES`) and run.
    """

    block: Floats
    segments: Floats
    lanes: Floats
    lent: Floats
    constants: Floats


class Put(NamedTuple):
    """A rank puts out `blocks` as messages of these numbers; `lends`: they may be lent; `far`: to another host."""

    rank: int
    messages: tuple[int, ...]
    blocks: int
    lends: bool
    far: bool


class Recv(NamedTuple):
    """A rank waits for a message, which a rank on `host` has sent if that is another one (else -1)."""

    rank: int
    message: int
    host: int


class Work(NamedTuple):
    """A rank copies or folds so many blocks; `name` of the constant, `lends` of the message that they came with."""

    rank: int
    name: int
    blocks: int
    lends: bool


class Walk:
    """The lowered code of all ranks, in an order in which it can be run.

    Cost: linear in the messages and their blocks; some 10 us for each message, however many runs there are.

    Args:
        hosts: the ranks by host; one host if there are none.
        in_place: whether input and output are one, so that nothing need be copied from one to the other.

    Raises:
        ScheduleError: the schedule never ends.
    """

    def __init__(
        self, algorithm: Algorithm, size: int, root: int = 0, hosts: Sequence[Sequence[int]] = (), in_place: bool = True
    ) -> None:
        self.size = size
        self.hosts, self.host_of = _by_host(hosts, size)
        self.in_place = in_place
        self.events = self._ordered([decode(lower(algorithm, rank, size, root).code) for rank in range(size)])
        self._add_up()

    def _ordered(self, programs: list[list[Decoded]]) -> list[Put | Recv | Work]:
        """Every rank's code as far as it goes, in turn, until all are through."""
        events: list[Put | Recv | Work] = []
        waiting: dict[tuple[int, int], deque[int]] = {}
        lends: list[bool] = []
        registers: list[list[int]] = [[] for _ in programs]
        places = [0] * len(programs)
        while any(place < len(program) for place, program in zip(places, programs)):
            before = list(places)
            for rank, program in enumerate(programs):
                while places[rank] < len(program):
                    instruction = program[places[rank]]
                    if isinstance(instruction, Receiving):
                        queue = waiting.get((instruction.peer, rank))
                        if not queue:
                            break
                        registers[rank].append(queue.popleft())
                        events.append(Recv(rank, registers[rank][-1], self._far(instruction.peer, rank)))
                    elif isinstance(instruction, Release):
                        registers[rank].clear()
                    elif isinstance(instruction, Sending):
                        for far in (False, True):
                            peers = [p for p in instruction.peers if (self._far(rank, p) >= 0) is far]
                            if not peers:
                                continue
                            numbers = tuple(range(len(lends), len(lends) + len(peers)))
                            lends += [instruction.lends and not far] * len(peers)
                            for peer, number in zip(peers, numbers):
                                waiting.setdefault((rank, peer), deque()).append(number)
                            events.append(Put(rank, numbers, len(instruction.parts), lends[-1], far))
                    elif isinstance(instruction, Writing):
                        events += self._works(rank, instruction, registers[rank], lends)
                    places[rank] += 1
            if places == before:
                raise ScheduleError(
                    "all ranks wait for messages that none sends: `abccl verify` names the step of the schedule"
                )
        return events

    def _far(self, source: int, destination: int) -> int:
        """The source's host, if the destination is on another; else -1."""
        return self.host_of[source] if self.host_of[source] != self.host_of[destination] else -1

    def _works(self, rank: int, writing: Writing, register: list[int], lends: list[bool]) -> Iterator[Work]:
        if writing.kind is Instruction.SCALE:
            return
        messages = [source for source in writing.sources if source[0] == Place.MESSAGE]
        for source in messages:
            name = FOLD if writing.kind is Instruction.FOLD else RECEIVE
            yield Work(rank, name, 1, lends[register[source[2]]])
        moves = (writing.sources[0][0], writing.destination[0]) == (Place.INPUT, Place.OUTPUT)
        if not messages and not (moves and self.in_place):
            yield Work(rank, COPY, 1, False)

    def work(self, rank: int, runs: Runs) -> Floats:
        """What keeps a rank busy in a segment, waits left out, by constant and run."""
        counts = np.outer(self._messages[rank], np.ones(len(runs.block))) + np.outer(self._blocks[rank], runs.block)
        for name, lent_name in ((SEND, None), (RECEIVE, LENT), (FOLD, LENT_FOLD)):
            lent = self._lent[rank][name] * runs.lent * runs.block
            counts[name] -= lent
            if lent_name is not None:
                counts[lent_name] += lent
        return counts

    def _add_up(self) -> None:
        """What keeps each rank busy: messages, blocks, those of them that are lent, and those that leave the host."""
        shape = (self.size, len(NAMES))
        self._messages, self._blocks, self._lent = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.leaving = np.zeros(self.size)
        for event in self.events:
            match event:
                case Put(rank, messages, blocks, lends, far):
                    self._messages[rank, FAR_OVERHEAD if far else OVERHEAD] += len(messages)
                    self._blocks[rank, SEND] += blocks
                    self._lent[rank, SEND] += blocks * lends
                    self.leaving[rank] += blocks * len(messages) * far
                case Recv(rank, _, host):
                    self._messages[rank, OVERHEAD if host < 0 else FAR_OVERHEAD] += 1
                case Work(rank, name, blocks, lends):
                    self._blocks[rank, name] += blocks
                    self._lent[rank, name] += blocks * lends

    def counts(self, runs: Runs, cores: Sequence[int]) -> Floats:
        """Of each constant (`NAMES`), how often it counts on the critical path of each run.

        Args:
            cores: of each host, for its ranks.
        """
        return _Pass(self, runs, cores).total()


class Outline:
    """The closed form of a walk, for more ranks than one wants to walk over: its steps, and one rank's work.

    A segment takes `steps` messages one after the other, but no less than the busiest of two ranks takes, the first and
    one in the middle; every further segment takes as long as that rank.

    Args:
        steps: the longest chain of dependent messages.
        hosts, in_place: as for `Walk`.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        size: int,
        steps: int,
        hosts: Sequence[Sequence[int]] = (),
        in_place: bool = True,
    ) -> None:
        self.steps, self.size = steps, size
        self.hosts, self.host_of = _by_host(hosts, size)
        self.far_steps, self.leaving = self._far(algorithm)
        self.works = [self._work(algorithm, rank, in_place) for rank in (0, size // 2)]
        sent = sum(work[1][SEND] for work in self.works)
        self.lends = sum(work[2] for work in self.works) / sent if sent else 0.0

    def _far(self, algorithm: Algorithm) -> tuple[int, int]:
        """Steps in which a rank of the first host talks to another host, and the blocks that leave it."""
        steps, leaving = set(), 0
        for rank in self.hosts[0] if len(self.hosts) > 1 else ():
            for number, step in enumerate(algorithm.program(rank, self.size)):
                far = [m for m in step if self.host_of[m.peer] != self.host_of[rank]]
                leaving += sum(len(m.blocks) for m in far if isinstance(m, Send))
                if far:
                    steps.add(number)
        return min(len(steps), self.steps), leaving

    def _work(self, algorithm: Algorithm, rank: int, in_place: bool) -> tuple[Floats, Floats, int]:
        """A rank's counts of messages and of blocks, and the blocks that it may lend."""
        fixed, blocks, lent = np.zeros(len(NAMES)), np.zeros(len(NAMES)), 0
        for instruction in decode(lower(algorithm, rank, self.size).code):
            match instruction:
                case Sending(_, peers, parts, lends):
                    far = [self.host_of[peer] != self.host_of[rank] for peer in peers]
                    lent += len(parts) * (lends and not any(far))
                    fixed[FAR_OVERHEAD] += sum(far)
                    fixed[OVERHEAD] += len(far) - sum(far)
                    blocks[SEND] += len(parts)
                case Receiving(_, peer, _):
                    fixed[FAR_OVERHEAD if self.host_of[peer] != self.host_of[rank] else OVERHEAD] += 1
                case Writing(kind, destination, sources):
                    messages = sum(source[0] == Place.MESSAGE for source in sources)
                    moves = (sources[0][0], destination[0]) == (Place.INPUT, Place.OUTPUT)
                    if messages:
                        blocks[FOLD if kind is Instruction.FOLD else RECEIVE] += messages
                    elif kind is Instruction.COPY and not (moves and in_place):
                        blocks[COPY] += 1
        return fixed, blocks, lent

    def _busy(self, work: tuple[Floats, Floats, int], runs: Runs) -> Floats:
        """What keeps a rank busy in a segment; of what it receives as large a part is lent as of what is sent."""
        fixed, blocks, lent = work
        counts = np.outer(fixed, np.ones(len(runs.block))) + np.outer(blocks, runs.block)
        counts[SEND] -= lent * runs.lent * runs.block
        for name, lent_name in _LENT_NAMES.items():
            share = self.lends * runs.lent * counts[name]
            counts[lent_name] += share
            counts[name] -= share
        return counts

    def counts(self, runs: Runs, cores: Sequence[int]) -> Floats:
        """As `Walk.counts`."""
        shape = (len(NAMES), len(runs.block))
        crowd = max(max(1.0, len(host) / there) for host, there in zip(self.hosts, cores))
        busy = [crowd * self._busy(work, runs) for work in self.works]
        card, chain = np.zeros(shape), np.zeros(shape)
        card[FAR_BETA] = self.leaving * runs.block
        chain[OVERHEAD] = 2.0 * (self.steps - self.far_steps)
        chain[FAR_OVERHEAD] = 2.0 * self.far_steps
        lent = self.lends * runs.lent
        chain[SEND] = chain[RECEIVE] = self.steps * runs.block * (1 - lent)
        chain[LENT] = self.steps * runs.block * lent
        every = slowest([*busy, card], runs.constants)
        first = slowest([every, chain], runs.constants)
        first[LAUNCH] += 1
        first[ALPHA] += self.steps - self.far_steps
        first[FAR_ALPHA] += self.far_steps
        return first + (runs.segments - 1) * every


def _by_host(hosts: Sequence[Sequence[int]], size: int) -> tuple[list[list[int]], dict[int, int]]:
    """The ranks of each host, all on one if none is named, and the number of each rank's host."""
    named = [list(host) for host in hosts] or [list(range(size))]
    return named, {rank: number for number, host in enumerate(named) for rank in host}


_LENT_NAMES = {RECEIVE: LENT, FOLD: LENT_FOLD}


class _Pass:
    """The walk over all events with given constants: when each rank is how far, and by which counts."""

    def __init__(self, walk: Walk, runs: Runs, cores: Sequence[int]) -> None:
        self.walk, self.runs, self.cores = walk, runs, cores
        self.runs_there = len(runs.block)
        # Counts by rank; those that messages have been sent with are shared, and copied before they change.
        self.path = [np.zeros((len(NAMES), self.runs_there)) for _ in range(walk.size)]
        self.shared = [False] * walk.size
        self.time = [np.zeros(self.runs_there) for _ in range(walk.size)]
        self.sent: list[tuple[Floats, Floats, Floats | None]] = []

    def total(self) -> Floats:
        runs = self.runs
        for rank in range(self.walk.size):
            self._add(rank, LAUNCH, np.ones(self.runs_there))
        busy = [self.walk.work(rank, runs) for rank in range(self.walk.size)]
        self._go()
        _, first = _last(self.time, self.path)
        begins = slowest([first, *self._crowded(busy), *self._card(busy, 1)], runs.constants)
        if not (runs.segments > 1).any():
            return begins
        self.shared = [True] * self.walk.size
        self._go()
        _, second = _last(self.time, self.path)
        again = _positive(second - first, runs.constants)
        every = [again / runs.lanes, *busy, *self._crowded(busy), *self._card(busy, 0)]
        return begins + (runs.segments - 1) * slowest(every, runs.constants)

    def _go(self) -> None:
        runs, walk = self.runs, self.walk
        alpha = runs.constants[ALPHA]
        self.sent = []
        kept = 1 - runs.lent
        for event in walk.events:
            rank = event.rank
            if isinstance(event, Work):
                amount = event.blocks * runs.block
                if event.lends:
                    self._add(rank, event.name, amount * kept)
                    self._add(rank, _LENT_NAMES[event.name], amount * runs.lent)
                else:
                    self._add(rank, event.name, amount)
            elif isinstance(event, Recv):
                self._receive(rank, *self.sent[event.message])
                self._add(rank, OVERHEAD if event.host < 0 else FAR_OVERHEAD, 1.0)
            else:
                amount = event.blocks * runs.block
                self._add(rank, SEND, amount * kept if event.lends else amount)
                for _ in event.messages:
                    self._add(rank, FAR_OVERHEAD if event.far else OVERHEAD, 1.0)
                    if event.far:
                        self._post_far(rank, amount)
                    else:
                        self.sent.append((self.time[rank] + alpha, self.path[rank], None))
                    self.shared[rank] = True

    def _post_far(self, rank: int, amount: Floats) -> None:
        """A message goes over the network card of the rank's host: see `_card` for what its ranks share."""
        far_alpha, beta = self.runs.constants[FAR_ALPHA], self.runs.constants[FAR_BETA]
        self.sent.append((self.time[rank] + amount * beta + far_alpha, self.path[rank], amount))

    def _receive(self, rank: int, time: Floats, path: Floats, on_the_card: Floats | None) -> None:
        """Wait for a message, if it is not there yet."""
        later = time > self.time[rank]
        if not later.any():
            return
        path = path.copy()
        if on_the_card is None:
            path[ALPHA] += 1
        else:
            path[FAR_ALPHA] += 1
            path[FAR_BETA] += on_the_card
        if not later.all():
            time, path = np.where(later, time, self.time[rank]), np.where(later, path, self.path[rank])
        self.time[rank], self.path[rank], self.shared[rank] = time, path, False

    def _add(self, rank: int, name: int, amount: Floats | float) -> None:
        if self.shared[rank]:
            self.path[rank], self.shared[rank] = self.path[rank].copy(), False
        self.path[rank][name] += amount
        self.time[rank] = self.time[rank] + amount * self.runs.constants[name]

    def _crowded(self, busy: Sequence[Floats]) -> Iterator[Floats]:
        """What the cores of each host have to do, where it has fewer of them than ranks."""
        for host, cores in zip(self.walk.hosts, self.cores):
            if cores < len(host):
                yield sum((busy[rank] for rank in host[1:]), busy[host[0]]) / cores

    def _card(self, busy: Sequence[Floats], messages: int) -> Iterator[Floats]:
        """What a host's network card has to carry, and the latency of so many messages."""
        for host in self.walk.hosts if len(self.walk.hosts) > 1 else ():
            counts = np.zeros_like(busy[0])
            counts[LAUNCH] = counts[FAR_ALPHA] = messages
            counts[FAR_BETA] = sum(self.walk.leaving[rank] for rank in host) * self.runs.block
            yield counts


def _last(times: Sequence[Floats], paths: Sequence[Floats]) -> tuple[Floats, Floats]:
    time, path = times[0], paths[0]
    for other_time, other in zip(times[1:], paths[1:]):
        later = other_time > time
        time, path = np.where(later, other_time, time), np.where(later, other, path)
    return time, path


def _positive(counts: Floats, constants: Floats) -> Floats:
    """Counts between two different paths, without those below zero; they take as long."""
    positive = np.maximum(counts, 0.0)
    return positive * (seconds(counts, constants) / np.maximum(seconds(positive, constants), 1e-30))


def slowest(counts: Sequence[Floats], constants: Floats) -> Floats:
    """Of each run the counts that take longest."""
    return _last([seconds(one, constants) for one in counts], counts)[1]


def seconds(counts: Floats, constants: Floats, names: Sequence[int] = range(len(NAMES))) -> Floats:
    """messages * alpha + bytes * beta + folded * gamma, of each run; of some of the constants if told so.

    Added in one order, so that every processor comes to the same bits.
    """
    total = np.zeros(counts.shape[1])
    for name in names:
        total = total + counts[name] * constants[name]
    return total
