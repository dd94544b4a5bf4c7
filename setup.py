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
    "bench",
    "collectives",
    "collectives.buckets",
    "collectives.torch",
    "collectives.tuner",
    "cuda",  # without an __init__.py: see cuda/README.md
    "tools",
    "transports",
]

# A package whose folder is the root would take these modules along.
NOT_IN_THE_WHEEL = {"setup", "conftest"}

HEADERS = sorted(glob("transports/native/*.hpp") + glob("transports/native/*.inc"))


class BuildPy(build_py):
    """Copies the package, without what only the checkout needs."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if package != "abccl" or module[1] not in NOT_IN_THE_WHEEL]


def extensions() -> list[Pybind11Extension]:
    """The native core; none with ABCCL_SKIP_NATIVE=1, for those who only want the Python files."""
    sources = sorted(glob("transports/native/*.cpp"))
    if not sources or os.environ.get("ABCCL_SKIP_NATIVE") == "1":
        return []
    # Compilers contract a * b + c where the machine can, so the last bit would depend on the machine: not here. One
    # binary serves every machine (no -march=native); faster instruction sets are picked at load. pybind11 adds
    # -fvisibility=hidden.
    native = Pybind11Extension(
        "abccl.transports._native",
        sources,
        depends=HEADERS,
        include_dirs=["transports/native"],
        cxx_std=17,
        extra_compile_args=["-O3", "-falign-loops=64", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"],
        extra_link_args=["-pthread"],
    )
    return [native]


def outdated(obj: str, source: str) -> bool:
    """Whether an object file is older than its source, any header, or the flags above."""
    return any(os.path.getmtime(path) >= os.path.getmtime(obj) for path in (source, *HEADERS, "setup.py"))


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
                **{f"abccl.{room}": ["*.json", "*.toml", "*.cu", "*.cuh", "*.pyi"] for room in rooms},
            },
            include_package_data=False,  # MANIFEST.in is for source archives; package_data alone says what is packed
            ext_modules=extensions(),
            cmdclass={"build_py": BuildPy},
            long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
            long_description_content_type="text/markdown",
        )


if __name__ == "__main__":
    main()
