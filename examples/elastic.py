"""Train on handwritten digits, lose a process in the middle of a step, and go on with the others.

    python examples/elastic.py --ranks 4 --lose 2 --at 57
    python examples/elastic.py --ranks 4 --lose 2 --at 57 --lose 0 --at 90
    mpirun --enable-recovery -n 4 python examples/elastic.py --lose 2 --at 57

The process is killed (SIGKILL) while its gradients are on their way. The others raise PeerLost, shrink to a new
communicator, and agree on the last finished step: who has finished most gives its parameters, its momentum and its
step's number to all. The batch of a step is the same whatever the number of ranks, which divide it among themselves:
so the training ends where it would have ended without the loss, but for rounding.

It is a small network in numpy, to show all of it; the 1797 images of 8 x 8 pixels come with scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import dataclass, field

import numpy as np
from arguments import Help, positive
from sklearn.datasets import load_digits

import abccl

LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_STEP_ID", "RANK")
HIDDEN, RATE, MOMENTUM = 64, 0.2, 0.9
SIZE = 65 * HIDDEN + (HIDDEN + 1) * 10
"""Of the parameters, one vector: two layers, each with its bias as the last row."""

Data = tuple[np.ndarray, np.ndarray]


@dataclass
class State:
    """All that a step changes, and what it was: each step that has finished, with its loss."""

    step: int = 0
    values: np.ndarray = field(default_factory=lambda: np.random.default_rng(1).normal(0, 0.1, SIZE))
    momentum: np.ndarray = field(default_factory=lambda: np.zeros(SIZE))
    finished: list[tuple[int, float]] = field(default_factory=list)


def digits() -> Data:
    """Images and labels."""
    bunch = load_digits()
    return bunch.data / 16, bunch.target


def batch_of(step: int, data: Data, size: int) -> Data:
    """The batch of a step, the same on all ranks, however many there are."""
    chosen = np.random.default_rng(step).choice(len(data[1]), size, replace=False)
    return data[0][chosen], data[1][chosen]


def gradients(values: np.ndarray, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of the sum of the losses of these images; behind them that sum."""
    first, second = values[: 65 * HIDDEN].reshape(65, HIDDEN), values[65 * HIDDEN :].reshape(HIDDEN + 1, 10)
    hidden = np.maximum(images @ first[:-1] + first[-1], 0)
    scores = hidden @ second[:-1] + second[-1]
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(chances[rows, labels]).sum()
    chances[rows, labels] -= 1
    back = (chances @ second[:-1].T) * (hidden > 0)
    parts = (images.T @ back, back.sum(0), hidden.T @ chances, chances.sum(0), loss)
    return np.concatenate([np.ravel(part) for part in parts])


def finish(state: State, total: np.ndarray, batch: int) -> None:
    """The end of a step, where the state changes. It waits for nobody."""
    state.momentum = MOMENTUM * state.momentum + total[:-1] / batch
    state.values = state.values - RATE * state.momentum
    state.step += 1
    state.finished.append((state.step, total[-1] / batch))


def train(steps: int, batch: int, deaths: list[tuple[int, int]]) -> bool:
    """Train, whoever dies. Whether what came of it is as it should be.

    Args:
        deaths: ranks, and the steps that they die in.
    """
    data, comm, state = digits(), abccl.init(), State()
    own, ranks, left = comm.rank, comm.size, np.arange(comm.size)  # ranks keep the names that they began with
    while state.step < steps:
        try:
            images, labels = batch_of(state.step + 1, data, batch)
            total = gradients(state.values, images[comm.rank :: comm.size], labels[comm.rank :: comm.size])
            if (own, state.step + 1) in deaths:
                comm.all_reduce(total, async_op=True)
                os.kill(os.getpid(), signal.SIGKILL)
            comm.all_reduce(total)
            finish(state, total, batch)
        except abccl.CollectiveError as error:
            print(f"rank {own}: {error}", file=sys.stderr, flush=True)
            before = left
            comm, left, lost_in = recover(comm, own, state)
            if comm.rank == 0:
                say_loss([name for name in before if name not in left], ranks, lost_in, comm.size, state.step + 1)
    right = prove(comm, state, data, steps, batch)
    comm.barrier()
    comm.close()
    return right


def recover(comm: abccl.Communicator, own: int, state: State) -> tuple[abccl.Communicator, np.ndarray, int]:
    """Go on with who is left, from the last step that any of them has finished.

    Returns:
        The new communicator, who is in it, and the step that not all had finished.
    """
    while True:
        broken, comm = comm, comm.shrink()
        broken.close()
        try:
            left, reached = np.empty(comm.size, np.int64), np.empty(comm.size, np.int64)
            comm.all_gather(left, np.array([own]))
            comm.all_gather(reached, np.array([state.step]))
            given = np.concatenate([state.values, state.momentum, [state.finished[-1][1] if state.step else 0.0]])
            comm.broadcast(given, root=int(reached.argmax()))
        except abccl.CollectiveError as error:  # another one has died: once more
            print(f"rank {own}: {error}", file=sys.stderr, flush=True)
            continue
        break
    if state.step < reached.max():  # by one: no step ends before all have begun it
        state.values, state.momentum = given[:SIZE].copy(), given[SIZE:-1].copy()
        state.step += 1
        state.finished.append((state.step, given[-1]))
    return comm, left, int(reached.min()) + 1


def say_loss(lost: list[int], ranks: int, lost_in: int, left: int, step: int) -> None:
    """What happened, for people."""
    who = (
        f"rank {lost[0]} of {ranks} was" if len(lost) == 1 else f"ranks {' and '.join(map(str, lost))} of {ranks} were"
    )
    go = "1 rank goes" if left == 1 else f"{left} ranks go"
    print(f"{who} lost in step {lost_in}; {go} on from step {step}: no finished step was lost", flush=True)


def prove(comm: abccl.Communicator, state: State, data: Data, steps: int, batch: int) -> bool:
    """Whether no step is missing, all ranks have the same parameters, and a training without losses has them, too."""
    everyone = np.empty((comm.size, SIZE))
    comm.all_gather(everyone, state.values)
    same = bool((everyone == everyone[0]).all())
    complete = np.array([[step for step, _ in state.finished] == list(range(1, steps + 1))])
    comm.all_reduce(complete, "band")
    alone = State()
    while alone.step < steps:
        finish(alone, gradients(alone.values, *batch_of(alone.step + 1, data, batch)), batch)
    difference = abs(alone.values - state.values).max()
    losses = [loss for _, loss in state.finished]
    if comm.rank == 0:
        print(
            f"steps 1 to {steps} finished, each once: {yes(complete[0])}\n"
            f"the same parameters on {comm.size} rank{'s' * (comm.size > 1)}: {yes(same)}\n"
            f"loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last\n"
            f"one process that nothing happens to gets the same parameters to {difference:.1e}",
            flush=True,
        )
    return bool(complete[0] and same and losses[-1] < losses[0] / 2 and difference < 1e-9)


def yes(value: object) -> str:
    return "yes" if value else "no"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--ranks", type=positive, default=4, help="processes, unless a launcher has started them")
    parser.add_argument("--steps", type=positive, default=120)
    parser.add_argument("--batch", type=positive, default=120, help="images of a step, on all ranks together")
    parser.add_argument("--lose", type=int, action="append", default=[], help="the rank to kill; may be repeated")
    parser.add_argument("--at", type=positive, action="append", default=[], help="the step to kill it in")
    options = parser.parse_args()
    if len(options.lose) != len(options.at):
        parser.error("each --lose needs its --at")
    arguments = (options.steps, options.batch, list(zip(options.lose, options.at)))
    if any(name in os.environ for name in LAUNCHERS):
        return 0 if train(*arguments) else 1
    outcomes = abccl.spawn(train, options.ranks, arguments, on_failure="continue")
    failed = [rank for rank, outcome in enumerate(outcomes) if isinstance(outcome, abccl.RankFailed)]
    for rank in failed:
        print(outcomes[rank])
    return 0 if failed == sorted(set(options.lose)) and all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
