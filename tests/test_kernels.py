"""The kernels that fold, scale and copy, on the CPU: they have the bits of the native core."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernels_on_cpu import SANITIZED, build, library

from abccl.cuda.compile import PIECES, SOURCES, Kernels, compile
from abccl.errors import ArgumentError, TransportError
from abccl.transports import _native
from abccl.transports.types import TYPES, Op

NAMES = [element.name for element in TYPES]
SCALED = [element.name for element in TYPES if element.kind in "fc"]
NUMBER = {name: number for number, name in enumerate(NAMES)}
SIZE = {element.name: element.itemsize for element in TYPES}
PART = {element.name: element.itemsize // (2 if element.kind == "c" else 1) for element in TYPES}
GUARD = 64

Bytes = npt.NDArray[np.uint8]


class Now:
    """A driver that runs a launch when it is enqueued."""

    architecture, multiprocessors = "sm_90", 1

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, int]] = []

    def load(self, image: bytes) -> int:
        return 1

    def function(self, module: int, name: str) -> str:
        return name

    def launch(self, function: str, grid: int, block: int, arguments: Sequence[Any], stream: int) -> None:
        self.launches.append((function, grid, stream))
        table = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        assert library().run_kernel(function.encode(), grid, block, table) == 0


def no_image(sources: Sequence[str], architecture: str, options: Sequence[str]) -> bytes:
    return b""


@pytest.fixture
def driver() -> Now:
    return Now()


@pytest.fixture
def kernels(driver: Now) -> Kernels:
    return Kernels(driver, no_image)


class Memory:
    """Bytes that begin `past` behind a multiple of 64, with guards around them."""

    def __init__(self, values: Bytes, past: int) -> None:
        self._all = np.full(len(values) + 2 * GUARD + 128, 0xA5, np.uint8)
        start = GUARD - self._all.ctypes.data % 64 + 64 + past
        self.bytes = self._all[start : start + len(values)]
        self.bytes[:] = values
        self.address = int(self._all.ctypes.data) + start
        self._around = [self._all[:start], self._all[start + len(values) :]]

    def is_guarded(self) -> bool:
        return all((guard == 0xA5).all() for guard in self._around)


def values(dtype: str, count: int, source: np.random.Generator) -> Bytes:
    """Random bits, and among floating ones some zeros, infinities and NaNs of both signs and subnormals."""
    drawn = source.integers(0, 256, count * SIZE[dtype], dtype=np.uint8)
    if dtype == "bool":
        return drawn & 1
    words = {"float16": "u2", "bfloat16": "u2", "float32": "u4", "complex64": "u4", "float64": "u8", "complex128": "u8"}
    if dtype not in words:
        return drawn
    mantissa = {"float16": 10, "bfloat16": 7, "float32": 23, "complex64": 23}.get(dtype, 52)
    bits = drawn.view(words[dtype])
    sign = bits.dtype.type(1) << bits.dtype.type(8 * bits.itemsize - 1)
    infinity = sign - (bits.dtype.type(1) << bits.dtype.type(mantissa))
    special = np.array([0, infinity, infinity + 1, sign - 1, 1, (1 << mantissa) - 1, 1 << mantissa], bits.dtype)
    chosen = source.choice(np.concatenate([special, special | sign]), len(bits))
    # Moderate numbers too: of random bits most sums are one of the summands.
    near = (bits & ~infinity) | (infinity // 2 // (1 << mantissa) << mantissa).astype(bits.dtype)
    kind = source.integers(0, 8, len(bits))
    return np.where(kind == 0, chosen, np.where(kind < 4, near, bits)).astype(bits.dtype).view(np.uint8)


def is_nan(dtype: str, data: Bytes) -> npt.NDArray[np.bool_]:
    """Of each part of each element, by its bits."""
    if dtype == "bfloat16":
        return (data.view(np.uint16) & 0x7FFF) > 0x7F80
    if dtype not in SCALED:
        return np.zeros(len(data), bool)
    return np.isnan(data.view({2: np.float16, 4: np.float32, 8: np.float64}[PART[dtype]]))


def same(dtype: str, one: Bytes, other: Bytes) -> bool:
    """Bit for bit, but that of a NaN only this is promised, that it is one."""
    nan = is_nan(dtype, one)
    if not (nan == is_nan(dtype, other)).all():
        return False
    width = len(one) // len(nan) if len(nan) else 1
    return bool(((one == other).reshape(-1, width).all(1) | nan).all())


def places(dtype: str, way: str, buffers: int, source: np.random.Generator) -> list[int]:
    """Where the buffers begin: at multiples of 16, all alike behind one, each elsewhere."""
    steps = 16 // PART[dtype]
    if way == "aligned":
        return [0] * buffers
    if way == "alike":
        return [PART[dtype] * int(source.integers(0, steps))] * buffers
    return [PART[dtype] * int(step) for step in source.integers(0, steps, buffers)]


def check_fold(kernels: Kernels, dtype: str, op: int, count: int, sources: int, way: str, in_place: bool) -> None:
    source = np.random.default_rng((NUMBER[dtype], op, count, sources, len(way)))
    begins = places(dtype, way, sources + 1, source)
    given = [Memory(values(dtype, count, source), begin) for begin in begins[1:]]
    wanted = np.empty(count * SIZE[dtype], np.uint8)
    _native.fold(NUMBER[dtype], op, wanted.ctypes.data, [one.address for one in given], count)
    before = [one.bytes.copy() for one in given]
    result = given[count % sources] if in_place else Memory(np.zeros_like(wanted), begins[0])
    kernels.fold(dtype, op, result.address, [one.address for one in given], count, 0)
    assert same(dtype, result.bytes, wanted), (dtype, op, count, sources, way, in_place)
    assert result.is_guarded()
    assert all((one.bytes == was).all() for one, was in zip(given, before) if one is not result)


@pytest.mark.parametrize("dtype", NAMES)
def test_fold_has_the_bits_of_the_core(kernels: Kernels, dtype: str) -> None:
    """All operators, the sizes around vectors, tiles and waves of them, and all ways to lie in memory."""
    lanes = 16 // SIZE[dtype]
    for op in Op:
        if not _native.op_defined(op, NUMBER[dtype]):
            continue
        for count in {0, 1, 2, 3, lanes - 1, lanes, lanes + 1, 2 * lanes + 1, 255, 257, 1021, 1024 * lanes + 5}:
            for number, way in enumerate(("aligned", "alike", "elsewhere")):
                check_fold(kernels, dtype, op, count, 2 + (count + number) % 3, way, in_place=(count + op) % 2 == 0)


@pytest.mark.parametrize("dtype", NAMES)
def test_fold_of_any_number_of_sources(kernels: Kernels, dtype: str) -> None:
    """Half types are rounded once, whatever the number."""
    for sources in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64, 65, SOURCES):
        for op in (Op.SUM, Op.PROD):
            check_fold(kernels, dtype, op, 37, sources, "alike", in_place=sources % 2 == 0)


def test_fold_of_more_than_all_blocks_take_at_once(kernels: Kernels, driver: Now) -> None:
    for way in ("alike", "elsewhere"):
        check_fold(kernels, "float32", Op.SUM, 300_001, 3, way, in_place=False)
    assert {grid for _, grid, _ in driver.launches} == {32}  # and there are 74 tiles, or 293


@pytest.mark.parametrize("dtype", SCALED)
def test_scale_has_the_bits_of_the_core(kernels: Kernels, dtype: str) -> None:
    source = np.random.default_rng(NUMBER[dtype])
    for count in (0, 1, 7, 8, 9, 1021, 9001):
        for way in ("aligned", "alike", "elsewhere"):
            for factor in (1 / 3, -0.0, 1e300, float("nan")):
                begins = places(dtype, way, 2, source)
                given = Memory(values(dtype, count, source), begins[0])
                wanted = np.empty_like(given.bytes)
                _native.scale(NUMBER[dtype], wanted.ctypes.data, given.address, factor, count)
                result = given if count % 2 else Memory(np.zeros_like(wanted), begins[1])
                kernels.scale(dtype, result.address, given.address, factor, count, 0)
                assert same(dtype, result.bytes, wanted), (dtype, count, way, factor)
                assert given.is_guarded() and result.is_guarded()


@pytest.mark.parametrize("pieces", [0, 1, 2, 3, PIECES - 1, PIECES, PIECES + 1, 3 * PIECES])
def test_gather_copies_all_pieces(kernels: Kernels, driver: Now, pieces: int) -> None:
    source = np.random.default_rng(pieces)
    copies: list[tuple[Memory, Memory]] = []
    for number in range(pieces):
        nbytes = int(source.integers(0, 100_000 if number % 50 == 1 else 100))
        begin = int(source.integers(0, 16))
        given = Memory(source.integers(0, 256, nbytes, dtype=np.uint8), begin)
        copies.append((Memory(np.zeros_like(given.bytes), int(source.choice([begin, begin ^ 4, begin ^ 2, 3]))), given))
    kernels.gather([(to.address, given.address, len(given.bytes)) for to, given in copies], 7)
    assert all((to.bytes == given.bytes).all() and to.is_guarded() for to, given in copies)
    filled = sum(len(given.bytes) > 0 for _, given in copies)
    assert [(name, stream) for name, _, stream in driver.launches] == [("gather", 7)] * -(-filled // PIECES)


def test_tick_counts_and_wraps(kernels: Kernels) -> None:
    words = (ctypes.c_uint32 * 3)(5, 0xFFFFFFFE, 5)
    for wanted in (0xFFFFFFFF, 0, 1):
        kernels.tick(ctypes.addressof(words) + 4, 0)
        assert list(words) == [5, wanted, 5]


def test_a_prepared_launch_is_repeated(kernels: Kernels, driver: Now) -> None:
    """It holds addresses, not values, and owes nothing to what is prepared after it."""
    total, one = np.zeros(5, np.float32), np.ones(5, np.float32)
    addresses = [total.ctypes.data, one.ctypes.data]
    add = kernels.folding("float32", Op.SUM, total.ctypes.data, addresses, 5)
    double = kernels.scaling("float32", total.ctypes.data, total.ctypes.data, 2, 5)
    addresses.reverse()
    for launch, stream in ((add, 1), (double, 2), (add, 3), (double, 4)):
        launch(stream)
    assert total.tolist() == [6] * 5
    assert [stream for _, _, stream in driver.launches] == [1, 2, 3, 4]


def test_nothing_is_launched_for_nothing(kernels: Kernels, driver: Now) -> None:
    kernels.fold("int8", Op.MAX, 0, [0, 0], 0, 0)
    kernels.scale("float64", 0, 0, 2.0, 0, 0)
    kernels.gather([(0, 0, 0)], 0)
    assert not driver.launches


REFUSED: dict[str, tuple[Callable[[Kernels], None], str]] = {
    "type": (lambda k: k.fold("float8", 0, 0, [0], 1, 0), "no element type 'float8'.*float16, bfloat16"),
    "operator": (lambda k: k.fold("complex64", Op.MIN, 0, [0], 1, 0), r"operator 2 .* complex64, which has \[0, 1\]"),
    "no sources": (lambda k: k.fold("int8", 0, 0, [], 1, 0), f"0 sources.* 1 to {SOURCES}"),
    "too many sources": (lambda k: k.fold("int8", 0, 0, [0] * 481, 1, 0), f"481 sources.* 1 to {SOURCES}"),
    "destination": (lambda k: k.fold("float32", 0, 6, [0], 1, 0), "float32 at 0x6.* multiples of 4"),
    "source": (lambda k: k.fold("complex128", 0, 0, [8, 4], 1, 0), "complex128 at 0x4.* multiples of 8"),
    "scaled integers": (lambda k: k.scale("int32", 0, 0, 2.0, 1, 0), "int32 is not scaled"),
    "scaled in between": (lambda k: k.scale("bfloat16", 0, 1, 2.0, 1, 0), "bfloat16 at 0x1.* multiples of 2"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(kernels: Kernels, driver: Now, what: str) -> None:
    call, said = REFUSED[what]
    with pytest.raises(ArgumentError, match=said):
        call(kernels)
    assert not driver.launches


def test_the_types_and_operators_are_those_of_the_core(kernels: Kernels) -> None:
    for dtype in NAMES:
        for op in Op:
            if _native.op_defined(op, NUMBER[dtype]):
                kernels.folding(dtype, op, 0, [0], 1)
            else:
                with pytest.raises(ArgumentError):
                    kernels.folding(dtype, op, 0, [0], 1)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(TransportError, match=r"cuda.bindings, .* pip install 'abccl\[cuda13\]', or 'abccl\[cuda12\]'"):
        compile(["gather.cu"], "sm_90")

    def not_found() -> None:
        raise RuntimeError("no libnvrtc.so")

    bindings = SimpleNamespace(nvrtc=SimpleNamespace(nvrtcVersion=not_found))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    with pytest.raises(TransportError, match=r"NVRTC, .*\(no libnvrtc.so\): pip install 'abccl\[cuda13\]', or"):
        compile(["gather.cu"], "sm_90")


# ---- the C++ program, and what it must find

ONE = ("-O0", "-DABCCL_TYPE=float32")


def run_program(flags: Sequence[str], **patches: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    files = {{"fold": "fold.cuh", "gather": "gather.cu"}[stem]: patch for stem, patch in patches.items()}
    program = build("fold_main.cpp", flags, files)
    return subprocess.run([program], capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_the_sanitizers_find_nothing() -> None:
    """All types on buffers of just the length, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    found = run_program(SANITIZED)
    assert (found.returncode, found.stdout) == (0, "all right\n"), found.stdout + found.stderr[:4000]


MUTANTS: dict[str, dict[str, tuple[str, str]]] = {
    "peels one too few": {"fold": ("(16 - destination % 16) % 16;", "(12 - destination % 16) % 16;")},
    "forgets what is left": {"fold": ("singles = count - vectors * 16 / size;", "singles = head;")},
    "takes all for alike": {"fold": ("differences % 16 == 0", "differences % 4 == 0")},
    "begins with the wrong source": {"fold": ("load(raw, 0);", "load(raw, k - 1);")},
    "leaves a gap between tiles": {"fold": ("begin += blocks * tile", "begin += blocks * tile + 1")},
    "pieces meet elsewhere": {"gather": ("0 : number * tile_bytes - past;", "0 : number * tile_bytes;")},
    "the wrong piece": {"gather": ("call.first[middle] <= tile", "call.first[middle] < tile")},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant: str) -> None:
    assert run_program(ONE, **MUTANTS[mutant]).returncode != 0


def test_the_program_that_catches_mutants_passes_the_original() -> None:
    found = run_program(ONE)
    assert (found.returncode, found.stdout) == (0, "all right\n"), found.stdout + found.stderr
