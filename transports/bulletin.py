"""Where ranks are that share no memory with this one: for reports of what stands still.

A bulletin tells the ranks of other hosts how far each rank is in its collectives. On a store of torch's each writes it
from time to time, and who wants to know reads it, also when the writer is dead (`store_bulletin.py`). Elsewhere a rank
asks the others by messages (`asking_bulletin.py`).

One thread of the process serves all its bulletins, as long as there are any. It never waits for a peer. It may have to
wait for the store, whose client knows no deadline: so whoever asks, asks the thread, and waits no longer than PATIENCE.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from ..errors import PeerLost

PATIENCE = 2.0
"""Seconds that an answer may take."""

PERIOD = 1.0
"""Seconds between two looks at a rank that is followed."""

SOON = 0.005
"""Seconds between looks for the answers to an open question."""

MOST = 64
"""Of how many ranks an account tells at most that they have not come."""

TEXT = 400
"""Characters of a text that travel."""


class Status(NamedTuple):
    """How far a rank is in its collectives: what `position` of the native core says there.

    Attributes:
        entered, finished: how many collectives it has entered and finished.
        closed: whether its communicator is.
        last: what it entered last, in words.
        ago: seconds since it finished that, by the clocks of both hosts; None if it is not known.
        waiting: what it waits for, in words; None if it does not wait.
    """

    entered: int
    finished: int
    closed: bool
    last: str
    ago: float | None
    waiting: str | None


def status_from(said: dict[str, Any], age: float = 0.0) -> Status:
    """What a rank has said, so many seconds ago."""
    ended, waiting = said["ended"], said["waiting"]
    return Status(
        int(said["entered"]),
        int(said["finished"]),
        bool(said["closed"]),
        str(said["last"]),
        None if ended is None else float(ended) + age,
        None if waiting is None else str(waiting),
    )


class Own(NamedTuple):
    """What a bulletin needs of its communicator.

    Attributes:
        rank, size: of this rank, and how many there are.
        hosts: the name of each rank's host.
        position: tells how far this rank is: `position` of the native core.
        words: `status_words` of the native core.
        note: `note` of the native core, is told of the rank that is followed; "" when none is.
    """

    rank: int
    size: int
    hosts: Sequence[str]
    position: Callable[[], dict[str, Any]]
    words: Callable[[int, int, bool, str, float | None], str]
    note: Callable[[str], None]


class Question:
    """Where are these ranks? The bulletin's thread answers.

    Attributes:
        open: ranks of which nothing has come yet.
        found: what has come; None of a rank that says nothing.
        until: when who asks should stop waiting, of time.monotonic().
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self.open = set(ranks)
        self.found: dict[int, Status | None] = {}
        self.until = time.monotonic() + PATIENCE
        self._answered = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Wait for all answers, no longer than this; whether all have come."""
        return self._answered.wait(seconds)

    def take(self, found: dict[int, Status | None]) -> None:
        """These answers have come."""
        for rank in self.open & found.keys():
            self.found[rank] = found[rank]
            self.open.discard(rank)
        if not self.open:
            self._answered.set()

    def give_up(self) -> None:
        """No more will come."""
        self.take(dict.fromkeys(self.open))


class Bulletin(ABC):
    """One rank's end of a communicator's bulletin.

    Attributes:
        failed: why it knows nothing any more; empty if it does.
    """

    silence: ClassVar[str]
    """What there is to say of a rank that says nothing."""

    answers: ClassVar[bool]
    """Whether a rank that lives says something."""

    def __init__(self, own: Own) -> None:
        self.own, self.failed = own, ""
        self._closed = False
        self._questions: list[Question] = []
        self._followed: int | None = None
        self._following: Question | None = None
        self._next_look = 0.0
        # The collector may close this in the middle of a turn, in the thread that makes it.
        self._turning = threading.RLock()
        self._state = threading.RLock()  # of _closed, failed, _questions, _followed
        _clerk.look_after(self)

    def ask(self, ranks: Iterable[int]) -> Question:
        """Ask where these ranks are, not this one. From any thread."""
        question = Question(ranks)
        with self._state:
            if self._closed or self.failed:
                question.give_up()
            else:
                self._questions.append(question)
        _clerk.wake()
        return question

    def status_of(self, rank: int) -> Status | None:
        """Where the rank is; None if it does not say so within PATIENCE. From any thread."""
        question = self.ask([rank])
        question.wait(PATIENCE)
        return question.found.get(rank)

    def follow(self, rank: int | None) -> None:
        """Note from now on, every PERIOD, where this rank is, which this one waits for; None ends it. Cheap."""
        if rank == self._followed:
            return
        with self._state:
            self._followed, self._following, self._next_look = rank, None, 0.0
            if rank is None and not self._closed:
                self.own.note("")
        if rank is not None:
            _clerk.wake()

    def words(self, status: Status) -> str:
        """ "which has not entered #17 (last: ...)", seen from this rank's present collective."""
        return self.own.words(status.entered, status.finished, status.closed, status.last, status.ago)

    @property
    def unknown(self) -> str:
        """What there is to say of a rank of which nothing is known: "has not answered ..."."""
        return f"has told nothing, as {self.failed}" if self.failed else self.silence

    def place(self, rank: int) -> str:
        """ "on another host (h1)"; nothing if the rank is on this one."""
        hosts = self.own.hosts
        return "" if hosts[rank] == hosts[self.own.rank] else f"on another host ({hosts[rank]})"

    def close(self) -> None:
        """End it: nothing of the communicator is asked for after this. Idempotent."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._give_up()
        _clerk.forget(self)
        self._end()

    def turn(self) -> float:
        """For the thread: do what is to be done now; returns the seconds until there is more."""
        with self._turning:
            if self._closed or self.failed:
                return PERIOD
            try:
                return self._turn()
            except Exception as error:  # of the store, of MPI; and the thread serves other communicators, too
                with self._state:
                    self.failed = (str(error).splitlines() or [type(error).__name__])[0]
                    self._give_up()
                return PERIOD

    @abstractmethod
    def _tell(self) -> float:
        """Tell the others where this rank is, if that is due; returns the seconds until it may be again."""

    @abstractmethod
    def _look(self, ranks: set[int]) -> dict[int, Status | None]:
        """Ask where these ranks are, if that is not done yet; what has come. None: the rank says nothing."""

    def _end(self) -> None:
        """Give back what it holds. A turn may be under way."""
        return

    def _turn(self) -> float:
        pause, now = self._tell(), time.monotonic()
        with self._state:
            if self._followed is not None and self._following is None and now >= self._next_look:
                self._following = Question([self._followed])
                self._questions.append(self._following)
                self._next_look = now + PERIOD
            questions = list(self._questions)
        found = self._look(set().union(*(question.open for question in questions))) if questions else {}
        for question in questions:
            question.take(found)
        with self._state:
            self._questions = [question for question in self._questions if question.open]
            following = self._following
            if following is not None and not following.open and not self._closed:
                ((rank, status),) = following.found.items()
                self.own.note(self._note(rank, status))
                self._following = None
            return min(pause, SOON) if self._questions else pause if self._followed is None else min(pause, PERIOD)

    def _note(self, rank: int, status: Status | None) -> str:
        who = f"rank {rank}, {place}, " if (place := self.place(rank)) else f"rank {rank} "
        return f"{who}{self.words(status).removeprefix('which ')}" if status else f"{who}{self.unknown}"

    def _give_up(self) -> None:
        questions, self._questions = self._questions, []
        for question in questions:
            question.give_up()

    def _position(self) -> dict[str, Any] | None:
        """What this rank says of itself; None once it has closed."""
        with self._state:
            position = None if self._closed else self.own.position()
        return position and {key: value[:TEXT] if isinstance(value, str) else value for key, value in position.items()}


def account(
    bulletin: Bulletin, blame: str, awaited: int | None, distant: Iterable[int], meanwhile: Callable[[], None]
) -> str:
    """Why a run stands still: `blame`, and what is known of ranks that share no memory with this one.

    Args:
        blame: what the run waits for, in words; they end with the rank's name if that is `awaited`.
        awaited: the rank that it waits for, if that is one of these.
        distant: all of these.
        meanwhile: is called while answers are waited for; what it raises ends that.

    Raises:
        PeerLost: a rank that must answer does not.
    """

    def look(ranks: Iterable[int]) -> dict[int, Status | None]:
        question = bulletin.ask(ranks)
        while question.open and time.monotonic() < question.until and not question.wait(SOON):
            meanwhile()
        return {**dict.fromkeys(question.open), **question.found}

    number, text = bulletin.own.position()["entered"], blame
    if awaited is not None:
        status = look([awaited])[awaited]
        place = f"; that rank is {place}" if (place := bulletin.place(awaited)) else ""
        text += f", which {bulletin.unknown}{place}" if status is None else f", {bulletin.words(status)}{place}"
        if status is None and bulletin.answers and not bulletin.failed:
            raise PeerLost(text)
        if status is None or status.entered < number:
            return text
    # Whom it waits for has come, and itself waits for another.
    others = sorted(set(distant) - {awaited}, key=lambda rank: abs(rank - bulletin.own.rank))[:MOST]
    for rank, status in sorted(look(others).items()):
        who = f"; rank {rank}, {place}," if (place := bulletin.place(rank)) else f"; rank {rank}"
        if status is None and bulletin.answers and not bulletin.failed:
            raise PeerLost(f"{text}{who} {bulletin.unknown}")
        if status is not None and status.entered < number:
            text += f"{who} {bulletin.words(status).removeprefix('which ')}"
    return text


class _Clerk:
    """The thread that serves the bulletins of this process."""

    def __init__(self) -> None:
        self._bulletins: weakref.WeakSet[Bulletin] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._ending = False

    def look_after(self, bulletin: Bulletin) -> None:
        with self._lock:
            self._bulletins.add(bulletin)
            if self._thread is None and not self._ending:
                self._thread = threading.Thread(target=self._serve, name="abccl bulletin", daemon=True)
                self._thread.start()
                # Before the transports close, which are younger than this module: one of them the thread may drive.
                atexit.unregister(_end_at_exit)
                atexit.register(_end_at_exit)
        self.wake()

    def forget(self, bulletin: Bulletin) -> None:
        with self._lock:
            self._bulletins.discard(bulletin)
        self.wake()

    def wake(self) -> None:
        self._news.set()

    def end(self) -> None:
        """Before the interpreter ends: a thread that comes back into one that is no more ends the process badly."""
        self._ending = True
        self.wake()
        thread = self._thread
        if thread is not None:
            thread.join(PERIOD)

    def _serve(self) -> None:
        try:
            while self._go_on():
                bulletins = list(self._bulletins)
                pause = min((bulletin.turn() for bulletin in bulletins), default=0.0)
                del bulletins
                self._news.wait(pause)
                self._news.clear()
        except BaseException:
            with self._lock:
                self._thread = None  # whoever comes next starts another
            raise

    def _go_on(self) -> bool:
        """Whether there is anything to serve; else the thread is none from here on."""
        with self._lock:
            if self._ending or not self._bulletins:
                self._thread = None
            return self._thread is not None


_clerk = _Clerk()


def _begin_anew() -> None:
    """In a forked child, where the thread is not, and the communicators are the parent's."""
    global _clerk
    _clerk = _Clerk()


def _end_at_exit() -> None:
    _clerk.end()


os.register_at_fork(after_in_child=_begin_anew)
