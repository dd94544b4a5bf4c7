"""What the commands take: collectives and algorithms by name, numbers of ranks, a user's own file."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import click

from ..algorithms import Algorithm, Collective, Replay, algorithms, lookup, replay, to_collective
from ..errors import ArgumentError

MOST = 10_000
"""Numbers of ranks, at a time."""


def rank_numbers(text: str) -> list[int]:
    """Numbers of ranks, written as in 1-40,64; 6-100x2 is 6 and its doubles up to 100: 6, 12, 24, 48, 96.

    Raises:
        click.BadParameter: they are not.
    """
    found: set[int] = set()
    for word in text.split(","):
        written = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?:x([2-9]|[1-9]\d{1,8}))?)?", word.strip(), re.ASCII)
        first, last = (int(written[1]), int(written[2] or written[1])) if written else (0, 0)
        if not written or not 1 <= first <= last:
            wanted = "wanted is something like 5, 1-40,64 or 6-96x2"
            raise click.BadParameter(f"{word.strip()!r} is no number of ranks: {wanted}")
        numbers = ladder(first, last, int(written[3])) if written[3] else range(first, last + 1)
        if len(numbers) > MOST:
            raise click.BadParameter(
                f"{word.strip()} are {len(numbers):,} numbers of ranks: wanted are at most {MOST:,}"
            )
        found.update(numbers)
    return sorted(found)


def ladder(first: int, last: int, factor: int) -> tuple[int, ...]:
    """Numbers from the first on up to the last, each so many times the one before."""
    found = [first]
    while found[-1] * factor <= last:
        found.append(found[-1] * factor)
    return tuple(found)


def load(path: Path) -> list[Algorithm]:
    """Run a user's file and return the algorithms that it registers.

    Raises:
        ArgumentError: it raised something, with the line where; or it registers none.
    """
    name = execute(path)
    found = [a for c in Collective for a in algorithms(c).values() if a.function.__module__ == name]
    if not found:
        raise ArgumentError(f"{path} registers no algorithm: put @algorithm(Collective.ALL_REDUCE) above a function")
    return found


def execute(path: Path) -> str:
    """Run a user's file and return the name of its module.

    Raises:
        ArgumentError: it raised something, with the line where.
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
        line = f", line {error.lineno}" if error.lineno else ""
        text = f": {error.text.strip()}" if error.text else ""
        raise ArgumentError(f"{error.filename or path}{line}: {error.msg}{text}") from error
    except (Exception, SystemExit) as error:
        raise ArgumentError(_in_file(path, error)) from error
    return name


def _in_file(path: Path, error: BaseException) -> str:
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
