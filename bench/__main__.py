"""`python -m abccl.bench`, also `abccl bench`: measure collectives, and compare with other libraries."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ..algorithms import Collective
from ..errors import AbcclError, ArgumentError
from .collectives import OPERATORS, to_bytes


class Size(click.ParamType):
    """A number of bytes, as in 64K."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click."""
        try:
            return value if isinstance(value, int) else to_bytes(value)
        except ArgumentError as error:
            self.fail(str(error), param, ctx)


class Words(click.ParamType):
    """Words with commas between, each one of those known (any if none are given)."""

    name = "names"

    def __init__(self, *known: str) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """See click."""
        if isinstance(value, tuple):
            return value
        words = tuple(dict.fromkeys(filter(None, (word.strip() for word in value.split(",")))))
        for word in words:
            if self.known and word not in self.known:
                self.fail(f"{word!r} is not known: there are {', '.join(self.known)}", param, ctx)
        return words


class Failure(click.ClickException):
    """An error of abccl, in one line."""

    exit_code = 2


FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("collective", metavar="COLLECTIVE")
@click.option("--ranks", type=click.IntRange(1), help="Processes to start; 2 by default. Not under mpirun or torchrun.")
@click.option("-b", "--min", "smallest", type=Size(), default="4", show_default=True, help="Bytes; K, M, G are 1024-fold.")
@click.option("-e", "--max", "largest", type=Size(), default="64M", show_default=True, help="Bytes.")
@click.option("-f", "--factor", type=click.IntRange(2), default=4, show_default=True, help="From a size to the next.")
@click.option("-d", "--dtype", default="float32", show_default=True, help="The element type, as numpy or torch names it.")
@click.option("-o", "--op", type=click.Choice(OPERATORS), help="The operator of a reduction; sum by default.")
@click.option("--root", type=int, help="A fixed root; without it the root changes from call to call.")
@click.option("--algorithm", type=Words(), default="auto", show_default=True, help="Names, auto, or all.")
@click.option("--vs", "rivals", type=Words("gloo", "mpi"), default="", help="Compare with: gloo, mpi, or both.")
@click.option("--through", type=click.Choice(["direct", "torch"]), help="How abccl is called; as its peer by default.")
@click.option("--array", type=click.Choice(["numpy", "torch"]), help="What abccl's own calls get; numpy by default.")
@click.option("--in-place/--out-of-place", default=None, help="For all_reduce and reduce; in place by default.")
@click.option("--loop", type=click.Choice(["latency", "isolated", "throughput"]), help="For rooted collectives: below.")
@click.option("--check/--no-check", default=True, show_default=True, help="Hold results against a reference.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.25, show_default=True, help="For each size.")
@click.option("--iterations", type=click.IntRange(1), help="Calls for each size, instead of --seconds.")
@click.option("--json", "json_file", type=FILE, help="Write everything there, the time of every round included.")
@click.option("--csv", "csv_file", type=FILE, help="Write the table there.")
def bench(
    collective: str,
    smallest: int,
    largest: int,
    factor: int,
    seconds: float,
    iterations: int | None,
    json_file: Path | None,
    csv_file: Path | None,
    algorithm: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure COLLECTIVE from size to size, and compare with other libraries in the same processes.

    COLLECTIVE is all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, reduce, gather, scatter or barrier.
    Alone, it starts --ranks processes; under mpirun, torchrun or srun it uses theirs.

    The columns are those of nccl-tests: busbw is the bandwidth that each rank's link must have had, whatever the number
    of ranks. A peer takes turns with abccl in short slices; the ratio is its time by abccl's. Against gloo both are
    called through torch.distributed, against mpi both on numpy arrays.

    A loop of broadcasts is a pipeline, since the root runs ahead. So for broadcast, reduce, gather and scatter the root
    changes at random from call to call, and each call waits for the one before (--loop latency). With --root R there is
    a barrier before each call (isolated); --loop throughput measures the pipeline.

    Results are checked on random data against float64, before and after timing. Exits with 1 if any is wrong, with 2
    after an error.
    """
    from ..tools.arguments import to_collective
    from .measure import Budget
    from .run import Options, measure
    from .table import Printer, write_csv, write_json

    report, error = None, None
    try:
        for path in filter(None, (json_file, csv_file)):
            if not path.parent.is_dir():
                raise ArgumentError(f"{path} can not be written: there is no folder {path.parent}")
        kind = to_collective(collective)
        if kind is Collective.BARRIER and options["dtype"] != "float32":
            raise ArgumentError("a barrier has no data: leave out --dtype")
        asked = Options(
            kind,
            sizes=(smallest, largest, factor),
            budget=Budget(seconds, iterations),
            algorithms=algorithm or ("auto",),
            command=shlex.join(["python -m abccl.bench", *sys.argv[1:]]).replace("'python -m abccl.bench'", "python -m abccl.bench"),
            **options,
        )
        report, error = measure(asked, Printer)
    except AbcclError as caught:
        error = caught
    if error is not None:
        raise Failure(str(error)) from error
    if report is not None:
        if json_file:
            write_json(report, json_file)
        if csv_file:
            write_csv(report, csv_file)
        if report.wrong:
            raise SystemExit(1)


if __name__ == "__main__":
    bench(prog_name="python -m abccl.bench")
