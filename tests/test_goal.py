"""Schedules in GOAL: what is written, and that LogGP, applied to it, comes to what the simulator says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner

from abccl.algorithms import Collective, algorithms, counts, lookup
from abccl.algorithms.simulator import Level, Rank, Topology, simulate
from abccl.errors import ArgumentError
from abccl.tools.goal import CPUS, goal
from abccl.tools.loggopsim import command

RANKS, NBYTES = 8, 8 * 4096
IN_TURN = [
    (Collective.ALL_REDUCE, "ring"),
    (Collective.ALL_REDUCE, "recursive_doubling"),
    (Collective.ALL_TO_ALL, "pairwise"),
    (Collective.BROADCAST, "direct"),
    (Collective.GATHER, "direct"),
]
"""Schedules whose ranks send a message, wait for one, and go on; or only send, or only receive."""

OTHERS = [
    *((Collective.ALL_REDUCE, name) for name in ("tree", "double_tree", "rabenseifner", "two_shot", "direct")),
    *((Collective.BROADCAST, name) for name in ("chain", "tree", "scatter_all_gather")),
    (Collective.ALL_TO_ALL, "bruck"),
    (Collective.ALL_GATHER, "ring"),
]
"""Other schedules: a rank may send while it receives, which takes no time where the overhead is 0."""

CUTS = [(None, 1, 1), (1024, 1, 1), (1024, 3, 0)]
"""Longest message, lanes, processors."""

OPERATION = re.compile(r"(l\d+): (?:(send|recv) (\d+)b (to|from) (\d+) tag (\d+)|calc (\d+))(?: cpu (\d+))?")


class Operation:
    """A line of GOAL, and the operations that it requires."""

    def __init__(self, rank: int, kind: str, amount: int, peer: int, tag: int, cpu: int) -> None:
        self.rank, self.kind, self.amount, self.peer, self.tag, self.cpu = rank, kind, amount, peer, tag, cpu
        self.requires: list[Operation] = []


def read(lines: Iterable[str]) -> list[list[Operation]]:
    """The operations of each rank. Whatever is no GOAL, or names what is not there yet, is an error."""
    first, *rest = "".join(lines).splitlines()
    ranks: list[list[Operation]] = []
    labels: dict[str, Operation] = {}
    for line in filter(None, rest):
        if line == f"rank {len(ranks)} {{":
            ranks.append([])
            labels.clear()
        elif found := OPERATION.fullmatch(line):
            label, kind, size, way, peer, tag, units, cpu = found.groups()
            assert label not in labels
            assert way == {"send": "to", "recv": "from", None: None}[kind]
            amount, peer, tag, cpu = int(size or units), int(peer or -1), int(tag or 0), int(cpu or 0)
            labels[label] = Operation(len(ranks) - 1, kind or "calc", amount, peer, tag, cpu)
            ranks[-1].append(labels[label])
        elif found := re.fullmatch(r"(l\d+) (i?)requires (l\d+)", line):
            operation, needed = labels[found[1]], labels[found[3]]
            assert not found[2] or operation.kind == needed.kind == "send"
            operation.requires.append(needed)
        else:
            assert line == "}"
    assert first == f"num_ranks {len(ranks)}"
    return ranks


def of_kind(ranks: list[list[Operation]], kind: str) -> list[Operation]:
    return [operation for rank in ranks for operation in rank if operation.kind == kind]


def sends_by_receive(ranks: list[list[Operation]]) -> dict[Operation, Operation]:
    """Of each receive the send that it matches, one to one."""
    sends = {(o.rank, o.peer, o.tag): o for o in of_kind(ranks, "send")}
    receives = {(o.peer, o.rank, o.tag): o for o in of_kind(ranks, "recv")}
    assert len(sends) == len(of_kind(ranks, "send"))
    assert len(receives) == len(of_kind(ranks, "recv"))
    assert sends.keys() == receives.keys()
    assert all((sends[key].amount, sends[key].cpu) == (receives[key].amount, receives[key].cpu) for key in sends)
    return {receive: sends[key] for key, receive in receives.items()}


def loggp(ranks: list[list[Operation]], latency: float, overhead: float, gap: float, unit: float) -> float:
    """Seconds until all is done, if every operation begins as soon as what it requires is done."""
    source = sends_by_receive(ranks)
    needs = {o: [*o.requires, *([source[o]] if o in source else [])] for rank in ranks for o in rank}
    left = {operation: len(needed) for operation, needed in needs.items()}
    follow: dict[Operation, list[Operation]] = {operation: [] for operation in needs}
    for operation, needed in needs.items():
        for other in needed:
            follow[other].append(operation)
    ready = [operation for operation, count in left.items() if not count]
    done: dict[Operation, float] = {}
    while ready:
        operation = ready.pop()
        begin = max((done[other] for other in operation.requires), default=0.0)
        if operation.kind == "recv":
            begin = max(begin, done[source[operation]] + latency + gap * operation.amount)
        done[operation] = begin + (operation.amount * unit if operation.kind == "calc" else overhead)
        for other in follow[operation]:
            left[other] -= 1
            if not left[other]:
                ready.append(other)
    assert len(done) == len(needs), "some operations wait for each other in a circle"
    return max(done.values())


@pytest.mark.parametrize(("segment", "lanes", "processors"), CUTS)
@pytest.mark.parametrize(
    ("collective", "name", "overhead"), [*((*one, 2e-6) for one in IN_TURN), *((*one, 0.0) for one in IN_TURN + OTHERS)]
)
def test_simulation(
    collective: Collective, name: str, overhead: float, segment: int | None, lanes: int, processors: int
) -> None:
    """Where nothing is shared, the simulator and LogGP on what was written come to the same time."""
    latency, gap, fold, unit = 5e-6, 1e-10, 4e-11, 1e-12
    network = Level("network", 0, alpha=latency, overhead=overhead, beta=gap)
    machine = Topology("LogGP", "", Rank(fold=fold, processors=processors), (network,))
    algorithm = lookup(collective, name)
    lines = goal(algorithm, RANKS, NBYTES, segment=segment, lanes=lanes, processors=processors, fold=fold, unit=unit)
    found = simulate(algorithm, RANKS, machine, NBYTES, segment=segment, lanes=lanes)
    assert loggp(read(lines), latency, overhead, gap, unit) == pytest.approx(found.seconds, rel=1e-9)


@pytest.mark.parametrize(("segment", "lanes", "processors"), CUTS)
@pytest.mark.parametrize(("collective", "name"), IN_TURN + OTHERS)
def test_counts(collective: Collective, name: str, segment: int | None, lanes: int, processors: int) -> None:
    """The busiest rank sends, and folds, what the algorithm declares; lanes keep to their cpu."""
    algorithm = lookup(collective, name)
    declared = counts(algorithm, RANKS)
    options = {"segment": segment, "lanes": lanes, "processors": processors}
    ranks = read(goal(algorithm, RANKS, NBYTES, **options, fold=3.0, unit=1.0))
    sent = [sum(o.amount for o in rank if o.kind == "send") for rank in ranks]
    folded = [sum(o.amount for o in rank if o.kind == "calc") for rank in ranks]
    assert max(sent) == declared.sent * NBYTES
    assert max(folded) == declared.folded * NBYTES * 3
    assert {o.cpu for rank in ranks for o in rank} == set(range(lanes if processors == 0 else 1))
    assert all(needed.cpu == o.cpu for rank in ranks for o in rank for needed in o.requires)


def test_text() -> None:
    """A small one, in full: two ranks fold, then send the sum on."""
    lines = goal(lookup(Collective.ALL_REDUCE, "ring"), 2, 256, fold=1e-9)
    assert "".join(lines) == GOLDEN


GOLDEN = """\
num_ranks 2

rank 0 {
l1: send 128b to 1 tag 0
l2: recv 128b from 1 tag 0
l3: calc 128
l3 requires l2
l4: send 128b to 1 tag 1
l4 requires l3
l4 irequires l1
l5: recv 128b from 1 tag 1
l5 requires l3
}

rank 1 {
l1: send 128b to 0 tag 0
l2: recv 128b from 0 tag 0
l3: calc 128
l3 requires l2
l4: send 128b to 0 tag 1
l4 requires l3
l4 irequires l1
l5: recv 128b from 0 tag 1
l5 requires l3
}
"""


@pytest.mark.parametrize("collective", Collective)
def test_all_algorithms(collective: Collective) -> None:
    """Every schedule can be written, and its messages match; the smallest have a byte."""
    for algorithm in algorithms(collective).values():
        if algorithm.refusal(RANKS) is None:
            ranks = read(goal(algorithm, RANKS, 3, root=3 if collective.rooted else 0, fold=1e-9))
            assert len(ranks) == RANKS
            assert all(o.amount >= 1 for rank in ranks for o in rank)
            assert loggp(ranks, 1.0, 1.0, 1.0, 1.0) > 2


def test_processors() -> None:
    """Lanes share the processors that there are."""
    ring = lookup(Collective.ALL_REDUCE, "ring")
    ranks = read(goal(ring, 4, 1 << 16, segment=1024, lanes=5, processors=2))
    assert {o.cpu for o in ranks[0]} == {0, 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lanes": 0}, "lanes from 1"),
        ({"unit": 0.0}, "a unit above 0"),
        ({"lanes": CPUS + 1, "processors": 0, "segment": 64}, "take fewer lanes"),
    ],
)
def test_errors(options: dict[str, int], words: str) -> None:
    """A refusal says what was wanted."""
    with pytest.raises(ArgumentError, match=words):
        list(goal(lookup(Collective.ALL_REDUCE, "direct"), 4, 1 << 20, **options))


@pytest.fixture
def programs(tmp_path: Path) -> Callable[[str], list[str]]:
    """Stand-ins of LogGOPSim, which says so much, and of txt2bin: the options that name them."""

    def write(said: str) -> list[str]:
        scripts = {"simulator": f"echo '{said}'", "txt2bin": 'cp "$2" "$4"'}
        for name, script in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
            (tmp_path / name).chmod(0o700)
        return [word for name in scripts for word in (f"--{name}", str(tmp_path / name))]

    return write


def test_comparison(programs: Callable[[str], list[str]], tmp_path: Path) -> None:
    """The document has the times of both, LogGOPSim's in its unit."""
    said = "PERFORMANCE: Processes: 4 Events: 72 Time: 0 s; Maximum finishing time at host 3: 66000000 (0.066 s)"
    document = tmp_path / "document.md"
    document.write_text("<!-- part: another-simulator -->\n<!-- end of another-simulator -->\n")
    options = [*programs(said), "--ranks", "4", "--fold", "0", "--write", str(document)]
    found = CliRunner().invoke(command, options)
    assert found.exit_code == 0, found.output
    text = document.read_text(encoding="utf-8")
    assert "| all_reduce ring | 4 | 66.00 / 33.00 | -50.00% |" in text
    assert str(tmp_path) not in text


def test_comparison_fails(programs: Callable[[str], list[str]]) -> None:
    """Messages that nobody received are an error, and LogGOPSim's words are shown."""
    found = CliRunner().invoke(command, programs("unexpected queue on host 0 contains 1 elements!"))
    assert found.exit_code == 2
    assert "did not end all messages: 'unexpected queue" in found.output
