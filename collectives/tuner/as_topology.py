"""The ranks that a tuner knows, as a machine of the simulator: a table's constants as a topology."""

from __future__ import annotations

from ...algorithms import Algorithm
from ...algorithms.model import NAMES
from ...algorithms.simulator import EVENTS, Level, Links, Rank, Simulation, Topology, simulate
from ...algorithms.simulator.topology import Constant, Way
from ...algorithms.words import count
from ...errors import ArgumentError
from ...transports.shm import PROTOCOLS, SLOTS
from .candidates import Place
from .choice import Choice
from .table import Table

HOST, SYSTEM = "host", "system"
"""The levels. The ranks of a host share its cores where it has fewer, and always its network card."""


def topology_of(table: Table, place: Place, name: str = "this machine") -> Topology:
    """The machine on which the ranks are, its constants those of the table, each protocol's its own.

    Raises:
        ArgumentError: the ranks are not in blocks of one size by host, as the levels of a topology are.
    """
    largest = max(map(len, place.hosts))
    if any(rank // largest != number for number, host in enumerate(place.hosts) for rank in host):
        raise ArgumentError(
            f"a topology has as many ranks on every host, in order, and these are {list(map(list, place.hosts))}: "
            "start the ranks host by host, equally many on each"
        )
    names = PROTOCOLS if place.shared else PROTOCOLS[:1]
    protocols = {one: _way(one, table, place) for one in names if place.protocol in (None, one)}
    where = f"{count(place.size, 'rank')} on {count(len(place.hosts), 'host')}"
    rank, levels = next(iter(protocols.values()))
    about = f"{where} by the tuner's table, {table.told}"
    return Topology(name, about, rank, levels, protocols if place.shared else {}, table.sizes)


def _way(protocol: str, table: Table, place: Place) -> Way:
    """What the constants of a protocol are to a rank and to the levels."""
    of: dict[str, Constant] = {
        name: row[0] if len(set(row)) == 1 else row for name, row in zip(NAMES, table.constants[protocol])
    }
    largest = max(map(len, place.hosts))
    rank = Rank(
        launch=of["launch"],
        send=of["send"],
        receive=of["receive"],
        copy=of["copy"],
        fold=of["fold"],
        lends=protocol.startswith("lent"),
        lent=of["lent"],
        lent_fold=of["lent_fold"],
        # The slots are those of shared memory. A network that serves all ranks keeps what has come for its receiver.
        slots=SLOTS if place.shared else 0,
    )
    host = Level(HOST, largest, of["alpha"], of["overhead"], cores=place.cores if place.cores < largest else 0)
    if len(place.hosts) == 1:
        return rank, (host,)
    card = Links(HOST)
    return rank, (host, Level(SYSTEM, 0, of["far_alpha"], of["far_overhead"], of["far_beta"], card))


def simulated(choice: Choice, nbytes: int, place: Place, topology: Topology) -> Simulation:
    """A call on a vector of so many bytes, done as chosen: with the segments and the lanes that its plan would have.

    Args:
        topology: of these ranks, as `topology_of` makes it.

    Raises:
        ArgumentError: the choice is the engine's own collective, which is no schedule.
    """
    algorithm = choice.algorithm
    if not isinstance(algorithm, Algorithm):
        raise ArgumentError(f"{choice.name} is no schedule, and can not be simulated: choose an algorithm")
    return simulate(
        algorithm,
        place.size,
        topology,
        nbytes,
        protocol=(choice.protocol or next(iter(topology.protocols))) if topology.protocols else None,
        segment=min(place.slot_bytes, choice.segment or place.slot_bytes),
        lanes=choice.lanes or place.lanes,
        method=EVENTS,
        in_place=algorithm.collective.cut,
    )
