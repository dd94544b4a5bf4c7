"""Thousands of random trials, each with one fault: `make soak`, or by hand to repeat one.

    python tests/soak_faults.py --seconds 600
    python tests/soak_faults.py --trials 1 --seed 1234

A trial's number is its seed, and each trial prints it when it fails. Ends with 1 if any did, and writes what was
injected, survived and found as JSON and as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ["ABCCL_TUNER"] = "built-in"

import fault_trials
import faults


def in_milliseconds(seconds: list[float]) -> dict[str, Any]:
    """How long survivors took to notice deaths."""
    if len(seconds) < 2:
        return {"count": len(seconds)}
    figures = {"median": median(seconds), "99th percentile": quantiles(seconds, n=100)[98], "most": max(seconds)}
    return {"count": len(seconds)} | {name: round(1e3 * value, 1) for name, value in figures.items()}


def table(summary: dict[str, Any]) -> str:
    """The summary in Markdown."""
    lines = ["| point | action | trials | fault met | failed |", "| --- | --- | --- | --- | --- |"]
    for pair, row in sorted(summary["by fault"].items()):
        point, action = pair.split()
        lines.append(f"| {point} | {action} | {row['trials']} | {row['met']} | {row['failed']} |")
    notice = summary["milliseconds to notice a death"]
    lines += [
        "",
        f"{summary['trials']} trials in {summary['seconds']} s, seeds {summary['first seed']} to "
        f"{summary['last seed']}; {summary['failed']} failed, {summary['leaks']} left something behind. Milliseconds "
        "from a death to the error: " + ", ".join(f"{name} {value}" for name, value in notice.items()) + ".",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run trials until the time or their number is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--trials", type=int, default=0, help="0: as many as the time allows")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first trial; each next has one more")
    parser.add_argument("--json", type=Path, help="where the summary goes")
    parser.add_argument("--markdown", type=Path, help="where the table goes")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="what ranks write to standard error")
    given = parser.parse_args()
    if not given.trials and given.seconds == float("inf"):
        parser.error("say how long: --seconds or --trials")
    rows: dict[str, dict[str, int]] = defaultdict(lambda: {"trials": 0, "met": 0, "failed": 0})
    seconds: list[float] = []
    leaks, seed, begun = 0, given.seed, time.monotonic()
    with closing(faults.Zygote("fault_trials", log=given.log)) as zygote:
        while time.monotonic() - begun < given.seconds and not 0 < given.trials <= seed - given.seed:
            spec = fault_trials.random_spec(seed)
            verdict = fault_trials.trial(zygote, spec)
            row = rows[f"{spec.point} {spec.action}"]
            row["trials"] += 1
            row["met"] += verdict.met
            row["failed"] += bool(verdict.faults)
            leaks += any("left behind" in fault for fault in verdict.faults)
            seconds += verdict.seconds
            if verdict.faults:
                print(f"{spec}: {verdict.faults}\n  again: {sys.argv[0]} --trials 1 --seed {seed}", flush=True)
            seed += 1
    summary = {
        "trials": seed - given.seed,
        "first seed": given.seed,
        "last seed": seed - 1,
        "seconds": round(time.monotonic() - begun, 1),
        "failed": sum(row["failed"] for row in rows.values()),
        "leaks": leaks,
        "milliseconds to notice a death": in_milliseconds(seconds),
        "by fault": dict(rows),
    }
    if given.json:
        given.json.write_text(json.dumps(summary, indent=2) + "\n")
    if given.markdown:
        given.markdown.write_text(table(summary) + "\n")
    print(table(summary))
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
