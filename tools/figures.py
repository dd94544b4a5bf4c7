"""`make figures`: trees and rings on Summit, and what NVIDIA measured, as two pictures and a section of a document."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..bench.document import write_part
from ..bench.world import import_or
from .figures_document import PICTURES, document
from .nccl import NODE, RAILS, RATE
from .simulation_plot import REMEDY
from .terminal import console
from .trees_and_rings import FLAT, MEASURED, MEASURED_NODES, RING, SMALL, TREE, Line, Point, figures, shown

PART = "trees-and-rings"
COLORS = {RING: "C7", TREE: "C2", FLAT: "C0"}
WORKERS = 8
"""Processes at most: each takes up to 0.6 GB."""


def plot(nbytes: int, lines: dict[str, Line]) -> bytes:
    """The figure of a size, as PNG.

    Raises:
        TransportError: matplotlib is not installed.
    """
    figure_of: Any = import_or("matplotlib.figure", REMEDY)
    figure = figure_of.Figure(figsize=(7.6, 5), layout="constrained")
    panel: Any = figure.subplots()
    for name, line in lines.items():
        ranks, central, low, high = shown(nbytes, line)
        panel.fill_between(ranks, low, high, color=COLORS[name], alpha=0.2, linewidth=0)
        panel.plot(ranks, central, "--" if name == FLAT else "-", color=COLORS[name], label=name)
        if name in MEASURED[nbytes]:
            measured = [NODE * nodes for nodes in MEASURED_NODES]
            label = f"{name}, measured by NVIDIA"
            panel.plot(measured, MEASURED[nbytes][name], "o", color=COLORS[name], markersize=4, label=label)
    panel.set_xscale("log", base=2)
    panel.set_xticks(ranks, [f"{number:,}" for number in ranks], rotation=45)
    panel.set_xlabel("GPUs, 6 on a node")
    if nbytes == SMALL:
        panel.set_yscale("log")
        panel.set_ylabel("us")
    else:
        panel.set_ylim(0, RAILS * RATE + 2)
        panel.set_ylabel("bus bandwidth, GB/s")
    panel.minorticks_off()
    panel.set_title(f"all_reduce of {_size(nbytes)} on Summit, simulated; bands: what NCCL's tables span", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    return drawn.getvalue()


def _size(nbytes: int) -> str:
    return f"{nbytes} B" if nbytes == SMALL else f"{nbytes >> 20} MB"


def _seconds(point: Point) -> float:
    return point.seconds


def in_processes(points: Sequence[Point]) -> list[float]:
    """The seconds of points, found side by side; a bar shows how many are."""
    workers = min(WORKERS, len(os.sched_getaffinity(0)))
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*shown, console=console()) as bar,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        task = bar.add_task("simulating", total=len(points))
        futures = [pool.submit(_seconds, point) for point in points]
        for _ in as_completed(futures):
            bar.advance(task)
        return [future.result() for future in futures]


@click.command()
@click.option(
    "--write", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The document with the part."
)
def main(path: Path | None) -> None:
    """Simulate trees and rings on up to 24,576 GPUs; print the section, or write it into a document."""
    import_or("matplotlib", REMEDY)
    found = figures(times=in_processes)
    if not path:
        click.echo(document(found))
        return
    write_part(path, PART, document(found))
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    for nbytes, name in PICTURES.items():
        (folder / name).write_bytes(plot(nbytes, found[nbytes]))


if __name__ == "__main__":
    main()
