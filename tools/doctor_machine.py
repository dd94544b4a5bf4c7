"""What the machine allows: limits, cores, clocks; and what was measured on it before."""

from __future__ import annotations

import datetime
import os
import re
import resource
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..algorithms.words import count
from .doctor_checks import OK, WARN, Finding, ask, read, roughly


def check_limits(ranks: int) -> Iterator[Finding]:
    """Open files, processes, locked memory, and what the control group allows."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 64 + 8 * (ranks + 4)  # a communicator: a process handle for each peer, its memory; some communicators
    text = f"{_limit(files)} open files; some {wanted} are wanted by each of {count(ranks, 'rank')}"
    if 0 <= files < wanted:
        yield Finding(WARN, "files", text, f"ulimit -n {wanted if 0 <= most < 65536 else 65536}")
    else:
        yield Finding(OK, "files", text)
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limits = [_least(path / "pids.max" for path in groups("pids")), processes if os.geteuid() else None]
    allowed = min((limit for limit in limits if limit is not None and limit >= 0), default=-1)
    text = f"{_limit(allowed)} processes and threads"
    if 0 <= allowed < 32 * ranks:
        yield Finding(WARN, "processes", text, f"ulimit -u, or pids.max of the control group: {64 * ranks}, say")
    else:
        yield Finding(OK, "processes", text)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    fabric = os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband"))
    text = f"{roughly(locked) if locked >= 0 else 'unlimited'} of locked memory"
    if fabric and locked >= 0:
        remedy = "ulimit -l unlimited, also for what Slurm or ssh starts: the network card wants pages that stay"
        yield Finding(WARN, "locked", text, remedy)
    else:
        yield Finding(OK, "locked", text + ("" if fabric else "; shared memory wants none"))
    memory = _least(path / name for path in groups("memory") for name in ("memory.max", "memory.limit_in_bytes"))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory is not None and 0 <= memory < physical:
        text = f"the control group may use {roughly(memory)} of {roughly(physical)}; shared memory counts"
        yield Finding(WARN if memory < ranks << 28 else OK, "memory limit", text, "docker run --memory, memory.max")


def groups(controller: str) -> list[Path]:
    """The folders of this process's control group and of those around it, of version 2 or of a controller's of 1."""
    found: list[Path] = []
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = Path("/sys/fs/cgroup", *([controller] if controllers else []))
        inner = top / path.lstrip("/")
        found += [inner, *(one for one in inner.parents if one == top or top in one.parents)]
    return found


def _least(files: Iterable[Path]) -> int | None:
    """The least number in these files; "max", as none at all, is no limit."""
    return min((int(text) for file in files if (text := read(file)).isdigit()), default=None)


def quota() -> float | None:
    """So many processors' time the control groups allow; None if they do not limit it."""
    shares = []
    for path in groups("cpu"):
        old = (read(path / "cpu.cfs_quota_us"), read(path / "cpu.cfs_period_us"))
        words = read(path / "cpu.max").split() or old
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            shares.append(int(words[0]) / int(words[1]))
    return min(shares, default=None)


def _limit(number: int) -> str:
    return "unlimited" if number < 0 else f"{number:,}"


# ---- cores and clocks


def check_cores(ranks: int) -> Iterator[Finding]:
    """Cores against ranks, NUMA, threads of others' libraries, clocks."""
    allowed, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    share = quota()
    cores = allowed if share is None else min(allowed, share)
    text = f"{count(allowed, 'core')}" + (f" of {there}" if allowed < there else "")
    if share is not None and share < allowed:
        text += f", and the control group gives the time of {share:g}: whoever spins is stopped when it is used up"
        remedy = f"docker run --cpuset-cpus rather than --cpus, or at most {max(1, int(share))} ranks"
        yield Finding(WARN, "cores", text, remedy)
    elif ranks <= cores:
        yield Finding(OK, "cores", f"{text} for {count(ranks, 'rank')}")
    if ranks > cores:
        text = f"{count(ranks, 'rank')} on {cores:g} cores: a step takes as long as the scheduler takes to change ranks"
        remedy = f"{max(1, int(cores))} ranks; with --ranks {ranks} the last lines show what it costs"
        yield Finding(WARN, "cores", text, remedy)
    nodes = [path for path in Path("/sys/devices/system/node").glob("node[0-9]*") if read(path / "cpulist")]
    if len(nodes) > 1:
        remedy = "keep each rank on one: mpirun --map-by numa --bind-to core, torchrun --numa-binding, numactl"
        yield Finding(OK, "NUMA", f"{len(nodes)} nodes", remedy)
    yield from check_threads(ranks, int(cores))
    source = read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    if source and source not in ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page"):
        text = f"{source}: to read it is a system call, and each call is timed"
        yield Finding(WARN, "clock", text, "boot with tsc=reliable if the processor's counter is good")
    elif source:
        yield Finding(OK, "clock", source)
    governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor == "powersave" and read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver") != "intel_pstate":
        yield Finding(WARN, "governor", f"{governor}: cores stay slow", "cpupower frequency-set -g performance")


def check_threads(ranks: int, cores: int) -> Iterator[Finding]:
    """How many threads the ranks' libraries will start beside them."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    if not text:
        remedy = f"under mpirun or srun: export OMP_NUM_THREADS={max(1, cores // ranks)}"
        said = "OMP_NUM_THREADS is not set; abccl.spawn and torchrun set 1"
        yield Finding(OK, "threads", said, remedy if cores > 1 else "")
    elif text.isdigit() and int(text) * ranks > cores and int(text) > 1:
        said = f"OMP_NUM_THREADS={text} for each of {count(ranks, 'rank')} on {count(cores, 'core')}"
        yield Finding(WARN, "threads", said, f"export OMP_NUM_THREADS={max(1, cores // ranks)}")
    else:
        yield Finding(OK, "threads", f"OMP_NUM_THREADS={text}")


# ---- the tuner's tables


TABLE = """
from abccl.collectives.offline import offline_tuner
tell(told=offline_tuner(int(sys.argv[1])).table.told)
"""


def check_tables(ranks: int) -> Iterator[Finding]:
    """Whether what the tuner measures can be kept, and what was."""
    from ..collectives.tuner import store
    from ..errors import ArgumentError

    try:
        folder = store.directory()
    except ArgumentError as error:
        yield Finding(WARN, "cache", f"{error}", "else each program measures anew, for 2 s")
        return
    trouble = _unfit(folder)
    if trouble:
        remedy = "export ABCCL_CACHE_DIR to a folder of your own: else each program measures anew, for 2 s"
        yield Finding(WARN, "cache", f"{folder}: {trouble}", remedy)
    else:
        yield Finding(OK, "cache", f"{folder}")
    if ranks == 1:
        return
    asked = ask(TABLE, str(ranks))
    if "error" in asked:
        yield Finding(WARN, "table", asked["error"])
        return
    told, _, command = asked["told"].partition(": run ")
    dated = re.search(r"measured on (\d{4}-\d\d-\d\d)", told)
    if dated:
        age = (datetime.date.today() - datetime.date.fromisoformat(dated[1])).days
        told += f" ({count(age, 'day')} old)"
    remedy = f"run {command}, or let the first program measure" if command else ""
    yield Finding(OK, "table", f"for {count(ranks, 'rank')}: {told}", remedy)


def _unfit(folder: Path) -> str:
    """Why tables can not be kept there; empty if they can."""
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return f"{place} is no directory"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} can not be written to"
    status = place.stat()
    if place == folder and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        return f"it must belong to this user alone: its mode is {stat.S_IMODE(status.st_mode):04o}"
    return ""
