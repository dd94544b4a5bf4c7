"""Trees and rings on Summit: NVIDIA's comparison of 2019, simulated with the constants of NCCL's own source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from ..algorithms import Algorithm, Collective, hierarchical, lookup
from ..algorithms.plan import ALIGNMENT
from ..algorithms.simulator import EVENTS, SYMMETRY, Topology, simulate
from .nccl import CENTRAL, CHUNK, NODE, RAILS, TABLES, Row, summit

SMALL, LARGE = 8, 64 << 20
"""Bytes of the two figures."""

NODES = tuple(1 << power for power in range(13))

WALKED, WIDE = 64, 256
"""On more than WIDE nodes so many segments of a tree are walked; each further one takes as long as on WIDE nodes."""

RING, TREE, FLAT = NAMES = "ring", "tree of nodes", "flat tree"


MEASURED_NODES = NODES[4:]

MEASURED: dict[int, dict[str, tuple[float, ...]]] = {
    SMALL: {
        RING: (179, 362, 655, 1300, 2660, 5550, 10800, 21200, 44700),
        TREE: (128, 140, 155, 168, 180, 199, 207, 226, 248),
    },
    LARGE: {
        RING: (19.1, 17.8, 13.0, 7.5, 6.9, 6.1, 4.2, 3.1, 1.9),
        TREE: (19.8, 16.5, 15.4, 15.2, 14.3, 13.7, 12.0, 12.5, 12.8),
    },
}
"""What NVIDIA measured, us and GB/s: read off the blog's two charts to about 2 %."""


class Point(NamedTuple):
    """What is simulated: an algorithm on so many nodes with these constants."""

    name: str
    nbytes: int
    nodes: int
    row: Row

    @property
    def ranks(self) -> int:
        """GPUs."""
        return NODE * self.nodes

    @property
    def algorithm(self) -> Algorithm:
        """What stands for the name."""
        if self.name == TREE:
            levels = f"{self.nodes}x{NODE}"
            return hierarchical(Collective.ALL_REDUCE, levels, inner="chain", outer="double_tree", leaders=True)
        return lookup(Collective.ALL_REDUCE, "ring" if self.name == RING else "double_tree")

    @property
    def seconds(self) -> float:
        """The time of an all_reduce."""
        if self.name == RING:
            longest = -(-self.nbytes // (self.ranks * RAILS * ALIGNMENT)) * ALIGNMENT
            return self._walk(self.nbytes, longest, RAILS, SYMMETRY if self.nodes > 1 else EVENTS)
        if self.nbytes == SMALL:
            return self._walk(SMALL)
        every = self.nbytes // (2 * CHUNK)
        if self.nodes <= WIDE:
            return self._segments(every)
        wide = self._replace(nodes=WIDE)
        return self._segments(WALKED) + wide._segments(every) - wide._segments(WALKED)

    def _segments(self, segments: int) -> float:
        """The time of so many messages of CHUNK bytes in each of two trees, all under way at once."""
        longest = self.algorithm.largest(self.ranks) * CHUNK
        return self._walk(2 * CHUNK * segments, longest, segments)

    def _walk(self, nbytes: int, longest: int | None = None, lanes: int = 1, method: str = EVENTS) -> float:
        machine: Topology = summit(self.row, nbytes)
        return simulate(
            self.algorithm, self.ranks, machine, nbytes, segment=longest, lanes=lanes, method=method
        ).seconds


class Line(NamedTuple):
    """Seconds of an algorithm on so many nodes: by the central table, and the least and the most by any."""

    nodes: tuple[int, ...]
    central: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


Figures = dict[int, dict[str, Line]]
"""By bytes and name."""

Times = Callable[[Sequence[Point]], Iterable[float]]

one_by_one: Times = partial(map, lambda point: point.seconds)


def points(name: str, nbytes: int, nodes: int) -> list[Point]:
    """What tables say of an algorithm, the central one first; each once."""
    tables = (CENTRAL,) if name == FLAT else TABLES
    rows = (one.row("ring" if name == RING else "tree", nodes, nbytes) for one in tables)
    return list(dict.fromkeys(Point(name, nbytes, nodes, row) for row in rows))


def figures(nodes: Sequence[int] = NODES, times: Times = one_by_one) -> Figures:
    """The lines of both figures; `times` finds the seconds of points, of which the longest come first."""
    cases = [(name, nbytes, number) for number in nodes for nbytes in (SMALL, LARGE) for name in NAMES]
    wanted = [point for case in reversed(cases) for point in points(*case)]
    found = dict(zip(wanted, times(wanted)))

    def line(name: str, nbytes: int) -> Line:
        rows = [[found[point] for point in points(name, nbytes, number)] for number in nodes]
        return Line(tuple(nodes), tuple(row[0] for row in rows), tuple(map(min, rows)), tuple(map(max, rows)))

    return {nbytes: {name: line(name, nbytes) for name in NAMES} for nbytes in (SMALL, LARGE)}


def busbw(nodes: int, nbytes: int, time: float) -> float:
    """GB/s."""
    ranks = NODE * nodes
    return Collective.ALL_REDUCE.bus_factor(ranks) * nbytes / time / 1e9


def shown(nbytes: int, line: Line) -> tuple[list[int], list[float], list[float], list[float]]:
    """Ranks, and a line in the units of its figure: central, lowest and highest us, or GB/s."""
    ranks = [NODE * nodes for nodes in line.nodes]

    def values(times: Sequence[float]) -> list[float]:
        if nbytes == SMALL:
            return [1e6 * time for time in times]
        return [busbw(nodes, nbytes, time) for nodes, time in zip(line.nodes, times)]

    low, high = (line.low, line.high) if nbytes == SMALL else (line.high, line.low)
    return ranks, values(line.central), values(low), values(high)
