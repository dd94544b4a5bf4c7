"""Parameters of algorithms: declared, bound, written behind a name, and told to whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from abccl.algorithms import (
    Algorithm,
    Collective,
    Counts,
    Parameter,
    Program,
    Restriction,
    algorithm,
    at_least,
    lookup,
    recv,
    registry,
    replay,
    send,
)
from abccl.algorithms.parameters import split_outside
from abccl.algorithms.plan import lower
from abccl.collectives.tuner.candidates import Place
from abccl.collectives.tuner.table import built_in
from abccl.collectives.tuner.tuner import Tuner
from abccl.errors import ArgumentError, UnknownAlgorithm
from abccl.tools.cli import main


@pytest.fixture(autouse=True)
def _private_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone when it ends."""
    copies = {collective: dict(known) for collective, known in registry._registry.items()}
    monkeypatch.setattr(registry, "_registry", copies)


@pytest.fixture
def fan() -> Algorithm:
    """A broadcast in waves of `width` ranks, that knows a word, too."""

    @algorithm(
        Collective.BROADCAST,
        parameters={"width": Parameter(4, "a number, 2 or more", lambda width: width >= 2), "word": "ring"},
        blocks=lambda size, width: width,
        largest=lambda size, width: width if size > 1 else 1,
        restrictions=[
            at_least(1),
            Restriction("more ranks than a {word} of {width}", lambda size, width: size != width),
        ],
        counts=lambda size, word: Counts(len(word), 0, 0),  # type: ignore[arg-type]
    )
    def fan_broadcast(rank: int, size: int, width: int, word: str) -> Program:
        for first in range(1, size, width):
            wave = range(first, min(first + width, size))
            if rank == 0:
                yield [send(peer, *range(width)) for peer in wave]
            elif rank in wave:
                yield recv(0, *range(width))

    return lookup(Collective.BROADCAST, "fan")


def test_a_bound_algorithm_is_one_object_under_one_name(fan: Algorithm) -> None:
    assert (fan.name, fan.parameters) == ("fan", (("width", 4), ("word", "ring")))
    wide = fan.bind(width=8)
    assert (wide.name, wide.parameters) == ("fan(width=8)", (("width", 8), ("word", "ring")))
    assert wide is fan.bind(width="8") is lookup(Collective.BROADCAST, "fan(width=8)")
    assert wide is lookup(Collective.BROADCAST, "fan( 8 )") is lookup(Collective.BROADCAST, "fan(8,word=ring)")
    assert fan is wide.bind(width=4) is lookup(Collective.BROADCAST, "fan(4)") is lookup(Collective.BROADCAST, "fan()")
    both = lookup(Collective.BROADCAST, "fan(8, hierarchical(inner=tree, levels(2, 3)))")
    assert both.parameters[1] == ("word", "hierarchical(inner=tree, levels(2, 3))")
    assert lookup(Collective.BROADCAST, both.name) is both is wide.bind(word=both.parameters[1][1])
    assert len({fan, wide, both, lookup(Collective.BROADCAST, "fan")}) == 3


def test_all_that_is_declared_is_told_the_parameters_it_names(fan: Algorithm) -> None:
    wide = fan.bind(width=3, word="a")
    assert (wide.blocks(9), wide.largest(9)) == (3, 3)
    assert wide.counts is not None and wide.counts(9).steps == 1
    assert (wide.refusal(3), wide.refusal(4)) == ("more ranks than a a of 3", None)
    assert fan.refusal(3) is None and fan.refusal(4) == "more ranks than a ring of 4"
    assert len(wide.program(0, 7)) == 2 and len(fan.program(0, 5)) == 1
    assert replay(wide, 5, root=2).steps == 2
    assert lower(wide, 0, 5).largest == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fan(1)", "'fan(1)': width wants a number, 2 or more, and got '1'"),
        ("fan(two)", "width wants a number, 2 or more, and got 'two'"),
        ("fan(widht=2)", "no parameter is called widht: did you mean width?"),
        ("fan(2,tree,3)", "wanted is width, word, and got (2,tree,3)"),
        ("fan(2,width=3)", "width is given twice"),
        ("fan(2", "lacks a parenthesis at its end: write fan(name=value)"),
        ("fan(2))", "the parentheses of '2)' do not match"),
        ("fan(word=)", "word wants a word, and got ''"),
        ("ring(2)", "wanted is no parameter, and got (2)"),
        ("ring(radix=2)", "ring has none"),
        ("fna(2)", "no broadcast algorithm is called 'fna': did you mean fan?"),
    ],
)
@pytest.mark.usefixtures("fan")
def test_what_is_written_wrong_is_explained(name: str, words: str) -> None:
    with pytest.raises(UnknownAlgorithm) as caught:
        lookup(Collective.BROADCAST, name)
    assert words in str(caught.value)


@pytest.mark.parametrize("values", [{"width": 2.0}, {"word": 4}, {"word": "a,b"}, {"word": "a("}, {"size": 4}])
def test_what_is_bound_wrong_is_refused(fan: Algorithm, values: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        fan.bind(**values)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"parameters": {"radix": 2.5}}, "the default of radix must be an int or a str, and is 2.5"),
        ({"parameters": {"radix": Parameter(1, "2 or more", lambda radix: radix > 1)}}, "radix wants 2 or more"),
        ({"parameters": {"width": 2}}, "odd_broadcast does not take width"),
        ({"placed": True}, "odd_broadcast does not take root"),
    ],
)
def test_what_is_declared_wrong_is_refused(declared: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):

        @algorithm(Collective.BROADCAST, **declared)
        def odd_broadcast(rank: int, size: int, radix: int = 2) -> Program:
            return []


def test_a_placed_program_is_told_of_its_root() -> None:
    @algorithm(Collective.BROADCAST, placed=True, parameters={"relay": 1})
    def relayed_broadcast(rank: int, size: int, root: int, relay: int) -> Program:
        """From the root to a rank that is always the same, from there to the rest."""
        others = [peer for peer in range(size) if peer not in (root, relay)]
        if rank == root != relay:
            yield send(relay, 0)
        if rank == relay != root:
            yield recv(root, 0)
        yield [send(peer, 0) for peer in others] if rank == relay else [recv(relay, 0)] * (rank in others)

    a = lookup(Collective.BROADCAST, "relayed(relay=2)")
    assert a.program(3, 4, root=3) == [(send(2, 0),)]
    assert [replay(a, 4, root).transfers[0].source for root in range(4)] == [0, 1, 2, 3]
    assert lower(a, 2, 4, root=3).root == 3
    with pytest.raises(ArgumentError, match="all_reduce has no root"):
        algorithm(Collective.ALL_REDUCE, placed=True)


@pytest.mark.usefixtures("fan")
def test_the_environment_may_name_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(Place((tuple(range(9)),), 9, 128 << 10, 4), built_in("near"))

    def forced(text: str, collective: Collective = Collective.BROADCAST) -> str:
        monkeypatch.setenv("ABCCL_ALGORITHM", text)
        return tuner.decide(collective, 1 << 20).choice.algorithm_name

    assert forced("fan(8, ring)") == "fan(width=8)"
    assert forced("fan(width=8, word=tree), all_reduce=ring") == "fan(width=8,word=tree)"
    assert forced("all_reduce=ring,broadcast=fan(width=8)") == "fan(width=8)"
    assert forced("fan(width=8),all_reduce=tree", Collective.ALL_REDUCE) == "tree"
    with monkeypatch.context() as patch:
        patch.delenv("ABCCL_ALGORITHM", raising=False)
        usual = tuner.decide(Collective.ALL_GATHER, 1 << 20).choice.algorithm_name
    assert forced("fan(width=8)", Collective.ALL_GATHER) == usual
    with pytest.raises(UnknownAlgorithm, match=r"ABCCL_ALGORITHM: broadcast 'fan\(1\)': width wants"):
        forced("fan(1)")
    with pytest.raises(UnknownAlgorithm, match=r"no collective has an algorithm called 'fna\(2\)'"):
        forced("fna(2)")


OWN = """
from abccl.algorithms import Collective, Parameter, algorithm, recv, send

@algorithm(Collective.BROADCAST, parameters={"relay": Parameter(1, "a rank", lambda relay: relay >= 0)})
def relayed_broadcast(rank, size, relay):
    if rank == 0:
        yield [send(peer, 0) for peer in range(1, size)]
    else:
        yield recv(0, 0)
"""


def test_the_commands_take_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)

    def run(*arguments: str) -> str:
        return CliRunner().invoke(main, arguments, prog_name="abccl").output

    verified = run("verify", "own.py", "--ranks", "1-4", "--algorithm", "relayed(2)", "--algorithm", "relayed")
    assert verified.splitlines() == [
        "broadcast relayed(relay=2): 1-4 ranks: ok",
        "broadcast relayed: 1-4 ranks: ok",
    ]
    assert run("show", "broadcast", "relayed(3)").startswith("broadcast relayed(relay=3), 4 ranks")
    refused = run("verify", "--algorithm", "relayed(-1)", "--collective", "broadcast")
    assert "relay wants a rank, and got '-1'" in refused
    assert run("draw", "broadcast", "relayed(3)").endswith(": broadcast-relayed-relay-3-4.svg\n")


def test_parts_between_separators_outside_of_parentheses() -> None:
    assert split_outside(" a, b(c, d(e)) ,f", ",") == ["a", "b(c, d(e))", "f"]
    assert split_outside("a=b(c=d)=e", "=") == ["a", "b(c=d)", "e"]
    for wrong in ("a(", ")a(", "a)b", "((a)"):
        with pytest.raises(ArgumentError, match="do not match"):
            split_outside(wrong, ",")
