"""The cold path of a call: from arguments seen for the first time to a plan that is ready to run.

Checks what was passed, chooses an algorithm, lowers it, and gives it its sizes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..algorithms import Algorithm, Collective, replay
from ..algorithms.plan import Plan, Scaling, Sizes, Skeleton, bind, cut, exchange, exchange_matrix, lower, parts
from ..errors import ArgumentError
from ..transports import NativeCall, Operation, Transport
from ..transports.recorder import recorded
from ..transports.types import NUMBERS, OPERATORS, check_operator
from .arrays import Array, View, view
from .debug import Log
from .native import prepare_native
from .reproducible import check_reproducible
from .tuner.asked import NATIVE
from .tuner.candidates import FORWARDING_FREE
from .tuner.tuner import AlgorithmLike, Decision, Tuner

OWN_SPLITS_SUFFICE = (*FORWARDING_FREE, NATIVE)

_PROVED_UP_TO = 64
_LIBRARY = Algorithm.__module__.rpartition(".")[0]
_LISTED = 44
"""How many characters a list of sizes may have in the words for a call: peers see some 160 of them."""

_NOTHING = View("", "uint8", 0, 1, 0)


class PremulSum(NamedTuple):
    """The operator that sums `factor` times each rank's value."""

    factor: float

    def __str__(self) -> str:
        return f"premul_sum {self.factor}"


@lru_cache(1024)
def premul_sum(factor: float) -> PremulSum:
    """The operator that sums `factor` times each rank's value, for floating and complex types.

    Raises:
        ArgumentError: `factor` is no number.
    """
    # Kept, because the dispatcher knows operators by identity.
    if not isinstance(factor, (int, float, np.floating, np.integer)):
        raise ArgumentError(f"premul_sum: factor must be a number, and is {factor!r}")
    return PremulSum(float(factor))


class Uneven(NamedTuple):
    """In the place of an operator: the operator, with the parts' sizes where they differ.

    `counts` of reduce_scatter and all_gather, by rank; `sent` and `received` of all_to_all, to and from each rank;
    `matrix` what every rank sends to every other.
    """

    op: str | PremulSum = "sum"
    counts: tuple[int, ...] | None = None
    sent: tuple[int, ...] | None = None
    received: tuple[int, ...] | None = None
    matrix: tuple[tuple[int, ...], ...] | None = None


class Binder:
    """Makes plans for one rank of a transport's group; of algorithms that are reproducible only, if the tuner is.

    Args:
        tuner: chooses where nobody else does.
        recorder: the flight recorder that hears of runs, if their engine does not tell it.

    Attributes:
        log: says what was chosen, if anybody wants to know.
    """

    def __init__(self, transport: Transport, tuner: Tuner, recorder: Any = None) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._recorder = recorder
        self.reproducible = tuner.place.reproducible
        self.tuner = tuner
        self.log: Log | None = None
        self._transport = transport
        self._skeletons: dict[tuple[Algorithm, int, Scaling], Skeleton] = {}

    def bind(
        self,
        collective: Collective,
        x: Array,
        out: Array,
        op: str | PremulSum | Uneven | None,
        root: int,
        algorithm: AlgorithmLike,
    ) -> Any:
        """The prepared plan of a call.

        Args:
            x, out: what is read and what is written; the same object in place.
            op: an operator, sizes of uneven parts, or None.
            algorithm: it, its name or a Choice; "native" for the engine's own collective; None to let the tuner choose.

        Raises:
            ArgumentError: the arguments do not make sense.
            ScheduleError: a user's algorithm is wrong.
        """
        if not isinstance(root, (int, np.integer)) or not 0 <= root < self.size:
            raise ArgumentError(f"{collective.value}: root must be a rank from 0 to {self.size - 1}, and is {root!r}")
        uneven = op if isinstance(op, Uneven) else Uneven(op if op is not None else "sum")
        source, target = self._views(collective, x, out, root, uneven)
        known = source or target or _NOTHING
        kernel, scaling, factor = self._operator(collective, uneven.op, known.dtype)
        nbytes, decision = self._decide(collective, source, target, uneven, algorithm)
        choice = decision.choice
        chosen = choice.algorithm
        if chosen == NATIVE:
            self._tell(collective, nbytes, decision)
            return self._native(collective, source, target, uneven, int(root), (kernel, scaling, factor))
        assert isinstance(chosen, Algorithm)
        _prove(chosen, self.size)
        if self.reproducible:
            check_reproducible(chosen, self.size, int(root), known.dtype)
        sizes = self._sizes(collective, source, target, uneven, chosen.blocks(self.size))
        plan = bind(
            self._skeleton(chosen, int(root), scaling),
            sizes,
            known.itemsize,
            slot_bytes=self._transport.slot_bytes,
            lanes=choice.lanes or self._transport.lanes,
            segment_bytes=choice.segment,
            counts=(source.count if source else 0, target.count if target else 0),
            protocol=choice.protocol,
            forced=decision.forced,
        )
        self._tell(collective, nbytes, decision, plan)
        agreed = self._describe(collective, source, target, uneven, int(root), chosen.name)
        signature = zlib.crc32(f"{agreed} {plan.lanes} {self._transport.slot_bytes} {choice.segment}".encode())
        text = self._describe(collective, source, target, uneven, int(root), chosen.name, own=True)
        straight = chosen.name in FORWARDING_FREE and _is_ours(chosen) and not collective.reduces
        operation = Operation(NUMBERS[known.dtype], OPERATORS[kernel], factor, signature, text, straight)
        prepared = self._transport.prepare(plan, operation)
        native = getattr(prepared, "native", None)
        if native is not None:
            self.tuner.watch(collective, nbytes, decision, lambda: native.median)
        return recorded(prepared, self._recorder, text, _larger(source, target))

    def _tell(self, collective: Collective, nbytes: int, decision: Decision, plan: Plan | None = None) -> None:
        if self.log is not None:
            self.log.choice(self.tuner, collective, nbytes, decision, plan, self._transport.slot_bytes)

    def _views(
        self, collective: Collective, x: Array, out: Array, root: int, uneven: Uneven
    ) -> tuple[View | None, View | None]:
        """The buffers that take part, checked for what the collective asks of them."""
        call = collective.value
        if collective is Collective.BARRIER:
            return None, None
        at_root = self.rank == root
        reads = collective is not Collective.SCATTER or at_root
        writes = at_root if collective in (Collective.GATHER, Collective.REDUCE) else True
        for array, used, name in ((x, reads, "x"), (out, writes, "out")):
            if used and array is None:
                where = f" on rank {self.rank}, the root" if collective.rooted else ""
                raise ArgumentError(f"{call}: {name} must be an array{where}, and is None")
        in_place = out is x
        source = view(x, "x", call, writable=in_place and writes) if reads else None
        target = view(out, "x" if in_place else "out", call, writable=True) if writes else None
        for found in (source, target):
            if found and found.device.partition(":")[0] != self._transport.device:
                raise ArgumentError(
                    f"{call}: {found.name} is on {found.device}, and others are not: all arrays of a call must be on "
                    "one device, or all on the CPU"
                )
        if source and target:
            if source.dtype != target.dtype:
                raise ArgumentError(f"{call}: x is {source.dtype} and out is {target.dtype}: both must be of one type")
            self._check_overlap(collective, source, target, uneven)
        return source, target

    def _check_overlap(self, collective: Collective, source: View, target: View, uneven: Uneven) -> None:
        """In place is allowed where a part lies at its natural offset."""
        if not source.count or not target.count or source.end <= target.address or target.end <= source.address:
            return
        same = source.address == target.address and source.count == target.count
        if collective in (Collective.ALL_REDUCE, Collective.BROADCAST, Collective.REDUCE) and same:
            return
        own = {
            Collective.ALL_GATHER: (source, target),
            Collective.GATHER: (source, target),
            Collective.REDUCE_SCATTER: (target, source),
            Collective.SCATTER: (target, source),
        }.get(collective)
        if own:
            before = sum(uneven.counts[: self.rank]) if uneven.counts else self.rank * own[0].count
            if own[0].address == own[1].address + before * own[0].itemsize:
                return
        raise ArgumentError(
            f"{collective.value}: x and out overlap"
            + (", other than at this rank's own part" if own else "")
            + ": pass a copy of x"
        )

    def _operator(self, collective: Collective, op: str | PremulSum, dtype: str) -> tuple[str, Scaling, float]:
        """The kernels' operator, and what is scaled by how much."""
        if not collective.reduces:
            return "sum", Scaling.NONE, 1.0
        if isinstance(op, PremulSum):
            check_operator("premul_sum", dtype)
            return "sum", Scaling.BEFORE, op.factor
        if not isinstance(op, str):
            raise ArgumentError(f'{collective.value}: op must be an operator\'s name, and is {op!r}: pass "sum", say')
        if op == "premul_sum":
            raise ArgumentError("premul_sum wants its factor: pass op=abccl.premul_sum(0.5)")
        check_operator(op, dtype)
        return ("sum", Scaling.AFTER, 1.0 / self.size) if op == "avg" else (op, Scaling.NONE, 1.0)

    def _decide(
        self,
        collective: Collective,
        source: View | None,
        target: View | None,
        uneven: Uneven,
        asked: AlgorithmLike,
    ) -> tuple[int, Decision]:
        """The bytes of the whole vector, and what is done with it. All ranks come to the same: what only one sees is
        not looked at."""
        if uneven.sent is not None and uneven.matrix is None and asked is None:
            return 0, self.tuner.decide(collective, 0, FORWARDING_FREE[0])
        match collective:
            case Collective.ALL_GATHER:
                whole = target
            case Collective.GATHER:
                whole = source and View("", source.dtype, source.count * self.size, source.itemsize, 0)
            case Collective.SCATTER:
                whole = target and View("", target.dtype, target.count * self.size, target.itemsize, 0)
            case _:
                whole = source
        nbytes = whole.count * whole.itemsize if whole else 0
        return nbytes, self.tuner.decide(collective, nbytes, asked)

    def _native(
        self,
        collective: Collective,
        source: View | None,
        target: View | None,
        uneven: Uneven,
        root: int,
        operator: tuple[str, Scaling, float],
    ) -> Any:
        """The engine's own collective."""
        if self.reproducible:
            raise ArgumentError(
                f"{collective.value}: this communicator is reproducible, and {NATIVE} folds in any order: leave it out"
            )
        kernel, scaling, factor = operator
        if collective is Collective.ALL_TO_ALL and uneven.sent is None and source and target:
            # The engine's call is another with splits, and other ranks may give them.
            even = (source.count // self.size,) * self.size
            uneven = uneven._replace(sent=even, received=even)
        self._sizes(collective, source, target, uneven, 1)  # it also checks them
        call = NativeCall(
            collective,
            (source or target or _NOTHING).dtype,
            kernel if collective.reduces else "",
            root,
            source.count if source else 0,
            target.count if target else 0,
            uneven.counts,
            uneven.sent,
            uneven.received,
            self._describe(collective, source, target, uneven, root, NATIVE),
        )
        prepared = prepare_native(self._transport, call, scaling, factor)
        return recorded(prepared, self._recorder, call.text, _larger(source, target), self._transport)

    def _sizes(
        self, collective: Collective, source: View | None, target: View | None, uneven: Uneven, blocks: int
    ) -> Sizes:
        call, size = collective.value, self.size
        if collective is Collective.BARRIER:
            return parts(collective, self.rank, [0] * size)
        if collective.cut:
            assert source is not None
            if target is not None and target.count != source.count:
                raise ArgumentError(f"{call}: out must have {source.count} elements as x has, and has {target.count}")
            return cut(source.count, blocks, source.itemsize)
        if collective is Collective.ALL_TO_ALL:
            assert source is not None and target is not None
            return self._exchange_sizes(source, target, uneven)
        gathers = collective in (Collective.ALL_GATHER, Collective.GATHER)
        part, whole = (source, target) if gathers else (target, source)
        assert part is not None
        counts = uneven.counts or (part.count,) * size
        if len(counts) != size or min(counts) < 0:
            raise ArgumentError(f"{call}: counts must name {size} sizes, one for each rank, and is {list(counts)}")
        if part.count != counts[self.rank]:
            raise ArgumentError(
                f"{call}: {part.name} has {part.count} elements, and counts gives rank {self.rank} {counts[self.rank]}"
            )
        if whole is not None and whole.count != sum(counts):
            how = f"{size} x {part.count} =" if uneven.counts is None else "the sum of counts,"
            raise ArgumentError(f"{call}: {whole.name} must have {how} {sum(counts)} elements, and has {whole.count}")
        return parts(collective, self.rank, counts)

    def _exchange_sizes(self, source: View, target: View, uneven: Uneven) -> Sizes:
        size = self.size
        if uneven.sent is None or uneven.received is None:
            if source.count % size or target.count != source.count:
                raise ArgumentError(
                    f"all_to_all: without splits x and out have equal parts for {size} ranks; x has {source.count} "
                    f"elements and out {target.count}: pass out_splits and in_splits"
                )
            return exchange(self.rank, [source.count // size] * size, [target.count // size] * size)
        if uneven.matrix is not None:
            return exchange_matrix(self.rank, uneven.matrix)
        return exchange(self.rank, uneven.sent, uneven.received)

    def _describe(
        self,
        collective: Collective,
        source: View | None,
        target: View | None,
        uneven: Uneven,
        root: int,
        chosen: str,
        own: bool = False,
    ) -> str:
        """The call in words that are the same on every rank that makes it; or with this rank's `own` parts."""
        if collective is Collective.BARRIER:
            return f"barrier({chosen})"
        known = (target if collective is Collective.SCATTER else source) or _NOTHING
        what = f"{known.count} elements"
        if collective is Collective.ALL_TO_ALL:
            # One rank may give its splits where another's are equal: messages tell their lengths.
            what = self._exchanged(known.count, uneven) if own else "parts"
        elif uneven.counts is not None:
            what = f"{sum(uneven.counts)} elements in parts {_listed(uneven.counts)}"
        op = f"reproducible {uneven.op}" if self.reproducible else f"{uneven.op}"
        details = [known.dtype, *([op] * collective.reduces), what, *([f"root {root}"] * collective.rooted)]
        return f"{collective.value}({', '.join(details)}, {chosen})"

    def _exchanged(self, count: int, uneven: Uneven) -> str:
        """What this rank sends and receives in an all_to_all, in words."""
        even = (count // self.size,) * self.size
        sent, received = uneven.sent or even, uneven.received or even
        return f"sends {_listed(sent)}, receives {_listed(received)}"

    def _skeleton(self, algorithm: Algorithm, root: int, scaling: Scaling) -> Skeleton:
        key = (algorithm, root, scaling)
        if key not in self._skeletons:
            self._skeletons[key] = lower(algorithm, self.rank, self.size, root, scaling)
        return self._skeletons[key]


def check_splits(array: Array, of: str, name: str, splits: Sequence[int] | None, size: int) -> tuple[int, ...]:
    """The parts' sizes of one side of an all_to_all, equal ones if None.

    Raises:
        ArgumentError: they are not `size` sizes that add up to the array's elements.
    """
    count = view(array, of, "all_to_all").count
    if splits is None:
        if count % size:
            raise ArgumentError(f"all_to_all: {of} has {count} elements, no {size} equal parts: give {name}")
        splits = [count // size] * size
    checked = tuple(int(split) for split in splits)
    if len(checked) != size or min(checked) < 0 or sum(checked) != count:
        raise ArgumentError(
            f"all_to_all: {name} must be {size} sizes that add up to the {count} elements of {of}, and is "
            f"{list(checked)}, which add up to {sum(checked)}"
        )
    return checked


def _listed(numbers: Sequence[int]) -> str:
    """The numbers; of many the first, and a checksum of all."""
    words = [str(number) for number in numbers]
    if len(", ".join(words)) <= _LISTED:
        return f"[{', '.join(words)}]"
    while len(", ".join(words)) > _LISTED - 12:
        words.pop()
    return f"[{', '.join(words)}, ... {zlib.crc32(repr(tuple(numbers)).encode()):08x}]"


def _larger(*views: View | None) -> int:
    """Bytes of the larger buffer."""
    return max((one.count * one.itemsize for one in views if one is not None), default=0)


def _is_ours(algorithm: Algorithm) -> bool:
    return algorithm.function.__module__.startswith(_LIBRARY)


@cache
def _prove(algorithm: Algorithm, size: int) -> None:
    """Replay a user's algorithm before its first use; the library's own are proved by its tests."""
    if size <= _PROVED_UP_TO and not _is_ours(algorithm):
        replay(algorithm, size)
