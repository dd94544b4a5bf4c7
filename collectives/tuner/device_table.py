"""What the tuner takes messages between CUDA devices to cost, as long as nobody has measured them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from ...algorithms.model import NAMES
from ...transports.shm import PROTOCOLS
from .table import Table


@cache
def device_table(wire: str) -> Table:
    """The table of a device transport, by its name: estimates, whose origin the table tells."""
    told = json.loads((Path(__file__).parent / "device_table.json").read_text(encoding="utf-8"))[wire]
    row = tuple((float(told["constants"][name]),) for name in NAMES)
    return Table(told["origin"], (1 << 20,), dict.fromkeys(PROTOCOLS, row))
