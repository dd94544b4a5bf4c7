"""The simulator: how long a schedule would take on a machine that need not be there.

In reading order: `topology` (levels, links, constants), `toml_topology` (its file) and `checks`, `simulate` (the call),
`simulation` (its result), `symmetry` (ranks that stand for others), `closed_form` (for what is too much), `costs` (a
topology in numbers), `native/` (the event engine, C++). `topologies/` are the machines that come with the library.
"""

from .simulate import AUTO, cut, simulate
from .simulation import CLOSED_FORM, EVENTS, KINDS, METHODS, SYMMETRY, Simulation, Timeline
from .toml_topology import parse, read, shipped
from .topology import Level, Links, Rank, Topology

__all__ = [
    "AUTO",
    "CLOSED_FORM",
    "EVENTS",
    "KINDS",
    "METHODS",
    "SYMMETRY",
    "Level",
    "Links",
    "Rank",
    "Simulation",
    "Timeline",
    "Topology",
    "cut",
    "parse",
    "read",
    "shipped",
    "simulate",
]
