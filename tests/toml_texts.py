"""Values as TOML writes them: for several files of tests."""

from __future__ import annotations

from datetime import date
from typing import Any


def in_toml(value: Any) -> str:
    """A value, or a key, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() or c in "()=-_., " else f"\\U{ord(c):08X}" for c in value) + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(in_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{in_toml(key)} = {in_toml(inner)}' for key, inner in value.items())}}}"
    return value.isoformat() if isinstance(value, date) else repr(value)
