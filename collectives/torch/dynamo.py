"""Functions that torch.compile must call, not trace into: they end in native code that it can not see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def hide_from_dynamo(functions: Iterable[Callable[..., Any]]) -> None:
    """Have torch.compile leave these functions, and what they call, alone.

    By torch's inner means: `torch.compiler.disable` imports the whole compiler.
    """
    try:
        from torch._C._dynamo import eval_frame
    except ImportError:
        return
    skip = eval_frame._FrameAction.SKIP
    strategy = eval_frame._FrameExecStrategy(skip, skip)
    for function in functions:
        if hasattr(function, "__code__"):
            eval_frame.set_code_exec_strategy(function.__code__, strategy)
