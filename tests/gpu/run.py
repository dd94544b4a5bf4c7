"""`make test-gpu`: all that one GPU can prove, by one command.

    python tests/gpu/run.py --json build/gpu.json
    python tests/gpu/run.py --only kernels --only bandwidth -v

Every check has processes of its own and a limit, so one that hangs or crashes does not end the rest. docs/gpu.md tells
what is proved, and what a machine needs.

exit status: 0 if no check failed, 1 if one did, 2 if there is no GPU or something is not installed
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
LINK = ROOT / "build" / "typing" / "abccl"

SHOWN_LINES = 60
"""Of the output of a check that failed."""

# Modules, and how to get them.
NEEDED = {
    "numpy": "numpy",
    "rich": "rich",
    "pytest": "'abccl[test]'",
    "ml_dtypes": "'abccl[test]'",
    "cuda.bindings": "'abccl[cuda13]' (for a driver of CUDA 12: 'abccl[cuda12]')",
    "cupy": "'abccl[cuda13]' (for a driver of CUDA 12: 'abccl[cuda12]')",
    "torch": "'abccl[torch]', of a build with CUDA",
}


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parser().parse_args(words)
    environment = _prepare()
    fake = environment.get("ABCCL_TEST_FAKE_CUDA") == "1"
    problems = lacking(fake)
    if problems:
        return _refuse(problems)
    from gpu import report
    from gpu.checks import CHECKS

    if options.write and fake:
        return _refuse(["--write wants a GPU's figures, and ABCCL_TEST_FAKE_CUDA=1 gives those of a fake driver"])
    if options.write and options.only:
        return _refuse(["--write wants the whole run: leave out --only"])
    device, problem = _facts(environment)
    if device is None:
        return _refuse([problem])
    print(report.device_line(device), flush=True)
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    return execute(chosen, device, environment, options.json, options.write, options.verbose)


def execute(
    checks: Sequence[Any],
    device: dict[str, Any],
    environment: dict[str, str],
    json_file: Path | None = None,
    document: Path | None = None,
    verbose: bool = False,
) -> int:
    """Run the checks, print the table, write what is to be written; the exit status."""
    from gpu import report
    from gpu.checks import run_check
    from rich.console import Console

    from abccl.bench.document import write_part

    console = Console(soft_wrap=True, highlight=False)
    results = []
    for number, check in enumerate(checks, 1):
        print(f"[{number}/{len(checks)}] {check.name}: {check.what}; at most {check.seconds:g} s", flush=True)
        result = run_check(check, environment, hear=lambda line: print(f"    {line}", flush=True) if verbose else None)
        results.append(result)
        for line in [] if result.good or verbose else result.output.splitlines()[-SHOWN_LINES:]:
            print(f"    {line}")
        print(f"      {result.result} after {result.seconds:.1f} s: {result.showed}", flush=True)
        if json_file is not None:  # each time: what is known stays known if this program is ended
            report.keep(json_file, report.record(device, results))
    found = report.record(device, results)
    report.show(console, found)
    console.print(report.device_line(device))
    if json_file is not None:
        console.print(f"written: {json_file}")
    if document is not None:
        write_part(document, report.PART, report.markdown(found))
        console.print(f"written: {document}")
    return 0 if found["passed"] else 1


def _parser() -> argparse.ArgumentParser:
    from_start, _, end = (__doc__ or "").partition("exit status:")
    parser = argparse.ArgumentParser(
        description=from_start, epilog=f"exit status:{end}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sys.path.insert(0, str(TESTS))
    from gpu.checks import CHECKS

    names = [check.name for check in CHECKS]
    parser.add_argument("--json", type=Path, metavar="FILE", help="write device, versions, results and figures there")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the table into docs/gpu.md")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the output of checks as it comes")
    return parser


def _prepare() -> dict[str, str]:
    """Make this repository importable as abccl, here and in the environment that is returned, for the checks."""
    if not LINK.exists():
        LINK.parent.mkdir(parents=True, exist_ok=True)
        LINK.symlink_to("../..")
    paths = [str(TESTS), str(LINK.parent)]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    before = os.environ.get("PYTHONPATH")
    paths += [before] if before else []
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths), "ABCCL_TUNER": "built-in", "PYTHONUNBUFFERED": "1"}


def lacking(fake: bool) -> list[str]:
    """What is not there that all checks need, with how to get it."""
    found = []
    if not fake:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            found.append("no GPU: the driver's libcuda.so.1 is not on this machine")
    found += [f"no {name}: pip install {how}" for name, how in NEEDED.items() if not _there(name)]
    if not _there("abccl.transports._native"):
        found.append("no native core: python setup.py build_ext --inplace")
    return found or _no_nvrtc()


def _no_nvrtc() -> list[str]:
    """NVRTC is a library that its module loads when it is called."""
    from abccl.cuda.compile import _nvrtc
    from abccl.errors import TransportError

    try:
        _nvrtc()
    except TransportError as error:
        return [f"no NVRTC: {error}"]
    return []


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a package around it, or of what that needs
        return False


def _facts(environment: dict[str, str]) -> tuple[dict[str, Any] | None, str]:
    """What is known of the device, or why nothing is. In a process of its own: no context stays, and none can hang."""
    command = [sys.executable, str(TESTS / "gpu" / "device.py")]
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None, "the GPU did not answer within 120 s: see what nvidia-smi says"
    if done.returncode:
        return None, f"no GPU that can be used: {(done.stderr.strip() or 'no output').splitlines()[-1]}"
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts, ""


def _refuse(problems: Sequence[str]) -> int:
    print("tests/gpu/run.py can not run here:", file=sys.stderr)
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
