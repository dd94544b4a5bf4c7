"""The program of `make test-gpu`, on a machine without a GPU: what it says, what it keeps, and that its tests load."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gpu import checks, report
from gpu.checks import Check, run_check

from abccl.bench.document import write_part

GPU_TESTS = Path(__file__).parent / "gpu"
RUN = GPU_TESTS / "run.py"

DEVICE = {"fake": False, "name": "Some GPU", "architecture": "sm_90", "multiprocessors": 4, "uuid": "-", "devices": 1}


def load_run() -> ModuleType:
    """tests/gpu/run.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_run", RUN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def environment(**more: str) -> Mapping[str, str]:
    """Without what would make a fake driver of the GPU."""
    own = {name: value for name, value in os.environ.items() if name != "ABCCL_TEST_FAKE_CUDA"}
    return own | more


without_a_gpu = pytest.mark.skipif(has_driver(), reason="there is a GPU's driver on this machine")


@without_a_gpu
def test_without_a_gpu_it_says_so_and_gives_up_at_once() -> None:
    done = subprocess.run([sys.executable, str(RUN)], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "no GPU: the driver's libcuda.so.1 is not on this machine" in done.stderr


def test_what_is_not_installed_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run()
    monkeypatch.setattr(run, "_there", lambda module: module not in ("cupy", "ml_dtypes", "abccl.transports._native"))
    lacking = run.lacking(fake=True)
    assert [line.split(":")[0] for line in lacking] == ["no ml_dtypes", "no cupy", "no native core"]
    assert "abccl[test]" in lacking[0] and "abccl[cuda13]" in lacking[1] and "build_ext --inplace" in lacking[2]


def test_figures_of_a_fake_driver_are_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = load_run()
    monkeypatch.setenv("ABCCL_TEST_FAKE_CUDA", "1")
    monkeypatch.setattr(run, "lacking", lambda fake: [])
    assert run.main(["--write", str(tmp_path / "gpu.md")]) == 2
    assert not (tmp_path / "gpu.md").exists()


@without_a_gpu
def test_every_test_for_a_gpu_loads_and_is_skipped_with_a_reason() -> None:
    """Also where cupy and torch have no GPU: a mistake in an import would be found by nobody else."""
    settings = [word for setting in checks.PYTEST_SETTINGS for word in ("-o", setting)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-q",
        "-rs",
        *settings,
    ]
    done = subprocess.run(
        [*command, str(GPU_TESTS)],
        cwd=GPU_TESTS.parent.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert "skipped" in last and "passed" not in last and "error" not in last, done.stdout
    assert "SKIPPED" in done.stdout and "unconditional skip" not in done.stdout, done.stdout


# ---- checks that are stood in for


STAND_INS = {
    "passes": "print('all is well')",
    "fails": "print('wanted 3, came 4'); raise SystemExit(1)",
    "crashes": "import os; os.abort()",
    # A process of its own, as ranks are, holds the pipe and would live on.
    "hangs": """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])
        print('child', child.pid, flush=True)
        child.wait()
    """,
    "measures": """
        import json, os
        table = {"title": "A table", "columns": ["bytes", "ratio"], "rows": [["4 B", "0.91"]], "notes": ["A note."]}
        with open(os.environ["ABCCL_GPU_FIGURES"], "w") as file:
            json.dump({"showed": "a ratio of 0.91", "figures": [table]}, file)
    """,
}
TESTS = {
    "test_some": "import pytest\ndef test_a(): pass\n@pytest.mark.skip(reason='no second GPU')\ndef test_b(): pass\n",
    "test_wrong": "def test_a(): pass\ndef test_b(): assert 1 == 2\n",
    "test_skipped": "import pytest\n@pytest.mark.skip(reason='no second GPU')\ndef test_a(): pass\n",
    "test_broken": "import nothing_of_this_name\n",
}


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, Check]:
    """Checks by name, whose programs are written to a folder."""
    import textwrap

    found = {}
    for name, text in STAND_INS.items():
        file = tmp_path / f"{name}.py"
        file.write_text(textwrap.dedent(text))
        found[name] = Check(name, f"it {name}", file, 2 if name == "hangs" else 60, ())
    for name, text in TESTS.items():
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        found[name] = Check(name, name, file, 60)
    found["is_missing"] = Check("is_missing", "nothing", tmp_path / "none.py", 60)
    tool = ("no-such-tool", "--option")
    found["has_no_tool"] = Check("has_no_tool", "a tool's", tmp_path / "passes.py", 60, (), tool)
    return found


@pytest.mark.parametrize(
    ("name", "result", "showed"),
    [
        ("passes", "pass", "all is well"),
        ("fails", "FAIL", "exit status 1; the last line: wanted 3, came 4"),
        ("crashes", "CRASH", "ended by SIGABRT; the last line: no output"),
        ("measures", "pass", "a ratio of 0.91"),
        ("test_some", "pass", "1 passed, 1 skipped: no second GPU"),
        ("test_wrong", "FAIL", "1 passed, 1 failed; first test_b"),
        ("test_skipped", "left out", "0 passed, 1 skipped: no second GPU"),
        ("is_missing", "MISSING", "there is no none.py"),
        ("has_no_tool", "left out", "no-such-tool is not installed"),
    ],
)
def test_the_result_of_a_check(stand_ins: dict[str, Check], name: str, result: str, showed: str) -> None:
    found = run_check(stand_ins[name], dict(os.environ))
    assert (found.result, found.showed) == (result, showed), found.output
    assert bool(found.output) == (result in ("FAIL", "MISSING") and name != "is_missing")


def test_a_file_of_tests_that_does_not_load_fails(stand_ins: dict[str, Check]) -> None:
    found = run_check(stand_ins["test_broken"], dict(os.environ))
    assert found.result == "FAIL" and "nothing_of_this_name" in found.output


def test_a_check_that_hangs_is_ended_with_all_that_it_started(stand_ins: dict[str, Check]) -> None:
    found = run_check(stand_ins["hangs"], dict(os.environ))
    assert found.result == "HANG" and found.showed.startswith("not done after 2 s; the last line: child ")
    child = Path("/proc", found.showed.split()[-1], "stat")
    # Whoever inherits a killed orphan may take its time to reap it.
    assert not child.exists() or child.read_text().split()[2] == "Z"


def execute(names: list[str], stand_ins: dict[str, Check], **more: Any) -> int:
    status: int = load_run().execute([stand_ins[name] for name in names], DEVICE, dict(os.environ), **more)
    return status


def test_the_exit_status_the_table_and_the_json(
    stand_ins: dict[str, Check], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "gpu.json"
    assert execute(["passes", "fails", "measures", "has_no_tool"], stand_ins, json_file=file) == 1
    printed = capsys.readouterr().out
    for line in ("[2/4] fails: it fails; at most 60 s", "    wanted 3, came 4", "A table", "4 B    0.91", "A note."):
        assert line in printed.splitlines(), printed
    table = printed[printed.index("check ") :].splitlines()
    assert table[0].split() == ["check", "result", "seconds", "what", "it", "showed"]
    assert table[1].startswith("passes       pass      ") and table[1].endswith("all is well")
    kept = json.loads(file.read_text())
    assert kept["device"] == DEVICE and not kept["passed"] and kept["versions"]["python"]
    assert [check["result"] for check in kept["checks"]] == ["pass", "FAIL", "pass", "left out"]
    assert kept["checks"][1]["output"] == "wanted 3, came 4" and kept["checks"][0]["output"] == ""
    assert kept["checks"][2]["figures"][0]["rows"] == [["4 B", "0.91"]]
    assert execute(["passes", "measures", "has_no_tool"], stand_ins) == 0


@pytest.mark.parametrize("name", ["crashes", "is_missing"])
def test_what_proves_nothing_is_a_failure(stand_ins: dict[str, Check], name: str) -> None:
    assert execute(["passes", name], stand_ins) == 1


def test_output_is_shown_as_it_comes(stand_ins: dict[str, Check], capsys: pytest.CaptureFixture[str]) -> None:
    execute(["passes"], stand_ins, verbose=True)
    assert "    all is well" in capsys.readouterr().out.splitlines()


# ---- the document


def test_the_documents_part_is_replaced(root: Path, tmp_path: Path, stand_ins: dict[str, Check]) -> None:
    document = tmp_path / "gpu.md"
    before = (root / "docs" / "gpu.md").read_text(encoding="utf-8")
    document.write_text(before, encoding="utf-8")
    head, tail = before.split(f"<!-- part: {report.PART} -->")[0], before.split(f"<!-- end of {report.PART} -->")[1]
    for _ in range(2):
        assert execute(["passes", "measures"], stand_ins, document=document) == 0
        after = document.read_text(encoding="utf-8")
        assert after.startswith(head) and after.endswith(tail)
        assert after.count("| 4 B | 0.91 |") == after.count("Some GPU, sm_90") == after.count("### A table") == 1
    assert "2 of 2 checks passed." in after
    write_part(document, report.PART, before.split(f"<!-- part: {report.PART} -->")[1].split("<!-- end of")[0])
    assert document.read_text(encoding="utf-8") == before


def test_the_document_names_every_check(root: Path) -> None:
    text = (root / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert not [check.name for check in checks.CHECKS if f"`{check.name}`" not in text]
