"""abccl's errors as torch's callers expect them: each is a RuntimeError, as all errors of torch's own backends are."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.distributed as dist

from ...errors import AbcclError

_Backend: Any = dist.DistBackendError


@cache
def _twin(kind: Any) -> Any:
    if issubclass(kind, _Backend):
        return kind
    return type(kind.__name__, (kind, _Backend), {"__module__": kind.__module__})


def torch_error(error: AbcclError) -> AbcclError:
    """The same error, that is a `torch.distributed.DistBackendError` (and so a RuntimeError) too."""
    kind: Any = type(error)
    twin: AbcclError = _twin(kind)(*error.args)
    return twin
