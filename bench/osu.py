"""The layout of the OSU micro-benchmarks: of `osu_allreduce -f` and its like, of osu_latency, osu_bw and osu_bibw.

A table for each library and algorithm, since those measure one at a time. Sizes are theirs: what a rank gives to
each other for all_gather, all_to_all, gather and scatter, where nccl-tests count the largest buffer. Times are over
ranks: the mean, the least and the largest of their medians, where those take each rank's average.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from ..algorithms import Collective
from ..transports.types import element_type
from .messages import AnyCase, Exchange, Pattern
from .run import Measured, Report

FIELD = 18

TITLES = {
    Collective.ALL_REDUCE: "Allreduce Latency",
    Collective.REDUCE_SCATTER: "Reduce_scatter Latency",
    Collective.ALL_GATHER: "Allgather Latency",
    Collective.ALL_TO_ALL: "All-to-All Personalized Exchange Latency",
    Collective.BROADCAST: "Broadcast Latency",
    Collective.REDUCE: "Reduce Latency",
    Collective.GATHER: "Gather Latency",
    Collective.SCATTER: "Scatter Latency",
    Collective.BARRIER: "Barrier Latency",
    Pattern.LATENCY: "Latency",
    Pattern.BANDWIDTH: "Bandwidth",
    Pattern.BIDIRECTIONAL: "Bi-Directional Bandwidth",
}
"""What is called so there, before "Test"."""

OF_A_PART = (Collective.ALL_GATHER, Collective.ALL_TO_ALL, Collective.GATHER, Collective.SCATTER)


def tables(report: Report) -> Iterator[str]:
    """The lines, table by table."""
    kinds = dict.fromkeys(_kind(row.case) for row in report.rows)
    for which in range(len(report.rows[0].ours) + len(report.rows[0].rivals) if report.rows else 0):
        for kind in kinds:
            alike = [(row.case, (*row.ours, *row.rivals)[which]) for row in report.rows if _kind(row.case) is kind]
            yield ""
            yield f"# {title(kind, alike[0][1])}"
            if kind is not Collective.BARRIER:
                yield f"# Datatype: {report.options.dtype}."
            yield head(kind)
            for case, measured in alike:
                yield line(case, measured)


def _kind(case: AnyCase) -> Collective | Pattern:
    return case.pattern if isinstance(case, Exchange) else case.collective


def title(kind: Collective | Pattern, measured: Measured) -> str:
    """What stands above a table: "OSU-like Allreduce Latency Test: abccl (direct, ring)"."""
    how = f" ({measured.door}, {measured.algorithm})" if measured.library == "abccl" else ""
    return f"OSU-like {TITLES[kind]} Test: {measured.library}{how}"


def head(kind: Collective | Pattern) -> str:
    """The names of the columns."""
    if isinstance(kind, Pattern):
        name = "Avg Latency(us)" if kind is Pattern.LATENCY else "Bandwidth (MB/s)"
        return f"{'# Size':<10}{name:>{FIELD}}"
    first = "# Avg Latency(us)" if kind is Collective.BARRIER else f"{'# Size':<10}{'Avg Latency(us)':>{FIELD}}"
    return f"{first}{'Min Latency(us)':>{FIELD}}{'Max Latency(us)':>{FIELD}}{'Iterations':>12}"


def line(case: AnyCase, measured: Measured) -> str:
    """A case's line."""
    timing = measured.timing
    if isinstance(case, Exchange):
        latency = case.pattern is Pattern.LATENCY
        value = timing.seconds * 1e6 if latency else case.algbw(timing.seconds) * 1e3
        return f"{case.size:<10}{value:>{FIELD}.2f}"
    times = [seconds * 1e6 for seconds in timing.by_rank]
    mean, least, most = fmean(times), min(times), max(times)
    size = case.count * element_type(case.dtype).itemsize if case.collective in OF_A_PART else case.size
    first = f"{mean:>17.2f}" if case.collective is Collective.BARRIER else f"{size:<10}{mean:>{FIELD}.2f}"
    return f"{first}{least:>{FIELD}.2f}{most:>{FIELD}.2f}{timing.calls:>12}"
