"""From a plan to commands: which copies go together, what comes before what, and which messages are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from abccl.algorithms import Collective, lookup
from abccl.algorithms.plan import Instruction, Operand, Place, Plan, Skeleton
from abccl.transports.commands import ALIGNMENT, Command, Incoming, Outgoing, PlanCommands, StepWire, offsets
from abccl.transports.contract import Operation
from abccl.transports.types import NUMBERS, Op

INPUT, OUTPUT, SCRATCH, ARRIVED = 1 << 20, 2 << 20, 3 << 20, 4 << 20
"""Where things lie: far from each other."""

ITEMSIZE = 4
PEER = 1

Event = tuple[Any, ...]
"""What a command did: ("copy", piece), ("gather", *pieces), ("fold", to, sources, count), ("step", sends, receives)."""


class Recorder:
    """A runner with its driver, its kernels and its wire, whose commands note that they were enqueued."""

    def __init__(self) -> None:
        self.driver = self.kernels = self
        self.events: list[Event] = []

    def _noting(self, *event: Any) -> Command:
        return lambda stream: self.events.append(event)

    def scratch(self, nbytes: int) -> int:
        return SCRATCH

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        self.events.append(("copy", (destination, source, nbytes)))

    def gathering(self, pieces: Sequence[tuple[int, int, int]]) -> Command:
        return self._noting("gather", *pieces)

    def folding(self, dtype: str, op: int, destination: int, sources: Sequence[int], count: int) -> Command:
        return self._noting("fold", destination, tuple(sources), count)

    def scaling(self, dtype: str, destination: int, source: int, factor: float, count: int) -> Command:
        return self._noting("scale", destination, source, count)

    def tick(self, address: int, stream: int) -> None:
        raise AssertionError("no plan does that")


class Wire(StepWire):
    """One lane, whose messages arrive one behind the other at ARRIVED."""

    lanes = 1

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def compile(self, lane: int) -> Wire:
        return self

    def step(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> tuple[list[Command], list[int]]:
        starts = np.cumsum([0, *(offsets(receive.sizes)[-1] for receive in receives)])[:-1]
        return [self._recorder._noting("step", list(sends), list(receives))], [ARRIVED + int(n) for n in starts]

    def release(self) -> list[Command]:
        return [self._recorder._noting("release")]

    def finish(self) -> list[Command]:
        return [self._recorder._noting("finish")]


def run(
    code: Sequence[int], table: Sequence[tuple[int, int, int]], segment: int = 100, segments: int = 1
) -> list[Event]:
    """What the commands of a plan do, in order."""
    algorithm = lookup(Collective.ALL_REDUCE, "ring")
    names = tuple(range(len(table)))
    skeleton = Skeleton(algorithm, 0, 2, 0, np.array(code, np.int32), names, scratch=2, registers=2, largest=1)
    plan = Plan(skeleton, np.array(table, np.int64), ITEMSIZE, segment, segments, 1, 1000, 1000)
    recorder = Recorder()
    operation = Operation(NUMBERS["float32"], Op.SUM, 0.5, 0, "a test")
    (commands,) = PlanCommands(recorder, Wire(recorder), plan, operation).make(INPUT, OUTPUT)
    for command in commands:
        command(0)
    assert recorder.events.pop() == ("finish",)
    return recorder.events


def given(block: int) -> Operand:
    return (Place.INPUT, block, 0, 0)


def result(block: int) -> Operand:
    return (Place.OUTPUT, block, 0, 0)


def kept(block: int, slot: int) -> Operand:
    return (Place.SCRATCH, block, slot, 0)


def message(block: int, register: int = 0, part: int = 0) -> Operand:
    return (Place.MESSAGE, block, register, part)


def copy(to: Operand, source: Operand) -> list[int]:
    return [Instruction.COPY, *to, *source]


def fold(to: Operand, *sources: Operand) -> list[int]:
    return [Instruction.FOLD, *to, len(sources), *(number for source in sources for number in source)]


def send(*parts: Operand) -> list[int]:
    return [Instruction.SEND, 0, 0, 1, PEER, len(parts), *(number for part in parts for number in part)]


def receive(*blocks: int) -> list[int]:
    return [Instruction.RECV, 0, PEER, len(blocks), *blocks]


RELEASE = [Instruction.RELEASE]
TABLE = [(10, 0, 0), (10, 10, 10), (10, 20, 20)]
BYTES = 10 * ITEMSIZE


def at(base: int, block: int) -> int:
    return base + block * BYTES


def test_copies_that_follow_each_other_go_together() -> None:
    events = run([*copy(result(0), given(0)), *copy(result(1), given(1)), *copy(result(2), given(0))], TABLE)
    pieces = [(at(OUTPUT, to), at(INPUT, source), BYTES) for to, source in ((0, 0), (1, 1), (2, 0))]
    assert events == [("gather", *pieces)]


def test_a_copy_to_itself_is_left_out() -> None:
    assert run(copy(result(0), result(0)), TABLE) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((result(0), given(0)), (result(1), result(0)), id="reads what the other writes"),
        pytest.param((result(0), given(0)), (result(0), given(1)), id="writes what the other writes"),
        pytest.param((result(1), result(0)), (result(0), given(0)), id="writes what the other reads"),
    ],
)
def test_copies_that_depend_on_each_other_go_apart(
    first: tuple[Operand, Operand], second: tuple[Operand, Operand]
) -> None:
    """The third copy depends on neither, and goes with the second."""
    events = run([*copy(*first), *copy(*second), *copy(result(2), given(2))], TABLE)
    assert [event[0] for event in events] == ["copy", "gather"]
    assert events == run(copy(*first), TABLE) + run([*copy(*second), *copy(result(2), given(2))], TABLE)


def test_neighbours_do_not_depend_on_each_other() -> None:
    (event,) = run([*copy(result(0), given(0)), *copy(result(2), result(1))], TABLE)
    assert event[0] == "gather"


def test_a_fold_comes_behind_the_copies_that_make_its_source() -> None:
    slot = SCRATCH + -(-100 * ITEMSIZE // ALIGNMENT) * ALIGNMENT  # the second
    events = run([*copy(kept(0, 1), given(0)), *fold(result(0), kept(0, 1), given(1))], TABLE)
    assert events == [
        ("copy", (slot, at(INPUT, 0), BYTES)),
        ("fold", at(OUTPUT, 0), (slot, at(INPUT, 1)), 10),
    ]


def test_a_scaling_comes_behind_the_copies_that_make_its_source() -> None:
    events = run([*copy(result(0), given(0)), Instruction.SCALE, *result(1), *result(0)], TABLE)
    assert events == [("copy", (OUTPUT, INPUT, BYTES)), ("scale", at(OUTPUT, 1), OUTPUT, 10)]


def test_a_message_comes_behind_the_copies_before_it() -> None:
    code = [*copy(result(0), given(0)), *send(result(0)), *receive(1, 2), *copy(result(2), message(2, 0, 1)), *RELEASE]
    assert run(code, TABLE) == [
        ("copy", (OUTPUT, INPUT, BYTES)),
        ("step", [Outgoing((PEER,), ((OUTPUT, BYTES),))], [Incoming(PEER, (BYTES, BYTES))]),
        ("copy", (at(OUTPUT, 2), ARRIVED + ALIGNMENT, BYTES)),  # of the second part
        ("release",),
    ]


def test_empty_messages_are_sent_in_the_first_segment_only() -> None:
    """Of the messages one is always empty, one has a single segment, and one has three."""
    table = [(0, 0, 0), (4, 0, 0), (10, 4, 4)]
    code = [step for block in range(3) for step in (*send(given(block)), *receive(block))]
    steps = [event for event in run([*code, *RELEASE], table, segment=4, segments=3) if event[0] == "step"]
    moved = [
        ([piece[1] for (_, (piece,)) in sends], [sizes for _, (sizes,) in receives]) for _, sends, receives in steps
    ]
    assert moved == [([0, 16, 16], [0, 16, 16]), ([16], [16]), ([8], [8])]
    assert [sends[-1].pieces[0][0] for _, sends, _ in steps] == [INPUT + (4 + 4 * n) * ITEMSIZE for n in range(3)]


def test_what_is_read_of_a_message_is_its_own_when_others_are_left_out() -> None:
    """In the second segment the first message is not sent, and the second one arrives where the first one did."""
    table = [(4, 0, 0), (8, 4, 4)]
    code = [*receive(0), *receive(1), *fold(result(1), given(1), message(1, register=1)), *RELEASE]
    folds = [event for event in run(code, table, segment=4, segments=2) if event[0] == "fold"]
    assert [sources[1] for _, _, sources, _ in folds] == [ARRIVED + ALIGNMENT, ARRIVED]
    assert [to for _, to, _, _ in folds] == [OUTPUT + 4 * ITEMSIZE, OUTPUT + 8 * ITEMSIZE]
