"""A bulletin of messages: a rank asks, and the other's thread looks for questions from time to time, and answers.

A rank that does not answer is dead, stopped, or in code that keeps the interpreter's lock.
"""

from __future__ import annotations

import json
import time

from .bulletin import PATIENCE, Bulletin, Own, Status, status_from
from .contract import USER_TAGS, Request, Transport

LOOK = 0.2
"""Seconds between looks for questions."""

ANSWER_BYTES = 8192
"""The longest answer: its texts are cut, see `TEXT` of `bulletin.py`."""

_ASK, _ANSWER = USER_TAGS, USER_TAGS + 1


class AskingBulletin(Bulletin):
    """One rank's end.

    Args:
        network: a transport to all ranks, for this alone. Closed with it.
    """

    silence = (
        f"has not answered for {PATIENCE:g} s: it is dead, stopped, or in code that keeps the interpreter's lock; look "
        f"at its output"
    )
    answers = True

    def __init__(self, network: Transport, own: Own) -> None:
        self._network = network
        self._asked = {peer: self._expect(peer, _ASK, 1) for peer in range(own.size) if peer != own.rank}
        self._answers: dict[int, tuple[Request, bytearray]] = {}  # that are to come
        self._since: dict[int, float] = {}  # when they were asked for
        self._given_up: set[int] = set()  # whose answer, when it comes, is to an old question
        self._sending: list[tuple[Request, bytes]] = []
        super().__init__(own)

    def _tell(self) -> float:
        self._network.progress()
        for peer, (request, _) in self._asked.items():
            if request.done:
                self._asked[peer] = self._expect(peer, _ASK, 1)
                self._send(peer, _ANSWER, json.dumps(self._position()).encode())
        self._sending = [(request, data) for request, data in self._sending if not request.done]
        return LOOK

    def _look(self, ranks: set[int]) -> dict[int, Status | None]:
        now = time.monotonic()
        for peer in ranks - self._answers.keys():
            self._answers[peer], self._since[peer] = self._expect(peer, _ANSWER, ANSWER_BYTES), now
            self._send(peer, _ASK, b"?")
        self._network.progress()
        found: dict[int, Status | None] = {}
        for peer in ranks:
            request, data = self._answers[peer]
            if request.done:
                del self._answers[peer]
                if peer in self._given_up:
                    self._given_up.remove(peer)
                    continue  # it is asked again with the next look
                said = json.loads(bytes(data[: request.length]))
                found[peer] = said and status_from(said)
            elif now > self._since[peer] + PATIENCE:
                found[peer] = None
                self._given_up.add(peer)
        return found

    def _end(self) -> None:
        if self._turning.acquire(timeout=PATIENCE):  # one thread at a time drives the network
            try:
                self._network.close()
            finally:
                self._turning.release()

    def _expect(self, peer: int, tag: int, nbytes: int) -> tuple[Request, bytearray]:
        data = bytearray(nbytes)
        request = self._network.post_recv(peer, tag, memoryview(data))
        request.standing = True
        return request, data

    def _send(self, peer: int, tag: int, data: bytes) -> None:
        self._sending.append((self._network.post_send(peer, tag, memoryview(data)), data))
