"""The README's example of a new algorithm works as pasted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.ranks
def test_the_example_of_a_new_algorithm(root: Path, tmp_path: Path) -> None:
    readme = (root / "README.md").read_text()
    (tmp_path / "star.py").write_text(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0])
    (block,) = re.findall(r"```\n(abccl verify star.py.*?)```", readme, re.DOTALL)
    commands = [line.split("#") for line in block.strip().splitlines()]
    assert len(commands) == 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, promise in commands:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        if command.startswith(("abccl verify", "python")):
            assert done.stdout.strip() == promise.strip()
        if "show" in command:
            assert "Σa0-3" in done.stdout
    assert (tmp_path / "star.svg").read_text().startswith("<svg")
