"""Seeds for fuzz_plan: the plans of real algorithms, one file for all ranks of a host, in the format of plan_case.hpp.

    python tests/fuzz/plans.py FOLDER

Each algorithm is lowered for some ranks on one host, and for as many that are half on another. `cases` are chosen so
that every kind of instruction, message and place occurs; the folder holds some 600 files of a kilobyte.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from abccl.algorithms import Collective, algorithms
from abccl.algorithms.decoded import decode
from abccl.algorithms.plan import Plan, Scaling, bind, lower
from abccl.collectives.tuner.candidates import FORWARDING_FREE
from abccl.transports.joint import divide
from abccl.transports.trial import Case
from abccl.transports.types import NUMBERS, OPERATORS, numpy_dtype

SLOT_BYTES = 1024
LANES = 2
MOST_RANKS = 4
COUNTS = (0, 3, 40, 701)
LONG = 1900  # several segments, of all messages
WAYS = (0, 1, 2, 0 | 16, 3 | 8, 1 | 32, 0 | 64, 4, 3 | 16, 1 | 64, 3 | 64, 2 | 16, 4 | 8 | 64)
TAPES = (bytes(64), random.Random(3).randbytes(200))


def cases() -> Iterator[Case]:
    """What is lowered."""
    for collective in Collective:
        for algorithm in algorithms(collective).values():
            for size in range(1, MOST_RANKS + 1):
                if algorithm.refusal(size):
                    continue
                case = Case(algorithm, size, COUNTS[(size + len(algorithm.name)) % len(COUNTS)], lanes=1 + size % 2)
                yield replace(case, segment=17 if size == 3 else None, uneven=case.count % 2 == 0)
                if size == MOST_RANKS:
                    yield replace(case, count=LONG)
        if collective.reduces:
            scaled = Case(next(iter(algorithms(collective).values())), 3, 30, "bfloat16")
            yield replace(scaled, scaling=Scaling.AFTER)
            yield replace(scaled, scaling=Scaling.BEFORE, dtype="complex128")


def plan_of(case: Case, rank: int) -> Plan:
    """A rank's plan."""
    given, wanted = case.given(rank) if case.gives(rank) else (), case.wanted(rank)
    itemsize = numpy_dtype(case.dtype).itemsize
    return bind(
        lower(case.algorithm, rank, case.size, case.root, case.scaling),
        case.sizes(rank),
        itemsize,
        slot_bytes=SLOT_BYTES,
        lanes=case.lanes,
        segment_bytes=None if case.segment is None else case.segment * itemsize * case.algorithm.largest(case.size),
        counts=(len(given), 0 if wanted is None else len(wanted)),
    )


def encoded(case: Case, near: int, way: int) -> bytes:
    """The plans of ranks 0 to near - 1; the others are on another host."""
    out = struct.pack("<BB", way, near - 1)
    index = {rank: rank for rank in range(case.size)}
    straight = case.algorithm.name in FORWARDING_FREE and not case.collective.reduces and near == case.size
    for rank in range(near):
        plan = plan_of(case, rank)
        skeleton = plan.skeleton
        code = skeleton.code if near == case.size else divide(decode(skeleton.code), index, near)
        out += struct.pack("<6i", near, rank, skeleton.scratch, skeleton.registers, plan.lanes, case.size - near)
        out += struct.pack("<4q", plan.input_count, plan.output_count, plan.segment, plan.segments)
        out += struct.pack("<bbBH", NUMBERS[case.dtype], OPERATORS[case.op], straight, len(skeleton.blocks))
        for words in (np.asarray(code, "<i4"), plan.table.reshape(-1).astype("<i8")):
            out += struct.pack("<H", len(words)) + words.tobytes()
    return out + TAPES[way // 64 % 2]


def write(folder: Path) -> int:
    """Write all seeds; returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for case in cases():
        for near in {case.size, max(1, case.size // 2)}:
            name = (
                f"{case.collective.value}-{case.algorithm.name}-{near}-of-{case.size}-{case.count}-{case.scaling.value}"
            )
            (folder / name).write_bytes(encoded(case, near, WAYS[count % len(WAYS)]))
            count += 1
    return count


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} plans in {sys.argv[1]}")
