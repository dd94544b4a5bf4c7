"""What is chosen for a call."""

from __future__ import annotations

from dataclasses import dataclass

from ...algorithms import Algorithm
from ...algorithms.words import did_you_mean, in_words
from ...errors import ArgumentError
from ...transports.shm import PROTOCOLS


@dataclass(frozen=True)
class Choice:
    """How a collective is to be done. What is None is left to the transport and to the plan.

    Attributes:
        algorithm: it, with its parameters bound; or "native", the engine's own collective.
        protocol: how long messages travel on one host (`transports.shm.PROTOCOLS`).
        segment: bytes of the longest message.
        lanes: segments under way at a time, up to as many as the transport has (4 in shared memory).

    Raises:
        ArgumentError: something is not what is wanted.
    """

    algorithm: Algorithm | str
    protocol: str | None = None
    segment: int | None = None
    lanes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.algorithm, (Algorithm, str)):
            raise ArgumentError(f"Choice: algorithm must be an algorithm or its name, and is {self.algorithm!r}")
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            there = did_you_mean(f"{self.protocol}", PROTOCOLS)
            raise ArgumentError(f"Choice: no protocol is called {self.protocol!r}: {there}")
        if self.algorithm == "native" and (self.protocol, self.segment, self.lanes) != (None, None, None):
            raise ArgumentError("Choice: native has no protocol, segment and lanes of ours: leave them out")
        for name, least in (("segment", 64), ("lanes", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ArgumentError(f"Choice: {name} must be a whole number, {least} or more, and is {value!r}")

    @property
    def algorithm_name(self) -> str:
        """The algorithm's name, with those parameters that are not as declared."""
        return self.algorithm if isinstance(self.algorithm, str) else self.algorithm.name

    @property
    def name(self) -> str:
        """It in words: "ring, cached, 64 KiB segments, 2 lanes"."""
        words = [self.algorithm_name]
        if self.protocol:
            words.append(self.protocol)
        if self.segment:
            words.append(f"{in_words(self.segment)} segments")
        if self.lanes:
            words.append(f"{self.lanes} lane{'s' * (self.lanes != 1)}")
        return ", ".join(words)
