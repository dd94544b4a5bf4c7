"""What rank 0 makes and all ranks have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ...errors import AbcclError, ArgumentError
from ...transports.topology import Exchange


def from_rank_0(rank: int, exchange: Exchange, make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, as JSON has it. Collective.

    Raises:
        ArgumentError: on all ranks, if `make` has raised; an error that is not of this library on rank 0 as it is.
    """
    blob, failed = b"", None
    if rank == 0:
        try:
            told = {"made": make()}
        except AbcclError as error:
            told = {"error": f"rank 0: {error}"}
        except Exception as error:
            failed, told = error, {"error": f"rank 0: {type(error).__name__}: {error}"}
        blob = json.dumps(told).encode()
    told = json.loads(exchange(blob)[0])
    if failed is not None:
        raise failed
    if "error" in told:
        raise ArgumentError(told["error"])
    return told["made"]
