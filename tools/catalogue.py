"""`abccl algorithms`: what there is, in the terminal, or as the document of all algorithms with their pictures."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from rich.table import Table

from ..algorithms import Algorithm, Collective, algorithms, counts, replay, to_collective
from ..errors import ArgumentError
from . import forms as closed
from .markdown import table, wrapped
from .sketch import sketch
from .terminal import console

PICTURED = 8
"""The ranks of the pictures, and of the table at the head of each collective."""

SIZES = (2, 3, 5, 8, 16, 64)
NAME = r"(?:van de |De )?[A-Z][a-z]+"
CITED = re.compile(rf"((?:{NAME}, )*{NAME}(?: & {NAME}| et al\.)? (?:19|20)\d\d)\b")
"""A paper, as docstrings cite it and references.md lists it."""

LIBRARY = Algorithm.__module__.rpartition(".")[0]

HEAD = f"""
# Algorithms

Written by `abccl algorithms --write docs/algorithms.md` from what is registered: do not edit it.

`algorithm="ring"` picks one for a call, `ABCCL_ALGORITHM=all_reduce=ring` for a process. Parameters follow the name:
`knomial(radix=8)`, or `knomial(8)`. `abccl show` and `abccl draw` tell more of each, for any number of ranks.

`hierarchical` runs other algorithms within and between groups of ranks, its parameter `levels`: `3+2` is a group of
three and one of two, `4x2` four groups of two, `2x2x2` three levels (two nodes of two boards of two GPUs, as ZeRO++ has
them), `(2+2)+(2+1)` the same with a rank missing. Ranks follow each other, or are dealt out in turn as in `3+2:cyclic`,
or are listed as in `3+2:0.2.4.1.3`. `inner` names the algorithm below the top, or one for each level from the top down
as in `ring/direct`; `outer` that at the top. Without levels a communicator takes its hosts; drawings and proofs, and a
communicator on one host, take groups of about the square root of the number of ranks.

`composed` runs two other algorithms one after the other, `composed(reduce_scatter=ring, all_gather=direct)` those two.
Which collectives are made of which others, with formulas for any number of ranks: [closed-forms.md](closed-forms.md).

Beside these, `native` is the collective that MPI or Gloo has of its own. It has no schedule, and is there where one of
them carries messages: on several hosts, or by `abccl.init("mpi")` and `abccl.init("gloo")`.

*Steps* is the longest chain of dependent messages. *Sent* and *folded* are the largest of any rank, as parts of the
whole vector (of the concatenation where parts are gathered or scattered, of one rank's send buffer for all_to_all).
`abccl verify` holds these numbers against the schedules. A dash says that the algorithm does not run on so many ranks.
The table at the head of each collective is for {PICTURED} ranks.

In the pictures, of {PICTURED} ranks each, ranks stand below each other and time runs to the right. A line is a message,
orange where it is folded in and blue where it is copied, the thicker the larger its part of the vector. A dot is what a
rank holds of its result: the darker the more, green when complete, grey where it is to have none.

The papers are in [references.md](references.md).
"""


@click.command(name="algorithms")
@click.argument("collective", required=False)
@click.option("--ranks", default=PICTURED, show_default=True, type=click.IntRange(1), help="The number of ranks.")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Write the document of all algorithms.")
@click.option("--forms", is_flag=True, help="The closed forms instead: formulas for any number of ranks.")
def catalogue(collective: str | None, ranks: int, write: Path | None, forms: bool) -> None:
    """List the algorithms, of one COLLECTIVE or of all, with what they cost.

    With --write docs/algorithms.md they are written there instead, with a picture of each in docs/algorithms/; with
    --forms --write docs/closed-forms.md the closed forms are.
    """
    if (write or forms) and collective:
        raise ArgumentError(f"--{'write' if write else 'forms'} takes all collectives: leave out {collective}")
    if forms:
        if write:
            _write({write: closed.document()})
        click.echo(f"{write} is written" if write else closed.document())
        return
    if write:
        click.echo(f"{write_document(write)} files written: {write}, and the pictures in {write.with_suffix('')}")
        return
    table = Table("collective", "algorithm", "steps", "sent", "folded", "what it does")
    for kind in [to_collective(collective)] if collective else Collective:
        for a in _sorted(kind):
            table.add_row(kind.value, _call(a), *_costs(a, ranks), _what(a))
    console().print(table)


def write_document(path: Path) -> int:
    """Write the document and its pictures, and remove pictures that are no longer wanted; how many files there are."""
    folder = path.with_suffix("")
    wanted = {folder / name: picture for name, picture in pictures().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in set(folder.glob("*.svg")) - wanted.keys():
            old.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error
    _write({path: document(folder.name), **wanted})
    return 1 + len(wanted)


def _write(files: dict[Path, str]) -> None:
    for path, words in files.items():
        try:
            path.write_text(words, encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ArgumentError:
    return ArgumentError(f"{path} can not be written ({error.strerror}): name another file by --write")


def document(folder: str) -> str:
    """The document; its pictures are in that folder beside it."""
    parts = [HEAD.strip()]
    for collective in Collective:
        every = _ours(collective)
        parts.append(f"## {collective.value}")
        rows = [[f"[{_call(a)}](#{collective.value}-{a.name})", *_costs(a, PICTURED), _what(a)] for a in every]
        parts.append(table(["algorithm", "steps", "sent", "folded", "what it does"], rows))
        parts += ["\n\n".join(_section(a, folder)) for a in every]
    return "\n\n".join(parts) + "\n"


def pictures() -> dict[str, str]:
    """The pictures by the names of their files."""
    every = [a for collective in Collective for a in _ours(collective)]
    return {_picture(a): sketch(replay(a, _pictured(a))) for a in every}


def _sorted(collective: Collective) -> list[Algorithm]:
    return sorted(algorithms(collective).values(), key=lambda a: a.name)


def _ours(collective: Collective) -> list[Algorithm]:
    """The library's own, whatever else a process has registered."""
    return [a for a in _sorted(collective) if a.function.__module__.startswith(f"{LIBRARY}.")]


def _section(a: Algorithm, folder: str) -> Iterator[str]:
    """What there is to say of one algorithm."""
    yield f"### {a.collective.value} {a.name}"
    yield f"![{a.collective.value} {a.name}, {_pictured(a)} ranks]({folder}/{_picture(a)})"
    for paragraph in (inspect.getdoc(a.function) or "").split("\n\n"):
        yield wrapped(CITED.sub(r"[\1](references.md)", paragraph))
    module = sys.modules[a.function.__module__]
    file = f"algorithms/{Path(str(module.__file__)).name}"
    yield wrapped(f"In [{file}](../{file}): {(module.__doc__ or '').splitlines()[0]}")
    for name, parameter in a.declared.items():
        wants = f", {parameter.wants}" if parameter.wants else ""
        yield f"Parameter `{name}`{wants}; {parameter.default} if it is not given."
    for restriction in a.restrictions:
        if told := f"Wants {restriction.wants}." if restriction.told is None else restriction.told:
            yield wrapped(told)
    costs = [_costs(a, size) for size in SIZES]
    rows = [[what, *cells] for what, cells in zip(("steps", "sent", "folded"), zip(*costs))]
    shown = rows[: 3 if a.collective.reduces else 1 if a.collective is Collective.BARRIER else 2]
    yield table(["ranks", *map(str, SIZES)], shown)


def _costs(a: Algorithm, size: int) -> tuple[str, str, str]:
    """Steps, sent and folded in writing."""
    if a.refusal(size):
        return "-", "-", "-"
    found = (a.counts(size) if a.counts else None) or counts(a, size)
    return str(found.steps), str(found.sent), str(found.folded)


def _call(a: Algorithm) -> str:
    """The algorithm with its parameters, as it may be written."""
    parameters = ", ".join(f"{name}={value}" for name, value in a.parameters)
    return f"{a.name}({parameters})" if parameters else a.name


def _what(a: Algorithm) -> str:
    """The first paragraph of its documentation."""
    return " ".join((inspect.getdoc(a.function) or "").split("\n\n")[0].split())


def _pictured(a: Algorithm) -> int:
    """So many ranks as the picture is to have, or the next smaller number that the algorithm runs on."""
    return next(size for size in range(PICTURED, 0, -1) if not a.refusal(size))


def _picture(a: Algorithm) -> str:
    return f"{a.collective.value}-{a.name}.svg"
