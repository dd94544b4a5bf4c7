"""Runs the kernels that wait for each other on the CPU: a driver that notes launches, and the program that makes them.

`ImageDriver` is the memory of one machine's devices, all ranks' together, as a file that is mapped at the same
addresses here and in the program (`tests/cuda/sync.cpp`). `run` lets the program make the launches that were noted.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abccl.transports.cuda_spin import Calls

ROOT = Path(__file__).parent.parent
KERNELS, SHIM = ROOT / "cuda", ROOT / "tests" / "cuda"

BASE = 0x7E9000000000
"""Where the image lies: both AddressSanitizer and ThreadSanitizer leave these addresses to the program."""

HEAD_BYTES, GAP = 1 << 20, 128

SANITIZERS = {
    "plain": ["-O0"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FIXED_NOREPLACE = 0x100000


class _Head(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("base", "nbytes", "regions", "launches", "ranks"))


class _Region(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_uint64),
        ("grid", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("kernel", ctypes.c_char * 40),
        ("calls", Calls),
        ("arguments", ctypes.c_uint8 * 40),
    )


class ImageDriver:
    """What `Spin` asks of a driver; a stream's number is the rank that launches. `threads` are those of a block."""

    architecture = "sm_90"

    def __init__(self, file: Path, nbytes: int = 64 << 20, threads: int = 3) -> None:
        self.file, self.nbytes, self.threads = file, nbytes, threads
        with file.open("wb") as opened:
            opened.truncate(nbytes)
        descriptor = os.open(file, os.O_RDWR)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = _libc.mmap(BASE, nbytes, protection, mmap.MAP_SHARED | _FIXED_NOREPLACE, descriptor, 0)
        os.close(descriptor)
        assert mapped == BASE, os.strerror(ctypes.get_errno())
        self.next = BASE + HEAD_BYTES
        self.regions: list[_Region] = []
        self.launches: list[_Launch] = []
        self.names: list[str] = []

    def close(self) -> None:
        _libc.munmap(BASE, self.nbytes)

    def allocate(self, nbytes: int) -> int:
        address = self.next
        self.next += -(-nbytes // GAP) * GAP + GAP
        assert self.next <= BASE + self.nbytes, "a larger image is wanted"
        self.regions.append(_Region(address, nbytes))
        return address

    allocate_pinned = allocate

    def free(self, address: int) -> None:
        assert any(region.address == address for region in self.regions)

    free_pinned = free

    def copy_now(self, destination: int, source: int, nbytes: int) -> None:
        ctypes.memmove(destination, source, nbytes)

    def load(self, image: bytes) -> int:
        return 0

    def function(self, module: int, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def launch(self, function: int, grid: int, block: int, arguments: Sequence[Any], stream: int) -> None:
        calls, blocks, *others = arguments
        rest = (ctypes.c_uint8 * 40)(*bytes(blocks).ljust(8, b"\0"), *b"".join(map(bytes, others)))
        self.launches.append(_Launch(stream, grid, self.threads, self.names[function].encode(), calls, rest))

    def run(self, program: Sequence[str | Path], seed: int = 1, ranks: int = 8) -> subprocess.CompletedProcess[str]:
        """Make all launches that were noted since the last time."""
        tables = b"".join(map(bytes, (*self.regions, *self.launches)))
        head = bytes(_Head(BASE, self.nbytes, len(self.regions), len(self.launches), ranks)) + tables
        assert len(head) <= HEAD_BYTES
        ctypes.memmove(BASE, head, len(head))
        self.launches.clear()
        command = [*map(str, program), str(self.file), str(seed)]
        return subprocess.run(command, capture_output=True, text=True, timeout=280)


def library(folder: Path) -> ctypes.CDLL:
    """The kernels as a shared library with `run_kernel`, for `FakeDriver`."""
    return ctypes.CDLL(build(folder, options=["-shared", "-fPIC"])[-1])


def build(
    folder: Path, sanitizer: str = "plain", options: Sequence[str] = (), patch: tuple[str, str, str] | None = None
) -> list[str]:
    """Build the program; the command that runs it.

    Args:
        patch: the name of a kernel's file, and what is to be replaced in it by what; it must be there once.
    """
    sources = folder / "sources"
    sources.mkdir(parents=True)
    for path in (*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")):
        shutil.copy(path, sources)
    if patch is not None:
        name, old, new = patch
        text = (sources / name).read_text()
        assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
        (sources / name).write_text(text.replace(old, new))
    program = folder / "sync"
    flags = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-pthread"]
    subprocess.run(
        [os.environ.get("CXX", "g++"), *flags, *SANITIZERS[sanitizer], *options, f"-I{sources}", f"-I{SHIM}",
         SHIM / "sync.cpp", "-o", program],
        check=True, timeout=300,
    )  # fmt: skip
    if sanitizer == "thread":
        # ThreadSanitizer wants addresses that are not randomised.
        return ["setarch", "-R", "env", "TSAN_OPTIONS=halt_on_error=1", str(program)]
    return [str(program)]


def no_image(*_: object) -> bytes:
    """Instead of a compiler: nothing is compiled for a device here."""
    return b""
