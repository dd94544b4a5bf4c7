"""Programs as users start them, by torchrun: the example, a restart after a crash, an end without goodbye."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import abccl

pytestmark = [pytest.mark.torch, pytest.mark.timeout(170)]
torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parent.parent

# Registered by hand: a checkout need not be installed for its tests.
REGISTERED = """
import os, sys
import torch, torch.distributed as dist
from abccl.collectives.torch.register import register
register()
"""

TRAINING = """
def steps(backend, count, start=0, save=None):
    "Losses of a model that every rank trains on its own half of the numbers, from the first step or a saved one."
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 1)
    if start:
        model.load_state_dict(torch.load(save))
    ddp = torch.nn.parallel.DistributedDataParallel(model, process_group=dist.new_group(backend=backend))
    losses = []
    for step in range(start, count):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(8, 4, generator=generator)
        loss = (ddp(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
        losses.append(loss.item())
        if save and dist.get_rank() == 0:
            torch.save(model.state_dict(), save)
    return losses
"""


def torchrun(*arguments: Any, options: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes by torchrun, with the package of this run."""
    package = str(Path(abccl.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=150,
    )


def program(folder: Path, *parts: str) -> Path:
    path = folder / "program.py"
    path.write_text("".join([REGISTERED, *parts]))
    return path


def test_elastic_restart(tmp_path: Path) -> None:
    """A worker dies in the first attempt; in the second both go on from the checkpoint as if nothing had been."""
    code = """
dist.init_process_group("abccl")
folder, attempt = sys.argv[1], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
save = f"{folder}/model.pt"
if attempt == 0:
    losses = steps("abccl", 3, save=save)
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(3)
    try:
        dist.all_reduce(torch.ones(1000))
    except RuntimeError as error:
        print(f"said: {type(error).__name__}\\n", end="", flush=True)
        raise
    sys.exit("the other one is dead, and all_reduce came to an end")
losses = steps("abccl", 6, start=3, save=save)
whole = steps("gloo", 6)
assert losses == whole[3:], (losses, whole)
print(f"attempt {attempt}: losses agree\\n", end="")
dist.destroy_process_group()
"""
    done = torchrun(program(tmp_path, TRAINING, code), tmp_path, options=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attempt 1: losses agree") == 2, done.stdout


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
