"""`abccl explain`: the candidates for a call with their predicted times, and why one is chosen. Nothing is run."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.text import Text

from ..algorithms import to_collective
from .arguments import execute
from .terminal import console

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("collective")
@click.argument("size")
@click.option("--ranks", type=click.IntRange(1), help="The number of ranks; 4, or those of --table, by default.")
@click.option("--hosts", type=click.IntRange(1), help="On how many hosts they are, in equal blocks; 1 by default.")
@click.option("--algorithm", metavar="NAME", help="Ask for one, as algorithm= of a call does.")
@click.option("--all", "every", is_flag=True, help="Every candidate, not the best of each algorithm.")
@click.option("--json", "as_json", is_flag=True, help="As data, times in seconds.")
@click.option(
    "--file",
    type=FILE,
    help="A Python file that registers choosers or algorithms of your own; of these --algorithm shows one.",
)
@click.option("--table", type=FILE, help="A file of the tuner's, of this machine or another.")
@click.option("--link", type=click.Choice(["near", "far"]), help="Of the tables kept here, only those of such cores.")
def explain(
    collective: str,
    size: str,
    ranks: int | None,
    hosts: int | None,
    algorithm: str | None,
    every: bool,
    as_json: bool,
    file: Path | None,
    table: Path | None,
    link: str | None,
) -> None:
    """Print what each candidate for a call would take, and why one is chosen.

    COLLECTIVE is all_reduce or another; SIZE is that of the whole vector in bytes, as in 64K or 25MB: the
    concatenation, for what gathers or scatters.

    Predicted is the sum of alpha, for messages; beta, for bytes moved; and gamma, for bytes folded. Measured are the
    times that `abccl tune` found. The winner is marked by >.

    The constants are the newest that were measured on this machine among so many ranks on so many hosts, else the
    built-in ones: the second line says which. Hosts are taken to have as many cores as this one, which the first
    line says. ABCCL_ALGORITHM, ABCCL_RULES and the other variables hold as they do for a communicator.

    \b
    abccl explain all_reduce 25MB --ranks 8 --hosts 2
    abccl explain broadcast 64K --all
    """
    from ..collectives.offline import layout_of, offline_tuner
    from ..collectives.tuning import to_size

    kind, nbytes = to_collective(collective), to_size(size)
    if file:
        execute(file)
    measured_ranks, measured_hosts = layout_of(table) if table and ranks is None else (ranks or 4, 1)
    tuner = offline_tuner(measured_ranks, hosts or measured_hosts, link, table)
    told = tuner.explain(kind, nbytes, algorithm)
    if as_json:
        click.echo(json.dumps(told.to_json(), indent=1))
        return
    output = console()
    for number, line in enumerate(told.lines(every)):
        style = "bold" if number == 0 else "dim" if number == 1 else "bold green" if line.startswith("> ") else ""
        output.print(Text(line, style), soft_wrap=True)
