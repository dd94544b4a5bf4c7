"""Lowering: what the instructions may do, and that every registered algorithm's plans compute what numpy does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abccl.algorithms import (
    Algorithm,
    Block,
    Collective,
    Program,
    algorithms,
    at_least,
    lookup,
    per_rank,
    recv,
    send,
)
from abccl.algorithms.decoded import Receiving, Reclaim, Release, Sending, Writing, decode
from abccl.algorithms.plan import (
    ALIGNMENT,
    Instruction,
    Place,
    Scaling,
    bind,
    cut,
    exchange,
    exchange_matrix,
    lower,
    parts,
)
from abccl.errors import ArgumentError, ScheduleError
from abccl.transports import inproc
from abccl.transports.trial import Case, Trial, can_be_in_place, pairs
from abccl.transports.types import numpy_dtype

EVERY = [algorithm for collective in Collective for algorithm in algorithms(collective).values()]
SIZES = [1, 2, 3, 4, 5, 7, 8]


def name_of(algorithm: Algorithm) -> str:
    return f"{algorithm.collective.value}-{algorithm.name}"


def by_hand(collective: Collective, function: object, blocks: int = 1, largest: int = 1) -> Algorithm:
    """An algorithm that is in no registry."""
    return Algorithm("by_hand", collective, function, lambda _: blocks, lambda _: largest)  # type: ignore[arg-type]


def run_together(cases: Sequence[Case], room: int = 2, slot_bytes: int = 1 << 16) -> list[Trial]:
    """One case for each rank, all in this thread: `progress` never waits, so a round without news is a deadlock."""
    transports = inproc(len(cases), room, slot_bytes)
    trials = [Trial(transport, case) for transport, case in zip(transports, cases)]
    running = [trial.start() for trial in trials]
    group = transports[0].group
    while running:
        group.news = [False] * group.size
        left = [execution for execution in running if not execution.progress()]
        assert len(left) < len(running) or any(group.news), "a deadlock: nobody is finished and no message moved"
        running = left
    return trials


@st.composite
def some_case(draw: st.DrawFn, algorithm: Algorithm) -> Case:
    size = draw(st.integers(1, 6).filter(lambda size: not algorithm.refusal(size)))
    collective = algorithm.collective
    dtype, op = draw(st.sampled_from(pairs() if collective.reduces else [p for p in pairs() if p[1] == "sum"]))
    scales = collective.reduces and op == "sum" and numpy_dtype(dtype).kind not in "iub"
    return Case(
        algorithm,
        size,
        draw(st.integers(0, 200)),
        dtype,
        op,
        root=draw(st.integers(0, size - 1)) if collective.rooted else 0,
        segment=draw(st.none() | st.integers(1, 40)),
        lanes=draw(st.integers(1, 4)),
        scaling=draw(st.sampled_from(Scaling)) if scales else Scaling.NONE,
        uneven=draw(st.booleans()),
        in_place=draw(st.booleans()) and can_be_in_place(collective),
    )


@pytest.mark.parametrize("algorithm", EVERY, ids=name_of)
@given(data=st.data(), room=st.sampled_from([0, 1, 2]))
@settings(max_examples=25, deadline=None)
def test_plans_compute_what_numpy_does(algorithm: Algorithm, data: st.DataObject, room: int) -> None:
    case = data.draw(some_case(algorithm))
    for trial in run_together([case] * case.size, room):
        trial.verify()


@pytest.mark.parametrize("algorithm", EVERY, ids=name_of)
@pytest.mark.parametrize("scaling", Scaling)
def test_every_operand_holds_what_is_read(algorithm: Algorithm, scaling: Scaling) -> None:
    """Walks the code: no place is read that holds another block, none written that the rank may not write."""
    if scaling is not Scaling.NONE and not algorithm.collective.reduces:
        return
    for size in [size for size in SIZES if not algorithm.refusal(size)]:
        for root in range(size if algorithm.collective.rooted else 1):
            for rank in range(size):
                _walk(algorithm, rank, size, root, scaling)


def _walk(algorithm: Algorithm, rank: int, size: int, root: int, scaling: Scaling) -> None:
    skeleton = lower(algorithm, rank, size, root, scaling)
    blocks, collective = algorithm.blocks(size), algorithm.collective
    own = set(collective.before(rank, size, blocks, root))
    results = set(collective.after(rank, size, blocks, root))
    holds: dict[tuple[int, int], int] = {}  # (place, slot) -> block; of OUTPUT every block is its own slot
    registers: list[Receiving] = []
    lent: dict[int, set[int]] = {}  # block -> the sends that lent it and were not reclaimed
    sends = 0

    def read(operand: tuple[int, int, int, int]) -> None:
        place, block, index, part = operand
        if place == Place.INPUT:
            assert skeleton.blocks[block] in own
        elif place == Place.MESSAGE:
            assert registers[index].blocks[part] == block
        else:
            slot = index if place == Place.SCRATCH else block
            assert holds.get((place, slot)) == block, f"{name_of(algorithm)} {rank}/{size}: stale {operand}"

    for instruction in decode(skeleton.code):
        match instruction:
            case Sending():
                assert len(instruction.parts) <= skeleton.largest
                assert rank not in instruction.peers
                for part in instruction.parts:
                    read(part)
                    if instruction.lends:
                        assert part[0] in (Place.INPUT, Place.OUTPUT), "only the user's memory is lent"
                        lent.setdefault(part[1], set()).add(sends)
                sends += 1
            case Reclaim():
                assert not registers, "what is received may go straight to where it belongs"
                for block in lent:
                    lent[block] -= set(instruction.sends)
            case Receiving():
                registers.append(instruction)
                assert len(registers) <= skeleton.registers
            case Release():
                registers.clear()
            case Writing():
                for source in instruction.sources:
                    read(source)
                if instruction.kind is Instruction.FOLD:
                    ranks = [registers[s[2]].peer if s[0] == Place.MESSAGE else rank for s in instruction.sources]
                    assert ranks == sorted(ranks), "sources are folded in ascending rank order"
                place, block, index, _ = instruction.destination
                assert place in (Place.OUTPUT, Place.SCRATCH), "only output and scratch are written"
                if place == Place.OUTPUT:
                    assert skeleton.blocks[block] in results
                    # In place the input's block lies there too; copying it onto itself changes nothing.
                    onto_itself = instruction.kind is Instruction.COPY and instruction.sources[0][0] == Place.INPUT
                    assert onto_itself or not lent.get(block), "what was lent is reclaimed before it changes"
                else:
                    assert index < skeleton.scratch
                holds[place, index if place == Place.SCRATCH else block] = block
    written = {skeleton.blocks[block] for (place, _), block in holds.items() if place == Place.OUTPUT}
    assert written == results, "every result is in the output at the end"


@pytest.mark.parametrize("algorithm", EVERY, ids=name_of)
def test_messages_of_a_pair_match_in_order(algorithm: Algorithm) -> None:
    for size in [size for size in SIZES if not algorithm.refusal(size)]:
        for root in range(size if algorithm.collective.rooted else 1):
            sent, received = defaultdict(list), defaultdict(list)
            for rank in range(size):
                for instruction in decode(lower(algorithm, rank, size, root).code):
                    if isinstance(instruction, Sending):
                        for peer in instruction.peers:
                            sent[rank, peer].append((instruction.tag, len(instruction.parts)))
                    elif isinstance(instruction, Receiving):
                        received[instruction.peer, rank].append((instruction.tag, len(instruction.blocks)))
            assert sent == received


def test_a_block_stays_in_the_input_until_it_changes() -> None:
    ring = algorithms(Collective.ALL_REDUCE)["ring"]
    program = decode(lower(ring, 1, 3).code)
    places = [instruction.parts[0][0] for instruction in program if isinstance(instruction, Sending)]
    # Sent as given, then folded, then finished, then passed on.
    assert places == [Place.INPUT, Place.OUTPUT, Place.OUTPUT, Place.OUTPUT]
    kinds = [instruction.kind for instruction in program if isinstance(instruction, Writing)]
    assert kinds == [Instruction.FOLD] * 2 + [Instruction.COPY] * 2
    assert lower(ring, 1, 3).scratch == 0


def test_scratch_slots_are_used_again() -> None:
    ring = algorithms(Collective.REDUCE_SCATTER)["ring"]
    assert lower(ring, 0, 64).scratch == lower(ring, 0, 8).scratch == 2


def test_one_message_for_many_readers_keeps_each_readers_order() -> None:
    def star(rank: int, size: int) -> Program:
        if rank == 0:
            yield send(1, 0), send(2, 1), send(3, 0)
            yield send(1, 1), send(1, 2), send(2, 2), send(3, 1)
        else:
            for blocks in {1: ((0,), (1, 2)), 2: ((1,), (2,)), 3: ((0,), (1,))}[rank]:
                yield tuple(recv(0, block) for block in blocks)

    algorithm = by_hand(Collective.BROADCAST, star, blocks=3)
    sends = [i for i in decode(lower(algorithm, 0, 4).code) if isinstance(i, Sending)]
    assert [s.peers for s in sends[:2]] == [(1, 3), (2,)]
    # The second step has two messages to rank 1, so nothing in it may be moved.
    assert [(s.peers, s.parts[0][1]) for s in sends[2:]] == [((1,), 1), ((1,), 2), ((2,), 2), ((3,), 1)]


def test_a_value_is_sent_as_it_stood_before_the_step() -> None:
    """The second exchange sends the output while the fold of the same step writes it."""

    def doubling(rank: int, size: int) -> Program:
        for bit in (1, 2):
            yield send(rank ^ bit, 0), recv(rank ^ bit, 0, reduce=True)

    case = Case(by_hand(Collective.ALL_REDUCE, doubling), 4, 33)
    for room in (0, 2):
        for trial in run_together([case] * 4, room):
            trial.verify()


def test_what_its_own_step_changes_is_not_lent() -> None:
    doubling = lookup(Collective.ALL_REDUCE, "recursive_doubling")
    assert not any(i.lends for i in decode(lower(doubling, 0, 4).code) if isinstance(i, Sending))
    two_shot = decode(lower(lookup(Collective.ALL_REDUCE, "two_shot"), 0, 2).code)
    assert [i.lends for i in two_shot if isinstance(i, Sending)] == [True, True]
    assert [i.sends for i in two_shot if isinstance(i, Reclaim)] == [(0,)]


def test_what_a_rank_does_not_hold_is_a_schedule_error() -> None:
    def wrong(rank: int, size: int) -> Program:
        yield (send(1, 0),) if rank == 0 else (recv(0, 0),)
        if rank == 1:
            yield send(0, 1)

    with pytest.raises(ScheduleError, match=r"broadcast by_hand: rank 1 of 2 uses block 1 at step 2"):
        lower(by_hand(Collective.BROADCAST, wrong, blocks=2), 1, 2)


def test_a_restriction_is_kept() -> None:
    algorithm = Algorithm(
        "fussy", Collective.REDUCE, lambda rank, size: [], per_rank, per_rank, restrictions=(at_least(3),)
    )
    with pytest.raises(ArgumentError, match="reduce fussy wants at least 3 ranks, and there are 2"):
        lower(algorithm, 0, 2)


@given(count=st.integers(0, 5000), blocks=st.integers(1, 40), itemsize=st.sampled_from([1, 2, 4, 8, 16]))
def test_a_vector_is_cut_at_cache_lines(count: int, blocks: int, itemsize: int) -> None:
    sizes, end = cut(count, blocks, itemsize), 0
    for block in range(blocks):
        extent = sizes(block)
        assert extent.input == extent.output == end
        assert end * itemsize % ALIGNMENT == 0 or end == count
        end += extent.count
    assert end == count


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=6), data=st.data())
def test_parts_lie_one_after_another(counts: list[int], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(counts) - 1))
    starts = np.cumsum([0, *counts])
    for collective in (Collective.REDUCE_SCATTER, Collective.SCATTER, Collective.ALL_GATHER, Collective.GATHER):
        scatters = collective in (Collective.REDUCE_SCATTER, Collective.SCATTER)
        for block, extent in enumerate(map(parts(collective, rank, counts), range(len(counts)))):
            whole, own = (extent.input, extent.output) if scatters else (extent.output, extent.input)
            assert (extent.count, whole) == (counts[block], starts[block])
            assert own == (0 if block == rank else -1)


def test_an_exchange_knows_its_own_row_and_column() -> None:
    counts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    known, own = exchange_matrix(1, counts), exchange(1, counts[1], [row[1] for row in counts])
    pairs_of_1: list[Block] = [(1, 0), (1, 1), (1, 2), (0, 1), (2, 1)]
    assert [known(pair) for pair in pairs_of_1] == [own(pair) for pair in pairs_of_1]
    assert (own((1, 2)).count, own((1, 2)).input, own((1, 2)).output) == (6, 9, -1)
    assert (own((2, 1)).count, own((2, 1)).input, own((2, 1)).output) == (8, -1, 7)
    assert known((0, 2)).count == 3
    with pytest.raises(ArgumentError, match="choose pairwise or direct"):
        own((0, 2))
    assert exchange(1, [4, 4, 4], [4, 4, 4])((0, 2)).count == 4


@given(counts=st.lists(st.integers(0, 300), min_size=3, max_size=3), slot=st.integers(4, 400))
def test_segments_are_alike_on_every_rank(counts: list[int], slot: int) -> None:
    """A rank that touches only short blocks may run fewer segments, but never cuts them elsewhere."""
    tree = algorithms(Collective.GATHER)["direct"]
    plans = [
        bind(lower(tree, rank, 3), parts(Collective.GATHER, rank, counts), 4, slot_bytes=slot) for rank in range(3)
    ]
    for plan in plans:
        longest = int(plan.table[:, 0].max(initial=0))
        assert plan.segment * plan.itemsize * plan.skeleton.largest <= slot
        assert plan.segment * plan.segments >= longest
        assert plan.segments == 1 or plan.segment == plans[0].segment


def test_a_slot_that_is_too_small_is_refused() -> None:
    tree = algorithms(Collective.ALL_TO_ALL)["bruck"]
    with pytest.raises(ArgumentError, match="which must fit 16 bytes: choose another algorithm, or larger slots"):
        bind(lower(tree, 0, 8), exchange(0, [5] * 8, [5] * 8), 8, slot_bytes=16)


def test_scratch_is_for_all_lanes() -> None:
    ring = algorithms(Collective.REDUCE_SCATTER)["ring"]
    plan = bind(lower(ring, 0, 4), parts(Collective.REDUCE_SCATTER, 0, [100] * 4), 8, slot_bytes=128, lanes=3)
    assert (plan.segment, plan.segments, plan.scratch_bytes) == (16, 7, 3 * 2 * 16 * 8)
