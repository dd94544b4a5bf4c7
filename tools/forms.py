"""The closed forms: formulas for what algorithms take, and which are made of which; a document of them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from ..algorithms import Algorithm, lookup, to_collective
from ..algorithms.binary import ceil_log2, floor_log2, widest
from .markdown import table

LOG, LOW, PART = "ceil(log2 p)", "floor(log2 p)", "(p - 1)/p"

Formulas = tuple[str, str, str]
"""Steps, bytes and folded bytes, as formulas in p for two ranks or more; bytes as parts of n."""


class Form(NamedTuple):
    """What an algorithm takes.

    Attributes:
        of: the collective, and the algorithm with its parameters.
        path: steps, bytes and folded bytes along the longest path.
        declared: the algorithm's `Counts` where they are others.
        parts: the forms that it is made of; their paths add up to its own.
    """

    of: str
    path: Formulas
    declared: Formulas | None = None
    parts: tuple[str, str] | None = None

    @property
    def algorithm(self) -> Algorithm:
        """What it is the form of."""
        collective, name = self.of.split()
        return lookup(to_collective(collective), name)


def _simple(of: str, path: Formulas, declared: Formulas | None = None) -> Form:
    return Form(of, path, declared)


def _made(of: str, first: str, second: str, path: Formulas, declared: Formulas | None = None) -> Form:
    return Form(of, path, declared, (first, second))


FORMS = (
    _simple("scatter direct", ("1", PART, "0")),
    _simple("scatter tree", (LOG, PART, "0")),
    _simple("gather direct", ("1", PART, "0"), ("1", "1/p", "0")),
    _simple("gather tree", (LOG, PART, "0"), (LOW, "s/p", "0")),
    _simple("all_gather direct", ("1", PART, "0")),
    _simple("all_gather recursive_doubling", (LOG, PART, "0")),
    _simple("all_gather ring", ("p - 1", PART, "0")),
    _simple("reduce_scatter direct", ("1", PART, PART)),
    _simple("reduce_scatter recursive_doubling", (LOG, PART, PART)),
    _simple("reduce_scatter ring", ("p - 1", PART, PART)),
    _simple("broadcast direct", ("1", "p - 1", "0")),
    _simple("broadcast tree", (LOG, LOG, "0")),
    _simple("broadcast chain", ("p - 1", "p - 1", "0"), ("p - 1", "1", "0")),
    _simple("broadcast ring", ("2 (p - 1)", f"2 {PART}", "0"), ("2 (p - 1)", "1", "0")),
    _simple("reduce direct", ("1", "p - 1", "p - 1"), ("1", "1", "p - 1")),
    _simple("reduce tree", (LOG, LOG, LOG), (LOW, "1", LOG)),
    _simple("reduce chain", ("p - 1", "p - 1", "p - 1"), ("p - 1", "1", "1")),
    _simple("all_reduce direct", ("1", "p - 1", "p - 1")),
    _simple(
        "all_reduce recursive_doubling",
        (f"2 {LOG} - {LOW}", f"2 {LOG} - {LOW}", LOG),
        (f"2 {LOG} - {LOW}", LOG, LOG),
    ),
    _made("broadcast composed(direct,direct)", "scatter direct", "all_gather direct", ("2", f"2 {PART}", "0")),
    _made(
        "broadcast recursive_doubling",
        "scatter tree",
        "all_gather recursive_doubling",
        (f"2 {LOG}", f"2 {PART}", "0"),
    ),
    _made("broadcast scatter_all_gather", "scatter tree", "all_gather ring", (f"p - 1 + {LOG}", f"2 {PART}", "0")),
    _made(
        "reduce composed(direct,direct)",
        "reduce_scatter direct",
        "gather direct",
        ("2", f"2 {PART}", PART),
        ("2", "1", PART),
    ),
    _made(
        "reduce composed(recursive_doubling,tree)",
        "reduce_scatter recursive_doubling",
        "gather tree",
        (f"2 {LOG}", f"2 {PART}", PART),
        (f"{LOG} + {LOW}", "(p - 1 + s)/p", PART),
    ),
    _made(
        "reduce composed(ring,tree)",
        "reduce_scatter ring",
        "gather tree",
        (f"p - 1 + {LOG}", f"2 {PART}", PART),
        (f"p - 1 + {LOW}", "(p - 1 + s)/p", PART),
    ),
    _made("all_reduce two_shot", "reduce_scatter direct", "all_gather direct", ("2", f"2 {PART}", PART)),
    _made(
        "all_reduce rabenseifner",
        "reduce_scatter recursive_doubling",
        "all_gather recursive_doubling",
        (f"2 {LOG}", f"2 {PART}", PART),
    ),
    _made(
        "all_reduce composed(ring,recursive_doubling)",
        "reduce_scatter ring",
        "all_gather recursive_doubling",
        (f"p - 1 + {LOG}", f"2 {PART}", PART),
    ),
    _made("all_reduce ring", "reduce_scatter ring", "all_gather ring", ("2 (p - 1)", f"2 {PART}", PART)),
    _made(
        "all_reduce composed_rooted(direct,direct)",
        "reduce direct",
        "broadcast direct",
        ("2", "2 (p - 1)", "p - 1"),
        ("2", "p - 1", "p - 1"),
    ),
    _made(
        "all_reduce tree",
        "reduce tree",
        "broadcast tree",
        (f"2 {LOG}", f"2 {LOG}", LOG),
        (f"{LOG} + {LOW}", LOG, LOG),
    ),
    _made(
        "all_reduce composed_rooted(tree,chain)",
        "reduce tree",
        "broadcast chain",
        (f"p - 1 + {LOG}", f"p - 1 + {LOG}", LOG),
        (f"p - 1 + {LOW}", "min(2, p - 1)", LOG),
    ),
    _made(
        "all_reduce chain",
        "reduce chain",
        "broadcast chain",
        ("2 (p - 1)", "2 (p - 1)", "p - 1"),
        ("2 (p - 1)", "min(2, p - 1)", "1"),
    ),
    _made(
        "all_gather tree",
        "gather tree",
        "broadcast tree",
        (f"2 {LOG}", f"{PART} + {LOG}", "0"),
        (f"{LOG} + {LOW}", LOG, "0"),
    ),
    _made(
        "reduce_scatter tree",
        "reduce tree",
        "scatter tree",
        (f"2 {LOG}", f"{PART} + {LOG}", LOG),
        (f"{LOG} + {LOW}", "(p - 1 + s)/p", LOG),
    ),
)


def evaluated(formulas: Formulas, size: int) -> tuple[Fraction, ...]:
    """The formulas for so many ranks."""
    return tuple(_value(formula, size) for formula in formulas)


def _value(formula: str, size: int) -> Fraction:
    """A space between two factors multiplies, as on paper."""
    numbers = formula.replace(LOG, str(ceil_log2(size))).replace(LOW, str(floor_log2(size)))
    python = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", numbers)
    names = {"p": Fraction(size), "s": Fraction(widest(size)), "min": min}
    return Fraction(eval(python, {"__builtins__": {}}, names))


def written(path: Formulas) -> str:
    """The time, as the sum of its terms."""
    terms = zip(path, ("alpha", "n beta", "n gamma"))
    return " + ".join(_product(formula, unit) for formula, unit in terms if formula != "0")


def _product(formula: str, unit: str) -> str:
    outside = re.sub(r"\([^()]*\)", "", formula)
    factor = f"({formula})" if " + " in outside or " - " in outside else formula
    return unit if formula == "1" else f"{factor} {unit}"


TEXT = """
# Closed forms

Written by `abccl algorithms --forms --write docs/closed-forms.md`: do not edit it. A test holds every formula against
its schedule, for 2 to 17, 32, 33 and 64 ranks.

p is the number of ranks, 2 or more, and n the bytes of the whole vector (of the concatenation, where parts are
gathered or scattered). A step of a rank takes alpha, beta for each byte that it sends or receives, whichever are
more, and gamma for each byte that it folds; it begins when the rank and those from whom it receives have done all
that stands before it. So the time is that of the longest path through the schedule, of a vector in one piece.

## Simple algorithms

{simple}

## Made of two others

One runs after the other, and their times add up: each line is the sum of the two that it names. `composed` takes any
registered algorithms as its parts.

{made}

## Which one wins

For a short vector the alphas decide, so the fewest steps win: `direct`, then trees and doubling, whose steps are a
logarithm. Those of them that move whole vectors pay for it in beta and gamma as the vector grows.

For a long vector in one piece the bytes decide. Scatter, gather, all_gather and reduce_scatter move (p - 1)/p n, and
an all_reduce made of two of them 2 (p - 1)/p n: none can move less. So from three ranks on a broadcast, a reduce or
an all_reduce of a long vector is better taken apart into two collectives that move parts; for a short one that only
adds steps. `rabenseifner` has the least bytes in a logarithm of steps, and by these formulas the ring never beats it:
a ring is for links that are not alike, because its ranks talk to their neighbours only.

`direct` has several messages in a step, for one alpha. That is so where messages overlap; where each keeps its sender
busy, it has p - 1 alphas. The tuner's model does not read these formulas: it walks the lowered schedule with the
constants of the machine, in which each message counts.

## What the busiest rank does

`counts` of an algorithm, which [algorithms.md](algorithms.md) lists, say something else: steps are the longest chain
of dependent messages, whatever a rank receives besides, and sent and folded are the largest of any rank, wherever on
the way. Where ranks take turns these are less than what lies on the path. The difference is what a pipeline can win:
cut into segments, a vector keeps all ranks of a chain busy at the same time. These are the algorithms where the two
differ; s is the number of ranks in the largest subtree below the root of a binomial tree, p/2 for powers of two.

{declared}

## Other ways to take a collective apart

Centauri partitions communication in three ways. The first, one primitive in the place of another, is what stands
above.

- By groups of ranks: `hierarchical` runs one algorithm within groups and another between them, so that little crosses
  between hosts, see [clusters.md](clusters.md).
- By parts of the vector: the segments of a plan go through the schedule one after the other, on several lanes at the
  same time, so that the messages of one overlap with the folds of another. Gradient buckets do it one level higher,
  where communication overlaps with computation, see [buckets.md](buckets.md).

## Sources

[Chan et al. 2007](references.md): the simple algorithms, their compositions, the lower bounds. [Barnett, van de Geijn
et al. 1994](references.md): scatter and all_gather as a broadcast. [Thakur, Rabenseifner & Gropp
2005](references.md): gamma, short and long vectors, other numbers of ranks than powers of two. [Rabenseifner
2004](references.md): the reduce and the all_reduce named after him. [Centauri](references.md): taking collectives
apart.
"""


def document() -> str:
    """All of them, with what they mean."""
    simple = [[_link(f.of), written(f.path)] for f in FORMS if not f.parts]
    made = [[_link(f.of), " + ".join(map(_link, f.parts)), written(f.path)] for f in FORMS if f.parts]
    declared = [[_link(f.of), *f.declared] for f in FORMS if f.declared]
    tables = {
        "simple": table(["algorithm", "time"], simple),
        "made": table(["algorithm", "is", "time"], made),
        "declared": table(["algorithm", "steps", "sent", "folded"], declared),
    }
    return TEXT.strip().format(**tables) + "\n"


def _link(of: str) -> str:
    collective, name = of.split()
    return f"[{of}](algorithms.md#{collective}-{name.partition('(')[0]})"
