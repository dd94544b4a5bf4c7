"""The constants that explain measured times best: a robust least-squares fit of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...algorithms import Algorithm
from ...algorithms.model import (
    ALPHA,
    COPY,
    FAR_ALPHA,
    FAR_BETA,
    FAR_OVERHEAD,
    FOLD,
    LAUNCH,
    LENT,
    LENT_FOLD,
    NAMES,
    OVERHEAD,
    RECEIVE,
    SEND,
    Floats,
)
from ...transports.shm import PROTOCOLS
from .candidates import Place, pricing, runs_of
from .choice import Choice
from .table import Table

HUBER = 0.15
"""Relative errors beyond this count by their size, not by its square: a run that was disturbed must not decide."""

PRIOR = 0.02
"""The weight of what was known before, of a run's: it decides on what no run tells apart."""

FLOOR = 0.05
"""Of what was thought of a constant, what it is at least: nothing is for nothing, and noise may say so."""

LEAST = (1e-8, 1e-11)
"""What is thought of a constant at least: seconds, and seconds per byte."""

PER_BYTE = (SEND, RECEIVE, LENT, COPY, FOLD, LENT_FOLD, FAR_BETA)

PASSES = 5


@dataclass(frozen=True)
class Sample:
    """A call and the seconds that it took."""

    nbytes: int
    choice: Choice
    seconds: float


# Every unknown is a constant of some protocols: what is copied is copied alike, whatever else is lent.
_EVERY = tuple(range(len(PROTOCOLS)))
LATENCIES = tuple((name, _EVERY) for name in (LAUNCH, ALPHA, OVERHEAD))
BYTES = (
    (COPY, _EVERY),
    *((name, way) for name in (SEND, RECEIVE, FOLD) for way in ((0, 2), (1, 3))),
    *((name, (way,)) for name in (LENT, LENT_FOLD) for way in (2, 3)),
)
NETWORK = tuple((name, _EVERY) for name in (FAR_ALPHA, FAR_OVERHEAD, FAR_BETA))

Unknown = tuple[int, tuple[int, ...]]


def fit(samples: Sequence[Sample], place: Place, start: Floats, unknowns: Sequence[Unknown]) -> tuple[Floats, Floats]:
    """Find some of the constants, the others being known.

    Args:
        start: the constants by protocol and name: those that are known, and what is thought of the others.
        unknowns: which to find; none gets negative.

    Returns:
        All constants, and the relative error of every sample.
    """
    constants, weight = start.copy(), np.ones(len(samples))
    took = np.array([sample.seconds for sample in samples])
    thought = np.array([max(start[ways[0], name], LEAST[name in PER_BYTE]) for name, ways in unknowns])
    passes = PASSES if place.size <= 8 else 2
    for number in range(passes + 1):
        counts = _counts(samples, place, constants)
        protocols = [_protocol(sample) for sample in samples]
        total = sum(counts[:, name] * constants[protocols, name] for name in range(len(NAMES)))
        errors = total / took - 1
        if number == passes:
            break
        columns = np.array(
            [counts[:, name] * np.isin(protocols, ways) for name, ways in unknowns]
        ).T  # of each sample, how often each unknown counts
        known = total - columns @ np.array([constants[ways[0], name] for name, ways in unknowns])
        weight = 1 / np.sqrt(np.maximum(1.0, np.abs(errors) / HUBER)) if number else weight
        rows = columns * thought / took[:, None] * weight[:, None]
        wanted = (1 - known / took) * weight - FLOOR * rows.sum(axis=1)
        prior = PRIOR * np.sqrt(len(samples)) * np.eye(len(unknowns))
        above = _non_negative(np.concatenate([rows, prior]), np.concatenate([wanted, (1 - FLOOR) * prior.sum(axis=1)]))
        found = (FLOOR + above) * thought
        # The path changes with the constants: half a step, until the last.
        share = 1.0 if number == passes - 1 else 0.5
        for (name, ways), value in zip(unknowns, found):
            for way in ways:
                constants[way, name] += share * (value - constants[way, name])
    return constants, errors


def _counts(samples: Sequence[Sample], place: Place, constants: Floats) -> Floats:
    """By sample and name, how often each constant counts."""
    by_algorithm: dict[Algorithm, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        assert isinstance(sample.choice.algorithm, Algorithm)
        by_algorithm[sample.choice.algorithm].append(index)
    counts = np.zeros((len(samples), len(NAMES)))
    for algorithm, indices in by_algorithm.items():
        calls = [(samples[index].nbytes, samples[index].choice) for index in indices]
        columns = constants[[_protocol(samples[index]) for index in indices]].T
        runs = runs_of(algorithm, calls, place, columns)
        counts[indices] = pricing(algorithm, place).counts(runs, place.cores_by_host).T
    return counts


def _protocol(sample: Sample) -> int:
    return PROTOCOLS.index(sample.choice.protocol or PROTOCOLS[0])


def _non_negative(matrix: Floats, wanted: Floats) -> Floats:
    """Least squares without negative results: the most negative one is set to zero until there is none."""
    free = np.ones(matrix.shape[1], dtype=bool)
    found = np.zeros(matrix.shape[1])
    while free.any():
        found[:] = 0.0
        found[free] = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
        if found.min() >= 0:
            break
        free[int(np.argmin(found))] = False
    return np.maximum(found, 0.0)


def merged(tables: Sequence[tuple[int, Floats]]) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Constants found at several sizes, as a `Table` has them."""
    return {
        protocol: tuple(tuple(float(found[way, name]) for _, found in tables) for name in range(len(NAMES)))
        for way, protocol in enumerate(PROTOCOLS)
    }


def constants_at(table: Table, nbytes: int) -> Floats:
    """A table's constants at a size, by protocol and name."""
    return np.array([table.at(protocol, nbytes) for protocol in PROTOCOLS])
