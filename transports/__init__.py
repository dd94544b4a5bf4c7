"""Transports: how bytes move between ranks, and the engines that run plans."""

from .contract import ANY_SOURCE, Execution, Operation, Prepared, Request, Transport
from .inproc import InprocTransport, inproc
