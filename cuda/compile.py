"""The kernels, compiled on this machine for its GPU, and kept.

NVRTC makes machine code (a cubin) of the `.cu` files beside this one, which include nothing but the `.cuh` files beside
them. It is kept below the user's cache directory (`ABCCL_CACHE_DIR`) under a hash of all that it is made of.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import secrets
import stat
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, TransportError

HERE = Path(__file__).parent
ENVIRONMENT = "ABCCL_CACHE_DIR"
NEEDED = "pip install 'abccl[cuda13]', or 'abccl[cuda12]' where the driver is of CUDA 12"

OPTIONS = ("--std=c++17", "--fmad=false", "--device-as-default-execution-space")
"""Of every compilation. Products and sums are not contracted, so that results have the bits of the CPU's."""

_DIGEST = hashlib.sha256().digest_size

Command = Callable[[int], None]
"""Enqueues on the stream given, again and again."""


def compile(sources: Sequence[str], architecture: str, options: Sequence[str] = ()) -> bytes:
    """The cubin of these files of cuda/, as one program, for an architecture ("sm_90"); options go to NVRTC.

    What was compiled before, by any process of this user, comes out of the cache. Where nothing can be kept there, a
    warning says so once.

    Raises:
        TransportError: cuda.bindings or NVRTC is not installed, NVRTC does not know the architecture, or does not
            compile the sources.
    """
    nvrtc, version = _nvrtc()
    texts = {file.name: file.read_bytes() for file in sorted(HERE.glob("*.cuh"))}
    texts.update((source, (HERE / source).read_bytes()) for source in sources)
    arguments = [*OPTIONS, f"--gpu-architecture={architecture}", *options]
    key = hashlib.sha256(repr((list(sources), sorted(texts.items()), arguments, version)).encode()).hexdigest()
    try:
        file: Path | None = _directory() / f"{'-'.join(Path(source).stem for source in sources)}-{architecture}-{key}"
    except RuntimeError:  # there is no home directory
        file = None
    image = _kept(file, key) if file else None
    if image is None:
        image = _compile(nvrtc, version, sources, texts, arguments, architecture)
        if file is None or not _keep(file, key, image):
            _warn_not_kept()
    return image


# ---- NVRTC


def _nvrtc() -> tuple[Any, tuple[int, int]]:
    """NVIDIA's binding, and the version of NVRTC."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise TransportError(
            f"kernels are compiled through NVIDIA's cuda.bindings, which can not be imported ({error}): {NEEDED}"
        ) from None
    try:
        result, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is loaded at the first call
        raise TransportError(
            f"kernels are compiled by NVRTC, which can not be loaded ({str(error).strip()}): {NEEDED}"
        ) from None
    if result != 0:
        raise TransportError(f"nvrtcVersion: {result.name}: install NVRTC anew: {NEEDED}")
    return nvrtc, (major, minor)


def _compile(
    nvrtc: Any,
    version: tuple[int, int],
    sources: Sequence[str],
    texts: dict[str, bytes],
    arguments: list[str],
    architecture: str,
) -> bytes:
    def call(name: str, *values: Any) -> Any:
        result, *rest = getattr(nvrtc, name)(*values)
        if result != 0:
            raise TransportError(f"{name}: {result.name} while compiling {', '.join(sources)}: install NVRTC anew")
        return rest[0] if rest else None

    known = call("nvrtcGetSupportedArchs")
    if architecture not in {f"sm_{number}" for number in known}:
        raise TransportError(
            f"NVRTC {version[0]}.{version[1]} makes no code for {architecture}, but for "
            f"{', '.join(f'sm_{number}' for number in known)}: install one of a CUDA that knows this GPU"
        )
    program = "".join(f'#include "{source}"\n' for source in sources).encode()
    headers, names = list(texts.values()), [name.encode() for name in texts]
    handle = call("nvrtcCreateProgram", program, b"abccl.cu", len(headers), headers, names)
    try:
        encoded = [argument.encode() for argument in arguments]
        (result,) = nvrtc.nvrtcCompileProgram(handle, len(encoded), encoded)
        if result != 0:
            log = bytes(call("nvrtcGetProgramLogSize", handle))
            call("nvrtcGetProgramLog", handle, log)
            raise TransportError(
                f"NVRTC {version[0]}.{version[1]} does not compile {', '.join(sources)} with {' '.join(arguments)} "
                f"({result.name}); please report this:\n{log.rstrip(bytes(1)).decode(errors='replace')}"
            )
        image = bytes(int(call("nvrtcGetCUBINSize", handle)))
        call("nvrtcGetCUBIN", handle, image)
        return image
    finally:
        call("nvrtcDestroyProgram", handle)


# ---- what is kept: the image, then a checksum of it and its key


def _directory() -> Path:
    """Where images are kept: as the environment says, else in the user's cache directory.

    Raises:
        RuntimeError: there is no home directory.
    """
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).absolute() / "kernels"
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "abccl" / "kernels"


def _kept(file: Path, key: str) -> bytes | None:
    """The image in a file, if it is whole and nobody else can have written it."""
    try:
        with contextlib.ExitStack() as stack:
            for place, flags in ((file.parent, os.O_DIRECTORY), (file, os.O_NOFOLLOW | os.O_NONBLOCK)):
                opened = os.open(place, os.O_RDONLY | os.O_CLOEXEC | flags)
                stack.callback(os.close, opened)
                found = os.fstat(opened)
                if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                    return None
            if not stat.S_ISREG(found.st_mode):
                return None
            with open(opened, "rb", closefd=False) as reader:
                data = reader.read()
    except OSError:
        return None
    image, digest = data[:-_DIGEST], data[-_DIGEST:]
    return image if digest == _checksum(key, image) else None


def _keep(file: Path, key: str, image: bytes) -> bool:
    """Put the image into the file: who reads meanwhile finds nothing, or all of it."""
    half = file.with_name(f".{file.name[-16:]}.{secrets.token_hex(8)}")
    try:
        for place in (file.parent.parent, file.parent):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as writer:
                writer.write(image + _checksum(key, image))
            os.replace(half, file)
        except BaseException:
            half.unlink(missing_ok=True)
            raise
    except OSError:
        return False
    return True


def _checksum(key: str, image: bytes) -> bytes:
    return hashlib.sha256(key.encode() + image).digest()


@cache
def _warn_not_kept() -> None:
    warnings.warn(
        f"compiled kernels can not be kept, and every process compiles them anew: set {ENVIRONMENT} to a directory "
        "of your own",
        RuntimeWarning,
        stacklevel=3,
    )


# ---- launches


BLOCK = 256
"""Threads of a block: block_threads of fold.cuh."""

TILE = 16384
"""Bytes that a block does at a time, at most: `unroll` accesses of each thread, and tile_bytes of gather.cu."""

WAVES = 32
"""Blocks for each multiprocessor, at most. More than are at work at once, so that they end about together."""

SOURCES = 480
"""Of one fold: sources_at_most of kernels.cu."""

PIECES = 128
"""Of one launch of gather: pieces_at_most of gather.cu."""


class _Fold(ctypes.Structure):
    _fields_ = [
        ("destination", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("op", ctypes.c_int32),
        ("sources", ctypes.c_int32),
        ("source", ctypes.c_uint64 * SOURCES),
    ]


class _Scale(ctypes.Structure):
    _fields_ = [
        ("destination", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("factor", ctypes.c_double),
    ]


class _Piece(ctypes.Structure):
    _fields_ = [("destination", ctypes.c_uint64), ("source", ctypes.c_uint64), ("nbytes", ctypes.c_uint64)]


class _Gather(ctypes.Structure):
    _fields_ = [
        ("pieces", ctypes.c_uint32),
        ("first", ctypes.c_uint32 * (PIECES + 1)),
        ("piece", _Piece * PIECES),
    ]


_FLOATING, _INTEGER, _COMPLEX = range(4), range(7), range(2)  # the operators, by their numbers

# Of each type: the size of an element and of its parts, which addresses are multiples of, and the operators.
_TYPES = {
    "float16": (2, 2, _FLOATING),
    "bfloat16": (2, 2, _FLOATING),
    "float32": (4, 4, _FLOATING),
    "float64": (8, 8, _FLOATING),
    "int8": (1, 1, _INTEGER),
    "int16": (2, 2, _INTEGER),
    "int32": (4, 4, _INTEGER),
    "int64": (8, 8, _INTEGER),
    "uint8": (1, 1, _INTEGER),
    "uint16": (2, 2, _INTEGER),
    "uint32": (4, 4, _INTEGER),
    "uint64": (8, 8, _INTEGER),
    "bool": (1, 1, _INTEGER),
    "complex64": (8, 4, _COMPLEX),
    "complex128": (16, 8, _COMPLEX),
}


class Kernels:
    """What one device computes and copies, in the order of a stream.

    `folding` and `scaling` prepare a launch once, and give what enqueues it: a kernel is compiled and loaded here, not
    when it is enqueued (which may be while a graph is captured). `fold` and `scale` do both.

    Args:
        driver: of the device.
        image: makes cubins, as `compile` does.
    """

    def __init__(self, driver: Any, image: Callable[[Sequence[str], str, Sequence[str]], bytes] = compile) -> None:
        self._driver = driver
        self._image = image
        self._blocks: int = WAVES * driver.multiprocessors
        self._modules: dict[tuple[str, tuple[str, ...]], int] = {}
        self._functions: dict[str, int] = {}

    def fold(self, dtype: str, op: int, destination: int, sources: Sequence[int], count: int, stream: int) -> None:
        """destination = sources[0] op sources[1] op ..., left to right, `count` elements.

        The bits are those of the native core's fold, but that a NaN is only promised to be one. The destination may
        be exactly one of the sources, and else overlaps none. An address is a multiple of the size of an element, of
        a complex one's parts. 16 bytes are moved at a time where all addresses are alike modulo 16.
        """
        self.folding(dtype, op, destination, sources, count)(stream)

    def scale(self, dtype: str, destination: int, source: int, factor: float, count: int, stream: int) -> None:
        """destination = factor * source, `count` elements of a floating or complex type; both may be the same."""
        self.scaling(dtype, destination, source, factor, count)(stream)

    def gather(self, pieces: Sequence[tuple[int, int, int]], stream: int) -> None:
        """Copy pieces: (destination, source, bytes). No destination overlaps a source or another destination."""
        self.gathering(pieces)(stream)

    def tick(self, address: int, stream: int) -> None:
        """Add 1 to the 32-bit word there, after all that the stream did before; the sum is visible system-wide."""
        self._driver.launch(self._function("gather.cu", "tick"), 1, 1, (ctypes.c_uint64(address),), stream)

    def load(self) -> None:
        """Compile and load what every plan wants. The rest is when it is first asked for."""
        for name in ("gather", "tick"):
            self._function("gather.cu", name)

    def folding(self, dtype: str, op: int, destination: int, sources: Sequence[int], count: int) -> Command:
        """What folds: see `fold`.

        Raises:
            ArgumentError: the operator is not defined for the type, there are no or too many sources, or an address is
                not a multiple of what it must be.
        """
        size, _, operators = self._check("fold", dtype, (destination, *sources))
        if op not in operators:
            raise ArgumentError(f"fold: operator {op} is not defined for {dtype}, which has {list(operators)}")
        if not 1 <= len(sources) <= SOURCES:
            raise ArgumentError(
                f"fold: {len(sources)} sources, and wanted are 1 to {SOURCES}: fold in several steps, "
                "by an algorithm of more of them"
            )
        if count == 0:
            return _nothing
        call = _Fold(destination, count, op, len(sources))
        call.source[: len(sources)] = sources
        return self._launch("kernels.cu", "fold", dtype, count * size, call)

    def scaling(self, dtype: str, destination: int, source: int, factor: float, count: int) -> Command:
        """What scales: see `scale`.

        Raises:
            ArgumentError: the type is not scaled, or an address is not a multiple of what it must be.
        """
        size, _, operators = self._check("scale", dtype, (destination, source))
        if operators is _INTEGER:
            raise ArgumentError(f"scale: {dtype} is not scaled: convert to a floating or complex type")
        if count == 0:
            return _nothing
        call = _Scale(destination, source, count, factor)
        return self._launch("kernels.cu", "scale", dtype, count * size, call)

    def gathering(self, pieces: Sequence[tuple[int, int, int]]) -> Command:
        """What gathers: see `gather`."""
        pieces = [piece for piece in pieces if piece[2]]
        launches = [self._gathering(pieces[i : i + PIECES]) for i in range(0, len(pieces), PIECES)]
        if len(launches) == 1:
            return launches[0]

        def all_of_them(stream: int) -> None:
            for launch in launches:
                launch(stream)

        return all_of_them

    def _gathering(self, pieces: Sequence[tuple[int, int, int]]) -> Command:
        call = _Gather(len(pieces))
        for i, (destination, source, nbytes) in enumerate(pieces):
            call.piece[i] = _Piece(destination, source, nbytes)
            # Tiles meet where the destination is a multiple of 16.
            call.first[i + 1] = call.first[i] + -(-(nbytes + destination % 16) // TILE)
        return self._launch("gather.cu", "gather", None, call.first[len(pieces)] * TILE, call)

    def _launch(self, source: str, kernel: str, dtype: str | None, nbytes: int, call: ctypes.Structure) -> Command:
        grid = min(self._blocks, -(-nbytes // TILE))
        return partial(self._driver.launch, self._function(source, kernel, dtype), grid, BLOCK, (call,))

    def _function(self, source: str, kernel: str, dtype: str | None = None) -> int:
        """The kernel, compiled and loaded when it is first asked for; those of a type are compiled by themselves."""
        name = f"{kernel}_{dtype}" if dtype else kernel
        if name not in self._functions:
            options = (f"-DABCCL_TYPE={dtype}",) if dtype else ()
            if (source, options) not in self._modules:
                image = self._image([source], self._driver.architecture, options)
                self._modules[source, options] = self._driver.load(image)
            self._functions[name] = self._driver.function(self._modules[source, options], name)
        return self._functions[name]

    def _check(self, what: str, dtype: str, addresses: tuple[int, ...]) -> tuple[int, int, range]:
        if dtype not in _TYPES:
            raise ArgumentError(f"{what}: no element type {dtype!r} is served: convert to one of {', '.join(_TYPES)}")
        for address in addresses:
            if address % _TYPES[dtype][1]:
                raise ArgumentError(
                    f"{what}: a {dtype} at {address:#x}: a device reaches it at multiples of {_TYPES[dtype][1]} only"
                )
        return _TYPES[dtype]


def _nothing(stream: int) -> None:
    """Enqueues nothing."""
