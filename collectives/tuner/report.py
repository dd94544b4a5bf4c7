"""Drift: where what was predicted and what is measured part."""

from __future__ import annotations

from dataclasses import dataclass

from ...algorithms import Collective
from ...algorithms.words import in_words

LIMIT = 2.0
"""The ratio from which on a prediction is reported as wrong."""


@dataclass(frozen=True)
class Drift:
    """One kind of call.

    Attributes:
        nbytes: the size class: vectors up to so many bytes, and down to the next class, a quarter of an octave below.
        choice: what ran it, in words.
        predicted: seconds, as the tuner had them when it chose; measured ones if it had such.
        measured: the running median of its runs, in seconds, with the time that it waited for late peers.
    """

    collective: Collective
    nbytes: int
    choice: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / max(self.predicted, 1e-12)

    @property
    def parts(self) -> bool:
        """Whether they part by more than LIMIT."""
        return not 1 / LIMIT <= self.ratio <= LIMIT


@dataclass(frozen=True)
class Report:
    """The calls that a communicator has made and timed. Print it.

    Attributes:
        calls: by collective and size.
        origin: of the table that they were predicted by.
    """

    calls: tuple[Drift, ...]
    origin: str

    @property
    def drifted(self) -> tuple[Drift, ...]:
        """Those whose prediction is wrong by more than LIMIT."""
        return tuple(call for call in self.calls if call.parts)

    def __str__(self) -> str:
        if not self.calls:
            return f"constants: {self.origin}\nno call has been timed yet: of each kind of call one in sixteen is"
        lines = [
            f"constants: {self.origin}",
            f"{'collective':<15}{'up to':>9}  {'predicted':>12}{'measured':>12}{'ratio':>7}  choice",
        ]
        for call in self.calls:
            lines.append(
                f"{call.collective.value:<15}{in_words(call.nbytes):>9}  {call.predicted * 1e6:>9.2f} us"
                f"{call.measured * 1e6:>9.2f} us{call.ratio:>7.2f}  {call.choice}" + "  <- off" * call.parts
            )
        parted = len(self.drifted)
        lines.append(
            f"{parted} of {len(self.calls)} are off by more than {LIMIT:g} times"
            + (": measure anew with `abccl tune`, or ask whether ranks come late" if parted else "")
        )
        return "\n".join(lines)
