"""How large buckets should be: the alpha-beta model of one reduction, laid over a backward that was measured.

Small buckets start early and cost alpha each; a large last one has nothing left to hide behind. `exposed` is what
remains: the time from the end of backward to the end of the last reduction.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch

from ..communicator import Communicator
from .averages import Averages
from .layout import Layout

SMALLEST = 64 << 10
"""Bytes of the smallest buckets that are considered."""

_LARGEST_SAMPLE = 8 << 20
# A plan of long messages tries its ways of moving them in its first runs: they do not count.
_WARM_UP, _SAMPLES = 16, 9


@dataclass(frozen=True)
class AlphaBeta:
    """One reduction takes `alpha + bytes * beta` seconds.

    Attributes:
        launch: the seconds for which its start holds backward up.
        shares: whether it runs on backward's cores, and holds backward up as long as it takes: there are not enough
            for the ranks' threads and one more for each rank.
    """

    alpha: float
    beta: float
    launch: float = 0.0
    shares: bool = False

    def seconds(self, nbytes: float) -> float:
        """Of one reduction of a bucket of so many bytes."""
        return self.alpha + nbytes * self.beta

    def half(self) -> AlphaBeta:
        """A reduce_scatter, or an all_gather, of which an all_reduce takes two."""
        return replace(self, alpha=self.alpha / 2, beta=self.beta / 2)


def fit(nbytes: Sequence[float], seconds: Sequence[float], launch: float = 0.0) -> AlphaBeta:
    """The alpha and beta, neither negative, with the least squared relative error."""
    n, t = np.asarray(nbytes, float), np.asarray(seconds, float)
    candidates = [np.linalg.lstsq(np.stack([1 / t, n / t], 1), np.ones_like(t), rcond=None)[0]]
    if min(candidates[0]) < 0:
        candidates = [np.array([0.0, (n / t).sum() / (n / t * (n / t)).sum()]), np.array([len(t) / (1 / t).sum(), 0.0])]
    alpha, beta = min(candidates, key=lambda c: float((((c[0] + c[1] * n) / t - 1) ** 2).sum()))
    return AlphaBeta(float(alpha), float(beta), launch)


def exposed(layouts: Sequence[Layout], ready: Sequence[float], model: AlphaBeta) -> float:
    """Seconds from the end of backward, had it been left alone, to the end of the last reduction.

    Args:
        layouts: the buckets, in the order in which they are sent, one after the other.
        ready: when each parameter's gradient is there, by the parameter's number.
    """
    end = delay = sent = 0.0
    for layout in layouts:
        # A bucket does not overtake another, and those before it have held backward up.
        sent = max(sent, max(ready[piece.parameter] for piece in layout.pieces) + delay)
        seconds = model.seconds(layout.nbytes)
        delay += model.launch + seconds * model.shares
        end = max(end, sent + model.launch) + seconds
    last = max(ready, default=0.0)
    return max(end, last + delay) - last


def best_bytes(lay_out: Callable[[int], list[Layout]], total: int, ready: Sequence[float], model: AlphaBeta) -> int:
    """The bucket size, a power of two, that leaves the least exposed; of equally good ones the largest.

    Args:
        lay_out: the buckets of a size.
        total: the bytes of all gradients.
    """
    doubled = (SMALLEST << k for k in itertools.count(1))
    sizes = [SMALLEST, *itertools.takewhile(lambda size: size < 2 * total, doubled)]
    return min(reversed(sizes), key=lambda size: exposed(lay_out(size), ready, model))


def measure(averages: Averages, total: int, dtype: torch.dtype) -> AlphaBeta:
    """Measure all_reduces of up to `total` bytes; collective, and the same on all ranks. Tens of milliseconds."""
    largest = min(max(total, SMALLEST), _LARGEST_SAMPLE)
    nbytes, seconds, launches = [], [], []
    for size in sorted({SMALLEST // 16, SMALLEST, max(SMALLEST, largest // 8), largest}):
        count = -(-size // dtype.itemsize // averages.multiple) * averages.multiple
        flat = averages.comm.empty(count, dtype).zero_()
        average = averages.make(count, dtype)
        times = []
        for _ in range(_WARM_UP + _SAMPLES):
            averages.comm.barrier()
            begin = time.monotonic()
            pending = average.all_reduce(flat)
            launched = time.monotonic()
            pending.wait()
            times.append((time.monotonic() - begin, launched - begin))
        nbytes.append(count * dtype.itemsize)
        seconds.append(median(whole for whole, _ in times[_WARM_UP:]))
        launches.append(median(launch for _, launch in times[_WARM_UP:]))
    model = fit(nbytes, seconds, min(launches))
    agreed = np.array([model.alpha, model.beta, model.launch])
    averages.comm.broadcast(agreed)
    alpha, beta, launch = agreed.tolist()
    return AlphaBeta(alpha, beta, launch, _cores(averages.comm) < averages.comm.size)


def _cores(comm: Communicator) -> int:
    """The cores that the ranks of this host have together, less those that their threads keep busy. Collective."""
    mine = np.zeros((os.cpu_count() or 1) + 1, dtype=np.int64)
    mine[[*os.sched_getaffinity(0)]] = 1
    mine[-1] = torch.get_num_threads()
    comm.all_reduce(mine)
    return int((mine[:-1] > 0).sum() - mine[-1])
