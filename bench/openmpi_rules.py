"""Open MPI's algorithms, and the file of dynamic rules from which its component coll/tuned takes them.

The file is a list of numbers; what stands between `#` and the end of a line is a comment. Open MPI 4.1 to 5.0 know no
other format, and 6.0 still reads it:

    collectives
    for each: its id, communicator sizes
        for each: the size, rules
            for each: message size, algorithm, fanout, segment size

The last communicator size that is not above that of the communicator holds, and so does the last message size. The
first rule must be for 0 bytes. Algorithm 0 leaves the decision to Open MPI. The message size is that of the largest
buffer of a rank: the whole result of all_gather, all parts of reduce_scatter and all_to_all together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..algorithms import Collective
from ..algorithms.words import in_words

FANOUT = 4
"""Of chains, and what the rules say of it: Open MPI's default."""


@dataclass(frozen=True)
class Call:
    """A collective as Open MPI knows it.

    Attributes:
        name: in the names of its variables.
        number: its id in the file.
        segmented: the algorithms that cut a message into segments, where they are told to.
    """

    name: str
    number: int
    segmented: frozenset[str] = frozenset()


CALLS = {
    Collective.ALL_REDUCE: Call("allreduce", 2, frozenset({"segmented_ring"})),
    Collective.REDUCE_SCATTER: Call("reduce_scatter_block", 13),
    Collective.ALL_GATHER: Call("allgather", 0),
    Collective.BROADCAST: Call(
        "bcast",
        7,
        frozenset({"chain", "pipeline", "split_binary_tree", "binary_tree", "binomial", "knomial"}),
    ),
    Collective.ALL_TO_ALL: Call("alltoall", 3),
}
"""What can be tuned. The ids are those of `enum COLLTYPE` in Open MPI's sources, the same from 4.1 to 6.0."""


@dataclass(frozen=True)
class Choice:
    """One of Open MPI's algorithms; number 0 leaves the decision to it. `segment` is in bytes, 0 for whole messages."""

    number: int
    name: str
    segment: int = 0

    @property
    def text(self) -> str:
        """It in words."""
        return f"{self.name}, segments of {in_words(self.segment)}" if self.segment else self.name


DEFAULT = Choice(0, "default")

STEADY = 0.75
"""The part of the rounds in which an algorithm must gain what is said of it."""


@dataclass(frozen=True)
class Figure:
    """What was measured at one size.

    Attributes:
        default: seconds of Open MPI's own decision, the median of the rounds.
        seconds: those of its best algorithm.
        gain: the default's time by that of the best: it was as much or more in STEADY of the rounds.
        least_gain: what the gain must be for a rule.
    """

    size: int
    default: float
    best: Choice
    seconds: float
    gain: float
    least_gain: float

    @property
    def chosen(self) -> Choice:
        """What the rule says."""
        return self.best if self.gain >= self.least_gain else DEFAULT


def version(information: str) -> str:
    """Of Open MPI, in what `ompi_info --param coll tuned --level 9 --parsable` prints; "" if it has no coll/tuned."""
    found = re.search(r'^mca:coll:tuned:version:"component:(.+)"$', information, re.MULTILINE)
    return found[1] if found else ""


def choices(information: str, collective: Collective, size: int, segments: Sequence[int]) -> list[Choice]:
    """The algorithms that the same output names for a collective, each with all segment sizes that make sense.

    Args:
        size: of the message.
        segments: sizes beside 0, the whole message.
    """
    call = CALLS[collective]
    pattern = rf"^mca:coll:tuned:param:coll_tuned_{call.name}_algorithm:enumerator:value:(\d+):(\S+)$"
    named = [(int(number), name) for number, name in re.findall(pattern, information, re.MULTILINE)]
    smaller = [segment for segment in segments if segment < size]
    return [
        Choice(number, name, segment)
        for number, name in named
        if number != DEFAULT.number
        for segment in (0, *(smaller if name in call.segmented else ()))
    ]


def crossovers(figures: Sequence[Figure], factor: int) -> list[tuple[int, Choice, str]]:
    """The rules for sizes that rise by this factor: where each begins, what it says, a note.

    A choice holds up to half way, geometrically, to the next size, the first from 0 on; beyond the last Open MPI
    decides. Neighbours that say the same are one rule.
    """
    rules: list[tuple[int, Choice, str]] = []
    start = 0
    for figure, following in zip(figures, [*figures[1:], None]):
        if not rules or rules[-1][1] != figure.chosen:
            note = f"at {in_words(figure.size)} {figure.gain:.2f} times as fast as the default or more"
            rules.append((start, figure.chosen, note if figure.chosen != DEFAULT else ""))
        start = math.isqrt(figure.size * (following.size if following else figure.size * factor) - 1) + 1
    if rules and rules[-1][1] != DEFAULT:
        rules.append((start, DEFAULT, ""))
    return rules


def render(figures: Mapping[Collective, Sequence[Figure]], ranks: int, factor: int, header: Sequence[str]) -> str:
    """The file: rules for communicators of so many ranks, and Open MPI's own decision for all others.

    Args:
        factor: between sizes.
        header: lines that stand before it as comments.
    """
    tables = {collective: crossovers(measured, factor) for collective, measured in figures.items()}
    ruled = {collective: rules for collective, rules in tables.items() if any(rule[1] != DEFAULT for rule in rules)}
    lines = [*(f"# {line}" for line in header), f"{len(ruled)} # collectives"]
    others = f"1 # rule\n0 {DEFAULT.number} 0 0 # {DEFAULT.name}"
    for collective, rules in ruled.items():
        lines += [f"{CALLS[collective].number} # {collective.value}", "3 # communicator sizes", "0", others]
        lines += [f"{ranks} # ranks", f"{len(rules)} # rules: bytes, algorithm, fanout, segment"]
        for start, choice, note in rules:
            fanout = FANOUT if choice != DEFAULT else 0
            lines.append(
                f"{start} {choice.number} {fanout} {choice.segment} # {choice.text}{f', {note}' if note else ''}"
            )
        lines += [f"{ranks + 1} # and more", others]
    return "\n".join(lines) + "\n"
