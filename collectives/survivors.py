"""Which ranks go on after a loss: all survivors agree on one group, whatever dies meanwhile.

Ranks can not agree by messages alone when one of them may be slow or dead (Fischer, Lynch and Paterson 1985). They can
with a consensus object, such as compare-and-set in memory that outlives them (Herlihy 1991): the first value that is
given to a question is its answer for everybody, for ever. A `Board` has such questions. The agreement goes by epochs,
numbered alike on all ranks, of two questions each:

1. A rank writes on the board that it has come. It waits until each other rank has come, is lost, or is late.
2. It writes down who has come, its proposal. *Whose proposal holds?* is the first question: the first to answer wins.
3. The members of that proposal make their communicator. A member that has made it says that it is ready.
4. *Does it hold?* is the second question. "Yes" by a member that has seen all members ready; "no" by one that has lost
   a member, waited too long or failed. After "no" all throw away what they made and go to the next epoch.

Why it is right. A rank returns only if the second question of an epoch says yes, and goes to the next epoch only if it
says no; so at most one epoch says yes, and its group is the answer to its first question: no two ranks return different
groups. "Yes" is said only when all members are ready, so each member that lives has its communicator. It does not
matter whether a rank that is held for lost is so: a wrong suspicion leaves a rank out, and never makes two groups.

Why it ends. Each wait is for something that a named rank must do, and ends when it is seen to be lost, has given up, or
has not done it after `timeout` seconds. A failed epoch has lost or left out a rank, or has met an error that all ranks
see; there are EPOCHS of them at most.

What is not promised. A member may die just after the yes: then the new communicator has a dead rank, says so at its
first collective, and can shrink again. A rank that comes later than `timeout` after the first is left out, though it
lives: it raises `Aborted`. Nobody looks whether the processes are honest.

The board keeps the last two rounds of a rank. A member writes a round only when it has read the round before from all
members, so none that is still wanted is overwritten; what a rank can not find because its writer has gone on belongs to
a group without that rank, or to an epoch that is decided.

The agreement is written as generators that yield before each touch of the board: false, or true when there is nothing
to do but wait. So a test can run ranks step by step, in any order, and end them anywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Generic, Protocol, TypeVar

from ..errors import AbcclError, Aborted, CollectiveError, DeadlineExceeded, PeerLost
from .board import Board

EPOCHS = 256
"""Two questions each."""

ROUNDS = 1 << 20
"""Of an epoch, from (epoch + 1) * ROUNDS on: I have come, my proposal, then the members' exchanges."""

_LEFT = ROUNDS - 1  # the round of a rank that gave up

_NO, _YES, _ABORTED = 1, 2, 3  # answers to "does it hold?"; _ABORTED + rank: that rank called abort()

_HEAD = 8  # bytes that tell an exchange's length


class Closable(Protocol):
    """What the members make."""

    def close(self) -> None:
        """Give it back."""


M = TypeVar("M", bound=Closable)
T = TypeVar("T")
Steps = Generator[bool, None, T]


class Group:
    """The members of one epoch's proposal, in dense ranks, while they make their communicator.

    Attributes:
        members: the old ranks.
        rank, size: of this process among them.
    """

    def __init__(self, agreement: Agreement[M], epoch: int, members: Sequence[int]) -> None:
        self._agreement, self._board, self.epoch = agreement, agreement.board, epoch
        self.members = tuple(members)
        self.rank, self.size = self.members.index(self._board.rank), len(self.members)
        self._round = _first(epoch) + 2

    def exchange(self, data: bytes) -> Steps[list[bytes]]:
        """What every member gave. Longer blobs than the board takes are cut into rounds.

        Raises:
            PeerLost: a member is lost, or has given this epoch up.
            DeadlineExceeded: a member did not come in time.
            Aborted: abort() was called.
        """
        room, packed = self._board.room, len(data).to_bytes(_HEAD, "little") + data
        gathered = [bytearray() for _ in self.members]
        done, rounds = 0, 1
        while done < rounds:
            yield False
            self._board.publish(self._round, packed[done * room : (done + 1) * room])
            for index, member in enumerate(self.members):
                gathered[index] += yield from self._read(member)
            if done == 0:
                lengths = (_HEAD + int.from_bytes(blob[:_HEAD], "little") for blob in gathered)
                rounds = max(math.ceil(length / room) for length in lengths)
            self._round += 1
            done += 1
        return [bytes(blob[_HEAD:]) for blob in gathered]

    def _read(self, member: int) -> Steps[bytes]:
        """The member's blob of the present round."""
        agreement, until = self._agreement, self._agreement.deadline()
        while True:
            yield False
            _, blob = self._board.read(member, self._round)
            if blob is not None:
                return blob
            yield False
            if self._board.decided(_holds(self.epoch)) is not None:
                raise PeerLost(f"{agreement.who}: another rank has given this attempt to shrink up")
            yield False
            if self._board.lost(member):
                raise PeerLost(f"{agreement.who}: rank {member} was lost while the ranks shrank")
            agreement.check_aborted()
            if agreement.is_past(until):
                raise DeadlineExceeded(
                    f"{agreement.who} waited {agreement.timeout:g} s for rank {member}, which has come to shrink and "
                    f"does not go on"
                )
            yield True


class Agreement(Generic[M]):
    """One rank's part in the agreement.

    Args:
        board: what the ranks read of each other.
        build: makes the communicator of a group; what it raises of CollectiveError ends the epoch.
        timeout: seconds that each wait lasts at most.
        clock: in seconds.
    """

    def __init__(
        self,
        board: Board,
        build: Callable[[Group], Steps[M]],
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.board, self.timeout = board, timeout
        self.who = f"rank {board.rank} of {board.size}"
        self.is_aborted = False
        self._build, self._clock = build, clock
        self._epoch = 0
        self._refused: tuple[int, ...] | None = None  # the group whose communicator could not be made last time

    def steps(self) -> Steps[tuple[M, tuple[int, ...]]]:
        """Agree: what the build made, and the old ranks of its members.

        Raises:
            Aborted: abort() was called meanwhile; the others went on without this rank; or they had before.
            AbcclError: the communicator can not be made, for another reason than a loss.
        """
        for self._epoch in range(EPOCHS):
            answer = yield from self._decided(_holds(self._epoch))
            if answer is None:
                made, group, answer = yield from self._attempt()
                if made is not None and answer == _YES:
                    return made, group
                if made is not None:
                    made.close()
            if answer == _YES:
                raise Aborted(
                    f"{self.who} was left out: the others have shrunk their communicator without it. It came more "
                    f"than their timeout after them, or they took it for lost. End this process, or shrink earlier"
                )
            if answer >= _ABORTED:
                raise Aborted(f"{self.who}: rank {answer - _ABORTED} called abort() while the ranks shrank")
        raise DeadlineExceeded(f"{self.who}: {EPOCHS} attempts to shrink have failed: start the job anew")

    def leave(self) -> Steps[None]:
        """Give up, so that the others do not wait for this rank."""
        yield False
        self.board.decide(_holds(self._epoch), _NO)
        yield False
        self.board.publish(_first(self._epoch) + _LEFT, b"")

    def deadline(self) -> float:
        """When a wait that begins now ends."""
        return self._clock() + self.timeout

    def is_past(self, deadline: float) -> bool:
        """Whether it is."""
        return self._clock() >= deadline

    def check_aborted(self) -> None:
        """Raise Aborted if abort() was called in this process."""
        if self.is_aborted:
            raise Aborted(f"{self.who}: abort() was called while the ranks shrank")

    def _attempt(self) -> Steps[tuple[M | None, tuple[int, ...], int]]:
        """One epoch: what was made, for whom, and whether it holds."""
        epoch, board = self._epoch, self.board
        made: M | None = None
        group: tuple[int, ...] | None = None
        try:
            yield False
            board.publish(_first(epoch), b"")
            proposal = yield from self._gather()
            yield False
            board.publish(_first(epoch) + 1, _packed(proposal, board.size))
            yield False
            winner = board.decide(_whose(epoch), board.rank + 1) - 1
            group = yield from self._proposal(winner)
            if group is None or board.rank not in group:
                return None, (), (yield from self._outside(group))
            members = Group(self, epoch, group)
            made = yield from self._build(members)
            yield from members.exchange(b"")  # all are ready
            answer = _YES
        except Aborted:
            answer = _ABORTED + board.rank if self.is_aborted else _NO
        except CollectiveError:
            answer = _NO
        except AbcclError:
            # A network that a lost rank was part of fails so, too: once more, among those who are left.
            if group is None or group == self._refused:
                raise
            self._refused, answer = group, _NO
        yield False
        return made, group or (), board.decide(_holds(epoch), answer)

    def _gather(self) -> Steps[list[int]]:
        """Who has come. Not who is lost, gave up, or is late."""
        until = self.deadline()
        while True:
            came, missing = [], False
            for rank in range(self.board.size):
                yield False
                latest, _ = self.board.read(rank, _first(self._epoch))
                yield False
                if rank == self.board.rank:
                    came.append(rank)
                elif not _has_left(latest) and not self.board.lost(rank):
                    if latest >= _first(self._epoch):
                        came.append(rank)
                    else:
                        missing = True
            if not missing or self.is_past(until):
                return came
            for question in (_whose(self._epoch), _holds(self._epoch)):
                if (yield from self._decided(question)) is not None:
                    return came
            self.check_aborted()
            yield True

    def _proposal(self, winner: int) -> Steps[tuple[int, ...] | None]:
        """The group that the winner proposed; None if it can not be found, and then this rank is not in it."""
        yield False
        _, blob = self.board.read(winner, _first(self._epoch) + 1)
        return None if blob is None else _unpacked(blob)

    def _outside(self, group: tuple[int, ...] | None) -> Steps[int]:
        """For a rank that is not in the group: whether that holds."""
        others = [rank for rank in group or range(self.board.size) if rank != self.board.rank]
        until = self.deadline()
        while True:
            answer = yield from self._decided(_holds(self._epoch))
            if answer is not None:
                return answer
            alone = True
            for rank in others:
                yield False
                latest, _ = self.board.read(rank, 0)
                yield False
                alone = alone and (_has_left(latest) or self.board.lost(rank))
            if alone or self.is_past(until):
                yield False
                return self.board.decide(_holds(self._epoch), _NO)
            self.check_aborted()
            yield True

    def _decided(self, question: int) -> Steps[int | None]:
        yield False
        return self.board.decided(question)


def run(agreement: Agreement[M]) -> tuple[M, tuple[int, ...]]:
    """Take all the steps, and leave if one raises."""
    try:
        return drive(agreement.steps())
    except BaseException:
        drive(agreement.leave())
        raise


def drive(steps: Steps[T]) -> T:
    """Take all steps, and sleep where there is nothing else to do."""
    shortest, longest = 50e-6, 2e-3
    pause = shortest
    while True:
        try:
            waits = next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if waits:
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _first(epoch: int) -> int:
    return (epoch + 1) * ROUNDS


def _whose(epoch: int) -> int:
    return 2 * epoch


def _holds(epoch: int) -> int:
    return 2 * epoch + 1


def _has_left(latest: int) -> bool:
    return latest % ROUNDS == _LEFT


def _packed(ranks: Sequence[int], size: int) -> bytes:
    return sum(1 << rank for rank in ranks).to_bytes(size // 8 + 1, "little")


def _unpacked(blob: bytes) -> tuple[int, ...]:
    bits = int.from_bytes(blob, "little")
    return tuple(rank for rank in range(8 * len(blob)) if bits >> rank & 1)
