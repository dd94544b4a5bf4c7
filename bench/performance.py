"""`make performance`: run the benchmark against every library, and write docs/performance.md from what came out.

The outcome of a run is kept in build/performance, so that a few runs can be repeated by `--only`, and the document is
written anew from them and the others' last outcomes. A run that fails has an outcome too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import click

from . import report
from .record import replace_file
from .runs import LIBRARIES, RUNS, Library, Outcome, Run

ROOT = Path(__file__).absolute().parent.parent
KEPT = Path("build", "performance")
LIMIT = 300
"""Seconds after which a run is ended, and counts as failed."""


def execute(run: Run, seconds: float, root: Path = ROOT) -> Outcome:
    """Run it, and wait for it."""
    start, date = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="minutes")
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "x.json")
        output, error = _execute([*run.arguments(seconds), "--json", str(kept)], LIBRARIES[run.library], root)
        data = json.loads(kept.read_text()) if kept.exists() and kept.stat().st_size else None
    if data is None and not error:
        error = "it ended without figures"
    # Open MPI gives its ranks a terminal, which ends lines in its own way.
    output = "\n".join(line.rstrip() for line in output.replace(str(root), ".").splitlines())
    return Outcome(run.name, run.command(seconds), date, time.monotonic() - start, output, error, data)


def _execute(arguments: list[str], library: Library, root: Path) -> tuple[str, str]:
    """What it printed, and why it failed."""
    programs = root / library.environment / "bin"
    if not (programs / "python").exists():
        return "", f"there is no environment {library.environment}: make performance makes it"
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(root / "build" / "typing"),
        "OMP_NUM_THREADS": "1",
    }
    if os.geteuid() == 0:  # Open MPI refuses to run as root unless told twice
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if not (programs / arguments[0]).exists():
        return "", f"{library.environment} has no {arguments[0]}: remove it, and make performance makes it anew"
    process = subprocess.Popen(
        [str(programs / arguments[0]), *arguments[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=root,
        env=environment,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], f"ended after {LIMIT} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode:
        last = (output.strip().splitlines() or [""])[-1]
        return output, f"exit code {process.returncode}, {last.removeprefix('Error: ')}"
    return output, ""


def keep(outcome: Outcome, folder: Path) -> None:
    """Keep it for the next time that the document is written."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"{outcome.name}.json", json.dumps(asdict(outcome), indent=1).encode())


def kept(folder: Path) -> dict[str, Outcome]:
    """The last outcomes of the runs, by name, in the order of RUNS."""
    files = {run.name: folder / f"{run.name}.json" for run in RUNS}
    return {name: Outcome(**json.loads(path.read_text())) for name, path in files.items() if path.exists()}


def chosen(words: str) -> list[Run]:
    """The runs whose names contain one of the words, which have commas between; all if there is none.

    Raises:
        click.BadParameter: a word is in no name.
    """
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    for word in wanted:
        if not any(word in run.name for run in RUNS):
            raise click.BadParameter(f"no run is called {word!r}: there are {', '.join(run.name for run in RUNS)}")
    return [run for run in RUNS if not wanted or any(word in run.name for word in wanted)]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", default="", metavar="NAMES", help="Runs whose names contain one of these, with commas.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.1, show_default=True, help="See bench.")
@click.option("--write/--no-write", default=True, help="Write the document, or only measure.")
def performance(only: str, seconds: float, write: bool) -> None:
    """Measure abccl against every library and write docs/performance.md. Takes about ten minutes."""
    runs = chosen(only)
    if write:
        report.check()
    for number, run in enumerate(runs, 1):
        click.echo(f"[{number}/{len(runs)}] {run.title} ... ", nl=False)
        sys.stdout.flush()
        outcome = execute(run, seconds)
        keep(outcome, ROOT / KEPT)
        click.echo(f"{outcome.took:.0f} s; {f'FAILED: {outcome.error}' if outcome.error else report.summary(outcome)}")
    if write:
        report.write(kept(ROOT / KEPT), ROOT)
        click.echo("wrote docs/performance.md")


if __name__ == "__main__":
    performance(prog_name="python -m abccl.bench.performance")
