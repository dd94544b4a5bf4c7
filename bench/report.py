"""docs/performance.md: the claims held against the figures, the tables as printed, a plot for each collective."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..algorithms.words import in_words
from .record import CAP, replace_file
from .run import geometric_mean
from .runs import LIBRARIES, MOVERS, RUNS, Outcome, Run
from .world import import_or

NOTES = Path("docs", "performance", "notes.md")


@dataclass(frozen=True)
class Claim:
    """What abccl wants to reach.

    Attributes:
        what: is measured.
        against: whom; of several libraries the fastest counts, at each size.
        runs: the names of the runs.
        mean: the least geometric mean of the ratios, each capped: on far cores, on near ones.
        smallest: the least ratio.
    """

    what: str
    against: str
    runs: tuple[str, ...]
    mean: tuple[float, float]
    smallest: float


def _against_both(collective: str, ranks: int, mean: float, smallest: float) -> Claim:
    runs = tuple(Run(collective, ranks, library).name for library in ("openmpi", "mpich"))
    return Claim(f"{collective}, {ranks} ranks", "the better of Open MPI and MPICH", runs, (mean, mean), smallest)


def _against(library: str, collective: str, ranks: int, mean: tuple[float, float], smallest: float) -> Claim:
    run = Run(collective, ranks, library)
    return Claim(run.title.rpartition(", against")[0], LIBRARIES[library].title, (run.name,), mean, smallest)


CLAIMS = (
    _against("openmpi", "all_reduce", 2, (3.0, 2.0), 1.0),
    _against("mpich", "all_reduce", 2, (3.0, 2.0), 1.0),
    _against_both("reduce_scatter", 2, 3.0, 1.0),
    *(_against_both(collective, 2, 1.5, 0.9) for collective in ("all_gather", "broadcast", "all_to_all")),
    _against_both("all_reduce", 4, 2.0, 1.0),
    *(_against("gloo", "all_reduce", ranks, (8.0, 8.0), 3.0) for ranks in (2, 4)),
    *(_against("gloo", collective, 2, (8.0, 8.0), 2.0) for collective in MOVERS),
    _against("impi", "all_reduce", 2, (1.5, 1.5), 1.0),
)


@dataclass(frozen=True)
class Verdict:
    """A claim held against the figures; `problem` says why it can not be."""

    claim: Claim
    regimes: str = ""
    mean: float = 0.0
    wanted: float = 0.0
    smallest: float = 0.0
    smallest_at: int = 0
    problem: str = ""

    @property
    def holds(self) -> bool:
        """Whether both of its numbers are reached."""
        return not self.problem and self.mean >= self.wanted and self.smallest >= self.claim.smallest


def judge(claim: Claim, outcomes: Mapping[str, Outcome]) -> Verdict:
    """Hold a claim against the figures of its runs."""
    missing = [name for name in claim.runs if name not in outcomes]
    failed = [name for name in claim.runs if name in outcomes and (outcomes[name].error or not outcomes[name].data)]
    if missing or failed:
        words = [f"{name} was not run" for name in missing] + [f"{name} failed" for name in failed]
        return Verdict(claim, problem="; ".join(words))
    found = [outcomes[name] for name in claim.runs]
    by_size: dict[int, float] = {}
    for outcome in found:
        for size, ratio in ratios(outcome):
            by_size[size] = min(ratio, by_size.get(size, ratio))
    regimes = {name for outcome in found for name in regimes_of(outcome)}
    # Cores that were near for a part of the time are not held to what is wanted of far ones.
    wanted = claim.mean[0 if regimes == {"far"} else 1]
    smallest, at = min((ratio, size) for size, ratio in by_size.items())
    mean = geometric_mean(list(by_size.values()), CAP)
    return Verdict(claim, " and ".join(sorted(regimes)), mean, wanted, smallest, at)


def ratios(outcome: Outcome) -> list[tuple[int, float]]:
    """The sizes, and the library's time by abccl's."""
    assert outcome.data is not None
    return [(row["size"], row["ratios"][0]["ratio"]) for row in outcome.data["rows"]]


def regimes_of(outcome: Outcome) -> list[str]:
    """The cache regimes at its start and its end, where they are known."""
    assert outcome.data is not None
    return [regime["name"] for regime in outcome.data["regimes"] if regime]


def summary(outcome: Outcome) -> str:
    """The line of a run that went well."""
    found = ratios(outcome)
    smallest, at = min((ratio, size) for size, ratio in found)
    mean = geometric_mean([ratio for _, ratio in found], CAP)
    regimes = " to ".join(regimes_of(outcome))
    return f"{regimes}: mean {mean:.2f} (capped at {CAP:g}), smallest {smallest:.2f} at {in_words(at)}"


# ---- the document


def check() -> None:
    """Find out before the measurement whether the plots can be drawn.

    Raises:
        TransportError: they can not.
    """
    import_or("matplotlib", "pip install 'abccl[plot]'")


def write(outcomes: Mapping[str, Outcome], root: Path) -> None:
    """Write the plots and the document; each file is replaced as a whole."""
    folder = root / "docs" / "performance"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for collective in dict.fromkeys(run.collective for run in RUNS):
        if picture := plot(collective, outcomes):
            replace_file(folder / f"{collective}.png", picture)
            drawn.append(collective)
    notes = (root / NOTES).read_text(encoding="utf-8") if (root / NOTES).exists() else ""
    replace_file(root / "docs" / "performance.md", render(outcomes, drawn, notes).encode())


def render(outcomes: Mapping[str, Outcome], drawn: list[str], notes: str) -> str:
    """The document."""
    parts = [_HEAD, "## Checklist", _checklist(outcomes), "## Machine", _machine(outcomes)]
    for collective in dict.fromkeys(run.collective for run in RUNS):
        parts.append(f"## {collective}")
        if collective in drawn:
            parts.append(f"![{collective}: bandwidth by size](performance/{collective}.png)")
        parts += [_section(run, outcomes.get(run.name)) for run in RUNS if run.collective == collective]
    return "\n\n".join([*parts, notes.strip()]).rstrip() + "\n"


_HEAD = """\
# Performance

Written by `make performance`, which runs the commands below; `make performance ONLY=mpich` repeats those whose names
contain a word. Do not edit this file: prose goes into `performance/notes.md`, which is its end.

A ratio is the library's time by abccl's, measured in the same processes, taking turns; medians over rounds of the
slowest rank. A mean is the geometric mean over the sizes 4 B to 64 MiB by factors of 4, with each ratio capped at 10.
"Near" and "far" say how fast the two cores hand over what they have written (`python -m abccl.bench --help`).
"roofline" is the part that abccl reaches of the memory bandwidth of `a += b`, counting the fewest bytes that the
collective must move."""


def _checklist(outcomes: Mapping[str, Outcome]) -> str:
    lines = [
        "| float32, sum | against | cores | mean | wanted | smallest | wanted | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for verdict in (judge(claim, outcomes) for claim in CLAIMS):
        claim = verdict.claim
        if verdict.problem:
            lines.append(f"| {claim.what} | {claim.against} | | | | | | **{verdict.problem}** |")
            continue
        lines.append(
            f"| {claim.what} | {claim.against} | {verdict.regimes} | {verdict.mean:.2f} | {verdict.wanted:.1f} "
            f"| {verdict.smallest:.2f} at {in_words(verdict.smallest_at)} | {claim.smallest:.1f} "
            f"| {'pass' if verdict.holds else '**not reached**'} |"
        )
    return "\n".join(lines)


def _machine(outcomes: Mapping[str, Outcome]) -> str:
    measured = [outcome for outcome in outcomes.values() if outcome.data]
    if not measured:
        return "Nothing was measured."
    machine: dict[str, Any] = max(measured, key=lambda outcome: outcome.date).data["machine"]  # type: ignore[index]
    counts = {name: sum(name in regimes_of(outcome) for outcome in measured) for name in ("near", "far")}
    began = sorted(outcome.date for outcome in measured)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; Python {machine['python']}, "
        f"numpy {machine['numpy']}.\n"
        f"At the start or the end, the cores were near in {counts['near']} of {len(measured)} runs, and far in "
        f"{counts['far']}.\n"
        f"The runs began between {began[0]} and {began[-1]}, with OMP_NUM_THREADS=1.\n"
        f"As root, Open MPI needs OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 as well."
    )


def _section(run: Run, outcome: Outcome | None) -> str:
    heading = f"### {run.title}"
    if outcome is None:
        return f"{heading}\n\nNot run yet: `make performance ONLY={run.name}`"
    lines = [heading, "", f"`{outcome.command}`, {outcome.date}"]
    if outcome.error:
        lines += ["", f"**Failed: {outcome.error}.**"]
    if outcome.output.strip():
        lines += ["", "```", outcome.output.strip("\n"), "```"]
    return "\n".join(lines)


def plot(collective: str, outcomes: Mapping[str, Outcome]) -> bytes:
    """The figure of a collective, as PNG: for each run a panel; nothing if no run has figures."""
    runs = [run for run in RUNS if run.collective == collective]
    shown = [(run, outcomes[run.name].data) for run in runs if run.name in outcomes and outcomes[run.name].data]
    if not shown:
        return b""
    figure_of: Any = import_or("matplotlib.figure", "pip install 'abccl[plot]'")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = figure_of.Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (run, data) in zip(panels, shown):
        _draw(panel, run, data["rows"])  # type: ignore[index]
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    figure.supxlabel("bytes of the largest buffer")
    figure.supylabel("GB/s, of the bytes that must be moved")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    return drawn.getvalue()


def _draw(panel: Any, run: Run, rows: list[dict[str, Any]]) -> None:
    sizes = [row["size"] for row in rows]
    for index, (name, style) in enumerate((("abccl", "C0o-"), (LIBRARIES[run.library].title, "C1s-"))):
        speeds = [row["least_bytes"] / row["measured"][index]["time_us"] / 1e3 for row in rows]
        panel.loglog(sizes, speeds, style, base=2, markersize=4, label=name)
    panel.loglog(sizes, [row["memory_bandwidth"] for row in rows], "k--", base=2, linewidth=1, label="roofline")
    panel.set_yscale("log", base=10)
    panel.set_title(run.title.partition(" ")[2] if run.library == "gloo" else run.title.partition(", ")[2], fontsize=9)
    panel.tick_params(labelbottom=True)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
