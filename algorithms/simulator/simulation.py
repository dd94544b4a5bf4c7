"""What a simulation finds: times, what is busy, and a timeline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..registry import Algorithm

EVENTS, SYMMETRY, CLOSED_FORM = METHODS = ("events", "symmetry", "closed form")
"""All ranks, in the order of events; some that stand for all, alike; a formula."""

KINDS = ("send", "wait", "receive", "fold", "copy", "message")
"""Of slices of a timeline. A message's is from when it takes a link until it is there."""


@dataclass(frozen=True)
class Timeline:
    """What ranks did when: arrays of one length, an entry for each slice of time, in seconds.

    Attributes:
        kind: an index into `KINDS`.
        peer: the rank at the other end; -1 where there is none.
        nbytes: that were sent, received, folded or copied; 0 for what does not depend on them.
    """

    rank: npt.NDArray[np.int32]
    lane: npt.NDArray[np.int32]
    segment: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int32]
    peer: npt.NDArray[np.int32]
    start: npt.NDArray[np.float64]
    end: npt.NDArray[np.float64]
    nbytes: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Simulation:
    """What a simulation found.

    Attributes:
        nbytes: of the whole vector, as everywhere.
        protocol: which of the topology's was used, None if it has none.
        segment: bytes of the longest message, None for messages that are not cut.
        segments, lanes: into how many segments the blocks are cut, and how many are under way at once.
        method: how it was found, of `METHODS`.
        simulated: how many ranks were walked over.
        seconds: from when all ranks begin until the last one ends.
        events: operations of ranks and arrivals of messages that were walked over.
        messages: that were walked over.
        took: seconds in the event engine.
        utilisation: for each level with links, for which part of the time its busiest link was; and by the rank's name
            the busiest rank, waits left out.
        untried: lengths of segments that "auto" left out, as there would be too many events.
        timeline: if it was asked for; only the ranks that were walked over.
    """

    algorithm: Algorithm
    ranks: int
    nbytes: int
    protocol: str | None
    segment: int | None
    segments: int
    lanes: int
    method: str
    simulated: int
    seconds: float
    events: int = 0
    messages: int = 0
    took: float = 0.0
    utilisation: dict[str, float] | None = None
    untried: tuple[int, ...] = ()
    timeline: Timeline | None = None

    @property
    def algbw(self) -> float:
        """Algorithm bandwidth, bytes per second."""
        return self.nbytes / self.seconds if self.seconds else 0.0

    @property
    def busbw(self) -> float:
        """Bus bandwidth, bytes per second: see `Collective.bus_factor`."""
        return self.algbw * self.algorithm.collective.bus_factor(self.ranks)
