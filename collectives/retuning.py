"""Tuning a communicator's ranks at leisure, and keeping what was found for all communicators of such ranks."""

from __future__ import annotations

import json
from pathlib import Path

from ..algorithms import Collective
from ..transports import Transport
from ..transports.topology import Exchange
from .tuner import store
from .tuner.calibrate import BUDGET, calibrate
from .tuner.candidates import Place
from .tuner.table import Table
from .tuner.tune import Trial, Wish, trials, with_trials
from .tuning import carriers, key_of, link_of, measuring

PATIENT = 5
"""How many times as long as at first use the ranks calibrate, at most."""


class Listener:
    """Told on rank 0 what happens; this one does nothing. Nothing may run in the background between two calls."""

    def calibrates(self, doing: str) -> None:
        """The model's constants are being measured."""

    def works_on(self, collective: Collective, nbytes: int) -> None:
        """Candidates are being measured."""

    def has(self, trial: Trial) -> None:
        """They were."""

    def ends(self, table: Table, link: str, file: Path | None) -> None:
        """All was measured, between cores of that class, and is kept in the file, if it is."""


def retune(
    transport: Transport, place: Place, exchange: Exchange, wish: Wish, listener: Listener, keeps: bool = True
) -> Table:
    """Calibrate, measure the best candidates, and keep the table. Collective. The same table on all ranks.

    What earlier tuning has measured of other collectives and sizes stays in it. An error or an interrupt leaves the
    table that is kept as it is.

    Args:
        place: where the ranks are.
        exchange: an all-gather of blobs among them.
        keeps: whether rank 0 writes the table where communicators look for it.
    """
    link = exchange(link_of(transport).encode())[0].decode()
    budget = BUDGET * min(PATIENT, max(1.0, 50 * wish.seconds))
    with measuring(transport, place, link) as (stopwatch, everything):
        table = calibrate(stopwatch, everything, exchange, link, listener.calibrates, budget)
        found = []
        for trial in trials(stopwatch, everything, exchange, table, wish, listener.works_on):
            found.append(trial)
            listener.has(trial)
    blob, file = b"", None
    if transport.rank == 0:
        key = key_of(place, link, carriers(transport))
        before = store.load(key)
        content = with_trials(table, found, Table.from_json(before) if before else None).to_json()
        file = store.save(key, content) if keeps else None
        blob = json.dumps(content).encode()
    table = Table.from_json(json.loads(exchange(blob)[0]))
    listener.ends(table, link, file)
    return table
