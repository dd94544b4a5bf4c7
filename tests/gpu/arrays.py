"""What the processes of test_communicator_gpu.py do: a Communicator on cupy's arrays and torch's CUDA tensors.

With the fake driver cupy's arrays are stood in for, and torch's are on the CPU, which tries these functions only.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from gpu.device import FAKE, Memory, make_driver

import abccl

COUNTS = (0, 1, 5, 1000, 40_003) if FAKE else (0, 1, 5, 1000, 1_000_003, 20_000_000)


class Stand:
    """What stands for an array of cupy's."""

    device = SimpleNamespace(id=0)
    __cuda_array_interface__: dict[str, Any] = {}

    def __init__(self, interface: dict[str, Any], dtype: Any, memory: Memory) -> None:
        self.__cuda_array_interface__, self.dtype, self.memory = interface, dtype, memory


class Cupy:
    """cupy's arrays; with the fake driver, arrays in its memory that have what abccl asks of cupy's."""

    def __init__(self) -> None:
        if FAKE:
            from abccl.transports import device

            self.driver = make_driver()
            device.driver_of = lambda ordinal: self.driver
        else:
            self.of = __import__("cupy")

    def array(self, data: Any) -> Any:
        """numpy's array on the device."""
        if not FAKE:
            return self.of.array(data)
        memory = Memory(self.driver, data.nbytes)
        if data.nbytes:
            memory.write(data)
        interface = {"shape": data.shape, "typestr": data.dtype.str, "data": (memory.address, False), "version": 3}
        return Stand(interface, data.dtype, memory)

    def back(self, array: Any) -> Any:
        """On the host, once all that was enqueued on the current stream is done."""
        if not FAKE:
            return self.of.asnumpy(array)
        self.driver.synchronize(0)
        nbytes = array.__cuda_array_interface__["shape"][0] * array.dtype.itemsize
        return array.memory.read(nbytes).view(array.dtype) if nbytes else np.empty(0, array.dtype)

    def stream(self) -> Any:
        """A new stream, to be made the current one by `with`."""
        return self.of.cuda.Stream(non_blocking=True)


class Torch:
    """torch's CUDA tensors."""

    def __init__(self) -> None:
        import torch

        self.of, self.device = torch, "cpu" if FAKE else "cuda:0"

    def array(self, data: Any) -> Any:
        """See `Cupy.array`."""
        return self.of.from_numpy(np.array(data)).to(self.device)

    def back(self, array: Any) -> Any:
        """See `Cupy.back`."""
        return array.cpu().numpy()

    def stream(self) -> Any:
        """See `Cupy.stream`."""
        return self.of.cuda.stream(self.of.cuda.Stream())


LIBRARIES = {"cupy": Cupy, "torch": Torch}


def _data(rank: int, count: int, dtype: str) -> Any:
    return ((np.arange(count) * 7 + rank * 3) % 5).astype(dtype)


def _parts(rank: int, size: int, count: int, dtype: str) -> Any:
    """A part for each rank."""
    return np.concatenate([_data(rank + 10 * part, count, dtype) for part in range(size)])


def collectives(name: str) -> list[str]:
    """Every collective on some types and lengths; what was wrong."""
    library, comm = LIBRARIES[name](), abccl.init()
    rank, size = comm.rank, comm.size
    wrong = []

    def same(what: str, array: Any, wanted: Any) -> None:
        if not np.array_equal(library.back(array), wanted):
            wrong.append(f"rank {rank}: {what}")

    for dtype in ("float32", "float16", "float64", "int32", "int64", "uint8"):
        for count in COUNTS if dtype == "float32" else COUNTS[:4]:
            where = f"of {count} {dtype}"
            every = [_data(peer, count, dtype) for peer in range(size)]
            total = sum(every[1:], start=every[0])
            x = library.array(every[rank])
            comm.all_reduce(x)
            same(f"all_reduce {where}", x, total)
            x, out = library.array(every[rank]), library.array(np.zeros(count, dtype))
            comm.all_reduce(x, "max", out=out)
            same(f"all_reduce by max {where}", out, np.maximum.reduce(every))
            same(f"the input of all_reduce {where}", x, every[rank])
            out = library.array(np.zeros(size * count, dtype))
            comm.all_gather(out, x)
            same(f"all_gather {where}", out, np.concatenate(every))
            long = [_parts(peer, size, count, dtype) for peer in range(size)]
            out = library.array(np.zeros(count, dtype))
            comm.reduce_scatter(out, library.array(long[rank]))
            part = slice(rank * count, (rank + 1) * count)
            same(f"reduce_scatter {where}", out, sum((v[part] for v in long[1:]), start=long[0][part]))
            out = library.array(np.zeros(size * count, dtype))
            comm.all_to_all(out, library.array(long[rank]))
            same(f"all_to_all {where}", out, np.concatenate([v[part] for v in long]))
            x = library.array(every[rank])
            comm.broadcast(x, size - 1)
            same(f"broadcast {where}", x, every[size - 1])
    if size > 1 and (name == "cupy" or not FAKE) and "over cuda_ipc" not in str(comm.devices):
        wrong.append(f"rank {rank}: the transport is {comm.devices}")
    work = comm.all_reduce(x := library.array(_data(rank, 1000, "float32")), async_op=True)
    work.wait()
    same("all_reduce, asynchronous", x, sum(_data(peer, 1000, "float32") for peer in range(size)))
    comm.barrier()
    comm.close()
    return wrong


def streams(name: str) -> list[str]:
    """Work follows the caller's current stream: what came before is seen, what comes after sees the result."""
    library, comm = LIBRARIES[name](), abccl.init()
    wrong, count = [], 3_000_000
    total = sum(range(1, comm.size + 1))
    for number in range(20):
        with library.stream():
            x = library.array(np.zeros(count, np.float32))
            for _ in range(50):  # takes a while, so that who does not follow the stream is too early
                x += comm.rank + 1
            comm.all_reduce(x)
            y = x * 2
            came = library.back(y)
        if not (came == 100 * total).all():
            wrong.append(f"rank {comm.rank}: number {number} gave {came[came != 100 * total][:3]}")
    comm.barrier()
    comm.close()
    return wrong


def graph(times: int) -> str:
    """torch's CUDA graph with an all_reduce in it, replayed on changing data: how many elements were ever wrong."""
    import torch

    comm, count = abccl.init(), 100_000
    x = torch.zeros(count, device="cuda:0")
    number = torch.zeros((), device="cuda:0")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda:0")
    pattern = torch.arange(count, device="cuda:0") % 7

    def step() -> None:
        number.add_(1)
        torch.add(pattern * (comm.rank + 1), number, out=x)
        comm.all_reduce(x)
        wanted = pattern * sum(range(1, comm.size + 1)) + comm.size * number
        wrong.add_((x != wanted).sum())

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    side.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    for _ in range(times):
        captured.replay()
    torch.cuda.synchronize()
    comm.barrier()
    found = f"{int(number)} steps, {int(wrong)} wrong elements"
    comm.close()
    return found


def mixed() -> str:
    """A device's array and the host's in one call are refused before anything is sent."""
    library, comm = Cupy(), abccl.init()
    try:
        comm.all_reduce(library.array(np.zeros(5, np.float32)), out=np.zeros(5, np.float32))
        found = "nothing was raised"
    except abccl.ArgumentError as error:
        found = str(error)
    comm.barrier()
    comm.close()
    return found
