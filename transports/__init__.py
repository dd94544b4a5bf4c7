"""Transports: how bytes move between ranks, and the engines that run plans."""

from .contract import USER_TAGS, Execution, NativeCall, Operation, Prepared, Request, Transport
from .inproc import InprocTransport, inproc

__all__ = [
    "USER_TAGS",
    "Execution",
    "InprocTransport",
    "NativeCall",
    "Operation",
    "Prepared",
    "Request",
    "Transport",
    "inproc",
]
