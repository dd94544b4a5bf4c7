"""ABCCL_DEBUG: what is said, by whom, and how a program redirects it; and that others see calls by the same names."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import abccl
from abccl.collectives import debug
from abccl.errors import ArgumentError, PeerLost

PROGRAM = """
import sys
import numpy as np
import abccl

def body():
    with abccl.init() as communicator:
        x = np.ones(1000, np.float32)
        for _ in range(3):
            communicator.all_reduce(x)
        communicator.all_reduce(x, async_op=True).wait()
        communicator.all_reduce(x[:4], algorithm="ring")
        half = communicator.split(communicator.rank // 2)
        half.barrier()
        half.close()
        communicator.barrier()

if __name__ == "__main__":
    abccl.spawn(body, int(sys.argv[1]))
"""

LINE = re.compile(r'abccl \[rank (\d+) of (\d+)(?: in group "([^"]+)")?, (\S+):(\d+)\] (\w+): (.+)')


class Line:
    """A line that a rank said."""

    def __init__(self, text: str) -> None:
        found = LINE.fullmatch(text)
        assert found is not None, f"no line of a rank: {text!r}"
        rank, size, group, self.host, pid, self.topic, self.text = found.groups()
        self.rank, self.size, self.pid, self.group = int(rank), int(size), int(pid), group or "default"


def said(tmp_path: Path, level: str, ranks: int, **variables: str) -> list[Line]:
    """What the ranks of PROGRAM say; each line must be whole."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = os.environ | {"ABCCL_DEBUG": level, "ABCCL_FLIGHT_DIR": "off"} | variables
    done = subprocess.run(
        [sys.executable, str(program), str(ranks)], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return [Line(text) for text in done.stderr.splitlines()]


# ---- whole programs


def test_info_says_each_thing_once(tmp_path: Path) -> None:
    lines = said(tmp_path, "info", 4, ABCCL_PROTOCOL="cached")
    mine = [line for line in lines if line.group == "default" and line.rank == 0]
    topics = [line.topic for line in mine if line.topic != "choice"]
    assert topics == [
        "version", "environment", "start", "topology", "transport", "memory", "cores", "protocol", "tuner",
    ]  # fmt: skip
    texts = {line.topic: line.text for line in mine}
    assert texts["version"].startswith(f"abccl {abccl.__version__}, Python 3")
    assert "ABCCL_PROTOCOL=cached" in texts["environment"]
    assert texts["topology"].startswith("4 ranks on 1 host; ")
    assert texts["transport"] == "shm: all ranks can attach to each other's memory"
    assert texts["protocol"] == "cached, by ABCCL_PROTOCOL"
    assert texts["tuner"].startswith("built-in: ABCCL_TUNER asks for it; built in, from two cores")
    # A size class of a collective is chosen for once, however often it is called; a wish is another choice.
    reduces = [line.text for line in mine if line.topic == "choice" and line.text.startswith("all_reduce up to 4 KiB")]
    assert len(reduces) == 1
    assert re.search(r"messages up to \d+ \w+, 1 segment in \d lanes?, predicted [\d.]+ us; .*; next: \w+", reduces[0])
    assert any(line.text.startswith("all_reduce up to 16 B: ring") and "asked for it" in line.text for line in mine)
    # Others say only what is theirs.
    assert {(line.rank, line.topic) for line in lines if line.group == "default" and line.rank} == {
        (rank, "start") for rank in (1, 2, 3)
    }
    # Groups are told apart, and their ranks are numbered anew.
    groups = {(line.group, line.rank, line.size) for line in lines if line.topic == "start"}
    assert len({group for group, _, _ in groups} - {"default"}) == 2
    assert {(rank, size) for group, rank, size in groups if group != "default"} == {(0, 2), (1, 2)}
    assert all(line.pid for line in lines)


def test_trace_says_every_call_on_every_rank(tmp_path: Path) -> None:
    lines = said(tmp_path, "trace", 2)
    for rank in (0, 1):
        mine = [line for line in lines if line.group == "default" and line.rank == rank]
        assert {"version", "topology", "transport", "tuner", "choice"} <= {line.topic for line in mine}
        calls = [line.text for line in mine if line.topic == "call"]
        starts = [text.removesuffix(" starts") for text in calls if text.endswith(" starts")]
        ends = [re.sub(r" finished after [\d.]+ \w+$", "", text) for text in calls if " finished after " in text]
        assert len(calls) == len(starts) + len(ends)
        assert sorted(starts) == sorted(ends)
        assert [text.partition(" ")[0] for text in starts] == [f"#{number}" for number in range(1, 8)]
        assert re.fullmatch(r"#1 all_reduce\(float32, sum, 1000 elements, \w+\)", starts[0])
        assert starts[4] == "#5 all_reduce(float32, sum, 4 elements, ring)"
    halves = [line for line in lines if line.group != "default" and line.topic == "call"]
    assert halves and all("barrier" in line.text for line in halves)


def test_silence_is_the_default(tmp_path: Path) -> None:
    assert said(tmp_path, "", 2) == []


def test_another_word_is_refused_before_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCCL_DEBUG", "verbose")
    with pytest.raises(ArgumentError, match="ABCCL_DEBUG='verbose': wanted is info .* or trace"):
        abccl.init()


def different_hosts() -> list[str]:
    """What rank 0 of two ranks on different hosts says."""
    from abccl.collectives import bootstrap

    assert bootstrap.spawned is not None
    os.environ |= {"ABCCL_DEBUG": "info", "ABCCL_HOST": f"h{bootstrap.spawned.rank}"}
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("abccl").addHandler(handler)
    with abccl.init() as communicator:
        communicator.barrier()
    return heard


@pytest.mark.torch
def test_why_shared_memory_was_refused(here: ModuleType) -> None:
    first, second = abccl.spawn(here.different_hosts, 2)
    (transport,) = [line.text for line in map(Line, first) if line.topic == "transport"]
    assert transport.startswith("shm on each host, gloo between them; shm for all refused: rank 0 (h0) and rank 1 (h1)")
    assert {line.host for line in map(Line, second)} == {"h1"}


# ---- the logger


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[debug.Log]:
    """A log that traces, of rank 1 of 3; the logger is as before afterwards."""
    monkeypatch.setenv("ABCCL_DEBUG", "trace")
    monkeypatch.setattr(debug, "_said", set())
    logger = logging.getLogger("abccl")
    handlers, level = list(logger.handlers), logger.level
    found = debug.log_of(1, 3, "half")
    assert found is not None
    yield found
    logger.handlers[:], logger.level = handlers, level


def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No handlers but ours: pytest has some on the root, and when a test begins on loggers that do not propagate."""
    monkeypatch.setattr(logging.getLogger("abccl"), "propagate", False)


class Pieces:
    """A standard error that notes each write."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> None:
        self.written.append(text)

    def flush(self) -> None: ...


def test_a_line_is_one_write(log: debug.Log, monkeypatch: pytest.MonkeyPatch) -> None:
    bare(monkeypatch)
    error = Pieces()
    monkeypatch.setattr(sys, "stderr", error)
    log.own("topic", "two\n  lines %s {}")
    (line,) = error.written
    assert line.startswith('abccl [rank 1 of 3 in group "half", ') and line.endswith("] topic: two; lines %s {}\n")
    log.own("topic", "ä" * 5000)
    assert len(error.written) == 2
    assert len(error.written[1].encode()) <= 4096 and error.written[1].endswith(" ...\n")


@pytest.mark.parametrize("where", ["abccl", None])
def test_a_program_redirects_it(log: debug.Log, where: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logging.getLogger(where).addHandler(handler)
    log.own("topic", "text")
    log.own("topic", "every call", logging.DEBUG)
    logging.getLogger(where).removeHandler(handler)
    assert [record.getMessage().partition("] ")[2] for record in heard] == ["topic: text", "topic: every call"]
    assert [record.levelname for record in heard] == ["INFO", "DEBUG"]
    assert capsys.readouterr().err == ""


def test_what_is_the_same_on_all_ranks_is_said_by_the_first(
    log: debug.Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare(monkeypatch)
    log.common("here", "by all at trace")
    monkeypatch.setenv("ABCCL_DEBUG", "info")
    for rank in (0, 1):
        one = debug.log_of(rank, 3)
        assert one is not None
        one.common("topology", "for all")
        one.own("call", "not at info", logging.DEBUG)
        one.common("memory", "of a host", speaks=rank == 1)
        one.start("somehow")
        one.start("somehow")
    text = capsys.readouterr().err
    assert [text.count(word) for word in ("here:", "topology:", "not at", "memory:", "start:")] == [1, 1, 0, 1, 2]


def test_without_the_variable_there_is_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABCCL_DEBUG", raising=False)
    assert debug.log_of(0, 2) is None
    with abccl.init() as communicator:
        assert communicator._binder.log is None
        assert communicator._observer is None


# ---- calls that are traced


class Recorder:
    """What numbers calls."""

    def __init__(self) -> None:
        self.entered = self.finished = 0

    def position(self) -> dict[str, Any]:
        return {"entered": self.entered, "finished": self.finished}


class Asynchronous:
    """A work that ends when it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.done, self.error = False, error

    def is_completed(self) -> bool:
        return self.done

    def finishes_within(self, timeout: float | None) -> bool:
        if self.error is not None:
            raise self.error
        return True

    @property
    def times(self) -> tuple[float, float]:
        return time.monotonic(), time.monotonic()


def heard_by(log: debug.Log) -> list[str]:
    """What is said from now on."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage().partition("] call: ")[2])  # type: ignore[method-assign]
    logging.getLogger("abccl").addHandler(handler)
    return texts


def test_numbers_are_the_flight_recorders(log: debug.Log) -> None:
    texts, recorder = heard_by(log), Recorder()
    tracer = debug.Tracer(log, recorder)
    recorder.entered = recorder.finished = 41  # among them some that the tracer did not see
    tracer("barrier(tree)")(None)
    assert texts[0] == "#42 barrier(tree) starts"
    assert re.fullmatch(r"#42 barrier\(tree\) finished after [\d.]+ us", texts[1])
    tracer("barrier(tree)")(False)
    assert texts[3].startswith("#42 barrier(tree) failed after")


def test_asynchronous_calls_are_told_when_they_end(log: debug.Log) -> None:
    texts, recorder = heard_by(log), Recorder()
    tracer = debug.Tracer(log, recorder)
    works = [Asynchronous(), Asynchronous(PeerLost("rank 2 is gone"))]
    for work in works:
        tracer("barrier(tree)")(work)
    assert texts == ["#1 barrier(tree) starts", "#2 barrier(tree) starts"]
    watch = tracer._watch
    assert watch is not None and watch.daemon
    for work in works:
        work.done = True
    watch.join(10)
    assert not watch.is_alive() and tracer._watch is None
    assert texts[2].startswith("#1 barrier(tree) finished after")
    assert texts[3].startswith("#2 barrier(tree) failed by PeerLost after")


def test_two_observers_see_a_call() -> None:
    seen: list[str] = []

    def observer(name: str) -> debug.Observer:
        def observe(text: str) -> Callable[[Any], None]:
            seen.append(f"{name} {text}")
            return lambda outcome: seen.append(f"{name} {outcome}")

        return observe

    assert debug.both(None, None) is None
    one, two = observer("one"), observer("two")
    assert debug.both(one, None) is one and debug.both(None, two) is two
    together = debug.both(one, two)
    assert together is not None
    together("call")(7)
    assert seen == ["one call", "two call", "two 7", "one 7"]


# ---- names in torch.profiler


def names_in_profiles(*transports: str) -> list[Any]:
    """For groups and parts of them: collectives as torch.profiler saw them, and as the flight recorder did."""
    import torch

    from abccl.collectives.torch.profiling import record

    found = []
    for transport in transports:
        if transport == "joint":
            from abccl.collectives import bootstrap

            assert bootstrap.spawned is not None
            os.environ["ABCCL_HOST"] = f"h{bootstrap.spawned.rank}"
        with abccl.init(None if transport == "joint" else transport) as communicator:
            part = communicator.split(0)
            assert part is not None
            for group in (communicator, part):
                before = group.flight_record()["entered"]
                group.observe(record)
                # acc_events: or torch warns that it forgets.
                with torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
                ) as profile:
                    x, wide = torch.ones(5), torch.empty(5 * group.size)
                    group.all_reduce(x)
                    group.all_reduce(x, algorithm="ring")
                    group.all_gather(wide, x, async_op=True).wait()
                    group.barrier()
                group.observe(None)
                group.all_reduce(x)  # is not seen
                events = sorted(profile.events(), key=lambda event: event.time_range.start)
                profiled = [event.name.removeprefix("abccl:") for event in events if event.name.startswith("abccl:")]
                operations = group.flight_record()["operations"]
                recorded = [one["call"] for one in operations if before < one["number"] <= before + 4]
                found.append((transport, type(group._transport).__name__, profiled, recorded))
            communicator.barrier()
            part.close()
    return found


def assert_alike(found: list[Any], *kinds: str) -> None:
    assert [kind for _, kind, _, _ in found] == [kind for kind in kinds for _ in range(2)]
    for transport, _, profiled, recorded in found:
        assert profiled == recorded, transport
        assert len(profiled) == 4
        assert profiled[1] == "all_reduce(float32, sum, 5 elements, ring)"


@pytest.mark.torch
def test_the_profiler_and_the_flight_recorder_have_the_same_names(here: ModuleType) -> None:
    for found in abccl.spawn(here.names_in_profiles, 2, ("shm", "gloo", "joint"), timeout=100):
        assert_alike(found, "ShmTransport", "JointTransport", "JointTransport")


@pytest.mark.torch
def test_the_profiler_sees_collectives_over_mpi(mpirun: list[str]) -> None:
    program = "import test_debug as t; t.assert_alike(t.names_in_profiles('mpi'), 'JointTransport')"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    command = [*mpirun, "-n", "2", sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
