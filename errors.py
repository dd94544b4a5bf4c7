"""What can go wrong, as one tree. Every message says what was wanted, what came, and what to do next.

AbcclError
├── ArgumentError          a call was refused before anything was sent (also a ValueError)
│   ├── ScheduleError      an algorithm's schedule is wrong: replay names step, rank and block
│   └── UnknownAlgorithm   no algorithm of that name: the message lists near names
├── TransportError         a transport can not be set up here, or lost its footing
├── ClosedError            the communicator is closed, or belongs to the parent of this process
└── CollectiveError        a running operation failed: the communicator is broken from here on
    ├── DeadlineExceeded   (also a TimeoutError)
    ├── PeerLost           a peer's process ended
    ├── Mismatch           ranks called different things
    ├── Aborted            somebody called abort()
    └── RankFailed         a process started by `spawn` raised or died: its traceback is in the message
"""

from __future__ import annotations

__all__ = [
    "AbcclError",
    "Aborted",
    "ArgumentError",
    "ClosedError",
    "CollectiveError",
    "DeadlineExceeded",
    "Mismatch",
    "PeerLost",
    "RankFailed",
    "ScheduleError",
    "TransportError",
    "UnknownAlgorithm",
]


class AbcclError(Exception):
    """The root: catching it catches all that abccl raises on purpose."""


class ArgumentError(AbcclError, ValueError):
    """A call was refused before anything was sent."""


class ScheduleError(ArgumentError):
    """An algorithm's schedule is wrong; the message names step, rank and block."""


class UnknownAlgorithm(ArgumentError):
    """No algorithm of that name is registered for the collective."""


class TransportError(AbcclError):
    """A transport can not be set up on this machine or between these ranks."""


class ClosedError(AbcclError):
    """The communicator is closed, or belongs to the parent of this process."""


class CollectiveError(AbcclError):
    """A running operation failed. The communicator is broken: close it and make another."""


class DeadlineExceeded(CollectiveError, TimeoutError):
    """An operation did not finish in time."""


class PeerLost(CollectiveError):
    """The process of a peer ended while it was needed."""


class Mismatch(CollectiveError):
    """Ranks called different collectives, or the same with different arguments."""


class Aborted(CollectiveError):
    """The communicator was aborted, here or by a peer."""


class RankFailed(CollectiveError):
    """A process that `spawn` started raised or died."""
