"""TOML files: on which line everything stands, however the file is written, and what is said of one that is none."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abccl.algorithms.toml_file import Key, Lines, load, read_text
from abccl.errors import ArgumentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = '''\
title = "x" # = [a]
text = """
[level]
alpha = 1 \\""" ]
"""""                                           # line 5, with two quotes more in the text
raw = \'\'\'
]]#\'\'\'
a.b . "c d" = { x = [1, { y = 2 }], 'z.z' = "}" }  # line 8
sizes = [ # 1 ]
  1, 2,

  [3, "]"], # line 12
]
[[level]]
when = 1979-05-27 07:32:00
  [level.links] # line 16
  per = 'node'
[[ "level" ]]
links.per = 3 # line 19
links.number = 4
[[level.more]]
[[level.more]] # line 22
deep = 1
[other.inner]
[other]
x = 1
'''
AT: dict[Key, int] = {
    ("title",): 1,
    ("text",): 2,
    ("raw",): 6,
    ("a",): 8,
    ("a", "b"): 8,
    ("a", "b", "c d"): 8,
    ("a", "b", "c d", "x", 1, "y"): 8,
    ("a", "b", "c d", "z.z"): 8,
    ("sizes",): 9,
    ("sizes", 0): 10,
    ("sizes", 1): 10,
    ("sizes", 2, 1): 12,
    ("level",): 14,
    ("level", 0): 14,
    ("level", 0, "when"): 15,
    ("level", 0, "links"): 16,
    ("level", 0, "links", "per"): 17,
    ("level", 1): 18,
    ("level", 1, "links"): 19,
    ("level", 1, "links", "number"): 20,
    ("level", 1, "more"): 21,
    ("level", 1, "more", 0): 21,
    ("level", 1, "more", 1): 22,
    ("level", 1, "more", 1, "deep"): 23,
    ("other", "inner"): 24,
    ("other",): 25,
    ("other", "x"): 26,
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines(end: str) -> None:
    text = TEXT.replace("\n", end)
    lines = Lines(text)
    assert {key: lines[key] for key in AT} == AT
    assert lines.keys() == {(), *paths(tomllib.loads(text))}


def test_what_is_not_there_is_where_it_could_be() -> None:
    lines = Lines(TEXT)
    assert [lines[key] for key in ((), ("none",), ("none", 3, "x"))] == [1, 1, 1]
    assert [lines["level", 0, "none"], lines["level", 0, "links", "none"], lines["level", 9, "x"]] == [14, 16, 14]
    assert lines["sizes", 2, 7] == 12


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name = 'x'\n[[level]\n", 2),
        ("name = 'x'\nname = 'y'\n", 2),
        ('name = "x"\nabout = """\n\n', 4),
        ("name = 'x'\n'''a\nb''' = 3\n", 2),
        ("name = 'x'\n\x0c\n", 2),
        (f"name = 'x'\n\nsizes = [\n{'9' * 5000}]\n[[level]]", 4),
        (f"name = 'x'\nsizes = {'[' * 20000}\n", 2),
    ],
)
def test_what_is_no_toml(text: str, line: int) -> None:
    with pytest.raises(ArgumentError, match=rf"^x\.toml is no TOML: .*\(at line {line}\b.*\)$"):
        load(text, "x.toml")


def test_text(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("a = 1\n")
    assert load(read_text(tmp_path / "x.toml", "file of x"), "x.toml") == {"a": 1}
    missing = re.escape(str(tmp_path / "y.toml"))
    with pytest.raises(ArgumentError, match=f"^the file of x {missing} can not be read: No such file or directory$"):
        read_text(tmp_path / "y.toml", "file of x")


# ---- any TOML

SCALARS = st.sampled_from(
    ["1", "+1.5e-3", "0xff", "true", "inf", "1979-05-27", "07:32:00", "1979-05-27 07:32:00", "1979-05-27T07:32:00.5Z"]
) | st.sampled_from(
    [
        '""',
        "''",
        '"a = [1] # \\" {"',
        "'] } = \\'",
        '""""""',
        "''''''",
        '"""\n[a]\nb = 1 \\""" # """""',
        "'''\n\n[[x]]'''''",
    ]
)
NAMES = st.sampled_from(["a", "b-1", "07", "c.d", "e f", "=", "#", "]", '"', "\n", "é", "", "\\"])
GAPS = st.sampled_from(["", " ", "\n", " # [a] = '\n", "\n\n\t"])
BLANKS = st.sampled_from(["", "\n", "  # x = [\n", "\t"])


class Writer:
    """Writes TOML, and notes on which line each key begins."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw, self.text, self.lines = draw, "", dict[Key, int]()

    def note(self, key: Key) -> None:
        self.lines.setdefault(key, self.text.count("\n") + 1)

    def names(self, most: int = 3) -> list[str]:
        return list(self.draw(st.lists(NAMES, max_size=most, unique=True)))

    def key(self, outer: Key, names: Sequence[str]) -> Key:
        for name in names:
            outer = (*outer, name)
            self.note(outer)
        self.text += self.joined(names)
        return outer

    def joined(self, names: Sequence[str]) -> str:
        return str(self.draw(st.sampled_from([".", " . "])).join(map(self.part, names)))

    def part(self, name: str) -> str:
        ways = ['"' + "".join(f"\\u{ord(c):04x}" if c in '"\\\n' else c for c in name) + '"']
        ways += [f"'{name}'"] if "\n" not in name else []
        ways += [name] if re.fullmatch("[a-z0-9-]+", name) else []
        return str(self.draw(st.sampled_from(ways)))

    def value(self, key: Key, depth: int = 0) -> None:
        kind = self.draw(st.integers(0, 3)) if depth < 3 else 0
        if kind == 2:
            self.text += "["
            for index in range(self.draw(st.integers(0, 3))):
                self.text += ("," if index else "") + self.draw(GAPS)
                self.note((*key, index))
                self.value((*key, index), depth + 1)
                self.text += self.draw(GAPS)
            self.text += "]"
        elif kind == 3:
            self.text += "{"
            for index, names in enumerate(self.dotted()):
                self.text += ", " if index else " "
                self.pair(key, names, depth + 1)
            self.text += "}"
        else:
            self.text += self.draw(SCALARS)

    def dotted(self) -> Iterator[list[str]]:
        """Keys that go together in one table."""
        for name in self.names():
            yield from [[name, inner] for inner in self.names(2)] or [[name]]

    def pair(self, outer: Key, names: Sequence[str], depth: int = 0) -> None:
        key = self.key(outer, names)
        self.text += self.draw(st.sampled_from(["=", " = "]))
        self.value(key, depth)

    def body(self, outer: Key, taken: Sequence[str] = ()) -> None:
        for names in self.dotted():
            if names[0] not in taken:
                self.pair(outer, names)
                self.text += self.draw(st.sampled_from(["\n", " # ]\n", "\r\n"])) + self.draw(BLANKS)

    def header(self, *path: tuple[str, int | None]) -> Key:
        """The header of a table: names, and of each that is an array the index that it is about."""
        key: Key = ()
        for name, index in path:
            key = (*key, name)
            self.note(key)
            key = key if index is None else (*key, index)
        self.lines[key] = self.text.count("\n") + 1
        written = self.joined([name for name, _ in path])
        self.text += f"[ {written}]" if path[-1][1] is None else f"[[{written}\t]]"
        self.text += "\n" + self.draw(BLANKS)
        return key

    def document(self) -> None:
        names = self.names()
        self.body((), names)
        for name in names:
            for index in self.draw(st.sampled_from([[None], [0], [0, 1]])):
                taken = self.names(2)
                inner = list(taken)
                if index is None and inner and self.draw(st.booleans()):  # [a.b] alone, or before [a]
                    self.body(self.header((name, None), (inner.pop(), None)))
                    if self.draw(st.booleans()):
                        continue
                self.body(self.header((name, index)), taken)
                for one in inner:
                    self.body(self.header((name, index), (one, self.draw(st.sampled_from([None, 0])))))


def paths(value: Any, at: Key = ()) -> Iterator[Key]:
    """All keys and indices in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from paths(inner, (*at, key))


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_lines_of_any_toml(data: st.DataObject) -> None:
    writer = Writer(data.draw)
    writer.document()
    lines = Lines(writer.text)
    assert set(writer.lines) == set(paths(tomllib.loads(writer.text)))
    assert {key: lines[key] for key in lines.keys() - {()}} == writer.lines


@settings(deadline=None, max_examples=300)
@given(st.text() | st.text(alphabet="[]{}=\"'.,#\n\\ab019- ", max_size=40))
def test_lines_of_any_text_that_parses(text: str) -> None:
    try:
        document = load(text, "x.toml")
    except ArgumentError as error:
        told = str(error)
    else:
        assert Lines(text).keys() == {(), *paths(document)}
        return
    assert re.match(r"x\.toml is no TOML: .*\(at line [0-9]+", told, re.DOTALL)
