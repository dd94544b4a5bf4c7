"""What messages on Summit cost according to NCCL's source of 2018 to 2020, and which protocol NCCL 2.4 would take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..algorithms.simulator import Topology, read

MICRO, GIGA = 1e-6, 1e9

NODE = 6
"""GPUs of a node."""

RAILS = 2
"""NICs of a node, and lanes of a ring: NCCL's two channels for each of them are taken as one."""

CHANNELS = 2 * RAILS
"""NCCL 2.4.2, src/misc/rings.cu: with NVLink and several nodes each ring is there twice."""

CHUNK = 128 << 10
"""Bytes of a message of a tree by Simple: what NCCL 2.4.2, src/enqueue.cu comes to for 64 MB on 8 nodes or more."""

RATE = 12.0
"""GB/s of a PCIe link and of a NIC (NCCL 2.5.6, src/graph/topo.h: PCI_WIDTH, NET_WIDTH)."""

_LONG = (256 << 10) / RATE / 1e3
"""Microseconds of 256 KiB: what the Simple rows of trees hold once per message, and between nodes twice."""


@dataclass(frozen=True)
class Row:
    """How an algorithm moves messages by a protocol: a row of NCCL's tables.

    Attributes:
        base: microseconds of the whole call.
        nvlink, pci, net: microseconds of a message within a socket, between sockets, between nodes.
        busbw: GB/s of bus bandwidth that all channels of a node reach together.
        within, between: GB/s of one message, within a node and between nodes; None for what a channel has.
    """

    base: float
    nvlink: float
    pci: float
    net: float
    busbw: float
    within: float | None = None
    between: float | None = None


@dataclass(frozen=True)
class Table:
    """The constants of a version.

    Attributes:
        version, commit: of NCCL.
        place: where in its source.
        rows: by algorithm ("ring", "tree") and protocol.
        even: whether a step of a ring over several nodes takes `net`, whatever it crosses.
        shared: by what factor messages within a node take longer by LL if there are several nodes.
    """

    version: str
    commit: str
    place: str
    rows: dict[tuple[str, str], Row] = field(repr=False)
    even: bool = False
    shared: float = 1.0

    def row(self, algorithm: str, nodes: int, nbytes: int) -> Row:
        """The row for a call, as the code beside the table uses it on so many nodes."""
        name = protocol(algorithm, NODE * nodes, nbytes)
        row = self.rows[algorithm, name]
        if nodes > 1 and algorithm == "ring" and self.even:
            return replace(row, nvlink=row.net, pci=row.net)
        if nodes > 1 and name == "LL":
            return replace(row, nvlink=row.nvlink * self.shared, pci=row.pci * self.shared)
        return row


def _long_row(base: float, nvlink: float, pci: float, net: float, busbw: float) -> Row:
    """The row of a tree by Simple: what it holds for 256 KiB becomes a rate of messages of any length."""
    return Row(base, nvlink - _LONG, pci - _LONG, net - 2 * _LONG, busbw, RATE, RATE / 2)


_BOTH = RAILS * RATE

FIRST = Table(
    "2.4.2",
    "1450d42",
    "src/init.cu, ncclTreeThreshold",
    {
        ("ring", "LL"): Row(0, 3.0, 3.0, 3.0, 5.0 * CHANNELS / 2),
        ("ring", "Simple"): Row(0, 3.0, 3.0, 3.0, 5.0 * CHANNELS),
        ("tree", "LL"): Row(0, 2.0, 2.0, 7.5, 5.0 * CHANNELS * 3 / 4 / 2),
        ("tree", "Simple"): Row(0, 2.0, 2.0, 7.5, 5.0 * CHANNELS * 3 / 4, RATE, RATE / 2),
    },
)
"""Here times are of both phases of an all_reduce, 6 us a rank in a ring, 15 us a level and 4 us a rank in a tree; a
channel has 5 GB/s, three quarters of it in a tree. LL's lines are data and flags by halves (src/include/core.h)."""

CENTRAL = Table(
    "2.5.6",
    "299c554",
    "src/graph/tuning.cc, baseLat, hwLat and ncclSetThresholds",
    {
        ("ring", "LL"): Row(3.6, 0.4, 1.0, 0.9, _BOTH / 4),
        ("ring", "Simple"): Row(8.4, 5.7, 5.7, 6.6, _BOTH),
        ("tree", "LL"): Row(4.4, 0.5, 1.0, 5.0, _BOTH * 0.9 / 3),
        ("tree", "Simple"): _long_row(0, 28, 28, 50, _BOTH * 0.9),
    },
    even=True,
)
"""The first version whose table tells protocols and links apart; that of 2.6.4 is the same."""

LAST = Table(
    "2.7.3",
    "5949d96",
    "src/graph/tuning.cc, baseLat, hwLat and ncclTopoTuneModel",
    {
        ("ring", "LL"): Row(3.6, 0.47, 1.0, 2.7, _BOTH / 4),
        ("ring", "Simple"): Row(8.4, 3.4, 5.7, 9.6, _BOTH),
        ("tree", "LL"): Row(4.4, 0.52, 1.0, 5.0, _BOTH * 0.9 / 3.8),
        ("tree", "Simple"): _long_row(0, 28, 28, 50, _BOTH * 0.9),
    },
    shared=1.8,
)

TABLES = (CENTRAL, FIRST, LAST)


def protocol(algorithm: str, ranks: int, nbytes: int) -> str:
    """What NCCL 2.4.2 takes on V100 (src/enqueue.cu, getKernelInfo): LL while each of 256 threads has little to do.

    NCCL 2.3.7 takes the same for rings (src/include/common_coll.h).
    """
    little = 64 * ranks if algorithm == "ring" else 4 * 64
    return "LL" if nbytes <= CHANNELS * 256 * little else "Simple"


def summit(row: Row, nbytes: int) -> Topology:
    """Summit's levels and links, with what the row says.

    What a GPU does with the bytes of a message is in the rate of the channel that brings them.
    """
    machine = read("summit").without_protocols("Simple", nbytes)
    inner, outer = machine.levels[:-1], machine.levels[-1]
    channel = row.busbw / RAILS
    values = {"rank.launch": row.base * MICRO, "rank.receive": 0.0, "rank.copy": 0.0, "rank.fold": 0.0}
    for level, alpha in zip(machine.levels, (row.nvlink, row.pci, row.net)):
        values[f"{level.name}.alpha"] = alpha * MICRO
        values[f"{level.name}.overhead"] = 0.0
    for level in inner:
        values[f"{level.name}.beta"] = 1 / ((row.within or channel) * GIGA)
    values[f"{outer.name}.beta"] = 1 / ((row.between or channel) * GIGA)
    values[f"{outer.name}.links.capacity"] = channel * GIGA
    for place, value in values.items():
        machine = machine.with_value(place, value)
    return machine
