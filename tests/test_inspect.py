"""`abccl inspect` and SIGUSR1: who holds up whom, from what ranks have recorded and from jobs that run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from flight_records import RING, message, operation, peer, snapshot, step, waiting

import abccl
from abccl.collectives.hang_report import duration, report
from abccl.tools import inspect as command
from abccl.tools.cli import main

BROADCAST = "broadcast(float32, 10 elements, root 0, binomial)"
BEFORE = operation(16, 6.0, 4.2, BROADCAST, bytes=40)


def inside(rank: int, size: int = 4, number: int = 17, since: float = 4.1, **other: Any) -> dict[str, Any]:
    """A rank that waits for the one before it."""
    before = (rank - 1) % size
    wait = waiting(number, since - 0.1, before, f"waits at step {rank + 1} for block {rank} from rank {before}")
    return snapshot(rank, [BEFORE, operation(number, since)], size, waiting=wait, **other)


def outside(rank: int, size: int = 4, **other: Any) -> dict[str, Any]:
    """A rank that has done what came before."""
    return snapshot(rank, [BEFORE], size, **other)


def conclusion(*snapshots: Any) -> str:
    """The first line, without the group."""
    head, _, told = report(snapshots).splitlines()[0].partition(": ")
    assert head == f'group "default", {snapshots[0]["size"]} ranks'
    return told


def test_a_rank_that_does_not_come_is_named_first() -> None:
    assert report([inside(0), outside(1), inside(2), inside(3)]).splitlines() == [
        'group "default", 4 ranks: rank 1 (process 4711) has not entered all_reduce #17 (ring, float32, 4 MiB): its '
        "last was broadcast #16, finished 4.2 s ago; ranks 0, 2-3 wait for it",
        "  ranks 0, 2-3 (processes 4710, 4712-4713): in all_reduce #17 (ring, float32, 4 MiB) for 4.1 s",
        "    rank 2 waits at step 3 for block 2 from rank 1, for 4.0 s",
        "    rank 0 waits at step 1 for block 0 from rank 3, for 4.0 s",
        "    rank 3 waits at step 4 for block 3 from rank 2, for 4.0 s",
        "  rank 1 (process 4711): in no call; the last was broadcast #16 (binomial, float32, 40 B), finished 4.2 s ago",
    ]


def test_64_ranks_are_a_few_lines() -> None:
    lines = report([outside(7, 64), *(inside(rank, 64) for rank in range(64) if rank != 7)]).splitlines()
    assert len(lines) == 8
    assert "rank 7 (process 4717) has not entered" in lines[0] and "ranks 0-6, 8-63 wait for it" in lines[0]
    assert lines[2].startswith("    rank 8 waits at step 9 for block 8 from rank 7"), "who waits for 7 comes first"
    spread = [snapshot(rank, size=64, pid=7 * rank + 1) for rank in range(64)]
    assert "ranks 0-63 (64 processes from 1 to 442): " in report(spread)
    assert lines[6] == "    and 59 more wait for ranks 2-5, 8-62"


def test_several_that_do_not_come() -> None:
    early = snapshot(3, [operation(12, 9.0, 8.0)])
    assert conclusion(inside(0), outside(1), inside(2), early) == (
        "ranks 1, 3 (processes 4711, 4713) have not entered all_reduce #17 (ring, float32, 4 MiB): rank 3 is farthest "
        "back, its last was all_reduce #12, finished 8.0 s ago; ranks 0, 2 wait for them"
    )


def test_what_keeps_a_rank_away() -> None:
    """It is in a message, in another communicator, has closed this one, or has done nothing at all."""
    told = conclusion(inside(0), outside(1, messages=[message("recv", 3, 4.0), message("send", 3, 9.0, 8.0)]))
    assert "finished 4.2 s ago, it waits in recv from rank 3 (tag 0, 8 B), for 4.0 s; rank 0 waits for it" in told
    elsewhere = snapshot(0, [operation(3, 5.0)], 2, group="tp", token=78, pid=4711)
    assert 'it is in all_reduce #3 (ring, float32, 4 MiB) of group "tp" for 5.0 s' in conclusion(
        inside(0), outside(1), elsewhere
    )
    assert "tp" not in conclusion(inside(0), outside(1), elsewhere | {"host": "b"})
    assert "it has closed the communicator, its last was broadcast #16" in conclusion(
        inside(0), outside(1, closed=True)
    )
    assert ": it has called nothing; rank 0 waits for it" in conclusion(inside(0), snapshot(1))


def test_who_is_still_in_the_call_before_holds_up_those_in_the_next() -> None:
    """Rank 0 has gone on to #18; the others are in #17, where rank 2 has not come."""
    told = conclusion(inside(0, number=18, since=3.0), inside(1), outside(2), inside(3))
    assert told.startswith("rank 2 (process 4712) has not entered all_reduce #17")
    assert told.endswith("ranks 1, 3 wait for it")


def test_all_are_in_the_call() -> None:
    assert conclusion(*(inside(rank) for rank in range(4))) == (
        "all 4 ranks have entered all_reduce #17 (ring, float32, 4 MiB); rank 0 waits at step 1 for block 0 from rank 3"
    )
    busy = snapshot(2, [BEFORE, operation(17, 4.1)])
    assert conclusion(inside(0), inside(1), busy, inside(3)) == (
        "all 4 ranks have entered all_reduce #17 (ring, float32, 4 MiB); rank 2 (process 4712) waits for nobody there, "
        "for 4.1 s: it computes, or does not run"
    )
    assert conclusion(inside(0), inside(1), inside(3)).startswith("ranks 0-1, 3, all that are here, have entered")


def test_a_rank_of_another_host_is_told_of_by_those_here() -> None:
    here = [inside(rank, 8) for rank in range(4)]
    assert "  ranks 4-7: on another host, closed or ended" in report(here)
    here[0]["waiting"] |= {"note": "rank 7, on another host (b), is in it too"}
    here[1]["waiting"] |= {"note": "rank 7, on another host (b), has not entered #17"}
    assert conclusion(*here) == (
        "in all_reduce #17 (ring, float32, 4 MiB), rank 1 waits at step 2 for block 1 from rank 0; rank 7, on another "
        "host (b), has not entered #17"
    )


def test_different_calls() -> None:
    other = snapshot(2, [BEFORE, operation(17, 4.0, call="barrier(direct)")])
    assert conclusion(inside(0), inside(1), other, inside(3)) == (
        f"different calls as #17: ranks 0-1, 3 (processes 4710-4711, 4713) called {RING}; rank 2 (process 4712) called "
        "barrier(direct)"
    )
    exchanges = [
        snapshot(rank, [operation(1, 1.0, call=f"all_to_all(int8, sends {rank} 2, receives 1 2, pairwise)")], 2)
        for rank in range(2)
    ]
    assert "different" not in conclusion(*exchanges), "ranks need not exchange the same sizes"


def test_errors() -> None:
    """The cause comes before its consequences, and what was said once is not repeated."""
    lost = "PeerLost: rank 1 ended (process 4711)"
    lines = report(
        [
            outside(0, error="Aborted: rank 3 gave up"),
            outside(2, error=lost, peers=[peer(1, 16, 16, gone=True)]),
            outside(3, error=lost),
        ]
    ).splitlines()
    assert lines == [
        f'group "default", 4 ranks: broken; ranks 2-3: {lost}',
        "  rank 0 (process 4710): broken; the last was broadcast #16 (binomial, float32, 40 B), finished 4.2 s ago",
        "    rank 0: Aborted: rank 3 gave up",
        "  ranks 2-3 (processes 4712-4713): broken; the last was broadcast #16 (binomial, float32, 40 B), finished 4.2 "
        "s ago",
        "  rank 1: ended",
    ]


def test_a_rank_that_has_ended() -> None:
    gone = [peer(1, 16, 16, gone=True), peer(3, 17, 16)]
    lines = report([inside(0, peers=gone), inside(2, peers=gone)]).splitlines()
    assert lines[0].endswith("rank 1 (process 4711) has ended; ranks 0, 2 in all_reduce #17 (ring, float32, 4 MiB)")
    assert lines[-2:] == ["  rank 1: ended", "  rank 3: has entered #17, finished #16, as others see it"]


def test_nothing_is_wrong() -> None:
    assert conclusion(outside(0), outside(1)) == (
        "nothing is under way; the last was broadcast #16 (binomial, float32, 40 B), finished 4.2 s ago"
    )
    assert conclusion(snapshot(0), snapshot(1)) == "no collective was called yet"
    moving = [snapshot(rank, [operation(16 + rank, 0.2, 0.001)]) for rank in range(4)]
    assert conclusion(*moving) == "moves on, at #16 to #19: all_reduce #19 (ring, float32, 4 MiB)"
    assert len(report(moving).splitlines()) == 2
    assert conclusion(snapshot(0, [operation(5, 0.01)]), outside(1)).startswith("moves on, at #5 to #16")
    assert report([]) == report([outside(0, closed=True)]) == "no communicator is open"


def test_a_long_collective_whose_steps_go_on_is_not_stuck() -> None:
    steps = [step(17, 1, 2.0), step(17, 2, 0.01)]
    assert conclusion(*(inside(rank, steps=steps) for rank in range(4))) == (
        "moves on, at #17: all_reduce #17 (ring, float32, 4 MiB), for 4.1 s so far"
    )
    assert conclusion(*(inside(rank, steps=steps[:1]) for rank in range(4))).startswith("all 4 ranks have entered")


def test_messages_alone() -> None:
    told = report([outside(0, messages=[message("recv", None, 2.5, tag=None)]), outside(1)])
    assert "no collective is under way, and 1 message: rank 0 recv from any rank (any tag, 8 B), for 2.5 s" in told
    assert "\n    rank 0: recv from any rank (any tag, 8 B), for 2.5 s" in told
    assert "message" not in report([outside(0, messages=[message("recv", 1, 0.01)]), outside(1)]), "it has just begun"


def test_communicators_have_paragraphs() -> None:
    told = report([inside(0), outside(1), outside(0, 2, group="tp", token=5)])
    assert [text.splitlines()[0].partition(":")[0] for text in told.split("\n\n")] == [
        'group "default", 4 ranks',
        'group "tp", 2 ranks',
    ]
    threads = [outside(rank, 2, group="", token=0, pid=pid) for pid in (1, 2) for rank in (0, 1)]
    assert report(threads).count("ranks that are still meeting, 2 ranks: nothing is under way") == 2


def test_durations() -> None:
    assert [duration(seconds) for seconds in (-1e-6, 0.0349, 0.9996, 4.24, 119.0, 121.0, 7300.0)] == [
        "0 ms",
        "35 ms",
        "1.0 s",
        "4.2 s",
        "119.0 s",
        "2 min",
        "2.0 h",
    ]


# ---- the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)], prog_name="abccl")


def test_a_process_that_has_no_communicator() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        result = run(other.pid)
        assert other.stdin is not None
        other.stdin.close()
    assert result.exit_code == 1
    assert f"process {other.pid} has no communicator of abccl now: `abccl inspect` lists" in result.output
    gone = run(other.pid)
    assert gone.exit_code == 1 and f"there is no process {other.pid} on this machine" in gone.output


def test_watch_draws_again_until_the_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = [[inside(0), outside(1)], [outside(0), outside(1)]]

    def together(pid: int) -> Any:
        if not reads:
            raise abccl.ArgumentError("gone")
        return reads.pop(0)

    monkeypatch.setattr(command, "together", together)
    output = run(4711, "--watch", "0.05").output
    assert (
        output.index("has not entered") < output.index("nothing is under way") < output.index("process 4711 has ended")
    )
    assert "leave out --json" in run(4711, "--watch", "1", "--json").output


# ---- a job that runs


def stands_still(folder: str) -> float:
    """Rank 1 does not come before it is told to."""
    own = Path(folder)
    communicator = abccl.init()
    x = np.ones(1 << 16, np.float32)
    communicator.broadcast(x)
    (own / f"{communicator.rank}").write_text(f"{os.getpid()}")
    if communicator.rank == 1:
        with open(own / "go") as gate:  # a pipe: until somebody has written
            gate.read()
    communicator.all_reduce(x)
    return float(x[0])


def expect(pattern: str, pids: list[int]) -> str:
    """What `abccl inspect` prints once it is so."""
    for _ in range(600):
        told = run(pids[0]).output
        if pattern in told:
            return told
        time.sleep(0.05)
    raise AssertionError(told)


@pytest.fixture
def job(tmp_path: Path, here: ModuleType) -> Any:
    """Three ranks of which one does not come: the process that started them, and theirs."""
    os.mkfifo(tmp_path / "go")
    script = (
        f"import sys; sys.path.insert(0, {str(Path(here.__file__ or '').parent)!r})\n"
        "import abccl, test_inspect\n"
        "if __name__ == '__main__':\n"
        f"    print(abccl.spawn(test_inspect.stands_still, 3, ({str(tmp_path)!r},), timeout=100))"
    )
    (tmp_path / "job.py").write_text(script)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, tmp_path / "job.py"], stdout=pipe, stderr=pipe, text=True) as parent:
        try:
            files = [tmp_path / str(rank) for rank in range(3)]
            for _ in range(600):
                if all(file.exists() and file.read_text() for file in files):
                    break
                assert parent.poll() is None, parent.communicate()
                time.sleep(0.05)
            yield parent, [int(file.read_text()) for file in files], tmp_path / "go"
        finally:
            parent.terminate()


def test_a_running_job_tells_who_is_missing_and_goes_on(job: Any) -> None:
    parent, pids, gate = job
    told = expect("ranks 0, 2 wait for it", pids)
    head = f'group "default", 3 ranks: rank 1 (process {pids[1]}) has not entered all_reduce #2 ('
    assert told.startswith(head) and ", float32, 256 KiB): its last was broadcast #1, finished " in told
    assert f"\n  ranks 0, 2 (processes {pids[0]}" in told and " waits at step " in told and " from rank 1, for " in told
    assert f"\n  rank 1 (process {pids[1]}): in no call; the last was broadcast #1" in told
    assert head in run().output, "it is among all of this user's"
    data = json.loads(run(pids[2], "--json").output)
    assert sorted((one["rank"], one["pid"], one["entered"]) for one in data) == [
        (rank, pid, entered) for rank, pid, entered in zip(range(3), pids, (2, 1, 2))
    ]
    for pid in pids[:2]:  # one that waits in the native core, one that waits in Python
        os.kill(pid, signal.SIGUSR1)
    lines = []
    while sum("has not entered all_reduce #2" in line for line in lines) < 2:
        lines.append(parent.stderr.readline())
        assert lines[-1].startswith("abccl: "), lines
    gate.write_text("go")
    output, _ = parent.communicate(timeout=60)
    assert output == "[3.0, 3.0, 3.0]\n" and parent.returncode == 0
