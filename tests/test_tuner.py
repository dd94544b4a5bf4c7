"""The tuner: tables, who decides and in which order, what it says of it, and how calls are compared with it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abccl
from abccl import Choice, Communicator
from abccl.algorithms import Collective, lookup
from abccl.algorithms.model import NAMES
from abccl.collectives.tuner.candidates import Candidate, Place, candidates
from abccl.collectives.tuner.report import Drift, Report
from abccl.collectives.tuner.rules import parse
from abccl.collectives.tuner.table import LINKS, Measured, Table, built_in
from abccl.collectives.tuner.tuner import Call, Tuner, register_chooser, size_class, unregister_chooser
from abccl.errors import ArgumentError, UnknownAlgorithm
from abccl.transports.shm import PROTOCOLS, shm_threads

C = Collective
NEAR = built_in("near")
FOUR = Place(((0, 1, 2, 3),), 4, 64 << 10, 4)
WITH_NATIVES = replace(FOUR, hosts=((0, 1), (2, 3)), natives=frozenset({C.ALL_REDUCE}))


def constant(value: float, sizes: tuple[int, ...] = (1024,)) -> Table:
    """All constants are this."""
    rows = tuple((value,) * len(sizes) for _ in NAMES)
    return Table("a test", sizes, dict.fromkeys(PROTOCOLS, rows))


RICH = replace(
    NEAR,
    residual=0.25,
    natives={"all_reduce": ((8, 1e-5), (1 << 20, 1e-3))},
    measured={
        "all_reduce": (Measured(1024, "ring", "cached", 65536, 2, 1e-6), Measured(8, "native", None, None, None, 2.0))
    },
)

# ---- tables


@pytest.mark.parametrize("table", [built_in("near"), built_in("far"), RICH], ids=["near", "far", "rich"])
def test_a_table_survives_json(table: Table) -> None:
    again = Table.from_json(json.loads(json.dumps(table.to_json(), allow_nan=False)))
    assert again == table
    assert again.to_json() == table.to_json()
    for nbytes in (0, 1, 777, 1 << 30):
        assert (again.at("lent", nbytes) == table.at("lent", nbytes)).all()


DAMAGES = {
    "no object": lambda t: None,
    "a constant too large for a number": lambda t: _constant(t, 10**400),
    "no sizes": lambda t: {**t, "sizes": []},
    "sizes that do not ascend": lambda t: {**t, "sizes": t["sizes"][::-1]},
    "a size twice": lambda t: {**t, "sizes": [t["sizes"][0]] * len(t["sizes"])},
    "a size of 0": lambda t: {**t, "sizes": [0, *t["sizes"][1:]]},
    "endless sizes": lambda t: {**t, "sizes": [*t["sizes"][:-1], math.inf]},
    "one size more": lambda t: {**t, "sizes": [*t["sizes"], 1 << 40]},
    "a protocol less": lambda t: {**t, "constants": {k: v for k, v in t["constants"].items() if k != "lent"}},
    "a protocol more": lambda t: {**t, "constants": {**t["constants"], "magic": t["constants"]["lent"]}},
    "no constants": lambda t: {**t, "constants": []},
    "natives in disorder": lambda t: {**t, "natives": {"all_reduce": [[1024, 1.0], [8, 1.0]]}},
    "one native size twice": lambda t: {**t, "natives": {"all_reduce": [[8, 1.0], [8, 2.0]]}},
    "a negative native": lambda t: {**t, "natives": {"all_reduce": [[8, 1.0], [9, -2.0]]}},
    "a measured size in words": lambda t: _measured(t, nbytes="many"),
    "a measured time that is none": lambda t: _measured(t, seconds=math.nan),
    "a measured time in words": lambda t: _measured(t, seconds="1"),
    "a field more": lambda t: _measured(t, speed=1.0),
    "a field less": lambda t: {**t, "measured": {"all_reduce": [{"nbytes": 1}]}},
    "a residual that is none": lambda t: {**t, "residual": math.nan},
    **{f"no {word}": lambda t, word=word: {k: v for k, v in t.items() if k != word} for word in NEAR.to_json()},
    **{
        f"a constant {value}": lambda t, value=value: _constant(t, value)
        for value in (-1e-9, math.nan, math.inf, "slow", None)
    },
}  # fmt: skip


def _measured(table: Any, **changes: Any) -> Any:
    one = {**vars(Measured(8, "ring", None, None, None, 1.0)), **changes}
    return {**table, "measured": {"all_reduce": [one]}}


def _constant(table: Any, value: Any) -> Any:
    changed = copy.deepcopy(table)
    changed["constants"]["cached"]["alpha"][0] = value
    return changed


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_table_is_refused(damage: str) -> None:
    with pytest.raises(ArgumentError, match="this is no table of the tuner"):
        Table.from_json(DAMAGES[damage](copy.deepcopy(RICH.to_json())))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_json_is_a_table_or_an_argument_error(data: st.DataObject) -> None:
    """A table that is damaged anywhere; and if it is one, it can be used."""
    document: Any = copy.deepcopy(RICH.to_json())
    if data.draw(st.booleans()):
        document = data.draw(ANYTHING)
    else:
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.integers(0, 4)) == 0:
                break
            place = place[key]
        place[key] = data.draw(ANYTHING)
    try:
        table = Table.from_json(document)
    except ArgumentError:
        return
    json.dumps(table.to_json(), allow_nan=False)
    with np.errstate(all="ignore"):  # constants may be as large as numbers are
        assert Tuner(FOUR, table).decide(C.ALL_REDUCE, 1000).candidate


def test_between_sizes_constants_are_between_and_beyond_they_stay() -> None:
    rows = tuple((1.0, 3.0, 4.0) for _ in NAMES)
    table = Table("a test", (1024, 4096, 8192), dict.fromkeys(PROTOCOLS, rows))
    for nbytes, wanted in ((0, 1), (1, 1), (1024, 1), (2048, 2), (4096, 3), (6144, 3.5), (8192, 4), (1 << 40, 4)):
        assert table.at("cached", nbytes).tolist() == [wanted] * len(NAMES), nbytes
    assert constant(7.0).at("lent", 3).tolist() == constant(7.0).at("lent", 1 << 30).tolist() == [7.0] * len(NAMES)


def test_what_the_engine_has_of_its_own_goes_straight_on() -> None:
    table = replace(NEAR, natives={"all_reduce": ((8, 1.0), (1024, 2.0), (2048, 4.0)), "broadcast": ((8, 1.0),)})
    for nbytes, wanted in ((8, 1), (516, 1.5), (1024, 2), (1536, 3), (4096, 8), (0, 1)):
        assert table.native_seconds("all_reduce", nbytes) == wanted
    assert table.native_seconds("all_gather", 8) is None
    assert table.native_seconds("broadcast", 8) is None  # one size tells nothing of others


@pytest.mark.parametrize("link", LINKS)
def test_what_the_library_brings(link: str) -> None:
    table = built_in(link)
    for nbytes in (8, 1 << 16, 1 << 26):
        for protocol in PROTOCOLS:
            assert (table.at(protocol, nbytes) >= 0).all()
            alpha, far = table.at(protocol, nbytes)[[NAMES.index("alpha"), NAMES.index("far_alpha")]]
            assert 1e-9 < alpha < far < 1e-2


# ---- sizes


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50))
def test_size_classes(first: int, second: int) -> None:
    """Powers of two are classes, and there are four in every octave; a class is its own."""
    for nbytes in (first, second):
        found = size_class(nbytes)
        assert size_class(found) == found
        assert nbytes * 0.8 <= found <= nbytes * 1.25
    if first <= second:
        assert size_class(first) <= size_class(second)


def test_four_classes_in_an_octave() -> None:
    assert {size_class(1 << power) for power in range(40)} == {1 << power for power in range(40)}
    for power in (4, 10, 30):
        octave = np.unique([size_class(n) for n in np.linspace(1 << power, 2 << power, 1000).astype(int).tolist()])
        assert len(octave) == 5  # with both ends
    assert [size_class(n) for n in range(5)] == [0, 1, 2, 3, 4]


# ---- who decides


@pytest.fixture(autouse=True)
def choosers() -> Iterator[None]:
    """What a test registers is asked by no other."""
    from abccl.collectives.tuner import tuner

    before = list(tuner._choosers)
    yield
    tuner._choosers[:] = before


RULES = parse(
    '[[rule]]\ncollective = "all_reduce"\nfrom = 1024\nranks = 4\nalgorithm = "tree"\nlanes = 2\n', "rules.toml"
)


def test_the_order_of_who_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, environment, rule, chooser, what was measured, what is predicted."""
    plain = Tuner(FOUR, NEAR)
    best = plain.decide(C.ALL_REDUCE, 4096)
    assert (best.source, best.forced, best.reason) == ("predicted", False, "it is predicted to be the fastest")
    slow = next(one.choice for one in reversed(plain.candidates(C.ALL_REDUCE, 4096)))
    how = Measured(4096, slow.algorithm_name, slow.protocol, slow.segment, slow.lanes, 1e-9)
    tuner = Tuner(FOUR, replace(NEAR, measured={"all_reduce": (how,)}), RULES)
    assert tuner.decide(C.ALL_GATHER, 4096).source == "predicted"
    small = replace(how, nbytes=512)
    other = Tuner(FOUR, replace(NEAR, measured={"all_reduce": (how, small)}))
    found = other.decide(C.ALL_REDUCE, 4096)
    assert (found.source, found.choice, found.reason) == ("measured", slow, "it is measured to be the fastest")

    register_chooser(lambda call: "ring")
    found = other.decide(C.ALL_REDUCE, 4096)
    assert (found.source, found.choice, found.forced) == ("chooser", Choice(lookup(C.ALL_REDUCE, "ring")), True)
    found = tuner.decide(C.ALL_REDUCE, 4096)
    assert (found.source, found.choice) == ("rule", Choice(lookup(C.ALL_REDUCE, "tree"), lanes=2))
    assert found.reason == "rules.toml, rule 1 (line 1) asks for it"
    assert tuner.decide(C.ALL_REDUCE, 1023).source == "chooser"
    monkeypatch.setenv("ABCCL_ALGORITHM", "all_reduce=rabenseifner,swing")
    found = tuner.decide(C.ALL_REDUCE, 4096)
    assert (found.source, found.choice.algorithm_name) == ("environment", "rabenseifner")
    assert "ABCCL_ALGORITHM" in found.reason
    found = tuner.decide(C.ALL_REDUCE, 4096, "direct")
    assert (found.source, found.choice) == ("argument", Choice(lookup(C.ALL_REDUCE, "direct")))
    wanted = Choice("knomial(radix=4)", "lent", 4096, 1)
    assert tuner.decide(C.ALL_REDUCE, 4096, wanted).choice == replace(
        wanted, algorithm=lookup(C.ALL_REDUCE, "knomial(radix=4)")
    )
    assert tuner.decide(C.ALL_REDUCE, 4096, lookup(C.ALL_REDUCE, "tree")).choice.algorithm_name == "tree"


def test_who_asked_for_what_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(replace(FOUR, hosts=((0, 1, 2),)), NEAR)
    with pytest.raises(UnknownAlgorithm, match="no all_reduce algorithm is called 'rign': did you mean ring"):
        tuner.decide(C.ALL_REDUCE, 8, "rign")
    with pytest.raises(ArgumentError, match="algorithm must be an algorithm, its name or a Choice, and is 7"):
        tuner.decide(C.ALL_REDUCE, 8, 7)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="the algorithm given is one for broadcast"):
        tuner.decide(C.ALL_REDUCE, 8, lookup(C.BROADCAST, "ring"))

    @register_chooser
    def mine(call: Call) -> str | Choice | None:
        assert (call.ranks, call.hosts) == (3, ((0, 1, 2),))
        if call.collective is not C.ALL_GATHER:
            return None
        return {8: "rign", 16: Choice("neighbor_exchange"), 32: None}.get(call.nbytes)  # type: ignore[arg-type]

    with pytest.raises(UnknownAlgorithm, match=r"the chooser .*mine: no all_gather algorithm is called 'rign'"):
        tuner.decide(C.ALL_GATHER, 8)
    with pytest.raises(ArgumentError, match=r"the chooser .*mine: all_gather: neighbor_exchange wants an even"):
        tuner.decide(C.ALL_GATHER, 16)
    assert tuner.decide(C.ALL_GATHER, 32).source == "predicted"
    rules = parse('[[rule]]\ncollective = "all_gather"\nalgorithm = "neighbor_exchange"\n', "mine.toml")
    with pytest.raises(
        ArgumentError, match=r"mine\.toml, rule 1 \(line 1\): all_gather: neighbor_exchange wants an even"
    ):
        Tuner(tuner.place, NEAR, rules).decide(C.ALL_GATHER, 8)
    monkeypatch.setenv("ABCCL_ALGORITHM", "neighbor_exchange")
    with pytest.raises(ArgumentError, match="ABCCL_ALGORITHM: all_gather: neighbor_exchange wants an even"):
        tuner.decide(C.ALL_GATHER, 8)
    assert tuner.decide(C.ALL_REDUCE, 8).source == "predicted"  # which has none of that name
    monkeypatch.setenv("ABCCL_ALGORITHM", "rign")
    with pytest.raises(UnknownAlgorithm, match="ABCCL_ALGORITHM='rign': no collective has an algorithm called 'rign'"):
        tuner.decide(C.ALL_REDUCE, 8)


def test_native_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wishes in general is passed over; the caller gets what he asked for, or the transport's error."""
    rules = parse('[[rule]]\ncollective = ["all_reduce", "broadcast"]\nalgorithm = "native"\n', "rules.toml")
    having, lacking = Tuner(WITH_NATIVES, NEAR, rules), Tuner(FOUR, NEAR, rules)
    strict = Tuner(replace(WITH_NATIVES, reproducible=True), NEAR, rules)
    assert having.decide(C.ALL_REDUCE, 8).choice == Choice("native")
    assert having.decide(C.BROADCAST, 8).source == "predicted"
    assert {tuner.decide(C.ALL_REDUCE, 8).source for tuner in (lacking, strict)} == {"predicted"}
    monkeypatch.setenv("ABCCL_ALGORITHM", "native")
    plain = Tuner(WITH_NATIVES, NEAR)
    assert plain.decide(C.ALL_REDUCE, 8).source == "environment"
    assert {plain.decide(C.BROADCAST, 8).source, lacking.decide(C.ALL_REDUCE, 8).source} == {"predicted"}
    monkeypatch.delenv("ABCCL_ALGORITHM")
    register_chooser(lambda call: "native")
    assert Tuner(WITH_NATIVES, NEAR).decide(C.ALL_REDUCE, 8).source == "chooser"
    assert Tuner(FOUR, NEAR).decide(C.ALL_REDUCE, 8).source == "predicted"
    assert lacking.decide(C.ALL_REDUCE, 8, "native") == Tuner(FOUR, NEAR).decide(C.ALL_REDUCE, 8, "native")
    assert lacking.decide(C.ALL_REDUCE, 8, "native").choice == Choice("native")


def test_the_engines_own_wins_where_it_is_the_fastest() -> None:
    def chosen(seconds: float, place: Place = WITH_NATIVES) -> str:
        table = replace(NEAR, natives={"all_reduce": ((8, seconds), (1 << 20, seconds))})
        return Tuner(place, table).decide(C.ALL_REDUCE, 1024).choice.algorithm_name

    assert chosen(1e-9) == "native" != chosen(1.0)
    assert "native" not in (chosen(1e-9, FOUR), chosen(1e-9, replace(WITH_NATIVES, reproducible=True)))


def test_choosers_are_asked_last_first_until_one_is_gone() -> None:
    asked = []

    def chooser(name: str, answer: str | None) -> Any:
        def choose(call: Call) -> str | None:
            asked.append((name, call.collective, call.nbytes))
            return answer

        return register_chooser(choose)

    first, second, _ = chooser("first", "tree"), chooser("second", "ring"), chooser("third", None)
    tuner = Tuner(FOUR, NEAR)
    assert tuner.decide(C.ALL_REDUCE, 1000).choice.algorithm_name == "ring"
    assert asked == [("third", C.ALL_REDUCE, 1000), ("second", C.ALL_REDUCE, 1000)]
    unregister_chooser(second)
    assert tuner.decide(C.ALL_REDUCE, 1000).choice.algorithm_name == "tree"
    unregister_chooser(first)
    assert tuner.decide(C.ALL_REDUCE, 1000).source == "predicted"
    with pytest.raises(ArgumentError, match="register_chooser wants a function of a Call, and got 'ring'"):
        register_chooser("ring")  # type: ignore[arg-type]
    assert abccl.register_chooser is register_chooser


# ---- what was measured


def test_measured_times_hold_between_near_sizes() -> None:
    """Straight between two sizes that are at most 4 times apart; nowhere else."""
    times = {1024: 1e-3, 4096: 3e-3, 8192: 5e-3, 65536: 1.0}
    ring = tuple(Measured(n, "ring", "cached", None, None, seconds) for n, seconds in times.items())
    tuner = Tuner(FOUR, replace(NEAR, measured={"all_reduce": ring}))

    def known(nbytes: int, protocol: str = "cached") -> float | None:
        choice = Choice(lookup(C.ALL_REDUCE, "ring"), protocol)
        return next(one.measured for one in tuner.candidates(C.ALL_REDUCE, nbytes) if one.choice == choice)

    assert [known(n) for n in (4096, 6144, 8192, 65536)] == pytest.approx([3e-3, 4e-3, 5e-3, 1.0])
    assert known(2560) == pytest.approx(2e-3)
    assert known(16384) is None  # far from any above
    assert known(131072) is None
    assert known(4096, "streaming") is None


def test_what_was_measured_beats_what_is_only_predicted() -> None:
    """Even if it took longer: predictions of the others were tried and found worse, or they would be measured."""
    tuner = Tuner(FOUR, NEAR)
    slowest = tuner.candidates(C.ALL_REDUCE, 4096)[-1]
    c = slowest.choice
    how = Measured(4096, c.algorithm_name, c.protocol, c.segment, c.lanes, 0.5)
    tuned = Tuner(FOUR, replace(NEAR, measured={"all_reduce": (how,)}))
    found = tuned.decide(C.ALL_REDUCE, 4096)
    first, *others = tuned.candidates(C.ALL_REDUCE, 4096)
    assert (found.choice, found.source) == (c, "measured")
    assert (first.choice, first.seconds, first.predicted) == (c, 0.5, slowest.predicted)
    assert [one.measured for one in others] == [None] * len(others)
    assert [one.seconds for one in others] == sorted(one.seconds for one in others)


# ---- what it says


def test_an_explanation() -> None:
    tuner = Tuner(FOUR, NEAR)
    said = tuner.explain(C.ALL_REDUCE, 1 << 20)
    assert said.choice == tuner.decide(C.ALL_REDUCE, 1 << 20).choice
    assert (said.source, said.collective, said.nbytes, said.hosts) == ("predicted", C.ALL_REDUCE, 1 << 20, FOUR.hosts)
    assert len(said.candidates) == len(candidates(C.ALL_REDUCE, 1 << 20, FOUR, NEAR))
    assert [one.choice for one in said.candidates].count(said.choice) == 1
    data = json.loads(json.dumps(said.to_json(), allow_nan=False))
    assert [one["choice"] for one in data["candidates"]] == [one.choice.name for one in said.candidates]
    assert all(math.isclose(o["predicted"], o["alpha"] + o["beta"] + o["gamma"]) for o in data["candidates"])
    lines = str(said).splitlines()
    assert all(word in lines[0] for word in ("all_reduce of 1 MiB", "4 ranks on 1 host", "near cores"))
    assert NEAR.origin in lines[1]
    assert [word in lines[3] for word in ("predicted", "alpha", "beta", "gamma", "measured", "candidate")] == [True] * 6
    marked = [line for line in lines if line.startswith(">")]
    assert len(marked) == 1 and said.choice.name in marked[0]
    assert lines[-1].startswith(f"{said.choice.name}: it is predicted to be the fastest")
    names = [one.choice.algorithm_name for one in said.best]
    assert len(set(names)) == len(names) and set(names) == {one.choice.algorithm_name for one in said.candidates}
    assert len(said.lines(every=True)) == len(said.candidates) + 6 > len(lines)


def test_an_explanation_of_what_was_asked_for() -> None:
    said = Tuner(FOUR, NEAR).explain(C.ALL_REDUCE, 8, Choice("chain", "streaming", 1024, 3))
    (marked,) = (line for line in str(said).splitlines() if line.startswith(">"))
    assert marked.endswith("chain, streaming, 1 KiB segments, 3 lanes")
    assert str(said).splitlines()[-1] == "chain, streaming, 1 KiB segments, 3 lanes: the caller asked for it"
    assert Tuner(FOUR, NEAR, RULES).explain(C.ALL_REDUCE, 1024).reason == "rules.toml, rule 1 (line 1) asks for it"


def test_an_explanation_with_measured_times() -> None:
    choices = [one.choice for one in Tuner(FOUR, NEAR).candidates(C.ALL_REDUCE, 4096)]
    pair = (choices[0], next(c for c in choices if c.algorithm_name != choices[0].algorithm_name))
    known = tuple(
        Measured(4096, c.algorithm_name, c.protocol, c.segment, c.lanes, seconds)
        for c, seconds in zip(pair, (3e-3, 2e-3))
    )
    said = Tuner(FOUR, replace(NEAR, measured={"all_reduce": known})).explain(C.ALL_REDUCE, 4096)
    assert (said.choice, said.source) == (pair[1], "measured")
    (marked,) = (line for line in str(said).splitlines() if line.startswith(">"))
    assert "2 ms" in marked
    assert str(said).splitlines()[-1].endswith(f"{pair[0].name} comes next, 1.50 times as long")


def test_a_communicator_explains() -> None:
    with Communicator(shm_threads(1)[0]) as alone:
        said = alone.explain("AllReduce", "25MB")
        assert (said.nbytes, said.collective) == (25 << 20, C.ALL_REDUCE)
        assert alone.explain(C.BROADCAST, 8, algorithm="ring").source == "argument"
        for wrong in (("all_reduse", 8), ("all_reduce", "many"), ("all_reduce", -1)):
            with pytest.raises(ArgumentError):
                alone.explain(*wrong)


# ---- drift


@pytest.mark.parametrize(
    ("took", "parts"),
    [(1.0, False), (1.99, False), (2.0, False), (2.01, True), (0.51, False), (0.5, False), (0.49, True)],
)
def test_what_drifts(took: float, parts: bool) -> None:
    """More than twice as long as predicted, or less than half as long."""
    drift = Drift(C.ALL_REDUCE, 1024, "ring", 1.0, took)
    report = Report((drift, Drift(C.BROADCAST, 8, "tree", 1e-6, 1e-6)), "a test")
    assert (drift.ratio, drift.parts, report.drifted) == (took, parts, (drift,) * parts)
    assert sum("<-" in line for line in str(report).splitlines()) == parts
    last = str(report).splitlines()[-1]
    assert last.startswith(f"{int(parts)} of 2 ") and "more than 2 times" in last


def test_a_report_has_what_was_timed() -> None:
    tuner = Tuner(FOUR, NEAR)
    assert "no call has been timed yet" in str(tuner.report())
    times: dict[int, float | None] = {4096: None, 8: 1.0}
    for nbytes in times:
        tuner.watch(C.ALL_REDUCE, nbytes, tuner.decide(C.ALL_REDUCE, nbytes), lambda nbytes=nbytes: times[nbytes])
    tuner.watch(C.BROADCAST, 8, tuner.decide(C.BROADCAST, 8, "ring"), lambda: 1.0)  # which nobody predicted
    (only,) = tuner.report().calls
    assert (only.collective, only.nbytes, only.measured) == (C.ALL_REDUCE, 8, 1.0)
    assert only.predicted == tuner.decide(C.ALL_REDUCE, 8).candidate.seconds  # type: ignore[union-attr]
    times[4096] = 2.0
    assert [call.nbytes for call in tuner.report().calls] == [8, 4096]
    assert NEAR.origin in str(tuner.report())


def test_calls_are_timed_as_they_run() -> None:
    """Without being asked, one of 16 and those that find the fastest way; on each rank."""

    def body(c: Communicator) -> tuple[Report, Candidate | None]:
        with c:
            short, long = np.ones(16, "float32"), np.ones(50_000, "float32")
            for _ in range(200):
                c.all_reduce(short)
                c.all_reduce(long)
                c.broadcast(short, algorithm="tree")
            return c.tuner.report(), c.tuner.decide(C.ALL_REDUCE, 64).candidate

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(body, [Communicator(transport, timeout=60) for transport in shm_threads(2)]))
    for report, known in reports:
        short, long = report.calls
        assert (short.collective, short.nbytes, long.nbytes) == (C.ALL_REDUCE, 64, size_class(200_000))
        assert 0 < short.measured < 10 and 0 < long.measured < 10
        assert known and short.predicted == known.seconds


def test_a_candidate_can_be_replaced() -> None:
    one = Candidate(Choice("native"), 1.0, 0.0, 0.0)
    assert (replace(one, measured=2.0).seconds, one.seconds) == (2.0, 1.0)
