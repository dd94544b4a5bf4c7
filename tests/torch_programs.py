"""Python programs as users start them, by torchrun or not, with the package of this run. pytest does not collect it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import abccl

ROOT = Path(__file__).resolve().parent.parent

# A checkout need not be installed for its tests: the backend is registered by hand.
REGISTER = """
import os, sys
import torch, torch.distributed as dist
from abccl.collectives.torch.register import register
register()
"""

RUN = """
import runpy
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def python(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program to its end."""
    path = [str(Path(abccl.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))} | environment,
        capture_output=True,
        text=True,
        timeout=150,
    )


def torchrun(*arguments: Any, options: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a program."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *options]
    return python(*start, *arguments, **environment)


def program(folder: Path, *parts: str) -> Path:
    """A file of these parts, behind the registration."""
    path = folder / "program.py"
    path.write_text("".join([REGISTER, *parts]))
    return path


def example(folder: Path, name: str, *arguments: Any, launch: Any = torchrun) -> str:
    """What an example prints; it must succeed."""
    done = launch(program(folder, RUN), ROOT / "examples" / name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    printed: str = done.stdout
    return printed
