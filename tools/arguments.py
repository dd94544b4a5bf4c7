"""What the commands take: collectives and algorithms by name, numbers of ranks, a user's own file."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from ..algorithms import Algorithm, Collective, Replay, algorithms, lookup, replay
from ..errors import ArgumentError


def to_collective(name: str) -> Collective:
    """The collective of that name; `all-reduce` and `AllReduce` are understood.

    Raises:
        ArgumentError: there is none; near names are in the message.
    """
    plain = {c.value.replace("_", ""): c for c in Collective}
    key = name.replace("_", "").replace("-", "").lower()
    if key in plain:
        return plain[key]
    near = [plain[k].value for k in difflib.get_close_matches(key, plain, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(c.value for c in Collective)}"
    raise ArgumentError(f"no collective is called {name!r}: {hint}")


def rank_numbers(text: str) -> list[int]:
    """Numbers of ranks, written as in 1-40,64.

    Raises:
        click.BadParameter: they are not.
    """
    found: set[int] = set()
    for word in text.split(","):
        first, dash, last = word.partition("-")
        try:
            numbers = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            numbers = range(0)
        if not numbers or numbers[0] < 1:
            raise click.BadParameter(f"{word.strip()!r} is no number of ranks: wanted is something like 5 or 1-40,64")
        found.update(numbers)
    return sorted(found)


def ranges(numbers: Iterable[int], dash: str = "-", comma: str = ", ") -> str:
    """Ascending numbers in writing, as in 1-40, 64."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return comma.join(str(a) if a == b else f"{a}{dash}{b}" for a, b in runs)


def load(path: Path) -> list[Algorithm]:
    """Run a user's file and return the algorithms that it registers.

    Raises:
        ArgumentError: it raised something, with the line where; or it registers none.
    """
    name = f"abccl user file {path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ArgumentError(
            f"{error.filename}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}"
        ) from error
    except Exception as error:
        raise ArgumentError(_in_file(path, error)) from error
    found = [a for c in Collective for a in algorithms(c).values() if a.function.__module__ == name]
    if not found:
        raise ArgumentError(f"{path} registers no algorithm: put @algorithm(Collective.ALL_REDUCE) above a function")
    return found


def _in_file(path: Path, error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    where = f"{path}, line {frames[-1].lineno}" if frames else str(path)
    return f"{where}: {type(error).__name__}: {error}"


def schedule_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments that pick one schedule: COLLECTIVE ALGORITHM [FILE] --ranks --root."""
    for decorate in (
        click.option("--root", default=0, show_default=True, help="The root of broadcast, reduce, gather or scatter."),
        click.option("--ranks", default=4, show_default=True, type=click.IntRange(1), help="The number of ranks."),
        click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)),
        click.argument("algorithm"),
        click.argument("collective"),
    ):
        command = decorate(command)
    return command


def replayed(collective: str, algorithm: str, file: Path | None, ranks: int, root: int) -> Replay:
    """The history of the schedule that the arguments pick.

    Raises:
        AbcclError: no such collective, algorithm or root; an error in the file; a wrong schedule.
    """
    kind = to_collective(collective)
    if file:
        load(file)
    if root and not kind.rooted:
        raise ArgumentError(f"{kind.value} has no root: leave out --root {root}")
    return replay(lookup(kind, algorithm), ranks, root)
