"""Short runs of the fuzzers in tests/fuzz, from a fixed seed. `make fuzz` runs them for long, and that of plans.

The plans' fuzzer is C++: `make sanitize` runs it on all seeds and some thousand changes of them.
"""

from __future__ import annotations

import importlib
import json
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest

from abccl.algorithms.decoded import decode
from abccl.algorithms.plan import Instruction, Place
from abccl.collectives import offline
from abccl.collectives.tuner import store
from abccl.collectives.tuner.table import Table

INPUTS = 400
FUZZERS = Path(__file__).parent / "fuzz"
NAMES = ["record", "rules", "table", "told", "topology"]


def imported(name: str) -> ModuleType:
    if str(FUZZERS) not in sys.path:
        sys.path.append(str(FUZZERS))
    return importlib.import_module(name)


@pytest.mark.parametrize("name", NAMES)
def test_any_input_is_read_or_refused_with_the_name_of_its_file(name: str, tmp_path: Path) -> None:
    parsers = imported("parsers")
    assert sorted(parsers.TARGETS) == NAMES
    done, accepted = parsers.run(name, seed=1, count=INPUTS, seconds=0, folder=tmp_path)
    assert done == INPUTS
    # Inputs that are all refused at once, or never, try little. (What ranks are told is taken, whatever it is.)
    assert accepted > 0 and (accepted < INPUTS) == (name != "told")


def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A table's key that is taken on trust."""
    parsers = imported("parsers")

    def trusting(file: Path) -> object:
        key, content = store.read(file)
        return key, Table.from_json(content)

    monkeypatch.setattr(offline, "_read", trusting)
    with pytest.raises(parsers.Broken, match="table, seed 1, input .* which is kept as"):
        parsers.run("table", seed=1, count=INPUTS, seconds=0, folder=tmp_path)
    assert json.loads((tmp_path / "crash-table").read_bytes())


def test_an_input_that_takes_too_long_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parsers = imported("parsers")

    def endless(data: bytes, folder: Path) -> None:
        while data != b"seed":
            pass

    monkeypatch.setattr(parsers, "LIMIT", 1)
    monkeypatch.setitem(parsers.TARGETS, "told", parsers.Target(lambda: ["seed"], str, endless))
    with pytest.raises(parsers.Broken, match="longer than 1 s"):
        parsers.run("told", seed=1, count=1000, seconds=0, folder=tmp_path)


def test_seeds_of_plans_hold_every_instruction_and_place(tmp_path: Path) -> None:
    plans = imported("plans")
    assert plans.write(tmp_path) == len(list(tmp_path.iterdir())) > 300
    instructions, places, remotes = set(), set(), set()
    for case in plans.cases():
        for rank in range(case.size):
            for instruction in decode(plans.plan_of(case, rank).skeleton.code):
                instructions.add(type(instruction).__name__)
                places |= {part[0] for part in getattr(instruction, "parts", ())}
                places |= {source[0] for source in getattr(instruction, "sources", ())}
    for file in tmp_path.iterdir():
        remotes.add(struct.unpack_from("<2B6i", file.read_bytes())[-1])
    assert len(instructions) == len(Instruction) - 2  # FOLD, COPY and SCALE are one kind
    assert places == set(Place)
    assert remotes == {0, 1, 2}
