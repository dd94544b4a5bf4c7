"""Transports: how bytes move between ranks, and the engines that run plans."""

from .contract import ANY_SOURCE, USER_TAGS, Execution, Operation, Prepared, Request, Transport
from .inproc import InprocTransport, inproc

__all__ = [
    "ANY_SOURCE",
    "USER_TAGS",
    "Execution",
    "InprocTransport",
    "Operation",
    "Prepared",
    "Request",
    "Transport",
    "inproc",
]
