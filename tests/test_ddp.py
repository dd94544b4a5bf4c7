"""DistributedDataParallel over abccl: the same losses as over Gloo; and the example, as a user starts it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import abccl

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
dist = torch.distributed
nn = torch.nn

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4


class Net(nn.Module):
    """Several buckets' worth of parameters, a buffer that is broadcast, and a branch that may go unused."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32, sparse=sparse)
        self.norm = nn.BatchNorm1d(32)
        self.left, self.right = nn.Linear(32, 64), nn.Linear(32, 64)
        self.out = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 5))

    def forward(self, x: Any, branch: bool | None = None) -> Any:
        x = self.norm(self.embed(x).mean(1))
        both = self.left(x) + self.right(x) if branch is None else (self.left if branch else self.right)(x)
        return self.out(both)


def fp16(model: Any, group: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model.register_comm_hook(group, fp16_compress_hook)


def power_sgd(model: Any, group: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


# What DDP is asked for, beside a small bucket size.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "find_unused": {"find_unused_parameters": True, "branches": True},
    "no_sync": {"no_sync": True},
    "bucket_views": {"gradient_as_bucket_view": True},
    "one_bucket": {"bucket_cap_mb": 25},
    "sparse": {"sparse": True},
    "fp16": {"hook": fp16},
    # One bucket: with several, callbacks that wait for each other take all threads that Gloo has, and it hangs.
    "power_sgd": {"hook": power_sgd, "bucket_cap_mb": 25},
    "join": {"join": True},
}


def train(group: Any, setting: dict[str, Any]) -> list[float]:
    """Losses of a few steps, and a sum of the weights."""
    own = {"branches": False, "no_sync": False, "sparse": False, "hook": None, "join": False} | setting
    asked = {
        name: value for name, value in setting.items() if name not in ("branches", "no_sync", "sparse", "hook", "join")
    }
    torch.manual_seed(3)
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(
        Net(own["sparse"]), process_group=group, **({"bucket_cap_mb": 0.02} | asked)
    )
    if own["hook"]:
        own["hook"](model, group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    losses = []

    def step(number: int) -> None:
        x = torch.randint(0, 20, (16, 6), generator=generator)
        y = torch.randint(0, 5, (16,), generator=generator)
        branch = (number + rank) % 2 == 0 if own["branches"] else None
        loss = nn.functional.cross_entropy(model(x, branch), y)
        loss.backward()
        losses.append(loss.item())

    if own["join"]:
        with model.join():
            for number in range(STEPS + rank):
                step(number)
                optimizer.step()
                optimizer.zero_grad()
    else:
        for number in range(STEPS):
            if own["no_sync"]:
                with model.no_sync():
                    step(number)
            step(number)
            optimizer.step()
            optimizer.zero_grad()
    return [*losses, sum(float(p.detach().double().sum()) for p in model.parameters())]


def rank_main(path: str) -> dict[str, Any]:
    """One rank: each setting over both backends, and a compiled model; losses, or what went wrong."""
    from abccl.collectives.bootstrap import spawned
    from abccl.collectives.torch.register import register

    register()
    torch.set_num_threads(1)
    assert spawned is not None
    store = dist.FileStore(path, spawned.size)
    limit = timedelta(seconds=20)
    dist.init_process_group("abccl", store=store, rank=spawned.rank, world_size=spawned.size, timeout=limit)
    groups = {"abccl": dist.group.WORLD, "gloo": dist.new_group(backend="gloo", timeout=limit)}
    found: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        for backend, group in groups.items():
            try:
                found[f"{name} {backend}"] = train(group, setting)
            except BaseException as error:
                found[f"{name} {backend}"] = f"{type(error).__name__}: {error}"
    try:
        found["other shapes"] = train_of_other_shapes()
    except BaseException as error:
        found["other shapes"] = f"{type(error).__name__}: {error}"
    dist.destroy_process_group()
    return found


def train_of_other_shapes() -> str:
    """A parameter of another shape on one rank: DDP says so on some ranks; all raise, in time."""
    group = dist.new_group(backend="abccl", timeout=timedelta(seconds=3))
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 4 + dist.get_rank()), process_group=group)
        model(torch.ones(2, 3)).sum().backward()
    except RuntimeError:
        return "raised"
    return "went on"


def results(ranks: int) -> list[dict[str, Any]]:
    found = start(ranks)
    if isinstance(found, Exception):
        raise found
    return found


@cache
def start(ranks: int) -> Any:
    """What every rank found. An error is kept, or each test would start them all again."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        with tempfile.TemporaryDirectory() as folder:
            here = importlib.import_module("test_ddp")
            return abccl.spawn(here.rank_main, ranks, (f"{folder}/store",), timeout=100)
    except abccl.AbcclError as error:
        return error
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("name", SETTINGS)
def test_same_as_gloo(name: str) -> None:
    for found in results(2):
        ours, theirs = found[f"{name} abccl"], found[f"{name} gloo"]
        assert isinstance(theirs, list), theirs
        # Halves are rounded on the way, differently by different orders of adding.
        assert ours == pytest.approx(theirs, rel=1e-2 if name in ("fp16", "power_sgd") else 1e-5)


def test_other_shapes_on_one_rank() -> None:
    assert [found["other shapes"] for found in results(2)] == ["raised", "raised"]


def test_without_destroy(tmp_path: Path) -> None:
    """A program that just ends, with a future, a message and a thread's recv still open, ends well."""
    code = """
import threading
import abccl, numpy as np, torch, torch.distributed as dist
from abccl.collectives.torch.register import register
register()
dist.init_process_group("abccl")
x = torch.ones(1000)
dist.all_reduce(x, async_op=True).get_future().wait()
if dist.get_rank() == 0:
    pending = dist.irecv(x, 1)
    future = pending.get_future()
comm = abccl.init()
threading.Thread(target=comm.recv, args=(np.ones(1), 1 - comm.rank), daemon=True).start()
print(f"value {x[0].item()}\\n", end="")
"""
    (tmp_path / "program.py").write_text(code)
    done = torchrun(tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("value 2.0") == 2


def test_example(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    report = tmp_path / "digits.json"
    # Registered by hand: a checkout need not be installed for its tests.
    start = tmp_path / "start.py"
    start.write_text(
        "import runpy, sys\nfrom abccl.collectives.torch.register import register\nregister()\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    example = ROOT / "examples" / "train_digits.py"
    done = torchrun(start, example, "--backend", "abccl,gloo", "--epochs", "3", "--json", report)
    assert done.returncode == 0, done.stderr
    assert "losses equal to 5 digits: yes" in done.stdout
    ours, theirs = json.loads(report.read_text())
    assert (ours["backend"], theirs["backend"]) == ("abccl", "gloo")
    assert ours["accuracy"] == theirs["accuracy"] > 0.5
    assert len(re.findall(r"epoch +\d+ +loss", done.stdout)) == 6


def torchrun(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Two processes by torchrun, with the package of this run."""
    package = str(Path(abccl.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
