"""An empty cache of the tuner's, for a test."""

from __future__ import annotations

from pathlib import Path

import pytest


def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory, in an environment that leaves all to the tuner. It is not there yet."""
    for name in ("ABCCL_ALGORITHM", "ABCCL_RULES", "ABCCL_TRANSPORT", "ABCCL_REPRODUCIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ABCCL_TUNER", "auto")
    monkeypatch.setenv("ABCCL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
