"""The rule file: what it may say, for which calls a rule holds, and what is said of one that is wrong."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toml_texts import in_toml

from abccl.algorithms import Collective, lookup
from abccl.collectives.tuner.choice import Choice
from abccl.collectives.tuner.rules import ENVIRONMENT, Rule, from_environment, parse, read
from abccl.errors import ArgumentError
from abccl.transports.shm import PROTOCOLS

C = Collective


def one(text: str) -> Rule:
    """The only rule of a file with these fields, collective and algorithm added if they are missing."""
    for field, value in (("collective", "all_reduce"), ("algorithm", "ring")):
        if f"{field} =" not in text:
            text += f'\n{field} = "{value}"'
    (rule,) = parse(f"[[rule]]\n{text}\n", "rules.toml")
    return rule


# ---- what is read


def test_all_fields() -> None:
    rules = parse(
        """
        # two rules
        [[rule]]
        collective = "all_reduce"
        from = "64KiB"
        to = "1MiB"
        ranks = "2-16"
        hosts = [1, 3]
        algorithm = "recursive_multiplying(radix=8)"
        protocol = "lent_streaming"
        segment = "32K"
        lanes = 2

        [[rule]]
        collective = ["AllGather", "broadcast"]
        algorithm = "direct"
        """,
        "rules.toml",
    )
    first, second, third = rules
    assert first.choice == Choice(lookup(C.ALL_REDUCE, "recursive_multiplying(radix=8)"), "lent_streaming", 32 << 10, 2)
    assert first.choice.name == "recursive_multiplying(radix=8), lent_streaming, 32 KiB segments, 2 lanes"
    assert first.nbytes == range(64 << 10, 1 << 20)
    assert first.source == "rules.toml, rule 1 (line 3)"
    assert [second.collective, third.collective] == [C.ALL_GATHER, C.BROADCAST]
    assert third.choice == Choice(lookup(C.BROADCAST, "direct"))
    assert second.source == third.source == "rules.toml, rule 2 (line 14)"


@pytest.mark.parametrize("text", ["", "# nothing\n", "rule = []"])
def test_no_rules(text: str) -> None:
    assert parse(text, "rules.toml") == ()


def test_native() -> None:
    assert one('algorithm = "native"').choice == Choice("native")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols(protocol: str) -> None:
    assert one(f'protocol = "{protocol}"').choice.protocol == protocol


def test_other_ways_to_write_it() -> None:
    (rule,) = parse('rule = [{collective = "all_reduce", algorithm = "ring"}]', "rules.toml")
    assert rule.choice.algorithm_name == "ring"
    assert rule.source == "rules.toml, rule 1 (line 1)"
    text = '\r\n[[ "rule" ]] # [[rule]]\r\ncollective = "all_reduce"\r\nalgorithm = "ring"\r\n'
    assert parse(text, "rules.toml") == (replace(rule, source="rules.toml, rule 1 (line 2)"),)


# ---- which calls


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("from = 1024", [1024, 1 << 62], [0, 1023]),
        ('to = "1K"', [0, 1023], [1024]),
        ('from = "64KiB"\nto = "1.5M"', [65536, (3 << 19) - 1], [65535, 3 << 19]),
        ("from = 0", [0, 1], []),
        ("", [0, 1, 1 << 62], []),
    ],
)
def test_sizes(text: str, inside: list[int], outside: list[int]) -> None:
    rule = one(text)
    assert all(rule.holds(C.ALL_REDUCE, size, 2, 1) for size in inside)
    assert not any(rule.holds(C.ALL_REDUCE, size, 2, 1) for size in outside)


@pytest.mark.parametrize("field", ["ranks", "hosts"])
@pytest.mark.parametrize(
    ("value", "inside", "outside"),
    [
        ("8", [8], [7, 9]),
        ('"8"', [8], [7, 9]),
        ('"2-16"', [2, 16], [1, 17]),
        ('"5-5"', [5], [4, 6]),
        ('"2-"', [2, 100_000], [1]),
        ('[1, "4-5", "9-"]', [1, 4, 5, 9, 10], [2, 3, 6, 8]),
    ],
)
def test_ranks_and_hosts(field: str, value: str, inside: list[int], outside: list[int]) -> None:
    rule = one(f"{field} = {value}")

    def holds(number: int) -> bool:
        ranks, hosts = (number, 1) if field == "ranks" else (16, number)
        return rule.holds(C.ALL_REDUCE, 4, ranks, hosts)

    assert all(map(holds, inside))
    assert not any(map(holds, outside))


SIZES = st.integers(0, 5000)
NUMBERS = st.integers(1, 20)
SPANS = st.tuples(NUMBERS, NUMBERS).map(sorted)


@settings(deadline=None)
@given(
    bounds=st.tuples(SIZES, SIZES).filter(lambda pair: pair[0] < pair[1]),
    ranks=st.lists(SPANS, max_size=3),
    hosts=st.lists(SPANS, max_size=3),
    call=st.tuples(st.sampled_from([C.ALL_REDUCE, C.REDUCE, C.BROADCAST]), SIZES, NUMBERS, NUMBERS),
)
def test_a_rule_holds_where_all_its_fields_do(
    bounds: tuple[int, int], ranks: list[list[int]], hosts: list[list[int]], call: tuple[C, int, int, int]
) -> None:
    text = f'collective = ["all_reduce", "reduce"]\nalgorithm = "tree"\nfrom = {bounds[0]}\nto = {bounds[1]}\n'
    for field, spans in (("ranks", ranks), ("hosts", hosts)):
        if spans:
            text += f"{field} = {[f'{a}-{b}' if a != b else a for a, b in spans]}\n"
    collective, nbytes, some_ranks, some_hosts = call
    expected = (
        collective is not C.BROADCAST
        and bounds[0] <= nbytes < bounds[1]
        and (not ranks or any(a <= some_ranks <= b for a, b in ranks))
        and (not hosts or any(a <= some_hosts <= b for a, b in hosts))
    )
    assert any(rule.holds(*call) for rule in parse("[[rule]]\n" + text, "")) == expected


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[rule]", r"rules.toml is no TOML: .*\(at line 1, column [0-9]+\)"),
        ("a = " + "9" * 5000, "rules.toml is no TOML: .*digits"),
        ("a = " + "[" * 20000, "rules.toml is no TOML: "),
        ("from = 0xF" + "F" * 5000, "stands outside of the rules"),
        ("[[rules]]", r"rules.toml: 'rules' stands outside of the rules: begin each rule with a line \[\[rule\]\]"),
        ("[rule]", r"rules.toml: rule must be an array of tables: begin each rule with a line \[\[rule\]\]"),
        ("rule = [1]", "rule must be an array of tables"),
    ],
)
def test_what_is_no_rule_file(text: str, told: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{told}" if told.startswith("rules") else told):
        parse(text, "rules.toml")


WANTED_SIZE = 'or a size as "64KiB", and got '
WANTED_NUMBER = 'wanted is a number, 1 or more, or "2-16", or "2-", or a list of these, and got '


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"size": "4"}, "no field is called 'size': there are collective, from, to, "),
        ({"segments": "4"}, "no field is called 'segments': did you mean segment?"),
        ({"collective": None}, 'it lacks collective: write collective = "all_reduce"'),
        ({"algorithm": None}, 'it lacks algorithm: write algorithm = "ring"'),
        ({"collective": '"all_redcue"'}, "collective: no collective is called 'all_redcue': did you mean all_reduce"),
        ({"collective": "7"}, "collective: wanted is a name or a list of names, and got 7"),
        ({"collective": "[]"}, "collective: wanted is a name or a list of names, and got []"),
        ({"collective": '["reduce", 7]'}, "collective: wanted is a name or a list of names, and got ['reduce', 7]"),
        ({"algorithm": '"rnig"'}, "algorithm: no all_reduce algorithm is called 'rnig': did you mean ring?"),
        ({"algorithm": "7"}, 'algorithm: wanted is a name, as "ring" or "knomial(radix=8)", and got 7'),
        ({"algorithm": '"knomial(radix=1)"'}, "algorithm: all_reduce 'knomial(radix=1)': radix wants"),
        ({"algorithm": '"ring(3)"'}, "algorithm: all_reduce 'ring(3)': wanted is no parameter"),
        ({"algorithm": '"pairwise"'}, "algorithm: pairwise is for all_to_all, not for all_reduce, which has "),
        ({"collective": '["all_to_all", "reduce"]', "algorithm": '"pairwise"'}, "all_to_all, not for reduce"),
        ({"from": "-1"}, f"from: wanted is a number of bytes, 0 or more, {WANTED_SIZE}-1"),
        ({"from": "1.5"}, f"from: wanted is a number of bytes, 0 or more, {WANTED_SIZE}1.5"),
        ({"from": '"4X"'}, "from: '4X' is no size: wanted is a whole number of bytes, written as 4, 64K"),
        ({"to": "0"}, f"to: wanted is a number of bytes, 1 or more, {WANTED_SIZE}0"),
        ({"to": "true"}, f"to: wanted is a number of bytes, 1 or more, {WANTED_SIZE}True"),
        ({"from": '"1K"', "to": '"1024"'}, "no size is from 1024 to below 1024 bytes: from must be less than to"),
        ({"segment": "0"}, f"segment: wanted is a number of bytes, 1 or more, {WANTED_SIZE}0"),
        ({"segment": "1979-05-27"}, f"segment: wanted is a number of bytes, 1 or more, {WANTED_SIZE}datetime.date("),
        *(
            ({field: value}, f"{field}: {WANTED_NUMBER}{got}")
            for field in ("ranks", "hosts")
            for value, got in [
                ("0", "0"), ("false", "False"), ("2.0", "2.0"), ('"many"', "'many'"), ('"16-2"', "'16-2'"),
                ('"0-4"', "'0-4'"), ('"-4"', "'-4'"), ('[2, "4-3"]', "'4-3'"), ("[[2]]", "[2]"), ('"٣-4"', "'٣-4'"),
            ]
        ),
        ({"ranks": "[]"}, "ranks: the list is empty, so the rule would never hold: leave it out for any number"),
        ({"protocol": '"streming"'}, "protocol: no protocol is called 'streming': did you mean streaming"),
        ({"protocol": '"x"'}, "protocol: no protocol is called 'x': there are cached, streaming, lent, lent_streaming"),
        ({"protocol": "7"}, "protocol: no protocol is called 7: there are cached, "),
        ({"protocol": "[7]"}, "protocol: no protocol is called [7]: there are cached, "),
        ({"lanes": "0"}, "lanes: wanted is a number, 1 or more, and got 0"),
        ({"lanes": '"2"'}, "lanes: wanted is a number, 1 or more, and got '2'"),
        (
            {"algorithm": '"native"', "lanes": "2", "protocol": '"cached"'},
            "native is the engine's own algorithm: leave out protocol, lanes",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_rule(fields: dict[str, str | None], told: str) -> None:
    """The message names the file, the rule and its line, then the field."""
    whole = {"collective": '"all_reduce"', "algorithm": '"ring"', **fields}
    good = '[[rule]]\ncollective = "reduce"\nalgorithm = "tree"\n\n'
    text = "\n".join(f"{field} = {value}" for field, value in whole.items() if value is not None)
    with pytest.raises(ArgumentError) as caught:
        parse(f"{good}[[rule]] # wrong\n{text}\n{good}", "rules.toml")
    assert str(caught.value).startswith("rules.toml, rule 2 (line 5): ")
    assert told in str(caught.value)


def test_the_line_is_known_however_the_rules_are_written() -> None:
    with pytest.raises(ArgumentError, match=r"^rules.toml, rule 2 \(line 2\): it lacks algorithm"):
        parse('rule = [{collective = "reduce", algorithm = "tree"},\n{collective = "reduce"}]', "rules.toml")
    with pytest.raises(ArgumentError, match=r"^rules.toml, rule 1 \(line 1\): algorithm: no reduce algorithm"):
        parse('[[rule]]\ncollective = "reduce"\nalgorithm = """\n[[rule]]\n"""', "rules.toml")


# ---- any text

NAMES = st.sampled_from(
    [*(c.value for c in C), "ring", "tree", "native", "recursive_multiplying(radix=3)", "hierarchical(8)"]
)
TEXTS = NAMES | st.sampled_from(["64KiB", "2-", "1-4", "lent", "1.5M"]) | st.text(max_size=12)
PLAIN = st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.lists(st.lists(PLAIN, max_size=2), max_size=2)
FIELDS = st.sampled_from(
    ["collective", "from", "to", "ranks", "hosts", "algorithm", "protocol", "segment", "lanes", "x"]
)


TABLES = st.fixed_dictionaries(
    {"collective": NAMES | VALUES, "algorithm": NAMES | VALUES}, optional={"from": VALUES, "to": VALUES}
) | st.dictionaries(FIELDS, VALUES, max_size=9)


def check_rules_or_error(text: str) -> None:
    """Rules, or an ArgumentError that names the file; nothing else."""
    try:
        rules = parse(text, "rules.toml")
    except ArgumentError as caught:
        error = caught
    else:
        assert all(rule.choice.name and rule.holds(C.ALL_REDUCE, 4, 2, 1) in (True, False) for rule in rules)
        return
    assert str(error).startswith("rules.toml")


@settings(deadline=None, max_examples=300)
@given(st.text() | st.text(alphabet="[]{}=\"'.,#\n\\rule019-_ ", max_size=60))
def test_any_text(text: str) -> None:
    check_rules_or_error(text)


@settings(deadline=None, max_examples=500)
@given(st.lists(TABLES, max_size=3))
def test_any_fields(tables: list[dict[str, Any]]) -> None:
    lines = []
    for table in tables:
        lines += ["[[rule]]", *(f"{field} = {in_toml(value)}" for field, value in table.items())]
    check_rules_or_error("\n".join(lines))


# ---- the file


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert from_environment() == ""
    monkeypatch.setenv(ENVIRONMENT, "")
    assert from_environment() == ""
    file = tmp_path / "rules.toml"
    file.write_text("# Größe", encoding="utf-8")
    monkeypatch.setenv(ENVIRONMENT, str(file))
    assert from_environment() == read(file) == "# Größe"


def test_a_file_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes("# Größe".encode("latin-1"))
    for path, told in (
        (tmp_path / "none.toml", "can not be read: No such file or directory"),
        (tmp_path, "can not be read: Is a directory"),
        (latin, "is no text in UTF-8: "),
    ):
        with pytest.raises(ArgumentError, match=f"^the rule file {re.escape(str(path))} {told}"):
            read(path)
        monkeypatch.setitem(os.environ, ENVIRONMENT, str(path))
        with pytest.raises(ArgumentError, match=f"^{ENVIRONMENT}: the rule file .*: name another file, or unset it$"):
            from_environment()


# ---- the document


def test_the_examples_of_the_document(root: Path) -> None:
    text = (root / "docs" / "rules.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    found = [rule for example in examples for rule in parse(example, "docs/rules.md")]
    keys = set(re.findall(r"^(\w+) =", "\n".join(examples), re.MULTILINE))
    assert keys == {"collective", "from", "to", "ranks", "hosts", "algorithm", "protocol", "segment", "lanes"}
    assert all(f"`{key}`" in text for key in keys), "a field that the table does not tell of"
    small, large, *_ = (rule for rule in found if rule.collective is C.BROADCAST)
    assert [rule.holds(C.BROADCAST, 65535, 2, 1) for rule in (small, large)] == [True, False]
    assert [rule.holds(C.BROADCAST, 65536, 2, 1) for rule in (small, large)] == [False, True]
