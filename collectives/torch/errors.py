"""abccl's errors as torch's callers expect them: each is a RuntimeError, as all errors of torch's own backends are."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.distributed as dist

from ...errors import AbcclError, DeadlineExceeded

_Backend: Any = dist.DistBackendError


@cache
def _twin(kind: Any) -> Any:
    if issubclass(kind, _Backend):
        return kind
    return type(kind.__name__, (kind, _Backend), {"__module__": kind.__module__})


def torch_error(error: AbcclError) -> AbcclError:
    """The same error, that is a `torch.distributed.DistBackendError` (and so a RuntimeError) too."""
    kind: Any = type(error)
    text = str(error)
    if isinstance(error, DeadlineExceeded) and "timeout" not in text:
        text += ": the timeout has passed; give init_process_group a longer timeout if ranks are only slow"
    twin: AbcclError = _twin(kind)(text)
    return twin
