"""Train a small character-level transformer on text that every machine with Python has, in several ways, and compare.

    torchrun --nproc-per-node 2 examples/train_text.py
    torchrun --nproc-per-node 2 examples/train_text.py --ways gloo,ddp,buckets --layers 6 --width 256 --steps 100

The text is the reference that Python's own `help()` prints, and the licences that lie beside it. The ways:

    gloo       DistributedDataParallel over Gloo
    ddp        DistributedDataParallel over abccl
    hook       the same with abccl.buckets.hook, which averages DDP's buckets
    after      GradientBuckets, all reductions after backward: the lecture's first option
    buckets    GradientBuckets, reductions while backward goes on: the lecture's second option
    partition  GradientBuckets, reduce_scatter in backward, all_gather in the next forward: Centauri's split
    int8       GradientBuckets, gradients as 8-bit integers with error feedback
    fsdp2      torch's fully_shard over abccl

All start from the same weights and see the same batches, so all but int8 must come to the same loss. Where the way can
tell: `alone` is what its reductions would take with nothing else going on, `flight` how long they were under way, and
`exposed` what a step waited for. With fewer cores than the ranks' threads and one more for each rank, communication
that runs beside backward takes its core, and there is nothing to win.
"""

import argparse
import json
import os
import pydoc_data.topics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from arguments import Help, positive
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import abccl

WAYS = ("gloo", "ddp", "hook", "after", "buckets", "partition", "int8", "fsdp2")
PLACES = [Path("/usr/share/common-licenses"), Path(pydoc_data.topics.__file__).parent.parent]
LEARNING_RATE = 1e-3


def corpus() -> Tensor:
    """The text as numbers of characters, those of ASCII."""
    topics = pydoc_data.topics.topics
    texts = [topics[name] for name in sorted(topics)]
    files = sorted({path for place in PLACES for path in place.glob("[A-Z]*") if path.is_file()})
    texts += [path.read_text(encoding="utf-8", errors="replace") for path in files if path.suffix in ("", ".txt")]
    return torch.tensor([byte for byte in "\n".join(texts).encode("ascii", "ignore") if byte < 128])


class Block(nn.Module):
    """Attention over what came before, and a wide layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.wide(self.norm2(x))


class Transformer(nn.Module):
    """Predicts each character from those before it."""

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.characters, self.places = nn.Embedding(128, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 32)) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def write(self, start: str, length: int) -> str:
        """Go on with a text."""
        generator = torch.Generator().manual_seed(0)
        text = torch.tensor([[ord(c) for c in start]])
        for _ in range(length):
            chances = torch.softmax(self(text[:, -self.context :])[0, -1] / 0.7, 0)
            text = torch.cat([text, torch.multinomial(chances, 1, generator=generator).view(1, 1)], 1)
        return "".join(map(chr, text[0].tolist()))


class Way:
    """How a model is trained: what is called for a forward, after backward, and to make a step."""

    def __init__(self, name: str, model: Transformer, gloo: dist.ProcessGroup, bucket_bytes: int | None) -> None:
        self.forward: nn.Module = model
        self.finish: Callable[[], None] = lambda: None
        self.buckets: abccl.buckets.GradientBuckets | None = None
        if name in ("after", "buckets", "partition", "int8"):
            self.buckets = abccl.buckets.GradientBuckets(
                model,
                abccl.init(),
                bucket_bytes or "auto",
                compress="int8" if name == "int8" else None,
                partition=name == "partition",
                overlap=name != "after",
            )
            self.finish = self.buckets.finish
            self.optimizer = self.buckets.optimizer(torch.optim.AdamW, lr=LEARNING_RATE)
            return
        if name == "fsdp2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for part in (*model.blocks, model):
                fully_shard(part, mesh=mesh)
        else:
            self.forward = DistributedDataParallel(model, process_group=gloo if name == "gloo" else None)
            if name == "hook":
                self.forward.register_comm_hook(None, abccl.buckets.hook)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


@contextmanager
def made(name: str, model: Transformer, gloo: dist.ProcessGroup, bucket_bytes: int | None):
    way = Way(name, model, gloo, bucket_bytes)
    try:
        yield way
    finally:
        if way.buckets is not None:
            way.buckets.close()


def train(name: str, text: Tensor, gloo: dist.ProcessGroup, options: argparse.Namespace) -> dict:
    """Train in one way; what came of it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Transformer(options.layers, options.width, options.context)
    generator = torch.Generator().manual_seed(1)
    losses, times = [], []
    with made(name, model, gloo, options.bucket_bytes) as way:
        for step in range(options.steps):
            # The whole batch on every rank, of which it takes its part: the same batches however many ranks there are.
            starts = torch.randint(len(text) - options.context - 1, (options.batch * size,), generator=generator)
            rows = torch.stack([text[at : at + options.context + 1] for at in starts[rank::size]])
            begin = time.perf_counter()
            guess = way.forward(rows[:, :-1])
            loss = nn.functional.cross_entropy(guess.flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            way.finish()
            way.optimizer.step()
            way.optimizer.zero_grad()
            times.append(time.perf_counter() - begin)
            mean = loss.detach().clone()
            dist.all_reduce(mean, dist.ReduceOp.AVG)
            losses.append(mean.item())
            if rank == 0 and sys.stderr.isatty():
                print(f"\r{name}: step {step + 1} of {options.steps}, loss {losses[-1]:.4f} ", end="", file=sys.stderr)
        # The first step only shows the order of gradients.
        report = way.buckets.report() if way.buckets is not None and options.steps > 1 else None
        if way.buckets is not None:
            way.buckets.gathered()
    if rank == 0 and sys.stderr.isatty():
        print(file=sys.stderr)
    tail = times[len(times) // 3 :]
    result = {"way": name, "losses": losses, "step": median(tail), "characters": options.batch * size * options.context}
    if report is not None:
        result |= {"communication": report.communication, "in_flight": report.in_flight, "exposed": report.exposed}
        if rank == 0 and options.reports:
            print(f"\n{name}\n{report}")
    if rank == 0 and options.write and name != "fsdp2":
        print(f"\n{name} writes: {model.write('The Python ', options.write)!r}")
    return result


def table(results: list[dict]) -> str:
    lines = [
        f"{'way':10} {'loss':>8} {'ms/step':>9} {'chars/s':>9} {'alone ms':>9} {'flight ms':>9} {'exposed ms':>10}"
    ]
    for result in results:
        cells = [f"{1e3 * result[key]:9.2f}" if key in result else f"{'':9}" for key in ("communication", "in_flight")]
        exposed = f"{1e3 * result['exposed']:10.2f}" if "exposed" in result else ""
        speed = result["characters"] / result["step"]
        lines.append(
            f"{result['way']:10} {result['losses'][-1]:8.4f} {1e3 * result['step']:9.2f} {speed:9.0f} "
            f"{cells[0]} {cells[1]} {exposed}".rstrip()
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--ways", default=",".join(WAYS), help="which of them, in this order")
    parser.add_argument("--steps", type=positive, default=60, help="of each way")
    parser.add_argument("--batch", type=positive, default=4, help="texts of a step, on each process")
    parser.add_argument("--context", type=positive, default=64, help="characters of a text")
    parser.add_argument("--layers", type=positive, default=4, help="blocks of the transformer")
    parser.add_argument("--width", type=positive, default=256, help="of the transformer, a multiple of 32")
    parser.add_argument("--bucket-bytes", type=positive, help="of GradientBuckets, which measure if not told")
    parser.add_argument("--write", type=int, default=0, metavar="N", help="let each model write N characters")
    parser.add_argument("--reports", action="store_true", help="print what GradientBuckets reports of each bucket")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    options = parser.parse_args()
    ways = options.ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--ways are some of {','.join(WAYS)}, and {unknown[0]!r} is none")
    if options.width % 32:
        parser.error(f"--width must be a multiple of 32, and is {options.width}")
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it by torchrun: torchrun --nproc-per-node 2 examples/train_text.py")

    dist.init_process_group("abccl")
    gloo = dist.new_group(backend="gloo")
    text = corpus()
    if dist.get_rank() == 0:
        count = sum(p.numel() for p in Transformer(options.layers, options.width, options.context).parameters())
        print(f"{len(text):,} characters of text, a model of {count:,} parameters, {dist.get_world_size()} processes")
    results = [train(name, text, gloo, options) for name in ways]
    exact = [result for result in results if result["way"] != "int8"] or results
    reference = exact[0]["losses"]
    equal = all(abs(a - b) <= 1e-3 * abs(b) for result in exact for a, b in zip(result["losses"], reference))
    near = all(abs(result["losses"][-1] - reference[-1]) <= 0.05 * reference[-1] for result in results)
    if dist.get_rank() == 0:
        print(table(results))
        print(
            f"losses equal to 0.1 %: {'yes' if equal else 'no'}; int8 within 5 % at the end: {'yes' if near else 'no'}"
        )
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    time.sleep(0.1)  # Gloo (not abccl) may hang in its destructor while a thread of its own still frees a tensor
    dist.destroy_process_group()
    return 0 if equal and near else 1


if __name__ == "__main__":
    sys.exit(main())
