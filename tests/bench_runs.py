"""What tests of the benchmark share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from abccl.algorithms import Collective
from abccl.bench.collectives import FACTS, Case
from abccl.bench.machine import machine
from abccl.bench.measure import Timing
from abccl.bench.options import Options
from abccl.bench.regime import Regime
from abccl.bench.run import Measured, Report, Row
from abccl.transports.topology import Host

ALONE = [sys.executable, "-m", "abccl.bench"]


def case_of(collective: Collective, count: int = 5, ranks: int = 3, dtype: str = "float32", op: str = "sum") -> Case:
    """A case in the form that is measured unless told otherwise."""
    return Case(collective, dtype, op if collective.reduces else "", count, ranks, FACTS[collective].in_place)


def measured(library: str, seconds: float, algorithm: str = "auto", by_rank: Sequence[float] = ()) -> Measured:
    """Figures of a call that took so long."""
    timing = Timing((seconds,), tuple(by_rank) or (seconds,) * 2, 1)
    return Measured(library, "direct", algorithm, "ring", timing, 0)


def report(
    rows: list[Row], options: Options, regimes: Sequence[Regime | None] = (None, None), hosts: tuple[Host, ...] = ()
) -> Report:
    """What comes of a run with these rows."""
    facts = {**machine(), "cores_of_ranks": ["0", "1"], "load_average": 0.0}
    return Report(options, "mpirun", facts, {"mpi": {"version": "3"}}, rows, list(regimes), hosts, "shm")


def ended(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command when it has ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100, env=environment)


def started(command: list[str], *arguments: str) -> str:
    """What it printed; it must have done well."""
    done = ended(command, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
