"""The closed forms: each formula held against its schedule, and the document that holds them."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from abccl.algorithms import Collective, Recv, Replay, Send, counts, lookup, replay
from abccl.tools.cli import main
from abccl.tools.forms import FORMS, Form, document, evaluated, written

SIZES = (*range(2, 18), 32, 33)
WEIGHTS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1000, 10, 1), (1, 1000, 10), (10, 1, 1000))

each = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.of.replace(" ", "-"))


def longest_path(run: Replay, alpha: int, beta: int, gamma: int) -> Fraction:
    """The time of a schedule in which a step takes alpha, beta for what it sends or receives, and gamma for its folds.

    It begins when the rank and those from whom it receives have done what stands before it.
    """
    sources: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for t in run.transfers:
        sources.setdefault((t.destination, t.destination_step), []).append((t.source, t.source_step))

    @cache
    def end(rank: int, number: int) -> Fraction:
        if number < 0:
            return Fraction(0)
        step = run.programs[rank][number]
        sent = sum(len(m.blocks) for m in step if isinstance(m, Send))
        received = sum(len(m.blocks) for m in step if isinstance(m, Recv))
        folded = sum(len(m.blocks) for m in step if isinstance(m, Recv) and m.reduce)
        begin = max(
            end(*before) for before in [(rank, number - 1), *((r, s - 1) for r, s in sources.get((rank, number), ()))]
        )
        return begin + alpha + Fraction(beta * max(sent, received) + gamma * folded, run.blocks)

    return max(end(rank, number) for rank, program in enumerate(run.programs) for number in range(len(program)))


def differs(form: Form, run: Replay) -> str:
    """Where the formulas and the schedule part, nothing if they agree."""
    steps, sent, folded = path = evaluated(form.path, run.size)
    for alpha, beta, gamma in WEIGHTS:
        if longest_path(run, alpha, beta, gamma) != steps * alpha + sent * beta + folded * gamma:
            return f"{run.size} ranks: the path is not {path} with alpha, beta, gamma = {alpha}, {beta}, {gamma}"
    declared = evaluated(form.declared or form.path, run.size)
    found = counts(run.algorithm, run.size)
    return "" if found == declared else f"{run.size} ranks: the schedule has {found}, not {declared}"


@each
def test_the_schedule_takes_what_the_formulas_say(form: Form) -> None:
    for size in SIZES:
        assert differs(form, replay(form.algorithm, size)) == ""


@each
def test_what_is_made_of_two_takes_the_sum(form: Form) -> None:
    paths = {other.of: other.path for other in FORMS}
    for size in SIZES if form.parts else ():
        first, second = (evaluated(paths[part], size) for part in form.parts or ())
        assert evaluated(form.path, size) == tuple(map(sum, zip(first, second)))


@each
def test_what_is_made_of_two_is_their_composition(form: Form) -> None:
    if form.parts:
        kinds = dict(part.split() for part in form.parts)
        collective = form.algorithm.collective
        rooted = collective is Collective.ALL_REDUCE and "reduce" in kinds
        composed = lookup(collective, "composed_rooted" if rooted else "composed").bind(**kinds)
        assert [composed.program(rank, 6) for rank in range(6)] == [
            form.algorithm.program(rank, 6) for rank in range(6)
        ]


@pytest.mark.parametrize("place", range(3))
@each
def test_a_wrong_formula_is_noticed(form: Form, place: int) -> None:
    run = replay(form.algorithm, 5)
    wrong = tuple(f"{formula} + 1/p" if number == place else formula for number, formula in enumerate(form.path))
    assert differs(form._replace(path=wrong), run)  # type: ignore[arg-type]
    if form.declared:
        other = tuple(f"{formula} + 1" if number == place else formula for number, formula in enumerate(form.declared))
        assert differs(form._replace(declared=other), run)  # type: ignore[arg-type]
    assert differs(form, run) == ""


def test_formulas_are_read_as_on_paper() -> None:
    formulas = ("2 ceil(log2 p) - floor(log2 p)", "2 (p - 1)/p", "min(2, p - 1)")
    assert evaluated(formulas, 5) == (4, Fraction(8, 5), 2)
    assert written(("p - 1 + ceil(log2 p)", "2 (p - 1)/p", "0")) == "(p - 1 + ceil(log2 p)) alpha + 2 (p - 1)/p n beta"
    assert written(("1", "(p - 1)/p + ceil(log2 p)", "p - 1")) == (
        "alpha + ((p - 1)/p + ceil(log2 p)) n beta + (p - 1) n gamma"
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["algorithms", "--forms", *arguments], prog_name="abccl")


def test_the_document_is_current(root: Path) -> None:
    again = "write it again: abccl algorithms --forms --write docs/closed-forms.md"
    assert (root / "docs/closed-forms.md").read_text(encoding="utf-8") == document(), again


def test_the_document_has_every_form(tmp_path: Path) -> None:
    path = tmp_path / "forms.md"
    assert run("--write", str(path)).exit_code == 0
    text = path.read_text(encoding="utf-8")
    assert text == document() == run().output.removesuffix("\n")
    for form in FORMS:
        line = next(line for line in text.splitlines() if line.startswith(f"| [{form.of}]"))
        assert line.endswith(f"| {written(form.path)} |")
    ring = "2 (p - 1) alpha + 2 (p - 1)/p n beta + (p - 1)/p n gamma"
    assert f"[all_gather ring](algorithms.md#all_gather-ring) | {ring} |" in text
    assert "leave out all_reduce" in run("all_reduce").output
    assert "can not be written" in run("--write", str(path / "x.md")).output
