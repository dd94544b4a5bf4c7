"""The library: what there is, what it declares, and the vocabulary it is written in."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abccl.algorithms import (
    Algorithm,
    Collective,
    Counts,
    Recv,
    Restriction,
    Send,
    algorithm,
    algorithms,
    at_least,
    lookup,
    mirror,
    power_of_two,
    recv,
    registry,
    relabel,
    send,
    steps,
)
from abccl.errors import ArgumentError, ScheduleError, UnknownAlgorithm

FIVE = ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"]
EVERY = [a for c in Collective for a in algorithms(c).values()]
every = pytest.mark.parametrize("a", EVERY, ids=lambda a: f"{a.collective.value}-{a.name}")


@pytest.mark.parametrize(("collective", "name"), [*itertools.product(FIVE, ["ring", "tree", "recursive_doubling"])])
def test_the_fifteen_cells_are_there_and_unrestricted(collective: str, name: str) -> None:
    assert lookup(Collective(collective), name).restrictions == ()


@pytest.mark.parametrize(
    ("collective", "names"),
    [
        ("all_reduce", {"rabenseifner", "direct", "two_shot", "double_tree", "chain"}),
        ("reduce_scatter", {"direct"}),
        ("all_gather", {"direct"}),
        ("broadcast", {"scatter_all_gather", "chain", "double_tree", "direct"}),
        ("reduce", {"chain", "tree", "direct", "double_tree"}),
        ("gather", {"tree", "direct"}),
        ("scatter", {"tree", "direct"}),
        ("all_to_all", {"bruck", "pairwise", "direct"}),
        ("barrier", {"recursive_doubling", "tree"}),
    ],
)
def test_the_others_are_there(collective: str, names: set[str]) -> None:
    assert names <= algorithms(Collective(collective)).keys()


@every
def test_a_single_rank_sends_nothing(a: Algorithm) -> None:
    assert a.program(0, 1) == []


@every
def test_it_is_documented_and_priced(a: Algorithm) -> None:
    documentation = inspect.getdoc(a.function) or ""
    assert "step" in documentation and documentation.count("\n\n") == 1
    assert a.counts is not None


@every
def test_schedules_are_made_of_tuples_of_messages(a: Algorithm) -> None:
    for step in a.program(1, 5 if a.refusal(5) is None else 4):
        assert isinstance(step, tuple) and step
        assert all(isinstance(m, (Send, Recv)) for m in step)


def test_the_butterfly_serves_all_ranks_alike_with_a_power_of_two() -> None:
    a = lookup(Collective.ALL_REDUCE, "recursive_doubling")
    assert {len(a.program(rank, 8)) for rank in range(8)} == {3}
    assert [m.peer for step in a.program(5, 8) for m in step] == [4, 4, 7, 7, 1, 1]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9, 16, 31])
def test_an_inner_node_of_one_of_two_trees_is_a_leaf_of_the_other(size: int) -> None:
    a = lookup(Collective.BROADCAST, "double_tree")
    for rank in range(1, size):
        sent = {m.blocks for step in a.program(rank, size) for m in step if isinstance(m, Send)}
        received = [m.blocks for step in a.program(rank, size) for m in step if isinstance(m, Recv)]
        assert len(sent) <= 1
        assert sorted(received) == [(0,), (1,)]


def test_another_root_rotates_ranks_and_the_blocks_that_name_them() -> None:
    scatter = lookup(Collective.SCATTER, "direct")
    assert scatter.program(2, 3, root=2) == [(send(0, 0), send(1, 1))]
    broadcast = lookup(Collective.BROADCAST, "ring")
    assert broadcast.program(2, 3, root=2)[0] == (send(0, 0),)


def test_the_mirror_image_turns_time_and_messages_round() -> None:
    program = [send(1, 0), (recv(2, 3), send(4, 5, 6))]
    assert list(mirror(program, reduce=True)) == [(recv(4, 5, 6, reduce=True), send(2, 3)), (recv(1, 0, reduce=True),)]


def test_relabelled_programs_run_elsewhere() -> None:
    program = [(), (send(1, 0), recv(1, 1, reduce=True))]
    assert list(relabel(program, lambda rank: rank * 2, lambda block: 7)) == [(send(2, 7), recv(2, 7, reduce=True))]


def test_integers_of_numpy_are_integers() -> None:
    made = send(np.int64(1), np.int32(2), (np.int8(3), np.uint8(4)))  # type: ignore[arg-type]
    assert repr(made) == repr(send(1, 2, (3, 4)))
    assert repr(recv(np.int64(1), np.int32(2), reduce=True)) == repr(recv(1, 2, reduce=True))  # type: ignore[arg-type]
    moved = relabel([send(1, 0)], lambda rank: np.int64(rank), lambda block: np.int64(7))  # type: ignore[arg-type, return-value]
    assert repr(list(moved)) == repr([(send(1, 7),)])


@pytest.mark.parametrize("wrong", [("1", 0), (1.0, 0), (1, "a"), (1, [0, 1]), (1, (0, 1, 2)), (1, (0, 1.5)), (None,)])
@pytest.mark.parametrize("call", [send, recv])
def test_what_is_no_integer_is_refused(call: Callable[..., Any], wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ScheduleError) as caught:
        call(*wrong)
    shown = ", ".join(map(repr, wrong))
    assert "wants a rank and blocks, which are integers" in str(caught.value)
    assert f"got {call.__name__}({shown})" in str(caught.value)


def test_empty_steps_are_left_out() -> None:
    assert list(steps([[], send(1, 0), ()])) == [(send(1, 0),)]


def test_unknown_names_bring_near_ones() -> None:
    with pytest.raises(UnknownAlgorithm, match=r"'rign': did you mean ring\?"):
        lookup(Collective.ALL_REDUCE, "rign")


@pytest.fixture
def private_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone when it ends."""
    copies = {collective: dict(known) for collective, known in registry._registry.items()}
    monkeypatch.setattr(registry, "_registry", copies)


@pytest.mark.usefixtures("private_registry")
def test_restrictions_are_declared_not_tested() -> None:
    @algorithm(Collective.BARRIER, restrictions=[power_of_two, at_least(4)])
    def fussy_barrier(rank: int, size: int) -> list[Send]:
        return []

    a = lookup(Collective.BARRIER, "fussy")
    assert [size for size in range(1, 20) if a.refusal(size) is None] == [4, 8, 16]
    with pytest.raises(ArgumentError, match="fussy wants a power of two ranks, and there are 6"):
        a.program(0, 6)


@pytest.mark.usefixtures("private_registry")
def test_a_taken_name_and_needless_blocks_are_refused() -> None:
    with pytest.raises(ArgumentError, match="all_gather ring is taken"):

        @algorithm(Collective.ALL_GATHER)
        def ring_all_gather(rank: int, size: int) -> list[Send]:
            return []

    with pytest.raises(ArgumentError, match="fixes its blocks"):
        algorithm(Collective.ALL_GATHER, blocks=2)


def test_a_decorator_without_its_collective_says_what_to_write() -> None:
    without: Any = algorithm
    with pytest.raises(ArgumentError, match=r"write @algorithm\(Collective.ALL_REDUCE\)"):

        @without
        def star_all_reduce(rank: int, size: int) -> list[Send]:
            return []

    with pytest.raises(ArgumentError, match=r"got 'broadcast': write @algorithm\(Collective.BROADCAST\)"):
        without("broadcast")
    with pytest.raises(ArgumentError, match="did you mean broadcast"):
        without("brodcast")


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"blocks": "4"}, "blocks wants a number, or a function"),
        ({"largest": 1.5}, "largest wants a number, or a function"),
        ({"counts": Counts(1, Fraction(1), Fraction(0))}, "counts wants a function"),
        ({"restrictions": [lambda size: True]}, "restrictions wants a list of Restriction"),
        ({"restrictions": 4}, "restrictions wants a list of Restriction"),
    ],
)
def test_what_is_declared_is_checked(declared: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        algorithm(Collective.ALL_REDUCE, **declared)


@pytest.mark.usefixtures("private_registry")
def test_a_restriction_that_raises_is_named() -> None:
    @algorithm(Collective.BARRIER, restrictions=[Restriction("luck", lambda size: bool(size // 0))])
    def unlucky_barrier(rank: int, size: int) -> list[Send]:
        return []

    with pytest.raises(ScheduleError, match="barrier unlucky: restriction to luck for 3 ranks: ZeroDivisionError"):
        lookup(Collective.BARRIER, "unlucky").refusal(3)


def test_the_papers_that_docstrings_cite_are_listed(root: Path) -> None:
    name = r"(?:van de |De )?[A-Z][a-z]+"
    cited: set[str] = set()
    for path in (root / "algorithms").glob("*.py"):
        text = " ".join(path.read_text(encoding="utf-8").split())
        cited |= set(re.findall(rf"(?:{name}, )*{name}(?: & {name}| et al\.)? (?:19|20)\d\d\b", text))
    references, _, _ = (root / "docs/references.md").read_text(encoding="utf-8").partition("\n## ")
    listed = set(re.findall(r"^- \*\*(.*)\*\*:", references, re.M))
    assert cited == listed
