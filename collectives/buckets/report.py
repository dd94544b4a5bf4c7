"""What the last iterations' communication cost, and what of it was hidden behind backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .layout import Layout
from .sizing import AlphaBeta


@dataclass
class Iteration:
    """One iteration's times, in seconds of one clock.

    Attributes:
        first: when the first gradient was there.
        arrived: how long after that each parameter's was.
        ready: when each bucket was full.
        called: when `finish` was called.
        runs: when each bucket's reduction was taken up and when it ended.
        gathers: the same of the gathers in the forward before, with `partition`.
        finished: when `finish` returned.
        waited: how long forward had waited for parameters before, with `partition`.
    """

    first: float
    arrived: list[float]
    ready: list[float]
    called: float
    runs: list[tuple[float, float]]
    gathers: list[tuple[float, float]]
    finished: float
    waited: float


@dataclass(frozen=True)
class BucketReport:
    """One bucket; seconds from the first gradient, medians over the iterations."""

    nbytes: int
    parameters: int
    ready: float
    started: float
    ended: float


@dataclass(frozen=True)
class Report:
    """Medians over iterations, in seconds.

    Attributes:
        iterations: how many.
        buckets: in the order in which they are sent.
        backward: from the first gradient to the call of `finish`.
        communication: what the reductions would take alone, by the model, added up.
        in_flight: how long they, and gathers, were under way, added up: waiting for other ranks, and for a core,
            included.
        exposed: what training waited for: in `finish`, and with `partition` in forward.
        hidden: the communication less what was exposed, never below 0.
        model: alpha and beta as they were measured for these ranks.
        predicted: what the model says would be exposed: `after` (one all_reduce after backward), `overlapped`
            (these buckets during backward) and `partition` (reduce_scatter during backward, all_gather in forward).
    """

    iterations: int
    buckets: list[BucketReport]
    backward: float
    communication: float
    in_flight: float
    exposed: float
    hidden: float
    model: AlphaBeta
    predicted: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{'bucket':>6} {'KiB':>9} {'gradients':>9} {'full ms':>9} {'sent ms':>9} {'done ms':>9}"]
        for number, bucket in enumerate(self.buckets):
            times = " ".join(f"{t * 1e3:9.3f}" for t in (bucket.ready, bucket.started, bucket.ended))
            lines.append(f"{number:6} {bucket.nbytes / 1024:9.1f} {bucket.parameters:9} {times}")
        share = self.hidden / self.communication if self.communication else 0.0
        lines += [
            f"backward {self.backward * 1e3:.3f} ms; communication {self.communication * 1e3:.3f} ms if it were alone, "
            f"{self.in_flight * 1e3:.3f} ms in flight; hidden {self.hidden * 1e3:.3f} ms ({share:.0%}), exposed "
            f"{self.exposed * 1e3:.3f} ms (medians of {self.iterations} iterations)",
            f"a reduction takes {self.model.alpha * 1e6:.1f} us and {self.model.beta * 1e12:.1f} us/MB"
            + ", on the cores that backward runs on" * self.model.shares,
            "predicted exposed: "
            + ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in self.predicted.items()),
        ]
        return "\n".join(lines)


def summarise(
    iterations: Sequence[Iteration],
    layouts: Sequence[Layout],
    model: AlphaBeta,
    predicted: dict[str, float],
) -> Report:
    """The medians.

    Args:
        iterations: one or more, all with these buckets.
        predicted: see `Report`.
    """
    buckets = [
        BucketReport(
            layout.nbytes,
            len(layout.pieces),
            median(each.ready[k] - each.first for each in iterations),
            median(each.runs[k][0] - each.first for each in iterations),
            median(each.runs[k][1] - each.first for each in iterations),
        )
        for k, layout in enumerate(layouts)
    ]
    communication = sum(model.seconds(layout.nbytes) for layout in layouts)
    exposed = median(each.finished - each.called + each.waited for each in iterations)
    return Report(
        len(iterations),
        buckets,
        median(each.called - each.first for each in iterations),
        communication,
        median(sum(end - start for start, end in each.runs + each.gathers) for each in iterations),
        exposed,
        max(0.0, communication - exposed),
        model,
        predicted,
    )
