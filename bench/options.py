"""What was asked for, and whether it can be had."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..algorithms import Collective, algorithms, lookup
from ..errors import ArgumentError
from ..transports.types import check_operator, element_type
from .collectives import FACTS
from .measure import Budget

LOOPS = ("latency", "isolated", "throughput")
"""See `measure`."""

PERSISTENT = (
    Collective.ALL_REDUCE,
    Collective.REDUCE_SCATTER,
    Collective.ALL_GATHER,
    Collective.BROADCAST,
    Collective.ALL_TO_ALL,
)
"""What can be prepared once and started often."""

RIVALS = {"gloo": "torch", "mpi": "direct"}
"""The libraries to compare with, and how abccl is called then: as they are."""


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        collective: what is measured.
        ranks: how many to start; None to take those that were started.
        sizes: smallest, largest, factor between.
        dtype: the element type.
        op: the operator; None for sum, or for none where nothing is reduced.
        algorithms: names, "auto" for the library's choice, "all" for each that runs on so many ranks.
        rivals: the libraries to compare with.
        through: the way to abccl, "direct" or "torch"; None for the one that each rival is called by.
        array: "numpy" or "torch", what abccl's own calls get; None for numpy.
        in_place: None for the natural form.
        root: None for any.
        loop: one of LOOPS; None for latency, or isolated where a root is given.
        check: whether results are checked.
        roofline: whether the memory's bandwidth is measured along with it; see `roofline`.
        persistent: whether calls are prepared once and started often.
        registered: whether the buffers are of the communicator's registered memory.
        budget: how long.
        command: what the user typed.
    """

    collective: Collective
    ranks: int | None = None
    sizes: tuple[int, int, int] = (4, 64 << 20, 4)
    dtype: str = "float32"
    op: str | None = None
    algorithms: tuple[str, ...] = ("auto",)
    rivals: tuple[str, ...] = ()
    through: str | None = None
    array: str | None = None
    in_place: bool | None = None
    root: int | None = None
    loop: str | None = None
    check: bool = True
    roofline: bool = False
    persistent: bool = False
    registered: bool = False
    budget: Budget = field(default_factory=lambda: Budget(0.25))
    command: str = ""

    def settled(self, ranks: int) -> Options:
        """The same with every default filled in for so many ranks.

        Raises:
            ArgumentError: they contradict each other, or abccl has no such thing.
        """
        call, facts = self.collective.value, FACTS[self.collective]
        if self.ranks not in (None, ranks):
            raise ArgumentError(f"{ranks} ranks were started, and --ranks says {self.ranks}: leave it out")
        if self.op is not None and not self.collective.reduces:
            raise ArgumentError(f"{call} has no operator: leave out --op {self.op}")
        op = (self.op or "sum") if self.collective.reduces else ""
        element_type(self.dtype)
        if op:
            check_operator(op, self.dtype)
        if self.in_place not in (None, facts.in_place) and not facts.both_ways:
            form = "in place" if facts.in_place else "out of place"
            raise ArgumentError(f"{call} is measured {form} only: leave out the option")
        if self.sizes[0] > self.sizes[1]:
            raise ArgumentError(f"--min is {self.sizes[0]} bytes and --max is {self.sizes[1]}: it must not be less")
        if self.root is not None and not (self.collective.rooted and 0 <= self.root < ranks):
            wanted = f"a rank from 0 to {ranks - 1}" if self.collective.rooted else f"left out: {call} has no root"
            raise ArgumentError(f"--root {self.root}: it must be {wanted}")
        if self.loop == "latency" and self.root is not None:
            raise ArgumentError(
                "--loop latency changes the root all the time: leave out --root, or take --loop isolated"
            )
        loop = self.loop or ("latency" if self.root is None else "isolated")
        named = tuple(dict.fromkeys(self._named(ranks)))
        if len(named) > 1 and "torch" in self.doors():
            raise ArgumentError(
                "torch.distributed's calls do not name an algorithm: give one, or measure abccl's own calls by "
                "--through direct"
            )
        if self.persistent:
            self._check_persistent()
        if self.roofline and self.collective is Collective.BARRIER:
            raise ArgumentError("a barrier moves no data: leave out --roofline")
        root = 0 if self.root is None and loop != "latency" and self.collective.rooted else self.root
        in_place = facts.in_place if self.in_place is None else self.in_place
        return replace(self, ranks=ranks, op=op, algorithms=named, in_place=in_place, root=root, loop=loop)

    def _check_persistent(self) -> None:
        if self.collective not in PERSISTENT:
            known = ", ".join(collective.value for collective in PERSISTENT)
            raise ArgumentError(
                f"{self.collective.value} has no persistent form: leave out --persistent, or take {known}"
            )
        if "torch" in self.doors() or any(RIVALS[name] == "torch" for name in self.rivals):
            raise ArgumentError(
                "torch.distributed, and gloo with it, has no persistent collectives: leave out --persistent, or "
                "compare with mpi"
            )

    def _named(self, ranks: int) -> list[str]:
        """The algorithms by name, without those that do not run on so many ranks if all were asked for."""
        found = []
        for name in self.algorithms:
            if name == "all":
                found += [a.name for a in algorithms(self.collective).values() if not a.refusal(ranks)]
            else:
                wants = None if name == "auto" else lookup(self.collective, name).refusal(ranks)
                if wants:
                    raise ArgumentError(f"{self.collective.value} {name} wants {wants}, and there are {ranks}")
                found.append(name)
        return found

    def doors(self) -> list[str]:
        """The ways by which abccl is called."""
        return list(dict.fromkeys(self.door(name) for name in self.rivals)) or [self.through or "direct"]

    def door(self, rival: str) -> str:
        """The way by which abccl is called where it is compared with that library."""
        return self.through or RIVALS[rival]

    @property
    def library(self) -> str:
        """Who allocates the buffers."""
        if self.registered:
            return "comm.empty"
        uses_torch = "torch" in self.doors() or any(RIVALS[name] == "torch" for name in self.rivals)
        return self.array or ("torch" if uses_torch else "numpy")

    @property
    def roots(self) -> list[int]:
        """The roots that the loop goes through."""
        assert self.ranks is not None
        changes = self.collective.rooted and self.loop == "latency"
        return list(range(self.ranks)) if changes else [self.root or 0]
