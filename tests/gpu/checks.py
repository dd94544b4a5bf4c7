"""The checks of `make test-gpu`, and how one is run: in processes of its own, which end at its limit.

A check is a file of tests, run by pytest, or a program. A program may leave figures in the file that FIGURES_FILE
names: `{"figures": [{"title": ..., "columns": [...], "rows": [[...], ...], "notes": [...]}], "showed": "..."}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FIGURES_FILE = "ABCCL_GPU_FIGURES"

PASS, FAIL, HANG, CRASH, MISSING, LEFT_OUT = "pass", "FAIL", "HANG", "CRASH", "MISSING", "left out"
GOOD = {PASS, LEFT_OUT}
"""Results that leave the exit status at 0. A check whose file is missing proves nothing, so it counts as failed."""

KEPT_LINES = 300
"""Lines of a failed check's output that are kept."""

PYTEST_SETTINGS = ("addopts=", "timeout=0", "faulthandler_timeout=0")


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: for --only.
        what: it shows.
        file: of tests, or a program's.
        seconds: that it may take; then it is ended and counts as hung.
        words: of the program; None says that the file is pytest's.
        before: what runs the program: a tool that is left out where it is not installed.
    """

    name: str
    what: str
    file: Path
    seconds: float
    words: tuple[str, ...] | None = None
    before: tuple[str, ...] = ()

    def command(self, tool: str, junit: Path) -> list[str]:
        """What is started."""
        if self.words is not None:
            return [*((tool, *self.before[1:]) if self.before else ()), sys.executable, str(self.file), *self.words]
        # pyproject.toml asks for plugins that may not be there, and for shorter limits than these tests have.
        settings = [word for setting in PYTEST_SETTINGS for word in ("-o", setting)]
        options = ["--import-mode=importlib", "-p", "no:cacheprovider", "-q", "-rs", *settings]
        return [sys.executable, "-m", "pytest", *options, f"--junitxml={junit}", str(self.file)]


@dataclass
class Result:
    """What became of a check."""

    name: str
    what: str
    result: str
    seconds: float = 0.0
    showed: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""

    @property
    def good(self) -> bool:
        """Whether it leaves the exit status at 0."""
        return self.result in GOOD


def _tests(name: str, what: str, file: str, seconds: float = 600) -> Check:
    return Check(name, what, HERE / file, seconds)


def _sanitizer(tool: str, what: str) -> Check:
    before = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    return Check(tool, f"compute-sanitizer: {what}", HERE / "every_kernel.py", 600, (), before)


CHECKS = (
    _tests("driver", "the seam to the driver: memory, IPC, streams, waits, graphs", "test_driver_gpu.py", 300),
    _tests("kernels", "fold, scale and gather bit-equal to the native core", "test_kernels_gpu.py"),
    Check("bandwidth", "fold and gather against a device copy", HERE / "bandwidth.py", 600, ()),
    _tests("cuda_ipc", "2 to 4 processes on the device: conformance, lost peers, graphs", "test_cuda_ipc_gpu.py", 900),
    _tests(
        "communicator", "cupy arrays and torch tensors: collectives, streams, graphs", "test_communicator_gpu.py", 900
    ),
    _tests("spin", "the kernels that wait, ranks as groups of blocks", "test_spin_cooperative.py", 300),
    _tests("staged", "through pinned host memory", "test_staged_gpu.py"),
    _tests("nccl", "one rank, and two where the library allows it", "test_nccl_gpu.py"),
    _tests("torch", "the torch backend with CUDA tensors, DDP", "test_torch_cuda.py", 900),
    _sanitizer("memcheck", "memory out of bounds"),
    _sanitizer("racecheck", "races in shared memory"),
    _sanitizer("synccheck", "barriers"),
    _sanitizer("initcheck", "memory that was never written"),
    Check("speed", "all_reduce on the one device against Gloo and NCCL", HERE / "speed.py", 900, ()),
)
"""In the order in which they run: what the others rest on comes first."""


def run_check(check: Check, environment: dict[str, str], hear: Callable[[str], None] = lambda line: None) -> Result:
    """Run a check and all that it starts, to its end or its limit.

    Args:
        environment: of its processes.
        hear: is given each line of its output as it comes.
    """
    result = Result(check.name, check.what, FAIL)
    if not check.file.exists():
        result.result, result.showed = MISSING, f"there is no {check.file.name}"
        return result
    tool = shutil.which(check.before[0], path=environment.get("PATH")) if check.before else ""
    if tool is None:
        result.result, result.showed = LEFT_OUT, f"{check.before[0]} is not installed"
        return result
    with tempfile.TemporaryDirectory(prefix="abccl-gpu-") as folder:
        junit, figures = Path(folder, "junit.xml"), Path(folder, "figures.json")
        begin = time.monotonic()
        code, output = _run(check.command(tool, junit), environment | {FIGURES_FILE: str(figures)}, check.seconds, hear)
        result.seconds = time.monotonic() - begin
        result.output = "\n".join(output[-KEPT_LINES:])
        if figures.exists():
            told = json.loads(figures.read_text(encoding="utf-8"))
            result.figures, result.showed = told["figures"], told["showed"]
        _judge(result, check, code, junit, output)
    if result.good:
        result.output = ""
    return result


def _judge(result: Result, check: Check, code: int | None, junit: Path, output: Sequence[str]) -> None:
    """Set the result and what it showed, from the exit status and what was left."""
    last = next((line.strip() for line in reversed(output) if line.strip()), "no output")
    if code is None:
        result.result, result.showed = HANG, f"not done after {check.seconds:g} s; the last line: {last}"
    elif code < 0:
        result.result, result.showed = CRASH, f"ended by {signal.Signals(-code).name}; the last line: {last}"
    elif check.words is None and junit.exists():
        result.result, result.showed = _of_pytest(junit)
    elif check.words is not None and code == 0:
        result.result, result.showed = PASS, result.showed or last
    else:
        result.showed = f"exit status {code}; the last line: {last}"


def _of_pytest(junit: Path) -> tuple[str, str]:
    """The result of a file of tests."""
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    kinds = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    found = {kind: [c for c in cases if any(c.find(tag) is not None for tag in tags)] for kind, tags in kinds.items()}
    reasons = {skip.get("message", "") for case in found["skipped"] for skip in case.iter("skipped")}
    passed = len(cases) - sum(map(len, found.values()))
    counts = [f"{passed} passed"] + [f"{len(some)} {kind}" for kind, some in found.items() if some]
    showed = ", ".join(counts) + (f": {'; '.join(sorted(reasons))}" if reasons else "")
    if found["failed"]:
        return FAIL, f"{showed}; first {found['failed'][0].get('name')}"
    if passed:
        return PASS, showed
    return (LEFT_OUT, showed) if found["skipped"] else (FAIL, "it has no tests")


def _run(
    command: Sequence[str], environment: dict[str, str], seconds: float, hear: Callable[[str], None]
) -> tuple[int | None, list[str]]:
    """Exit status (None: at the limit) and lines of output of a command, whose process group is ended with it."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            hear(lines[-1])

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    code: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(seconds)
    finally:
        # What it started and left behind would hold the device, and the pipe.
        _kill_group(process.pid)
        listener.join(10)
    return code, list(lines)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
