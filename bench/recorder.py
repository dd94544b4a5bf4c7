"""What the flight recorder costs: `python -m abccl.bench.recorder`.

Two ranks run 4-byte all_reduces, in blocks with and without the recorder's time stamps by turns. (What was called is
written in both: the check of mismatches needs it.)
"""

from __future__ import annotations

import statistics
import time

import click
import numpy as np

from .. import collectives

_CALLS = 4000


def _rank(blocks: int) -> dict[bool, list[float]]:
    """Seconds of a call in each block, by whether it had stamps."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with collectives.init() as communicator:
        x = np.ones(1, np.float32)
        for block in range(2 * blocks):
            stamps = block % 2 == 0
            communicator._recorder.set_stamps(stamps)
            communicator.barrier()
            start = time.perf_counter()
            for _ in range(_CALLS):
                communicator.all_reduce(x)
            seconds[stamps].append((time.perf_counter() - start) / _CALLS)
        communicator.barrier()
    return seconds


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--blocks", default=300, show_default=True, help=f"Of each kind, of {_CALLS} calls.")
def main(blocks: int) -> None:
    """Time 4-byte all_reduces of two ranks on this host, with and without time stamps."""
    seconds = collectives.spawn(_rank, 2, (blocks,))[0]
    plain = statistics.median(seconds[False])
    pairs = statistics.median(one / other - 1 for one, other in zip(seconds[True], seconds[False]))
    click.echo(
        f"a 4-byte all_reduce: {plain * 1e9:.0f} ns, and {pairs:+.1%} with stamps (median of neighbouring blocks)"
    )


if __name__ == "__main__":
    main()
