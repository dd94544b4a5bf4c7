"""What the processes of tests/gpu do: the functions that test_cuda_ipc_gpu.py gives to `abccl.spawn`, and a program.

    python tests/gpu/ranks.py FOLDER RANK SIZE VICTIM WHEN

is a rank of a group of which one is killed; the others print as JSON what they got to know.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import numpy as np
from gpu.device import FAKE, Memory
from gpu.groups import PATIENCE, World, cuda_ipc

from abccl.algorithms import Collective, lookup
from abccl.transports import USER_TAGS, conformance
from abccl.transports.trial import Case, Trial

# ---- the conformance suite


def conform(sizes: tuple[int, ...]) -> dict[str, str]:
    """All checks, and what went wrong in each."""
    world = World()
    found = {}
    for check in conformance.CHECKS:
        begin = time.monotonic()
        more = (sizes,) if check is conformance.check_plans else ()
        try:
            check(world.make, PATIENCE, *more)
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc()
        if world.rank == 0:
            verdict = "FAILED" if found[check.__name__] else "passed"
            print(f"{check.__name__}: {verdict}, {time.monotonic() - begin:.1f} s", flush=True)
    world.close()
    return found


# ---- graphs


def replay(count: int, times: int) -> str:
    """Capture an all_reduce and replay it, every time on other data; what went wrong.

    The data of every replay is written, and its result kept, by copies on the same stream: the host waits once, at the
    end, so that replays follow each other as fast as they can.
    """
    world = World()
    driver, size, rank = world.driver, world.size, world.rank
    with world.make(size) as group:
        transport: Any = group.transports[rank]
        case = Case(lookup(Collective.ALL_REDUCE, "ring"), size, count, dtype="int32")
        trial = Trial(transport, case)
        nbytes = 4 * count
        kept = min(times, max(1, (64 << 20) // nbytes))  # results that are kept at a time
        inputs, results = (driver.allocate_pinned(kept * nbytes) for _ in range(2))
        view = {name: _words(at, kept * count).reshape(kept, count) for name, at in (("in", inputs), ("out", results))}
        with Memory(driver, nbytes) as source, Memory(driver, nbytes) as target:
            stream = transport.stream
            # The first run allocates memory, which can not be captured.
            trial.prepared.start(source.address, target.address).wait(time.monotonic() + PATIENCE)
            driver.begin_capture(stream)
            trial.prepared.start(source.address, target.address)
            graph = driver.end_capture(stream)
            wrong = ""
            for first in range(0, times, kept):
                some = range(first, min(times, first + kept))
                for place, number in enumerate(some):
                    view["in"][place] = _data(rank, number, count)
                for place in range(len(some)):
                    driver.copy(source.address, inputs + place * nbytes, nbytes, stream)
                    driver.launch_graph(graph, stream)
                    driver.copy(results + place * nbytes, target.address, nbytes, stream)
                driver.synchronize(stream)
                transport.progress()  # or what it has failed with
                for place, number in enumerate(some):
                    wanted = sum(_data(peer, number, count) for peer in range(size))
                    if not wrong and not np.array_equal(view["out"][place], wanted):
                        wrong = f"rank {rank}: replay {number} of {times} on {count} elements gave another sum"
            driver.destroy_graph(graph)
            # An ordinary run after them is as good as before.
            view["in"][0] = _data(rank, times, count)
            driver.copy(source.address, inputs, nbytes, stream)
            trial.prepared.start(source.address, target.address).wait(time.monotonic() + PATIENCE)
            driver.copy_now(results, target.address, nbytes)
            if not wrong and not np.array_equal(view["out"][0], sum(_data(peer, times, count) for peer in range(size))):
                wrong = f"rank {rank}: the run after the replays gave another sum"
        del trial
        world.exchange(b"")  # nobody unmaps what others still use
        for address in (inputs, results):
            driver.free_pinned(address)
    world.close()
    return wrong


def _words(address: int, count: int) -> Any:
    return np.frombuffer((ctypes.c_int32 * count).from_address(address), np.int32)


def _data(rank: int, number: int, count: int) -> Any:
    return np.arange(count, dtype=np.int32) * np.int32(rank + 1) + np.int32(7 * number)


# ---- lost peers


def lose(folder: str, rank: int, size: int, victim: int, when: str) -> dict[str, Any]:
    """Run all_reduces until the victim is killed: what this rank got to know, and that its stream is empty at last.

    Args:
        when: "waiting": the others' next run is enqueued and waits for the victim, which has not begun it. "running":
            the victim has just enqueued the run, too.
    """
    from gpu.device import make_driver, make_kernels
    from torch.distributed import FileStore

    from abccl.collectives.bootstrap import StoreBootstrap

    store = FileStore(os.path.join(folder, "store"), size)
    exchange = StoreBootstrap(store, rank, size, "lose", 2 * PATIENCE).exchange
    driver = make_driver()
    transport = cuda_ipc(rank, size, exchange, driver, make_kernels(driver))
    count = 100_000 if FAKE else 20_000_000
    trial = Trial(transport, Case(lookup(Collective.ALL_REDUCE, "ring"), size, count))
    for _ in range(3):
        trial.start().wait(time.monotonic() + PATIENCE)
        trial.verify()
    if rank == victim:
        if when == "running":
            trial.start()
        else:
            peers = [peer for peer in range(size) if peer != rank]
            waiting = [transport.post_recv(peer, USER_TAGS, memoryview(bytearray(1))) for peer in peers]
            transport.wait(waiting, time.monotonic() + PATIENCE)
        os.kill(os.getpid(), signal.SIGKILL)
    begin, error = time.monotonic(), None
    try:
        execution = trial.start()
        if when == "waiting":
            transport.wait([transport.post_send(victim, USER_TAGS, memoryview(b"x"))], time.monotonic() + PATIENCE)
        while True:
            execution.wait(time.monotonic() + PATIENCE)
            execution = trial.start()
    except Exception as raised:
        error = raised
    told = time.monotonic() - begin
    driver.synchronize_device()  # hangs if something still waits
    del trial, execution
    transport.close()
    driver.close_all()
    return {"error": type(error).__name__, "text": str(error), "seconds": told}


if __name__ == "__main__":
    print(json.dumps(lose(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])), flush=True)
