"""What is kept: the whole report as JSON, its table as CSV, and the means of its ratios."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from .messages import Exchange
from .run import Report, Row, geometric_mean

CAP = 10.0
"""A ratio counts for no more in the capped mean."""


def means(report: Report) -> list[dict[str, Any]]:
    """The geometric means of the ratios, for each rival and each way of abccl; for messages, pattern by pattern."""
    found = []
    for rows in _alike(report.rows):
        for index, name in enumerate(report.options.rivals):
            for which, ours in enumerate(rows[0].ours):
                pairs = [(row.ratio(row.rivals[index], row.ours[which]), row.case.size) for row in rows]
                ratios = [(ratio, size) for ratio, size in pairs if ratio is not None]
                if not ratios:
                    continue
                about = {
                    "library": name,
                    "through": ours.door,
                    "algorithm": ours.algorithm,
                    "one_of_several": len(rows[0].ours) > 1,
                }
                found.append({**about, **_pattern(rows[0]), **_mean(ratios)})
    return found


def among(report: Report) -> list[dict[str, Any]]:
    """The geometric means of each algorithm's time by that of the automatic choice, where both were measured."""
    found = []
    ways = report.rows[0].ours if report.rows else ()
    for index, way in enumerate(ways):
        auto = next((i for i, other in enumerate(ways) if (other.door, other.algorithm) == (way.door, "auto")), index)
        if auto != index:
            ratios = [
                (row.ours[index].timing.seconds / row.ours[auto].timing.seconds, row.case.size) for row in report.rows
            ]
            found.append({"algorithm": way.algorithm, "through": way.door, **_mean(ratios)})
    return found


def _mean(ratios: list[tuple[float, int]]) -> dict[str, float]:
    """Of ratios, each with its size."""
    plain = [ratio for ratio, _ in ratios]
    smallest, size = min(ratios)
    return {
        "geometric_mean": geometric_mean(plain),
        "geometric_mean_capped": geometric_mean(plain, CAP),
        "smallest": smallest,
        "smallest_at": size,
    }


def _alike(rows: list[Row]) -> list[list[Row]]:
    """The rows of each pattern of messages; those of a collective together."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(_pattern(row).get("pattern"), []).append(row)
    return list(found.values())


def _pattern(row: Row) -> dict[str, str]:
    return {"pattern": row.case.pattern.value} if isinstance(row.case, Exchange) else {}


def as_data(report: Report) -> dict[str, Any]:
    """All of it, with every round's time."""
    options = report.options
    return {
        "command": options.command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "collective": options.call,
        "pair": options.pair,
        "ranks": options.ranks,
        "hosts": [{"name": host.name, "ranks": host.ranks} for host in report.hosts],
        "transport": report.transport,
        "started_by": report.started_by,
        "in_place": options.in_place,
        "root": options.root,
        "loop": options.loop,
        "buffers": options.library,
        "persistent": options.persistent,
        "environment": {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
        "machine": report.machine,
        "libraries": report.about,
        "regimes": [asdict(regime) | {"name": regime.name} if regime else None for regime in report.regimes],
        "rows": [_row_as_data(row) for row in report.rows],
        "means": means(report),
        "algorithms": among(report),
        "wrong": report.wrong if options.check else None,
    }


def _row_as_data(row: Row) -> dict[str, Any]:
    case = row.case
    dtype = case.dtype if case.count else None
    shared = {**_pattern(row), "size": case.size, "count": case.count, "type": dtype, "redop": case.op or None}
    figures = []
    for measured in (*row.ours, *row.rivals):
        seconds = measured.timing.seconds
        figures.append(
            {
                "library": measured.library,
                "through": measured.door if measured.library == "abccl" else None,
                "algorithm": measured.algorithm if measured.library == "abccl" else None,
                "ran": measured.ran or None,
                "time_us": seconds * 1e6,
                "algbw": case.algbw(seconds),
                "busbw": case.busbw(seconds),
                "roofline_part": row.part(measured),
                "wrong": measured.wrong,
                "calls": measured.timing.calls,
                "rounds_us": [time * 1e6 for time in measured.timing.rounds],
                "medians_of_ranks_us": [time * 1e6 for time in measured.timing.by_rank],
            }
        )
    ratios = [
        {"library": rival.library, "through": ours.door, "algorithm": ours.algorithm, "ratio": ratio}
        for rival in row.rivals
        for ours in row.ours
        if (ratio := row.ratio(rival, ours)) is not None
    ]
    memory = {"least_bytes": case.least_bytes, "memory_bandwidth": row.memory_bandwidth}
    return {**shared, **memory, "measured": figures, "ratios": ratios}


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write a file as a whole, or, after an error, not at all."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with half.open("w", encoding="utf-8") as file:
            yield file
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file as a whole, or not at all."""
    with replacing(path) as file:
        file.buffer.write(content)


def write_json(report: Report, file: TextIO) -> None:
    """Write everything."""
    file.write(json.dumps(as_data(report), indent=1) + "\n")


def write_csv(report: Report, file: TextIO) -> None:
    """Write a line for each library and size, without the rounds."""
    left_out = {"rounds_us", "medians_of_ranks_us"}
    lines = []
    for row in as_data(report)["rows"]:
        shared = {name: value for name, value in row.items() if name not in ("measured", "ratios")}
        for measured in row["measured"]:
            lines.append({**shared, **{name: value for name, value in measured.items() if name not in left_out}})
    writer = csv.DictWriter(file, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
