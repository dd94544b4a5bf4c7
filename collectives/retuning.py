"""Tuning a communicator's ranks at leisure, and keeping what was found for all communicators of such ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..algorithms import Collective
from ..transports import Transport
from ..transports.topology import Exchange
from .tuner import store
from .tuner.agreement import from_rank_0
from .tuner.calibrate import BUDGET, calibrate
from .tuner.candidates import Place
from .tuner.table import Table
from .tuner.tune import Trial, Wish, trials, with_trials
from .tuning import carriers, kept_table, key_of, link_now, link_of, measuring

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

    def drops(self, trial: Trial) -> None:
        """They were, but the cores had moved meanwhile: it is not kept."""

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
            if link_now(transport, exchange) == link:
                found.append(trial)
                listener.has(trial)
            else:
                listener.drops(trial)
    file: Path | None = None

    def kept() -> dict[str, Any]:
        nonlocal file
        key = key_of(place, link, carriers(transport))
        content = with_trials(table, found, kept_table(key)).to_json()
        file = store.save(key, content) if keeps else None
        return content

    table = Table.from_json(from_rank_0(transport.rank, exchange, kept))
    listener.ends(table, link, file)
    return table
