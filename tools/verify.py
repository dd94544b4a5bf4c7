"""`abccl verify`: prove schedules for many numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from ..algorithms import Algorithm, Collective, algorithms, check_counts, lookup, replay, to_collective
from ..algorithms.words import did_you_mean, ranges
from ..errors import ArgumentError, ScheduleError
from .arguments import load, rank_numbers

EVERY_ROOT = 17
"""Up to so many ranks every root is tried."""


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--collective", "collectives", multiple=True, metavar="NAME", help="Only this collective (repeatable).")
@click.option("--algorithm", "names", multiple=True, metavar="NAME", help="Only this algorithm (repeatable).")
@click.option(
    "--ranks", type=rank_numbers, metavar="NUMBERS", default="1-40,64", show_default=True, help="The numbers of ranks."
)
def verify(file: Path | None, collectives: tuple[str, ...], names: tuple[str, ...], ranks: list[int]) -> None:
    """Prove that schedules are right, for many numbers of ranks.

    Right means: every block ends where the collective promises, every contribution is counted exactly once, all
    ranks of an all_reduce get the same bits, no deadlock (when a send waits for its receive, and with room for two
    messages per pair), and declared counts are exact. Rooted collectives are tried with every root up to 17 ranks, and
    with some roots of more.

    With FILE, a Python file, only the algorithms that it registers are verified. Exits with 0, or with 1 and a
    message that names rank, step and block.
    """
    chosen = _choose(file, [to_collective(name) for name in collectives], names)
    console = Console(soft_wrap=True, highlight=False)
    wrong = 0
    silent = not console.is_terminal
    with Progress(*Progress.get_default_columns(), console=console, transient=True, disable=silent) as bar:
        task = bar.add_task("", total=len(chosen) * len(ranks))
        for algorithm in chosen:
            bar.update(task, description=_title(algorithm))
            try:
                line = Text(f"{_title(algorithm)}: {_prove(algorithm, ranks, lambda: bar.advance(task))}")
                line.highlight_words(["ok"], "green")
            except ScheduleError as error:
                line = Text(str(error), "red")
                wrong += 1
            console.print(line)
    if wrong:
        raise SystemExit(1)


def _choose(file: Path | None, collectives: list[Collective], names: tuple[str, ...]) -> list[Algorithm]:
    """The algorithms of the file, or all, less those that were not asked for.

    Raises:
        ArgumentError: a collective or a name selects nothing; near names are in the message.
    """
    every = load(file) if file else [a for c in Collective for a in algorithms(c).values()]
    for collective in collectives:
        if not any(a.collective is collective for a in every):
            there = ", ".join(dict.fromkeys(a.collective.value for a in every))
            raise ArgumentError(f"{file or 'the library'} has no {collective.value} algorithm: there are {there}")
    chosen = [a for a in every if not collectives or a.collective in collectives]
    families = {name: name.partition("(")[0] for name in names}
    known = dict.fromkeys(a.name for a in chosen)
    for family in families.values():
        if family not in known:
            raise ArgumentError(f"no algorithm is called {family!r}: {did_you_mean(family, known)}")
    if not names:
        return chosen
    return [lookup(a.collective, name) for a in chosen for name, family in families.items() if a.name == family]


def roots(algorithm: Algorithm, size: int) -> Sequence[int]:
    """The roots to try. Among more ranks than `EVERY_ROOT` four, or where schedules are not rotated the first ones."""
    if not algorithm.collective.rooted:
        return (0,)
    if size <= EVERY_ROOT or algorithm.placed:
        return range(min(size, EVERY_ROOT + 1))
    return (0, 1, size // 2, size - 1)


def _title(algorithm: Algorithm) -> str:
    return f"{algorithm.collective.value} {algorithm.name}"


def _prove(algorithm: Algorithm, ranks: list[int], advance: Callable[[], None]) -> str:
    proved = []
    for size in ranks:
        if algorithm.refusal(size) is None:
            for root in roots(algorithm, size):
                run = replay(algorithm, size, root)
                if root == 0:
                    check_counts(run)
            proved.append(size)
        advance()
    if not proved:
        return f"wants {algorithm.refusal(ranks[0])}, not tried"
    return f"{ranges(proved)} {'rank' if proved == [1] else 'ranks'}: ok"
