"""Schedules: the vocabulary, the registry, the library of algorithms, and what reads them."""

from . import (
    bine,
    bruck,
    chain,
    composed,
    direct,
    double_tree,
    doubling,
    knomial,
    multiplying,
    neighbor_exchange,
    pat,
    ring,
    scatter_all_gather,
    swing,
    tree,
)
from .collective import Block, Collective, to_collective
from .cost import Link, check_counts, counts, measured
from .hierarchical import hierarchical
from .parameters import Parameter
from .registry import (
    Algorithm,
    Counts,
    Restriction,
    algorithm,
    algorithms,
    at_least,
    lookup,
    per_rank,
    power_of_two,
)
from .replay import Replay, canonical, replay
from .schedule import Message, Program, Recv, Send, Step, mirror, recv, relabel, send, steps

__all__ = [
    "Algorithm",
    "Block",
    "Collective",
    "Counts",
    "Link",
    "Message",
    "Parameter",
    "Program",
    "Recv",
    "Replay",
    "Restriction",
    "Send",
    "Step",
    "algorithm",
    "algorithms",
    "at_least",
    "canonical",
    "check_counts",
    "counts",
    "hierarchical",
    "lookup",
    "measured",
    "mirror",
    "per_rank",
    "power_of_two",
    "recv",
    "relabel",
    "replay",
    "send",
    "steps",
    "to_collective",
]
