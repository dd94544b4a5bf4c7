"""What comes behind what on a device, without one: stand-ins for streams, events, futures, and a communicator.

A stream is the set of all that must have happened before what is enqueued on it next. An event is a copy of that set;
who waits for it adds it to its own. So `order.before[name]` holds all that an operation is ordered behind, whatever the
timing. Tensors are the CPU's, and their copies are counted as operations of the stream that is current.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import abccl

DEVICE = torch.device("cuda", 0)


class Order:
    """Streams by name, and all that was enqueued. The current stream is each thread's own, "default" at first."""

    def __init__(self) -> None:
        self.past: dict[str, set[str]] = {}
        self.before: dict[str, frozenset[str]] = {}
        self.stream_of: dict[str, str] = {}
        self.kept: list[tuple[str, torch.Tensor]] = []
        self.names: list[str] = []
        self.on_host: list[torch.Tensor] = []
        self.device_is_done = True
        self._numbers = iter(range(1, 1000))
        self._local = threading.local()

    @property
    def current(self) -> str:
        return getattr(self._local, "stream", "default")

    def current_stream(self, device: torch.device) -> torch.Stream:
        """Of torch's own type, with a number by which `names` has it."""
        if self.current not in self.names:
            self.names.append(self.current)
        return torch.Stream(stream_id=self.names.index(self.current), device_index=0, device_type=1)  # type: ignore[call-arg]

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self._local.stream = self.current, stream
        try:
            yield
        finally:
            self._local.stream = before

    def enqueue(self, what: str) -> str:
        """An operation on the current stream; returns its name with a number."""
        name, past = f"{what}{next(self._numbers)}", self.past.setdefault(self.current, set())
        self.before[name], self.stream_of[name] = frozenset(past), self.current
        past.add(name)
        return name

    def named(self, what: str) -> list[str]:
        return [name for name in self.before if name.startswith(what)]

    # ---- what `abccl.collectives.torch.streams` does on a device

    def device_of(self, result: Any) -> torch.device | None:
        while isinstance(result, (list, tuple)):
            if not result:
                return None
            result = result[0]
        return DEVICE

    def here(self, device: torch.device) -> StandInEvent:
        return StandInEvent(self)

    def wait(self, event: StandInEvent, device: torch.device) -> None:
        event.block()

    def another(self, device: torch.device) -> Any:
        return self.on(f"pool{next(self._numbers)}")

    def future(self, device: torch.device) -> StandInFuture:
        return StandInFuture(self)

    def host_memory(self, like: torch.Tensor) -> torch.Tensor:
        self.on_host.append(torch.empty(like.shape, dtype=like.dtype))
        return self.on_host[-1]


class StandInEvent:
    def __init__(self, order: Order) -> None:
        self.order, self.past = order, frozenset(order.past.get(order.current, ()))

    def block(self) -> None:
        self.order.past.setdefault(self.order.current, set()).update(self.past)

    def query(self) -> bool:
        return self.order.device_is_done


class StandInFuture:
    """As torch documents its futures of CUDA tensors: what waits for one, and its callbacks, come behind its event."""

    def __init__(self, order: Order) -> None:
        self._order, self._set, self._callbacks = order, threading.Event(), list[Callable[[], None]]()
        self._lock = threading.Lock()
        self._event: StandInEvent | None = None
        self._found: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        return self._set.is_set()

    def value(self) -> Any:
        assert self.done()
        if self._error is not None:
            raise self._error
        return self._found

    def wait(self) -> Any:
        assert self._set.wait(60)
        if self._event is not None:
            self._event.block()
        return self.value()

    def set_result(self, value: Any) -> None:
        self._finish(value, None)

    def then(self, callback: Callable[[StandInFuture], Any]) -> StandInFuture:
        child = StandInFuture(self._order)
        with self._lock:
            if not self.done():
                self._callbacks.append(partial(self._call, callback, child))
                return child
        self._call(callback, child)
        return child

    def _call(self, callback: Callable[[StandInFuture], Any], child: StandInFuture) -> None:
        with self._order.another(DEVICE):
            assert self._event is not None
            self._event.block()
            try:
                value = callback(self)
            except Exception as error:
                child._finish(None, error)
            else:
                child._finish(value, None)

    def _finish(self, value: Any, error: BaseException | None) -> None:
        with self._lock:
            self._found, self._error, self._event = value, error, StandInEvent(self._order)
            self._set.set()
        for callback in self._callbacks:
            callback()


class StandInWork:
    """As `DeviceWork` promises: an operation on a side stream, that waits for the current stream first."""

    stream = 1

    def __init__(self, order: Order, what: str) -> None:
        self.order, self.completed = order, False
        self.error: Exception | None = None
        self.host_waits = 0
        issued = StandInEvent(order)
        with order.on("side"):
            issued.block()
            self.name = order.enqueue(what)
            self._event = StandInEvent(order)

    def wait(self, timeout: float | None = None) -> None:
        if self.error is not None:
            raise self.error
        self._event.block()

    def finishes_within(self, timeout: float | None) -> bool:
        self.host_waits += 1
        self.completed = self.completed or timeout is None
        return self.completed

    def is_completed(self) -> bool:
        return self.completed


class StandInHostWork:
    """What the host waits for: a message, or what it drives."""

    source = 7

    def __init__(self, order: Order, what: str) -> None:
        self.name = what
        self.come = threading.Event()

    def wait(self, timeout: float | None = None) -> None:
        assert self.finishes_within(60)

    def finishes_within(self, timeout: float | None) -> bool:
        return self.come.wait(timeout)

    def is_completed(self) -> bool:
        return self.come.is_set()


class StandInCommunicator:
    """Rank 0 of two: enqueues what it is asked for on contiguous tensors, and doubles the first of them."""

    rank, size, timeout, reproducible = 0, 2, 60.0, False

    def __init__(self, order: Order) -> None:
        self.order = order
        self.works: list[Any] = []
        self.moved: list[Any] = []  # the first argument of each call
        self.host_driven = False
        self.timeouts: list[float] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return partial(self._run, name)

    def set_timeout(self, seconds: float) -> None:
        self.timeout = seconds

    def wait_message(self, work: Any) -> None:
        work.wait()

    def close(self) -> None:
        pass

    def _run(self, name: str, *arguments: Any, async_op: bool = False, **_: Any) -> Any:
        if not all(argument.is_contiguous() for argument in arguments if isinstance(argument, torch.Tensor)):
            raise abccl.ArgumentError(f"{name}: not contiguous")
        self.timeouts.append(self.timeout)
        kind = StandInHostWork if self.host_driven or name in ("send", "recv") else StandInWork
        work = kind(self.order, name) if async_op else None
        if work is None:
            self.order.enqueue(name)
        else:
            self.works.append(work)
        if arguments:
            self.moved.append(arguments[0].mul_(2))
        return work


class Copies(TorchFunctionMode):
    """Counts copies as operations of the current stream: "to" a flat buffer, or "back" from one. Tensors say that they
    are CUDA's, so that `streams.keep` records them: `order.kept` has what it told the allocator."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if name == "record_stream":
            tensor, stream = args
            self.order.kept.append((self.order.names[stream.stream_id], tensor))
            return None
        if name == "copy_":
            self.order.enqueue("to" if args[0].is_contiguous() else "back")
        elif name == "cat" or (name == "contiguous" and not args[0].is_contiguous()):
            self.order.enqueue("to")
        return function(*args, **(kwargs or {}))
