"""Every kernel compiles for the GPUs of today without a GPU, and to the machine code it is meant to be."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from abccl.cuda import compile as compiling
from abccl.cuda.compile import HERE, Kernels, compile
from abccl.errors import TransportError

ARCHITECTURES = ["sm_80", "sm_90"]
SOURCES = sorted(file.name for file in HERE.glob("*.cu"))
BUILT = HERE.parent / "build" / "cubins"

# The kernels that wait take long to compile: of them, the types that have code of their own. Unsigned integers differ
# from signed ones in how min and max compare, int16 and complex128 from their neighbours in width.
WAITING = ["float16", "bfloat16", "float32", "float64", "int8", "int32", "int64", "bool", "complex64"]
# Of architectures other than the last, the types that are most unlike: in width, in how they are widened, in parts.
FEW = ["bfloat16", "float32", "int64", "complex64"]
# make soak takes all.
WHOLE = float(os.environ.get("ABCCL_TEST_EXAMPLES", "1")) > 1


def _packages() -> list[Path]:
    """The folders of NVIDIA's packages."""
    found = importlib.util.find_spec("nvidia")
    return (
        [folder for place in found.submodule_search_locations or () for folder in Path(place).iterdir()]
        if found
        else []
    )


def _has_nvrtc() -> bool:
    """Whether the packages are there, not whether they work: that they do is tested."""
    try:
        importlib.import_module("cuda.bindings")
    except ImportError:
        return False
    return any(list(folder.glob("lib/libnvrtc.so*")) for folder in _packages())


@cache
def _tool(name: str) -> str:
    """NVIDIA's program of that name, of a package or of a toolkit."""
    installed = [*(str(folder / "bin") for folder in _packages()), "/usr/local/cuda/bin", os.environ.get("PATH", "")]
    found = shutil.which(name, path=os.pathsep.join(installed))
    return found or pytest.skip(f"nvidia-cuda-{name} is not installed")


pytestmark = pytest.mark.skipif(not _has_nvrtc(), reason="cuda-bindings or nvidia-cuda-nvrtc is not installed")


@cache
def _cubins(source: str) -> dict[str, dict[str, Path]]:
    """The cubins of a file, by architecture and type, compiled as `Kernels` has them: one type by itself. What was
    compiled before is under build/."""

    def make(architecture: str, dtype: str) -> Path:
        file = BUILT / f"{source}-{dtype}-{architecture}.cubin"
        file.write_bytes(compile([source], architecture, [f"-DABCCL_TYPE={dtype}"] if dtype else []))
        return file

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(os.cpu_count()) as pool:
        patched.setenv("ABCCL_CACHE_DIR", str(BUILT))
        BUILT.mkdir(parents=True, exist_ok=True)
        making = {
            architecture: {dtype: pool.submit(make, architecture, dtype) for dtype in _types(source, architecture)}
            for architecture in ARCHITECTURES
        }
        return {
            architecture: {dtype: made.result() for dtype, made in files.items()}
            for architecture, files in making.items()
        }


def _types(source: str, architecture: str) -> list[str]:
    """The types that a file is compiled for here; "" if it has none."""
    if "ABCCL_KERNELS(" not in (HERE / source).read_text():
        return [""]
    if architecture != ARCHITECTURES[-1] and not WHOLE:
        return FEW
    return list(compiling._TYPES) if source == "kernels.cu" else WAITING


def _said(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([_tool(tool), *arguments], check=True, capture_output=True, text=True, timeout=300).stdout


def _machine_code(file: Path) -> dict[str, str]:
    """The instructions of each kernel."""
    parts = re.split(r"^\.text\.(\w+):$", _said("nvdisasm", "-c", file), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def _kernels(source: str, dtype: str) -> set[str]:
    """The names of the kernels in a file: those in macros are there for each type."""
    text = (HERE / source).read_text()
    names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)[\s\\]*)?(\w+(?:##name)?)\(", text)
    assert len(names) == text.count("__global__"), f"{source}: {names}"
    return {name.replace("##name", dtype) for name in names}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills(source: str, architecture: str) -> None:
    """None has a stack frame or local memory, which is where registers are spilled to."""
    for dtype, file in _cubins(source)[architecture].items():
        found = dict(re.findall(r"Function (\w+):\s+(.*)", _said("cuobjdump", "-res-usage", file)))
        assert found.keys() == _kernels(source, dtype)
        assert [name for name, used in found.items() if "STACK:0 " not in used or "LOCAL:0 " not in used] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_memory_is_accessed_16_bytes_at_a_time(source: str, architecture: str) -> None:
    files = _cubins(source)[architecture]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(files, pool.map(_machine_code, files.values()), strict=True))
    for dtype, code in found.items():
        assert code.keys() == _kernels(source, dtype)
        for name, instructions in code.items():
            assert not re.search(r"\b(LDL|STL)\b", instructions), f"{name} uses local memory"
            if name != "tick" and not re.match(r"scale_(u?int|bool)", name):  # integers are not scaled
                # The interpreter's accesses are generic: its operands are chosen at run time.
                space = "G?" if name.startswith("interpret_") else "G"
                for access in ("LD", "ST"):
                    assert re.search(rf"\b{access}{space}\.E\.128\b", instructions), (
                        f"{name} has no {access}{space}.E.128"
                    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fold_has_eight_loads_under_way(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loads of two sources, four of each, stand before the first result that is stored."""
    monkeypatch.setenv("ABCCL_CACHE_DIR", str(tmp_path))
    file = tmp_path / "fold.cubin"
    file.write_bytes(compile(["kernels.cu"], architecture, ["-DABCCL_TYPE=float32"]))
    moves = re.findall(r"(LDG|STG)\.E\.128\b", _machine_code(file)["fold_float32"])
    assert "".join(move[0] for move in moves).startswith("L" * 8)
    assert "FFMA" not in _machine_code(file)["fold_float32"]


# ---- the cache


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures that NVRTC was called for; the cache is empty."""
    monkeypatch.setenv("ABCCL_CACHE_DIR", str(tmp_path / "cache"))
    compiling._warn_not_kept.cache_clear()
    calls: list[str] = []
    original = compiling._compile

    def counted(*arguments: Any) -> bytes:
        calls.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(compiling, "_compile", counted)
    return calls


def _kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").iterdir())


def test_the_cache_is_by_all_that_goes_in(compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = compile(["gather.cu"], "sm_80")
    assert image[:4] == b"\x7fELF"
    assert compile(["gather.cu"], "sm_80") == image
    assert compiled == ["sm_80"]
    assert compile(["gather.cu"], "sm_90") != image
    compile(["gather.cu"], "sm_80", ["-DABCCL_TYPE=int8"])
    assert compiled == ["sm_80", "sm_90", "sm_80"]
    for file in HERE.glob("*.cu*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(compiling, "HERE", tmp_path)
    assert compile(["gather.cu"], "sm_80") == image
    with open(tmp_path / "arithmetic.cuh", "a") as header:
        header.write("// changed\n")
    compile(["gather.cu"], "sm_80")
    assert compiled == ["sm_80", "sm_90", "sm_80", "sm_80"]
    nvrtc, version = compiling._nvrtc()
    monkeypatch.setattr(compiling, "_nvrtc", lambda: (nvrtc, (*version, "later")))
    compile(["gather.cu"], "sm_80")
    assert compiled[4:] == ["sm_80"]
    assert len(_kept(tmp_path)) == 5


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)


def _exchange(file: Path) -> None:
    """With a whole image of another architecture."""
    compile(["gather.cu"], "sm_90")
    (other,) = file.parent.glob("*sm_90*")
    file.write_bytes(other.read_bytes())


def _link(file: Path) -> None:
    elsewhere = file.rename(file.with_name("elsewhere"))
    file.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": _cut,
    "flipped": _flip,
    "exchanged": _exchange,
    "writable by others": lambda file: file.chmod(0o666),
    "in a folder that others write to": lambda file: file.parent.chmod(0o777),
    "a link": _link,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_compiled_anew(compiled: list[str], tmp_path: Path, damage: str) -> None:
    image = compile(["gather.cu"], "sm_80")
    (file,) = _kept(tmp_path)
    DAMAGES[damage](file)
    before = len(compiled)
    assert compile(["gather.cu"], "sm_80") == image
    assert compiled[before:] == ["sm_80"]
    file.parent.chmod(0o700)
    assert compile(["gather.cu"], "sm_80") == image
    assert compiled[before:] == ["sm_80"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_where_nothing_can_be_kept_a_warning_says_so_once(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ABCCL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="set ABCCL_CACHE_DIR to a directory of your own"):
        compile(["gather.cu"], "sm_80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(["gather.cu"], "sm_80")
    assert compiled == ["sm_80", "sm_80"]


# ---- errors


def test_an_architecture_that_nvrtc_does_not_know(compiled: list[str]) -> None:
    with pytest.raises(TransportError, match=r"makes no code for sm_12, but for sm_\d+.*: install one of a CUDA that"):
        compile(["gather.cu"], "sm_12")


def test_what_does_not_compile_is_told_with_the_log(compiled: list[str], tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"does not compile gather.cu with .*\n.*error: expected an ident"):
        compile(["gather.cu"], "sm_80", ["-Du64=7"])
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        compile(["nothing.cu"], "sm_80")


# ---- what is loaded


class Loading:
    """A driver that takes images and gives numbers."""

    architecture, multiprocessors = "sm_90", 2

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self.asked: list[str] = []

    def load(self, image: bytes) -> int:
        self.images.append(image)
        return len(self.images)

    def function(self, module: int, name: str) -> int:
        assert name.encode() in self.images[module - 1]
        self.asked.append(name)
        return len(self.asked)

    def launch(self, function: int, grid: int, block: int, arguments: Any, stream: int) -> None:
        pass


def test_a_type_is_compiled_when_it_is_first_used(compiled: list[str]) -> None:
    driver = Loading()
    kernels = Kernels(driver)
    assert not driver.images
    for _ in range(2):
        kernels.fold("float32", 0, 0, [0, 4], 1, 0)
        kernels.scale("float32", 0, 0, 2.0, 1, 0)
        kernels.gather([(0, 16, 16)], 0)
        kernels.tick(0, 0)
    assert driver.asked == ["fold_float32", "scale_float32", "gather", "tick"]
    assert len(driver.images) == 2 and compiled == ["sm_90"] * 2
    Kernels(driver).tick(0, 0)
    assert len(driver.images) == 3 and compiled == ["sm_90"] * 2
