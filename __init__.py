"""abccl: a collective communication library with pluggable algorithms.

Communicate: `init`, `spawn`, `Communicator`. Train with torch: `abccl.buckets`, or torch.distributed's backend "abccl".
Write an algorithm: `algorithm`, `send`, `recv`; prove it: `replay`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abccl import buckets as buckets
    from abccl.algorithms import (
        Collective,
        algorithm,
        at_least,
        mirror,
        per_rank,
        power_of_two,
        recv,
        relabel,
        replay,
        send,
    )
    from abccl.collectives import (
        Call,
        Choice,
        Communicator,
        Work,
        init,
        premul_sum,
        register_chooser,
        report,
        spawn,
        unregister_chooser,
    )
    from abccl.errors import (
        AbcclError,
        Aborted,
        ArgumentError,
        ClosedError,
        CollectiveError,
        DeadlineExceeded,
        Mismatch,
        PeerLost,
        RankFailed,
        ScheduleError,
        TransportError,
        UnknownAlgorithm,
    )

__version__ = "0.1.0"

__all__ = [
    "AbcclError",
    "Aborted",
    "ArgumentError",
    "Call",
    "Choice",
    "ClosedError",
    "Collective",
    "CollectiveError",
    "Communicator",
    "DeadlineExceeded",
    "Mismatch",
    "PeerLost",
    "RankFailed",
    "ScheduleError",
    "TransportError",
    "UnknownAlgorithm",
    "Work",
    "__version__",
    "algorithm",
    "at_least",
    "init",
    "mirror",
    "per_rank",
    "power_of_two",
    "premul_sum",
    "recv",
    "register_chooser",
    "relabel",
    "replay",
    "report",
    "send",
    "spawn",
    "unregister_chooser",
]


def __getattr__(name: str) -> Any:
    # `import torch` imports this file, to find the backend: what is heavy is loaded when it is asked for.
    if name == "buckets":
        return importlib.import_module("abccl.buckets")
    if name in __all__:
        for home in ("abccl.errors", "abccl.collectives", "abccl.algorithms"):
            module = importlib.import_module(home)
            if name in module.__all__:
                globals()[name] = value = getattr(module, name)
                return value
    raise AttributeError(f"module 'abccl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "buckets"]
