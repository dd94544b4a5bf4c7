"""The seam to the CUDA driver: all that abccl asks of it, in integers and bytes.

`Driver` is one device in this process. It stands on NVIDIA's `cuda.bindings.driver`, of CUDA 12 or 13, which is
imported when a device is asked for and not before. What CUDA refuses is a `TransportError` with CUDA's own name of the
error and what to do next.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from ..errors import TransportError

__all__ = ["WAIT", "WRITE", "Driver", "MemoryOperation", "Pointer", "PreparedOperations"]

WRITE, WAIT = 0, 1

# (WRITE or WAIT, address, value). A write comes after all that was enqueued before it and is visible system-wide; a
# wait lasts until the signed difference of the word there and the value is not negative, so that counters may wrap.
MemoryOperation = tuple[int, int, int]

_BATCH = 255  # memory operations that cuStreamBatchMemOp takes at once: "must be less than 256"


@dataclass(frozen=True)
class Pointer:
    """What the driver knows of an address.

    `kind` is "device", "host" (pinned or registered), "managed", or "unknown" for ordinary memory of the host;
    `device` is -1 unless the memory is a device's or managed; `base` and `nbytes` are of the whole allocation, 0 where
    unknown; `exportable` says whether `Driver.export` may work: it does not for virtual memory and for pools.
    """

    kind: str
    device: int
    base: int
    nbytes: int
    exportable: bool


class PreparedOperations(NamedTuple):
    """Memory operations as `Driver.operate` passes them on, batch by batch; they can be used again and again."""

    batches: tuple[list[Any], ...]


_LOST = "this process's work on the device is lost and its calls fail from here on: end the process"

# What to do next, by the beginning of CUDA's name of an error, without CUDA_ERROR_: the first that fits.
_ADVICE = {
    "NO_DEVICE": "run where nvidia-smi lists a GPU, and look at CUDA_VISIBLE_DEVICES",
    "INVALID_DEVICE": "ask for a device from 0 to Driver.count() - 1, and look at CUDA_VISIBLE_DEVICES",
    "INVALID_CONTEXT": "call make_current() in this thread first; a process can not open its own IPC handle",
    "CONTEXT_IS_DESTROYED": "make another Driver",
    "OUT_OF_MEMORY": "free memory of the device, or let fewer processes share it",
    "INVALID_IMAGE": "compile the kernels for the architecture of this device",
    "NO_BINARY_FOR_GPU": "compile the kernels for the architecture of this device",
    "NOT_FOUND": "look at the names of the kernels in this module",
    "UNSUPPORTED_PTX_VERSION": "install a newer driver, or kernels compiled to a cubin",
    "SYSTEM_DRIVER_MISMATCH": "install the driver's library and its kernel module in one version",
    "COMPAT_NOT_SUPPORTED": "install cuda.bindings of the driver's CUDA version, or a newer driver",
    "STREAM_CAPTURE": "run the same once before the capture of a graph, so that nothing is set up during it",
    "CAPTURED_EVENT": "let a stream wait for this event: the host can not while a graph is being captured",
    "NOT_SUPPORTED": "this device or driver can not do it: choose another transport",
    "NOT_PERMITTED": "if this is in a container, allow it IPC with the other processes and pinned memory",
    "MAP_FAILED": "if this is in a container, let the ranks share its IPC and PID namespaces",
    "PEER_ACCESS_UNSUPPORTED": "these two GPUs can not reach each other's memory: choose another transport",
    "INVALID_HANDLE": "it is of another device, or was destroyed",
    "INVALID_VALUE": "an address, a length or a number is wrong, or the memory was freed",
    "NOT_READY": "synchronize first",
    "COOPERATIVE_LAUNCH_TOO_LARGE": "launch no more blocks than run at once on this device",
    "LAUNCH_OUT_OF_RESOURCES": "launch fewer threads in a block",
    **dict.fromkeys(("ILLEGAL", "LAUNCH", "MISALIGNED", "HARDWARE_STACK", "ASSERT", "ECC", "UNKNOWN"), _LOST),
}
_LOOK = "look it up in the documentation of the CUDA driver API, among the values of CUresult"
_NO_DRIVER = "install NVIDIA's driver, 525 or newer for CUDA 12 and 580 or newer for CUDA 13, or run without GPUs"
_NO_BINDINGS = (
    "CUDA was asked for, and cuda.bindings can not be imported ({error}): "
    "pip install 'abccl[cuda13]', or 'abccl[cuda12]' for a driver of CUDA 12"
)


def _bindings() -> Any:
    """NVIDIA's module, with the driver initialised."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise TransportError(_NO_BINDINGS.format(error=error)) from error
    _call(driver.cuInit, 0)
    return driver


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """What a function of the driver gives, beside its code: nothing, one thing, or a tuple."""
    try:
        result = function(*arguments)
    except RuntimeError as error:  # no libcuda, or one that lacks the function
        name = function.__name__
        raise TransportError(f"{name} of the CUDA driver can not be called ({error}): {_NO_DRIVER}") from error
    if result[0] != 0:
        _refuse(function.__name__, result[0])
    return result[1] if len(result) == 2 else result[1:]


def _refuse(function: str, code: Any) -> NoReturn:
    name, text = code.name, _text(code)
    error = name.removeprefix("CUDA_ERROR_")
    advice = next((advice for start, advice in _ADVICE.items() if error.startswith(start)), _LOOK)
    raise TransportError(f"{function} failed with {name} ({text}): {advice}")


def _text(code: Any) -> str:
    from cuda.bindings import driver

    error, text = driver.cuGetErrorString(code)
    return text.decode() if error == 0 and text else "no description"


class Driver:
    """One device in this process, by its primary context.

    A thread calls `make_current()` before anything else, or does all within `as_current()`. Addresses and handles are
    int; stream 0 is the legacy default stream. No method waits for the device but `copy_now`, `synchronize...` and what
    gives memory back.
    """

    def __init__(self, device: int = 0) -> None:
        self._cuda = cu = _bindings()
        self.device = device
        self._handle = handle = _call(cu.cuDeviceGet, device)
        self.name: str = _call(cu.cuDeviceGetName, 256, handle).split(b"\0")[0].decode()
        # CUDA 12 has two: only the second tells the slices of a GPU (MIG) apart. In CUDA 13 it has the plain name.
        self.uuid: bytes = bytes(_call(getattr(cu, "cuDeviceGetUuid_v2", cu.cuDeviceGetUuid), handle).bytes)
        about = cu.CUdevice_attribute
        major = self._attribute(about.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(about.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.architecture = f"sm_{major}{minor}"
        self.multiprocessors = self._attribute(about.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self._opened: dict[int, list[int]] = {}  # address -> the bases that close() gives back
        self._wait = cu.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WAIT_VALUE_32
        self._write = cu.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
        self._not_less = cu.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self._fenced = cu.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        self._relaxed = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        # In CUDA 12 the plain function fails for a capture with edges that carry data; drivers before 12.3 lack the
        # other, so it is asked only where something is captured.
        self._capture_info = getattr(cu, "cuStreamGetCaptureInfo_v3", cu.cuStreamGetCaptureInfo)
        names = ("MEMORY_TYPE", "IS_MANAGED", "DEVICE_ORDINAL", "RANGE_START_ADDR", "RANGE_SIZE")
        self._asked = [
            getattr(cu.CUpointer_attribute, f"CU_POINTER_ATTRIBUTE_{name}")
            for name in (*names, "IS_LEGACY_CUDA_IPC_CAPABLE")
        ]
        self._context: Any = _call(cu.cuDevicePrimaryCtxRetain, handle)

    @staticmethod
    def count() -> int:
        """The visible devices. Without NVIDIA's driver or its bindings this is an error, which says what to install."""
        try:
            cu = _bindings()
        except TransportError as error:
            if "CUDA_ERROR_NO_DEVICE" in str(error):
                return 0
            raise
        return int(_call(cu.cuDeviceGetCount))

    @staticmethod
    def ordinal_of(address: int) -> int:
        """The device whose memory this is. It needs no context, so makes none on another device."""
        cu = _bindings()
        attribute = cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(_call(cu.cuPointerGetAttribute, attribute, address))

    def make_current(self) -> None:
        """Have this device current in this thread from now on."""
        if self._context is None:
            raise TransportError(f"device {self.device} was asked for after close_all(): make another Driver")
        _call(self._cuda.cuCtxSetCurrent, self._context)

    @contextlib.contextmanager
    def as_current(self) -> Iterator[None]:
        """Have this device current in this thread, and after it what was before."""
        if self._context is not None and int(_call(self._cuda.cuCtxGetCurrent)) == int(self._context):
            yield
            return
        if self._context is None:
            self.make_current()  # refuses
        _call(self._cuda.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            _call(self._cuda.cuCtxPopCurrent)

    # Memory

    def allocate(self, nbytes: int) -> int:
        """Memory of the device, which can be exported."""
        return int(_call(self._cuda.cuMemAlloc, nbytes))

    def free(self, address: int) -> None:
        """Give back what `allocate` gave. Waits until the device has nothing to do."""
        with self._unrestricted():
            _call(self._cuda.cuMemFree, address)

    def export(self, address: int) -> tuple[bytes, int]:
        """A handle of 64 bytes that another process opens, and where in its memory the address is."""
        base = int(_call(self._cuda.cuMemGetAddressRange, address)[0])
        handle = _call(self._cuda.cuIpcGetMemHandle, base)
        return ctypes.string_at(handle.getPtr(), 64), address - base

    def open(self, handle: bytes, offset: int) -> int:
        """The address in this process of what another exported; it must outlive neither the memory nor `close()`."""
        if len(handle) != 64:
            raise TransportError(f"an IPC handle has 64 bytes, not {len(handle)}: pass on what export() gave")
        theirs = self._cuda.CUipcMemHandle()
        ctypes.memmove(theirs.getPtr(), handle, 64)  # in CUDA 12.9 the structure has no field to set
        flags = self._cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        base = int(_call(self._cuda.cuIpcOpenMemHandle, theirs, int(flags)))
        self._opened.setdefault(base + offset, []).append(base)
        return base + offset

    def close(self, address: int) -> None:
        """Give back what `open()` gave, as often as it gave it."""
        bases = self._opened.get(address)
        if not bases:
            raise TransportError(f"{address:#x} was to be closed and is not open: close what open() gave, once")
        _call(self._cuda.cuIpcCloseMemHandle, bases[-1])
        bases.pop()

    def register_host(self, address: int, nbytes: int) -> int:
        """Let the device use memory of the host, which may be shared between processes; its address there."""
        flags = self._cuda.CU_MEMHOSTREGISTER_PORTABLE | self._cuda.CU_MEMHOSTREGISTER_DEVICEMAP
        _call(self._cuda.cuMemHostRegister, address, nbytes, flags)
        return int(_call(self._cuda.cuMemHostGetDevicePointer, address, 0))

    def unregister_host(self, address: int) -> None:
        """Take back what `register_host` did; the host's address."""
        _call(self._cuda.cuMemHostUnregister, address)

    def allocate_pinned(self, nbytes: int) -> int:
        """Memory of the host that the device uses at the same address."""
        return int(_call(self._cuda.cuMemHostAlloc, nbytes, self._cuda.CU_MEMHOSTALLOC_PORTABLE))

    def free_pinned(self, address: int) -> None:
        """Give back what `allocate_pinned` gave."""
        with self._unrestricted():
            _call(self._cuda.cuMemFreeHost, address)

    def pointer(self, address: int) -> Pointer:
        """What is known of an address, of whatever memory."""
        values = _call(self._cuda.cuPointerGetAttributes, len(self._asked), self._asked, address)
        kind, managed, device, base, nbytes, exportable = map(int, values)
        if kind == 0:
            return Pointer("unknown", -1, 0, 0, False)
        if managed:
            return Pointer("managed", device, base, nbytes, False)
        if kind == self._cuda.CUmemorytype.CU_MEMORYTYPE_HOST:
            return Pointer("host", -1, base, nbytes, False)
        opened = any(base in bases for bases in self._opened.values())
        return Pointer("device", device, base, nbytes, bool(exportable) and not opened)

    # What streams do

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy between any two memories; of nothing, nothing."""
        if nbytes:
            _call(self._cuda.cuMemcpyAsync, destination, source, nbytes, stream)

    def copy_now(self, destination: int, source: int, nbytes: int) -> None:
        """A copy that is done on return. It comes after nothing but what stream 0 does."""
        if nbytes:
            _call(self._cuda.cuMemcpy, destination, source, nbytes)
            self.synchronize(0)  # cuMemcpy does not wait for a copy within the device

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        """Enqueue to set every byte."""
        if nbytes:
            _call(self._cuda.cuMemsetD8Async, address, value, nbytes, stream)

    def prepare_operations(self, operations: Sequence[MemoryOperation]) -> PreparedOperations:
        """The same for `operate`, for those that come again: to build them costs more than to enqueue them."""
        made = [self._memory_operation(*operation) for operation in operations]
        return PreparedOperations(tuple(made[start : start + _BATCH] for start in range(0, len(made), _BATCH)))

    def operate(self, stream: int, operations: Sequence[MemoryOperation] | PreparedOperations) -> None:
        """Writes and waits of 32-bit words, one after another."""
        ready = operations if isinstance(operations, PreparedOperations) else self.prepare_operations(operations)
        for batch in ready.batches:
            _call(self._cuda.cuStreamBatchMemOp, stream, len(batch), batch, 0)

    def write(self, stream: int, address: int, value: int) -> None:
        """One such write, of a value that is another each time."""
        _call(self._cuda.cuStreamWriteValue32, stream, address, value, int(self._fenced))

    def load(self, image: bytes) -> int:
        """A module from a cubin."""
        return int(_call(self._cuda.cuModuleLoadData, image))

    def function(self, module: int, name: str) -> int:
        """A kernel of a module."""
        return int(_call(self._cuda.cuModuleGetFunction, module, name.encode()))

    def launch(
        self,
        function: int,
        grid: int,
        block: int,
        arguments: Sequence[ctypes._SimpleCData[Any] | ctypes.Structure],
        stream: int,
        cooperative: bool = False,
    ) -> None:
        """Enqueue a kernel with these arguments, whose values are copied."""
        table = (ctypes.c_void_p * max(1, len(arguments)))(*map(ctypes.addressof, arguments))
        shape = (grid, 1, 1, block, 1, 1, 0)
        if cooperative:
            _call(self._cuda.cuLaunchCooperativeKernel, function, *shape, stream, ctypes.addressof(table))
        else:
            _call(self._cuda.cuLaunchKernel, function, *shape, stream, ctypes.addressof(table), 0)

    # Streams and events

    def create_stream(self) -> int:
        """A stream that does not wait for stream 0, nor stream 0 for it."""
        return int(_call(self._cuda.cuStreamCreate, int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def destroy_stream(self, stream: int) -> None:
        """What was enqueued is done nevertheless."""
        _call(self._cuda.cuStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done all that it was given."""
        self._ask(self._cuda.cuStreamSynchronize, stream)

    def synchronize_device(self) -> None:
        """Wait until all streams of this process have."""
        _call(self._cuda.cuCtxSynchronize)

    def create_event(self, timing: bool = False) -> int:
        """An event; one that `elapsed` is to be asked of with `timing`."""
        flags = self._cuda.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        return int(_call(self._cuda.cuEventCreate, int(flag)))

    def destroy_event(self, event: int) -> None:
        """What was recorded or waits goes on."""
        _call(self._cuda.cuEventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        """Put the event behind what the stream was given so far."""
        _call(self._cuda.cuEventRecord, event, stream)

    def wait_event(self, stream: int, event: int) -> None:
        """Have the stream wait for where the event is now; for one never recorded, for nothing."""
        _call(self._cuda.cuStreamWaitEvent, stream, event, 0)

    def is_done(self, event: int) -> bool:
        """Whether the device has come to the event. Never waits."""
        return self._ask(self._cuda.cuEventQuery, event)

    def synchronize_event(self, event: int) -> None:
        """Wait until it has."""
        self._ask(self._cuda.cuEventSynchronize, event)

    def elapsed(self, start: int, end: int) -> float:
        """Seconds between two events that were made with `timing` and are done."""
        return float(_call(self._cuda.cuEventElapsedTime, start, end)) / 1e3

    # Graphs

    def capture_id(self, stream: int) -> int | None:
        """Of the graph that is being captured on the stream, None if none is."""
        active = self._cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
        if _call(self._cuda.cuStreamIsCapturing, stream) != active:
            return None
        return int(_call(self._capture_info, stream)[1])

    def begin_capture(self, stream: int) -> None:
        """Other threads are not restricted by it."""
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call(self._cuda.cuStreamBeginCapture, stream, mode)

    def end_capture(self, stream: int) -> int:
        """The graph, ready to be launched."""
        graph = _call(self._cuda.cuStreamEndCapture, stream)
        try:
            return int(_call(self._cuda.cuGraphInstantiate, graph, 0))
        finally:
            _call(self._cuda.cuGraphDestroy, graph)

    def launch_graph(self, graph: int, stream: int) -> None:
        """Enqueue a graph."""
        _call(self._cuda.cuGraphLaunch, graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """It is not launched any more."""
        _call(self._cuda.cuGraphExecDestroy, graph)

    def close_all(self) -> None:
        """Let the context go, once: what is still there of this process's lives as long as others hold the context."""
        context, self._context = self._context, None
        if context is not None:
            _call(self._cuda.cuDevicePrimaryCtxRelease, self._handle)

    def _attribute(self, attribute: Any) -> int:
        return int(_call(self._cuda.cuDeviceGetAttribute, attribute, self._handle))

    def _memory_operation(self, kind: int, address: int, value: int) -> Any:
        """CUDA's structure, a union whose waits and writes have fields of the same names."""
        made = self._cuda.CUstreamBatchMemOpParams()
        made.operation = self._wait if kind == WAIT else self._write
        fields = made.waitValue if kind == WAIT else made.writeValue
        fields.address, fields.value = address, value & 0xFFFFFFFF
        fields.flags = int(self._not_less if kind == WAIT else self._fenced)
        return made

    @contextlib.contextmanager
    def _unrestricted(self) -> Iterator[None]:
        """What is done here must not break what another thread captures: CUDA allows it if told so."""
        exchange = self._cuda.cuThreadExchangeStreamCaptureMode
        before = _call(exchange, self._relaxed)
        try:
            yield
        finally:
            _call(exchange, before)

    def _ask(self, function: Callable[[int], tuple[Any, ...]], handle: int) -> bool:
        """Whether the work is done."""
        with self._unrestricted():
            (code,) = function(handle)
        if code == self._cuda.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if code != 0:
            _refuse(function.__name__, code)
        return True
