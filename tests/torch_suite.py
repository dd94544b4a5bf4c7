"""PyTorch's own tests of torch.distributed, run on backend "abccl": `make test-torch`. Not collected by pytest.

    python tests/torch_suite.py                     # all of them
    python tests/torch_suite.py all_to_all barrier  # those with one of these words in their names
    python tests/torch_suite.py --backend gloo      # what Gloo makes of the same tests

They are those of torch.testing._internal.distributed.distributed_test, which comes with torch, run as PyTorch runs
them: each in a process that forks the ranks. Their decorators skip a test for backends whose names they do not know, so
the file is loaded twice, as for Gloo and as for MPI, and a test runs if either of the two may run it.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import unittest
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import click

SUITE = "torch.testing._internal.distributed.distributed_test"
GATES = ("gloo", "mpi")

# Tests that a backend cannot pass because of its name: the reason, and what the error then says. They run all the same,
# and one that passes, or fails in another way, is a failure of this program.
_REFUSED = ("torch.distributed.monitored_barrier serves only Gloo", "only implemented for GLOO")
_WORDING = ("wants the wording of Gloo's error; abccl's names the missing ranks too", "timed out in monitoredBarrier")
_ALIKE = ("all_to_all of tensors of different sizes, which Gloo refuses", "alltoall: invalid tensor size")
NAME_GATED = {
    "abccl": {
        "test_monitored_barrier_failure_order": _REFUSED,
        "test_monitored_barrier_gloo": _REFUSED,
        "test_monitored_barrier_gloo_rank_0_timeout": _WORDING,
        "test_monitored_barrier_gloo_subgroup": _REFUSED,
        "test_monitored_barrier_wait_all_ranks": _REFUSED,
    },
    "gloo": {
        "test_all_to_all": _ALIKE,
        "test_all_to_all_complex": _ALIKE,
        "test_all_to_all_full_group": _ALIKE,
        "test_all_to_all_group": _ALIKE,
    },
}

# These make a CPU model if the backend is called "gloo", and ask for its name nowhere else.
MODEL_BY_NAME = "test_accumulate_gradients_no_sync"

# Why the suite skips its own tests, by words of its reasons.
SKIPPED = {
    "need a GPU": r"CUDA|NCCL|Nccl|'nccl'",
    "disabled by PyTorch": r"github\.com/pytorch|flak",
    "need other numbers of ranks": r"world size",
    "need torchvision": r"torchvision",
}

# The suite ends a test that is late by itself, and tells where each rank was. That must not be late as well.
GRACE = 30.0

# What the profiler writes each time that it starts or stops.
NOISE = "USDT:"


class Outcome(NamedTuple):
    """What became of a test: "passed", "failed" or "skipped", the error or reason, and what its processes wrote."""

    state: str
    reason: str = ""
    output: str = ""


def load(backend: str, gate: str) -> Any:
    """The suite as a test case on `backend`, with the tests that the backend called `gate` may run."""
    os.environ["BACKEND"] = gate
    origin = importlib.util.find_spec(SUITE)
    assert origin is not None and origin.origin is not None
    spec = importlib.util.spec_from_file_location(f"{SUITE}_{gate}", origin.origin)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickle looks for the tests' objects there
    spec.loader.exec_module(module)
    module.BACKEND = backend

    class Case(module.TestDistBackend, module.DistributedTest._DistTestBase):  # type: ignore[misc]
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(multiprocessing.get_context("fork").Process)

        def run_test(self, test_name: str, parent_pipe: Any) -> None:
            if test_name.startswith(MODEL_BY_NAME):
                module.BACKEND = "gloo"
            super().run_test(test_name, parent_pipe)

        def _check_return_codes(self, fn: Any, elapsed_time: float) -> None:
            super()._check_return_codes(fn, elapsed_time)  # looks at rank 0's only
            codes = [process.exitcode for process in self.processes]
            assert not any(codes), f"the ranks ended with {codes}"

    return Case


def load_all(backend: str, ranks: int, seconds: int, folder: Path) -> list[Any]:
    """Import torch and abccl, once for all tests, and the suite for each gate."""
    os.environ.update(
        DISTRIBUTED_TESTS_DEFAULT_TIMEOUT=str(seconds),
        GLOO_SOCKET_IFNAME="lo",
        INIT_METHOD=f"file://{folder}/init",
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        PYTORCH_PRINT_REPRO_ON_FAILURE="0",
        WORLD_SIZE=str(ranks),
    )
    del sys.argv[1:]  # torch's test utilities have options of their own
    from torch.testing._internal.common_distributed import TIMEOUT_OVERRIDE, logger

    from abccl.collectives.torch.register import register

    register()
    importlib.import_module("abccl.collectives.torch.process_group")  # it takes each rank as long as most tests
    TIMEOUT_OVERRIDE.clear()
    logger.setLevel("ERROR")
    logger.addFilter(lambda record: "Caught exception" not in record.msg)  # the test's error tells it too
    cases = [load(backend, gate) for gate in GATES]
    os.environ["BACKEND"] = "mpi"  # others skip the tests of groups if there are fewer than 8 ranks
    return cases


class Running:
    """A test in a process of its own, with a folder for all that it writes."""

    def __init__(self, name: str, case: Any, seconds: int, folder: Path) -> None:
        self.name, self._folder, self._seconds = name, folder / name, seconds
        self._folder.mkdir()
        self._end = time.monotonic() + seconds + GRACE
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(case,))
        self._process.start()
        self.sentinel = self._process.sentinel

    def _run(self, case: Any) -> None:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(self._folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        tempfile.tempdir = str(self._folder)
        result = unittest.TestResult()
        case(self.name).run(result)
        outcome = Outcome("passed")
        for _, error in result.errors + result.failures:
            outcome = Outcome("failed", error)
        for _, reason in result.skipped:
            outcome = Outcome("skipped", reason)
        (self._folder / "outcome").write_text(json.dumps(outcome))

    def is_late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self._end

    def finish(self) -> Outcome:
        """End all that still runs of it, and tell what became of it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        outcome, output = self._folder / "outcome", self._folder / "output"
        if outcome.exists():
            found = Outcome(*json.loads(outcome.read_text()))
        else:
            late = f"killed: not finished after {self._seconds} s"
            found = Outcome("failed", late if self.is_late() else f"its process ended with {self._process.exitcode}")
        if output.exists():
            written = output.read_text(errors="replace").splitlines(keepends=True)
            found = found._replace(output="".join(line for line in written if not line.startswith(NOISE)))
        shutil.rmtree(self._folder, ignore_errors=True)
        return found


def outcomes(tests: dict[str, Any], jobs: int, seconds: int, folder: Path) -> Iterator[tuple[str, Outcome]]:
    """Run the tests, `jobs` at a time, and tell of each when it has ended."""
    waiting, running = iter(tests.items()), []
    try:
        while True:
            running += [Running(*test, seconds, folder) for test in islice(waiting, jobs - len(running))]
            if not running:
                return
            ended = wait([test.sentinel for test in running], timeout=1.0)
            for test in [test for test in running if test.sentinel in ended or test.is_late()]:
                running.remove(test)
                yield test.name, test.finish()
    finally:
        for test in running:
            test.finish()


def judged(backend: str, name: str, outcome: Outcome) -> tuple[str, str]:
    """How a test counts: "passed", "failed", "name-gated" or why it skipped itself; and the reason."""
    state, reason, output = outcome
    gated, words = NAME_GATED[backend].get(name, ("", ""))
    if gated and state == "passed":
        return "failed", "it passes now: take it out of NAME_GATED"
    if gated and words in reason + output:
        return "name-gated", gated
    if state == "skipped":
        kinds = [kind for kind, pattern in SKIPPED.items() if re.search(pattern, reason)]
        return (kinds[0] if kinds else f"skipped ({reason})"), reason
    return state, reason


def skip_reason(case: Any, name: str) -> str | None:
    """Why the suite skips a test when it is loaded; None if it does not."""
    test = getattr(case, name)
    return test.__unittest_skip_why__ if getattr(test, "__unittest_skip__", False) else None


def report(backend: str, found: Iterator[tuple[str, Outcome]], tests: int) -> Counter[str]:
    """Show how tests end, in one line if somebody looks on, and failures in full; count the kinds of outcomes."""
    counts = Counter(dict.fromkeys(("passed", "failed", "name-gated", *SKIPPED), 0))
    watched = sys.stdout.isatty()
    clear = "\r\033[K" if watched else ""
    for number, (name, outcome) in enumerate(found, 1):
        kind, reason = judged(backend, name, outcome)
        counts[kind] += 1
        if kind == "failed":
            click.echo(f"{clear}== {name} failed\n{outcome.output}{reason.rstrip()}\n")
        elif kind == "name-gated":
            click.echo(f"{clear}{name} is name-gated: {reason}")
        if watched:
            click.echo(f"{clear}{number} of {tests}, {counts['failed']} failed, {name}", nl=False)
    click.echo(clear, nl=False)
    return counts


@click.command()
@click.argument("words", nargs=-1)
@click.option("--backend", type=click.Choice(list(NAME_GATED)), default="abccl", show_default=True)
@click.option("--ranks", type=click.IntRange(min=3), default=3, show_default=True, help="Ranks of each test.")
@click.option("--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="Tests at a time.")
@click.option("--seconds", type=click.IntRange(min=1), default=60, show_default=True, help="Time for each test.")
@click.option("--list", "only_list", is_flag=True, help="Tell which tests would run, and why the others would not.")
def main(words: tuple[str, ...], backend: str, ranks: int, jobs: int, seconds: int, only_list: bool) -> None:
    """Run PyTorch's own tests of torch.distributed; with WORDS, those that have one of them in their names."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cases = load_all(backend, ranks, seconds, Path(folder))
        names = [name for name in dir(cases[0]) if name.startswith("test_")]
        names = [name for name in names if not words or any(word in name for word in words)]
        if not names:
            raise click.UsageError(f"no test has {' or '.join(words)} in its name: --list tells all names")
        runs = {name: case for name in names for case in reversed(cases) if skip_reason(case, name) is None}
        skipped = [(name, Outcome("skipped", str(skip_reason(cases[0], name)))) for name in names if name not in runs]
        if only_list:
            planned = [(name, Outcome("runs", NAME_GATED[backend].get(name, ("",))[0])) for name in runs]
            for name, outcome in [*planned, *skipped]:
                click.echo(f"{name}: {': '.join(filter(None, judged(backend, name, outcome)))}")
            return
        found = outcomes(runs, jobs, seconds, Path(folder))
        counts = report(backend, chain(skipped, found), len(names))
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count or kind in ("passed", "failed"))
    click.echo(f"{summary}; {time.monotonic() - start:.0f} s")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
