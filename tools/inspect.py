"""`abccl inspect`: what the ranks of running jobs do and who holds them up, read from outside. Nothing is stopped."""

from __future__ import annotations

import json
import time

import click

from ..errors import ArgumentError
from ..transports.flight import Snapshot, everything, together


@click.command()
@click.argument("pid", required=False, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="As data: what each rank's flight recorder holds.")
@click.option(
    "--watch", metavar="SECONDS", type=click.FloatRange(0.05, 3600), help="Again and again, until Ctrl-C or the end."
)
def inspect(pid: int | None, as_json: bool, watch: float | None) -> None:
    """Print what the ranks of a running job do, where they wait, and first who holds everybody up.

    With PID the communicators that this process takes part in, all their ranks on this machine; without, those of all
    processes of this user. Of ranks on other hosts it tells what those here know.

    The processes are neither stopped nor signalled: their shared memory is read. Times are as of now.

    \b
    abccl inspect
    abccl inspect 4711 --watch 1
    """
    if watch is None:
        _show(_read(pid), as_json)
        return
    if as_json:
        raise click.UsageError("--watch redraws what people read: leave out --json")
    found = _read(pid)
    try:
        while True:
            click.clear()
            click.echo(time.strftime("%H:%M:%S"))
            _show(found, as_json)
            time.sleep(watch)
            found = _read(pid)
    except KeyboardInterrupt:
        return
    except ArgumentError:
        click.echo(f"process {pid} has ended, or closed its communicators")


def _read(pid: int | None) -> list[Snapshot]:
    return everything() if pid is None else together(pid)


def _show(found: list[Snapshot], as_json: bool) -> None:
    from ..collectives.hang_report import report

    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(report(found))
