"""The nccl transport over a fake of NCCL whose rendezvous is strict."""

from __future__ import annotations

import inspect
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import fake_nccl
import pytest
from fake_nccl import FakeNccl
from few_plans import few_plans
from nccl_ranks import PATIENCE, Rank, Ranks, in_threads, make

import abccl.transports.nccl
from abccl.algorithms import Collective, lookup
from abccl.errors import Aborted, ArgumentError, PeerLost, TransportError
from abccl.transports import conformance, nccl_meeting
from abccl.transports.commands import Command, Incoming, Outgoing
from abccl.transports.contract import NativeCall
from abccl.transports.nccl import NcclWire, NcclWirePlan, nccl_wire
from abccl.transports.nccl_meeting import SHARE, find_nccl
from abccl.transports.trial import Case, Trial


def case(collective: Collective, algorithm: str, size: int, **others: Any) -> Case:
    return Case(lookup(collective, algorithm), size, 101, **others)


RING = case(Collective.ALL_REDUCE, "ring", 3)


def run(transport: Rank, of: Case = RING) -> None:
    transport.driver.make_current()
    trial = Trial(transport, of)
    trial.start().wait(time.monotonic() + PATIENCE)
    trial.verify()


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_nccl(check: Callable[..., None]) -> None:
    few_plans(check)(partial(make, hangs=check is conformance.check_mismatch))


def test_a_graph_is_replayed_with_other_data() -> None:
    with make(3) as transports:

        def main(rank: int) -> None:
            transport = transports[rank]
            transport.driver.make_current()
            trial = Trial(transport, RING)
            trial.start().wait(time.monotonic() + PATIENCE)  # it allocates
            assert trial.input is not None and trial.output is not None
            transport.driver.begin_capture(transport.stream)
            trial.start()
            graph = transport.driver.end_capture(transport.stream)
            for turn in range(20):
                trial.input[:] = turn + rank
                for placed in trial.places:
                    placed.store()
                transport.driver.launch_graph(graph, transport.stream)
                transport.driver.synchronize(transport.stream)
                trial.fetch()
                assert (trial.output == 3 * turn + 3).all(), trial.output
            transport.driver.destroy_graph(graph)

        assert in_threads(3, main) == [None] * 3


def calls_of(commands: Sequence[Command]) -> list[partial[Any]]:
    """The calls of a step's only group."""
    (command,) = commands
    assert isinstance(command, partial)
    return list(command.args[0])


def test_the_calls_of_a_step() -> None:
    ranks = Ranks(1)
    (wire,) = ranks.meet()
    ranks.drivers[0].make_current()
    plan, comm, byte = wire.compile(0), wire.communicator, fake_nccl.NUMBERS.index("uint8")

    def calls(commands: Sequence[Command]) -> list[tuple[Any, ...]]:
        return [(call.func.__name__, *call.args) for call in calls_of(commands)]

    sends = [Outgoing((1, 2), ((0x1000, 8), (0x2000, 0), (0x3000, 5))), Outgoing((2,), ((0x4000, 0),))]
    commands, begins = plan.step(sends, [Incoming(1, (70, 0, 3)), Incoming(2, (0,)), Incoming(2, (6,))])
    assert calls(commands) == [
        *(("send", address, nbytes, byte, peer) for peer in (1, 2) for address, nbytes in ((0x1000, 8), (0x3000, 5))),
        ("send", wire.token, 1, byte, 2),  # of an empty message
        ("recv", begins[0], 70, byte, 1),
        ("recv", begins[0] + 128, 3, byte, 1),
        ("recv", wire.token + 1, 1, byte, 2),
        ("recv", begins[2], 6, byte, 2),
    ]
    assert comm.send == calls_of(commands)[0].func
    assert abs(begins[2] - begins[0]) >= 192  # beside each other
    again = plan.step([], [Incoming(1, (6,))])[1]
    assert again[0] not in begins  # what was received before is still to be read
    plan.release()
    small = plan.step([], [Incoming(1, (64,))])[1]
    plan.release()
    assert plan.step([], [Incoming(1, (1,))])[1] == small  # registers are used again
    plan.release()
    assert plan.step([], [Incoming(1, (1 << 20,))])[1] != small
    assert ranks.drivers[0].pointer(small[0]).kind == "device"  # and kept for older commands
    wire.close()
    ranks.close()


class Groupless(NcclWirePlan):
    """Each call by itself."""

    def step(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> tuple[list[Command], list[int]]:
        commands, begins = super().step(sends, receives)
        return [self._wire.grouped([call]) for call in calls_of(commands)], begins


class Split(NcclWirePlan):
    """The sends in a group, and the receives in another."""

    def step(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> tuple[list[Command], list[int]]:
        calls, begins = calls_of((both := super().step(sends, receives))[0]), both[1]
        is_send = [call.func == self._wire.communicator.send for call in calls]
        groups = [[call for call, send in zip(calls, is_send) if send == wanted] for wanted in (True, False)]
        return [self._wire.grouped(group) for group in groups if group], begins


class Swapped(NcclWirePlan):
    """Parts are received in the opposite order."""

    def step(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> tuple[list[Command], list[int]]:
        commands, begins = super().step(sends, receives)
        return [self._wire.grouped(calls_of(commands)[::-1] if receives and not sends else calls_of(commands))], begins


@pytest.mark.parametrize(
    ("mutant", "of", "says"),
    [
        (Groupless, RING, "deadlock: rank . waits in a send of .* bytes with rank ., rank"),
        (Split, RING, "deadlock: rank . waits in a send of .* bytes with rank ., rank"),
        (
            Swapped,
            case(Collective.SCATTER, "knomial(radix=2)", 5, uneven=True),
            "send of .* bytes .* meets .* recv of .* bytes",
        ),
        (Swapped, case(Collective.SCATTER, "knomial(radix=2)", 5), "elements are wrong"),
    ],
)
def test_a_wrong_wire_is_exposed(mutant: type[NcclWirePlan], of: Case, says: str) -> None:
    with make(of.size, mutant) as transports:
        errors = in_threads(of.size, lambda rank: run(transports[rank], of))
        assert any(re.search(says, str(error)) for error in errors), errors
    with make(of.size) as transports:
        assert in_threads(of.size, lambda rank: run(transports[rank], of)) == [None] * of.size


# Failures


def stuck(transports: Sequence[Rank], then: Callable[[], None]) -> list[Any]:
    """What ranks 0 and 1 get when they run with rank 2, which does not come, and `then` happens."""
    started = threading.Barrier(3, timeout=PATIENCE)

    def main(rank: int) -> None:
        if rank == 2:
            started.wait()
            then()
            return
        transports[rank].driver.make_current()
        execution = Trial(transports[rank], RING).start()
        started.wait()
        try:
            execution.wait(time.monotonic() + PATIENCE)
        finally:
            transports[rank].driver.synchronize(transports[rank].stream)  # nothing waits on the device any more

    results = in_threads(3, main)
    assert results[2] is None, results[2]
    return results[:2]


def test_an_abort_from_another_thread_lets_the_devices_go() -> None:
    with make(3) as transports:
        for error in stuck(transports, lambda: transports[0].abort(Aborted("enough"))):
            assert isinstance(error, Aborted) and "enough" in str(error), error
        assert [transport.wire.communicator.ended for transport in transports[:2]] == [["aborted"]] * 2


def test_a_peer_that_dies_is_lost() -> None:
    with make(3) as transports:
        for error in stuck(transports, lambda: transports[0].wire.nccl._network.kill(2)):
            assert isinstance(error, PeerLost), error
            assert re.match("nccl: rank [01] of 3: NCCL says remote process exited .* look at the output", str(error))


@pytest.mark.parametrize(("status", "says"), [(2, "unhandled system error"), (8, "8")])
def test_an_asynchronous_error_is_raised_everywhere(status: int, says: str) -> None:
    with make(3) as transports:
        for error in stuck(transports, lambda: transports[0].wire.nccl._network.world.errors.update({1: status})):
            assert isinstance(error, TransportError), error
            assert f"nccl: rank 1 of 3: NCCL says {says}: NCCL_DEBUG=WARN" in str(error), error


def test_who_hangs_in_nccl_is_helped_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abccl.transports.nccl, "GRACE", 0.1)
    ranks = Ranks(2)
    wire: NcclWire = ranks.meet()[0]
    connecting = threading.Event()
    connect = ranks.network.world.connect
    monkeypatch.setattr(ranks.network.world, "connect", lambda calls: (connecting.set(), connect(calls)))

    def send(rank: int) -> None:
        ranks.drivers[0].make_current()
        if rank == 1:
            connecting.wait(PATIENCE)
            wire.check()  # does not wait for who hangs
            wire.fail()
            wire.fail()
            return
        (command,), _ = wire.compile(0).step([Outgoing((1,), ((wire.token, 1),))], [])
        command(ranks.drivers[0].create_stream())

    error, nothing = in_threads(2, send)
    assert nothing is None and isinstance(error, TransportError) and "internal error" in str(error), error
    ranks.drivers[0].make_current()
    with pytest.raises(Aborted, match="make a new one"):
        wire.grouped([])(0)
    wire.check()
    wire.close()
    wire.close()
    assert wire.communicator.ended == ["aborted"]
    ranks.close()


def test_a_barrier_of_nccl_waits_for_all() -> None:
    ranks = Ranks(1)
    (wire,) = ranks.meet()
    barrier = NativeCall(Collective.BARRIER, "uint8", "", 0, 0, 0, None, None, None, "barrier()")
    (commands,) = wire.prepare_native(barrier)(0, 0)
    (call,) = calls_of(commands)
    assert call.func == wire.communicator.allReduce and call.args[2] == 1  # NCCL leaves out empty collectives
    ranks.close()


def test_what_nccl_has_not_is_refused() -> None:
    (wire,) = Ranks(1).meet()
    call = NativeCall(Collective.ALL_REDUCE, "int16", "sum", 0, 1, 1, None, None, None, "all_reduce(int16)")
    with pytest.raises(ArgumentError, match="NCCL has no sum for int16 .*: leave out algorithm='native'"):
        wire.prepare_native(call)


# Meeting


def meet_in_vain(ranks: Ranks) -> list[str]:
    """Why there are no wires: TransportErrors."""
    errors = ranks.meet()
    assert all(isinstance(error, TransportError) for error in errors), errors
    ranks.close()
    return [str(error) for error in errors]


def test_all_refuse_if_one_has_no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(3)
    ranks.nccls[1] = None

    imports(monkeypatch, {})
    said = meet_in_vain(ranks)
    assert len(set(said)) == 1 and re.match(
        "nccl: rank 1 of 3: the nccl transport needs cupy, .*abccl.cuda13.", said[0]
    )
    assert ranks.network.inits == 0


def test_all_refuse_different_versions() -> None:
    ranks = Ranks(3, versions=(22707, 22707, 23004))
    wanted = "nccl: all ranks need the same NCCL, and rank 0 has 2.27.7, rank 2 2.30.4: install one on all"
    assert meet_in_vain(ranks) == [wanted] * 3
    assert ranks.network.inits == 0


def test_a_shared_gpu_is_refused_unless_nccl_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, value in ((22809, "1"), (23000, "0"), (23000, "")):
        monkeypatch.setenv(SHARE, value)
        ranks = Ranks(2, shared=True, versions=(version, version))
        for said in meet_in_vain(ranks):
            assert re.match(f"nccl: ranks 0 and 1 share a GPU.*2.30.0 and newer.*{SHARE}=1", said), said
        assert ranks.network.inits == 0
    monkeypatch.setenv(SHARE, "1")
    ranks = Ranks(2, shared=True, versions=(23000, 23000))
    assert [type(wire) for wire in ranks.meet()] == [NcclWire] * 2
    ranks.close()


def test_all_fail_if_one_can_not_begin() -> None:
    ranks = Ranks(3, timeout=0.5)
    ranks.network.init_errors[1] = 1
    for said in meet_in_vain(ranks):
        assert said.startswith("nccl: rank 0 of 3: NCCL waits for other ranks since 0.5 s"), said
    ranks = Ranks(1)
    ranks.network.init_errors[0] = 1
    (said,) = meet_in_vain(ranks)
    assert said.startswith("nccl: rank 0 of 1: NCCL says unhandled cuda error"), said


def test_a_communicator_that_not_all_have_is_aborted() -> None:
    ranks, blobs = Ranks(1), list[bytes]()

    def exchange(blob: bytes) -> list[bytes]:
        blobs.append(blob)
        if len(blobs) > 1:
            raise PeerLost("somebody has ended")
        return [blob]

    with pytest.raises(PeerLost, match="somebody"):
        nccl_wire(exchange, 0, 1, ranks.drivers[0], ranks.nccls[0])
    (communicator,) = ranks.network.communicators
    assert communicator.ended == ["aborted"]
    ranks.close()


def imports(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    """Only these modules can be imported by name."""

    def import_module(name: str) -> Any:
        if name not in found:
            raise ImportError(f"{name} is not there")
        return found[name]

    monkeypatch.setattr(nccl_meeting.importlib, "import_module", import_module)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imports(monkeypatch, {})
    with pytest.raises(TransportError, match="can not be imported .cupy is not there.: pip install -U 'abccl.cuda13.'"):
        find_nccl()
    imports(monkeypatch, {"cupy": SimpleNamespace(__version__="13.6.0")})
    with pytest.raises(TransportError, match="needs cupy 14 or newer, and this is 13.6.0: pip install -U 'abccl"):
        find_nccl()
    bare = SimpleNamespace(available=False)
    imports(monkeypatch, {"cupy": SimpleNamespace(__version__="14.2.0"), "cupy.cuda.nccl": bare})
    with pytest.raises(
        TransportError, match="14.2.0 can not load .*nccl is not there.: pip install -U 'abccl.cuda13.*nvidia-nccl-cu13"
    ):
        find_nccl()


def test_the_fake_has_the_calls_of_cupy() -> None:
    """And with the same arguments: cupy's text of a call begins with them."""
    pytest.importorskip("cupy")
    try:
        nccl = find_nccl()
    except TransportError as error:
        pytest.skip(str(error))
    for name, call in inspect.getmembers(fake_nccl.FakeCommunicator, inspect.isfunction):
        if not name.startswith("_"):
            told = re.match(rf"NcclCommunicator\.{name}\((.*)\)", getattr(nccl.NcclCommunicator, name).__doc__)
            assert told, name
            assert [word.split()[-1] for word in told[1].split(", ")] == list(inspect.signature(call).parameters), name
    for number, name in enumerate(fake_nccl.NUMBERS):
        assert getattr(nccl, f"NCCL_{name.upper()}") == number
    for name in ("NCCL_SUM", "NCCL_PROD", "NCCL_MAX", "NCCL_MIN"):
        assert getattr(nccl, name) == getattr(FakeNccl, name)
    unique = nccl.get_unique_id()
    assert isinstance(unique, bytes) and len(unique) == 128 and nccl.get_version() > 22700
    nccl.groupStart()
    nccl.groupEnd()
