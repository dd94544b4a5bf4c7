"""What the library does and why, said while it does it: ABCCL_DEBUG=info or trace, by the logger "abccl".

At info each thing is said once, and what is the same on all ranks by rank 0 only; at trace every rank says all, and
each call when it starts and when it ends. Without the variable nothing is said. A program redirects the lines with the
logging module: a handler of its own, on "abccl" or on the root, takes the place of standard error.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ..algorithms import Collective
from ..algorithms.plan import Plan
from ..algorithms.words import count, in_words
from ..errors import ArgumentError
from ..transports import Transport, _native
from ..transports.joint import JOINT, JointTransport
from ..transports.shm import ShmTransport
from ..transports.topology import HOST, Topology
from .tuner.tuner import Decision, Tuner, size_class

ENVIRONMENT = "ABCCL_DEBUG"
"""What is said on standard error: info or trace; nothing if unset."""

LEVELS = {"info": logging.INFO, "trace": logging.DEBUG}

LOGGER = logging.getLogger("abccl")

LONGEST = 4000
"""Bytes of a line: a pipe takes 4096 at once, and longer lines of several ranks would mix."""

TICK = 0.01
"""Seconds between looks at asynchronous calls that are traced."""

_said: set[tuple[int, str]] = set()  # by process, or a forked child would be silent


def level() -> int | None:
    """The level of the logging module that the environment asks for; None if nothing is to be said.

    Raises:
        ArgumentError: it asks for something else.
    """
    wanted = os.environ.get(ENVIRONMENT)
    if not wanted:
        return None
    if wanted not in LEVELS:
        known = " (choices, topology, protocols, once) or ".join(LEVELS)
        raise ArgumentError(f"{ENVIRONMENT}={wanted!r}: wanted is {known} (every call); unset it for silence")
    return LEVELS[wanted]


def _first(what: str) -> bool:
    """Whether this is said for the first time in this process."""
    known = (os.getpid(), what) in _said
    _said.add((os.getpid(), what))
    return not known


def log_of(rank: int, size: int, group: str = "default") -> Log | None:
    """What a rank of a group says things by; None if nothing is to be said.

    Raises:
        ArgumentError: ABCCL_DEBUG is neither info nor trace.
    """
    wanted = level()
    if wanted is None:
        return None
    LOGGER.setLevel(wanted)
    if not any(isinstance(handler, _StandardError) for handler in LOGGER.handlers):
        LOGGER.addHandler(_StandardError())
    return Log(rank, size, group, wanted)


def say_start(rank: int, size: int, how: str, group: str = "default") -> None:
    """Say how this process was started, before it may wait for others; once in a process and group.

    Raises:
        ArgumentError: ABCCL_DEBUG is neither info nor trace.
    """
    log = log_of(rank, size, group)
    if log is not None:
        log.start(how)


def say_connected(
    wanted: str | None, transport: Transport, topology: Topology, tuner: Tuner | None, group: str
) -> None:
    """Say where the ranks of a new group are, what carries their messages and why, and what the tuner knows."""
    log = log_of(transport.rank, transport.size, group)
    if log is None:
        return
    log.reached(wanted, transport, topology)
    if tuner is not None:
        log.common("tuner", f"{tuner.how}; {tuner.table.told}")


class Log:
    """One rank's in a group. Made by `log_of`."""

    def __init__(self, rank: int, size: int, group: str, level: int) -> None:
        self.rank, self.traces = rank, level <= logging.DEBUG
        inside = f' in group "{group}"' if group not in ("", "default") else ""
        host = os.environ.get(HOST) or socket.gethostname()
        self._prefix = f"abccl [rank {rank} of {size}{inside}, {host}:{os.getpid()}]"
        self._chosen: set[tuple[Collective, int, str]] = set()

    def own(self, topic: str, text: str, level: int = logging.INFO) -> None:
        """Say what is this rank's."""
        line = f"{self._prefix} {topic}: {'; '.join(map(str.strip, text.splitlines()))}"
        LOGGER.log(level, "%s", line)

    def common(self, topic: str, text: str, speaks: bool | None = None) -> None:
        """Say what is the same on all ranks; at info by rank 0, or by those that `speaks` names."""
        if self.traces or (self.rank == 0 if speaks is None else speaks):
            self.own(topic, text)

    def start(self, how: str) -> None:
        """Say, once in a process, how it was started; and first what it is."""
        self.process()
        if _first(f"{self._prefix} {how}"):
            self.own("start", how)

    def process(self) -> None:
        """Say, once in a process, what it is."""
        if not _first("process"):
            return
        version = importlib.import_module(__package__.rpartition(".")[0]).__version__
        numpy = importlib.import_module("numpy").__version__
        kernels = f"kernels for {_native.instruction_set()}"
        self.common("version", f"abccl {version}, Python {platform.python_version()}, numpy {numpy}, {kernels}")
        ours = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("ABCCL_")]
        self.common("environment", ", ".join(ours))

    def reached(self, wanted: str | None, transport: Transport, topology: Topology) -> None:
        """Say where the ranks are, what carries messages, and why."""
        self.common("topology", f"{topology}")
        self.common("transport", transport_in_words(wanted, transport, topology))
        local = transport.local if isinstance(transport, JointTransport) else transport
        if isinstance(local, ShmTransport) and local.size > 1:
            first = local.rank == 0  # one of each host
            for topic, text in memory_in_words(local):
                self.common(topic, text, first)

    def choice(
        self, tuner: Tuner, collective: Collective, nbytes: int, decision: Decision, plan: Plan | None, slot_bytes: int
    ) -> None:
        """Say what runs a call, when the first of such a size is made.

        Args:
            plan: what was made of it; None for the engine's own collective.
        """
        size = size_class(nbytes)
        key = (collective, size, decision.choice.name)
        if key in self._chosen:
            return
        self._chosen.add(key)
        if self.traces or self.rank == 0:
            self.own("choice", choice_in_words(tuner, collective, size, decision, plan, slot_bytes))


class _StandardError(logging.Handler):
    """A line to standard error, as it is now, by one write; nothing where the program has a handler of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        others = (*LOGGER.handlers, *logging.getLogger().handlers) if LOGGER.propagate else LOGGER.handlers
        if any(handler is not self for handler in others):
            return
        line = record.getMessage().encode(errors="replace")
        if len(line) > LONGEST:
            line = line[:LONGEST] + b" ..."
        try:
            sys.stderr.write(line.decode(errors="replace") + "\n")
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # closed, or None; and logging must not end a program
            self.handleError(record)


# ---- facts in words


def transport_in_words(wanted: str | None, transport: Transport, topology: Topology) -> str:
    """What carries messages, why, and what was refused."""
    what = transport.name
    if isinstance(transport, JointTransport) and what == JOINT:
        what = f"shm on each host, {transport.network.name} between them"
    if transport.size == 1:
        return f"{what}: there is one rank only"
    if wanted is not None:
        return f"{what}: it was asked for, by the caller or by ABCCL_TRANSPORT"
    if len(topology.hosts) == 1:
        return f"{what}: all ranks can attach to each other's memory"
    apart = " and ".join(f"rank {host.ranks[0]} ({host.name})" for host in topology.hosts[:2])
    return f"{what}; shm for all refused: {apart} can not attach to each other's memory, so they are different hosts"


def memory_in_words(transport: ShmTransport) -> list[tuple[str, str]]:
    """How the ranks of a host share memory, and on what cores: topic and text."""
    found = "named objects below /dev/shm: process entries can not be opened" if transport._named else "memfds"
    pulls = "can be pulled (process_vm_readv)" if transport.pulls else "can not be pulled, and is copied twice"
    region = f"{in_words(transport.geometry.bytes)} of address space for each rank"
    memory = f"regions are {found}, {region}; what is not registered {pulls}"
    far = f"far: they share no cache, and messages over {in_words(transport.native.streaming_from)} go past it"
    crowd = "; more ranks than cores: who waits gives its core away" if transport.size > transport.cores else ""
    cores = f"{count(transport.cores, 'core')} for {count(transport.size, 'rank')}, {far if transport.far else 'near'}"
    forced = f"{transport.protocol}, by ABCCL_PROTOCOL" if transport.protocol else "each plan finds its own"
    return [("memory", memory), ("cores", cores + crowd), ("protocol", forced)]


def choice_in_words(
    tuner: Tuner, collective: Collective, nbytes: int, decision: Decision, plan: Plan | None, slot_bytes: int
) -> str:
    """What runs calls of such a size, why, and what came next."""
    choice, mine = decision.choice, decision.candidate
    how = [choice.algorithm_name]
    if plan is not None:
        if tuner.place.shared:
            how.append(choice.protocol or "any protocol")
        how.append(f"messages up to {in_words(choice.segment or slot_bytes)}")
        how.append(f"{count(plan.segments, 'segment')} in {count(plan.lanes, 'lane')}")
    if mine is not None:
        took = "" if mine.measured is None else f", measured {_time(mine.measured)}"
        how.append(f"predicted {_time(mine.predicted)}{took}")
    size = f" up to {in_words(nbytes)}" if nbytes else ""
    text = f"{collective.value}{size}: {', '.join(how)}; {decision.reason}"
    if mine is None:
        return text
    name = choice.algorithm_name
    found = tuner.candidates(collective, nbytes)
    others = [one for one in found if one.choice.algorithm_name != name]
    comparable = [one for one in others if (one.measured is None) == (mine.measured is None)]
    if not comparable:
        return f"{text}; there is no other"
    second = min(comparable, key=lambda one: one.seconds)
    return f"{text}; next: {second.choice.name}, {_time(second.seconds)}"


def _time(seconds: float) -> str:
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.1f} s"


# ---- every call


class Tracer:
    """An observer of a communicator (`Communicator.observe`) that says when each collective starts and ends.

    Args:
        recorder: the native core's communicator that keeps the flight recorder, which numbers collectives.
    """

    def __init__(self, log: Log, recorder: Any) -> None:
        self._log, self._recorder = log, recorder
        self._number = 0
        self._lock = threading.Lock()
        self._pending: list[tuple[str, float, Any]] = []
        self._watch: threading.Thread | None = None

    def __call__(self, text: str) -> Callable[[Any], None]:
        """A call begins; what is returned is told how it went."""
        position = self._recorder.position()
        begun = position["entered"]
        with self._lock:
            # Calls that were queued before it, and wait, will get numbers first.
            idle = begun == position["finished"] and not self._pending
            self._number = (begun if idle else max(self._number, begun)) + 1
            call = f"#{self._number} {text}"
        self._log.own("call", f"{call} starts", logging.DEBUG)
        start = time.monotonic()

        def ended(outcome: Any) -> None:
            if outcome is None or outcome is False:
                self._ends(call, "failed" if outcome is False else "finished", time.monotonic() - start)
            else:
                self._follow(call, start, outcome)

        return ended

    def _ends(self, call: str, how: str, seconds: float) -> None:
        self._log.own("call", f"{call} {how} after {_time(seconds)}", logging.DEBUG)

    def _follow(self, call: str, start: float, work: Any) -> None:
        """Say when an asynchronous call has ended, which nobody may wait for."""
        with self._lock:
            self._pending.append((call, start, work))
            if self._watch is None:
                self._watch = threading.Thread(target=self._look, name="abccl trace", daemon=True)
                self._watch.start()

    def _look(self) -> None:
        alive = True
        while alive:
            with self._lock:
                pending, self._pending = self._pending, []
                ended: list[tuple[str, float, Any]] = []
                for one in pending:
                    (ended if one[2].is_completed() else self._pending).append(one)
                alive = bool(self._pending)
                if not alive:
                    self._watch = None
            for call, start, work in ended:
                try:
                    work.finishes_within(0.0)  # raises what it failed with
                    self._ends(call, "finished", work.times[1] - start)
                except Exception as error:
                    self._ends(call, f"failed by {type(error).__name__}", time.monotonic() - start)
            if alive:
                time.sleep(TICK)


Observer = Callable[[str], Callable[[Any], None]]


def both(first: Observer | None, second: Observer | None) -> Observer | None:
    """One observer that tells two, if there are two."""
    if first is None or second is None:
        return first or second

    def observe(text: str) -> Callable[[Any], None]:
        ends = first(text), second(text)

        def ended(outcome: Any) -> None:
            for end in reversed(ends):
                end(outcome)

        return ended

    return observe
