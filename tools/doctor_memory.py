"""What ranks on this machine may do with each other's memory, found out by two processes that try."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..algorithms.words import count
from .doctor_checks import FAIL, OK, WARN, Finding, ask, read, roughly

# Two processes that are not each other's parent, as ranks are not: security modules tell these apart.
TARGET = """
import ctypes, os, sys
word = ctypes.c_uint64(0x616263636c)
fd = os.memfd_create("abccl-doctor")
os.write(fd, b"abccl")
print(os.getpid(), fd, ctypes.addressof(word), flush=True)
sys.stdin.read()
"""

PEER = """
import ctypes, os, errno
pid, fd, address = map(int, sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
found = {}
def attempt(name, does):
    try:
        does()
        found[name] = ""
    except OSError as error:
        found[name] = f"{errno.errorcode.get(error.errno, error.errno)} ({error.strerror})"
    except AttributeError as error:
        found[name] = f"missing in this Python ({error})"
def opens():
    own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    if os.pread(own, 5, 0) != b"abccl":
        raise OSError(errno.EIO, "other bytes came")
def reads():
    class Span(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    word = ctypes.c_uint64()
    here, there = Span(ctypes.addressof(word), 8), Span(address, 8)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    if libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) != 8:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if word.value != 0x616263636c:
        raise OSError(errno.EIO, "other bytes came")
numbers = {"x86_64": (324, 202), "aarch64": (283, 98)}.get(os.uname().machine)
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def registers():
    call(numbers[0], 1 << 2, 0, 0)  # MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED
def wakes():
    call(numbers[1], ctypes.byref(ctypes.c_uint32()), 1, 1, None, None, 0)  # FUTEX_WAKE
attempt("open", opens)
attempt("pull", reads)
attempt("pidfd", lambda: os.close(os.pidfd_open(pid)))
if numbers:
    attempt("membarrier", registers)
    attempt("futex", wakes)
tell(found=found)
"""

CONTAINER = "in a container: --cap-add=SYS_PTRACE, or a seccomp profile that allows it"


def check_sharing(ranks: int) -> Iterator[Finding]:
    """What two ranks on this host may do with each other's memory."""
    try:
        target = subprocess.Popen(
            [sys.executable, "-c", TARGET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    except OSError as error:
        yield Finding(FAIL, "memory", f"no process can be started: {error}", "raise the limit on processes (ulimit -u)")
        return
    try:
        assert target.stdout is not None
        words = target.stdout.readline().split()
        peer = ask(PEER, *words) if words else dict[str, Any](error="a process can not make a memfd")
    finally:
        target.communicate("")
    if "error" in peer:
        yield Finding(WARN, "memory", f"it can not be found out how memory is shared: {peer['error']}")
        return
    yield from judge_sharing(peer["found"])


def judge_sharing(found: dict[str, str]) -> Iterator[Finding]:
    """What the peer's attempts mean; each is the reason why it failed, or empty."""
    if not found["open"]:
        yield Finding(OK, "memory", "memfd: ranks can open each other's memory (/proc/PID/fd)")
    else:
        text = f"ranks can not open /proc/PID/fd of each other: {found['open']}; /dev/shm is used, by name"
        remedy = f"run all ranks as one user in one container, and mount /proc there; {CONTAINER}"
        yield Finding(WARN, "memory", text, remedy)
    if not found["pull"]:
        yield Finding(OK, "pull", "ranks can read each other's private memory (process_vm_readv)")
    else:
        yama = read("/proc/sys/kernel/yama/ptrace_scope")
        remedy = CONTAINER if yama in ("", "0") else "sysctl kernel.yama.ptrace_scope=0"
        text = f"process_vm_readv: {found['pull']}; large messages from ordinary memory are copied twice"
        yield Finding(WARN, "pull", text, f"{remedy}; or Communicator.empty, whose arrays all ranks map")
    costs = {
        "pidfd": "a dead rank is noticed by its number, which another process may have got: Linux 5.3 has pidfd_open",
        "membarrier": "sleeping ranks look up every millisecond: Linux 4.16 has it, and seccomp must allow it",
        "futex": "ranks can not sleep while they wait: seccomp must allow it",
    }
    for name, cost in costs.items():
        if found.get(name):
            state = FAIL if name == "futex" else WARN
            yield Finding(state, name, f"{found[name]}: {cost.partition(': ')[0]}", cost.partition(": ")[2])
    if not any(found.get(name) for name in costs):
        yield Finding(OK, "kernel", f"{', '.join(name for name in costs if name in found)}: Linux {os.uname().release}")


def check_shm(ranks: int) -> Iterator[Finding]:
    """/dev/shm, and what dead programs have left there."""
    try:
        room = os.statvfs("/dev/shm")
    except OSError as error:
        yield Finding(WARN, "/dev/shm", f"{error.strerror}: only memfd is left", "mount -t tmpfs tmpfs /dev/shm")
        return
    free, size = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    text = f"{roughly(free)} of {roughly(size)} free"
    if not os.access("/dev/shm", os.W_OK):
        yield Finding(WARN, "/dev/shm", "it can not be written to: only memfd is left", "chmod 1777 /dev/shm")
    elif free < ranks * (16 << 20):
        text += f": too little for {count(ranks, 'rank')} where memory must have a name; torch and NCCL want it, too"
        yield Finding(WARN, "/dev/shm", text, "docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm")
    else:
        yield Finding(OK, "/dev/shm", f"{text}; memfd does not need it")
    left = leftovers(Path("/dev/shm"))
    if left:
        names = " ".join(str(path) for path in left)
        yield Finding(WARN, "leftovers", f"{count(len(left), 'object')} of dead programs", f"rm {names}")


def leftovers(folder: Path) -> list[Path]:
    """abccl's objects that no process of this user has mapped. A name goes as soon as all ranks have found it."""
    there = [path for path in folder.glob("abccl-*") if path.is_file()]
    if not there:
        return []
    maps = "\n".join(read(path) for path in Path("/proc").glob("[0-9]*/maps"))
    return [path for path in there if str(path) not in maps]
