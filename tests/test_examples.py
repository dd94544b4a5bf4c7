"""The examples as a user starts them, small: what they compute is right. (train_digits.py is in test_ddp.py.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import abccl

pytestmark = pytest.mark.torch

REGISTERED = """
import runpy, sys
from abccl.collectives.torch.register import register
register()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*arguments: Any) -> str:
    """What a Python program printed; it must succeed. A checkout need not be installed for that."""
    path = [str(Path(abccl.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tensor_parallel(root: Path, tmp_path: Path) -> None:
    rows, width, hidden = 24, 12, 48
    report = tmp_path / "report.json"
    sizes = ["--rows", rows, "--width", width, "--hidden", hidden, "--steps", 1]
    asked = ["--grid", "2,2", "--grid", "3,1,1", "--grid", "1,2,2"]
    printed = start(root / "examples" / "tensor_parallel.py", *asked, *sizes, "--json", report)
    assert "agree with one process to 0.0001: yes" in printed

    found = json.loads(report.read_text())
    assert {tuple(one["grid"]) for one in found} == {(1, 1, 1), (2, 2, 1), (3, 1, 1), (1, 2, 2)}
    for one in found:
        x, y, z = one["grid"]
        assert one["error"] < 1e-5
        assert one["seconds"] > one["communication"]
        # As the example's docstring says; 4 bytes an element.
        assert one["bytes"] == {
            "x": 4 * 4 * (x - 1) * rows * width // (x * y * z),
            "y": 4 * 4 * (y - 1) * rows * hidden // (x * y * z),
            "z": 4 * 4 * (z - 1) * width * hidden // (x * y * z),
        }


def test_decode(root: Path, tmp_path: Path) -> None:
    report, program = tmp_path / "report.json", tmp_path / "registered.py"
    program.write_text(REGISTERED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    printed = start(*torchrun, program, root / "examples" / "decode.py", "--quick", "--json", report)
    assert "both choose the same tokens: yes" in printed
    assert "decode ranks go on with the tokens of ranks that did both: yes" in printed

    found = json.loads(report.read_text())
    assert found["same_tokens"] is True and found["hand_over"]["same_tokens"] is True
    assert [(one["batch"], one["backend"]) for one in found["decode"]] == [
        (batch, backend) for batch in (1, 4) for backend in ("abccl", "gloo")
    ]
    for one in found["decode"]:
        assert one["tokens_per_second"] > 0 and one["p50_ms"] <= one["p99_ms"] and 0 < one["share"] < 1
    assert set(found["hand_over"]["GB_per_second"]) == {"abccl", "gloo"}


def test_train_text(root: Path, tmp_path: Path) -> None:
    report, program = tmp_path / "report.json", tmp_path / "registered.py"
    program.write_text(REGISTERED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    small = ["--layers", 1, "--width", 32, "--steps", 8, "--write", 5, "--reports"]
    printed = start(*torchrun, program, root / "examples" / "train_text.py", *small, "--json", report)
    assert "losses equal to 0.1 %: yes; int8 within 5 % at the end: yes" in printed
    assert printed.count("predicted exposed") == 4

    found = {one["way"]: one for one in json.loads(report.read_text())}
    assert set(found) == {"gloo", "ddp", "hook", "after", "buckets", "partition", "int8", "fsdp2"}
    for one in found.values():
        assert len(one["losses"]) == 8 and one["losses"][-1] < one["losses"][0]
    assert found["int8"]["losses"] != found["buckets"]["losses"]
    assert {way for way, one in found.items() if "exposed" in one} == {"after", "buckets", "partition", "int8"}
