"""Random data that every rank can compute for every other, and the result that it must give.

Floating values are of random sign and magnitude 1 to 2 (1 to 1 + 1/ranks for a product). Sums, products and averages
of them are held against float64 (complex128), with the error that rounding after every addition can make: ranks times
the type's epsilon times the sum of the magnitudes. Everything else, and all integers, must be exact.

A call in place changes its own input: the sum of p ranks grows p-fold with every call. For timing the values are
therefore scaled down, as far as no difference of two of them is denormal, and the input is filled anew, outside the
timed region, before it could overflow (`calls_until_overflow`). A product is timed on random signs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..algorithms import Collective
from ..transports.types import element_type, numpy_dtype, numpy_operator
from .messages import AnyCase, Exchange

Values = np.ndarray[Any, Any]

CHUNK = 1 << 18
"""Elements that are drawn with one seed: any part of a vector can be computed without the rest."""


class Piece(NamedTuple):
    """A part of a rank's result: the combination of the same part of some ranks' inputs."""

    start: int
    sources: tuple[int, ...]
    offset: int
    elements: int


def pieces(case: AnyCase, rank: int, root: int) -> list[Piece]:
    """What `rank` must have after the call; nothing if it leaves it empty-handed."""
    if isinstance(case, Exchange):
        source = case.source(rank)
        return [] if source is None else [Piece(0, (source,), 0, case.count)]
    everyone, count = tuple(range(case.ranks)), case.count
    match case.collective:
        case Collective.ALL_REDUCE:
            return [Piece(0, everyone, 0, count)]
        case Collective.REDUCE:
            return [Piece(0, everyone, 0, count)] if rank == root else []
        case Collective.REDUCE_SCATTER:
            return [Piece(0, everyone, rank * count, count)]
        case Collective.ALL_GATHER:
            return [Piece(source * count, (source,), 0, count) for source in everyone]
        case Collective.GATHER:
            return [Piece(source * count, (source,), 0, count) for source in everyone] if rank == root else []
        case Collective.BROADCAST:
            return [Piece(0, (root,), 0, count)]
        case Collective.SCATTER:
            return [Piece(0, (root,), rank * count, count)]
        case Collective.ALL_TO_ALL:
            return [Piece(source * count, (source,), rank * count, count) for source in everyone]
        case Collective.BARRIER:
            return []


def values(case: AnyCase, seed: int, rank: int, start: int, stop: int) -> Values:
    """Elements start to stop of the input of `rank`."""
    first, last = start // CHUNK, -(-stop // CHUNK)
    chunks = [_chunk(case.dtype, case.op, case.ranks, seed, rank, number) for number in range(first, last)]
    joined = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return joined[start - first * CHUNK : stop - first * CHUNK]


@lru_cache(maxsize=4)
def _chunk(dtype: str, op: str, ranks: int, seed: int, rank: int, number: int) -> Values:
    random = np.random.Generator(np.random.SFC64([seed, rank, number]))
    target = numpy_dtype(dtype)
    kind = element_type(dtype).kind
    if kind in "iu":
        return random.integers(0, 256, CHUNK * target.itemsize, dtype=np.uint8).view(target)
    if kind == "b":
        return random.integers(0, 2, CHUNK, dtype=np.uint8).view(target)
    reals = CHUNK * (2 if kind == "c" else 1)
    wide = np.float32 if target.itemsize <= 4 or dtype == "complex64" else np.float64
    magnitudes = random.random(reals, dtype=wide)
    if op == "prod":
        magnitudes /= 2 * ranks if kind == "c" else ranks
    magnitudes += 1
    if op == "prod" and kind == "c":  # of a modulus near 1: one small part each
        magnitudes[1::2] -= 1
    signed = np.negative(magnitudes, out=magnitudes, where=random.integers(0, 2, reals, dtype=np.uint8).view(bool))
    return signed.view(target) if kind == "c" else signed.astype(target, copy=False)


def timing_values(case: AnyCase, seed: int, rank: int, start: int, stop: int) -> Values:
    """Like `values`, in a form that may be reduced in place again and again."""
    drawn = values(case, seed, rank, start, stop)
    if element_type(case.dtype).kind not in "fc":
        return drawn
    if case.op == "prod":
        signs: Values = np.where(drawn.real < 0, -1, 1).astype(drawn.dtype)
        return signs
    if case.op == "sum" and case.in_place:
        scaled: Values = drawn * np.array(2.0 ** _exponent(case.dtype), dtype=drawn.dtype)
        return scaled
    return drawn


def calls_until_overflow(case: AnyCase) -> int | None:
    """How often the collective may be called in place on `timing_values`; None if there is no limit."""
    if case.op != "sum" or not case.in_place or element_type(case.dtype).kind not in "fc" or case.ranks == 1:
        return None
    largest = np.log2(_finfo(case.dtype).max.astype(np.float64))
    return max(1, int((largest - 2 - _exponent(case.dtype)) / math.log2(case.ranks)))


def _exponent(dtype: str) -> int:
    """Of the scale: differences of scaled values are no smaller than the smallest normal number."""
    info = _finfo(dtype)
    return int(info.minexp) + int(info.nmant)


def _finfo(dtype: str) -> Any:
    if dtype == "bfloat16":
        from ml_dtypes import finfo

        of_half: Any = finfo
        return of_half(numpy_dtype(dtype))
    return np.finfo(numpy_dtype(dtype))


def fill(case: AnyCase, target: Values, seed: int, rank: int, timing: bool = False) -> None:
    """Write the input of `rank` into `target`."""
    draw = timing_values if timing else values
    for start in range(0, target.size, CHUNK):
        stop = min(start + CHUNK, target.size)
        target[start:stop] = draw(case, seed, rank, start, stop)


def poison(target: Values) -> None:
    """Write what no result is, so that a call that does nothing is found out."""
    target.view(np.uint8)[:] = 1 if target.dtype == bool else 0xFF  # a NaN, and -1 or the largest integer


def count_wrong(case: AnyCase, result: Values, seed: int, rank: int, root: int) -> int:
    """How many elements of the result of `rank` are not what they must be."""
    wrong = 0
    for piece in pieces(case, rank, root):
        for start, stop in _chunks(piece):
            got = result[piece.start + start - piece.offset : piece.start + stop - piece.offset]
            wrong += _wrong_in(case, got, [values(case, seed, source, start, stop) for source in piece.sources])
    return wrong


def _chunks(piece: Piece) -> Iterator[tuple[int, int]]:
    """The piece's range of elements, cut where chunks begin."""
    start, end = piece.offset, piece.offset + piece.elements
    while start < end:
        stop = min(end, (start // CHUNK + 1) * CHUNK)
        yield start, stop
        start = stop


def _wrong_in(case: AnyCase, got: Values, inputs: list[Values]) -> int:
    kind = element_type(case.dtype).kind
    if not case.op:
        return _differing(got, inputs[0])
    operator = numpy_operator(case.op, case.dtype)
    if kind in "iub" or case.op in ("min", "max"):
        expected = inputs[0]
        for more in inputs[1:]:
            expected = operator(expected, more)
        return int(np.count_nonzero(got != expected))
    wide = np.complex128 if kind == "c" else np.float64
    exact = inputs[0].astype(wide)
    magnitude = np.abs(exact)
    for more in inputs[1:]:
        exact = operator(exact, more.astype(wide))
        magnitude = operator(magnitude, np.abs(more.astype(wide)))
    if case.op in ("avg", "premul_sum"):
        exact, magnitude = exact / case.ranks, magnitude / case.ranks
    allowed = (case.ranks + 2) * float(_finfo(case.dtype).eps) * (2 if kind == "c" else 1) * magnitude
    # Not `error > allowed`: that is false of a NaN.
    return int(np.count_nonzero(~(np.abs(got.astype(wide) - exact) <= allowed)))


def _differing(got: Values, expected: Values) -> int:
    """How many elements differ in their bits."""
    differing = got.view(np.uint8) != expected.view(np.uint8)
    return int(np.count_nonzero(differing.reshape(-1, got.dtype.itemsize).any(axis=1))) if differing.any() else 0
