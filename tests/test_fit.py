"""Calibration and its fit against ranks that are only thought of: their times are the model's, by constants we know."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abccl.algorithms import Algorithm, Collective
from abccl.algorithms.model import FAR_ALPHA, LAUNCH, NAMES, Floats
from abccl.collectives.tuner import calibrate as calibration
from abccl.collectives.tuner import fit as fitting
from abccl.collectives.tuner.calibrate import BUDGET, SIZES, calibrate
from abccl.collectives.tuner.candidates import Place, candidates, priced
from abccl.collectives.tuner.choice import Choice
from abccl.collectives.tuner.fit import BYTES, LATENCIES, NETWORK, Sample, constants_at, fit, merged
from abccl.collectives.tuner.table import Table, built_in
from abccl.collectives.tuner.tuner import Tuner
from abccl.transports.shm import PROTOCOLS, slot_bytes

C = Collective
FIVE = (C.ALL_REDUCE, C.REDUCE_SCATTER, C.ALL_GATHER, C.BROADCAST, C.ALL_TO_ALL)
UNKNOWNS = (*LATENCIES, *BYTES)


def place(*hosts: int, cores: int = 8) -> Place:
    """So many ranks on each host."""
    starts = np.cumsum([0, *hosts])
    ranks = tuple(tuple(range(start, start + here)) for start, here in zip(starts.tolist(), hosts))
    return Place(ranks, min(cores, max(hosts)), slot_bytes(max(hosts)), 4)


HERE = (place(2), place(3), place(4, cores=2))
each_place = pytest.mark.parametrize("where", HERE, ids=lambda where: f"{where.size} ranks, {where.cores} cores")


def world(seed: int, spread: float = 1.0) -> Table:
    """Constants that are up to exp(spread) times those of the built-in table, or as much less."""
    draw = random.Random(seed)
    base = built_in("near")
    factors = {unknown: np.exp(draw.uniform(-spread, spread)) for unknown in (*UNKNOWNS, *NETWORK)}
    tables = []
    for nbytes in SIZES[1:]:
        there = constants_at(base, nbytes)
        for (name, ways), factor in factors.items():
            of = constants_at(base, SIZES[1]) if (name, ways) in LATENCIES else there
            there[list(ways), name] = factor * of[ways[0], name]
        tables.append((nbytes, there))
    return Table("thought of", SIZES[1:], merged(tables))


def predicted(choice: Choice, nbytes: int, where: Place, table: Table) -> float:
    assert isinstance(choice.algorithm, Algorithm)
    return priced(choice.algorithm, [choice], nbytes, where, table)[0].predicted


class Watch:
    """A stopwatch in a world where calls take what the table says, times `disturbance` of each.

    Time passes by what is run, and by nothing else.
    """

    def __init__(self, where: Place, table: Table, disturbance: Any = lambda: 1.0) -> None:
        self.transport = SimpleNamespace(rank=0)
        self.where, self.table, self.disturbance = where, table, disturbance
        self.now = 0.0
        self.calls: list[tuple[Collective, int, Choice]] = []

    def subject(self, collective: Collective, nbytes: int, choice: Choice) -> float:
        self.calls.append((collective, nbytes, choice))
        return predicted(choice, nbytes, self.where, self.table) * self.disturbance()

    def seconds(self, subject: float, calls: int) -> float:
        self.now += subject * (calls + 1)
        return subject

    def exchange(self, blob: bytes) -> list[bytes]:
        return [blob] * self.where.size


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calibrates in a watch's time."""

    def run(watch: Watch, budget: float = BUDGET) -> Table:
        clock = SimpleNamespace(perf_counter=lambda: watch.now, strftime=lambda _: "today")
        monkeypatch.setattr(calibration, "time", clock)
        return calibrate(watch, watch.where, watch.exchange, "near", budget=budget)  # type: ignore[arg-type]

    return run


def errors(found: Table, truth: Table, where: Place, calls: list[tuple[int, Choice]]) -> Floats:
    """Relative errors of what one table predicts, the other being right."""
    return np.array([predicted(c, n, where, found) / predicted(c, n, where, truth) - 1 for n, c in calls])


# ---- all of it


@each_place
@pytest.mark.parametrize("seed", range(3))
def test_what_was_measured_is_predicted(where: Place, seed: int, watched: Any) -> None:
    truth = world(seed)
    watch = Watch(where, truth)
    found = watched(watch)
    off = abs(errors(found, truth, where, [(nbytes, choice) for _, nbytes, choice in watch.calls]))
    assert np.median(off) < 0.02
    assert off.max() < 0.2
    assert found.residual == pytest.approx(np.median(off), abs=0.01)
    start = abs(errors(built_in("near"), truth, where, [(n, choice) for _, n, choice in watch.calls]))
    assert np.median(start) > 10 * np.median(off)


@each_place
def test_what_was_not_measured_is_predicted(where: Place, watched: Any) -> None:
    """Other algorithms, other sizes; and what is chosen is nearly the best."""
    truth = world(1)
    found = watched(Watch(where, truth))
    tuner, best = Tuner(where, found), Tuner(where, truth)
    for collective in FIVE:
        for nbytes in (64, 40_000, 12 << 20):
            calls = [(nbytes, one.choice) for one in candidates(collective, nbytes, where, found)]
            off = abs(errors(found, truth, where, calls))
            assert np.median(off) < 0.05
            chosen, right = (t.decide(collective, nbytes).choice for t in (tuner, best))
            assert predicted(chosen, nbytes, where, truth) < 1.1 * predicted(right, nbytes, where, truth)


@each_place
def test_disturbed_rounds_do_not_count(where: Place, watched: Any) -> None:
    """A fifth of all calls take five times as long as they should."""
    calls = [(nbytes, choice) for nbytes in SIZES[1:] for _, choice in calibration._calls(nbytes, where)]

    def disturbed(draw: random.Random) -> float:
        return 5.0 if draw.random() < 0.2 else 1.0

    for seed in range(3):
        truth = world(seed)
        found = watched(Watch(where, truth, partial(disturbed, random.Random(seed))))
        assert np.median(abs(errors(found, truth, where, calls))) < 0.03


@pytest.mark.parametrize("where", [place(2, 2), place(3, 1), place(1, 1, 1)], ids=lambda where: str(where.hosts))
def test_several_hosts(where: Place, watched: Any) -> None:
    """What crosses is found; what is known of a host stays as the library brings it."""
    start = built_in("near")
    rows = {
        protocol: tuple(
            tuple(3 * value for value in row) if name.startswith("far") else row for name, row in zip(NAMES, columns)
        )
        for protocol, columns in start.constants.items()
    }
    truth = Table("thought of", start.sizes, rows)
    watch = Watch(where, truth)
    found = watched(watch, 20.0)
    off = abs(errors(found, truth, where, [(nbytes, choice) for _, nbytes, choice in watch.calls]))
    assert np.median(off) < 0.05
    known = list(range(LAUNCH, FAR_ALPHA))
    for nbytes in found.sizes:
        assert constants_at(found, nbytes)[:, known] == pytest.approx(constants_at(start, nbytes)[:, known])


def test_it_ends_in_time(watched: Any) -> None:
    """However slow the ranks are: then fewer sizes are measured, but the first always is."""
    where = place(2)
    for slow in (1, 10, 100):
        truth = world(0)
        watch = Watch(where, truth, lambda slow=slow: float(slow))
        found = watched(watch)
        assert watch.now < BUDGET or {nbytes for _, nbytes, _ in watch.calls} == {SIZES[0]}
        assert len({nbytes for _, nbytes, _ in watch.calls}) == len(SIZES) or slow > 1
        assert found.sizes[0] == SIZES[min(1, len({nbytes for _, nbytes, _ in watch.calls}) - 1)]
    assert len(found.sizes) < len(SIZES) - 1
    assert len({nbytes for _, nbytes, _ in watch.calls}) < len(SIZES)


def test_more_time_is_more_rounds(watched: Any) -> None:
    where = place(2)
    short, long = Watch(where, world(0)), Watch(where, world(0))
    one, other = watched(short), watched(long, 5 * BUDGET)
    for protocol in PROTOCOLS:
        assert one.constants[protocol] == tuple(map(pytest.approx, other.constants[protocol]))
    assert long.now > 3 * short.now


# ---- the fit alone


def samples(where: Place, truth: Table, nbytes: int) -> list[Sample]:
    return [Sample(nbytes, c, predicted(c, nbytes, where, truth)) for _, c in calibration._calls(nbytes, where)]


@each_place
def test_the_start_stays_where_it_is_right(where: Place) -> None:
    truth = world(0, 0.0)
    for nbytes in SIZES[1:]:
        start = constants_at(truth, nbytes)
        found, off = fit(samples(where, truth, nbytes), where, start, UNKNOWNS)
        assert found == pytest.approx(start)
        assert abs(off).max() < 1e-9


@each_place
def test_without_a_prior_all_times_are_explained(where: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "PRIOR", 1e-7)
    for seed in range(3):
        truth = world(seed, 0.3)
        for nbytes in SIZES[1:-1]:
            start = constants_at(built_in("near"), nbytes)
            for name, ways in LATENCIES:
                start[list(ways), name] = constants_at(truth, nbytes)[ways[0], name]
            _, off = fit(samples(where, truth, nbytes), where, start, BYTES)
            assert abs(off).max() < 0.01, (seed, nbytes)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_constant_is_negative_and_all_are_numbers(data: st.DataObject) -> None:
    """Whatever was measured."""
    where = data.draw(st.sampled_from(HERE))
    nbytes = data.draw(st.sampled_from(SIZES))
    times = st.floats(1e-9, 10.0)
    some = [Sample(nbytes, c, data.draw(times)) for _, c in calibration._calls(nbytes, where)]
    found, off = fit(some, where, constants_at(built_in("far"), nbytes), data.draw(st.sampled_from([UNKNOWNS, BYTES])))
    assert np.isfinite(found).all() and np.isfinite(off).all()
    assert (found >= 0).all()


@given(st.integers(0, 1 << 30))
def test_what_is_set_to_zero_leaves_the_best_of_the_others(seed: int) -> None:
    draw = np.random.default_rng(seed)
    matrix, wanted = draw.normal(size=(9, 4)), draw.normal(size=9)
    found = fitting._non_negative(matrix, wanted)
    used = found > 0
    assert (found >= 0).all()
    assert matrix[:, used].T @ (matrix @ found - wanted) == pytest.approx(np.zeros(used.sum()), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_few_wrong_samples_do_not_decide(data: st.DataObject) -> None:
    where = data.draw(st.sampled_from(HERE))
    nbytes = data.draw(st.sampled_from(SIZES[2:-1]))
    truth = world(data.draw(st.integers(0, 50)), 0.5)
    right = samples(where, truth, nbytes)
    wrong = set(data.draw(st.permutations(range(len(right))))[: len(right) // 5])
    some = [Sample(s.nbytes, s.choice, s.seconds * (5 if i in wrong else 1)) for i, s in enumerate(right)]
    start = constants_at(built_in("near"), nbytes)
    for name, ways in LATENCIES:
        start[list(ways), name] = constants_at(truth, nbytes)[ways[0], name]
    _, off = fit(some, where, start, BYTES)
    assert np.median([abs(error) for index, error in enumerate(off) if index not in wrong]) < 0.05
