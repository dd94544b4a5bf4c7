"""`spawn`: results in order, failures with their cause, and nothing left behind."""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from abccl.collectives import bootstrap, launch
from abccl.collectives.launch import spawn
from abccl.errors import ArgumentError, DeadlineExceeded, PeerLost, RankFailed


def where() -> tuple[int, int]:
    own = bootstrap.find()
    return own.rank, own.size


def meet(word: bytes) -> list[list[bytes]]:
    own = bootstrap.find()
    rounds = [own.exchange(word * own.rank), own.exchange(bytes([own.rank]) * 200_000)]
    return [*rounds, bootstrap.find().exchange(b"")]


def last_first(lock: str) -> int:
    """Rank 0 returns when all others have returned and ended, and let go of their locks."""
    own = bootstrap.find()
    with open(f"{lock}{own.rank}", "w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        own.exchange(b"")
        if own.rank > 0:
            os.dup(mine.fileno())  # open, so locked, until the process ends
            return own.rank
    for rank in range(1, own.size):
        with open(f"{lock}{rank}") as theirs:
            fcntl.flock(theirs, fcntl.LOCK_EX)
    return own.rank


def environment(name: str) -> str | None:
    return os.environ.get(name)


def hang() -> None:
    threading.Event().wait()


def one_fails(how: str) -> None:
    """The last rank ends in some way; the others never would."""
    own = bootstrap.find()
    if own.rank != own.size - 1:
        hang()
    if how == "raise":
        raise KeyError("no such thing")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(how))


def consequence_first() -> None:
    """Rank 0 fails because rank 1 does, and is the first to report."""
    own = bootstrap.find()
    try:
        if own.rank == 0:
            raise PeerLost("rank 1 is gone")
        own.exchange(b"")
    except PeerLost as lost:
        if own.rank == 0:
            raise
        raise ZeroDivisionError("the true cause") from lost


def one_fails_and_the_others_meet(how: str) -> list[str]:
    """The last rank ends in some way, and the others hear so when they meet, again and again."""
    own = bootstrap.find()
    own.exchange(b"")
    if own.rank == own.size - 1:
        one_fails(how)
    words = []
    for _ in range(2):
        try:
            own.exchange(b"")
        except PeerLost as lost:
            words.append(str(lost))
    return words


def all_fail() -> None:
    raise ValueError(f"rank {bootstrap.find().rank}")


def returns_early() -> None:
    own = bootstrap.find()
    if own.rank > 0:
        own.exchange(b"")


def returns_a_lock() -> Any:
    return threading.Lock()


def dies_after_returning() -> str:
    import atexit

    atexit.register(os._exit, 5)
    return "done"


def exits(code: int) -> None:
    sys.exit(code)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """This file as a module that a new process can import. Afterwards no process and no file is left open."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("test_spawn")
    spawn(module.where, 1)  # what multiprocessing itself opens once
    before = sorted(os.listdir("/proc/self/fd"))
    yield module
    assert multiprocessing.active_children() == []
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_results_come_in_rank_order(work: ModuleType, ranks: int) -> None:
    assert spawn(work.where, ranks) == [(rank, ranks) for rank in range(ranks)]


def test_results_that_come_in_another_order(work: ModuleType, tmp_path: Path) -> None:
    assert spawn(work.last_first, 3, (str(tmp_path / "lock"),)) == [0, 1, 2]


def test_exchange(work: ModuleType, ranks: int) -> None:
    rounds = [[b"ab" * rank for rank in range(ranks)], [bytes([rank]) * 200_000 for rank in range(ranks)]]
    assert spawn(work.meet, ranks, (b"ab",)) == [[*rounds, [b""] * ranks]] * ranks


def test_fork_takes_any_function() -> None:
    # In a process of its own: this one may have threads.
    code = "from abccl.collectives.launch import spawn; print(spawn(lambda: 7, 2, start_method='fork'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[7, 7]\n"


def test_one_thread_for_each_rank_unless_told(work: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert spawn(work.environment, 2, ("OMP_NUM_THREADS",)) == ["1", "1"]
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert spawn(work.environment, 2, ("OMP_NUM_THREADS",)) == ["3", "3"]


def test_the_traceback_of_a_failing_rank(work: ModuleType, ranks: int) -> None:
    with pytest.raises(RankFailed) as caught:
        spawn(work.one_fails, ranks, ("raise",))
    message = str(caught.value)
    assert message.startswith(f"rank {ranks - 1} of {ranks} raised KeyError: 'no such thing'")
    assert 'raise KeyError("no such thing")' in message and "in one_fails" in message


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "rank 1 of 2 was ended by SIGKILL without returning"),
        ("3", "rank 1 of 2 exited with code 3 without returning"),
        ("0", "rank 1 of 2 exited with code 0 without returning"),
    ],
)
def test_a_rank_that_dies_is_named(work: ModuleType, how: str, words: str) -> None:
    with pytest.raises(RankFailed, match=words):
        spawn(work.one_fails, 2, (how,))


def test_sys_exit_is_not_returning(work: ModuleType) -> None:
    with pytest.raises(RankFailed, match="rank 0 of 1 exited with code 4 without returning"):
        spawn(work.exits, 1, (4,))


def test_a_death_after_returning_is_told(work: ModuleType) -> None:
    with pytest.raises(RankFailed, match="returned, and then exited with code 5"):
        spawn(work.dies_after_returning, 1)


def test_the_cause_comes_before_its_consequences(work: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 60.0)  # until rank 1 has ended, however busy the machine is
    with pytest.raises(RankFailed) as caught:
        spawn(work.consequence_first, 2)
    lines = str(caught.value).splitlines()
    assert lines[0] == "rank 1 of 2 raised ZeroDivisionError: the true cause"
    assert lines[-1] == "rank 0 of 2 raised abccl.errors.PeerLost: rank 1 is gone"


def test_an_exchange_that_can_not_be_ends_at_once(work: ModuleType) -> None:
    with pytest.raises(RankFailed, match="PeerLost: rank 1 of 2: rank 0 of 2 ended without calling"):
        spawn(work.returns_early, 2)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "rank 2 of 3 was ended by SIGKILL without returning"),
        ("0", "rank 2 of 3 exited with code 0 without returning"),
        ("raise", "rank 2 of 3 raised KeyError: 'no such thing'\n\nTraceback"),
    ],
)
def test_the_others_live_if_they_are_to(
    work: ModuleType, how: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "EXIT", 0.0)  # nobody is heard who has not returned
    *others, failed = spawn(work.one_fails_and_the_others_meet, 3, (how,), timeout=60, on_failure="continue")
    assert [len(told) for told in others] == [2, 2]
    for rank, told in enumerate(others):
        # The other survivor may have returned.
        wanted = rf"rank {rank} of 3: ranks? ({1 - rank}, )?2 of 3 ended without calling abccl.init\(\) so often"
        assert all(re.fullmatch(wanted, line) for line in told), told
    assert isinstance(failed, RankFailed) and str(failed).startswith(words)


def test_all_may_fail(work: ModuleType) -> None:
    failed = spawn(work.all_fail, 2, timeout=60, on_failure="continue")
    assert [str(error).splitlines()[0] for error in failed] == [
        f"rank {rank} of 2 raised ValueError: rank {rank}" for rank in range(2)
    ]


def test_a_death_after_returning_counts_where_the_others_live(work: ModuleType) -> None:
    (failed,) = spawn(work.dies_after_returning, 1, timeout=60, on_failure="continue")
    assert isinstance(failed, RankFailed) and "returned, and then exited with code 5" in str(failed)


def test_a_timeout_ends_those_who_live(work: ModuleType) -> None:
    with pytest.raises(DeadlineExceeded, match=r"ranks? 0(, 1)? of 2 had not returned after 1 s"):
        spawn(work.one_fails, 2, ("0",), timeout=1, on_failure="continue")


def test_what_to_do_on_failure_is_one_of_two() -> None:
    with pytest.raises(ArgumentError, match='on_failure is "end" or "continue", and not \'stop\''):
        spawn(hang, 1, on_failure="stop")  # type: ignore[call-overload]


def test_a_timeout_names_who_is_late(work: ModuleType) -> None:
    with pytest.raises(DeadlineExceeded, match=r"ranks 0, 1 of 2 had not returned after 0.01 s"):
        spawn(work.hang, 2, timeout=0.01)


def test_a_result_that_can_not_be_sent(work: ModuleType) -> None:
    with pytest.raises(RankFailed, match="rank 0 returned a lock, which can not be sent to the parent"):
        spawn(work.returns_a_lock, 1)


def test_what_can_not_be_taken_to_a_new_process(work: ModuleType) -> None:
    with pytest.raises(ArgumentError, match=r"can not be taken to a new process.*top level of a module"):
        spawn(lambda: 1, 2)
    with pytest.raises(ArgumentError, match=r"can not be taken to a new process.*arguments that pickle"):
        spawn(work.where, 2, (threading.Lock(),))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None,), "wants a function"),
        ((hang, 0), "at least one rank"),
        ((hang, "2"), "at least one rank"),
        ((hang, 1.5), "at least one rank"),
        ((hang, 1, 5), r"as a tuple, and got 5: write args=\(5,\)"),
        ((hang, 1, "ab"), r"write args=\('ab',\)"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        spawn(*arguments)


@pytest.mark.parametrize("timeout", ["x", "5", 0, -1, float("nan"), float("inf")])
def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(ArgumentError, match="positive number of seconds, or None, and got timeout="):
        spawn(hang, 1, timeout=timeout)


def test_numbers_may_be_numpys(work: ModuleType) -> None:
    assert spawn(work.where, np.int64(2), timeout=np.float32(60)) == [(0, 2), (1, 2)]  # type: ignore[arg-type]


def test_four_ranks_unless_told(work: ModuleType) -> None:
    assert spawn(work.where) == [(rank, 4) for rank in range(4)]


def test_an_unknown_start_method_brings_those_there_are() -> None:
    with pytest.raises(ArgumentError, match=r"no start method 'thread': there are .*spawn"):
        spawn(hang, start_method="thread")


def test_a_program_from_stdin_is_told_to_have_a_file() -> None:
    program = "from abccl.collectives.launch import spawn\ndef f(): pass\nspawn(f, 2)\n"
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True)
    assert "can not import 'f': the program that defines it has no file" in done.stderr


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from abccl.collectives.launch import spawn\ndef f(): pass\nspawn(f, 2)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert "before it began" in done.stderr and 'under `if __name__ == "__main__":`' in done.stderr


WAITING = """
import threading
from abccl.collectives.launch import spawn
def f():
    print("here", flush=True)
    threading.Event().wait()
if __name__ == "__main__":
    spawn(f, 2)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_ranks_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(WAITING)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == [b"here\n"] * 2
        parent.send_signal(how)
        _, error = parent.communicate(timeout=60)  # returns when the last holder of the pipes, parent or rank, is gone
        assert parent.returncode == -how
        if how == signal.SIGINT:
            assert error.count(b"Traceback") == 1 and error.rstrip().endswith(b"KeyboardInterrupt")
