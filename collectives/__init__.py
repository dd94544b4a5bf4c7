"""Communicators: what users call. Loaded when asked for: `import torch` imports this file to find the backend."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .binding import premul_sum
    from .communicator import Communicator, connect, init
    from .launch import spawn
    from .work import Work

__all__ = ["Communicator", "Work", "connect", "init", "premul_sum", "spawn"]

_HOMES = {
    "Communicator": ".communicator",
    "Work": ".work",
    "connect": ".communicator",
    "init": ".communicator",
    "premul_sum": ".binding",
    "spawn": ".launch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    return value
