"""What was asked for, and whether it can be had."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from ..algorithms import Collective, algorithms, lookup
from ..collectives.tuner.asked import NATIVE
from ..errors import ArgumentError
from ..transports.types import check_operator, element_type
from .collectives import FACTS, cases
from .measure import Budget
from .messages import AnyCase, exchanges

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
"""The libraries to compare with, and how abccl is called then, unless told otherwise: as they are."""


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        collective: what is measured; None for messages between two ranks.
        ranks: how many to start; None to take those that were started.
        sizes: smallest, largest, factor between.
        dtype: the element type.
        op: the operator; None for sum, or for none where nothing is reduced.
        algorithms: names, "auto" for the library's choice, "all" for each that runs on so many ranks.
        rivals: the libraries to compare with.
        through: the way to abccl, "direct" or "torch"; None for the one that each rival is called by.
        array: "numpy", "torch" or "cupy", what abccl's own calls get, and MPI's if it is cupy; None for numpy.
        transport: abccl's; None to leave it to abccl.
        pair: the two ranks, for messages; None for 0 and 1.
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

    collective: Collective | None
    ranks: int | None = None
    sizes: tuple[int, int, int] = (4, 64 << 20, 4)
    dtype: str = "float32"
    op: str | None = None
    algorithms: tuple[str, ...] = ("auto",)
    rivals: tuple[str, ...] = ()
    through: str | None = None
    array: str | None = None
    transport: str | None = None
    pair: tuple[int, int] | None = None
    in_place: bool | None = None
    root: int | None = None
    loop: str | None = None
    check: bool = True
    roofline: bool = False
    persistent: bool = False
    registered: bool = False
    budget: Budget = field(default_factory=lambda: Budget(0.25))
    command: str = ""

    def settled(self, ranks: int, natives: Collection[Collective] | None = None) -> Options:
        """The same with every default filled in for so many ranks.

        Args:
            natives: what the transport's engine has of its own, and "all" algorithms include; None if not known yet.

        Raises:
            ArgumentError: they contradict each other, or abccl has no such thing.
        """
        if self.ranks not in (None, ranks):
            raise ArgumentError(f"{ranks} ranks were started, and --ranks says {self.ranks}: leave it out")
        element_type(self.dtype)
        if self.sizes[0] > self.sizes[1]:
            raise ArgumentError(f"--min is {self.sizes[0]} bytes and --max is {self.sizes[1]}: it must not be less")
        if self.array == "cupy" and (self.registered or "torch" in self.doors()):
            raise ArgumentError(
                "cupy arrays are passed to abccl's own calls and to MPI: leave out --registered, and take --through "
                "direct or --array torch"
            )
        return self._settled_messages(ranks) if self.collective is None else self._settled_collective(ranks, natives)

    def _settled_collective(self, ranks: int, natives: Collection[Collective] | None) -> Options:
        assert self.collective is not None
        call, facts = self.call, FACTS[self.collective]
        if self.pair is not None:
            raise ArgumentError(f"{call} is among all ranks: leave out --pair, or measure p2p")
        if self.op is not None and not self.collective.reduces:
            raise ArgumentError(f"{call} has no operator: leave out --op {self.op}")
        op = (self.op or "sum") if self.collective.reduces else ""
        if op:
            check_operator(op, self.dtype)
        if self.in_place not in (None, facts.in_place) and not facts.both_ways:
            form = "in place" if facts.in_place else "out of place"
            raise ArgumentError(f"{call} is measured {form} only: leave out the option")
        if self.root is not None and not (self.collective.rooted and 0 <= self.root < ranks):
            wanted = f"a rank from 0 to {ranks - 1}" if self.collective.rooted else f"left out: {call} has no root"
            raise ArgumentError(f"--root {self.root}: it must be {wanted}")
        if self.loop == "latency" and self.root is not None:
            raise ArgumentError(
                "--loop latency changes the root all the time: leave out --root, or take --loop isolated"
            )
        loop = self.loop or ("latency" if self.root is None else "isolated")
        named = tuple(dict.fromkeys(self._named(self.collective, ranks, natives)))
        if len(named) > 1 and "torch" in self.doors():
            raise ArgumentError(
                "torch.distributed's calls do not name an algorithm: give one, or measure abccl's own calls by "
                "--through direct"
            )
        if self.persistent:
            self._check_persistent(self.collective)
        if self.roofline and self.collective is Collective.BARRIER:
            raise ArgumentError("a barrier moves no data: leave out --roofline")
        root = 0 if self.root is None and loop != "latency" and self.collective.rooted else self.root
        in_place = facts.in_place if self.in_place is None else self.in_place
        return replace(self, ranks=ranks, op=op, algorithms=named, in_place=in_place, root=root, loop=loop)

    def _settled_messages(self, ranks: int) -> Options:
        given = {
            "--op": self.op,
            "--root": self.root,
            "--loop": self.loop,
            "--in-place": self.in_place,
            "--algorithm": None if self.algorithms == ("auto",) else self.algorithms,
            "--roofline": self.roofline or None,
            "--persistent": self.persistent or None,
        }
        for option, value in given.items():
            if value is not None:
                raise ArgumentError(f"{option} is for collectives: leave it out, messages have none")
        pair = self.pair or (0, 1)
        if pair[0] == pair[1] or not all(0 <= rank < ranks for rank in pair):
            raise ArgumentError(
                f"--pair {pair[0]},{pair[1]}: wanted are two different ones of {ranks} rank{'s' * (ranks > 1)}, 0 to "
                f"{ranks - 1}"
            )
        return replace(self, ranks=ranks, op="", in_place=False, pair=pair)

    def _check_persistent(self, collective: Collective) -> None:
        if collective not in PERSISTENT:
            known = ", ".join(each.value for each in PERSISTENT)
            raise ArgumentError(f"{collective.value} has no persistent form: leave out --persistent, or take {known}")
        if "torch" in self.doors() or any(RIVALS[name] == "torch" for name in self.rivals):
            raise ArgumentError(
                "torch.distributed, and gloo with it, has no persistent collectives: leave out --persistent, or "
                "compare with mpi"
            )

    def _named(self, collective: Collective, ranks: int, natives: Collection[Collective] | None) -> list[str]:
        """The algorithms by name, without those that do not run on so many ranks if all were asked for."""
        found = []
        for name in self.algorithms:
            if name == "all":
                found += [a.name for a in algorithms(collective).values() if not a.refusal(ranks)]
                found += [NATIVE] * (collective in (natives or ()))
            elif name == NATIVE and natives is not None and collective not in natives:
                raise ArgumentError(
                    f"abccl's transport has no {collective.value} of its own: leave out --algorithm {NATIVE}, or take "
                    f"--transport mpi or gloo"
                )
            else:
                wants = None if name in ("auto", NATIVE) else lookup(collective, name).refusal(ranks)
                if wants:
                    raise ArgumentError(f"{collective.value} {name} wants {wants}, and there are {ranks}")
                found.append(name)
        return found

    @property
    def call(self) -> str:
        """What is measured, by its name."""
        return "p2p" if self.collective is None else self.collective.value

    def cases(self) -> Iterator[AnyCase]:
        """The lines of the table. Only for settled options."""
        assert self.ranks is not None and self.op is not None and self.in_place is not None
        if self.collective is not None:
            return cases(self.collective, self.ranks, self.sizes, self.dtype, self.op, self.in_place)
        assert self.pair is not None
        return exchanges(self.ranks, self.pair, self.sizes, self.dtype)

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
        changes = self.collective is not None and self.collective.rooted and self.loop == "latency"
        return list(range(self.ranks)) if changes else [self.root or 0]
