"""The figures of trees and rings: NCCL's constants, what is simulated with them, and what the document says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import abccl.tools.figures as command
from abccl.tools import trees_and_rings
from abccl.tools.figures_document import document, numbers, ratios
from abccl.tools.nccl import CENTRAL, FIRST, LAST, NODE, TABLES, Table, protocol, summit
from abccl.tools.trees_and_rings import FLAT, LARGE, NAMES, RING, SMALL, TREE, Figures, Point, busbw, figures, points

NODES = (1, 2, 16, 32)


@pytest.fixture(scope="module")
def found() -> Figures:
    return figures(NODES)


def seconds(name: str, nbytes: int, nodes: int, constants: Table) -> float:
    kind = "ring" if name == RING else "tree"
    return Point(name, nbytes, nodes, constants.row(kind, nodes, nbytes)).seconds


def test_nccl_takes_ll_for_little() -> None:
    assert protocol("ring", 6, SMALL) == protocol("tree", 24576, SMALL) == "LL"
    assert protocol("ring", 1023, LARGE) == "Simple"
    assert protocol("ring", 1024, LARGE) == "LL"
    assert [protocol("tree", 24576, nbytes) for nbytes in (256 << 10, (256 << 10) + 1, LARGE)] == [
        "LL",
        "Simple",
        "Simple",
    ]


@pytest.mark.parametrize("nodes", [2, 16, 64])
def test_latencies_are_those_of_the_formulas_in_the_source_of_nccl(nodes: int) -> None:
    """NCCL's own, with one hop of five between the sockets of a node and four within."""
    steps, levels = 2 * (NODE * nodes - 1), nodes.bit_length() - 1
    within = 1.8 * (4 * 0.52 + 1.0)
    for name, constants, us in (
        (RING, CENTRAL, 3.6 + steps * 0.9),
        (RING, FIRST, 6 * steps / 2),
        (TREE, CENTRAL, 4.4 + 2 * (4 * 0.5 + 1.0 + levels * 5.0)),
        (TREE, FIRST, 4 * 5 + 15 * levels),
        (TREE, LAST, 4.4 + 2 * (within + levels * 5.0)),
    ):
        assert seconds(name, SMALL, nodes, constants) == pytest.approx(us * 1e-6, rel=3e-3)


def test_the_rows_of_a_ring_over_nodes() -> None:
    assert CENTRAL.row("ring", 1, SMALL) != CENTRAL.row("ring", 2, SMALL)
    row = LAST.row("ring", 2, SMALL)
    assert (row.nvlink, row.pci, row.net) == pytest.approx((0.846, 1.8, 2.7))
    assert LAST.row("ring", 2, LARGE).nvlink == 3.4


def test_what_a_row_says_is_in_the_machine_and_what_it_does_not_say_is_left() -> None:
    machine = summit(CENTRAL.row("tree", 16, LARGE), LARGE)
    assert [level.alpha for level in machine.levels] == pytest.approx([6.1547e-6, 6.1547e-6, 6.3093e-6], rel=1e-4)
    assert [level.beta for level in machine.levels] == pytest.approx([1 / 12e9, 1 / 12e9, 1 / 6e9])
    links = machine.levels[-1].links
    assert links is not None and (links.number, links.capacity) == (2, pytest.approx(10.8e9))
    assert machine.most == 4608 * NODE


def test_a_table_that_says_the_same_is_not_simulated_twice() -> None:
    assert len(points(RING, SMALL, 16)) == len(TABLES) == 3
    assert len(points(TREE, LARGE, 16)) == 2
    assert len(points(FLAT, LARGE, 16)) == 1


def test_the_band_holds_the_central_line(found: Figures) -> None:
    for lines in found.values():
        for name in NAMES:
            line = lines[name]
            assert all(low <= central <= high for low, central, high in zip(line.low, line.central, line.high))
    assert found[SMALL][RING].low != found[SMALL][RING].high
    assert found[LARGE][TREE].low != found[LARGE][TREE].high


def test_rings_fall_behind_trees(found: Figures) -> None:
    ring, tree = found[SMALL][RING], found[SMALL][TREE]
    ratio = [a / b for a, b in zip(ring.central, tree.central)]
    assert ratio == sorted(ratio) and ratio[-1] > 3 * ratio[0]
    ring, tree = found[LARGE][RING], found[LARGE][TREE]
    assert ring.central[-1] > 1.3 * ring.central[1] and tree.central[-1] < 1.05 * tree.central[-2]


def test_no_ring_exceeds_the_nics_and_few_ranks_nearly_fill_them(found: Figures) -> None:
    rates = [busbw(nodes, LARGE, time) for nodes, time in zip(NODES, found[LARGE][RING].low)]
    assert all(rate < 24 for rate in rates)
    assert rates[1] > 22


def test_segments_that_are_not_walked_take_as_long_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seconds(TREE, LARGE, 64, CENTRAL)
    monkeypatch.setattr(trees_and_rings, "WIDE", 32)
    assert seconds(TREE, LARGE, 64, CENTRAL) == pytest.approx(whole, rel=0.02)


def test_the_document_says_what_was_found(found: Figures) -> None:
    text = document(found)
    ratio, least, most = ratios(found[SMALL])
    assert least < ratio < most
    assert f"**{ratio:.0f} times**" in text and f"{least:.0f} to {most:.0f} times" in text
    ring, tree = found[SMALL][RING], found[SMALL][TREE]
    us = [f"{1e6 * time:,.0f}" for time in (ring.central[2], ring.low[2], ring.high[2], tree.central[2])]
    assert f"| 96 | {us[0]} | {us[1]} to {us[2]} | 179 | {us[3]} |" in text
    slower = {**found, SMALL: {**found[SMALL], RING: ring._replace(central=(*ring.central[:-1], 1.0), high=(1.0,) * 4)}}
    assert f"**{1 / tree.central[-1]:.0f} times**" in document(slower)
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))


def test_bandwidths_in_the_table_are_those_of_the_times(found: Figures) -> None:
    line = found[LARGE][TREE]
    best, worst = busbw(16, LARGE, line.low[2]), busbw(16, LARGE, line.high[2])
    assert f"| {worst:.1f} to {best:.1f} | 19.8 |" in numbers(LARGE, found[LARGE])


def test_the_command_writes_pictures_and_the_section(
    found: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "figures", lambda times: found)
    path = tmp_path / "model.md"
    path.write_text("before\n<!-- part: trees-and-rings -->\n<!-- end of trees-and-rings -->\nafter\n")
    result = CliRunner().invoke(command.main, ["--write", str(path)])
    assert result.exit_code == 0, result.output
    assert document(found).strip() in path.read_text()
    pictures = sorted((tmp_path / "model").iterdir())
    assert [picture.read_bytes()[:4] for picture in pictures] == [b"\x89PNG"] * 2
    assert all(f"](model/{picture.name})" in path.read_text() for picture in pictures)
    assert CliRunner().invoke(command.main, []).output.strip() == document(found).strip()


def test_processes_give_the_times_in_the_order_of_the_points() -> None:
    wanted = [point for nodes in (4, 1, 2) for point in points(RING, SMALL, nodes)]
    assert command.in_processes(wanted) == [point.seconds for point in wanted]
