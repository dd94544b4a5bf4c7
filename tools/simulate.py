"""`abccl simulate`: how long collectives would take on a machine that need not be there. Nothing is run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..algorithms import Algorithm, Collective, algorithms, lookup, replay, to_collective
from ..algorithms.simulator import AUTO, METHODS, Simulation, Topology, read, shipped, simulate
from ..algorithms.simulator.toml_writer import to_toml
from ..algorithms.toml_file import load as load_toml
from ..algorithms.words import count, in_words, to_bytes
from ..bench.__main__ import a_size, check_writable, words
from ..bench.record import replace_file, replacing
from ..bench.world import import_or
from ..collectives.offline import offline_tuner
from ..collectives.tuner.as_topology import topology_of
from ..errors import ArgumentError, ScheduleError
from .arguments import load, rank_numbers
from .simulation_table import Outcome, Study, machines, print_whole, show
from .terminal import console

STDOUT = Path("-")
THIS_MACHINE = "this-machine"
OUTPUT = click.Path(dir_okay=False, writable=True, path_type=Path)


def sizes(text: str) -> tuple[int, ...]:
    """Sizes with commas between, as in 64K,64MB, for click."""
    try:
        return tuple(dict.fromkeys(map(to_bytes, text.split(","))))
    except ArgumentError as error:
        raise click.BadParameter(str(error)) from error


WHOLE = "whole"

PROVED = 16
"""Ranks on which a user's schedules are replayed, at most."""


def a_segment(text: str) -> str | int:
    """A size, "whole" or "auto", for click."""
    return text if text in (AUTO, WHOLE) else a_size(text)


def constants(context: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, Any]:
    """PLACE=VALUE, the value as TOML writes it, for click."""
    found = {}
    for text in given:
        place, _, value = (part.strip() for part in text.partition("="))
        if not place or not value:
            raise click.BadParameter(f"{text!r}: wanted is PLACE=VALUE, as in node.alpha=2e-6")
        try:
            parsed = load_toml(f"value = {value}", repr(value))["value"]
        except ArgumentError as error:
            raise click.BadParameter(str(error)) from error
        found[place] = tuple(parsed) if isinstance(parsed, list) else parsed
    return found


def list_topologies(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Print the shipped topologies, and end, for click."""
    if wanted:
        print_whole(machines({name: read(name) for name in shipped()}))
        click.echo(f"{THIS_MACHINE}: the machine that you are on, as the tuner has measured it among --ranks ranks")
        context.exit()


@click.command(name="simulate")
@click.argument("collective")
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--algorithm", "names", type=words, metavar="NAMES", help="With commas; all by default.")
@click.option("--ranks", type=rank_numbers, metavar="NUMBERS", required=True, help="As in 8, 2-8 or 6-24576x2.")
@click.option(
    "--topology",
    metavar="NAME|FILE",
    required=True,
    help=f"The machine: see --topologies; or {THIS_MACHINE}, by what the tuner has measured.",
)
@click.option("--size", "sizes", type=sizes, metavar="SIZES", help="Of the whole vector, with commas: 64K,25MB.")
@click.option("--root", default=0, show_default=True, help="The root of broadcast, reduce, gather or scatter.")
@click.option(
    "--segment",
    type=a_segment,
    default=AUTO,
    metavar="SIZE|whole|auto",
    help="Cut messages to this length, or not; some ways are tried and the fastest counts by default.",
)
@click.option(
    "--lanes", type=click.IntRange(1), help="Segments under way at a time; 1 by default, where --segment is given."
)
@click.option("--protocol", metavar="NAME", help="One of the topology's; the fastest by default.")
@click.option(
    "--method",
    type=click.Choice(["auto", *(name.replace(" ", "-") for name in METHODS)]),
    default="auto",
    show_default=True,
    help="How it is found: see above.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    callback=constants,
    metavar="PLACE=VALUE",
    help="Another constant, as in node.alpha=2e-6 (repeatable).",
)
@click.option("--json", "json_file", type=OUTPUT, help="Write all as data; - prints it instead of the table.")
@click.option("--plot", type=OUTPUT, help="Draw it: FILE.png or FILE.svg.")
@click.option("--trace", type=OUTPUT, help="Write the timeline of one simulation, for ui.perfetto.dev.")
@click.option("--goal", type=OUTPUT, help="Write one schedule in GOAL, for other simulators.")
@click.option("--write-topology", "topology_file", type=OUTPUT, help="Write the machine, as it was simulated.")
@click.option(
    "--topologies",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=list_topologies,
    help="List the topologies that come with abccl.",
)
def command(
    collective: str,
    file: Path | None,
    names: tuple[str, ...] | None,
    ranks: list[int],
    topology: str,
    sizes: tuple[int, ...] | None,
    root: int,
    segment: int | str,
    lanes: int | None,
    protocol: str | None,
    method: str,
    overrides: dict[str, Any],
    json_file: Path | None,
    plot: Path | None,
    trace: Path | None,
    goal: Path | None,
    topology_file: Path | None,
) -> None:
    """Print how long a collective would take by each algorithm on a machine, and what is busiest meanwhile.

    COLLECTIVE is all_reduce or another. FILE is a Python file that registers algorithms of your own; they join the
    library's. A topology is one of --topologies or a file like them: levels of units within units (ranks, nodes, a
    cluster), with the latency of messages there, their bandwidth, and the links that they share.
    this-machine is made of the tuner's newest table of so many ranks here (`abccl tune`), or of the built-in one.

    The schedules are walked over as the engines run them, in the exact order of events: of all ranks; of some that
    stand for all, where all do alike; or, where that is too much, by a closed form. The method column says which.

    algbw is the size by the time, in GB/s (1e9); busbw is algbw times the share of the size that each rank must send,
    as `abccl bench` has it. The busiest is the link or the rank that is in use for the largest part of the time. The
    fastest algorithm is marked by >.

    Long messages are cut into segments, several of them under way at a time, so that pipelines fill: not at all, to
    4 MiB, 1 MiB, 256 KiB and 64 KiB are tried with eight lanes, and the fastest counts, unless --segment and --lanes
    say how.

    \b
    abccl simulate all_reduce --algorithm ring,tree,double_tree --ranks 24576 --topology summit --size 64MB
    abccl simulate all_reduce --ranks 6-24576x2 --topology summit --size 64MB --plot ranks.png
    abccl simulate all_reduce star.py --algorithm star,ring --ranks 8 --topology ethernet --size 1M --trace star.json
    """
    kind = to_collective(collective)
    own = load(file) if file else []
    machine = _machine(topology, overrides, ranks, protocol)
    chosen = [lookup(kind, name) for name in names or algorithms(kind)]
    _check_root(kind, root, ranks)
    _prove([algorithm for algorithm in chosen if algorithm in own], ranks)
    if lanes and segment == AUTO:
        raise ArgumentError(f"--lanes {lanes} is for segments of a given length: add --segment 512K, say")
    study = Study(kind, machine, overrides, root, protocol)
    cases = [(a, number, nbytes) for number in ranks for nbytes in _of_vectors(kind, sizes) for a in chosen]
    runnable = [case for case in cases if case[0].refusal(case[1]) is None]
    if not runnable:
        raise ArgumentError(
            "\n".join(["nothing can be simulated", *dict.fromkeys(Outcome(*case).why for case in cases)])
        )
    for option, path in (("--trace", trace), ("--goal", goal)):
        if path and len(runnable) > 1:
            raise ArgumentError(f"{option} is of one schedule: name one algorithm, one number of ranks and one size")
    _check_files(json_file, plot, trace, goal, topology_file)
    if topology_file:
        replace_file(topology_file, to_toml(machine).encode())
    cut = None if segment == WHOLE else segment
    options = {"root": root, "segment": cut, "lanes": lanes or 1, "protocol": protocol}
    options["method"] = method.replace("-", " ")

    begun = time.monotonic()
    with _bar(len(cases), quiet=json_file == STDOUT) as report:
        for number, case in enumerate(cases):
            study.outcomes.append(_outcome(case, machine, options, partial(report, number, case)))
    if not study.done:
        raise ArgumentError("\n".join(["nothing can be simulated", *dict.fromkeys(one.why for one in study.outcomes)]))
    study.took = time.monotonic() - begun
    if json_file == STDOUT:
        click.echo(json.dumps(study.records(), indent=1, allow_nan=False))
    else:
        show(study, console())
    if json_file and json_file != STDOUT:
        replace_file(json_file, (json.dumps(study.records(), indent=1, allow_nan=False) + "\n").encode())
    if plot:
        from .simulation_plot import draw

        replace_file(plot, draw(study, plot.suffix[1:]))
    if trace:
        _write_trace(trace, study.done[0], machine, options)
    if goal:
        _write_goal(goal, study.done[0], machine, root)


Case = tuple[Algorithm, int, int]
"""An algorithm, a number of ranks, bytes."""


def _machine(name: str, overrides: Mapping[str, Any], ranks: Sequence[int], protocol: str | None) -> Topology:
    machine = _this_machine(ranks) if name == THIS_MACHINE else read(name)
    for place, value in overrides.items():
        machine = machine.with_value(place, value)
    machine.check(max(ranks))
    if protocol is not None:
        machine.without_protocols(protocol, 1)
    return machine


def _this_machine(ranks: Sequence[int]) -> Topology:
    """The machine on which this runs, as the tuner of so many ranks knows it."""
    if len(ranks) > 1:
        raise ArgumentError(f"{THIS_MACHINE} has a table for each number of ranks, and got {len(ranks)}: ask for one")
    tuner = offline_tuner(ranks[0])
    return topology_of(tuner.table, tuner.place, THIS_MACHINE)


def _check_root(kind: Collective, root: int, ranks: Sequence[int]) -> None:
    if root and not kind.rooted:
        raise ArgumentError(f"{kind.value} has no root: leave out --root {root}")
    if not 0 <= root < min(ranks):
        raise ArgumentError(f"--root {root} is none of {count(min(ranks), 'rank')}: they are numbered from 0")


def _prove(algorithms: Sequence[Algorithm], ranks: Sequence[int]) -> None:
    """Replay a user's schedules on a few ranks: times of a wrong one tell nothing.

    Raises:
        ScheduleError: one is wrong.
    """
    few = sorted({number for number in ranks if number <= PROVED} or {min(PROVED, min(ranks))})
    for algorithm in algorithms:
        for number in few:
            if algorithm.refusal(number) is None:
                replay(algorithm, number)


def _of_vectors(kind: Collective, sizes: Sequence[int] | None) -> Sequence[int]:
    if kind is Collective.BARRIER:
        if sizes:
            raise ArgumentError("a barrier has no data: leave out --size")
        return (0,)
    if not sizes:
        raise ArgumentError(f"{kind.value} wants a size: --size 64MB, say")
    return sizes


def _check_files(json_file: Path | None, plot: Path | None, *others: Path | None) -> None:
    """Find out before the simulation what can not be written."""
    if plot:
        if plot.suffix not in (".png", ".svg"):
            raise ArgumentError(f"--plot {plot}: wanted is a name that ends in .png or .svg")
        import_or("matplotlib", "pip install 'abccl[plot]'")
    for path in (plot, *others):
        if path == STDOUT:
            raise ArgumentError("only --json writes to standard output: name a file")
    for path in (json_file, plot, *others):
        if path and path != STDOUT:
            check_writable(path)


@contextmanager
def _bar(cases: int, quiet: bool) -> Iterator[Callable[[int, Case, float], None]]:
    """A bar on a terminal; what it is told is the case, its number, and which part of it is done."""
    shown_on = console()
    shown = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    silent = quiet or not shown_on.is_terminal
    with Progress(*shown, console=shown_on, transient=True, disable=silent) as bar:
        task = bar.add_task("", total=cases)

        def report(number: int, case: Case, done: float) -> None:
            algorithm, ranks, nbytes = case
            described = f"{algorithm.name}, {count(ranks, 'rank')}, {in_words(nbytes)}"
            bar.update(task, description=described, completed=number + done)

        yield report


def _outcome(case: Case, machine: Topology, options: Mapping[str, Any], report: Callable[[float], None]) -> Outcome:
    """What a simulation found, or why there is none."""
    algorithm, ranks, nbytes = case
    report(0.0)
    if algorithm.refusal(ranks) is not None:
        return Outcome(*case)
    try:
        return Outcome(*case, found=simulate(algorithm, ranks, machine, nbytes, progress=report, **options))
    except (ArgumentError, ScheduleError) as error:
        return Outcome(*case, error=str(error))


def _write_trace(path: Path, found: Simulation, machine: Topology, options: Mapping[str, Any]) -> None:
    from . import timeline

    if 3 * found.messages > timeline.MOST:
        raise ArgumentError(timeline.too_many(3 * found.messages))
    way = {"protocol": found.protocol, "segment": found.segment, "lanes": found.lanes}
    recorded = {**options, **way, "record": True}
    again = simulate(found.algorithm, found.ranks, machine, found.nbytes, **recorded)
    assert again.timeline is not None
    slices = timeline.slices_of(again.timeline)
    with replacing(path) as file:
        timeline.write(file, slices, timeline.rows_of(machine, found.lanes))


def _write_goal(path: Path, found: Simulation, machine: Topology, root: int) -> None:
    from .goal import goal

    rank = machine.without_protocols(found.protocol, found.nbytes).rank
    assert isinstance(rank.fold, (int, float))
    with replacing(path) as file:
        lines = goal(
            found.algorithm,
            found.ranks,
            found.nbytes,
            root=root,
            segment=found.segment,
            lanes=found.lanes,
            processors=rank.processors,
            fold=rank.fold,
        )
        file.writelines(lines)
