"""Serve a decoder on several processes, over abccl and over Gloo in turn: tensor-parallel decoding, then the KV state
of a prompt handed from a prefill rank to a decode rank.

    torchrun --nproc-per-node 2 examples/decode.py
    torchrun --nproc-per-node 4 examples/decode.py --batch 1,16 --tokens 32
    torchrun --nproc-per-node 2 examples/decode.py --quick                       # a few tokens, to see that it works

Decoding. Heads and MLP are split over all ranks. A block is parallel, as in GPT-J and PaLM (Chowdhery et al., arXiv
2204.02311): x + attention(norm(x)) + mlp(norm(x)). Both parts end in a partial sum over the ranks, so one all_reduce of
d_model elements for each sequence serves the block, where a block of two halves needs two. Token by token, the two
backends take turns, each with a KV cache of its own, and must choose the same tokens. Times are those of the slowest
rank. "all_reduce" is the median on the rank that waits least, "share" its part of all time, waiting included.

Handing over. Half of the ranks compute the KV cache of a prompt, and each sends its heads to its partner in the other
half, which goes on (Zhong et al., "DistServe", arXiv 2401.09670). The tokens must be those of ranks that did both.

What is real is d_model, 4096 as in GPT-J, and with it every message of decoding. Cut are (GPT-J's in brackets) the
blocks (28), the heads (16 of 256), the MLP (16384), the vocabulary (50400, and here the same on every rank) and the
weights, which are random. So the matrices of a block are as small as on one of very many ranks. All is float32: the
order in which a backend adds changes no token then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from arguments import Help, positive
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

PROMPT = 8
"""Tokens that decoding starts from."""


@dataclass(frozen=True)
class Shape:
    blocks: int = 8
    heads: int = 4
    head_dim: int = 64
    mlp: int = 512
    vocabulary: int = 256
    d_model: int = 4096


class Cache:
    """Keys and values of a rank's heads: [block, keys or values, sequence, head, position, head_dim]."""

    def __init__(self, shape: Shape, ranks: int, batch: int, positions: int) -> None:
        self.state = torch.zeros(shape.blocks, 2, batch, shape.heads // ranks, positions, shape.head_dim)
        self.length = 0


class Decoder:
    """A rank's share of the model: of each block all columns of its heads, and its part of the MLP."""

    def __init__(self, shape: Shape, positions: int, ranks: int = 1, rank: int = 0) -> None:
        self.shape, self.ranks = shape, ranks
        self.attention, self.mlp = shape.heads * shape.head_dim // ranks, shape.mlp // ranks
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=generator) * scale

        def into(width: int) -> Tensor:
            return normal(width, shape.d_model, shape.d_model**-0.5).chunk(ranks)[rank]

        def out_of(width: int) -> Tensor:
            return normal(shape.d_model, width, width**-0.5).chunk(ranks, 1)[rank]

        heads = shape.heads * shape.head_dim
        self.tokens, self.head = normal(shape.vocabulary, shape.d_model), normal(shape.vocabulary, shape.d_model)
        self.positions = normal(positions, shape.d_model)
        # One matrix into a block (queries, keys, values, MLP) and one out of it (attention, MLP).
        self.blocks = [
            (torch.cat([into(heads), into(heads), into(heads), into(shape.mlp)]), self._cat(out_of, heads, shape.mlp))
            for _ in range(shape.blocks)
        ]

    @staticmethod
    def _cat(out_of: Callable[[int], Tensor], *widths: int) -> Tensor:
        return torch.cat([out_of(width) for width in widths], 1)

    def step(self, tokens: Tensor, cache: Cache, all_reduce: Callable[[Tensor], None]) -> Tensor:
        """The next token of each sequence after these, [sequence, 1]; several at once only into an empty cache."""
        width, past, now = (self.shape.d_model,), cache.length, cache.length + tokens.shape[1]
        x = self.tokens[tokens] + self.positions[past:now]
        for (w_in, w_out), state in zip(self.blocks, cache.state):
            parts = linear(layer_norm(x, width), w_in).split([self.attention] * 3 + [self.mlp], -1)
            query, key, value = (part.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for part in parts[:3])
            state[0, :, :, past:now], state[1, :, :, past:now] = key, value
            keys, values = state[:, :, :, :now]
            attended = scaled_dot_product_attention(query, keys, values, is_causal=now - past > 1)
            both = linear(torch.cat([attended.transpose(1, 2).flatten(2), gelu(parts[3])], -1), w_out)
            all_reduce(both)
            x = x + both
        cache.length = now
        return linear(layer_norm(x[:, -1:], width), self.head).argmax(-1)

    def prompt(self, batch: int, length: int) -> Tensor:
        return torch.randint(self.shape.vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))


@dataclass
class Reduction:
    """all_reduce in a group, and how long it took."""

    group: dist.ProcessGroup
    seconds: list[float] = field(default_factory=list)

    def __call__(self, x: Tensor) -> None:
        start = time.perf_counter()
        dist.all_reduce(x, group=self.group)
        self.seconds.append(time.perf_counter() - start)


def decode(decoder: Decoder, groups: dict[str, dist.ProcessGroup], batch: int, count: int) -> tuple[list[dict], bool]:
    """Decode over each backend, token by token in turn; whether all chose the same tokens."""
    prompt = decoder.prompt(batch, PROMPT)
    reductions = {backend: Reduction(group) for backend, group in groups.items()}
    caches = {backend: Cache(decoder.shape, decoder.ranks, batch, PROMPT + count) for backend in groups}
    chosen = {backend: [decoder.step(prompt, caches[backend], reductions[backend])] for backend in groups}
    steps: dict[str, list[float]] = {backend: [] for backend in groups}
    for backend in groups:
        reductions[backend].seconds.clear()
    for _ in range(count):
        for backend in groups:
            dist.barrier()
            start = time.perf_counter()
            chosen[backend].append(decoder.step(chosen[backend][-1], caches[backend], reductions[backend]))
            steps[backend].append(time.perf_counter() - start)

    measured = []
    for backend in groups:
        slowest = torch.tensor(steps[backend])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        reducing = torch.tensor(reductions[backend].seconds)
        share = reducing.sum() / sum(steps[backend])
        dist.all_reduce(reducing, dist.ReduceOp.MIN)
        dist.all_reduce(share, dist.ReduceOp.AVG)
        p50, p99 = (slowest.quantile(part).item() * 1e3 for part in (0.5, 0.99))
        rate = batch * count / slowest.sum().item()
        one = {"batch": batch, "backend": backend, "tokens_per_second": rate, "p50_ms": p50, "p99_ms": p99}
        measured.append(one | {"all_reduce_us": reducing.median().item() * 1e6, "share": share.item()})
    first, second = (torch.cat(chosen[backend], 1) for backend in groups)
    return measured, agree(torch.equal(first, second))


def hand_over(shape: Shape, groups: dict[str, dist.ProcessGroup], length: int, count: int, rounds: int) -> dict:
    """Half of the ranks prefill and send, the other half receive and go on."""
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    halves = [dist.new_group(range(half)), dist.new_group(range(half, 2 * half))]
    all_reduce = Reduction(halves[rank // half])
    decoder = Decoder(shape, length + count, half, rank % half)

    # The decode ranks do the prompt as well, into a cache of their own, to compare with what they get.
    cache = Cache(shape, half, 1, length + count)
    start = time.perf_counter()
    first = decoder.step(decoder.prompt(1, length), cache, all_reduce)
    prefill = time.perf_counter() - start

    prefilled = cache.state[..., :length, :].contiguous()
    states, token, seconds = transfer(prefilled, first, groups, rounds)
    same = True
    if rank >= half:
        received = Cache(shape, half, 1, length + count)
        received.state[..., :length, :], received.length = states["abccl"], length
        ours, theirs = [first], [token]
        for _ in range(count):
            ours.append(decoder.step(ours[-1], cache, all_reduce))
            theirs.append(decoder.step(theirs[-1], received, all_reduce))
        intact = all(torch.equal(prefilled, state) for state in states.values())
        same = intact and torch.equal(torch.cat(ours, 1), torch.cat(theirs, 1))
    speed = {backend: prefilled.nbytes / taken / 1e9 for backend, taken in seconds.items()}
    return {"bytes": prefilled.nbytes, "prefill_seconds": prefill, "GB_per_second": speed, "same_tokens": agree(same)}


def transfer(
    state: Tensor, token: Tensor, groups: dict[str, dist.ProcessGroup], rounds: int
) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
    """Send the state, and the token that follows it, from each rank of the first half to its partner in the second.

    Returns the state that came over each backend, the token, and the seconds that the state took over each, the median
    of all rounds but the first.
    """
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    seconds: dict[str, list[float]] = {backend: [] for backend in groups}
    states = {backend: torch.zeros_like(state) for backend in groups}
    for _ in range(rounds + 1):
        for backend, group in groups.items():
            dist.barrier()
            start = time.perf_counter()
            if rank < half:
                dist.send(state, rank + half, group)
            else:
                dist.recv(states[backend], rank - half, group)
            seconds[backend].append(time.perf_counter() - start)
    if rank < half:
        dist.send(token, rank + half)
    else:
        token = torch.zeros_like(token)
        dist.recv(token, rank - half)
    medians = torch.tensor([statistics.median(seconds[backend][1:]) for backend in groups])
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    return states, token, dict(zip(groups, medians.tolist()))


def agree(true: bool) -> bool:
    """Whether it is so on all ranks."""
    flag = torch.tensor(int(true))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def say(text: str) -> None:
    """Print, on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def batches(text: str) -> list[int]:
    return [positive(word) for word in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--batch", type=batches, default="1,2,4,8,16", help="sequences at a time")
    parser.add_argument("--tokens", type=positive, default=100, help="decoded for each batch size and backend")
    parser.add_argument("--prompt", type=positive, default=1024, help="tokens whose KV state is handed over")
    parser.add_argument("--rounds", type=positive, default=15, help="times that it is, over each backend")
    parser.add_argument(
        "--quick", action="store_true", help="instead: 2 blocks, batch 1 and 4, 8 tokens, a prompt of 64"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=value, help="of the model")
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.batch, options.tokens, options.prompt, options.rounds = 2, [1, 4], 8, 64, 3
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})

    if "WORLD_SIZE" not in os.environ:
        parser.error("start it by torchrun: torchrun --nproc-per-node 2 examples/decode.py")
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks % 2 or shape.heads % ranks or shape.mlp % ranks:
        parser.error(
            f"the ranks must be even in number and divide --heads and --mlp, and are {ranks} for {shape.heads} heads "
            f"and an MLP of {shape.mlp}"
        )

    dist.init_process_group("abccl")
    groups = {"abccl": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}

    decoder = Decoder(shape, PROMPT + options.tokens, ranks, dist.get_rank())
    weights = sum(matrix.nbytes for matrices in decoder.blocks for matrix in matrices)
    say(f"decoding on {ranks} ranks, {shape.blocks} blocks, {weights / 1e6:.0f} MB of weights on each rank")
    say("  batch  backend   tokens/s    p50 ms    p99 ms   all_reduce us   share")
    results, same = [], True
    with torch.inference_mode():
        for batch in options.batch:
            measured, equal = decode(decoder, groups, batch, options.tokens)
            same &= equal
            for one in measured:
                say(
                    "{batch:7}  {backend:7}{tokens_per_second:11.1f}{p50_ms:10.2f}{p99_ms:10.2f}"
                    "{all_reduce_us:16.1f}{share:8.1%}".format(**one)
                )
            results += measured
        del decoder
        handed = hand_over(shape, groups, options.prompt, options.tokens, options.rounds)
    faster = [theirs["p50_ms"] / ours["p50_ms"] for ours, theirs in zip(results[::2], results[1::2])]
    say(f"abccl is {min(faster):.2f} to {max(faster):.2f} times as fast as gloo, by p50")
    say(f"both choose the same tokens: {'yes' if same else 'no'}")
    say(f"KV state of {options.prompt} tokens, prefilled in {handed['prefill_seconds']:.2f} s")
    for backend, speed in handed["GB_per_second"].items():
        say(f"  {handed['bytes'] / 1e6:.1f} MB over {backend:6}{speed:7.2f} GB/s")
    say(f"decode ranks go on with the tokens of ranks that did both: {'yes' if handed['same_tokens'] else 'no'}")
    if dist.get_rank() == 0 and options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"decode": results, "same_tokens": same, "hand_over": handed}, file, indent=1)
    dist.destroy_process_group()
    return 0 if same and handed["same_tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
