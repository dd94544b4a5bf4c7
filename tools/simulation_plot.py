"""What simulations found, as a picture: times, and what became of the bandwidth."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from ..algorithms.simulator import Simulation
from ..algorithms.words import count, in_words
from ..bench.table import bandwidth, microseconds
from ..bench.world import import_or
from .simulation_table import Study

REMEDY = "pip install 'abccl[plot]'"
TICKS = 10
"""More numbers than these are not written below an axis."""


def draw(study: Study, layout: str) -> bytes:
    """The figure, as "png" or "svg": against ranks if there are several, else against sizes, else bars.

    Raises:
        TransportError: matplotlib is not installed.
    """
    figure_of: Any = import_or("matplotlib.figure", REMEDY)
    figure = figure_of.Figure(figsize=(10.5, 4.6), layout="constrained")
    ranks = sorted({one.ranks for one in study.done})
    sizes = sorted({one.nbytes for one in study.done})
    panels = figure.subplots(1, 2, sharey=len(ranks) == len(sizes) == 1)
    if len(ranks) > 1:
        _lines(figure, panels, study, "ranks", ranks, sizes, lambda number: f"{number:,}")
    elif len(sizes) > 1:
        _lines(figure, panels, study, "nbytes", sizes, ranks, in_words)
    else:
        _bars(panels, study)
    of = f" of {in_words(sizes[0])}" if len(sizes) == 1 and sizes[0] else ""
    among = f", {count(ranks[0], 'rank')}" if len(ranks) == 1 else ""
    figure.suptitle(f"{study.collective.value}{of} on {study.topology.name}{among}", fontsize=11)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=layout, dpi=120)
    return drawn.getvalue()


def _lines(
    figure: Any,
    panels: Sequence[Any],
    study: Study,
    along: str,
    places: Sequence[int],
    others: Sequence[int],
    written: Callable[[int], str],
) -> None:
    """A line for each algorithm, along ranks or sizes ("nbytes"), and dashed in another way for each of the others."""
    across = "nbytes" if along == "ranks" else "ranks"
    names = list(dict.fromkeys(one.algorithm.name for one in study.done))
    for number, name in enumerate(names):
        for dashes, other in zip(_DASHES * len(others), others):
            line = [one for one in study.done if (one.algorithm.name, getattr(one, across)) == (name, other)]
            label = f"{name}, {in_words(other)}" if len(others) > 1 else name
            for panel, height in zip(panels, (_time, _busbw)):
                points = [(getattr(one, along), height(one)) for one in line]
                style = {"color": _color(number, len(names)), "linestyle": dashes, "marker": _MARKERS[number % 7]}
                panel.plot(*zip(*points), **style, markersize=4, linewidth=1.4, label=label)
    shown = places if len(places) <= TICKS else places[:: -(-len(places) // TICKS)]
    for panel, title in zip(panels, (_TIME, _BUSBW)):
        panel.set_title(title, fontsize=10)
        panel.set_xscale("log")
        panel.set_xticks(shown, [written(place) for place in shown], rotation=45, ha="right", fontsize=8)
        panel.set_xticks([], minor=True)
        panel.set_xlabel("ranks" if along == "ranks" else "size", fontsize=9)
        panel.tick_params(axis="y", labelsize=8)
        panel.grid(alpha=0.3)
    ticker: Any = import_or("matplotlib.ticker", REMEDY)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panels[0].yaxis.set_minor_locator(ticker.NullLocator())
    panels[1].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)


def _bars(panels: Sequence[Any], study: Study) -> None:
    """A bar for each algorithm, the fastest on top."""
    done = sorted(study.done, key=lambda one: one.seconds)[::-1]
    figure = panels[0].figure
    figure.set_size_inches(10.5, max(2.5, 1.2 + 0.27 * len(done)))
    labels = (lambda one: microseconds(one.seconds), lambda one: bandwidth(_busbw(one)))
    for panel, title, width, label in zip(panels, (_TIME, _BUSBW), (_time, _busbw), labels):
        widths = [width(one) for one in done]
        bars = panel.barh([one.algorithm.name for one in done], widths, color="C0", height=0.7)
        bars[-1].set_color("C2")
        panel.bar_label(bars, list(map(label, done)), fontsize=8, padding=3)
        panel.set_title(title, fontsize=10)
        panel.tick_params(labelsize=8)
        panel.margins(x=0.15)
        panel.grid(alpha=0.3, axis="x")
        panel.set_axisbelow(True)


_TIME, _BUSBW = "time, us", "bus bandwidth, GB/s"
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX"


def _time(one: Simulation) -> float:
    return one.seconds * 1e6


def _busbw(one: Simulation) -> float:
    return one.busbw / 1e9


def _color(number: int, of: int) -> Any:
    """Of so many lines; more than ten take the palette of twenty."""
    return f"C{number}" if of <= 10 else import_or("matplotlib", REMEDY).colormaps["tab20"](number % 20)
