"""abccl's errors as torch's callers expect them: each is a RuntimeError, as all errors of torch's own backends are."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch.distributed as dist

from ...errors import AbcclError

_Backend: Any = dist.DistBackendError


@lru_cache(maxsize=None)
def _twin(kind: type[AbcclError]) -> type[AbcclError]:
    return kind if issubclass(kind, _Backend) else type(kind.__name__, (kind, _Backend), {"__module__": kind.__module__})


def torch_error(error: AbcclError) -> AbcclError:
    """The same error, that is a `torch.distributed.DistBackendError` (and so a RuntimeError) too."""
    return _twin(type(error))(*error.args)
