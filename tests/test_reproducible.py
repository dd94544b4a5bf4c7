"""Reproducible communicators: the bits of one fold in ascending rank order, whatever the way; ranks as threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abccl
from abccl import ArgumentError, Communicator, Mismatch, algorithm, recv, send
from abccl.algorithms import Algorithm, Collective, algorithms, canonical, lookup, registry
from abccl.collectives import connect, reproducible
from abccl.collectives.bootstrap import Alone
from abccl.collectives.tuner.candidates import Place
from abccl.collectives.tuner.table import LINKS, built_in
from abccl.collectives.tuner.tuner import Tuner
from abccl.transports import shm
from abccl.transports.inproc import inproc
from abccl.transports.shm import PROTOCOLS, shm_threads

REDUCING = (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, Collective.REDUCE)
DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16", "complex64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
HALVES = (DTYPES["float16"], DTYPES["bfloat16"])
PREMUL = abccl.premul_sum(1 / 3)
OPS = ["sum", "avg", "prod", PREMUL, "min", "max"]
COUNTS = [1, 5, 63, 1000, 20_001, 100_003]

Vector = np.ndarray[Any, Any]


def run(transports: list[Any], body: Callable[[Communicator], Any], reproducible: bool = True) -> list[Any]:
    """What `body` returns on each rank."""
    communicators = [Communicator(t, timeout=60, reproducible=reproducible) for t in transports]

    def on_rank(communicator: Communicator) -> Any:
        with communicator:
            result = body(communicator)
            communicator.barrier()
            return result

    with ThreadPoolExecutor(len(transports)) as pool:
        return list(pool.map(on_rank, communicators))


def make(kind: str, size: int, slot: int, lanes: int, protocol: str | None) -> list[Any]:
    """Transports whose plans are cut into segments of that many bytes."""
    if kind == "inproc":
        return list(inproc(size, slot_bytes=slot, lanes=lanes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shm, "slot_bytes", lambda size: slot)
        patch.setattr(shm, "LANES", lanes)
        made = shm_threads(size)
    for transport in made:
        transport.set_protocol(protocol)
    return made


def contributions(size: int, count: int, dtype: np.dtype[Any], op: Any = "sum") -> list[Vector]:
    """Vectors whose reduction depends on the order: magnitudes differ, but for products, and zeros have both signs."""
    spread = 0 if op == "prod" else 10
    rng = np.random.default_rng([size, count])

    def reals() -> Vector:
        return (
            rng.choice([-1.0, 1.0], count)
            * rng.uniform(0.5, 1.5, count)
            * 2.0 ** rng.integers(-spread, spread + 1, count)
        )

    vectors = []
    for _ in range(size):
        vector = (reals() + 1j * reals() if dtype.kind == "c" else reals()).astype(dtype)
        vector[rng.random(count) < 0.05] = dtype.type(0)
        vector[rng.random(count) < 0.05] = dtype.type(-0.0)
        vectors.append(vector)
    return vectors


def scaled(x: Vector, factor: float) -> Vector:
    """Times the factor, a half type in float32 and rounded once."""
    if x.dtype.kind == "c":
        return (x.view("float32") * np.float32(factor)).view(x.dtype)
    wide = np.dtype("float32") if x.dtype in HALVES else x.dtype
    return (x.astype(wide) * wide.type(factor)).astype(x.dtype)


def combine(op: str, a: Vector, b: Vector) -> Vector:
    """a op b, each operation rounded by itself; of equal values, and of zeros of both signs, min and max give b."""
    if op == "prod" and a.dtype.kind == "c":
        whole = np.empty_like(a)  # numpy's own product may be of fused operations
        whole.real = a.real * b.real - a.imag * b.imag
        whole.imag = a.real * b.imag + a.imag * b.real
        return whole
    if op in ("min", "max"):
        return np.where(a < b if op == "min" else a > b, a, b)
    result: Vector = a * b if op == "prod" else a + b
    return result


def expected(op: Any, vectors: list[Vector]) -> Vector:
    """The canonical fold: all vectors in the order given, a half type in float32 and rounded once."""
    dtype = vectors[0].dtype
    if op is PREMUL:
        vectors = [scaled(vector, PREMUL.factor) for vector in vectors]
    wide = np.dtype("float32") if dtype in HALVES else dtype
    total = vectors[0].astype(wide)
    for vector in vectors[1:]:
        total = combine(op, total, vector.astype(wide))
    result = total.astype(dtype)
    return scaled(result, 1 / len(vectors)) if op == "avg" else result


def same(x: Vector, y: Vector) -> bool:
    return x.tobytes() == y.tobytes()


def admitted(collective: Collective, size: int, dtype: np.dtype[Any], root: int = 0) -> list[str]:
    """The algorithms that may run."""
    able = [a for a in algorithms(collective).values() if a.refusal(size) is None]
    return [a.name for a in able if canonical(a, size, root, nested=dtype not in HALVES)]


def ops_of(dtype: np.dtype[Any]) -> list[Any]:
    return [op for op in OPS if not (dtype.kind == "c" and op in ("min", "max"))]


def cuts(count: int, pieces: list[int]) -> Iterator[slice]:
    """The vector in pieces of these lengths, again and again."""
    start, number = 0, 0
    while start < count:
        end = min(start + pieces[number % len(pieces)], count)
        yield slice(start, end)
        start, number = end, number + 1


# ---- the promise


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_bits_are_those_of_the_canonical_fold(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([2, 3, 4, 7]), "size")
    dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)), "dtype")]
    op = data.draw(st.sampled_from(ops_of(dtype)), "op")
    count = data.draw(st.sampled_from(COUNTS), "count")
    way = data.draw(st.sampled_from(["whole", "buckets", "scattered", "uneven", "rooted"]), "way")
    root = data.draw(st.integers(0, size - 1), "root")
    kind = data.draw(st.sampled_from(["shm", "shm", "inproc"]), "kind")
    slot = data.draw(st.sampled_from([8 << 10, 32 << 10, 128 << 10]), "slot")
    lanes = data.draw(st.integers(1, 4), "lanes")
    protocol = data.draw(st.sampled_from([None, *PROTOCOLS]), "protocol")
    form = data.draw(st.sampled_from(["plain", "async", "persistent"]), "form")
    registered = data.draw(st.booleans(), "registered")
    collective = {"rooted": Collective.REDUCE, "scattered": Collective.REDUCE_SCATTER}.get(way, Collective.ALL_REDUCE)
    collective = Collective.REDUCE_SCATTER if way == "uneven" else collective
    name = data.draw(st.sampled_from([None, *admitted(collective, size, dtype, root * collective.rooted)]), "algorithm")
    pieces = data.draw(st.lists(st.sampled_from([max(1, count // 7), count // 3 + 1, count]), min_size=1), "pieces")
    vectors = contributions(size, size * count if way == "scattered" else count, dtype, op)
    wanted = expected(op, vectors)

    def call(method: Callable[..., Any], *arguments: Any, **more: Any) -> None:
        if form == "plain":
            method(*arguments, algorithm=name, **more)
        elif form == "async":
            method(*arguments, algorithm=name, async_op=True, **more).wait(60)
        else:
            communicator = method.__self__  # type: ignore[attr-defined]
            getattr(communicator, f"{method.__name__}_init")(*arguments, algorithm=name, **more)()

    def body(c: Communicator) -> bool:
        x = c.empty(vectors[0].size, dtype) if registered else np.empty_like(vectors[0])
        x[:] = vectors[c.rank]
        match way:
            case "whole":
                call(c.all_reduce, x, op)
            case "buckets":
                for piece in cuts(count, pieces):
                    call(c.all_reduce, x[piece], op)
            case "scattered":
                part = np.empty(count, dtype)
                call(c.reduce_scatter, part, x, op)
                c.all_gather(x, part)
            case "uneven":
                counts = [count // size + (rank == root) * (count % size) for rank in range(size)]
                part = np.empty(counts[c.rank], dtype)
                call(c.reduce_scatter, part, x, op, counts=counts)
                c.all_gather(x, part, counts=counts)
            case "rooted":
                call(c.reduce, x, op, root)
                c.broadcast(x, root)
        return same(x, wanted)

    assert run(make(kind, size, slot, lanes, protocol), body) == [True] * size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_admitted_algorithm_and_operator(size: int) -> None:
    def body(c: Communicator) -> list[str]:
        wrong = []
        for dtype in DTYPES.values():
            names = [None, *admitted(Collective.ALL_REDUCE, c.size, dtype)]
            for count in (1, 130, 9001):
                for op in ops_of(dtype):
                    vectors = contributions(c.size, count, dtype, op)
                    wanted = expected(op, vectors)
                    for name in names:
                        x = vectors[c.rank].copy()
                        c.all_reduce(x, op, algorithm=name)
                        wrong += [f"{dtype} {op} {count} {name}"] * (not same(x, wanted))
        return wrong

    assert run(make("shm", size, 16 << 10, 2, None), body) == [[]] * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_promise_the_algorithm_decides(dtype: str) -> None:
    vectors = contributions(4, 1000, DTYPES[dtype])
    wanted = expected("sum", vectors)

    def body(c: Communicator) -> list[bytes]:
        results = []
        for name in ("direct", "ring", "recursive_doubling", "chain"):
            x = vectors[c.rank].copy()
            c.all_reduce(x, algorithm=name)
            results.append(x.tobytes())
        return results

    results = run(shm_threads(4), body, reproducible=False)
    assert results == [results[0]] * 4, "all ranks get the same bits"
    assert results[0][0] == wanted.tobytes()
    assert len(set(results[0])) == 4


# ---- which algorithms are admitted


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("collective", REDUCING, ids=lambda collective: collective.value)
def test_the_library_picks_canonical_algorithms(
    collective: Collective, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picks = set()
    for size in [*range(1, 20), 33, 64]:
        tuner = Tuner(Place((tuple(range(size)),), 4, 128 << 10, 4, reproducible=True), built_in(link))
        for nbytes in (0, 4, 20_000, 300_000, 1 << 22, 1 << 26):
            pick = tuner.decide(collective, nbytes).choice.algorithm
            assert isinstance(pick, Algorithm)
            picks.add((pick, size))
    for pick, size in picks:
        for root in {0, size // 2, size - 1} if collective.rooted else {0}:
            assert canonical(pick, size, root), f"{pick.name}, {size} ranks, root {root}"
    # What is known needs no proof, which would take seconds for hundreds of ranks.
    monkeypatch.setattr(reproducible, "canonical", lambda *arguments, **more: pytest.fail("replayed"))
    for pick, size in picks:
        reproducible.check_reproducible(pick, size, 0, "float16")


def test_more_ranks_than_the_usual_rule_takes_canonical_algorithms_for() -> None:
    size = 17
    vectors = {count: contributions(size, count, DTYPES["float32"]) for count in (10, 10_000)}

    def body(c: Communicator) -> bool:
        results = []
        for count, theirs in vectors.items():
            x = theirs[c.rank].copy()
            c.all_reduce(x)
            results.append(same(x, expected("sum", theirs)))
            part = np.empty(count // size, "float32")
            c.reduce_scatter(part, theirs[c.rank][: part.size * size].copy())
            results.append(same(part, expected("sum", theirs)[c.rank * part.size : (c.rank + 1) * part.size]))
            x = theirs[c.rank].copy()
            c.reduce(x, root=5)
            results.append(c.rank != 5 or same(x, expected("sum", theirs)))
        return all(results)

    assert run(inproc(size), body) == [True] * size
    assert run(inproc(size), body, reproducible=False) != [True] * size


def test_what_is_canonical() -> None:
    def names(size: int, nested: bool) -> set[str]:
        every = algorithms(Collective.ALL_REDUCE).values()
        return {a.name for a in every if canonical(a, size, nested=nested)}

    everything = set(algorithms(Collective.ALL_REDUCE))
    assert names(1, False) == names(2, False) == everything
    # Up to four ranks are one group of radix 4.
    in_one_pass = {"direct", "two_shot", "knomial", "recursive_multiplying"}
    assert names(4, False) == names(4, True) == in_one_pass
    # The third rank that swings exchanges directly, with the others' only step.
    assert names(3, False) == in_one_pass | {"swing"}
    assert names(3, True) == in_one_pass | {"swing", "tree", "composed_rooted", "hierarchical", "hierarchical_leaders"}
    assert names(7, True) == {"direct", "two_shot"}
    # The chain to root 2 begins at rank 1 and goes through rank 0, that to root 0 begins at rank 2.
    chain = lookup(Collective.REDUCE, "chain")
    assert [canonical(chain, 3, root, nested=True) for root in range(3)] == [False, False, True]


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's algorithms: up a chain of ranks, and down it."""
    monkeypatch.setitem(registry._registry, Collective.ALL_REDUCE, algorithms(Collective.ALL_REDUCE))

    def chain(rank: int, order: list[int]) -> Any:
        place = order.index(rank)
        if place:
            yield recv(order[place - 1], 0, reduce=True)
        if rank != order[-1]:
            yield send(order[place + 1], 0)
            yield recv(order[-1], 0)
        else:
            yield [send(peer, 0) for peer in order[:-1]]

    @algorithm(Collective.ALL_REDUCE, name="test_up")
    def up(rank: int, size: int) -> Any:
        yield from chain(rank, list(range(size)))

    @algorithm(Collective.ALL_REDUCE, name="test_down")
    def down(rank: int, size: int) -> Any:
        yield from chain(rank, list(range(size))[::-1])


def refusal(c: Communicator, dtype: str, name: str | None, persistent: bool = False) -> str:
    x = np.ones(5, DTYPES[dtype])
    try:
        c.all_reduce_init(x, algorithm=name)() if persistent else c.all_reduce(x, algorithm=name)
    except ArgumentError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("mine")
def test_a_users_algorithm_is_admitted_by_the_same_proof() -> None:
    vectors = contributions(4, 3000, DTYPES["float32"])
    wanted = expected("sum", vectors)

    def body(c: Communicator) -> list[Any]:
        x = vectors[c.rank].copy()
        c.all_reduce(x, algorithm="test_up")
        return [
            same(x, wanted),
            refusal(c, "float32", "test_down"),
            refusal(c, "float32", "test_down", persistent=True),
            refusal(c, "float16", "test_up"),
        ]

    for right, down, persistent, half in run(shm_threads(4), body):
        assert right
        assert (
            down
            == persistent
            == (
                "all_reduce: this communicator is reproducible, and test_down does not fold the values of 4 ranks in "
                "ascending order: choose direct or two_shot"
            )
        )
        assert "test_up does not fold the values of 4 ranks in ascending order in one pass: choose direct" in half


def test_only_a_canonical_algorithm_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(c: Communicator) -> list[str]:
        c.broadcast(np.ones(5), algorithm="chain")  # reduces nothing, and may go any way
        texts = [refusal(c, "float32", name) for name in ("ring", "direct")]
        monkeypatch.setenv("ABCCL_ALGORITHM", "ring")
        c.barrier()
        return [*texts, refusal(c, "float64", None)]

    for ring, direct, forced in run(shm_threads(3), body):
        assert ring == forced and "ring does not fold" in ring and "choose direct or two_shot" in ring
        assert direct == ""


def test_the_order_of_two_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks swap their values before they fold them: 1+0, and max(-0.0, 0.0) would be the other zero."""
    monkeypatch.setitem(registry._registry, Collective.ALL_REDUCE, algorithms(Collective.ALL_REDUCE))

    @algorithm(Collective.ALL_REDUCE, name="test_swapped")
    def swapped(rank: int, size: int) -> Any:
        for folds in (False, True):
            yield send(1 - rank, 0), recv(1 - rank, 0, reduce=folds)

    assert not canonical(lookup(Collective.ALL_REDUCE, "test_swapped"), 2, nested=True)
    zeros = np.array([-0.0, 0.0])

    def body(c: Communicator) -> float:
        x = zeros[c.rank : c.rank + 1].copy()
        c.all_reduce(x, "max", algorithm="test_swapped" if not c.reproducible else None)
        return float(np.copysign(1, x[0]))

    assert run(shm_threads(2), body) == [1.0, 1.0]
    assert run(shm_threads(2), body, reproducible=False) == [-1.0, -1.0]


# ---- who is reproducible


def test_it_is_asked_for_or_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABCCL_REPRODUCIBLE", raising=False)
    for text, by_environment in ((None, False), ("", False), ("0", False), ("1", True)):
        if text is not None:
            monkeypatch.setenv("ABCCL_REPRODUCIBLE", text)
        for asked, wanted in ((None, by_environment), (True, True), (False, False)):
            with abccl.init(reproducible=asked) as one, connect(Alone(), reproducible=asked) as other:
                assert one.reproducible is other.reproducible is wanted
                assert ("over shm, reproducible>" in repr(one)) is wanted
    for text in ("2", "true", " 1"):
        monkeypatch.setenv("ABCCL_REPRODUCIBLE", text)
        with pytest.raises(ArgumentError, match=f"ABCCL_REPRODUCIBLE must be 0 or 1, and is '{text}'"):
            abccl.init()
    wrong: Any = "0"
    with pytest.raises(ArgumentError, match="reproducible must be True, False or None, and is '0'"):
        abccl.init(reproducible=wrong)


@pytest.mark.parametrize("reproducible", [True, False])
def test_split_keeps_it(reproducible: bool) -> None:
    def body(c: Communicator) -> None:
        row = c.split(c.rank % 2)
        assert row is not None
        with row:
            assert row.reproducible is reproducible
            row.barrier()

    run(shm_threads(4), body, reproducible)


@pytest.mark.parametrize("make_transports", [shm_threads, inproc])
def test_ranks_that_differ_are_told(make_transports: Callable[[int], list[Any]]) -> None:
    transports = make_transports(3)
    communicators = [Communicator(t, timeout=60, reproducible=t.rank == 1) for t in transports]

    def body(c: Communicator) -> str:
        with pytest.raises(Mismatch) as caught:
            c.all_reduce(np.ones(3))
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(body, communicators))
    for communicator in communicators:
        communicator.close()
    for text in texts:
        assert "float64, reproducible sum, 3" in text and "float64, sum, 3" in text


# ---- torch


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["sum", "avg"])
def test_the_torch_backend_obeys(dtype: str, op: str) -> None:
    torch = pytest.importorskip("torch")
    from abccl.collectives.torch.process_group import ProcessGroup

    c10d = torch.distributed.distributed_c10d
    size, rows = 4, 60
    rng = np.random.default_rng(0)
    # Each rank has half of the rows, so torch's coalesce would sort few equal indices, in no certain order.
    places = [np.sort(rng.permutation(rows)[: rows // 2]) for _ in range(size)]
    vectors = contributions(size, rows, DTYPES[dtype])
    for vector, place in zip(vectors, places):
        vector[np.setdiff1d(np.arange(rows), place)] = 0
    wanted = expected("sum", vectors).astype("float64")

    def tensor(vector: Vector) -> Any:
        return torch.from_numpy(vector.astype("float32")).to(getattr(torch, dtype))

    def body(c: Communicator) -> list[bool]:
        group = ProcessGroup(c, None)
        options = c10d.AllreduceOptions()
        options.reduceOp = c10d.ReduceOp.SUM if op == "sum" else c10d.ReduceOp.AVG
        options.asyncOp = False
        dense = tensor(vectors[c.rank])
        indices = torch.from_numpy(places[c.rank])
        sparse = torch.sparse_coo_tensor(indices[None], dense[indices], (rows,), check_invariants=True)
        empty = torch.sparse_coo_tensor(torch.zeros(2, 0), torch.zeros(0, 3), (5, 4, 3), check_invariants=True)
        for x in (sparse, dense, empty):
            group.allreduce([x], options)
        total = torch.from_numpy(wanted).to(dense.dtype)
        equal = [torch.equal(sparse.to_dense(), total / size if op == "avg" else total)]
        equal.append(torch.equal(dense, tensor(expected(op, vectors))))
        return [*equal, empty._nnz() == 0, sparse.is_coalesced()]

    assert run(shm_threads(size), body) == [[True] * 4] * size
