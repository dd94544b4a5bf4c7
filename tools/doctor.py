"""`abccl doctor`: looks at the machine and at what is installed, runs two ranks, and says what to do."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator

import click
from rich.text import Text

from .doctor_checks import (
    FAIL,
    OK,
    WARN,
    Ended,
    Finding,
    check_compiler,
    check_mpi,
    check_python,
    check_torch,
    mpirun,
    run,
    version_of,
)
from .doctor_gpu import check_gpu
from .doctor_machine import check_cores, check_limits, check_tables
from .doctor_memory import check_sharing, check_shm
from .terminal import console

Check = Callable[[int], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    check_python,
    check_compiler,
    check_torch,
    check_mpi,
    check_gpu,
    check_sharing,
    check_shm,
    check_limits,
    check_cores,
    check_tables,
)

STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}

RUN_SECONDS = 90.0
"""That two ranks may take to start, to check their result and to be timed."""


@click.command()
@click.option("--ranks", type=click.IntRange(1), help="How many ranks you want here; one for each core, by default.")
@click.option("--json", "as_json", is_flag=True, help="As data.")
@click.option("--no-run", is_flag=True, help="Only look; start no ranks.")
def doctor(ranks: int | None, as_json: bool, no_run: bool) -> None:
    """Look at the machine and at what is installed, run two ranks, and say what to do.

    Each line is ok, warn (something is missing or slow) or fail (abccl can not be used so), with a remedy below it.
    What is looked for is not imported here but in processes of their own, so that a broken install is a line.

    Two ranks then check the bits of an all_reduce, and time it, over each transport that is there: shared memory,
    Gloo if torch is installed, MPI if mpirun is, CUDA devices if there are any. With --ranks, so many ranks do it
    over shared memory, too.

    The exit code is 1 if a line says fail.
    """
    number = ranks or len(os.sched_getaffinity(0))
    checks = CHECKS if no_run else (*CHECKS, lambda n: runs(n if ranks else 2))
    found = []
    for finding in examine(checks, number):
        found.append(finding)
        if not as_json:
            show(finding)
    worst = FAIL if any(one.state == FAIL for one in found) else OK
    if as_json:
        click.echo(json.dumps({"ranks": number, "state": worst, "findings": [vars(one) for one in found]}, indent=1))
    sys.exit(int(worst == FAIL))


def examine(checks: tuple[Check, ...], ranks: int) -> Iterator[Finding]:
    """What all checks find, as they find it; one that fails itself is a line, too."""
    for check in checks:
        try:
            yield from check(ranks)
        except Exception as error:
            name = getattr(check, "__name__", "check").removeprefix("check_")
            text = f"could not be looked at: {type(error).__name__}: {error}"
            yield Finding(WARN, name, text, "this is an error of abccl's doctor: please report it")


def show(finding: Finding) -> None:
    """Print a finding, and its remedy below it."""
    line = Text.assemble((f"{finding.state:<5}", STYLES[finding.state]), (f"{finding.part:<14}", "bold"), finding.text)
    output = console()
    output.print(line, soft_wrap=True)
    if finding.remedy:
        output.print(Text(f"{'':5}{'':14}-> {finding.remedy}", "dim" if finding.state == OK else ""), soft_wrap=True)


# ---- ranks that run


def runs(ranks: int) -> Iterator[Finding]:
    """What ranks do over each transport that is there."""
    program = [sys.executable, "-m", f"{__package__}.doctor_run"]
    yield judge("run shm", run([*program, "shm"], RUN_SECONDS, environment()), FAIL)
    if ranks != 2:
        yield judge(f"run shm x {ranks}", run([*program, "shm", str(ranks)], RUN_SECONDS, environment()), FAIL)
    if version_of("torch"):
        yield judge("run gloo", run([*program, "gloo"], RUN_SECONDS, environment()), WARN)
    launcher = mpirun()
    if launcher and version_of("mpi4py"):
        if any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")):
            yield Finding(WARN, "run mpi", "left out: this is an MPI process itself", "run the doctor without mpirun")
        else:
            yield judge("run mpi", run([launcher, "-n", "2", *program, "mpi"], RUN_SECONDS, environment()), WARN)
    calls_cuda = version_of("cuda-bindings") and version_of("cupy-cuda13x", "cupy-cuda12x", "cupy")
    if calls_cuda and os.path.exists("/dev/nvidiactl"):
        yield judge("run device", run([*program, "device"], RUN_SECONDS, environment()), WARN)


def environment() -> dict[str, str]:
    """For ranks that show what the machine does: as the library is made, with nothing measured or kept."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ABCCL_")}
    kept |= {"ABCCL_TUNER": "built-in", "OMP_NUM_THREADS": "1"}
    # More ranks than cores, and root: Open MPI wants leave for each.
    kept |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    if os.geteuid() == 0:
        kept |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return kept


def judge(part: str, ended: Ended, failed: str) -> Finding:
    """What the ranks have come to."""
    remedy = "the error says what to do; ABCCL_DEBUG=info shows how the ranks meet"
    if ended.how:
        return Finding(failed, part, f"the ranks failed: {ended.error}", remedy)
    found = {}
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(ended.out.splitlines()[-1])
    if part == "run mpi" and found.get("ranks") == 1:
        text = "mpirun starts ranks that do not see each other: it is of another MPI than mpi4py's"
        return Finding(failed, part, text, "put the mpirun of mpi4py's library first on the PATH")
    if "small" not in found:
        return Finding(failed, part, f"the ranks said nothing: {ended.error}", remedy)
    took = f"4 B in {microseconds(found['small'])} us, 1 MiB in {microseconds(found['large'])} us"
    text = f"{found['ranks']} ranks all_reduce {took}; the bits are right"
    also = f" ({' '.join(found['transport'].split())})" if part == "run device" else ""
    return Finding(OK, part, text + also)


def microseconds(seconds: float) -> str:
    """With three digits at least: 0.31, 5,280."""
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"
