"""What is chosen for a call."""

from __future__ import annotations

from dataclasses import dataclass

from ...algorithms import Algorithm
from ...algorithms.words import in_words


@dataclass(frozen=True)
class Choice:
    """How a collective is to be done. What is None is left to the transport and to the plan.

    Attributes:
        algorithm: it, with its parameters bound; or "native", the engine's own collective.
        protocol: how long messages travel on one host (`transports.shm.PROTOCOLS`).
        segment: bytes of the longest message.
        lanes: segments under way at a time.
    """

    algorithm: Algorithm | str
    protocol: str | None = None
    segment: int | None = None
    lanes: int | None = None

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
