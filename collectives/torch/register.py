"""Makes `init_process_group("abccl")` known to torch: the target of the entry points, called by `import torch`.

Tiny on purpose, and idempotent: torch up to 2.13 calls it at the end of every `import torch`, later ones on first use.
"""

from __future__ import annotations

from typing import Any

NAME = "abccl"


def register() -> None:
    """Tell torch.distributed of the backend. May be called any number of times."""
    import torch.distributed as dist

    if not dist.is_available() or NAME.upper() in dist.Backend._plugins:
        return
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
    # From torch 2.15 on, a flight recorder is attached to every group that is not in this set, and throws on a group
    # that is written in Python.
    self_recording: set[str] = getattr(dist.distributed_c10d, "_FR_SELF_RECORDING_BACKENDS", set())
    self_recording.add(NAME)


def create(options: Any, backend_options: Any = None) -> Any:
    """Make a process group: what torch calls, on every rank of the group, for `init_process_group` and `new_group`."""
    from .process_group import create

    return create(options)
