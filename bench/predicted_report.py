"""What a comparison of the simulator with measured times consists of, and its section of docs/model.md."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..algorithms.words import count, in_words
from ..errors import ArgumentError
from ..transports.joint import JOINT
from ..transports.shm import ShmTransport
from .accuracy import ERROR, ninetieth
from .document import write_part
from .record import replace_file
from .run import geometric_mean
from .world import import_or

FORMAT = 1
FURTHEST = 10
"""How many cases are listed whose prediction is furthest off."""


@dataclass(frozen=True)
class Case:
    """One way of doing a collective; times are in seconds.

    Attributes:
        link: the class of the links while it was measured.
        choice: the algorithm, protocol, segment and lanes.
        rounds: the slowest rank's time for a call, in each round.
        simulated: what the simulator predicts.
        walked: what the tuner's model predicts.
    """

    collective: str
    nbytes: int
    link: str
    choice: str
    rounds: tuple[float, ...]
    simulated: float
    walked: float

    @property
    def seconds(self) -> float:
        """What it took."""
        return median(self.rounds)

    @property
    def ratio(self) -> float:
        """The simulator's time by the time."""
        return self.simulated / self.seconds

    @property
    def tuner_ratio(self) -> float:
        """The tuner's time by the time."""
        return self.walked / self.seconds

    @property
    def own_ratio(self) -> float:
        """Every other round by the rounds between: how much of the others is noise."""
        return median(self.rounds[::2]) / median(self.rounds[1::2])


RATIOS: tuple[Callable[[Case], float], ...] = (
    lambda case: case.ratio,
    lambda case: case.tuner_ratio,
    lambda case: case.own_ratio,
)


@dataclass(frozen=True)
class Run:
    """A comparison among some ranks.

    Attributes:
        date, machine, command: when, where and how.
        hosts: the numbers of ranks on each.
        tables: for each link class that was met, where the constants come from.
        discarded: how often the link class changed while something was measured, so that it was measured anew.
        took: seconds.
    """

    date: str
    machine: dict[str, Any]
    command: str
    hosts: tuple[int, ...]
    transport: str
    tables: dict[str, str]
    cases: tuple[Case, ...]
    discarded: int
    took: float
    format: int = field(default=FORMAT)

    @property
    def title(self) -> str:
        """It in words."""
        several = f" on {len(self.hosts)} hosts" if len(self.hosts) > 1 else ""
        over = f" over {self.transport}" if self.transport not in (ShmTransport.name, JOINT) else ""
        return f"{count(sum(self.hosts), 'rank')}{several}{over}"

    @property
    def crowded(self) -> bool:
        """Whether ranks share cores: hosts that are namespaces have those of the machine together."""
        return sum(self.hosts) > int(self.machine["cores"])

    def to_json(self) -> dict[str, Any]:
        """It as JSON has it."""
        return asdict(self)


def read(path: Path) -> Run:
    """The run that was kept there.

    Raises:
        ArgumentError: there is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']}, and {FORMAT} is read: measure again")
        kept = [Case(**{**one, "rounds": tuple(one["rounds"])}) for one in data["cases"]]
        return Run(**{**data, "hosts": tuple(data["hosts"]), "cases": tuple(kept)})
    except (OSError, KeyError, TypeError, ValueError) as problem:
        raise ArgumentError(f"{path} is no file of `bench.predicted --json`: {problem}") from problem


def error(ratios: Sequence[float]) -> float:
    """The median of how far ratios are from 1."""
    return median(abs(ratio - 1) for ratio in ratios)


def summary(run: Run) -> str:
    """The line at the end."""
    head = f"{run.title}: {len(run.cases)} cases in {run.took:.0f} s"
    if not run.cases:
        return head
    ratios = [[ratio(one) for one in run.cases] for ratio in RATIOS]
    names = ("simulator", "tuner's model", "half of the rounds by the others")
    return f"{head}; median error: " + ", ".join(f"{name} {error(some):.0%}" for name, some in zip(names, ratios))


HEAD = f"""\
Written by `make validate-simulator`. The ranks calibrate anew; their table (docs/tuning.md) is the simulator's machine:
the constants of a rank by protocol and size of the vector, a level for the host with its cores, and where there are
several hosts one above it, each with one link in and one out. Then five collectives are timed on sizes that the
calibration does not use, by algorithms, protocols, segments and numbers of lanes that are drawn by lot, and forced. A
round's time is that of the slowest rank; the median over rounds is compared with what is simulated, all ranks in the
order of events.

The tuner predicts from the same table by its own model, a walk along the critical path with bounds for what is shared.
Its constants are fitted to that model, not to the simulator: where the two differ, the table favours the tuner's.

"error" is the median of |predicted / measured - 1|, then its 90th percentile, and "ratio" the geometric mean of
predicted / measured. "itself" is the median error of every other round against the rounds between: what no prediction
can be better than. Dotted lines in the picture are {ERROR:.0%} from the measured time."""

WHY = """\
What the figures depend on, besides noise:

- **More ranks than cores.** The simulator gives a core to whoever has asked first, keeps it there until that piece of
  work is done, and hands it on at no cost. A real rank that waits holds its core: it polls, then yields, and the
  scheduler decides who is next. The calibration has put the mean cost of that into the constants, and it is not the
  same for all schedules: one with many steps of short messages has more switches than one with few.
- **Hosts that are namespaces** have the machine's cores together, and neither model knows: each takes a host's cores
  for its own. Gloo's threads and the kernel's work for TCP need them, too.
- **A level has one alpha and one beta for all sizes of messages.** What changes with a message's size (MPI's eager and
  rendezvous protocols, caches) is in the constants by the size of the vector only, and is right for messages like those
  of the calibration.
- **Blocks are taken to be equal.** Of short vectors some are empty, which matters little: their messages are sent.
- **Memory is not shared.** A rank copies at the speed that it had in the calibration, whatever the others do."""


PART = "predicted-and-measured"


def write(runs: Sequence[Run], document: Path) -> None:
    """Write the document's part, and its picture into a folder of the document's name beside it.

    Raises:
        ArgumentError: nothing was measured, or the document has no such part.
    """
    shown = [run for run in runs if run.cases]
    if not shown:
        raise ArgumentError("nothing was measured in any of the files: measure again")
    folder = document.with_suffix("")
    parts = [HEAD, _about(shown), f"![predicted by measured times]({folder.name}/{PART}.png)", _by_run(shown)]
    parts += ["The simulator's ratio by the size of the vector:", _by_size(shown)]
    parts += ["By algorithm, of ranks with cores of their own and of ranks that share them:", _by_algorithm(shown)]
    parts += ["Furthest off:", _furthest(shown), WHY]
    write_part(document, PART, "\n\n".join(parts))
    folder.mkdir(exist_ok=True)
    replace_file(folder / f"{PART}.png", plot(shown))


def _about(runs: Sequence[Run]) -> str:
    facts, cases = runs[0].machine, [case for run in runs for case in run.cases]
    own = [case for run in runs if not run.crowded for case in run.cases]
    within = sum(abs(case.ratio - 1) <= ERROR for case in cases) / len(cases)
    better = sum(abs(case.ratio - 1) < abs(case.tuner_ratio - 1) for case in cases) / len(cases)
    worse = sum(abs(case.ratio - 1) > abs(case.tuner_ratio - 1) for case in cases) / len(cases)
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}, load {facts['load_average']} before; "
        f"{runs[0].date}, {sum(run.took for run in runs):.0f} s.",
        f"Of {len(cases)} cases **{within:.0%}** are predicted within {ERROR:.0%} by the simulator; it is nearer "
        f"to the measured time than the tuner's model in {better:.0%} of them, and further off in {worse:.0%}.",
    ]
    if own:
        lines.append(
            f"Where no core is shared the median error is **{error([one.ratio for one in own]):.0%}** (the tuner's "
            f"{error([one.tuner_ratio for one in own]):.0%}, a time against itself "
            f"{error([one.own_ratio for one in own]):.0%})."
        )
    return "\n".join(textwrap.fill(line, 120) for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _figures(cases: Sequence[Case], ratio: Callable[[Case], float]) -> list[str]:
    ratios = [ratio(one) for one in cases]
    far = ninetieth([abs(one - 1) for one in ratios])
    return [f"{error(ratios):.0%}", f"{far:.0%}", f"{geometric_mean(ratios):.2f}"]


def _by_run(runs: Sequence[Run]) -> str:
    head = ["", "cases", "simulator: error", "90th", "ratio", "tuner: error", "90th", "ratio", "itself"]
    rows = []
    for run in runs:
        cells = [cell for ratio in RATIOS[:2] for cell in _figures(run.cases, ratio)]
        own = error([one.own_ratio for one in run.cases])
        rows.append([run.title, str(len(run.cases)), *cells, f"{own:.0%}"])
    return _table(head, rows)


def _by_size(runs: Sequence[Run]) -> str:
    sizes: dict[int, int] = {}
    for case in sorted((case for run in runs for case in run.cases), key=lambda case: case.nbytes):
        sizes.setdefault(_octave(case), case.nbytes)
    rows = []
    for run in runs:
        groups = [[case.ratio for case in run.cases if _octave(case) == octave] for octave in sizes]
        rows.append([run.title, *(f"{geometric_mean(some):.2f}" if some else "" for some in groups)])
    return _table(["", *map(in_words, sizes.values())], rows)


def _octave(case: Case) -> int:
    """The same for sizes that differ by little: parts are made whole, by the number of ranks."""
    return round(math.log2(case.nbytes))


def _by_algorithm(runs: Sequence[Run]) -> str:
    ratios: dict[str, tuple[list[float], list[float]]] = {}
    for run in runs:
        for case in run.cases:
            name = case.choice.partition(",")[0].partition("(")[0]
            ratios.setdefault(name, ([], []))[run.crowded].append(case.ratio)
    rows = []
    for name, groups in sorted(ratios.items()):
        cells = [
            cell
            for some in groups
            for cell in ([str(len(some)), f"{error(some):.0%}", f"{geometric_mean(some):.2f}"] if some else [""] * 3)
        ]
        rows.append([name, *cells])
    return _table(["", "own cores: cases", "error", "ratio", "shared cores: cases", "error", "ratio"], rows)


def _furthest(runs: Sequence[Run]) -> str:
    pairs = [(run, case) for run in runs for case in run.cases]
    pairs.sort(key=lambda pair: -max(pair[1].ratio, 1 / pair[1].ratio))
    head = ["", "", "bytes", "", "measured us", "simulated", "tuner", "ratio", "itself"]
    rows = [
        [run.title, case.collective, in_words(case.nbytes), case.choice]
        + [f"{seconds * 1e6:.4g}" for seconds in (case.seconds, case.simulated, case.walked)]
        + [f"{case.ratio:.2f}", f"{case.own_ratio:.2f}"]
        for run, case in pairs[:FURTHEST]
    ]
    return _table(head, rows)


def plot(runs: Sequence[Run]) -> bytes:
    """The picture, as PNG: predicted by measured times against measured ones, the simulator's and the tuner's."""
    figure_of: Any = import_or("matplotlib.figure", "pip install 'abccl[plot]'")
    figure = figure_of.Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, ratio, title in zip(panels, RATIOS, ("simulator", "tuner's model")):
        for number, run in enumerate(runs):
            points = [(case.seconds * 1e6, ratio(case)) for case in run.cases]
            panel.loglog(*zip(*points), "ox"[number // 10 % 2], color=f"C{number % 10}", markersize=3, alpha=0.6)
        for level, style in ((1, "k-"), (1 + ERROR, "k:"), (1 / (1 + ERROR), "k:")):
            panel.axhline(level, color=style[0], linestyle=style[1:], linewidth=1)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3, which="both")
        panel.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        panel.set_xlabel("measured, us")
    panels[0].set_ylabel("predicted / measured")
    marks = [panels[0].lines[number] for number in range(len(runs))]
    figure.legend(marks, [run.title for run in runs], loc="outside upper center", ncols=4, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    return drawn.getvalue()
