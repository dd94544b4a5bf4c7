"""The `abccl` command: verify, show, draw."""

from __future__ import annotations

import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

import abccl
from abccl.algorithms import Collective, lookup, registry, replay, schedule, to_collective
from abccl.algorithms.words import ranges
from abccl.tools.arguments import rank_numbers
from abccl.tools.cli import COMMANDS, main
from abccl.tools.draw import picture
from abccl.tools.frames import frames, letters

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _private_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone when it ends."""
    copies = {collective: dict(known) for collective, known in registry._registry.items()}
    monkeypatch.setattr(registry, "_registry", copies)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="abccl")


GOOD = '''
from abccl.algorithms import Collective, algorithm, power_of_two, recv, send

@algorithm(Collective.ALL_REDUCE)
def star_all_reduce(rank, size):
    """To rank 0 and back."""
    if rank == 0:
        yield [recv(peer, 0, reduce=True) for peer in range(1, size)]
        yield [send(peer, 0) for peer in range(1, size)]
    else:
        yield send(0, 0)
        yield recv(0, 0)

@algorithm(Collective.BARRIER, restrictions=[power_of_two])
def fussy_barrier(rank, size):
    others = [peer for peer in range(size) if peer != rank]
    yield [send(peer, rank) for peer in others] + [recv(peer, peer) for peer in others]
'''
BROKEN = GOOD.replace("yield recv(0, 0)", "pass")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    return path


def test_verify_prints_a_line_per_algorithm() -> None:
    result = run("verify", "--collective", "all_reduce", "--algorithm", "ring", "--ranks", "1-6,9")
    assert (result.exit_code, result.output) == (0, "all_reduce ring: 1-6, 9 ranks: ok\n")


def test_verify_takes_the_whole_library() -> None:
    result = run("verify", "--ranks", "1-2")
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert len(lines) == sum(map(len, registry._registry.values()))
    assert all(line.endswith(": 1-2 ranks: ok") for line in lines)


def test_verify_a_file_takes_that_file_only(good: Path) -> None:
    result = run("verify", good)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "all_reduce star: 1-40, 64 ranks: ok",
        "barrier fussy: 1-2, 4, 8, 16, 32, 64 ranks: ok",
    ]
    assert run("verify", good, "--ranks", 3, "--algorithm", "fussy").output == (
        "barrier fussy: wants a power of two ranks, not tried\n"
    )


def test_verify_refuses_with_the_message_of_replay(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    result = run("verify", path, "--ranks", 5)
    assert result.exit_code == 1
    assert "all_reduce star, 5 ranks: deadlock" in result.output
    assert "rank 0 waits at step 2 to send block 0 to rank 1 (which has ended)" in result.output


def test_verify_holds_declared_counts_to_account(tmp_path: Path) -> None:
    path = tmp_path / "dear.py"
    declared = "(Collective.ALL_REDUCE, counts=lambda p: Counts(1, 1, 1))"
    path.write_text(GOOD.replace("(Collective.ALL_REDUCE)", declared).replace("import", "import Counts,"))
    result = run("verify", path, "--ranks", 5)
    assert result.exit_code == 1
    assert "the schedule has 2 steps, 4 sent, 4 folded; declared are 1 step, 1 sent, 1 folded" in result.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ny = (\n", "line 2: '(' was never closed: y = ("),
        ("x = 1\nprint(undefined)\n", "line 2: NameError: name 'undefined' is not defined"),
        ("x = 1\n", "registers no algorithm: put @algorithm"),
        (GOOD.replace("star_", "ring_"), "ArgumentError: all_reduce ring is taken"),
        (GOOD + "raise SystemExit(0)\n", "line 18: SystemExit: 0"),
        ("x = '\0'\n", "null bytes"),
        (b"\x7fELF\xff\xfe\x00", "mine.py"),
    ],
)
def test_errors_in_a_file_are_readable(text: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("verify", path)
    assert result.exit_code == 1
    assert words in result.output and str(path) in result.output
    assert "Traceback" not in result.output and "None" not in result.output


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ALL_REDUCE)", "ALL_REDUCE, blocks=lambda p: p / 2)", "star: blocks for 4 ranks: TypeError: 'float'"),
        ("ALL_REDUCE)", "ALL_REDUCE, largest=lambda p: p // 0)", "star: largest for 4 ranks: ZeroDivisionError"),
        ("ALL_REDUCE)", "ALL_REDUCE, counts=lambda p: 1 // 0)", "star: counts for 4 ranks: ZeroDivisionError"),
        ("ALL_REDUCE)", "ALL_REDUCE, counts=lambda p: (1, 2, 3))", "wanted is Counts(steps, sent, folded), and it is"),
        ("[power_of_two]", "[lambda p: True]", "line 14: ArgumentError: restrictions wants a list of Restriction"),
        ("[power_of_two]", "power_of_two", "write [power_of_two], [at_least(4)]"),
        ("yield send(0, 0)", "yield send(0, 0 / 2)", "rank 1: send wants a rank and blocks"),
        ("yield send(0, 0)", "yield send(0, 0 / 2)", "and got send(0, 0.0)"),
        ("yield send(0, 0)", "yield send(0, [0])", "(mine.py, line 11)"),
        ("yield send(0, 0)", "raise SystemExit", "the program of rank 1 raised SystemExit:  (mine.py, line 11)"),
    ],
)
def test_errors_in_what_a_file_declares_are_readable(old: str, new: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(GOOD.replace(old, new))
    result = run("verify", path, "--ranks", 4)
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_program_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "endless.py"
    path.write_text(GOOD.replace("yield send(0, 0)", "while True: yield ()"))
    monkeypatch.setattr(schedule, "LIMIT", 1000)
    result = run("verify", path, "--ranks", 4)
    assert result.exit_code == 1
    assert "4 ranks: the program of rank 1: it yielded 1,000 steps and did not end" in result.output


def test_what_selects_nothing_is_an_error(good: Path) -> None:
    for more in ([], ["--collective", "barrier"]):
        result = run("verify", good, "--collective", "broadcast", *more)
        assert result.exit_code == 1
        assert "has no broadcast algorithm: there are all_reduce, barrier" in result.output


def test_one_rank_is_one() -> None:
    assert run("show", "broadcast", "ring", "--ranks", 1).output.startswith("broadcast ring, 1 rank, root 0: 0 steps")
    assert run("verify", "--collective", "broadcast", "--algorithm", "ring", "--ranks", 1).output.endswith(
        "1 rank: ok\n"
    )


def test_version() -> None:
    assert run("--version").output == f"abccl {abccl.__version__}\n"


@pytest.mark.parametrize("path", ["/nonexist/x.svg", "/proc/x.svg"])
def test_a_drawing_that_can_not_be_written(path: str) -> None:
    result = run("draw", "all_reduce", "ring", "-o", path)
    assert result.exit_code == 1
    assert f"{path} can not be written (No such file" in result.output and "Traceback" not in result.output


def test_too_many_ranks_for_a_drawing(tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    assert "64 at most" in run("draw", "barrier", "tree", "--ranks", 65, "-o", path).output
    assert not path.exists()
    assert run("draw", "barrier", "tree", "--ranks", 64, "-o", path).exit_code == 0


def test_the_example_of_the_guide_can_be_pasted(tmp_path: Path, root: Path) -> None:
    example = (root / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(example))
    result = run("verify", path)
    assert (result.exit_code, result.output) == (0, "all_gather my_ring: 1-40, 64 ranks: ok\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vrify"], "no command is called 'vrify': did you mean verify?"),
        (["show", "all_redce", "ring"], "did you mean all_reduce or reduce?"),
        (["show", "all_reduce", "rign"], "did you mean ring?"),
        (["show", "all_reduce", "ring", "--root", "1"], "all_reduce has no root"),
        (["show", "broadcast", "ring", "--root", "4"], "there is no root 4 among 4 ranks"),
        (["verify", "--ranks", "3-"], "'3-' is no number of ranks"),
        (["verify", "--ranks", "many"], "'many' is no number of ranks"),
        (["verify", "--ranks", "0-3"], "'0-3' is no number of ranks"),
        (["verify", "--algorithm", "rign", "--collective", "all_reduce"], "did you mean ring?"),
        (["verify", "--algorithm", "rign"], "'rign': did you mean ring?"),
    ],
)
def test_bad_arguments_bring_help(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_help() -> None:
    listed = run("--help").output
    assert all(command in listed for command in COMMANDS)
    for command in ("verify", "show", "draw"):
        assert run(command, "--help").exit_code == 0


def test_show_prints_the_lecture_table() -> None:
    output = run("show", "all-reduce", "ring", "--ranks", 5).output
    assert "all_reduce ring, 5 ranks: 8 steps, 8/5 of the vector sent, 4/5 folded" in output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    assert len(rows) == 9 * 5
    assert rows[0] == ["start", "a", "a0", "a1", "a2", "a3", "a4"]
    assert rows[5] == ["step 1", "a", "a0", "a1", "a1+a2", "a3", "a4"]
    assert rows[-1] == ["", "e", *["Σe0-4"] * 5]


def test_show_a_single_block_and_a_root() -> None:
    output = run("show", "broadcast", "tree", "--ranks", 3, "--root", 1).output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    assert rows == [["start", "", "a", ""], ["step 1", "a", "a", ""], ["step 2", "a", "a", "a"]]
    assert "rank 1 (root)" in output


def test_show_an_own_file(good: Path) -> None:
    assert "Σa0-3" in run("show", "all_reduce", "star", good, "--ranks", 4).output


def test_frames_of_an_all_to_all_name_the_sources() -> None:
    last = frames(replay(lookup(Collective.ALL_TO_ALL, "pairwise"), 3))[-1]
    assert [last[rank][rank].text for rank in range(3)] == ["0-2"] * 3
    assert last[0][1].text == "1"


@pytest.mark.parametrize(("collective", "name"), [(c, name) for c in Collective for name in registry.algorithms(c)])
def test_every_algorithm_can_be_drawn(collective: Collective, name: str) -> None:
    a = lookup(collective, name)
    for size in (1, 5 if a.refusal(5) is None else 4):
        history = replay(a, size)
        root = ElementTree.fromstring(picture(history))
        arrows = [path for path in root.iter(f"{SVG}path") if "C" in path.get("d", "")]
        assert len(arrows) == len(history.transfers)


def test_draw_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ring.svg"
    result = run("draw", "all_reduce", "ring", "--ranks", 4, "-o", path)
    assert result.exit_code == 0 and str(path) in result.output
    texts = [element.text for element in ElementTree.parse(path).iter(f"{SVG}text")]
    assert "rank 3" in texts and "step 6" in texts and texts.count("Σd0-3") == 10


def test_draw_prints_what_arrives(tmp_path: Path) -> None:
    output = run("draw", "all_reduce", "knomial", "--ranks", 8, "-o", tmp_path / "x.svg").output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert rows[0] == ["1", "+a←1-3", "", "", "", "+a←5-7", "", "", ""]
    assert rows[3] == ["4", "", "a←0", "a←0", "a←0", "", "a←4", "a←4", "a←4"]
    assert len(rows) == 4
    output = run("draw", "all_gather", "direct", "--ranks", 5, "-o", tmp_path / "x.svg").output
    assert "│ 1    │ b-e←1-4 │ 4 blocks←0,2-4 │" in output
    ring = run("draw", "all_reduce", "ring", "--ranks", 8, "-o", tmp_path / "x.svg").output
    assert max(map(len, ring.splitlines()[:-1])) <= 80


def test_numbers_in_writing() -> None:
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
    assert rank_numbers("1-3,64") == [1, 2, 3, 64]
    assert [letters(block) for block in (0, 25, 26, 51, 52, 702)] == ["a", "z", "aa", "az", "ba", "aaa"]
    assert to_collective("AllReduce") is Collective.ALL_REDUCE
