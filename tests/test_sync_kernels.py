"""The kernels that wait for each other, on the CPU: the same bits as the core's, no races, and waits that end."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from spin_on_cpu import ImageDriver, build, no_image

from abccl.algorithms import Collective, lookup
from abccl.algorithms.plan import Plan, Scaling, bind, cut, lower
from abccl.errors import ArgumentError
from abccl.transports import _native, cuda_spin
from abccl.transports.contract import Operation
from abccl.transports.cuda_spin import RANKS, SHOT_BLOCKS, SHOT_BYTES, Spin, workspace_bytes
from abccl.transports.trial import Case, Trial, cases, pairs
from abccl.transports.types import NUMBERS, OPERATORS

LANES, SLOT_BYTES = 3, 4096


class Machine:
    """Ranks that have a device each. What they start is noted, and made by `run`."""

    def __init__(self, file: Path, size: int, timeout: float = 60.0) -> None:
        self.size, self.driver = size, ImageDriver(file)
        # What lies there is zero, as the workspaces must be.
        self.workspaces = [self.driver.allocate(workspace_bytes(size, LANES, SLOT_BYTES)) for _ in range(size)]
        self.abort = self.driver.allocate_pinned(4)
        self.spins = [
            Spin(self.driver, rank, self.workspaces, self.abort, timeout, LANES, SLOT_BYTES, no_image)
            for rank in range(size)
        ]
        self.trials: list[Trial] = []

    def add(self, case: Case, ranks: Iterable[int] | None = None) -> None:
        """Let these ranks (all) run the case."""
        for rank in range(self.size) if ranks is None else ranks:
            self.trials.append(Trial(_Transport(self, rank), case))  # type: ignore[arg-type]
            self.trials[-1].start()

    def launch(self, rank: int, plan: Plan, operation: Operation, input: int, output: int) -> str:
        """Let a rank run a plan on device memory; which kernel it is."""
        prepared = self.spins[rank].prepare(plan, operation)
        for command in prepared.commands(input, output):
            command(rank)
        return prepared.kernel

    def place(self, values: npt.NDArray[Any], offset: int = 0) -> int:
        """The address of a copy of the values on the device, so many bytes behind a multiple of 128."""
        address = self.driver.allocate(values.nbytes + offset) + offset
        ctypes.memmove(address, values.ctypes.data, values.nbytes)
        return address

    def run(self, program: Sequence[str], seed: int = 1) -> None:
        """All that was started; the ranks have what they must have."""
        done = self.driver.run(program, seed)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [spin.error() for spin in self.spins] == [None] * self.size
        for trial in self.trials:
            trial.verify()
        self.trials.clear()

    def run_in_vain(self, program: Sequence[str]) -> list[str | None]:
        """All that was started: what the ranks say of it."""
        done = self.driver.run(program)
        assert done.returncode == 0, done.stdout + done.stderr
        return [spin.error() for spin in self.spins]


class _Transport:
    """What a trial asks of a transport."""

    slot_bytes = SLOT_BYTES

    def __init__(self, machine: Machine, rank: int) -> None:
        self.machine, self.rank = machine, rank

    def prepare(self, plan: Plan, operation: Operation) -> Any:
        def start(input: int, output: int) -> None:
            self.machine.launch(self.rank, plan, operation, input, output)

        return SimpleNamespace(start=start)

    def place(self, image: npt.NDArray[np.uint8]) -> Any:
        address = self.machine.driver.allocate(max(1, image.nbytes))
        return SimpleNamespace(
            address=address,
            store=lambda: ctypes.memmove(address, image.ctypes.data, image.nbytes),
            fetch=lambda: ctypes.memmove(image.ctypes.data, address, image.nbytes),
        )


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def make(size: int, timeout: float = 60.0) -> Machine:
        while made:
            made.pop().driver.close()
        made.append(Machine(tmp_path / "image", size, timeout))
        return made[0]

    yield make
    for one in made:
        one.driver.close()


# What is done to the kernels, and ThreadSanitizer must see: options of the compiler, or a patch of a file.
MUTANTS: dict[str, dict[str, Any]] = {
    "a release that does not": {"options": ["-DABCCL_RELEASE=__ATOMIC_RELAXED"]},
    "an acquire that does not": {"options": ["-DABCCL_ACQUIRE=__ATOMIC_RELAXED"]},
    "no barrier before the signal": {
        "patch": ("shots.cu", "bool meet() const {\n        __syncthreads();", "bool meet() const {")
    },
    "no barrier behind the wait": {"patch": ("shots.cu", "return __syncthreads_and(met);", "return met;")},
    "one buffer": {"patch": ("signals.cuh", "(2 * block + round % 2)", "(2 * block + round * 0)")},
    "no room is waited for": {
        "patch": ("interpreter.cu", "shared_.sent[peer] + 1 - slots", "shared_.sent[peer] - slots")
    },
    "no barrier before a message is told": {
        "patch": (
            "interpreter.cu",
            "        __syncthreads();\n        tell(peers, readers);",
            "        tell(peers, readers);",
        )
    },
    "no barrier behind a fold": {
        "patch": ("interpreter.cu", "plan_.op, count);\n        __syncthreads();", "plan_.op, count);")
    },
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[str]]]:
    """The programs by name; they are built side by side."""
    folder, one = tmp_path_factory.mktemp("programs"), ["-DABCCL_TYPE=float32"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = {
            "plain": pool.submit(build, folder / "plain"),
            "address": pool.submit(build, folder / "address", "address", one),
            "thread": pool.submit(build, folder / "thread", "thread", one),
        }
        for name, what in MUTANTS.items():
            options = [*one, *what.get("options", ())]
            built[name] = pool.submit(build, folder / name.replace(" ", "_"), "thread", options, what.get("patch"))
        yield lambda name: built[name].result()


@pytest.fixture
def program(programs: Callable[[str], list[str]]) -> list[str]:
    return programs("plain")


def _wants_setarch() -> None:
    if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode:
        pytest.skip("this machine forbids setarch -R, which ThreadSanitizer needs")


def all_reduce(name: str, size: int, count: int, **others: Any) -> Case:
    return Case(lookup(Collective.ALL_REDUCE, name), size, count, **others)


def mixed(size: int) -> list[Case]:
    """Calls behind each other that use all of the workspace, in one type."""
    tile = SHOT_BYTES // 4
    return [
        all_reduce("direct", size, 37),
        all_reduce("direct", size, 3 * tile + 5),
        all_reduce("two_shot", size, 41, scaling=Scaling.AFTER),
        all_reduce("ring", size, 301, segment=16, lanes=3),
        all_reduce("direct", size, 1),
        all_reduce("two_shot", size, 2 * tile + 7, scaling=Scaling.BEFORE),
        all_reduce("direct", size, 3, in_place=True),
        all_reduce("recursive_doubling", size, 129, segment=16, lanes=2),
        Case(lookup(Collective.ALL_TO_ALL, "direct"), size, 33, segment=3, lanes=3, uneven=True),
        Case(lookup(Collective.BARRIER, "tree"), size, 0),
        # One-way: the sender is as far ahead as it may be.
        Case(lookup(Collective.BROADCAST, "direct"), size, 300, segment=16),
        Case(lookup(Collective.REDUCE, "direct"), size, 300, segment=16),
        all_reduce("two_shot", size, 5, in_place=True),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_algorithm_gives_what_numpy_does(machine: Callable[..., Machine], program: list[str], size: int) -> None:
    ranks = machine(size)
    for case in cases(size, LANES):
        ranks.add(case)
    ranks.run(program, seed=size)


@pytest.mark.parametrize("size", [2, 4])
def test_the_interpreter_runs_what_the_shots_do(
    machine: Callable[..., Machine], program: list[str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_spin, "SHOT_LIMIT", -1)
    ranks = machine(size)
    for case in mixed(size):
        ranks.add(case)
    ranks.run(program)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_calls_behind_each_other(machine: Callable[..., Machine], program: list[str], size: int) -> None:
    """The second time with other kernels before: the rounds and the messages are counted on."""
    ranks = machine(size)
    order = mixed(size)
    for _ in range(2):
        for case in order:
            ranks.add(case)
        ranks.run(program)
        random.Random(size).shuffle(order)


@pytest.mark.parametrize("name", ["direct", "two_shot"])
def test_a_vector_that_is_longer_than_the_buffers(
    machine: Callable[..., Machine], program: list[str], name: str
) -> None:
    ranks = machine(2)
    for _ in range(2):
        ranks.add(all_reduce(name, 2, SHOT_BLOCKS * SHOT_BYTES // 4 + 5))
    ranks.run(program)


@pytest.mark.parametrize("limit", [cuda_spin.SHOT_LIMIT, -1], ids=["shots", "interpreter"])
@pytest.mark.parametrize("name", ["direct", "two_shot"])
def test_all_types_and_operators_have_the_bits_of_the_core(
    machine: Callable[..., Machine], program: list[str], name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_spin, "SHOT_LIMIT", limit)
    size, random_bytes = 3, np.random.default_rng(1)
    ranks, wanted = machine(size), []
    for number, (dtype, op) in enumerate(pairs()):
        kind, count = _native_name(dtype), 100 + number % 7
        scaling = Scaling.NONE
        if op == "avg":
            scaling = Scaling.AFTER
        elif op == "premul_sum":
            scaling = Scaling.BEFORE
        given = [_values(kind, count, random_bytes) for _ in range(size)]
        folded = _reduced(given, dtype, op, scaling)
        operation = Operation(NUMBERS[dtype], OPERATORS.get(op, 0), 1 / 3, 0, f"{dtype} {op}")
        for rank in range(size):
            skeleton = lower(lookup(Collective.ALL_REDUCE, name), rank, size, scaling=scaling)
            itemsize = given[rank].itemsize
            plan = bind(
                skeleton, cut(count, skeleton.algorithm.blocks(size), itemsize), itemsize, slot_bytes=SLOT_BYTES
            )
            offset = itemsize * (number % 3)
            output = ranks.place(np.zeros_like(given[rank]), offset)
            kernel = ranks.launch(rank, plan, operation, ranks.place(given[rank], offset), output)
            assert kernel == ("interpret" if limit < 0 else {"direct": "one_shot"}.get(name, name))
            wanted.append((operation.text, output, folded))
    ranks.run(program)
    for text, output, folded in wanted:
        assert ctypes.string_at(output, folded.nbytes) == folded.tobytes(), text


def _native_name(dtype: str) -> str:
    return {"float16": "f2", "bfloat16": "u2", "bool": "u1"}.get(dtype, dtype)


def _values(kind: str, count: int, source: np.random.Generator) -> npt.NDArray[Any]:
    dtype = np.dtype(kind)
    if kind == "u1":
        return source.integers(0, 2, count, np.uint8)
    if kind == "u2":  # the upper halves of floats
        return (source.standard_normal(count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype.kind in "iu":
        return source.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)
    values: npt.NDArray[Any] = source.standard_normal((count, 2)).astype("f8").view("c16")[:, 0]
    return values.astype(dtype) if dtype.kind == "c" else values.real.astype(dtype)


def _reduced(given: list[npt.NDArray[Any]], dtype: str, op: str, scaling: Scaling) -> npt.NDArray[Any]:
    """By the native core's kernels, in rank order."""
    kind, count = NUMBERS[dtype], len(given[0])
    result, values = np.zeros_like(given[0]), [one.copy() for one in given]
    if scaling is Scaling.BEFORE:
        for one in values:
            _native.scale(kind, one.ctypes.data, one.ctypes.data, 1 / 3, count)
    _native.fold(kind, OPERATORS.get(op, 0), result.ctypes.data, [one.ctypes.data for one in values], count)
    if scaling is Scaling.AFTER:
        _native.scale(kind, result.ctypes.data, result.ctypes.data, 1 / 3, count)
    return result


def test_under_the_address_sanitizer(machine: Callable[..., Machine], programs: Callable[[str], list[str]]) -> None:
    ranks = machine(3)
    for case in mixed(3):
        ranks.add(case)
    ranks.run(programs("address"))


@pytest.mark.parametrize("size", [2, 3])
def test_there_are_no_races(machine: Callable[..., Machine], programs: Callable[[str], list[str]], size: int) -> None:
    _wants_setarch()
    ranks = machine(size)
    for case in mixed(size):
        ranks.add(case)
    ranks.run(programs("thread"))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(machine: Callable[..., Machine], programs: Callable[[str], list[str]], name: str) -> None:
    _wants_setarch()
    ranks, mutant = machine(2), programs(name)
    for seed in range(1, 20):
        for case in mixed(2):
            ranks.add(case)
        done = ranks.driver.run(mutant, seed)
        if "ThreadSanitizer: data race" in done.stderr:
            return
        assert done.returncode == 0, done.stderr
    pytest.fail("it runs without a race")


@pytest.mark.parametrize(
    ("name", "waits"),
    [("direct", "block 0 of an all_reduce waited 0.2 s for"), ("ring", "lane 0 waited 0.2 s for a message from")],
)
def test_a_missing_rank_is_named(machine: Callable[..., Machine], program: list[str], name: str, waits: str) -> None:
    ranks = machine(2, timeout=0.2)
    for _ in range(2):  # the second one waits for nobody any more
        ranks.add(all_reduce(name, 2, 40), ranks=[0])
    assert ranks.run_in_vain(program) == [
        f"rank 0 of 2: {waits} rank 1, in vain: has that rank called the same, is it alive? If it is only slow, give a "
        "longer timeout",
        None,
    ]


def test_a_reader_who_does_not_take_messages_is_named(machine: Callable[..., Machine], program: list[str]) -> None:
    ranks = machine(2, timeout=0.2)
    ranks.add(Case(lookup(Collective.BROADCAST, "direct"), 2, 100, segment=16), ranks=[0])
    assert str(ranks.run_in_vain(program)[0]).startswith(
        "rank 0 of 2: lane 0 waited 0.2 s for rank 1 to take a message, in vain"
    )


@pytest.mark.parametrize("name", ["direct", "ring"])
@pytest.mark.parametrize("who", ["somebody", "the host"])
def test_an_abort_ends_the_waits(machine: Callable[..., Machine], program: list[str], name: str, who: str) -> None:
    ranks = machine(3, timeout=3600.0)
    if who == "somebody":
        ctypes.c_uint32.from_address(ranks.abort).value = 1
    else:
        for spin in ranks.spins:
            spin.fail()
    ranks.add(all_reduce(name, 3, 40), ranks=[0, 1])
    assert ranks.run_in_vain(program) == [None] * 3


def test_a_launch_may_be_repeated(machine: Callable[..., Machine], program: list[str]) -> None:
    """As in a graph: nothing of a launch says which one it is."""
    ranks = machine(2)
    for name in ("direct", "two_shot", "ring"):
        ranks.add(all_reduce(name, 2, 50))
    ranks.driver.launches *= 5
    ranks.run(program)


def test_ranks_as_groups_of_blocks_of_one_launch(machine: Callable[..., Machine], program: list[str]) -> None:
    """As one cooperative launch has them where all ranks are on one device."""
    ranks, size = machine(3), 3
    for name in ("direct", "two_shot", "ring"):
        ranks.add(all_reduce(name, size, 300, segment=16, lanes=3))
    launches, ranks.driver.launches = ranks.driver.launches, []
    for alike in (launches[first : first + size] for first in range(0, len(launches), size)):
        for rank in range(size):
            alike[0].calls.call[rank] = alike[rank].calls.call[0]
        alike[0].grid *= size
        ranks.driver.launches.append(alike[0])
    ranks.run(program)


def test_the_workspace_is_as_long_as_the_kernels_think(machine: Callable[..., Machine], tmp_path: Path) -> None:
    check = tmp_path / "check.cpp"
    check.write_text(
        '#include "threads.hpp"\n#include "signals.cuh"\n#include <cstdio>\nint main() {\n'
        "    for (unsigned size : {1, 2, 5, 32}) {\n        abccl::Rank rank{};\n"
        "        rank.size = size, rank.lanes = 7, rank.slot_bytes = 384;\n"
        '        printf("%llu\\n", abccl::Workspace(rank, 0).nbytes());\n    }\n}\n'
    )
    root = Path(__file__).parent
    subprocess.run(
        ["g++", "-std=c++17", "-pthread", f"-I{root.parent / 'cuda'}", f"-I{root / 'cuda'}", check, "-o",
         tmp_path / "check"], check=True,
    )  # fmt: skip
    said = subprocess.run([tmp_path / "check"], check=True, capture_output=True, text=True).stdout
    assert [int(line) for line in said.split()] == [workspace_bytes(size, 7, 300) for size in (1, 2, 5, 32)]


def test_what_the_kernels_do_not_serve_is_refused(machine: Callable[..., Machine]) -> None:
    ranks = machine(2)
    with pytest.raises(ArgumentError, match=f'serves at most {RANKS} ranks, and there are 33: choose "stream"'):
        Spin(ranks.driver, 0, [0] * 33, 0, 1.0, 1, 128, no_image)
    with pytest.raises(ArgumentError, match="4 lanes, and the workspace has 3"):
        ranks.add(all_reduce("ring", 2, 1000, segment=16, lanes=4))
