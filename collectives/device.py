"""The device side of a communicator: collectives and messages on arrays in the memory of a CUDA device.

It is made by the first call with such an array, and then the ranks meet: so that call is collective, and can not be in
a graph. A call enqueues on the stream that the array's library works on now (torch's or CuPy's current one) and
returns; with `async_op` on a stream of its own, behind the current one. Nothing waits on the host, unless what carries
messages must (`staged`).

Messages (`send`, `recv`) are another matter: see `device_messages.py`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, NamedTuple

from ..algorithms import Collective
from ..errors import AbcclError, ArgumentError, ClosedError
from ..transports import Transport
from ..transports.cuda_ipc import CudaIpcTransport
from ..transports.device import DeviceExecution, DevicePlan, DeviceTransport
from .arrays import CPU, Array, View, current_stream, view
from .binding import Binder
from .bootstrap import Bootstrap
from .debug import Log
from .device_messages import ordinal_of
from .device_reach import reach_devices
from .driver import Driver
from .tuner.explanation import Explanation
from .tuner.tuner import AlgorithmLike, Tuner
from .tuning import explained
from .work import Work

MOST_BOUND = 1024
"""Plans that are kept; each also keeps commands."""


class DeviceCall(NamedTuple):
    """A call with its plan, on these addresses."""

    plan: DevicePlan
    input: int
    output: int


class DeviceSide:
    """One communicator's. Print it.

    Args:
        transport: to the same ranks' devices.
        ordinal: the device of this rank.
        binder: makes plans for it.
        refused: which transports could not be had, and why.
    """

    Call = DeviceCall

    def __init__(self, transport: DeviceTransport, ordinal: int, binder: Binder, refused: tuple[str, ...]) -> None:
        self._transport, self.ordinal, self._binder, self._refused = transport, ordinal, binder, refused
        self._name = f"cuda:{ordinal}"
        with transport.driver.as_current():
            self._side = transport.driver.create_stream()
        self._bound: dict[Any, Any] = {}
        self._pending: list[DeviceWork] = []  # what they work on is kept until the device has done
        self._lock = threading.RLock()
        # A wire that the host drives needs somebody to drive it.
        self._driver = Driver(transport) if transport.wire.host_driven else None

    def bind(
        self, collective: Collective, x: Array, out: Array, op: Any, root: int, algorithm: AlgorithmLike
    ) -> DeviceCall:
        """The plan of a call; made once for arguments of a kind."""
        name = collective.value
        source = self._view(x, "x", name)
        target = source if out is x else self._view(out, "out", name)
        address, to = (found.address if found else 0 for found in (source, target))
        key = (collective, _kind(source), _kind(target), _overlap(source, target), op, root, algorithm)
        plan = self._bound.get(key)
        if plan is None:
            plan = self._binder.bind(collective, x, out, op, root, algorithm)
            if len(self._bound) >= MOST_BOUND:
                self._bound.clear()
            self._bound[key] = plan
        return DeviceCall(plan, address, to)

    @property
    def tuner(self) -> Tuner:
        """Who chooses algorithms for arrays on devices."""
        return self._binder.tuner

    def explain(
        self, collective: Collective | str, nbytes: int | str, *, algorithm: AlgorithmLike = None
    ) -> Explanation:
        """See `Communicator.explain`: of arrays on devices."""
        return explained(self.tuner, collective, nbytes, algorithm)

    def tell(self, log: Log | None) -> None:
        """Say what carries messages between devices, and from now on what is chosen."""
        self._binder.log = log
        if log is not None:
            log.common("device", f"{self}")

    def forget(self) -> None:
        """Plans are made anew: an algorithm has changed."""
        self._bound.clear()

    def set_timeout(self, seconds: float) -> None:
        """How long operations that start from now on may take."""
        self._transport.timeout = seconds

    def run(self, call: DeviceCall, x: Array, out: Array, asynchronous: bool) -> Work | None:
        """Enqueue a call."""
        stream = current_stream(out if out is not None else x)
        with self._lock, self._transport.driver.as_current():
            self._pending = [pending for pending in self._pending if not pending.is_completed()]
            if self._driver is not None:
                return self._drive(self._driver, call, stream, (x, out), asynchronous)
            if not asynchronous:
                self._start(call, stream)
                return None
            self._follow(self._side, stream)
            work = DeviceWork(self._start(call, self._side), self._side, (x, out))
            self._pending.append(work)
            return work

    def close(self) -> None:
        """Give everything back."""
        if self._driver is not None:
            self._driver.close(ClosedError("the communicator was closed while this operation was pending"))
        self._transport.close()
        with contextlib.suppress(AbcclError), self._transport.driver.as_current():
            self._transport.driver.destroy_stream(self._side)
        self._pending.clear()

    def abort(self, error: AbcclError) -> None:
        """Let all that waits go."""
        self._transport.abort(error)

    def __str__(self) -> str:
        sync = f" ({self._transport.sync})" if isinstance(self._transport, CudaIpcTransport) else ""
        refused = "".join(f"; not {reason}" for reason in self._refused)
        return f"{self._transport.driver.name} (cuda:{self.ordinal}) over {self._transport.name}{sync}{refused}"

    def _start(self, call: DeviceCall, stream: int) -> DeviceExecution:
        self._transport.stream = stream
        return call.plan.start(call.input, call.output)

    def _follow(self, stream: int, leader: int) -> None:
        """Let a stream go on when another has come to where it is now."""
        driver = self._transport.driver
        event = self._transport.event()
        driver.record(event.handle, leader)
        driver.wait_event(stream, event.handle)

    def _drive(self, driver: Driver, call: DeviceCall, stream: int, arrays: Any, asynchronous: bool) -> Work | None:
        if self._transport.driver.capture_id(stream) is not None:
            raise ArgumentError(
                f"{call.plan.text}: {self._transport.name} is driven by the host, and can not be in a graph"
            )
        self._follow(self._side, stream)

        def start() -> DeviceExecution:
            return self._start(call, self._side)

        if asynchronous:
            return driver.submit(start, self._transport.timeout, arrays)
        driver.run(start, self._transport.timeout, arrays)
        return None

    def _view(self, array: Array, name: str, call: str) -> View | None:
        if array is None:
            return None
        found = view(array, name, call)
        if found.device != self._name and (found.device == CPU or ordinal_of(found) != self.ordinal):
            raise ArgumentError(
                f"{call}: {name} is on {found.device}, and this rank's device is cuda:{self.ordinal}, that of the "
                f"first array: pass arrays on that, or all on the CPU"
            )
        return found


class DeviceWork(Work):
    """A collective that is enqueued.

    Attributes:
        stream: where.
    """

    def __init__(self, execution: DeviceExecution, stream: int, arrays: tuple[Array, Array]) -> None:
        self._execution, self.stream, self._arrays = execution, stream, arrays

    def wait(self, timeout: float | None = None) -> None:
        """Let the current stream wait for the operation; the host goes on.

        Args:
            timeout: of no meaning here: see `finishes_within`.

        Raises:
            CollectiveError: the communicator has failed.
        """
        execution = self._execution
        execution.transport.check()
        if execution.end is not None:
            stream = current_stream(next(array for array in self._arrays if array is not None))
            with execution.transport.driver.as_current():
                execution.transport.driver.wait_event(stream, execution.end.handle)

    def synchronize(self) -> None:
        """Wait on the host. Raises what the operation failed with."""
        self._execution.wait(time.monotonic() + self._execution.transport.timeout)

    def finishes_within(self, timeout: float | None) -> bool:
        """See `Work.finishes_within`: the host waits."""
        if timeout is None:
            self.synchronize()
            return True
        until = time.monotonic() + timeout
        while not self._execution.progress():
            if time.monotonic() > until:
                return False
            self._execution.transport.idle(until)
        return True

    def is_completed(self) -> bool:
        """See `Work.is_completed`."""
        return self._execution.transport.watch.error is not None or self._execution.finished()


def connect_devices(
    meeting: Bootstrap, beside: Transport, array: Array, call: str, tuner: Tuner, timeout: float
) -> DeviceSide:
    """Meet the other ranks' devices. Collective.

    Args:
        beside: what connects them already; it fails with what this fails with.
        array: the first on this rank's device.
        call: what it was passed to.

    Raises:
        TransportError, ArgumentError: see `reach_devices`.
    """
    ordinal = ordinal_of(view(array, "x", call))
    reached = reach_devices(meeting, beside.name, ordinal, tuner, timeout)
    reached.transport.on_failure = beside.abort
    return DeviceSide(reached.transport, ordinal, Binder(reached.transport, reached.tuner), reached.refused)


def _kind(found: View | None) -> Any:
    return found and (found.dtype, found.count, found.writable)


def _overlap(source: View | None, target: View | None) -> int | None:
    if source is None or target is None or source.end <= target.address or target.end <= source.address:
        return None
    return target.address - source.address
