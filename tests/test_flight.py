"""The flight recorder's readers: whose memory is read, calls in words, dumps and where they go, the signal."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flight_records import operation, snapshot

import abccl
from abccl.collectives import flight
from abccl.collectives.communicator import Communicator
from abccl.errors import Aborted, ArgumentError, TransportError
from abccl.transports import _native, inproc
from abccl.transports.flight import CallText, parse_call, running, snapshots
from abccl.transports.shm import shm_threads

# ---- calls in words

CALLS = {
    "all_reduce(float32, sum, 1048576 elements, ring)": ("all_reduce", "float32", "sum", 1048576, None, "ring"),
    "all_reduce(float32, reproducible premul_sum 0.5, 7 elements, knomial(radix=8))": (
        "all_reduce",
        "float32",
        "reproducible premul_sum 0.5",
        7,
        None,
        "knomial(radix=8)",
    ),
    "reduce(int8, max, 3 elements, root 2, hierarchical(a=1, b=2))": (
        "reduce",
        "int8",
        "max",
        3,
        2,
        "hierarchical(a=1, b=2)",
    ),
    "broadcast(bool, 1 elements, root 0, tree)": ("broadcast", "bool", None, 1, 0, "tree"),
    "all_gather(int64, 6 elements in parts 1 2 3, native)": ("all_gather", "int64", None, 6, None, "native"),
    "all_to_all(float64, sends 1 2, receives 2 1, pairwise)": ("all_to_all", "float64", None, None, None, "pairwise"),
    "barrier(dissemination)": ("barrier", None, None, None, None, "dissemination"),
}


@pytest.mark.parametrize(("text", "words"), CALLS.items())
def test_a_call_is_read_as_it_is_written(text: str, words: tuple[Any, ...]) -> None:
    call = parse_call(text)
    assert (call.kind, call.dtype, call.op, call.elements, call.root, call.algorithm) == words
    assert str(call) == text


def test_of_words_that_are_cut_off_there_is_what_there_is() -> None:
    assert parse_call("") == CallText("", None, None, None, None, "")
    assert parse_call("something") == CallText("something", None, None, None, None, "")
    assert parse_call("reduce(float32, sum, 12 elem")[:3] == ("reduce", "float32", "sum")


def test_the_library_s_own_words_are_read(ranks: int) -> None:
    """What `Binder` writes of real calls."""

    def calls(communicator: Communicator) -> None:
        x, whole = np.ones(4, np.float32), np.ones(4 * ranks, np.float32)
        communicator.all_reduce(x, "max", algorithm="ring")
        communicator.all_gather(whole, x)
        communicator.reduce(x, root=ranks - 1)
        communicator.all_to_all(whole.copy(), whole)
        communicator.barrier()

    communicators = in_threads(ranks, calls)
    found = [parse_call(one["call"]) for one in communicators[0].flight_record()["operations"]]
    assert [call.kind for call in found] == ["all_reduce", "all_gather", "reduce", "all_to_all", "barrier"]
    assert found[0][1:] == ("float32", "max", "4 elements", None, "ring")
    assert [(call.dtype, call.elements, call.root) for call in found[1:3]] == [
        ("float32", 4, None),
        ("float32", 4, ranks - 1),
    ]
    assert (found[3].dtype, found[3].op, found[4].dtype) == ("float32", None, None)
    assert all(call.algorithm for call in found)


def in_threads(ranks: int, body: Any, make: Any = shm_threads) -> list[Communicator]:
    """Communicators of a new group whose ranks are threads, after each has run the body."""
    communicators = [Communicator(transport) for transport in make(ranks)]
    threads = [threading.Thread(target=body, args=(one,)) for one in communicators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return communicators


# ---- whose memory is read


def test_the_recorders_of_a_process() -> None:
    communicators = in_threads(2, lambda one: one.barrier())
    mine = [one for one in snapshots(os.getpid()) if one["operations"]]
    assert {(one["rank"], one["size"], one["pid"]) for one in mine} >= {(0, 2, os.getpid()), (1, 2, os.getpid())}
    assert os.getpid() in running()
    del communicators


def child(pipe: Any) -> None:
    pipe.send(None)
    pipe.recv()


def test_a_forked_child_has_its_parents_memory_but_no_communicator() -> None:
    communicators = in_threads(2, lambda one: one.barrier())
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    try:
        ours.recv()
        assert process.pid is not None
        with pytest.raises(ArgumentError, match="has no communicator of abccl now"):
            snapshots(process.pid)
        assert process.pid not in running()
    finally:
        ours.send(None)
        process.join()
    del communicators


def test_other_memory_of_that_name_is_left_out() -> None:
    communicators = in_threads(2, lambda one: one.barrier())
    before = len(snapshots(os.getpid()))
    others = [_native.Region.create(size) for size in (1 << 12, 1 << 24)]  # too small for a recorder, and without one
    assert len(snapshots(os.getpid())) == before >= 2
    del communicators, others


def test_processes_that_can_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="there is no process 4194305 on this machine"):
        snapshots(4194305)  # above the greatest that Linux gives

    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(TransportError, match="may not be looked into: a security module or a container's policy"):
        snapshots(os.getpid())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(TransportError, match=r"belongs to user \w+: only that user and root can look into it"):
        snapshots(os.getpid())


def test_only_processes_of_this_user_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    communicators = in_threads(2, lambda one: one.barrier())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert running() == []
    del communicators


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_told_whose_it_is() -> None:
    script = (
        "import os, sys\n"
        "from abccl.transports.flight import running, snapshots\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "assert int(sys.argv[1]) not in running()\n"
        "try: snapshots(int(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    communicators = in_threads(2, lambda one: one.barrier())
    done = subprocess.run([sys.executable, "-c", script, str(os.getpid())], capture_output=True, text=True)
    assert done.stdout.startswith(f"TransportError process {os.getpid()} belongs to user root: "), done
    del communicators


# ---- where dumps go


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(flight.FOLDER, str(tmp_path / "records"))
    return tmp_path / "records"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default folder is made."""
    monkeypatch.delenv(flight.FOLDER, raising=False)
    monkeypatch.setattr(flight.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"abccl-{os.geteuid()}"


def test_the_default_folder_is_this_user_s_alone(temporary: Path) -> None:
    assert flight.home() == temporary and stat.S_IMODE(temporary.stat().st_mode) == 0o700
    assert flight.home() == temporary, "a second time"


@pytest.mark.parametrize("what", ["link", "file", "open to others"])
def test_a_default_folder_that_others_may_have_made_is_refused(temporary: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if what == "link":
        temporary.symlink_to(tmp_path / "elsewhere")
    elif what == "file":
        temporary.touch(0o600)
    else:
        temporary.mkdir()
        temporary.chmod(0o755)
    with pytest.raises(ArgumentError, match=f"{temporary} is not a folder that this user alone may use: set ABCCL_"):
        flight.home()


def test_a_default_folder_of_another_user_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary.mkdir(mode=0o700)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    temporary.rename(temporary.with_name(f"abccl-{other}"))
    with pytest.raises(ArgumentError, match="is not a folder that this user alone may use"):
        flight.home()


def test_dumps_are_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(flight.FOLDER, "off")
    assert flight.home() is None
    (communicator, *_) = communicators = in_threads(2, lambda one: one.barrier())
    with pytest.raises(ArgumentError, match="ABCCL_FLIGHT_DIR is off: pass the path of a file"):
        flight.dump(communicator)
    assert json.loads(flight.dump(communicator, tmp_path / "mine.json").read_text())["entered"] == 1
    del communicators


def test_on_demand(folder: Path) -> None:
    communicators = in_threads(2, lambda one: one.all_reduce(np.ones(3)))
    files = [flight.dump(one) for one in communicators]
    assert files == [files[0].with_name("rank-0.json"), files[0].with_name("rank-1.json")]
    assert files[0].parent.parent == folder
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    record = json.loads(files[0].read_text())
    assert record["operations"][0]["call"].startswith("all_reduce(float64, sum, 3 elements, ")
    assert record["host"] and [peer["rank"] for peer in record["peers"]] == [1]
    assert flight.dump(communicators[0]) == files[0], "again"
    assert sorted(os.listdir(files[0].parent)) == ["rank-0.json", "rank-1.json"], "no parts are left"


def test_a_dump_that_can_not_be_written(folder: Path, tmp_path: Path) -> None:
    (communicator, *_) = communicators = in_threads(2, lambda one: one.barrier())
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="the flight record can not be written to .*mine.json: "):
        flight.dump(communicator, tmp_path / "file" / "mine.json")
    del communicators


def test_over_a_transport_of_verbs(folder: Path) -> None:
    """Its engine is Python's, and so is who tells the recorder."""
    communicators = in_threads(2, lambda one: one.all_reduce(np.ones(3)), inproc)
    (found,) = communicators[1].flight_record()["operations"]
    assert found["call"].startswith("all_reduce(float64, sum, 3 elements, ") and found["state"] == "finished"
    file = flight.dump(communicators[1])
    assert file.parent.name == f"unnamed-{os.getpid():016x}"
    assert json.loads(file.read_text())["operations"][0]["call"] == found["call"]


# ---- dumps of failures


class Failing:
    """In the place of the native core's communicator."""

    def __init__(self, rank: int, token: int = 77, **other: Any) -> None:
        self.snapshot = snapshot(rank, [operation(1, 2.0, 1.0)], token=token, error="PeerLost: gone", **other)

    def flight(self) -> dict[str, Any]:
        return self.snapshot


def test_the_first_rank_says_where_the_records_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (2, 0, 3):
        flight._dump_failure(Failing(rank, group="tp/../x"))
    (only,) = folder.iterdir()
    assert only.name == "tp_.._x-000000000000004d-failed"
    assert sorted(os.listdir(only)) == ["rank-0.json", "rank-2.json", "rank-3.json"]
    assert capsys.readouterr().err == f'abccl: flight records of group "tp/../x" in {only}: abccl trace {only}\n'


def test_old_records_go_and_nothing_else_does(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine").mkdir()
    (folder / "mine" / "rank-0.json").write_text("")
    kept_for_its_file = folder / "default-00000000000003e7-failed"
    kept_for_its_file.mkdir()
    (kept_for_its_file / "notes.txt").write_text("")
    os.utime(kept_for_its_file, (0, 0))
    for token in range(1, flight.KEPT + 4):
        flight._dump_failure(Failing(0, token))
        os.utime(folder / f"default-{token:016x}-failed", (1000 + token, 1000 + token))
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted(
        ["mine", kept_for_its_file.name, *(f"default-{token:016x}-failed" for token in range(4, flight.KEPT + 4))]
    )
    assert os.listdir(kept_for_its_file) == ["notes.txt"] and os.listdir(folder / "mine") == ["rank-0.json"]


def test_records_that_can_not_be_written_are_told_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_text("")
    flight._loudly(flight._dump_failure, Failing(0))
    assert capsys.readouterr().err.startswith(f"abccl: flight records are not written: {folder} is not a folder")


def test_a_failure_is_dumped_by_the_thread(folder: Path) -> None:
    communicators = in_threads(3, lambda one: one.barrier())
    communicators[1].abort("enough")
    for one in communicators:
        with pytest.raises(Aborted):
            one.barrier()
    flight._finish()
    (only,) = folder.iterdir()
    assert sorted(os.listdir(only)) == ["rank-0.json", "rank-1.json", "rank-2.json"]
    assert {json.loads(file.read_text())["error"] for file in only.iterdir()} == {"Aborted: rank 1: enough"}


def test_the_recorder_does_not_keep_a_communicator_alive() -> None:
    communicators = in_threads(2, lambda one: one.barrier())
    natives = [weakref.ref(one._native) for one in communicators]
    communicators.clear()
    gc.collect()
    assert [native() for native in natives] == [None, None]


def fails(folder: str) -> None:
    """Rank 1 is killed; the others raise and end at once."""
    os.environ[flight.FOLDER] = folder
    communicator = abccl.init()
    communicator.barrier()
    if communicator.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    communicator.all_reduce(np.ones(4))


def test_ranks_that_raise_and_end_have_left_their_records(here: ModuleType, tmp_path: Path) -> None:
    results = abccl.spawn(here.fails, 3, (str(tmp_path),), timeout=60, on_failure="continue")
    assert [type(result) for result in results] == [abccl.RankFailed] * 3
    (only,) = tmp_path.iterdir()
    records = [json.loads((only / f"rank-{rank}.json").read_text()) for rank in (0, 2)]
    assert all(one["error"].startswith("PeerLost: rank 1 ") for one in records)
    # Who hears of it before it enters the call has none that failed.
    states = [one["operations"][-1]["state"] for one in records]
    assert "failed" in states and set(states) <= {"failed", "finished"}
    assert not (only / "rank-1.json").exists()


# ---- the signal


@pytest.mark.parametrize(
    ("asked", "number"), [("", signal.SIGUSR1), ("USR2", signal.SIGUSR2), ("SIGHUP", 1), ("12", 12), ("none", None)]
)
def test_which_signal(monkeypatch: pytest.MonkeyPatch, asked: str, number: int | None) -> None:
    monkeypatch.setenv(flight.SIGNAL, asked)
    assert flight.signal_number() == number


@pytest.mark.parametrize("asked", ["KILL", "SIGSTOP", "9", "0", "99", "usr1", "SIG", "-1"])
def test_what_is_no_signal(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv(flight.SIGNAL, asked)
    with pytest.raises(ArgumentError, match=f"ABCCL_SIGNAL='{asked}': wanted is a signal that can be handled"):
        flight.signal_number()


SIGNALLED = """
import os, signal, sys, time
{before}
from abccl.collectives import flight
from abccl.collectives.communicator import Communicator
from abccl.transports.shm import shm_threads
communicators = [Communicator(transport) for transport in shm_threads(2)]
os.kill(os.getpid(), signal.{signal})
sys.stdin.read()
"""


def signalled(signal: str = "SIGUSR1", before: str = "", **environment: str) -> tuple[str, int]:
    """The first line that a process with a communicator says when the signal comes, and how it ends."""
    script = SIGNALLED.format(signal=signal, before=before)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=pipe, stderr=pipe, text=True, env=os.environ | environment
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.communicate("")
        return line, process.returncode


def test_a_signal_has_the_process_report() -> None:
    line, code = signalled()
    assert line == "abccl: ranks that are still meeting, 2 ranks: no collective was called yet\n" and code == 0


def test_another_signal_or_none() -> None:
    assert signalled("SIGUSR2", ABCCL_SIGNAL="USR2")[0].startswith("abccl: ranks that are still meeting, ")
    assert signalled(ABCCL_SIGNAL="none") == ("", -signal.SIGUSR1), "what the system does with it"


def test_the_program_s_own_handler_stays() -> None:
    own = "signal.signal(signal.SIGUSR1, lambda *_: print('mine', file=sys.stderr, flush=True))"
    assert signalled(before=own) == ("mine\n", 0)
