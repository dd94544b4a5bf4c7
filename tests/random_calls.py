"""Random collectives and what numpy makes of them; tests/random_runs.py runs them.

`draw` makes a call out of choices, whoever makes them: hypothesis, or a random.Random that all ranks have alike.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from abccl import ArgumentError, Choice, Collective, premul_sum
from abccl.algorithms import Algorithm, algorithms, lookup
from abccl.transports.shm import PROTOCOLS
from abccl.transports.trial import Case, can_be_in_place
from abccl.transports.types import NUMBERS, check_operator, numpy_dtype, numpy_operator

T = TypeVar("T")
Pick = Callable[[Sequence[Any]], Any]
Array = npt.NDArray[Any]

POOL = 1 << 20
FORMS = ("plain", "async", "persistent", "started")
OPERATORS = ("sum", "prod", "min", "max", "band", "bor", "bxor", "avg", "premul_sum")
VALUES: dict[str, tuple[Any, ...]] = {"radix": (2, 3, 4, 5, 8), "span": (2, 4, 8, 16)}
"""What is tried of parameters that are numbers."""
FACTOR = premul_sum(0.5)
_OF_PLANS = ("algorithm", "segment", "lanes", "scaling", "uneven")  # a communicator decides, or other fields tell
UNEVEN = (Collective.REDUCE_SCATTER, Collective.ALL_GATHER, Collective.ALL_TO_ALL)


@dataclass(frozen=True)
class RandomCall(Case):
    """One collective, the same on all ranks.

    Attributes:
        asked: the algorithm asked for, its parameters in parentheses; None for the tuner's; `algorithm` is any then.
        protocol, segment_bytes, most_lanes: of the Choice.
        sizes_of_parts: by rank (for an all_to_all: by source and destination), where they differ.
        form: how it is called, one of FORMS.
        registered: whether the buffers are registered memory.
        offset: elements between the buffers' starts and a multiple of 64 bytes.
        exact: whether the values are such that all orders of folding give the same.
        seed: of the values.
    """

    asked: str | None = None
    protocol: str | None = None
    segment_bytes: int | None = None
    most_lanes: int | None = None
    sizes_of_parts: tuple[Any, ...] | None = None
    form: str = "plain"
    registered: bool = False
    offset: int = 0
    exact: bool = True
    seed: int = 0

    def __repr__(self) -> str:
        return self.to_json()

    def to_json(self) -> str:
        """All of it in a line."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _OF_PLANS}
        return json.dumps({"collective": self.collective.value, **fields})

    @staticmethod
    def from_json(text: str) -> RandomCall:
        """The call that was written so."""
        fields = json.loads(text)
        collective = Collective(fields.pop("collective"))
        fields["sizes_of_parts"] = _tuples(fields["sizes_of_parts"])
        return RandomCall(_algorithm(collective, fields["asked"]), **fields)

    @property
    def wish(self) -> Choice | str | None:
        """What the caller asks for."""
        extras = (self.protocol, self.segment_bytes, self.most_lanes)
        return self.asked if extras == (None, None, None) else _choice(self.algorithm, *extras)

    @property
    def operator(self) -> Any:
        """The operator as the call takes it."""
        return FACTOR if self.op == "premul_sum" else self.op

    def counts(self) -> list[int]:
        """See `Case.counts`."""
        if self.sizes_of_parts is not None and self.collective is not Collective.ALL_TO_ALL:
            return list(self.sizes_of_parts)
        return super().counts()

    def matrix(self) -> list[list[int]]:
        """See `Case.matrix`."""
        if self.sizes_of_parts is not None:
            return [list(row) for row in self.sizes_of_parts]
        return super().matrix()

    def given(self, rank: int) -> Array:
        """What a rank contributes: see `Case.given`."""
        length = self._length(rank)
        start = zlib.crc32(f"{self.seed} {rank}".encode()) % POOL
        dtype = numpy_dtype(self.dtype)
        drawn = _drawn(start, length, dtype.itemsize)
        if dtype.kind == "b":
            return (drawn.view(np.uint8) & 1).view(bool)
        if dtype.kind in "iu":
            return drawn.view(dtype)  # all of their range: sums and products wrap, here and in numpy
        words = drawn.view(np.uint8)[:: dtype.itemsize]
        if self.op == "prod":
            return self._factors(words, rank, dtype)
        if self.exact:
            values = (words % 7).astype(np.int8) - 3
        else:
            values = _normal()[start % (POOL // 2) :][:length] if length <= POOL // 2 else np.resize(_normal(), length)
        given: Array = values.astype(dtype)
        return given * dtype.type(1 - 2j) if dtype.kind == "c" else given

    def _factors(self, words: Array, rank: int, dtype: np.dtype[Any]) -> Array:
        """Of products: ones and twos with a sign (complex: a direction), and what is between if not exact."""
        units = np.array([1, -1, 1j, -1j] if dtype.kind == "c" else [1, -1, 1, -1]).astype(dtype)
        signed = units[words % 4]
        if rank >= 6:  # a product of many stays within a half-precision number's range
            return signed
        size = 1 + (words >> 2) / 256 if not self.exact else 1 + (words >> 2) % 2
        return (signed * size.astype(dtype)).astype(dtype)

    def _length(self, rank: int) -> int:
        match self.collective:
            case Collective.ALL_TO_ALL:
                return sum(self.matrix()[rank])
            case Collective.REDUCE_SCATTER | Collective.SCATTER:
                return sum(self.counts())
            case Collective.ALL_GATHER | Collective.GATHER | Collective.BARRIER:
                return self.counts()[rank]
        return self.count

    def _reduced(self) -> Array:
        dtype = numpy_dtype(self.dtype)
        if not self.is_approximate:
            fold = numpy_operator(self.op, self.dtype)
            total = self.given(0)
            for rank in range(1, self.size):
                total = fold(total, self.given(rank)).astype(dtype)
            return (total * dtype.type(0.5)).astype(dtype) if self.op == "premul_sum" else total
        wide = np.dtype(np.clongdouble if dtype.kind == "c" else np.longdouble)
        fold = np.multiply if self.op == "prod" else np.add
        total = self.given(0).astype(wide)
        for rank in range(1, self.size):
            total = fold(total, self.given(rank).astype(wide))
        scale = {"avg": 1 / wide.type(self.size), "premul_sum": wide.type(0.5)}.get(self.op, wide.type(1))
        return np.asarray(total * scale)

    @property
    def is_approximate(self) -> bool:
        """Whether the result depends on the order of folding."""
        if numpy_dtype(self.dtype).kind in "iub" or not self.collective.reduces or self.op in ("min", "max"):
            return False
        return not self.exact or self.op == "avg"

    def differs(self, came: Array, wanted: Array, rank: int) -> Array:
        """Where the result is not what it must be, by index.

        Each fold rounds once, by half a unit in the last place of a partial result, and no partial result exceeds the
        sum (or product) of all magnitudes; a complex product rounds four times. A scaling rounds twice: its factor, and
        what it gives.
        """
        if not self.is_approximate:
            return np.flatnonzero(came != wanted)
        dtype = numpy_dtype(self.dtype)
        fold = np.multiply if self.op == "prod" else np.add
        magnitude = np.abs(self.given(0)).astype(np.longdouble)
        for other in range(1, self.size):
            magnitude = fold(magnitude, np.abs(self.given(other)).astype(np.longdouble))
        if self.collective is Collective.REDUCE_SCATTER:
            start = sum(self.counts()[:rank])
            magnitude = magnitude[start : start + len(came)]
        roundings = (self.size - 1) * (4 if dtype.kind == "c" else 1) + 2
        bound = roundings * epsilon(self.dtype) * magnitude
        wide = came.astype(np.clongdouble if dtype.kind == "c" else np.longdouble)
        return np.flatnonzero(~(np.abs(wide - wanted) <= bound))


def epsilon(dtype: str) -> float:
    """The distance from 1 to the next number of a floating or complex type."""
    return {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "complex64": 2**-23}.get(dtype, 2**-52)


@cache
def _pool() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, 2 * POOL, np.uint8)


@cache
def _normal() -> npt.NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal(POOL, np.float32)


def _drawn(start: int, length: int, itemsize: int) -> Array:
    """Random elements of so many bytes each, as unsigned bytes."""
    nbytes = length * itemsize
    start -= start % 16
    return _pool()[start : start + nbytes] if start + nbytes <= 2 * POOL else np.resize(_pool(), nbytes)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _algorithm(collective: Collective, asked: str | None) -> Algorithm:
    known = asked is not None and asked != "native"
    return lookup(collective, f"{asked}") if known else next(iter(algorithms(collective).values()))


@lru_cache(512)
def _choice(algorithm: Algorithm, protocol: str | None, segment: int | None, lanes: int | None) -> Choice:
    return Choice(algorithm, protocol, segment, lanes)


@cache
def menu(collective: Collective, size: int) -> tuple[str, ...]:
    """The algorithms for so many ranks, by name, with several values of their parameters."""
    found = []
    for name, declared in algorithms(collective).items():
        variants = [declared]
        for parameter, _ in declared.parameters:
            if parameter == "levels":
                # Whatever is put in the place of hosts, some ranks of each group are apart.
                variants += [declared.bind(levels="square")]
                variants += [declared.bind(levels=f"2x{size // 2}:cyclic")] if size % 2 == 0 else []
            elif parameter in VALUES:
                variants += [declared.bind(**{parameter: value}) for value in VALUES[parameter]]
            else:  # an algorithm's name, of the collective that the parameter is called after
                kinds = {kind.value for kind in Collective}
                others = algorithms(Collective(parameter)) if parameter in kinds else {}
                variants += [declared.bind(**{parameter: other}) for other in others if other != "composed"]
        found += [variant.name for variant in variants if _runs(variant, size)]
        assert name
    return tuple(dict.fromkeys(found))


def _runs(algorithm: Algorithm, size: int) -> bool:
    try:
        return algorithm.refusal(size) is None
    except ArgumentError:  # groups that are none with so few ranks
        return False


@cache
def pairs(reduces: bool) -> tuple[tuple[str, str], ...]:
    """The element types with the operators that they have."""
    return tuple((dtype, op) for dtype in NUMBERS for op in OPERATORS if (reduces or op == "sum") and _has(dtype, op))


def _has(dtype: str, op: str) -> bool:
    try:
        check_operator(op, dtype)
    except ArgumentError:
        return False
    return True


def draw(
    pick: Pick,
    size: int,
    *,
    slot_bytes: int,
    most_bytes: int,
    natives: Iterable[Collective] = (),
    protocols: Sequence[str | None] = (None, *PROTOCOLS),
    count_bytes: int | None = None,
) -> RandomCall:
    """A call among `size` ranks.

    Args:
        pick: takes one of a sequence.
        slot_bytes: of the transport: lengths around it are of interest.
        most_bytes: of a rank's buffer.
        natives: the collectives that the transport has of its own.
        protocols: what may be asked for.
        count_bytes: about so many bytes, instead of what is of interest.
    """
    collective = pick(list(Collective))
    dtype, op = pick(pairs(collective.reduces))
    itemsize = numpy_dtype(dtype).itemsize
    own = ["native"] * (collective in natives)
    asked = pick([None, *own, *menu(collective, size)]) if pick((True, True, True, False)) else None
    algorithm = _algorithm(collective, asked)
    if asked is not None and algorithm.largest(size) * itemsize > slot_bytes:
        asked = None
    protocol = segment = lanes = None
    if asked not in (None, "native") and pick((True, False)):
        protocol, lanes = pick(protocols), pick((None, 1, 2, 3, 4))
        segment = pick((None, 64, 192, 1000, 4096, slot_bytes, 4 * slot_bytes))
        if segment and segment < algorithm.largest(size) * itemsize:
            segment = None
    parts = 1 if collective.cut else size

    def length(share: int = 1) -> int:
        if count_bytes is not None:
            return max(1, count_bytes // (itemsize * parts * share))
        kind = pick(("tiny", "small", "edge"))
        if kind != "edge":
            return int(pick(range(4) if kind == "tiny" else range(200)))
        limit = pick((64, 304, segment or slot_bytes, slot_bytes)) * pick((1, 1, 2, size, 2 * size))
        count = min(limit, most_bytes // parts // share) // itemsize + pick((-1, 0, 1))
        return max(0, int(count))

    sizes: tuple[Any, ...] | None = None
    count = length()
    if collective in UNEVEN and pick((True, False)):
        several = [count, length(2), 0, 1, 7]
        ranks = range(size)
        exchanges = collective is Collective.ALL_TO_ALL
        sizes = tuple(tuple(pick(several) for _ in ranks) if exchanges else pick(several) for _ in ranks)
    return RandomCall(
        algorithm,
        size,
        count,
        dtype,
        op,
        root=pick(range(size)) if collective.rooted else 0,
        in_place=collective is Collective.BROADCAST or (_in_place(collective) and pick((False, True))),
        asked=asked,
        protocol=protocol,
        segment_bytes=segment,
        most_lanes=lanes,
        sizes_of_parts=sizes,
        form=pick(FORMS),
        registered=pick((False, True)),
        offset=pick((0, 0, 1, 3)),
        exact=pick((True, False)),
        seed=pick(range(1 << 16)),
    )


def _in_place(collective: Collective) -> bool:
    return can_be_in_place(collective) or collective in (Collective.GATHER, Collective.SCATTER)
