"""The communicator over shared memory: every collective, algorithm, type and operator against numpy, by ranks as
threads; what needs processes, by processes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abccl
from abccl import Communicator, algorithm, recv, send
from abccl.algorithms import Collective, algorithms, registry
from abccl.transports import Transport
from abccl.transports.inproc import inproc
from abccl.transports.joint import joint_threads
from abccl.transports.shm import PROTOCOLS, shm_threads
from abccl.transports.topology import topology_of
from abccl.transports.types import OPERATORS, TYPES, check_operator, numpy_operator

KINDS = ["shm", "inproc", "joint"]

TYPE_NAMES = [element.name for element in TYPES]


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def threads(size: int, body: Callable[[Communicator], Any], kind: str = "shm", timeout: float = 60.0) -> list[Any]:
    """What `body` returns on each rank; the ranks are threads. `joint`: on two hosts, in turn."""
    hosts = [list(range(host, size, 2)) for host in range(min(size, 2))]
    makers: dict[str, Callable[[], Sequence[Transport]]] = {
        "shm": lambda: shm_threads(size),
        "inproc": lambda: inproc(size),
        "joint": lambda: joint_threads(hosts),
    }
    topology = topology_of(hosts) if kind == "joint" else None
    communicators = [Communicator(made, timeout=timeout, topology=topology) for made in makers[kind]()]

    def run(communicator: Communicator) -> Any:
        with communicator:
            result = body(communicator)
            communicator.barrier()
            return result

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, communicators))


def outcome(call: Callable[[], Any]) -> str:
    """The error of a call as text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def values(rank: int, count: int, dtype: str) -> np.ndarray[Any, Any]:
    """Small whole numbers, so that sums and products are exact in every type whatever the order."""
    rng = np.random.default_rng([rank, count])
    return rng.integers(0, 4, count).astype(dtype_of(dtype))


def reduced(op: str, contributions: list[np.ndarray[Any, Any]], dtype: str) -> np.ndarray[Any, Any]:
    apply = numpy_operator(op, dtype)
    result = contributions[0]
    for contribution in contributions[1:]:
        result = apply(result, contribution).astype(result.dtype)
    return result


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_collectives_against_numpy(kind: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5), "size")
    count = data.draw(st.one_of(st.integers(0, 40), st.sampled_from([1000, 16384, 100_003])), "count")
    dtype = data.draw(st.sampled_from(TYPE_NAMES), "dtype")
    ops = [op for op in OPERATORS if outcome(lambda op=op: check_operator(op, dtype)) == "no error"]
    op = data.draw(st.sampled_from(ops), "op")
    collective = data.draw(st.sampled_from(list(Collective)), "collective")
    names = [name for name, a in algorithms(collective).items() if a.refusal(size) is None]
    algorithm = data.draw(st.sampled_from([None, *names]), "algorithm")
    root = data.draw(st.integers(0, size - 1), "root")
    form = data.draw(st.sampled_from(["plain", "async", "persistent", "started"]), "form")
    protocol = data.draw(st.sampled_from([None, *PROTOCOLS]), "protocol")
    registered = data.draw(st.booleans(), "registered")
    whole = [values(rank, count * size, dtype) for rank in range(size)]
    part = [array[:count] for array in whole]
    combined = reduced(op, whole, dtype)

    def run(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        if form == "plain":
            call(*arguments, algorithm=algorithm, **keywords)
        elif form == "async":
            work = call(*arguments, algorithm=algorithm, async_op=True, **keywords)
            work.wait(60)
            assert work.is_completed()
        else:
            communicator = call.__self__  # type: ignore[attr-defined]
            persistent = getattr(communicator, f"{call.__name__}_init")(*arguments, algorithm=algorithm, **keywords)
            if form == "persistent":
                persistent()
            else:
                persistent.start()
                persistent.wait(60)

    def body(c: Communicator) -> bool:
        r = c.rank
        if kind == "shm":
            c._transport.set_protocol(protocol)  # type: ignore[attr-defined]
        x, whole_out, part_out = (
            c.empty(n, combined.dtype) if registered else np.empty(n, combined.dtype)
            for n in (combined.size, combined.size, count)
        )
        x[:] = whole[r]
        match collective:
            case Collective.ALL_REDUCE:
                run(c.all_reduce, x, op, out=whole_out)
                assert np.array_equal(whole_out, combined) and np.array_equal(x, whole[r])
                run(c.all_reduce, x, op)
                return np.array_equal(x, combined)
            case Collective.REDUCE:
                run(c.reduce, x, op, root)
                return np.array_equal(x, combined if r == root else whole[r])
            case Collective.BROADCAST:
                run(c.broadcast, x, root)
                return np.array_equal(x, whole[root])
            case Collective.REDUCE_SCATTER:
                run(c.reduce_scatter, part_out, x, op)
                assert np.array_equal(x, whole[r])
                own = slice(r * count, (r + 1) * count)
                assert np.array_equal(part_out, combined[own])
                run(c.reduce_scatter, x[own], x, op)
                return np.array_equal(x[own], combined[own])
            case Collective.ALL_GATHER:
                run(c.all_gather, whole_out, part[r])
                return np.array_equal(whole_out, np.concatenate(part))
            case Collective.GATHER:
                run(c.gather, whole_out if r == root else None, part[r], root)
                return r != root or np.array_equal(whole_out, np.concatenate(part))
            case Collective.SCATTER:
                run(c.scatter, part_out, whole[root] if r == root else None, root)
                return np.array_equal(part_out, whole[root][r * count : (r + 1) * count])
            case Collective.ALL_TO_ALL:
                run(c.all_to_all, whole_out, x)
                mine = [whole[s][r * count : (r + 1) * count] for s in range(size)]
                return np.array_equal(whole_out, np.concatenate(mine)) and np.array_equal(x, whole[r])
            case Collective.BARRIER:
                run(c.barrier)
                return True

    assert threads(size, body, kind) == [True] * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_avg_and_premul_sum(kind: str, dtype: str) -> None:
    contributions = [values(rank, 1001, dtype) for rank in range(3)]
    total = reduced("sum", contributions, dtype).astype("complex128")

    def body(c: Communicator) -> None:
        out = np.empty_like(contributions[0])
        for name in algorithms(Collective.ALL_REDUCE):
            c.all_reduce(contributions[c.rank], "avg", out=out, algorithm=name)
            assert np.allclose(out.astype("complex128"), total / 3, rtol=1e-2)
            c.all_reduce(contributions[c.rank], abccl.premul_sum(0.5), out=out, algorithm=name)
            assert np.allclose(out.astype("complex128"), total / 2)
        x = contributions[c.rank].copy()
        c.reduce(x, "avg", 1)
        assert np.allclose(x.astype("complex128"), total / 3 if c.rank == 1 else contributions[c.rank], rtol=1e-2)

    threads(3, body, kind)


def test_tensors_are_read_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    whole = torch.arange(12.0)
    served = {
        "plain": whole.clone(),
        "part": whole[3:7],
        "one of a column": whole.view(4, 3)[1:2, 1],
        "no elements": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "complex": torch.ones(2, dtype=torch.complex64),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
    }
    refused = {
        "transposed": whole.view(4, 3).t(),
        "column": whole.view(4, 3)[:, 0],
        "negated": torch._neg_view(torch.ones(3)),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "meta": torch.ones(3, device="meta"),
        "sparse": torch.ones(3).to_sparse(),
    }
    with Communicator(shm_threads(1)[0]) as c:
        for _ in range(2):  # cold and warm
            for name, tensor in served.items():
                out = torch.empty_like(tensor, memory_format=torch.contiguous_format).detach()
                c.all_reduce(tensor.detach() if name != "parameter" else tensor, out=out)
                assert torch.equal(out, tensor), name
            for name, tensor in refused.items():
                assert "ArgumentError" in outcome(lambda tensor=tensor: c.all_reduce(tensor)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_persistent_collective_is_started_and_waited_for_in_turn(kind: str) -> None:
    refused = threading.Event()

    def body(c: Communicator) -> None:
        x = np.ones(3)
        persistent = c.all_reduce_init(x)
        for call in (persistent.wait, persistent.is_completed):
            assert "has not been started: call start() first" in outcome(call)
        if c.rank == 0:
            persistent.start()
            for call in (persistent.start, persistent):
                assert "is under way: wait() for it" in outcome(call)
            refused.set()
            persistent.wait(60)
        else:
            assert refused.wait(60)
            persistent()
        assert (x == 2).all()
        with pytest.raises(TypeError):
            persistent(x)

    threads(2, body, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_get_the_same_bits(kind: str) -> None:
    contributions = [np.random.default_rng(rank).standard_normal(50_001).astype("float32") for rank in range(5)]

    def body(c: Communicator) -> list[bytes]:
        out = np.empty_like(contributions[0])
        results = []
        for name in algorithms(Collective.ALL_REDUCE):
            c.all_reduce(contributions[c.rank], out=out, algorithm=name)
            assert np.allclose(out, sum(contributions), atol=1e-4)
            results.append(out.tobytes())
        return results

    first, *others = threads(5, body, kind)
    assert all(other == first for other in others)


def test_a_nan_reaches_every_rank_by_min_and_max() -> None:
    def body(c: Communicator) -> None:
        for op in ("min", "max"):
            x = np.zeros(100, "float32")
            x[c.rank] = np.nan
            c.all_reduce(x, op)
            assert np.isnan(x[: c.size]).all() and not np.isnan(x[c.size :]).any()

    threads(3, body)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_uneven_parts(kind: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4), "size")
    sizes = st.one_of(st.integers(0, 20), st.just(9001))
    matrix = [[data.draw(sizes) for _ in range(size)] for _ in range(size)]
    algorithm = data.draw(st.sampled_from([None, *algorithms(Collective.ALL_TO_ALL)]), "algorithm")
    rows = [values(rank, sum(matrix[rank]), "int32") for rank in range(size)]

    def body(c: Communicator) -> None:
        r = c.rank
        column = [matrix[s][r] for s in range(size)]
        out = np.empty(sum(column), "int32")
        c.all_to_all(out, rows[r], column, matrix[r], algorithm=algorithm)
        mine = [np.split(rows[s], np.cumsum(matrix[s])[:-1])[r] for s in range(size)]
        assert np.array_equal(out, np.concatenate(mine))
        counts = matrix[0]
        parts = [np.full(counts[s], s, "int32") for s in range(size)]
        gathered = np.empty(sum(counts), "int32")
        c.all_gather(gathered, parts[r], counts=counts)
        assert np.array_equal(gathered, np.concatenate(parts))
        own = np.empty(counts[r], "int32")
        c.reduce_scatter(own, gathered, counts=counts)
        assert np.array_equal(own, parts[r] * size)

    threads(size, body, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_by_source_and_tag(kind: str) -> None:
    def body(c: Communicator) -> None:
        left, right = (c.rank - 1) % c.size, (c.rank + 1) % c.size
        sent = [c.send(np.full(n, c.rank + n, "int64"), right, tag=n, async_op=True) for n in (1, 7, 30_000)]
        c.barrier()  # an unread message is never in the way of a collective
        for n in (30_000, 7):
            x = np.empty(n, "int64")
            assert c.recv(x, left, tag=n) == left
            assert (x == left + n).all()
        x = np.empty(1, "int64")
        assert c.recv(x) == left
        assert x[0] == left + 1
        for work in sent:
            work.wait(60)

    threads(3, body, kind)


def test_split() -> None:
    def body(c: Communicator) -> None:
        odd = c.split(c.rank % 2 if c.rank < 4 else None, key=-c.rank)
        if c.rank == 4:
            assert odd is None
            return
        assert odd is not None
        with odd:
            assert (odd.size, odd.rank) == (2, 1 if c.rank < 2 else 0)
            x = np.array([c.rank])
            odd.all_reduce(x)
            assert x[0] == (2 if c.rank % 2 == 0 else 4)

    threads(5, body)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_from_several_threads_are_serialised(kind: str) -> None:
    def body(c: Communicator) -> None:
        def many() -> None:
            for _ in range(50):
                x = np.ones(100)
                c.all_reduce(x)
                assert (x == c.size).all()

        with ThreadPoolExecutor(3) as pool:
            for future in [pool.submit(many) for _ in range(3)]:
                future.result()

    threads(2, body, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_asynchronous_buffers_stay_alive_and_in_order(kind: str) -> None:
    def body(c: Communicator) -> None:
        for _ in range(20):
            c.all_reduce(np.ones(100_000), async_op=True)  # nobody keeps the array
        x = np.ones(3)
        works = [c.all_reduce(x, async_op=True) for _ in range(5)]
        works[-1].wait(60)
        assert all(work.is_completed() for work in works)
        assert (x == c.size**5).all()

    threads(2, body, kind)


def test_a_communicator_is_freed() -> None:
    communicator = Communicator(shm_threads(1)[0])
    communicator.all_reduce(np.ones(3))
    gone = weakref.ref(communicator)
    communicator.close()
    del communicator
    gc.collect()
    assert gone() is None


def test_a_users_algorithm_is_proved_before_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registry, Collective.BROADCAST, algorithms(Collective.BROADCAST))

    @algorithm(Collective.BROADCAST, name="test_star")
    def star(rank: int, size: int) -> Any:
        yield tuple(send(peer, 0) for peer in range(1, size)) if rank == 0 else recv(0, 0)

    @algorithm(Collective.BROADCAST, name="test_forgetful")
    def forgetful(rank: int, size: int) -> Any:
        yield tuple(send(peer, 0) for peer in range(1, size - 1)) if rank == 0 else ()

    def body(c: Communicator) -> str:
        x = np.full(5, c.rank)
        c.broadcast(x, 2, algorithm="test_star")
        assert (x == 2).all()
        return outcome(lambda: c.broadcast(x, algorithm="test_forgetful"))

    for text in threads(3, body):
        assert text.startswith("ScheduleError: ")


def test_the_environment_forces_an_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(c: Communicator) -> str:
        return outcome(lambda: c.all_reduce(np.ones(3)))

    for text, wanted in [
        ("ring", "no error"),
        ("all_reduce=tree,broadcast=chain", "no error"),
        ("rign", "no collective has an algorithm called 'rign'"),
        ("al_reduce=ring", "is no collective"),
    ]:
        monkeypatch.setenv("ABCCL_ALGORITHM", text)
        with_barrier = threads(2, body) if wanted == "no error" else [outcome(lambda: threads(2, body))]
        assert all(wanted in result for result in with_barrier)


def works_with_processes() -> int:
    with abccl.init(timeout=60) as c:
        for collective in (Collective.ALL_REDUCE, Collective.BROADCAST, Collective.ALL_TO_ALL):
            for name in algorithms(collective):
                for count in (1, 7 * c.size, 100_003 * c.size):
                    x, out = np.full(count, c.rank + 1.0), np.empty(count)
                    if collective is Collective.ALL_REDUCE:
                        c.all_reduce(x, algorithm=name)
                        assert (x == c.size * (c.size + 1) / 2).all()
                    elif collective is Collective.BROADCAST:
                        c.broadcast(x, c.size - 1, algorithm=name)
                        assert (x == c.size).all()
                    elif count % c.size == 0:
                        c.all_to_all(out, x, algorithm=name)
                        assert np.array_equal(out.reshape(c.size, -1)[:, 0], np.arange(c.size) + 1.0)
        c.barrier()
        return c.size


@pytest.mark.ranks
def test_processes(here: ModuleType, ranks: int) -> None:
    assert abccl.spawn(here.works_with_processes, ranks, timeout=60) == [ranks] * ranks
