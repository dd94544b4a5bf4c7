"""The section on trees and rings: the numbers of both figures, where NVIDIA's differ, and all constants."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import log2

from .markdown import table, wrapped
from .nccl import CENTRAL, CHANNELS, CHUNK, FIRST, LAST, NODE, RAILS, RATE, TABLES, protocol
from .trees_and_rings import (
    FLAT,
    LARGE,
    MEASURED,
    MEASURED_NODES,
    RING,
    SMALL,
    TREE,
    WALKED,
    WIDE,
    Figures,
    Line,
    busbw,
    shown,
)

LEAST = 4
"""Nodes below which bandwidths are not those of NCCL, which has more and faster channels there, and no trees on one."""

PICTURES = {SMALL: "trees-and-rings-latency.png", LARGE: "trees-and-rings-bandwidth.png"}


def numbers(nbytes: int, lines: dict[str, Line]) -> str:
    """The figure as a table."""
    digits = 0 if nbytes == SMALL else 1
    small = nbytes == SMALL
    head = ["GPUs"]
    columns: list[list[str]] = []
    for name, line in lines.items():
        ranks, central, low, high = shown(nbytes, line)
        head.append(f"{name}, {'us' if small else 'GB/s'}")
        columns.append([f"{value:,.{digits}f}" for value in central])
        if name in MEASURED[nbytes]:
            head += ["by any table", "NVIDIA"]
            columns.append([f"{a:,.{digits}f} to {b:,.{digits}f}" for a, b in zip(low, high)])
            measured = dict(zip(MEASURED_NODES, MEASURED[nbytes][name]))
            columns.append([f"{measured[n]:,.{digits}f}" if n in measured else "" for n in line.nodes])
    if small:
        head += ["ring / tree", "NVIDIA"]
        columns.append([f"{a / b:.1f}" for a, b in zip(lines[RING].central, lines[TREE].central)])
        theirs = {n: a / b for n, a, b in zip(MEASURED_NODES, MEASURED[nbytes][RING], MEASURED[nbytes][TREE])}
        columns.append([f"{theirs[n]:.1f}" if n in theirs else "" for n in lines[RING].nodes])
    rows = list(zip([f"{number:,}" for number in ranks], *columns))
    return table(head, rows if small else [row for row, nodes in zip(rows, lines[RING].nodes) if nodes >= LEAST])


def constants() -> str:
    """The tables of NCCL's constants."""
    head = ("NCCL", "", "", "base, us", "NVLink", "PCI", "network", "GB/s of a node")
    rows = []
    for one in TABLES:
        for (algorithm, name), row in one.rows.items():
            cells = [one.version, algorithm, name]
            cells += [f"{value:.3g}" for value in (row.base, row.nvlink, row.pci, row.net, row.busbw)]
            rows.append(cells)
    return table(head, rows)


def ratios(lines: dict[str, Line]) -> tuple[float, float, float]:
    """Ring by tree on most nodes: by the central table, and the least and the most that two tables give."""
    ring, tree = lines[RING], lines[TREE]
    return ring.central[-1] / tree.central[-1], ring.low[-1] / tree.high[-1], ring.high[-1] / tree.low[-1]


def _beside(nbytes: int, name: str, lines: dict[str, Line]) -> list[tuple[float, float, float, float]]:
    """Measured, central, lowest, highest, where NVIDIA has a value."""
    ours = dict(zip(lines[name].nodes, zip(*shown(nbytes, lines[name])[1:])))
    pairs = zip(MEASURED_NODES, MEASURED[nbytes][name])
    return [(measured, *ours[nodes]) for nodes, measured in pairs if nodes in ours]


def _latency(lines: dict[str, Line]) -> str:
    ratio, least, most = ratios(lines)
    theirs = MEASURED[SMALL][RING][-1] / MEASURED[SMALL][TREE][-1]
    where = (
        "less than any of these" if theirs < least else "more than any of these" if theirs > most else "between them"
    )
    rings, trees = (_beside(SMALL, name, lines) for name in (RING, TREE))
    off = max(abs(central / measured - 1) for measured, central, _, _ in rings)
    above = [measured - high for measured, _, _, high in trees]
    doublings = log2(lines[TREE].nodes[-1] / MEASURED_NODES[0])
    slopes = [(trees[-1][column] - trees[0][column]) / doublings for column in (0, 1, 3)]
    ranks = f"{NODE * lines[RING].nodes[-1]:,}"
    against = lines[RING].central[-1] * 1e6 / trees[-1][0]
    return wrapped(
        f"""On {ranks} GPUs a ring takes **{ratio:.0f} times** as long as a tree of nodes by the central table, and
        {least:.0f} to {most:.0f} times if each is taken from the table that makes the ratio least or most.
        NVIDIA's 180 ({theirs:.0f} by its chart) is {where}. The rings are not why: the central table is within
        {off:.0%} of NVIDIA's at every number of GPUs. The trees are: NVIDIA's take {min(above):.0f} to
        {max(above):.0f} us longer than the slowest table has them, on {NODE * MEASURED_NODES[0]} GPUs as on
        {ranks}. Each time the nodes double they take {slopes[0]:.0f} us more; by the table of {CENTRAL.version}
        {slopes[1]:.0f} us, by that of {FIRST.version}, the first release with trees, {slopes[2]:.0f} us. So
        the levels cost what that release took them to cost, and what is missing does not depend on their number;
        no table has it. It is left out, as the measurement itself would be its only source: against NVIDIA's time
        of the tree the ring of the central table takes {against:.0f} times as long. That the rings agree so well
        may prove little, since NVIDIA may have made its tables from measurements like these."""
    )


def _bandwidth(lines: dict[str, Line]) -> str:
    rings, trees = (_beside(LARGE, name, lines) for name in (RING, TREE))
    nodes = lines[RING].nodes
    ring, tree, flat = (busbw(nodes[-1], LARGE, lines[name].central[-1]) for name in (RING, TREE, FLAT))
    places = [number for number in MEASURED_NODES if number in nodes]
    simple = NODE * max(number for number in nodes if protocol("ring", NODE * number, LARGE) == "Simple")
    return wrapped(
        f"""On {NODE * nodes[-1]:,} GPUs the ring has {ring:.1f} GB/s (NVIDIA: {rings[-1][0]}), the tree of nodes
        {tree:.1f}, and {trees[-1][2]:.1f} by the slowest table (NVIDIA: {trees[-1][0]}). NVIDIA's ring is
        {_outside(places, rings)}. A ring bends where NCCL goes from Simple to LL, here after {simple:,} GPUs.
        NVIDIA's tree is {_outside(places, trees)}, and falls from {trees[0][0]} to {trees[-1][0]} GB/s, by the
        central table from {trees[0][1]:.1f} to {trees[-1][1]:.1f} only: the model's network has no switches in
        which messages could meet. A tree that knows nothing of nodes puts every byte on the NICs several times,
        and has {flat:.1f} GB/s."""
    )


def _outside(nodes: Sequence[int], found: Sequence[tuple[float, float, float, float]]) -> str:
    """Where NVIDIA's values are within the band, and where not."""
    below = [f"{NODE * n:,}" for n, (measured, _, low, _) in zip(nodes, found) if measured < low]
    above = [f"{NODE * n:,}" for n, (measured, _, _, high) in zip(nodes, found) if measured > high]
    parts = [f"{where} it on {', '.join(some)} GPUs" for where, some in (("below", below), ("above", above)) if some]
    inside = len(nodes) - len(below) - len(above)
    return ", ".join([f"within the band at {inside} of {len(nodes)} points", *parts])


_HEAD = """
    NVIDIA compared the double binary trees of NCCL 2.4 with the rings of NCCL 2.3 on up to 24,576 GPUs of Summit:
    S. Jeaugey, "Massively Scale Your Deep Learning Training with NCCL 2.4", NVIDIA developer blog, February 2019,
    with "up to 180x" less latency. This is the same comparison, simulated. Lines are what the central one of
    three tables of NCCL's own constants gives, bands reach from the lowest to the highest that any of them gives,
    and dots are NVIDIA's, read off the blog's two charts to about 2 %. No constant is fitted to them. `make
    figures` writes this section."""

_MODEL = (
    f"""**ring**: `ring` over all GPUs, node by node, in {RAILS} lanes, so that both NICs are used (NCCL has
    {CHANNELS} channels, two for each NIC). {NODE} ranks stand for all.""",
    """**tree of nodes**: `hierarchical_leaders(inner=chain,outer=double_tree)`: a chain to one GPU of each node and
    a double binary tree between these, as NCCL 2.4 builds it (src/init.cu, setupChannel). NCCL's channels have a
    GPU each for this, near their NIC; here it is one for all. All ranks are walked.""",
    "**flat tree**: `double_tree` over all GPUs, by the central table only: what it is worth to know the nodes.",
    """Machine: levels and links of `summit.toml`: NVLink within a socket, X-Bus between the two, two NICs of a node.
    Within sockets the tables' row of NVLink is taken, between sockets that of PCI (NCCL has no other), between
    nodes that of the network.""",
    """Protocol: LL or Simple by the rule of NCCL 2.4.2 (src/enqueue.cu, getKernelInfo; the same in 2.3.7 for rings):
    8 B go by LL; 64 MB by Simple, but by LL in rings of 1,024 GPUs or more. LL128 came with 2.5 and is left out.""",
    f"""Bytes take the rate of their channel at every hop. In trees, 64 MB are messages of {CHUNK >> 10} KiB, all
    under way at once, at {RATE:.0f} GB/s and at {RATE / 2:.0f} between nodes, which is what the comment above
    hwLat says; the NICs let no more through than the table's bandwidth. NCCL 2.4 sends all messages up before it
    sends the first one down. On more than {WIDE} nodes {WALKED} messages of each tree are walked, and each
    further one takes as long as on {WIDE} nodes.""",
    """On one node and two, NCCL has more and faster channels than here, and on one node it has no trees. The table
    of bandwidths begins above that, and the picture leaves out what is above the bandwidth of the NICs.""",
)

_PLACES = (
    f"""{FIRST.version} (December 2018, commit {FIRST.commit}): {FIRST.place}, which tells at which size trees give
    way to rings: 6 us a rank of a ring, 15 us a level and 4 us a rank of a tree for both ways together, so half
    of that for a message; 5 GB/s a channel and three quarters of it in trees. It does not tell protocols apart;
    LL gets half of the bandwidth, as half of its bytes are flags (ncclLLFifoLine in src/include/core.h).""",
    f"""{CENTRAL.version} (November 2019, commit {CENTRAL.commit}): {CENTRAL.place}. The central one, as it is the
    first that tells protocols and links apart. For a ring over several nodes it takes the network's row at every
    step. 2.6.4 has the same constants.""",
    f"""{LAST.version} (May 2020, commit {LAST.commit}): {LAST.place}. Each step of a ring has the row of what it
    crosses, and within nodes LL takes {LAST.shared} times as long where there are several.""",
    f"""Rows of Simple in trees are for messages of 256 KiB: NVLink and PCI 28 us, network 50 us in the source. Their
    bytes, at {RATE:.0f} GB/s, between nodes twice, are taken off and put back as a rate. Two NICs are 2 x
    {RATE:.0f} GB/s (NET_WIDTH in src/graph/topo.h of 2.5.6).""",
)


def _items(items: Sequence[str]) -> str:
    """A list in lines."""
    lines = (" ".join(words.split()) for words in items)
    return "\n".join(
        textwrap.fill(
            words, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for words in lines
    )


def document(found: Figures) -> str:
    """The section, in Markdown; its pictures lie in a folder "model" beside the document."""
    small, large = found[SMALL], found[LARGE]
    parts = [
        wrapped(_HEAD),
        f"![latency against GPUs](model/{PICTURES[SMALL]})",
        numbers(SMALL, small),
        _latency(small),
        f"![bus bandwidth against GPUs](model/{PICTURES[LARGE]})",
        numbers(LARGE, large),
        _bandwidth(large),
        "### What is simulated",
        _items(_MODEL),
        "### The constants",
        constants(),
        _items(_PLACES),
    ]
    return "\n\n".join(parts) + "\n"
