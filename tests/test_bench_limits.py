"""The benchmark beside its tables: the memory's roofline, the cache regime, persistent calls, registered memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from bench_runs import ALONE, case_of, measured, report, started

from abccl.algorithms import Collective
from abccl.bench.buffers import Buffers
from abccl.bench.data import pieces
from abccl.bench.measure import Timing
from abccl.bench.options import Options
from abccl.bench.peers import MPI, AbcclDirect, settings
from abccl.bench.record import as_data
from abccl.bench.regime import Regime
from abccl.bench.roofline import addition, operands, roofline_bytes
from abccl.bench.run import Report, Row
from abccl.bench.table import columns, footer, header
from abccl.errors import ArgumentError

# ---- the roofline and the cache regime


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("collective", Collective, ids=lambda collective: collective.value)
def test_least_bytes_are_what_the_results_need(collective: Collective, ranks: int) -> None:
    case, root = case_of(collective, count=4, ranks=ranks), ranks - 1
    needed = set()
    written = 0
    for rank in range(ranks):
        for piece in pieces(case, rank, root):
            needed |= {(source, piece.offset + i) for source in piece.sources for i in range(piece.elements)}
            here_already = case.in_place and piece.sources == (rank,)
            written += 0 if here_already else piece.elements
    assert case.least_bytes == 4 * (len(needed) + written)


def test_least_bytes_of_two_ranks() -> None:
    case = case_of(Collective.ALL_REDUCE, count=1000, ranks=2)
    assert case.least_bytes == 4 * case.size
    assert roofline_bytes(case) == 6 * case.size
    assert case_of(Collective.ALL_REDUCE, ranks=1).least_bytes == 0


def test_the_roofline_adds_what_has_the_size_of_the_case() -> None:
    case = case_of(Collective.ALL_GATHER, count=1000, ranks=3, dtype="int16")
    a, b = operands(case, 1)
    assert a.nbytes == b.nbytes == case.size and not np.array_equal(a, b)
    expected = a + b
    addition(a, b)()
    assert np.array_equal(a, expected)


def test_near_or_far() -> None:
    assert Regime(140, 45, 17).name == "near" and Regime(330, 24, 2).name == "far"
    text = Regime(140, 45, 17).text
    assert "140 ns" in text and "copied at 45.0 GB/s" in text and "rewritten at 17.0" in text


def report_of(regimes: list[Regime | None]) -> Report:
    case = case_of(Collective.ALL_REDUCE, count=1000, ranks=2)
    settled = Options(Collective.ALL_REDUCE, rivals=("mpi",), roofline=True).settled(2)
    row = Row(case, (measured("abccl", 1e-3),), (measured("mpi", 2e-3),), Timing((0.3e-3,), (0.3e-3,) * 2, 1))
    return report([row], settled, regimes)


def test_the_part_of_the_roofline() -> None:
    found = report_of([None, None])
    (row,) = found.rows
    # 24000 bytes in 0.3 ms are 80 MB/s; 16000 must be moved, in 1 ms and in 2 ms.
    assert row.memory_bandwidth == pytest.approx(0.08)
    assert row.part(row.ours[0]) == pytest.approx(0.2)
    assert row.part(row.rivals[0]) == pytest.approx(0.1)
    cells = {c.name: c.cell(row, row.ours[0]) for c in columns(found, False)}
    assert cells["roofline"] == "20.0%"
    (kept,) = as_data(found)["rows"]
    assert (kept["least_bytes"], kept["measured"][1]["roofline_part"]) == (16000, pytest.approx(0.1))


def test_a_table_tells_the_regime_at_both_ends() -> None:
    near, far = Regime(140, 45, 17), Regime(330, 24, 2)
    flipped = report_of([near, far])
    assert any("at the start: near" in line for line in header(flipped))
    assert any("at the end: far" in line and "changed" in line for line in footer(flipped))
    assert not any("changed" in line for line in footer(report_of([far, far])))
    assert [regime["name"] for regime in as_data(flipped)["regimes"]] == ["near", "far"]
    assert not any("ranks 0 and 1" in line for line in header(report_of([None, None])))


# ---- persistent calls, registered memory, settings


class Recorder:
    """Stands for a communicator: keeps what it is called with."""

    def __init__(self, *names: str) -> None:
        self.log: list[Any] = []
        for name in names:
            setattr(self, name, self._logged(name))

    def _logged(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.log.append((name, args, options))
            return Recorder("Start", "Wait", "Free")

        call.__name__ = name
        return call


def peer_of(kind: type[Any], **attributes: Any) -> Any:
    peer = kind.__new__(kind)
    vars(peer).update({"rank": 0, "persistent": True, "array": "numpy", "algorithm": "ring"} | attributes)
    return peer


def test_a_handle_gets_the_arguments_of_the_plain_call() -> None:
    case = case_of(Collective.REDUCE_SCATTER)
    comm: Any = Recorder("reduce_scatter", "reduce_scatter_init")
    buffers = Buffers(case, "numpy", comm)
    peer_of(AbcclDirect, comm=comm).prepare(case, buffers, 0)
    ((name, args, options),) = comm.log
    assert (name, args[0] is buffers.result, args[1] is buffers.x) == ("reduce_scatter_init", True, True)
    assert (args[2], options) == ("sum", {"algorithm": "ring"})


def test_an_abccl_without_handles_says_so() -> None:
    case = case_of(Collective.BROADCAST)
    comm: Any = Recorder("broadcast")
    with pytest.raises(ArgumentError, match="has no broadcast_init"):
        peer_of(AbcclDirect, comm=comm).prepare(case, Buffers(case, "numpy", comm), 0)


def pretended_mpi() -> Any:
    return SimpleNamespace(
        Get_library_version=lambda: "MPICH Version:      4.9\nMPICH Device: ch4",
        FLOAT="float",
        SUM="sum",
        IN_PLACE="in place",
    )


def test_mpi_starts_a_request_again_and_again() -> None:
    case = case_of(Collective.ALL_REDUCE)
    comm: Any = Recorder("Allreduce", "Allreduce_init")
    call = peer_of(MPI, comm=comm, mpi=pretended_mpi()).prepare(case, Buffers(case, "numpy", comm), 0)
    assert [name for name, *_ in comm.log] == ["Allreduce_init"]
    assert comm.log[0][1][0] == "in place" and comm.log[0][1][2] == "sum"
    request = call.request
    call()
    call()
    del call
    assert [name for name, *_ in request.log] == ["Start", "Wait", "Start", "Wait", "Free"]


def test_an_mpi_without_persistent_collectives_is_refused() -> None:
    case = case_of(Collective.ALL_REDUCE)

    def Allreduce_init(*args: Any) -> None:
        raise NotImplementedError  # as mpi4py does where the library has no such function

    comm: Any = Recorder("Allreduce")
    comm.Allreduce_init = Allreduce_init
    with pytest.raises(ArgumentError, match=r"MPICH 4.9 has no persistent all_reduce, which came with MPI 4.0"):
        peer_of(MPI, comm=comm, mpi=pretended_mpi()).prepare(case, Buffers(case, "numpy", comm), 0)


def test_registered_buffers_come_from_the_communicator() -> None:
    made = []

    def empty(count: int, dtype: str) -> np.ndarray[Any, Any]:
        made.append((count, dtype))
        return np.empty(count, dtype)

    comm: Any = SimpleNamespace(empty=empty)
    buffers = Buffers(case_of(Collective.ALL_GATHER, count=5, ranks=3), "comm.empty", comm)
    assert made == [(5, "float32"), (15, "float32")]
    assert buffers.result.size == 15
    with pytest.raises(ArgumentError, match="no registered memory"):
        Buffers(case_of(Collective.ALL_GATHER), "comm.empty", cast(Any, SimpleNamespace()))


def test_settings_are_the_users_not_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("I_MPI_", "OMPI_MCA_"))]:
        monkeypatch.delenv(name)
    for name in ("I_MPI_FABRICS", "I_MPI_INFO_CACHES", "OMPI_MCA_smsc", "OMPI_MCA_ess_base_jobid"):
        monkeypatch.setenv(name, "x")
    assert settings("OMPI_MCA_", "I_MPI_") == {"I_MPI_FABRICS": "x", "OMPI_MCA_smsc": "x"}


# ---- several processes


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", ["2", "3"])
def test_roofline_and_regime_among_ranks(ranks: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    options = ["--ranks", ranks, "--max", "1K", "--iterations", "5", "--roofline", "--json", str(file)]
    shown = started(ALONE, "all_reduce", *options)
    assert "roofline  #wrong" in shown and "at the start: " in shown and "at the end: " in shown
    kept = json.loads(file.read_text())
    assert len(kept["regimes"]) == 2 and all(
        r["line_ns"] > 0 and r["copy"] > 0 and r["write"] > 0 for r in kept["regimes"]
    )
    for row in kept["rows"]:
        assert row["least_bytes"] == 2 * int(ranks) * row["size"]
        moved = row["least_bytes"] / row["measured"][0]["time_us"] / 1e3
        assert row["measured"][0]["roofline_part"] == pytest.approx(moved / row["memory_bandwidth"])
