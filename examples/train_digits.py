"""Train a small convolutional net on handwritten digits, on several processes.

    torchrun --nproc-per-node 2 examples/train_digits.py
    torchrun --nproc-per-node 2 examples/train_digits.py --backend gloo
    torchrun --nproc-per-node 2 examples/train_digits.py --backend abccl,gloo     # one after the other, and compares

The digits are the 1797 images of 8 x 8 pixels that come with scikit-learn: nothing is downloaded. Only the name of the
backend is abccl's: the rest is what any program for DistributedDataParallel does.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

BARS = "▁▂▃▄▅▆▇█"


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images and labels, to train on and to test with."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def train(backend: str, epochs: int, batch: int) -> dict:
    """Train from the same start; what came of it, the same on every rank."""
    torch.manual_seed(0)
    train_set, test_set = digits()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = DistributedSampler(train_set, seed=0)
    loader = DataLoader(train_set, batch_size=batch, sampler=sampler)

    losses, start = [], time.perf_counter()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(1)
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # averages the gradients of all processes
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / len(loader) / dist.get_world_size())
        say(f"  epoch {epoch + 1:2}  loss {losses[-1]:.5f}")
    seconds = time.perf_counter() - start

    mine = slice(dist.get_rank(), None, dist.get_world_size())
    images, labels = test_set.tensors
    with torch.no_grad():
        right = (model.module(images[mine]).argmax(1) == labels[mine]).sum()
    dist.all_reduce(right)
    accuracy = right.item() / len(labels)
    say(f"  loss {curve(losses)}  test accuracy {accuracy:.2%}, {seconds:.1f} s")
    return {"backend": backend, "losses": losses, "accuracy": accuracy, "seconds": seconds}


def curve(values: list[float]) -> str:
    """A line of bars."""
    low, high = min(values), max(values)
    return "".join(BARS[round((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in values)


def say(text: str) -> None:
    """Print, on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="abccl", help="abccl, gloo, or several to compare: abccl,gloo")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="images of a step, on each process")
    parser.add_argument("--json", metavar="FILE", help="write the losses there")
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it by torchrun: torchrun --nproc-per-node 2 examples/train_digits.py")
    rank = int(os.environ["RANK"])

    runs = []
    for backend in options.backend.split(","):
        if rank == 0:
            print(f"training on handwritten digits over {backend}", flush=True)
        dist.init_process_group(backend)
        runs.append(train(backend, options.epochs, options.batch))
        time.sleep(0.1)  # Gloo (not abccl) may hang in its destructor while a thread of its own still frees a tensor
        dist.destroy_process_group()
    if rank == 0 and options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(runs, file, indent=1)
    equal = all(f"{a:.5g}" == f"{b:.5g}" for run in runs for a, b in zip(run["losses"], runs[0]["losses"]))
    same = all(run["accuracy"] == runs[0]["accuracy"] for run in runs)
    if rank == 0 and len(runs) > 1:
        print(f"losses equal to 5 digits: {'yes' if equal else 'no'}; test accuracy equal: {'yes' if same else 'no'}")
    return 0 if equal and same else 1


if __name__ == "__main__":
    sys.exit(main())
