"""What is shown and kept of a run: the table, the figures, the JSON, the part of docs/gpu.md."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu.checks import PASS, Result
from rich.console import Console
from rich.table import Table
from rich.text import Text

PART = "test-gpu"
COLUMNS = ("check", "result", "seconds", "what it showed")
_TOLD = {"torch", "numpy", "ml_dtypes", "mpi4py", "cuda-bindings"}
_FAMILIES = ("cupy-", "nvidia-nccl-", "nvidia-cuda-nvrtc")


def versions() -> dict[str, str]:
    """Of Python, and of the packages that matter here and are installed."""
    installed = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    told = sorted(name for name in installed if name and (name in _TOLD or name.startswith(_FAMILIES)))
    return {"python": platform.python_version(), **{name: installed[name] for name in told}}


def record(device: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """All that is known of a run, as JSON has it."""
    return {
        "device": device,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "system": platform.platform(),
        "versions": versions(),
        "passed": all(result.good for result in results),
        "checks": [asdict(result) for result in results],
    }


def keep(file: Path, report: dict[str, Any]) -> None:
    """Write the JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def device_line(device: dict[str, Any]) -> str:
    """The device in a line."""
    if device["fake"]:
        return f"FAKE DRIVER, no GPU: {device['name']}, {device['architecture']}. Its figures say nothing about a GPU."
    words = [device["name"], device["architecture"], f"{device['multiprocessors']} multiprocessors"]
    words += [device[key] for key in ("memory",) if key in device]
    words += [f"driver {device['driver']}"] if "driver" in device else []
    several = f" (the first of {device['devices']})" if device["devices"] > 1 else ""
    return ", ".join(words) + several


def _rows(report: dict[str, Any]) -> list[list[str]]:
    return [[c["name"], c["result"], f"{c['seconds']:.1f}", c["showed"]] for c in report["checks"]]


def _figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [figures for check in report["checks"] for figures in check["figures"]]


def show(console: Console, report: dict[str, Any]) -> None:
    """Print the table and the figures: drawn on a terminal, plain elsewhere."""
    _show_table(console, "", COLUMNS, _rows(report))
    for figures in _figures(report):
        _show_table(console, figures["title"], figures["columns"], figures["rows"])
        for note in figures["notes"]:
            console.print(Text(note))


def _show_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console.print()
    if console.is_terminal:
        table = Table(title=title or None, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row), style=None if _fine(row) else "red")
        console.print(table)
        return
    if title:
        console.print(Text(f"{title}\n"))
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        console.print(Text("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()))


def _fine(row: Sequence[str]) -> bool:
    return len(row) < 2 or row[1] not in {"FAIL", "HANG", "CRASH", "MISSING"}


def markdown(report: dict[str, Any]) -> str:
    """The part of docs/gpu.md."""
    passed = sum(check["result"] == PASS for check in report["checks"])
    lines = [
        f"{device_line(report['device'])}; {report['date'][:10]}; {report['system']}.",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
        f"{passed} of {len(report['checks'])} checks passed.",
        "",
        *_markdown_table(COLUMNS, _rows(report)),
    ]
    for figures in _figures(report):
        lines += ["", f"### {figures['title']}", "", *_markdown_table(figures["columns"], figures["rows"])]
        lines += [line for note in figures["notes"] for line in ("", note)]
    return "\n".join(lines)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]
