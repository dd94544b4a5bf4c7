"""A communicator's calls with parts of different sizes: what the dispatcher gets in the place of an operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import Array
from .binding import OWN_SPLITS_SUFFICE, PremulSum, Uneven, check_splits
from .tuner.tuner import AlgorithmLike


class UnevenCalls(ABC):
    """Makes and keeps `Uneven`s: the dispatcher tells them apart by identity."""

    size: int
    _interned: dict[Uneven, Uneven]

    @abstractmethod
    def _check_usable(self) -> None:
        """Refuse a communicator that is closed, or of the parent process."""

    @abstractmethod
    def all_gather(self, out: Array, x: Array, *, algorithm: AlgorithmLike = None) -> Any:
        """The communicator's."""

    def _uneven_exchange(
        self,
        out: Array,
        x: Array,
        out_splits: Sequence[int] | None,
        in_splits: Sequence[int] | None,
        algorithm: AlgorithmLike,
    ) -> Uneven | None:
        if out_splits is None and in_splits is None:
            return None
        self._check_usable()
        sent = check_splits(x, "x", "in_splits", in_splits, self.size)
        received = check_splits(out, "out", "out_splits", out_splits, self.size)
        matrix = None
        if algorithm is not None and algorithm not in OWN_SPLITS_SUFFICE:
            rows = np.empty((self.size, self.size), dtype=np.int64)
            self.all_gather(rows, np.array(sent, dtype=np.int64))
            matrix = tuple(tuple(row) for row in rows.tolist())
        return self._intern(Uneven(sent=sent, received=received, matrix=matrix))

    def _with_counts(self, op: str | PremulSum | None, counts: Sequence[int] | None) -> Any:
        if counts is None:
            return op
        return self._intern(Uneven(op or "sum", counts=tuple(int(count) for count in counts)))

    def _intern(self, uneven: Uneven) -> Uneven:
        """One object for equal values: the dispatcher tells them apart by identity."""
        if len(self._interned) > 1024:
            self._interned.clear()
        return self._interned.setdefault(uneven, uneven)
