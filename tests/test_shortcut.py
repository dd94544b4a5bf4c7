"""Calls by position skip the interpreter, and mean what the methods mean."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import abccl
from abccl import ArgumentError, Communicator
from abccl.transports.shm import shm_threads

COLLECTIVES = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "barrier",
)


def alone() -> Communicator:
    return Communicator(shm_threads(1)[0])


@pytest.mark.parametrize("name", COLLECTIVES)
def test_positions_mean_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortcut binds what the method would: the binder gets equal arguments from both, however many are given."""
    with alone() as communicator:
        bound: list[tuple[Any, ...]] = []
        bind = communicator._bind

        def record(*arguments: Any) -> Any:
            bound.append(arguments)
            return bind(*arguments)

        monkeypatch.setattr(communicator, "_bind", record)
        method = inspect.getattr_static(Communicator, name).__wrapped__
        values = {"x": np.ones(3, np.float32), "out": np.ones(3, np.float32), "op": "max", "root": 0}
        names = [
            p.name
            for p in list(inspect.signature(method).parameters.values())[1:]
            if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in values
        ]
        required = [n for n in names if n in ("x", "out")]
        for count in range(len(required), len(names) + 1):
            given = [values[n] for n in names[:count]]
            communicator._dispatcher.forget()
            getattr(communicator, name)(*given)
            shortcut = bound.pop()
            communicator._dispatcher.forget()
            inspect.getattr_static(Communicator, name).__wrapped__(communicator, *given)
            assert len(bound) == 1 and all(a is b or a == b for a, b in zip(shortcut, bound.pop(), strict=True))


@pytest.mark.parametrize("name", COLLECTIVES)
def test_the_method_shows(name: str) -> None:
    with alone() as communicator:
        method = getattr(communicator, name)
        assert method.__name__ == name and inspect.getdoc(getattr(Communicator, name))
        assert "algorithm" in inspect.signature(method).parameters


def test_wrong_calls_are_the_interpreter_s() -> None:
    with alone() as communicator:
        anything: Any = communicator
        for call in (
            lambda: anything.all_reduce(),
            lambda: anything.all_reduce(np.ones(1), "sum", None),
            lambda: anything.barrier(1),
            lambda: anything.broadcast(np.ones(1), 0, 0),
            lambda: anything.all_gather(np.ones(1), y=1),
            lambda: Communicator.all_reduce(),  # type: ignore[call-arg]
        ):
            with pytest.raises(TypeError):
                call()
        with pytest.raises(ArgumentError, match="list"):
            communicator.all_reduce([1])
    with pytest.raises(abccl.ClosedError):
        communicator.all_reduce(np.ones(1))


def test_a_subclass_may_override() -> None:
    class Counting(Communicator):
        count = 0

        def all_reduce(self, *arguments: Any, **options: Any) -> Any:
            self.count += 1
            return super().all_reduce(*arguments, **options)

    with Counting(shm_threads(1)[0]) as communicator:
        x = np.ones(2)
        communicator.all_reduce(x)
        communicator.all_reduce(x, op="max")
        assert communicator.count == 2
