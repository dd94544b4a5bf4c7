"""A hook on a module that its copies do not take along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..torch.dynamo import hide_from_dynamo


class ModuleHook:
    """Calls a function without arguments. A copy of it, or one that was pickled, does nothing."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __call__(self, *_: Any) -> None:
        self._function()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        return ModuleHook(_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleHook, (_nothing,)


hide_from_dynamo([ModuleHook.__call__])


def _nothing() -> None:
    """What the hook of a copy does."""
