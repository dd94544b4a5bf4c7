"""The repository's root is the package: `abccl.x.y` is `x/y.py`. Metadata and tool settings are in pyproject.toml."""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = [
    "algorithms",
    "algorithms.simulator",
    "bench",
    "collectives",
    "collectives.buckets",
    "collectives.torch",
    "collectives.tuner",
    "cuda",  # without an __init__.py: see cuda/README.md
    "tools",
    "transports",
]

DATA = ["*.json", "*.toml", "topologies/*.toml", "*.cu", "*.cuh", "*.pyi"]

# A package whose folder is the root would take these modules along.
NOT_IN_THE_WHEEL = {"setup", "conftest"}

# Modules in C++, with the folders of their sources.
NATIVE = {
    "abccl.transports._native": "transports/native",
    "abccl.algorithms.simulator._events": "algorithms/simulator/native",
}


def headers(folder: str) -> list[str]:
    """What the sources of a folder include."""
    return sorted(glob(f"{folder}/*.hpp") + glob(f"{folder}/*.inc"))


class BuildPy(build_py):
    """Copies the package, without what only the checkout needs."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if package != "abccl" or module[1] not in NOT_IN_THE_WHEEL]


def extensions() -> list[Pybind11Extension]:
    """The native parts; none with ABCCL_SKIP_NATIVE=1, for those who only want the Python files."""
    if os.environ.get("ABCCL_SKIP_NATIVE") == "1":
        return []
    return [extension(module, folder) for module, folder in NATIVE.items()]


def extension(module: str, folder: str) -> Pybind11Extension:
    """A module in C++, of all sources in a folder."""
    # Compilers contract a * b + c where the machine can, so the last bit would depend on the machine: not here. One
    # binary serves every machine (no -march=native); faster instruction sets are picked at load. pybind11 adds
    # -fvisibility=hidden.
    return Pybind11Extension(
        module,
        sorted(glob(f"{folder}/*.cpp")),
        depends=headers(folder),
        include_dirs=[folder],
        cxx_std=17,
        extra_compile_args=["-O3", "-falign-loops=64", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"],
        extra_link_args=["-pthread"],
    )


def outdated(obj: str, source: str) -> bool:
    """Whether an object file is older than its source, any header beside it, or the flags above."""
    needed = (source, *headers(os.path.dirname(source)), "setup.py")
    return any(os.path.getmtime(path) >= os.path.getmtime(obj) for path in needed)


def main() -> None:
    rooms = [room for room in ROOMS if Path(*room.split(".")).is_dir()]
    readme = Path("README.md")
    with ParallelCompile("ABCCL_BUILD_JOBS", needs_recompile=outdated):
        setup(
            package_dir={"abccl": "."},
            packages=["abccl", *(f"abccl.{room}" for room in rooms)],
            # Not "*.toml" for the root: it would pack pyproject.toml.
            package_data={
                "abccl": ["py.typed"],
                **{f"abccl.{room}": DATA for room in rooms},
            },
            include_package_data=False,  # MANIFEST.in is for source archives; package_data alone says what is packed
            ext_modules=extensions(),
            cmdclass={"build_py": BuildPy},
            long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
            long_description_content_type="text/markdown",
        )


if __name__ == "__main__":
    main()
