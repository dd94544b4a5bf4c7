"""`abccl algorithms`: the list, the document that holds all of them, and their small pictures."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from abccl.algorithms import Collective, algorithms, lookup, replay
from abccl.tools.catalogue import document, pictures
from abccl.tools.cli import main
from abccl.tools.sketch import sketch

SVG = "{http://www.w3.org/2000/svg}"
MOST_BYTES = 40_000


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["algorithms", *arguments], prog_name="abccl")


def test_the_document_is_current(root: Path) -> None:
    again = "write it again: abccl algorithms --write docs/algorithms.md"
    assert (root / "docs/algorithms.md").read_text(encoding="utf-8") == document("algorithms"), again
    there = {path.name: path.read_text(encoding="utf-8") for path in (root / "docs/algorithms").iterdir()}
    assert there == pictures(), again


def test_the_document_tells_of_every_algorithm(root: Path) -> None:
    sections = (root / "docs/algorithms.md").read_text(encoding="utf-8").split("\n### ")[1:]
    for section in sections:
        collective, name = section.splitlines()[0].split()
        a = lookup(Collective(collective), name)
        assert f"](algorithms/{collective}-{name}.svg)" in section
        assert all(f"Parameter `{parameter}`" in section for parameter, _ in a.parameters)
        assert all((r.told if r.told is not None else f"Wants {r.wants}.") in section for r in a.restrictions)
    ring = next(section for section in sections if section.startswith("all_reduce ring\n"))
    assert "[Patarasuk & Yuan 2009](references.md)" in ring
    assert "| steps | 2 | 4 | 8 | 14 | 30 | 126 |" in ring and "| sent | 1 | 4/3 | 8/5 | 7/4 |" in ring


@pytest.mark.parametrize(("collective", "name"), [(c, name) for c in Collective for name in algorithms(c)])
def test_every_algorithm_has_a_small_picture(collective: Collective, name: str) -> None:
    a = lookup(collective, name)
    for size in (1, 5, 8):
        if a.refusal(size):
            continue
        history = replay(a, size)
        text = sketch(history)
        picture = ElementTree.fromstring(text)
        lines = [path for path in picture.iter(f"{SVG}path") if "C" in path.get("d", "")]
        assert len(lines) == len(history.transfers)
        assert len(list(picture.iter(f"{SVG}circle"))) == size * (history.steps + 1)
        assert len(text.encode()) < MOST_BYTES


def test_the_list(tmp_path: Path) -> None:
    lines = run("all_reduce", "--ranks", "4").output.splitlines()
    ring = next(line for line in lines if "│ ring " in line)
    assert [cell.strip() for cell in ring.split("│")[1:6]] == ["all_reduce", "ring", "6", "3/2", "3/4"]
    assert any("knomial(radix=4)" in line for line in lines)
    assert not any("broadcast" in line.split("│")[1] for line in lines[3:-1])
    assert "did you mean all_reduce" in run("all_redce").output


def test_writing_removes_pictures_that_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "list.md"
    (tmp_path / "list").mkdir()
    (tmp_path / "list/all_reduce-gone.svg").write_text("")
    assert run("--write", str(path)).exit_code == 0
    assert path.read_text(encoding="utf-8") == document("list")
    assert {file.name for file in (tmp_path / "list").iterdir()} == pictures().keys()
    assert "leave out all_reduce" in run("all_reduce", "--write", str(path)).output
    assert "can not be written" in run("--write", str(path / "x.md")).output
