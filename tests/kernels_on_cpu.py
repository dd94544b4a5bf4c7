"""The kernels that do not wait for each other (cuda/kernels.cu, cuda/gather.cu), compiled by g++ for the CPU.

`library()` has `run_kernel(name, grid, block, arguments)`, which runs one launch and returns 0, or 1 if there is no
kernel of that name; `arguments` is an array of pointers to the arguments, as cuLaunchKernel takes it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS, SHIM, BUILT = ROOT / "cuda", ROOT / "tests" / "cuda", ROOT / "build" / "kernels"

FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off")
# The kernels look at the same bytes as elements and as vectors.
ALIASING = "-fno-strict-aliasing"
SANITIZED = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@cache
def library() -> ctypes.CDLL:
    """The kernels, built at the first call of all processes."""
    loaded = ctypes.CDLL(str(build("kernels.cpp", ("-O2", "-fPIC", "-shared"))))
    loaded.run_kernel.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return loaded


def build(source: str, flags: Sequence[str], patches: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """What a file of tests/cuda/ is compiled to. It is kept, under a hash of all that it is made of.

    Args:
        patches: what is to be replaced in a file of cuda/, by its name: (old, new), old being there once.
    """
    files = [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh"), *SHIM.glob("*.hpp"), SHIM / source]
    texts = {file.name: file.read_text() for file in sorted(files)}
    for name, (old, new) in (patches or {}).items():
        assert texts[name].count(old) == 1, f"{name} has {old!r} {texts[name].count(old)} times"
        texts[name] = texts[name].replace(old, new)
    command = [os.environ.get("CXX", "g++"), *FLAGS, ALIASING, *flags]
    key = hashlib.sha256(repr((texts, command)).encode()).hexdigest()[:24]
    BUILT.mkdir(parents=True, exist_ok=True)
    built = BUILT / f"{Path(source).stem}-{key}"
    with open(BUILT / f"{key}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=BUILT) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one builds
        if not built.exists():
            for name, text in texts.items():
                (Path(folder) / name).write_text(text)
            made = Path(folder) / "made"
            subprocess.run([*command, Path(folder) / source, "-o", made], check=True, timeout=300)
            made.replace(built)
    return built
