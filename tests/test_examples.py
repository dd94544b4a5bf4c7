"""The examples as a user starts them, small: what they compute is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch_programs import example, python

pytestmark = [pytest.mark.torch, pytest.mark.timeout(170)]


def test_train_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    report = tmp_path / "digits.json"
    printed = example(tmp_path, "train_digits.py", "--backend", "abccl,gloo", "--epochs", 3, "--json", report)
    assert "losses equal to 5 digits: yes" in printed
    ours, theirs = json.loads(report.read_text())
    assert (ours["backend"], theirs["backend"]) == ("abccl", "gloo")
    assert ours["accuracy"] == theirs["accuracy"] > 0.5
    assert len(re.findall(r"epoch +\d+ +loss", printed)) == 6


def test_tensor_parallel(tmp_path: Path) -> None:
    rows, width, hidden = 24, 12, 48
    report = tmp_path / "report.json"
    sizes = ["--rows", rows, "--width", width, "--hidden", hidden, "--steps", 1]
    asked = ["--grid", "2,2", "--grid", "1,1,3"]
    printed = example(tmp_path, "tensor_parallel.py", *asked, *sizes, "--json", report, launch=python)
    assert "agree with one process to 0.0001: yes" in printed

    found = json.loads(report.read_text())
    assert {tuple(one["grid"]) for one in found} == {(1, 1, 1), (2, 2, 1), (1, 1, 3)}
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


def test_decode(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    printed = example(tmp_path, "decode.py", "--quick", "--json", report)
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


def test_train_text(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    small = ["--layers", 1, "--width", 32, "--steps", 8, "--write", 5, "--reports"]
    printed = example(tmp_path, "train_text.py", *small, "--json", report)
    assert "losses equal to 0.1 %: yes; int8 within 5 % at the end: yes" in printed
    assert printed.count("predicted exposed") == 4

    found = {one["way"]: one for one in json.loads(report.read_text())}
    assert set(found) == {"gloo", "ddp", "hook", "after", "buckets", "partition", "int8", "fsdp2"}
    for one in found.values():
        assert len(one["losses"]) == 8 and one["losses"][-1] < one["losses"][0]
    assert found["int8"]["losses"] != found["buckets"]["losses"]
    assert {way for way, one in found.items() if "exposed" in one} == {"after", "buckets", "partition", "int8"}
