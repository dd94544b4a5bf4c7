"""What is shown: the table as it grows, with what must be known to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from ..algorithms import Collective
from ..algorithms.words import in_words
from ..algorithms.words import ranges as spans
from .machine import BUSY
from .messages import WINDOW, AnyCase, Exchange
from .options import Options
from .record import CAP, among, means
from .run import Listener, Measured, Report, Row

FASTEST = " *"
"""Stands behind the fastest algorithm of several."""


@dataclass(frozen=True)
class Column:
    """A column: its name, its width, and what stands there for a row and one of abccl's figures in it."""

    name: str
    width: int
    cell: Callable[[Row, Measured], str]
    style: Callable[[str], str] = lambda cell: ""


def columns(report: Report, several_doors: bool) -> list[Column]:
    """The columns of a report. Those of nccl-tests, then for each rival its time, its bandwidth, the ratio."""
    options = report.options
    found = [
        Column("size B", 10, lambda row, ours: str(row.case.size)),
        Column("count", 10, lambda row, ours: str(row.case.count)),
        Column("type", max(7, len(options.dtype)), lambda row, ours: row.case.dtype if row.case.count else "none"),
    ]
    through = [Column("through", 7, lambda row, ours: ours.door)] * several_doors
    time = Column("time us", 10, lambda row, ours: microseconds(ours.timing.seconds))
    if options.collective is None:
        found += [Column("pattern", 13, _pattern), *through, time, Column("GB/s", 7, _algbw)]
    else:
        found.append(Column("redop", max(5, len(options.op or "")), lambda row, ours: row.case.op or "none"))
        if options.collective.rooted:
            root = "all" if len(options.roots) > 1 else str(options.roots[0])
            found.append(Column("root", 4, lambda row, ours: root))
        longest = max((20, *(len(name) + len(FASTEST) for name in report.names)))
        busbw = Column("busbw", 7, lambda row, ours: bandwidth(row.case.busbw(ours.timing.seconds)))
        found += [*through, Column("algorithm", longest, _algorithm), time, Column("algbw", 7, _algbw), busbw]
    if options.roofline:
        found.append(Column("roofline", 8, _part))
    found.append(Column("#wrong", 6, lambda row, ours: _wrong(ours), _alarm))
    for index, name in enumerate(options.rivals):
        found += _rival_columns(index, name)
    return found


def _rival_columns(index: int, name: str) -> list[Column]:
    def same(row: Row, ours: Measured, text: Callable[[Measured], str]) -> str:
        rival = row.rivals[index]
        return text(rival) if rival.door == ours.door else ""

    def times(row: Row, ours: Measured) -> str:
        ratio = row.ratio(row.rivals[index], ours)
        return "" if ratio is None else f"{ratio:.2f}"

    return [
        Column(f"{name} us", 10, lambda row, ours: same(row, ours, lambda m: microseconds(m.timing.seconds))),
        Column("#wrong", 6, lambda row, ours: same(row, ours, _wrong), _alarm),
        Column(f"{name}/abccl", 10, times, lambda cell: "" if not cell else "green" if float(cell) >= 1 else "yellow"),
    ]


def _pattern(row: Row, ours: Measured) -> str:
    assert isinstance(row.case, Exchange)
    return row.case.pattern.value


def _algorithm(row: Row, ours: Measured) -> str:
    alike = [m for m in row.ours if m.door == ours.door]
    fastest = len(alike) > 1 and ours is min(alike, key=lambda m: m.timing.seconds)
    return ours.ran + (FASTEST if fastest else "")


def _algbw(row: Row, ours: Measured) -> str:
    return bandwidth(row.case.algbw(ours.timing.seconds))


def _part(row: Row, ours: Measured) -> str:
    part = row.part(ours)
    return "" if part is None else f"{100 * part:.1f}%"


def _wrong(measured: Measured) -> str:
    return "-" if measured.wrong is None else str(measured.wrong)


def _alarm(cell: str) -> str:
    return "bold red" if cell not in ("", "0", "-") else ""


def microseconds(seconds: float) -> str:
    """A time with four digits or so."""
    value = seconds * 1e6
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def bandwidth(value: float) -> str:
    """GB/s; a dash where nothing is moved."""
    return "-" if value == 0 else f"{value:.3f}" if value < 10 else f"{value:.2f}"


class Printer(Listener):
    """Prints a line when its case is done. On a terminal a bar shows what is being measured.

    Args:
        notes_only: leave the table out, and tell the rest to standard error.
    """

    def __init__(self, notes_only: bool = False) -> None:
        self.notes_only = notes_only
        self.console = Console()
        self.columns: list[Column] = []
        self.bar: Progress | None = None

    def begins(self, report: Report, cases: list[AnyCase]) -> None:
        """See `Listener`."""
        # Open MPI gives its ranks a terminal even where its own output is a file.
        plain = False if report.started_by == "mpirun" else None
        self.console = Console(highlight=False, soft_wrap=True, force_terminal=plain, stderr=self.notes_only)
        doors = {name for name in report.about if name.startswith("abccl ")}
        self.columns = columns(report, len(doors) > 1)
        for line in header(report):
            self.console.print(Text(f"# {line}", "yellow" if line.startswith("warning") else "dim"))
        if not self.notes_only:
            names = "  ".join(column.name.rjust(column.width) for column in self.columns)
            self.console.print(Text("#" + names[1:], "bold"))
        if self.console.is_terminal:
            shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            # Redrawn between cases only: a thread that draws would be measured.
            self.bar = Progress(*shown, console=self.console, transient=True, auto_refresh=False)
            self.bar.start()
            self.bar.add_task("", total=len(cases))

    def works_on(self, case: AnyCase) -> None:
        """See `Listener`."""
        if self.bar:
            self.bar.update(self.bar.task_ids[0], description=in_words(case.size), refresh=True)

    def has(self, row: Row) -> None:
        """See `Listener`."""
        for ours in () if self.notes_only else row.ours:
            line = Text()
            for index, column in enumerate(self.columns):
                cell = column.cell(row, ours)
                line.append("  " * bool(index)).append(cell.rjust(column.width), column.style(cell))
            self.console.print(line)
        if self.bar:
            self.bar.advance(self.bar.task_ids[0])

    def ends(self, report: Report) -> None:
        """See `Listener`."""
        if self.bar:
            self.bar.stop()
        for line in footer(report):
            self.console.print(Text(f"# {line}", "bold red" if "WRONG" in line else ""))


def header(report: Report) -> list[str]:
    """Where, and how, and with what."""
    options, machine = report.options, report.machine
    lines = [
        f"{_what(options)}, {options.ranks} rank{'s' * (options.ranks != 1)} started by {report.started_by}; buffers "
        f"allocated by {options.library}"
    ]
    if report.transport:
        lines.append(f"abccl's transport: {report.transport}")
    if len(report.hosts) > 1:
        named = "; ".join(f"{host.name}: {spans(host.ranks, comma=',')}" for host in report.hosts)
        lines.append(f"{len(report.hosts)} hosts and their ranks ({named}); what follows is of the host of rank 0")
    lines.append(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; Python {machine['python']}, "
        f"numpy {machine['numpy']}"
    )
    if len(set(machine["cores_of_ranks"])) > 1:
        pinned = ", ".join(f"{rank}: {cores}" for rank, cores in enumerate(machine["cores_of_ranks"]))
        lines.append(f"ranks are pinned to cores ({pinned})")
    for name, facts in report.about.items():
        settings = ", ".join(f"{key}={value}" for key, value in facts.items() if key != "version")
        lines.append(f"{_who(name)}: {facts['version']}{settings and '; '}{settings}")
    lines += [_loop(options), "time: median over rounds, peers in turn, of the slowest rank; bandwidths in GB/s (1e9)"]
    if options.roofline:
        lines.append("roofline: the part that is reached of the bandwidth of a += b on all ranks at once; see --help")
    if report.regimes[0] is not None:
        lines.append(f"cores of ranks 0 and 1 at the start: {report.regimes[0].text}")
    elif len(report.hosts) > 1 and not any({0, 1} <= set(host.ranks) for host in report.hosts):
        lines.append("how far apart the cores of ranks 0 and 1 are is not measured: they are on different hosts")
    here = next((len(host.ranks) for host in report.hosts if 0 in host.ranks), options.ranks or 0)
    if here > (machine["cores"] or 1):
        lines.append(f"warning: {here} ranks on {machine['cores']} cores")
    if machine["load_average"] > BUSY:
        lines.append(f"warning: load average {machine['load_average']:.2f} at the start: other work makes times noise")
    return lines


def _what(options: Options) -> str:
    if options.collective is None:
        assert options.pair is not None
        return f"messages between ranks {options.pair[0]} and {options.pair[1]}"
    form = "" if options.collective is Collective.BARRIER else ", in place" if options.in_place else ", out of place"
    return f"{'persistent ' * options.persistent}{options.call}{form}"


def _who(name: str) -> str:
    known = {
        "abccl direct": "abccl by its own calls",
        "abccl torch": "abccl through torch.distributed",
        "gloo": "gloo through torch.distributed",
    }
    return known.get(name, name)


def _loop(options: Options) -> str:
    if options.collective is None:
        return (
            f"latency: half a round trip; bandwidth: {WINDOW} messages one way at a time, then an answer, and "
            f"bidirectional: {WINDOW} each way; the time is a message's part of it"
        )
    if options.loop == "isolated":
        return "loop: isolated, a barrier before each call; from leaving it to the end of the call"
    if not options.collective.rooted:
        return "loop: back to back; each call waits for all ranks, so this is latency"
    if options.loop == "latency":
        return "loop: latency, the root changes at random from call to call, so each call waits for the one before"
    return "loop: throughput, back to back with one root: a pipeline, not the latency of a call"


def footer(report: Report) -> list[str]:
    """The means, and whether all was right."""
    lines = []
    if len(report.regimes) > 1 and report.regimes[0] is not None and report.regimes[1] is not None:
        flipped = "; the regime changed" if report.regimes[0].name != report.regimes[1].name else ""
        lines.append(f"cores of ranks 0 and 1 at the end: {report.regimes[1].text}{flipped}")
    for mean in means(report):
        way = [mean["pattern"]] if "pattern" in mean else []
        way += [mean["through"], mean["algorithm"]] if mean["one_of_several"] else []
        lines.append(_mean(mean["library"] + "/abccl" + (f" ({', '.join(way)})" if way else ""), mean))
    lines += [_mean(f"{mean['algorithm']}/auto", mean) for mean in among(report)]
    if not report.options.check:
        lines.append("results were not checked")
    elif report.wrong:
        lines.append(f"WRONG: {report.wrong} elements")
    elif report.rows:
        lines.append("all results right")
    return lines


def _mean(what: str, mean: dict[str, Any]) -> str:
    return (
        f"{what}: geometric mean {mean['geometric_mean']:.2f}, with each ratio capped at {CAP:g} "
        f"{mean['geometric_mean_capped']:.2f}; smallest {mean['smallest']:.2f} at {in_words(mean['smallest_at'])}"
    )
