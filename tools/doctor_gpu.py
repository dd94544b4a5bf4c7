"""What `abccl doctor` finds of CUDA: driver, packages that must fit it, NCCL, what devices can do with each other."""

from __future__ import annotations

import glob
import importlib.metadata
import re
import shutil
from collections.abc import Iterator

from ..algorithms.words import count
from .doctor_checks import OK, WARN, Finding, ask, run, version_of

# By ctypes: what is missing must not stop the rest.
DRIVER = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
error = cuda.cuInit(0)
version, number, reach = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
cuda.cuDriverGetVersion(ctypes.byref(version))
names, apart, mapped = [], [], []
if not error:
    error = cuda.cuDeviceGetCount(ctypes.byref(number))
    for one in range(number.value):
        name = ctypes.create_string_buffer(256)
        cuda.cuDeviceGetName(name, 256, one)
        names.append(name.value.decode())
        for other in range(number.value):
            cuda.cuDeviceCanAccessPeer(ctypes.byref(reach), one, other)
            if one != other and not reach.value:
                apart.append([one, other])
tell(code=error, version=version.value, names=names, apart=apart)
"""

NVRTC = "from cuda.bindings import nvrtc; found = nvrtc.nvrtcVersion(); tell(code=int(found[0]), version=found[1:])"

NCCL = """
import warnings; warnings.simplefilter("ignore")
import cupy
from cupy.cuda import nccl
import cupy_backends.cuda.libs.nccl
tell(version=nccl.get_version())
"""


def check_gpu(ranks: int) -> Iterator[Finding]:
    """All of CUDA; one line where there is none."""
    driver = ask(DRIVER)
    if "error" in driver:
        cards = glob.glob("/proc/driver/nvidia/gpus/*") or glob.glob("/dev/nvidia[0-9]*")
        if not cards:
            yield Finding(OK, "CUDA", "no driver, no device: arrays in host memory only")
        else:
            remedy = "in a container: docker run --gpus all; else install the library of the kernel module's version"
            yield Finding(WARN, "CUDA", f"there are devices, and libcuda can not be used: {driver['error']}", remedy)
        return
    yield from judge_driver(driver)
    if driver["code"] == 0 and driver["names"]:
        yield from check_packages(driver["version"] // 1000)


def judge_driver(driver: dict[str, object]) -> Iterator[Finding]:
    """What the driver says of itself and of its devices."""
    version = driver["version"]
    names, apart = driver["names"], driver["apart"]
    assert isinstance(version, int) and isinstance(names, list) and isinstance(apart, list)
    shown = f"CUDA {version // 1000}.{version % 1000 // 10}"
    if driver["code"] or not names:
        remedy = "look at CUDA_VISIBLE_DEVICES and at nvidia-smi; in a container: docker run --gpus all"
        yield Finding(WARN, "CUDA", f"libcuda ({shown}) finds no device: error {driver['code']}", remedy)
        return
    smi = shutil.which("nvidia-smi")
    release = run([smi, "--query-gpu=driver_version", "--format=csv,noheader"], 20.0).out.split() if smi else []
    also = f", driver {release[0]}" if release else ", no nvidia-smi"
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    yield Finding(OK, "CUDA", f"{shown}{also}: {kinds}")
    if apart:
        pairs = ", ".join(f"{one}-{other}" for one, other in apart[:4])
        text = f"devices {pairs}{' and more' if len(apart) > 4 else ''} can not map each other's memory"
        remedy = "cuda_ipc serves those that can; NCCL the others. In a virtual machine: pass the switch through, too"
        yield Finding(WARN, "peers", text, remedy)
    elif len(names) > 1:
        yield Finding(OK, "peers", f"all {count(len(names), 'device')} can map each other's memory")


def check_packages(major: int) -> Iterator[Finding]:
    """Whether what calls CUDA is there and of the driver's major version, and NCCL."""
    remedy = f"pip install 'abccl[cuda{min(max(major, 12), 13)}]'"
    found = installed()
    wanted = {"cuda-bindings": "arrays on devices", "cupy": "NCCL", "nvrtc": "kernels", "NCCL": "several hosts"}
    for name, use in wanted.items():
        if name not in found:
            yield Finding(WARN, name, f"not installed, and {use} want it", remedy)
        elif (found[name][1] or 0) > major:
            text = f"{found[name][0]} is of CUDA {found[name][1]}, and the driver of CUDA {major}"
            yield Finding(WARN, name, text, f"{remedy} (and uninstall that), or a newer driver")
        else:
            yield Finding(OK, name, found[name][0])
    majors = {number for _, number in found.values() if number is not None}
    if len(majors) > 1:
        shown = ", ".join(text for text, _ in found.values())
        yield Finding(WARN, "CUDA packages", f"they are of several CUDA versions: {shown}", f"one only: {remedy}")
    if "cuda-bindings" in found:
        nvrtc = ask(NVRTC)
        if nvrtc.get("error") or nvrtc["code"]:
            text = f"can not be loaded: {nvrtc.get('error') or nvrtc['code']}"
            yield Finding(WARN, "nvrtc", text, remedy)
    if "cupy" in found:
        nccl = ask(NCCL)
        if "error" in nccl:
            yield Finding(WARN, "NCCL", f"cupy can not load it: {nccl['error']}", remedy)
        else:
            number = nccl["version"]
            yield Finding(OK, "NCCL", f"cupy calls {number // 10000}.{number % 10000 // 100}.{number % 100}")


def installed() -> dict[str, tuple[str, int | None]]:
    """The packages that call CUDA: name and version in words, and the CUDA major version that they are for."""
    found: dict[str, tuple[str, int | None]] = {}
    bindings = version_of("cuda-bindings")
    if bindings is not None:
        found["cuda-bindings"] = (" ".join(bindings), int(bindings[1].split(".")[0]))
    names = [str(one.metadata["Name"] or "").lower() for one in importlib.metadata.distributions()]
    patterns = {
        "cupy": r"cupy(?:-cuda(\d+)x)?",
        "nvrtc": r"nvidia-cuda-nvrtc(?:-cu(\d+))?",
        "NCCL": r"nvidia-nccl-cu(\d+)",
    }
    for part, pattern in patterns.items():
        for name in sorted(names):
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            version = importlib.metadata.version(name)
            major = int(match[1]) if match[1] else int(version.split(".")[0]) if part == "nvrtc" else None
            found[part] = (f"{name} {version}", major)
    return found
