"""`Driver` without a GPU: what it asks of NVIDIA's bindings, whose structures and conversions of arguments are real."""

from __future__ import annotations

import ctypes
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_cuda import FakeDriver

from abccl.cuda.driver import WAIT, WRITE, Driver, Pointer
from abccl.errors import TransportError

pytest.importorskip("cuda.bindings.driver")

import cuda.bindings
from cuda.bindings import driver as nvidia


def _has_driver() -> bool:
    try:
        nvidia.cuInit(0)
    except RuntimeError:
        return False
    return True


HAS_DRIVER = _has_driver()
MISSING = "libcuda|NVIDIA driver library"  # what the bindings say without it, older and newer ones
HANDLE = bytes(range(64))


def handle_of_peer() -> Any:
    made = nvidia.CUipcMemHandle()
    ctypes.memmove(made.getPtr(), HANDLE, 64)
    return made


def uuid() -> Any:
    made = nvidia.CUuuid()
    ctypes.memmove(made.getPtr(), HANDLE, 16)
    return made


def attribute(asked: Any, _: Any) -> tuple[Any, ...]:
    about = nvidia.CUdevice_attribute
    values = {
        about.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 9,
        about.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 0,
        about.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: 132,
    }
    return 0, values[asked]


class Stub:
    """Stands for NVIDIA's module: functions are recorded and answer as told, all else is the real one's.

    Where there is no driver each call goes to the real function first, which converts the arguments, refuses those of
    wrong types, and only then finds no driver.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {
            "cuGetErrorString": (0, b"a description"),
            "cuDeviceGetCount": (0, 2),
            "cuDeviceGet": (0, nvidia.CUdevice(1)),
            "cuDeviceGetName": (0, b"A GPU\0\0\0"),
            "cuDeviceGetUuid": (0, uuid()),
            "cuDeviceGetUuid_v2": (0, uuid()),
            "cuDeviceGetAttribute": attribute,
            "cuCtxPopCurrent": (0, nvidia.CUcontext(0xC0)),
            "cuDevicePrimaryCtxRetain": (0, nvidia.CUcontext(0xC0)),
            "cuMemAlloc": (0, nvidia.CUdeviceptr(0x7000)),
            "cuMemHostAlloc": (0, 0x8000),
            "cuMemHostGetDevicePointer": (0, nvidia.CUdeviceptr(0x9000)),
            "cuMemGetAddressRange": (0, nvidia.CUdeviceptr(0x7000), 4096),
            "cuIpcGetMemHandle": (0, handle_of_peer()),
            "cuIpcOpenMemHandle": (0, nvidia.CUdeviceptr(0xA000)),
            "cuModuleLoadData": (0, nvidia.CUmodule(0xB0)),
            "cuModuleGetFunction": (0, nvidia.CUfunction(0xF0)),
            "cuStreamCreate": (0, nvidia.CUstream(0x50)),
            "cuEventCreate": (0, nvidia.CUevent(0xE0)),
            "cuEventElapsedTime": (0, 1.5),
            "cuStreamEndCapture": (0, nvidia.CUgraph(0x60)),
            "cuGraphInstantiate": (0, nvidia.CUgraphExec(0x61)),
            "cuThreadExchangeStreamCaptureMode": (0, nvidia.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL),
        }

    def __getattr__(self, name: str) -> Any:
        real = getattr(nvidia, name)
        if not name.startswith("cu") or isinstance(real, type):
            return real

        def call(*arguments: Any) -> tuple[Any, ...]:
            if not HAS_DRIVER:
                with pytest.raises(RuntimeError, match=MISSING):
                    real(*arguments)
            self.calls.append((name, *arguments))
            answer = self.answers.get(name, (0,))
            code, *rest = answer(*arguments) if callable(answer) else answer
            return nvidia.CUresult(code), *rest

        call.__name__ = name
        return call

    def taken(self, *but: str) -> list[tuple[Any, ...]]:
        """The calls since the last time, as plain numbers where they are."""
        calls, self.calls = self.calls, []
        return [call for call in calls if call[0] not in but]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setattr(cuda.bindings, "driver", stub)
    return stub


@pytest.fixture
def driver(stub: Stub) -> Iterator[Driver]:
    driver = Driver(1)
    stub.taken()
    yield driver
    driver.close_all()


def public(cls: type) -> dict[str, Callable[..., Any]]:
    return {name: member for name, member in vars(cls).items() if name[0] != "_" and callable(getattr(cls, name))}


def test_the_fake_has_the_same_methods() -> None:
    def shape(method: Any) -> list[tuple[str, Any, Any]]:
        method = method.__func__ if isinstance(method, staticmethod) else method
        return [(p.name, p.default, p.kind) for p in inspect.signature(method).parameters.values()]

    assert {name: shape(method) for name, method in public(Driver).items()} == {
        name: shape(method) for name, method in public(FakeDriver).items()
    }


@pytest.mark.skipif(HAS_DRIVER, reason="there is a CUDA driver")
@pytest.mark.parametrize("make", [Driver, Driver.count])
def test_without_a_driver_the_error_says_so(make: Callable[[], Any]) -> None:
    with pytest.raises(
        TransportError, match=f"cuInit of the CUDA driver can not be called.*({MISSING}).*: install NVIDIA's"
    ):
        make()


@pytest.mark.parametrize("make", [Driver, Driver.count])
def test_without_the_bindings_the_error_names_the_extra(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cuda.bindings, "driver")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(TransportError, match=r"cuda.bindings can not be imported .*abccl\[cuda13\].*abccl\[cuda12\]"):
        make()


def test_count(stub: Stub) -> None:
    assert Driver.count() == 2
    stub.answers["cuInit"] = (nvidia.CUresult.CUDA_ERROR_NO_DEVICE,)
    assert Driver.count() == 0
    with pytest.raises(TransportError, match="cuInit failed with CUDA_ERROR_NO_DEVICE .*nvidia-smi"):
        Driver()
    stub.answers["cuInit"] = (nvidia.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,)
    with pytest.raises(TransportError, match="SYSTEM_DRIVER_MISMATCH"):
        Driver.count()


def test_a_device_and_its_context(stub: Stub) -> None:
    driver = Driver(1)
    assert (driver.device, driver.name, driver.uuid) == (1, "A GPU", HANDLE[:16])
    assert (driver.architecture, driver.multiprocessors) == ("sm_90", 132)
    names = [call[0] for call in stub.taken("cuDeviceGetAttribute")]
    assert names[:2] == ["cuInit", "cuDeviceGet"] and names[-1] == "cuDevicePrimaryCtxRetain"
    driver.make_current()
    driver.close_all()
    driver.close_all()
    assert [call[0] for call in stub.taken()] == ["cuCtxSetCurrent", "cuDevicePrimaryCtxRelease"]
    with pytest.raises(TransportError, match="make another Driver"):
        driver.make_current()


# Method and arguments, what it asks of CUDA, what it gives.
CALLS: list[tuple[str, tuple[Any, ...], list[tuple[Any, ...]], Any]] = [
    ("allocate", (64,), [("cuMemAlloc", 64)], 0x7000),
    ("write", (0x50, 0x7000, 9), [("cuStreamWriteValue32", 0x50, 0x7000, 9, 0)], None),
    ("free", (0x7000,), [("cuMemFree", 0x7000)], None),
    ("export", (0x7010,), [("cuMemGetAddressRange", 0x7010), ("cuIpcGetMemHandle", 0x7000)], (HANDLE, 0x10)),
    ("register_host", (64, 128), [("cuMemHostRegister", 64, 128, 3), ("cuMemHostGetDevicePointer", 64, 0)], 0x9000),
    ("unregister_host", (64,), [("cuMemHostUnregister", 64)], None),
    ("allocate_pinned", (64,), [("cuMemHostAlloc", 64, 1)], 0x8000),
    ("free_pinned", (0x8000,), [("cuMemFreeHost", 0x8000)], None),
    ("copy", (1, 2, 3, 4), [("cuMemcpyAsync", 1, 2, 3, 4)], None),
    ("copy", (1, 2, 0, 4), [], None),
    ("copy_now", (1, 2, 3), [("cuMemcpy", 1, 2, 3), ("cuStreamSynchronize", 0)], None),
    ("copy_now", (1, 2, 0), [], None),
    ("fill", (1, 255, 3, 4), [("cuMemsetD8Async", 1, 255, 3, 4)], None),
    ("fill", (1, 255, 0, 4), [], None),
    ("operate", (4, []), [], None),
    ("load", (b"cubin",), [("cuModuleLoadData", b"cubin")], 0xB0),
    ("function", (0xB0, "fold"), [("cuModuleGetFunction", 0xB0, b"fold")], 0xF0),
    ("create_stream", (), [("cuStreamCreate", 1)], 0x50),
    ("destroy_stream", (0x50,), [("cuStreamDestroy", 0x50)], None),
    ("synchronize", (0x50,), [("cuStreamSynchronize", 0x50)], None),
    ("synchronize_device", (), [("cuCtxSynchronize",)], None),
    ("create_event", (), [("cuEventCreate", 2)], 0xE0),
    ("create_event", (True,), [("cuEventCreate", 0)], 0xE0),
    ("destroy_event", (0xE0,), [("cuEventDestroy", 0xE0)], None),
    ("record", (0xE0, 0x50), [("cuEventRecord", 0xE0, 0x50)], None),
    ("wait_event", (0x50, 0xE0), [("cuStreamWaitEvent", 0x50, 0xE0, 0)], None),
    ("is_done", (0xE0,), [("cuEventQuery", 0xE0)], True),
    ("synchronize_event", (0xE0,), [("cuEventSynchronize", 0xE0)], None),
    ("elapsed", (0xE0, 0xE1), [("cuEventElapsedTime", 0xE0, 0xE1)], 1.5e-3),
    (
        "begin_capture",
        (0x50,),
        [("cuStreamBeginCapture", 0x50, nvidia.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)],
        None,
    ),
    ("launch_graph", (0x61, 0x50), [("cuGraphLaunch", 0x61, 0x50)], None),
    ("destroy_graph", (0x61,), [("cuGraphExecDestroy", 0x61)], None),
]


@pytest.mark.parametrize(("method", "arguments", "asked", "given"), CALLS)
def test_what_a_method_asks(
    driver: Driver, stub: Stub, method: str, arguments: tuple[Any, ...], asked: list[tuple[Any, ...]], given: Any
) -> None:
    assert getattr(driver, method)(*arguments) == given
    assert stub.taken("cuThreadExchangeStreamCaptureMode") == asked
    if asked:
        name = asked[0][0]
        nothing = [None] * (len(stub.answers.get(name, (0,))) - 1)
        stub.answers[name] = (nvidia.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, *nothing)
        with pytest.raises(
            TransportError, match=rf"{name} failed with CUDA_ERROR_ILLEGAL_ADDRESS \(a description\): this"
        ):
            getattr(driver, method)(*arguments)


def test_every_method_is_tested() -> None:
    elsewhere = {
        "count",
        "ordinal_of",
        "make_current",
        "as_current",
        "close_all",
        "open",
        "close",
        "pointer",
        "prepare_operations",
    }
    assert set(public(Driver)) - elsewhere - {"launch", "capture_id", "end_capture"} == {call[0] for call in CALLS}


def test_the_device_of_an_address_is_asked_without_a_context(stub: Stub) -> None:
    stub.answers["cuPointerGetAttribute"] = (0, 1)
    assert Driver.ordinal_of(0x7010) == 1
    (asked,) = stub.taken("cuInit")[-1:]
    assert asked[0] == "cuPointerGetAttribute" and asked[1].name.endswith("DEVICE_ORDINAL") and asked[2] == 0x7010


def test_as_current_leaves_a_thread_as_it_was(driver: Driver, stub: Stub) -> None:
    stub.answers["cuCtxGetCurrent"] = (0, nvidia.CUcontext(0xD0))  # of another device
    with pytest.raises(RuntimeError, match="within"), driver.as_current():
        raise RuntimeError("within")
    asked, (push, context), pop = stub.taken()
    assert [asked[0], push, int(context), pop[0]] == ["cuCtxGetCurrent", "cuCtxPushCurrent", 0xC0, "cuCtxPopCurrent"]
    stub.answers["cuCtxGetCurrent"] = (0, nvidia.CUcontext(0xC0))
    with driver.as_current():
        assert stub.taken() == [("cuCtxGetCurrent",)]
    assert stub.taken() == []
    driver.close_all()
    with pytest.raises(TransportError, match="make another Driver"), driver.as_current():
        pass


def test_open_and_close(driver: Driver, stub: Stub) -> None:
    assert [driver.open(HANDLE, 0x10), driver.open(HANDLE, 0x10)] == [0xA010, 0xA010]
    (_, theirs, flags), _ = stub.taken()
    assert ctypes.string_at(theirs.getPtr(), 64) == HANDLE and flags == 1
    driver.close(0xA010)
    driver.close(0xA010)
    assert stub.taken() == [("cuIpcCloseMemHandle", 0xA000)] * 2
    with pytest.raises(TransportError, match="is not open"):
        driver.close(0xA010)
    with pytest.raises(TransportError, match="64 bytes, not 3"):
        driver.open(b"abc", 0)
    stub.answers["cuIpcOpenMemHandle"] = (nvidia.CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
    with pytest.raises(TransportError, match="can not open its own"):
        driver.open(HANDLE, 0)


def test_memory_operations(driver: Driver, stub: Stub) -> None:
    kinds = nvidia.CUstreamBatchMemOpType
    operations = [(WRITE, 0x1000, 7), (WAIT, 0x1004, -1), (WAIT, 0x1008, 2**32 - 2)]
    driver.operate(0x50, operations)
    ((name, stream, count, (write, minus, wrapped), flags),) = stub.taken()
    assert (name, stream, count, flags) == ("cuStreamBatchMemOp", 0x50, 3, 0)
    assert write.operation == kinds.CU_STREAM_MEM_OP_WRITE_VALUE_32 and write.writeValue.flags == 0
    assert (int(write.writeValue.address), int(write.writeValue.value)) == (0x1000, 7)
    assert minus.operation == wrapped.operation == kinds.CU_STREAM_MEM_OP_WAIT_VALUE_32
    assert minus.waitValue.flags == int(nvidia.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
    assert (int(minus.waitValue.address), int(minus.waitValue.value)) == (0x1004, 2**32 - 1)
    assert (int(wrapped.waitValue.address), int(wrapped.waitValue.value)) == (0x1008, 2**32 - 2)


def test_long_lists_of_operations_are_cut(driver: Driver, stub: Stub) -> None:
    ready = driver.prepare_operations([(WRITE, 4 * index, index) for index in range(600)])
    assert stub.taken() == []
    driver.operate(0x50, ready)
    driver.operate(0x50, ready)
    calls = stub.taken()
    assert [call[2] for call in calls] == [255, 255, 90] * 2
    assert calls[0][3] is calls[3][3], "what is prepared is not built again"
    assert [int(made.writeValue.value) for call in calls[:3] for made in call[3]] == list(range(600))


@pytest.mark.parametrize("cooperative", [False, True])
def test_launch(driver: Driver, stub: Stub, cooperative: bool) -> None:
    class Pieces(ctypes.Structure):
        _fields_ = [("address", ctypes.c_uint64 * 2)]

    seen: list[Any] = []

    def launched(*arguments: Any) -> tuple[int]:
        table = (ctypes.c_void_p * 3).from_address(arguments[9])
        seen.append(ctypes.c_int32.from_address(table[0]).value)
        seen.append(list(Pieces.from_address(table[1]).address))
        seen.append(ctypes.c_double.from_address(table[2]).value)
        return (0,)

    name = "cuLaunchCooperativeKernel" if cooperative else "cuLaunchKernel"
    stub.answers[name] = launched
    values = (ctypes.c_int32(-5), Pieces((1, 2**63)), ctypes.c_double(0.5))
    driver.launch(0xF0, 12, 128, values, 0x50, cooperative)
    assert seen == [-5, [1, 2**63], 0.5]
    ((called, *arguments),) = stub.taken()
    assert called == name and arguments[:9] == [0xF0, 12, 1, 1, 128, 1, 1, 0, 0x50]
    stub.answers[name] = (nvidia.CUresult.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,)
    with pytest.raises(TransportError, match="no more blocks than run at once"):
        driver.launch(0xF0, 12, 128, (), 0x50, cooperative)


@pytest.mark.parametrize(
    ("values", "pointer"),
    [
        ([0, False, 0, 0, 0, False], Pointer("unknown", -1, 0, 0, False)),
        ([1, False, 0, 0x7000, 64, False], Pointer("host", -1, 0x7000, 64, False)),
        ([2, False, 1, 0x7000, 64, True], Pointer("device", 1, 0x7000, 64, True)),
        ([2, False, 1, 0x7000, 64, False], Pointer("device", 1, 0x7000, 64, False)),
        ([2, False, 1, 0xA000, 64, True], Pointer("device", 1, 0xA000, 64, False)),
        ([2, True, 1, 0x7000, 64, False], Pointer("managed", 1, 0x7000, 64, False)),
    ],
)
def test_pointer(driver: Driver, stub: Stub, values: list[int], pointer: Pointer) -> None:
    driver.open(HANDLE, 0x10)  # at 0xA000: what a peer gave can not be passed on
    values[3] = nvidia.CUdeviceptr(values[3])
    stub.answers["cuPointerGetAttributes"] = (0, values)
    assert driver.pointer(0x7010) == pointer
    asked = [attribute.name.removeprefix("CU_POINTER_ATTRIBUTE_") for attribute in stub.taken()[-1][2]]
    assert asked[:3] == ["MEMORY_TYPE", "IS_MANAGED", "DEVICE_ORDINAL"]
    assert asked[3:] == ["RANGE_START_ADDR", "RANGE_SIZE", "IS_LEGACY_CUDA_IPC_CAPABLE"]


def test_captures(driver: Driver, stub: Stub) -> None:
    states = nvidia.CUstreamCaptureStatus
    ask = "cuStreamGetCaptureInfo_v3" if hasattr(nvidia, "cuStreamGetCaptureInfo_v3") else "cuStreamGetCaptureInfo"
    rest = (nvidia.cuuint64_t(7), nvidia.CUgraph(0), [], [], 0)
    stub.answers["cuStreamIsCapturing"] = (0, states.CU_STREAM_CAPTURE_STATUS_NONE)
    assert driver.capture_id(0x50) is None
    assert [call[0] for call in stub.taken()] == ["cuStreamIsCapturing"], "older drivers have no more"
    stub.answers["cuStreamIsCapturing"] = (0, states.CU_STREAM_CAPTURE_STATUS_ACTIVE)
    stub.answers[ask] = (0, states.CU_STREAM_CAPTURE_STATUS_ACTIVE, *rest)
    assert driver.capture_id(0x50) == 7
    stub.taken()
    assert driver.end_capture(0x50) == 0x61
    stub.answers["cuGraphInstantiate"] = (nvidia.CUresult.CUDA_ERROR_INVALID_VALUE, None)
    with pytest.raises(TransportError, match="cuGraphInstantiate failed"):
        driver.end_capture(0x50)
    assert [call[0] for call in stub.taken("cuGetErrorString")] == [
        *("cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy") * 2
    ]
    stub.answers["cuStreamEndCapture"] = (nvidia.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNJOINED, None)
    with pytest.raises(TransportError, match="once before the capture"):
        driver.end_capture(0x50)


@pytest.mark.parametrize("method", ["is_done", "synchronize_event", "synchronize"])
def test_questions_do_not_break_the_capture_of_another_thread(driver: Driver, stub: Stub, method: str) -> None:
    modes = nvidia.CUstreamCaptureMode
    getattr(driver, method)(0xE0)
    before, (name, *_), after = stub.taken()
    assert before == ("cuThreadExchangeStreamCaptureMode", modes.CU_STREAM_CAPTURE_MODE_RELAXED)
    assert after == ("cuThreadExchangeStreamCaptureMode", modes.CU_STREAM_CAPTURE_MODE_GLOBAL)
    stub.answers[name] = (nvidia.CUresult.CUDA_ERROR_CAPTURED_EVENT,)
    with pytest.raises(TransportError, match="let a stream wait"):
        getattr(driver, method)(0xE0)
    assert stub.taken("cuGetErrorString")[-1] == after
    stub.answers["cuEventQuery"] = (nvidia.CUresult.CUDA_ERROR_NOT_READY,)
    assert driver.is_done(0xE0) is False


def test_an_unknown_error_is_passed_on(driver: Driver, stub: Stub) -> None:
    stub.answers["cuMemAlloc"] = (nvidia.CUresult.CUDA_ERROR_PROFILER_DISABLED, None)
    stub.answers["cuGetErrorString"] = (nvidia.CUresult.CUDA_ERROR_INVALID_VALUE, None)
    with pytest.raises(TransportError, match=r"CUDA_ERROR_PROFILER_DISABLED \(no description\): look it up"):
        driver.allocate(1)
