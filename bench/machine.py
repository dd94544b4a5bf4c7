"""What a timing depends on and does not show: the machine, the interpreter, what else runs."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np

from ..algorithms.words import ranges

BUSY = 0.5
"""A load average above which timings are noise."""


def machine() -> dict[str, Any]:
    """The machine, and its load now."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


def cpu() -> str:
    """The processor's name, or at least its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def cores_of_this_rank() -> str:
    """The cores that this process may run on, as in 0-3,8."""
    return ranges(sorted(os.sched_getaffinity(0)), comma=",")
