"""The house: imports point down, the root's traps are avoided, files stay short."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from abccl.tools.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent

# What each room may import of abccl. `errors` is a file, and so is `buckets`, the public name of a room's room; the
# others are folders.
MAY_IMPORT = {
    "errors": set(),
    "buckets": {"collectives"},
    "algorithms": {"errors"},
    "cuda": {"errors"},
    "transports": {"errors", "algorithms", "cuda"},
    "collectives": {"errors", "algorithms", "transports"},
    "bench": {"errors", "algorithms", "cuda", "transports", "collectives"},
    "tools": {"errors", "algorithms", "cuda", "transports", "collectives", "bench"},
}

# What a room may import of others, beside the standard library. A room that is not here is free. tomli is the tomllib
# of Python 3.10.
THIRD_PARTIES = {"errors": set(), "algorithms": {"numpy", "tomli"}}

# Files above 500 lines, each with its reason.
LONG_FILES: dict[str, str] = {"tests/test_fake_cuda.py": "one fake driver, and all that it refuses"}
LONGEST = 500

SUFFIXES = {".py", ".pyi", ".cpp", ".hpp", ".inc", ".cu", ".cuh"}
SKIPPED = {"build", "dist", "__pycache__"}

# Modules of NVIDIA's namespace package `cuda`.
NVIDIAS = ["bench", "bindings", "cccl", "compute", "coop", "core", "cuda", "cudart", "nvrtc", "pathfinder", "tile"]


class Import(NamedTuple):
    """One import, as "algorithms.ring" if it is of abccl and "numpy" if not."""

    target: str
    ours: bool
    relative: bool
    line: int


def files(root: Path = ROOT) -> Iterator[Path]:
    """All source files of the repository, none that was built or installed."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith(".") and "egg-info" not in f)
        yield from (Path(folder, name) for name in sorted(names) if Path(name).suffix in SUFFIXES)


def modules() -> dict[str, Path]:
    """The package's modules as "algorithms.ring", and "" for the root's `__init__`."""
    found = [ROOT / f"{name}.py" for name in ("__init__", "errors", "buckets")]
    for room in MAY_IMPORT:
        found += sorted((ROOT / room).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in found
    }


def imports(module: str, path: Path, known: set[str], at_load: bool = False) -> list[Import]:
    """What a module imports; `at_load` leaves out what runs later (functions) or never (TYPE_CHECKING)."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            never = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not (at_load and (later or never)):
                yield child
                yield from walk(child)

    found = []
    package = [part for part in module.split(".") if part]
    if path.name != "__init__.py":
        package.pop()
    for node in walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names):
                ours = name.split(".")[0] == "abccl"
                found.append(Import(name.removeprefix("abccl").lstrip(".") if ours else name, ours, False, node.lineno))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level - 1 <= len(package), f"{path}:{node.lineno} climbs out of the package"
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            elif node.module == "abccl" or (node.module or "").startswith("abccl."):
                base = (node.module or "").split(".")[1:]
            else:
                found.append(Import(node.module or "", False, False, node.lineno))
                continue
            for alias in node.names:  # `from .x import y`: y may be a module or a name in x
                full = ".".join([*base, alias.name])
                target = full if full in known else ".".join(base)
                found.append(Import(target, True, node.level > 0, node.lineno))
    return found


MODULES = modules()
ALL_IMPORTS = {name: imports(name, path, set(MODULES)) for name, path in MODULES.items()}
# The command imports these when they are called for, by name.
ALL_IMPORTS["tools.cli"] += [
    Import(importlib.util.resolve_name(command.split(":")[0], "abccl.tools").removeprefix("abccl."), True, True, 0)
    for command in COMMANDS.values()
]


def where(module: str, imported: Import) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{imported.line} imports {imported.target or 'abccl'}"


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle among the edges, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(edges.get(node, ())):
            if found := visit(following, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := visit(node, []))), [])


def test_imports_point_down() -> None:
    wrong = []
    for module, found in ALL_IMPORTS.items():
        room = module.split(".")[0]
        for imported in found:
            target = imported.target.split(".")[0]
            if imported.ours and module and target != room and target not in MAY_IMPORT[room]:
                allowed = ", ".join(sorted(MAY_IMPORT[room])) or "nothing"
                wrong.append(f"{where(module, imported)}: {room} may import {allowed} of abccl")
    assert not wrong, "\n".join(wrong)


def test_imports_are_relative_inside_and_absolute_in_the_root() -> None:
    wrong = [
        f"{where(module, imported)}: {'relative' if module else 'absolute'} wanted"
        for module, found in ALL_IMPORTS.items()
        for imported in found
        if imported.ours and imported.relative != bool(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_algorithms_rest_on_numpy_only() -> None:
    wrong = []
    for module, found in ALL_IMPORTS.items():
        room = module.split(".")[0]
        for imported in found:
            top = imported.target.split(".")[0]
            if room in THIRD_PARTIES and not imported.ours and top not in sys.stdlib_module_names | THIRD_PARTIES[room]:
                allowed = ", ".join(sorted(THIRD_PARTIES[room])) or "nothing"
                wrong.append(f"{where(module, imported)}: {room} may import {allowed} beside the standard library")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_rooms() -> None:
    edges: dict[str, set[str]] = {}
    for module, found in ALL_IMPORTS.items():
        room = module.split(".")[0]
        if room:
            edges.setdefault(room, set()).update(t for i in found if i.ours and (t := i.target.split(".")[0]) != room)
    assert not circle(edges), " -> ".join(circle(edges))


def test_the_commands_are_modules() -> None:
    assert {i.target for i in ALL_IMPORTS["tools.cli"]} >= {"tools.verify", "bench.__main__"}
    assert {i.target for i in ALL_IMPORTS["tools.cli"] if i.ours} <= MODULES.keys()


def test_no_circle_of_modules() -> None:
    edges = {
        name: {i.target for i in imports(name, path, set(MODULES), at_load=True) if i.ours and i.target != name}
        for name, path in MODULES.items()
        if name
    }
    assert not circle(edges), " -> ".join(circle(edges))


def test_folders_without_init() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists(), "pytest would import the tests as a part of the package"
    assert not (ROOT / "cuda" / "__init__.py").exists(), "it would hide NVIDIA's cuda: see cuda/README.md"


def test_cuda_is_not_shadowed(tmp_path: Path) -> None:
    """From the root, `cuda` is NVIDIA's namespace package still: here a made-up one that has the same modules."""
    (tmp_path / "cuda").mkdir()
    for name in NVIDIAS:
        (tmp_path / "cuda" / f"{name}.py").write_text("nvidias = True\n")
    script = "; ".join(f"import cuda.{name}; assert cuda.{name}.nvidias, '{name}'" for name in NVIDIAS)
    assert_runs_in_root(script, PYTHONPATH=str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_cupy_imports_from_the_root() -> None:
    assert_runs_in_root("import cupy")


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_bytes().splitlines()) for path in files()}
    long = {name: length for name, length in lengths.items() if length > LONGEST}
    unexplained = {name: length for name, length in long.items() if name not in LONG_FILES}
    assert not unexplained, f"above {LONGEST} lines: split them, or give a reason in LONG_FILES: {unexplained}"
    assert LONG_FILES.keys() <= long.keys(), "LONG_FILES lists files that are short, or gone"


def assert_runs_in_root(script: str, **environment: str) -> None:
    """Run a script as `python -m` would in the root: with the root first on the path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
