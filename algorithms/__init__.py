"""Schedules: the vocabulary, the registry, the library of algorithms, and what reads them."""

from . import ring
from .collective import Block, Collective
from .registry import Algorithm, Counts, Restriction, algorithm, algorithms, at_least, lookup, per_rank, power_of_two
from .schedule import Message, Program, Recv, Send, Step, mirror, recv, relabel, send, steps
