"""Communicators: what users call. Loaded when asked for: `import torch` imports this file to find the backend."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .binding import premul_sum
    from .communicator import Communicator, connect, init
    from .flight import report
    from .launch import spawn
    from .tuner.choice import Choice
    from .tuner.tuner import Call, register_chooser, unregister_chooser
    from .work import Work

__all__ = [
    "Call",
    "Choice",
    "Communicator",
    "Work",
    "connect",
    "init",
    "premul_sum",
    "register_chooser",
    "report",
    "spawn",
    "unregister_chooser",
]

_HOMES = {
    "Call": ".tuner.tuner",
    "Choice": ".tuner.choice",
    "Communicator": ".communicator",
    "Work": ".work",
    "connect": ".communicator",
    "init": ".communicator",
    "premul_sum": ".binding",
    "register_chooser": ".tuner.tuner",
    "report": ".flight",
    "spawn": ".launch",
    "unregister_chooser": ".tuner.tuner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    return value
