"""Programs as users start them, by torchrun: a restart after a crash, an end without goodbye, with hooks in use."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch_programs import program, torchrun

pytestmark = [pytest.mark.torch, pytest.mark.timeout(170)]
torch = pytest.importorskip("torch")

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
import abccl, numpy as np
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
    done = torchrun(program(tmp_path, code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("value 2.0") == 2


def test_hooks_end_with_the_program(tmp_path: Path) -> None:
    """No thread of theirs is left when the program is at its end."""
    code = """
import atexit, threading
atexit.register(lambda: print(f"left: {[t.name for t in threading.enumerate() if 'bucket' in t.name]}\\n", end=""))
import abccl.buckets
dist.init_process_group("abccl")
for state in None, abccl.buckets.HookState(compress="int8"):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model.register_comm_hook(state, abccl.buckets.hook)
    model(torch.ones(2, 4)).sum().backward()
print(f"began: {any('bucket futures' in t.name for t in threading.enumerate())}\\n", end="")
"""
    done = torchrun(program(tmp_path, "import atexit, threading\n", code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("began: True") == 2 and done.stdout.count("left: []") == 2, done.stdout
