"""`python -m abccl.bench`, also `abccl bench`: measure collectives and messages, and compare with other libraries."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..algorithms import Collective, to_collective
from ..algorithms.parameters import split_outside
from ..algorithms.words import to_bytes
from ..errors import AbcclError, ArgumentError
from .collectives import OPERATORS


def a_size(text: str) -> int:
    """A number of bytes, as in 64K, for click."""
    try:
        return to_bytes(text)
    except ArgumentError as error:
        raise click.BadParameter(str(error)) from error


def words(text: str) -> tuple[str, ...]:
    """Words with commas between; those in parentheses, as in knomial(radix=8), belong to a word."""
    try:
        return tuple(dict.fromkeys(filter(None, split_outside(text, ","))))
    except ArgumentError as error:
        raise click.BadParameter(str(error)) from error


def libraries(text: str) -> tuple[str, ...]:
    """Names of libraries to compare with."""
    for word in words(text):
        if word not in ("gloo", "mpi"):
            raise click.BadParameter(f"there is no {word!r} to compare with: there are gloo and mpi")
    return words(text)


def two_ranks(text: str) -> tuple[int, int]:
    """Two ranks with a comma between."""
    try:
        first, second = map(int, text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no pair of ranks: wanted are two, as in 0,1") from None
    return first, second


def check_writable(path: Path) -> None:
    """Find out before the measurement, not after it. A new file is left empty.

    Raises:
        ArgumentError: the file can not be opened for writing.
    """
    try:
        path.open("a").close()
    except OSError as error:
        raise ArgumentError(f"{path} can not be written ({error.strerror}): name another file") from error


class Failure(click.ClickException):
    """An error of abccl, in one line."""

    exit_code = 2


FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("collective", metavar="COLLECTIVE|p2p")
@click.option("--ranks", type=click.IntRange(1), help="Processes to start; 2 by default. Not under mpirun or torchrun.")
@click.option("-b", "--min", "smallest", type=a_size, metavar="SIZE", default="4", help="4 by default; or 64K, 1M, ...")
@click.option("-e", "--max", "largest", type=a_size, metavar="SIZE", help="64M by default; 4M for p2p.")
@click.option("-f", "--factor", type=click.IntRange(2), default=4, show_default=True, help="From a size to the next.")
@click.option("-d", "--dtype", default="float32", show_default=True, help="Of the elements, as numpy names it.")
@click.option("-o", "--op", type=click.Choice(OPERATORS), help="The operator of a reduction; sum by default.")
@click.option("--root", type=int, help="A fixed root; without it the root changes from call to call.")
@click.option("--algorithm", type=words, metavar="NAMES", default="auto", help="With commas; auto by default; or all.")
@click.option(
    "--vs", "rivals", type=libraries, metavar="NAMES", default="", help="Compare with gloo, mpi, or gloo,mpi."
)
@click.option("--through", type=click.Choice(["direct", "torch"]), help="How abccl is called; as its peer by default.")
@click.option(
    "--transport",
    type=click.Choice(["shm", "mpi", "gloo"]),
    help="abccl's; by default what reaches all ranks.",
)
@click.option(
    "--array",
    type=click.Choice(["numpy", "torch", "cupy"]),
    help="What abccl's own calls get; numpy by default. With cupy, MPI too.",
)
@click.option("--pair", type=two_ranks, metavar="A,B", help="For p2p: the ranks that take part; 0,1 by default.")
@click.option("--in-place/--out-of-place", default=None, help="For all_reduce and reduce; in place by default.")
@click.option(
    "--loop", type=click.Choice(["latency", "isolated", "throughput"]), help="For rooted collectives: see above."
)
@click.option("--check/--no-check", default=True, show_default=True, help="Hold results against a reference.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=0.25,
    show_default=True,
    help="For each library and size.",
)
@click.option("--iterations", type=click.IntRange(1), help="Calls, instead of --seconds.")
@click.option("--roofline", is_flag=True, help="Measure the memory's bandwidth along with it: see above.")
@click.option("--persistent", is_flag=True, help="Prepare each call once and start it often, as MPI-4 does.")
@click.option("--registered", is_flag=True, help="Take buffers from abccl's registered memory: comm.empty.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["nccl", "osu", "csv", "json"]),
    default="nccl",
    show_default=True,
    help="Of standard output: see above.",
)
@click.option("--json", "json_file", type=FILE, help="Write everything there, the time of every round included.")
@click.option("--csv", "csv_file", type=FILE, help="Write the table there.")
def bench(
    collective: str,
    smallest: int,
    largest: int | None,
    factor: int,
    seconds: float,
    iterations: int | None,
    json_file: Path | None,
    csv_file: Path | None,
    algorithm: tuple[str, ...],
    layout: str,
    **options: Any,
) -> None:
    """Measure COLLECTIVE, or messages, from size to size, and compare with other libraries in the same processes.

    COLLECTIVE is all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, reduce, gather, scatter or barrier.
    Alone, it starts --ranks processes; under mpirun, torchrun or srun it uses theirs, on one host or many.

    p2p measures messages between two ranks while the others are idle: the latency (half a round trip), the bandwidth
    (64 messages under way, then an answer), and the bandwidth both ways (64 each way), as osu_latency, osu_bw and
    osu_bibw do.

    The columns are those of nccl-tests. algbw is the size by the time, in GB/s (1e9). busbw is algbw times the share of
    the size that each of p ranks must send: 2 (p - 1) / p for all_reduce, 1 for broadcast and reduce, (p - 1) / p for
    the others. A peer takes turns with abccl in short slices; the ratio is its time by abccl's. Against gloo both are
    called through torch.distributed, against mpi both on arrays of --array. With --through direct abccl's own calls are
    measured, whatever the peer: then several algorithms can be named, as in auto,ring,knomial(radix=8). all stands for
    each that runs on so many ranks, and for native: the collective of the transport's own engine, MPI's over
    --transport mpi and Gloo's over gloo.

    --format is what goes to standard output: the table (nccl), the tables of osu_allreduce -f and its like, one for
    each library and algorithm (osu), or what --csv and --json write. Notes go to standard error then. Sizes in osu are
    those of its benchmarks: of a part for all_gather, all_to_all, gather and scatter.

    --roofline adds a subject that takes turns as well: all ranks at once do a[i] += b[i] on two float32 arrays of the
    case's size each, which moves 3 size bytes per rank (two reads and a write). The column says what part of that
    bandwidth the collective reaches. Of the collective the fewest bytes count that all ranks together must read and
    write: with n bytes in the largest buffer 2 p n for all_reduce and all_to_all, (p + 1) n for reduce_scatter,
    all_gather and reduce, p n for broadcast, 2 n for gather and scatter.

    A line before the table and one after it say how far apart the cores of ranks 0 and 1 are: the one-way time of a
    cache line, how fast one copies 1 MiB that the other has just written, and how fast one writes again what the other
    has just read. Where that last is above 5 GB/s the cores are near, else far.

    A loop of broadcasts is a pipeline, since the root runs ahead. So for broadcast, reduce, gather and scatter the root
    changes at random from call to call, and each call waits for the one before (--loop latency). With --root R there is
    a barrier before each call (isolated); --loop throughput measures the pipeline.

    \b
    python -m abccl.bench all_reduce --ranks 2 --vs gloo
    torchrun --nproc-per-node 2 -m -- abccl.bench all_reduce --max 1M --vs gloo
    torchrun --nproc-per-node 2 -m -- abccl.bench all_reduce --through direct --algorithm auto,ring --vs gloo
    mpirun -n 2 python -m abccl.bench all_reduce --vs mpi
    mpirun -n 2 python -m abccl.bench p2p --vs mpi --format osu

    Results are checked on random data against float64, before and after timing. Exits with 1 if any is wrong, with 2
    after an error.
    """
    from .measure import Budget
    from .options import Options
    from .osu import tables
    from .record import write_csv, write_json
    from .run import measure
    from .table import Printer

    report, error = None, None
    try:
        for named in filter(None, (json_file, csv_file)):
            check_writable(named)
        kind = None if collective == "p2p" else to_collective(collective)
        if kind is Collective.BARRIER and options["dtype"] != "float32":
            raise ArgumentError("a barrier has no data: leave out --dtype")
        asked = Options(
            kind,
            sizes=(smallest, largest or to_bytes("64M" if kind else "4M"), factor),
            budget=Budget(seconds, iterations),
            algorithms=algorithm or ("auto",),
            command=f"{_program()} {shlex.join(sys.argv[1:])}",
            **options,
        )
        report, error = measure(asked, partial(Printer, notes_only=layout != "nccl"))
    except AbcclError as caught:
        error = caught
    if error is not None:
        raise Failure(str(error)) from error
    if report is not None:
        if layout == "osu":
            click.echo("\n".join(tables(report)))
        for path, wanted, write in ((json_file, "json", write_json), (csv_file, "csv", write_csv)):
            if layout == wanted:
                write(report, sys.stdout)
            if path:
                with path.open("w", newline="", encoding="utf-8") as file:
                    write(report, file)
        if report.wrong:
            raise SystemExit(1)


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "python -m abccl.bench" if name == "__main__.py" else name


if __name__ == "__main__":
    bench(prog_name="python -m abccl.bench")
