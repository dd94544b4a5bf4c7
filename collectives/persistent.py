"""Persistent collectives, as MPI 4's: arguments checked and the plan bound once, then run as often as wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..algorithms import Collective
from ..errors import ArgumentError
from .arrays import Array
from .binding import PremulSum, Uneven
from .tuner.tuner import AlgorithmLike
from .work import Work


class Persistent(Protocol):
    """A collective on fixed arrays. Call it, or start it and wait for it; all ranks make the same calls.

    The arrays keep their places: they may be written to, not resized. The library keeps them alive.
    """

    def __call__(self) -> None:
        """Run it. Raises what the plain call does."""

    def start(self) -> None:
        """Start it; the library goes on with it in the background. It must have ended before it starts again."""

    def wait(self, timeout: float | None = None) -> None:
        """Wait until what was started is finished; raises what it failed with, DeadlineExceeded after `timeout` s."""

    def is_completed(self) -> bool:
        """Whether what was started is finished, well or not."""


class PersistentCalls(ABC):
    """The calls of a communicator that make persistent collectives: their arguments are the plain calls'."""

    @abstractmethod
    def _persistent(
        self, collective: Collective, x: Array, out: Array, op: Any, root: int, algorithm: AlgorithmLike
    ) -> Persistent:
        """Check the arguments and bind the plan."""

    @abstractmethod
    def _with_counts(self, op: str | PremulSum | None, counts: Sequence[int] | None) -> Any:
        """The operator, with the parts' sizes if given."""

    @abstractmethod
    def _uneven_exchange(
        self,
        out: Array,
        x: Array,
        out_splits: Sequence[int] | None,
        in_splits: Sequence[int] | None,
        algorithm: AlgorithmLike,
    ) -> Uneven | None:
        """The parts' sizes of an all_to_all, None if they are equal."""

    def all_reduce_init(
        self, x: Array, op: str | PremulSum = "sum", *, out: Array = None, algorithm: AlgorithmLike = None
    ) -> Persistent:
        """A persistent `all_reduce`."""
        return self._persistent(Collective.ALL_REDUCE, x, x if out is None else out, op, 0, algorithm)

    def reduce_scatter_init(
        self,
        out: Array,
        x: Array,
        op: str | PremulSum = "sum",
        *,
        counts: Sequence[int] | None = None,
        algorithm: AlgorithmLike = None,
    ) -> Persistent:
        """A persistent `reduce_scatter`."""
        return self._persistent(Collective.REDUCE_SCATTER, x, out, self._with_counts(op, counts), 0, algorithm)

    def all_gather_init(
        self, out: Array, x: Array, *, counts: Sequence[int] | None = None, algorithm: AlgorithmLike = None
    ) -> Persistent:
        """A persistent `all_gather`."""
        return self._persistent(Collective.ALL_GATHER, x, out, self._with_counts(None, counts), 0, algorithm)

    def broadcast_init(self, x: Array, root: int = 0, *, algorithm: AlgorithmLike = None) -> Persistent:
        """A persistent `broadcast`."""
        return self._persistent(Collective.BROADCAST, x, x, None, root, algorithm)

    def reduce_init(
        self,
        x: Array,
        op: str | PremulSum = "sum",
        root: int = 0,
        *,
        out: Array = None,
        algorithm: AlgorithmLike = None,
    ) -> Persistent:
        """A persistent `reduce`."""
        return self._persistent(Collective.REDUCE, x, x if out is None else out, op, root, algorithm)

    def gather_init(self, out: Array | None, x: Array, root: int = 0, *, algorithm: AlgorithmLike = None) -> Persistent:
        """A persistent `gather`."""
        return self._persistent(Collective.GATHER, x, out, None, root, algorithm)

    def scatter_init(
        self, out: Array, x: Array | None, root: int = 0, *, algorithm: AlgorithmLike = None
    ) -> Persistent:
        """A persistent `scatter`."""
        return self._persistent(Collective.SCATTER, x, out, None, root, algorithm)

    def all_to_all_init(
        self,
        out: Array,
        x: Array,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
        *,
        algorithm: AlgorithmLike = None,
    ) -> Persistent:
        """A persistent `all_to_all`."""
        uneven = self._uneven_exchange(out, x, out_splits, in_splits, algorithm)
        return self._persistent(Collective.ALL_TO_ALL, x, out, uneven, 0, algorithm)

    def barrier_init(self, *, algorithm: AlgorithmLike = None) -> Persistent:
        """A persistent `barrier`."""
        return self._persistent(Collective.BARRIER, None, None, None, 0, algorithm)


class PersistentExecution:
    """A persistent collective over a transport that is not native.

    Args:
        execute: runs the plan; with `True` it returns a Work at once.
        text: the call in words.
    """

    def __init__(self, execute: Callable[[bool], Work | None], text: str) -> None:
        self._execute, self._text = execute, text
        self._work: Work | None = None

    def __call__(self) -> None:
        """See `Persistent`."""
        self._check_idle()
        self._execute(False)

    def start(self) -> None:
        """See `Persistent`."""
        self._check_idle()
        self._work = self._execute(True)

    def wait(self, timeout: float | None = None) -> None:
        """See `Persistent`."""
        self._started().wait(timeout)
        self._work = None

    def is_completed(self) -> bool:
        """See `Persistent`."""
        return self._started().is_completed()

    def _started(self) -> Work:
        if self._work is None:
            raise ArgumentError(f"{self._text} has not been started: call start() first")
        return self._work

    def _check_idle(self) -> None:
        if self._work is not None and not self._work.is_completed():
            raise ArgumentError(f"{self._text} is under way: wait() for it before it starts again")
