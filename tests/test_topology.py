"""Topologies: what a file may say, what is said of one that is wrong, and what the simulator asks of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toml_texts import in_toml

from abccl.algorithms.simulator import Level, Links, Rank, Topology, checks, parse, read, shipped, toml_topology
from abccl.algorithms.simulator.checks import WrongField
from abccl.errors import ArgumentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = """\
name = "Two rails"                                                  # line 1
about = "nodes of 6"
sizes = [4096, 65536, 1048576]

[rank]                                                              # line 5
name = "GPU"
fold = [1e-12, 2e-12, 4e-12]
slots = 8
processors = 0

[rank.sources]                                                      # line 11
fold = "measured"

[[level]]                                                           # line 14
name = "node"
size = 6
alpha = 1e-6
links = { per = "GPU", number = 3, capacity = 50e9 }
[level.sources]                                                     # line 19
alpha = "a paper"
links = "a data sheet"

[[level]]                                                           # line 23
name = "system"
alpha = 5e-6
beta = [8e-11, 8e-11, 9e-11]
[level.links]                                                       # line 27
per = "node"
number = 2
capacity = 12.5e9

[[protocol]]                                                        # line 32
name = "LL"
rank.fold = 2e-12
[protocol.level.system]                                             # line 35
alpha = 2.7e-6
links = { capacity = 6e9 }
[protocol.sources]                                                  # line 38
"system.alpha" = "a table"
rank.fold = "another"

[[protocol]]                                                        # line 42
name = "Simple"
"""


@pytest.fixture(scope="module")
def topology() -> Topology:
    return parse(TEXT, "two.toml")


def refusal(call: Callable[..., Topology], *args: Any) -> str:
    """What is said by a call that refuses its arguments."""
    with pytest.raises(ArgumentError) as caught:
        call(*args)
    return str(caught.value)


# ---- what is read


def test_all_fields(topology: Topology) -> None:
    node = Level("node", 6, alpha=1e-6, links=Links("GPU", 3, 50e9))
    system = Level("system", 0, alpha=5e-6, beta=(8e-11, 8e-11, 9e-11), links=Links("node", 2, 12.5e9))
    rank = Rank("GPU", fold=(1e-12, 2e-12, 4e-12), slots=8, processors=0)
    assert (topology.name, topology.about, topology.sizes) == ("Two rails", "nodes of 6", (4096, 65536, 1048576))
    assert (topology.rank, topology.levels) == (rank, (node, system))
    fast = replace(system, alpha=2.7e-6, links=Links("node", 2, 6e9))
    assert topology.protocols == {
        "LL": (replace(rank, fold=2e-12), (node, fast)),
        "Simple": (rank, (node, system)),
    }
    assert topology.sources == {
        "rank.fold": "measured",
        "node.alpha": "a paper",
        "node.links": "a data sheet",
        "LL.system.alpha": "a table",
        "LL.rank.fold": "another",
    }


def test_what_may_be_left_out() -> None:
    least = parse('name = "x"\nlevel = [{ name = "all" }]', "x.toml")
    assert least == Topology("x", "", Rank(), (Level("all", 0),))
    links = parse('name = "x"\n[[level]]\nname = "all"\nlinks.per = "rank"\nlinks.capacity = inf', "x.toml")
    assert links.levels[0].links == Links("rank", 1, inf)


def test_read_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.toml").write_text(TEXT)
    assert read(str(tmp_path / "two.toml")) == parse(TEXT, "")
    assert read(shipped()[0]) == read(f"{shipped()[0]}.toml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{shipped()[0]}.toml").write_text(TEXT)
    assert read(f"{shipped()[0]}.toml") == parse(TEXT, "") != read(shipped()[0])


def test_read_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no topology and no file is called 'sumit.toml': did you mean summit?"):
        read("sumit.toml")
    with pytest.raises(ArgumentError, match="can not be read: Is a directory"):
        read(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ArgumentError, match="latin.toml is no text in UTF-8"):
        read(tmp_path / "latin.toml")


def test_a_file_that_is_wrong_is_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("name = 3")
    with pytest.raises(ArgumentError, match=f"^{re.escape(str(tmp_path))}/mine.toml, line 1, name: wanted is a name,"):
        read(tmp_path / "mine.toml")


# ---- what is wrong: a line of TEXT, what stands there instead, the line and the words of the error

AT = "seconds, 0 to 1e6, and got"
SIZES = "sizes = [4096, 65536, 1048576]"
WRONG: list[tuple[str, str, int, str]] = [
    # Fields that do not exist, are missing, or stand where they should not.
    ("slots = 8", "slot = 8", 8, "rank.slot: there is no such field: did you mean slots?"),
    ("slots = 8", "sources2 = 8", 8, "rank.sources2: there is no such field: did you mean sources?"),
    ('about = "nodes of 6"', 'abuot = ""', 2, "abuot: there is no such field: did you mean about?"),
    ("alpha = 1e-6", '"al pha" = 1', 17, "level.'al pha': there is no such field: did you mean alpha?"),
    ("number = 2", "numbers = 2", 29, "level.links.numbers: there is no such field: did you mean number?"),
    ("alpha = 2.7e-6", "size = 4", 36, "protocol.level.system.size: there is no such field: there are alpha, "),
    ("rank.fold = 2e-12", 'rank.name = "x"', 34, "protocol.rank.name: there is no such field: there are launch, "),
    ("[protocol.level.system]", "[protocol.level.sytem]", 35, "protocol.level.sytem: there is no such field: did you"),
    ('name = "Two rails"', "", 1, 'name: it is missing: write name = "..."'),
    ('name = "node"', "", 14, "level.name: it is missing: write name ="),
    ("size = 6", "", 14, "level.size: it is missing: write size = 8, say; only the last level may leave it out"),
    ('per = "node"', "", 27, "level.links.per: it is missing: write per ="),
    ('name = "LL"', "", 32, "protocol.name: it is missing: write name ="),
    # Types.
    ('name = "Two rails"', 'name = ["a"]', 1, "name: wanted is a name, and got ['a']"),
    ('about = "nodes of 6"', "about = 1979-05-27", 2, "about: wanted is a text, and got datetime.date"),
    ('name = "GPU"', 'name = ""', 6, "rank.name: wanted is a name without a dot, and got ''"),
    ('name = "GPU"', 'name = "a.b"', 6, "rank.name: wanted is a name without a dot, and got 'a.b'"),
    ('name = "node"', "name = []", 15, "level.name: wanted is a name without a dot, and got []"),
    ('name = "LL"', "name = {}", 33, "protocol.name: wanted is a name without a dot, and got {}"),
    ("alpha = 1e-6", 'alpha = "1e-6"', 17, f"level.alpha: wanted is {AT} '1e-6'"),
    ("alpha = 1e-6", "alpha = true", 17, f"level.alpha: wanted is {AT} True"),
    ("alpha = 1e-6", "alpha.x = 1", 17, "level.alpha: wanted is seconds, 0 to 1e6, and got {'x': 1}"),
    ("slots = 8", "slots = 8.0", 8, "rank.slots: wanted is an integer, 0 or more, and got 8.0"),
    ("slots = 8", "slots = true", 8, "rank.slots: wanted is an integer, 0 or more, and got True"),
    ("slots = 8", "slots = 0xffffffffff", 8, "rank.slots: wanted is an integer, 0 or more, and got 1099511627775"),
    ("slots = 8", "lends = 1", 8, "rank.lends: wanted is true or false, and got 1"),
    ("processors = 0", "processors = 1.5", 9, "rank.processors: wanted is an integer, 0 or more, and got 1.5"),
    ("size = 6", "size = 6.0", 16, "level.size: wanted is an integer, 1 or more, and got 6.0"),
    ("size = 6", "size = 6\ncores = 2.0", 17, "level.cores: wanted is an integer, 0 to 65536, and got 2.0"),
    ("number = 2", "number = 2.5", 29, "level.links.number: wanted is an integer, 1 to 65536, and got 2.5"),
    ("number = 2", 'through = "yes"', 29, "level.links.through: wanted is true or false, and got 'yes'"),
    ('per = "node"', "per = 1", 28, "level.links.per: wanted is a name without a dot, and got 1"),
    (
        "capacity = 12.5e9",
        "capacity = [1.0, 2.0, 3.0]",
        30,
        "level.links.capacity: wanted is bytes per second, 1 or more",
    ),
    ("links = { capacity = 6e9 }", "links = 6e9", 37, "protocol.level.system.links: wanted is a table, and got 6000"),
    # Numbers out of bounds.
    ("alpha = 1e-6", "alpha = -1", 17, f"level.alpha: wanted is {AT} -1"),
    ("alpha = 1e-6", "alpha = nan", 17, f"level.alpha: wanted is {AT} nan"),
    ("alpha = 1e-6", "alpha = inf", 17, f"level.alpha: wanted is {AT} inf"),
    ("alpha = 1e-6", f"alpha = 0x{'f' * 9000}", 17, f"level.alpha: wanted is {AT} something too long to be shown"),
    ("alpha = 2.7e-6", "alpha = -2", 36, f"protocol.level.system.alpha: wanted is {AT} -2"),
    ("rank.fold = 2e-12", "rank.fold = -2", 34, "protocol.rank.fold: wanted is seconds per byte, 0 to 1e6, and got -"),
    ("size = 6", "size = 0", 16, "level.size: wanted is an integer, 1 or more, and got 0"),
    ('name = "system"', 'name = "system"\nsize = 0', 25, "level.size: wanted is an integer, 1 or more, and got 0"),
    ("number = 2", "number = 0", 29, "level.links.number: wanted is an integer, 1 to 65536, and got 0"),
    ("capacity = 12.5e9", "capacity = 0", 30, "level.links.capacity: wanted is bytes per second, 1 or more, and got"),
    ("capacity = 12.5e9", "capacity = nan", 30, "level.links.capacity: wanted is bytes per second, 1 or more, and"),
    ("links = { capacity = 6e9 }", "links = { capacity = -6e9 }", 37, "protocol.level.system.links.capacity: wanted"),
    ("slots = 8", "slots = -1", 8, "rank.slots: wanted is an integer, 0 or more, and got -1"),
    # Sizes, and lists for them.
    (SIZES, "sizes = 4096", 3, "sizes: wanted is a list of bytes, and got 4096"),
    (SIZES, "sizes = [0, 1]", 3, "sizes: wanted are bytes, whole numbers from 1 up, ascending"),
    (SIZES, "sizes = [\n1,\n2.5\n]", 5, "sizes: wanted are bytes, whole numbers from 1 up,"),
    (SIZES, "sizes = [1,\n3,\n2]", 5, "sizes: wanted are bytes, whole numbers from 1 up,"),
    (SIZES, "sizes = [1,\n1]", 4, "sizes: wanted are bytes, whole numbers from 1 up, ascend"),
    ("fold = [1e-12, 2e-12, 4e-12]", "fold = [1]", 7, "rank.fold: wanted is a number, or one for each of the 3 sizes,"),
    ("fold = [1e-12, 2e-12, 4e-12]", "fold = [1,\n2,\n-3]", 9, "rank.fold: wanted is seconds per byte, 0 to 1e6, and"),
    ("fold = [1e-12, 2e-12, 4e-12]", "fold = [1, [2], 3]", 7, "rank.fold: wanted is seconds per byte, 0 to 1e6, and"),
    (SIZES, "", 7, "rank.fold: wanted is a number, and got a list of 3: lists are for"),
    # Levels, and what names them.
    ('name = "system"', 'name = "node"', 24, "level.name: wanted is a new name, and 'node' is a level already"),
    ('name = "system"', 'name = "GPU"', 24, "level.name: wanted is a new name, and 'GPU' is the rank's name"),
    ('name = "system"', 'name = "rank"', 24, "level.name: wanted is a new name, and 'rank' is what every rank is call"),
    ('per = "node"', 'per = "system"', 28, "level.links.per: no unit below system is called 'system': there are GPU,"),
    ('per = "node"', 'per = "nod"', 28, "level.links.per: no unit below system is called 'nod': did you mean node?"),
    ('{ per = "GPU", ', '{ per = "node", ', 18, "level.links.per: no unit below node is called 'node': there are GPU"),
    ('name = "system"', 'name = "system"\ncores = 2', 25, "level.cores: wanted is a level with a size, and system has"),
    (
        'name = "system"',
        'name = "rack"\nsize = 2\ncores = 4\n[[level]]\nname = "hall"\nsize = 2\ncores = 2\n[[level]]\nname = "system"',
        30,
        "level.cores: wanted are cores on one level only, and rack has some already",
    ),
    # Protocols.
    ('name = "Simple"', 'name = "LL"', 43, "protocol.name: wanted is a new name, and 'LL' is a protocol already"),
    ('name = "Simple"', 'name = "node"', 43, "protocol.name: wanted is a new name, and 'node' is the rank's or a leve"),
    ('name = "Simple"', 'name = "Simple"\nlevel = 3', 44, "protocol.level: wanted is a table, and got 3"),
    ('name = "Simple"', 'name = "Simple"\nlevel.node = 3', 44, "protocol.level.node: wanted is a table, and got 3"),
    ('name = "Simple"', 'name = "Simple"\nrank = []', 44, "protocol.rank: wanted is a table, and got []"),
    # Sources.
    ('fold = "measured"', 'slot = ""', 12, "rank.sources.slot: no 'slot' is given here: did you mean slots?"),
    ('fold = "measured"', 'copy = "here"', 12, "rank.sources.copy: no 'copy' is given here: there are fold, slots, "),
    ('fold = "measured"', "fold = 3", 12, "rank.sources.fold: wanted is a text that says where fold comes from, and g"),
    ('fold = "measured"', 'fold = " "', 12, "rank.sources.fold: wanted is a text that says where fold comes from, and"),
    ('links = "a data sheet"', 'links.per = "x"', 21, "level.sources.links.per: no 'links.per' is given here: did you"),
    ('"system.alpha" = "a table"', '"node.alpha" = ""', 39, "protocol.sources.'node.alpha': no 'node.alpha' is given"),
    ('rank.fold = "another"', 'system.beta = ""', 40, "protocol.sources.system.beta: no 'system.beta' is given here: "),
    ('name = "Simple"', 'name = "Simple"\nsources.x = ""', 44, "protocol.sources.x: no 'x' is given here: nothing tha"),
    ('name = "Simple"', 'name = "Simple"\nsources = ""', 44, "protocol.sources: wanted is a table, and got ''"),
]


@pytest.mark.parametrize(("there", "instead", "line", "told"), WRONG, ids=lambda value: str(value)[:30])
def test_the_message_names_the_line_and_the_field(there: str, instead: str, line: int, told: str) -> None:
    assert TEXT.count(there) == 1
    assert refusal(parse, TEXT.replace(there, instead), "two.toml").startswith(f"two.toml, line {line}, {told}")


TAIL = "[[level]]\nname = 'all'"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("", 1, 'name: it is missing: write name = "..."'),
        ("\nname = 'x'", 1, "level: wanted is a level at least, and there is none"),
        ("name = 'x'\nlevel = 3", 2, "level: wanted are tables that begin with [[level]], and got 3"),
        ("name = 'x'\n[level]\nname = 'all'", 2, "level: wanted are tables that begin with [[level]], and got {'na"),
        ("name = 'x'\nlevel = [\n{ name = 'all' },\n3]", 4, "level: wanted is a table, and got 3"),
        (f"name = 'x'\nprotocol = {{}}\n{TAIL}", 2, "protocol: wanted are tables that begin with [[protocol]], and"),
        (f"name = 'x'\nrank = 'GPU'\n{TAIL}", 2, "rank: wanted is a table, and got 'GPU'"),
        (f"name = 'x'\nrank = {{sources = 3}}\n{TAIL}", 2, "rank.sources: wanted is a table, and got 3"),
        (f"name = 'x'\n{TAIL}\n[[protocol]]\nname = 'a'\nlevel.all.links = {{ number = 2 }}", 6, "protocol.level.all."),
        (f"name = 'x'\n{TAIL}\n[[protocol]]\nname = 'a'\n[[protocol]]\nlevel.all.cores = 2\nname = 'b'", 7, "protoco"),
        (f"name = 'x'\n'a\\b' = 3\n{TAIL}", 2, "'a\\\\b': there is no such field"),
    ],
)
def test_tables_that_are_none(text: str, line: int, told: str) -> None:
    assert refusal(parse, text, "x.toml").startswith(f"x.toml, line {line}, {told}")


@pytest.mark.parametrize("name", shipped())
def test_shipped_files_are_valid_and_every_constant_has_a_source(name: str) -> None:
    topology = read(name)
    assert topology.about
    document = tomllib.loads((Path(toml_topology.__file__).parent / "topologies" / f"{name}.toml").read_text("utf-8"))
    wanted = set(constants("rank", document.get("rank", {})))
    for level in document["level"]:
        wanted |= set(constants(level["name"], level))
    for protocol in document.get("protocol", []):
        wanted |= set(constants(f"{protocol['name']}.rank", protocol.get("rank", {})))
        for level, table in protocol.get("level", {}).items():
            wanted |= set(constants(f"{protocol['name']}.{level}", table))
    have = set(topology.sources)
    assert {place for place in wanted if not {place, place.rpartition(".")[0]} & have} == set()


def constants(place: str, table: dict[str, Any]) -> Iterator[str]:
    """The places of the numbers in a table, sizes left out."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from constants(f"{place}.{name}", value) if name != "sources" else ()
        elif not isinstance(value, (str, bool)) and name != "size":
            yield f"{place}.{name}"


# ---- what the simulator asks


def test_units(topology: Topology) -> None:
    assert (topology.units, topology.most) == ((6, 0), None)
    assert [topology.unit_ranks(per) for per in ("GPU", "node", "system")] == [1, 6, 0]
    with pytest.raises(ArgumentError, match="Two rails has no unit called 'nod': did you mean node?"):
        topology.unit_ranks("nod")
    topology.check(10**6)
    for ranks in (0, -1):
        with pytest.raises(ArgumentError, match=f"wanted is 1 rank or more, and got {ranks}"):
            topology.check(ranks)
    full = topology.with_value("system.size", 4)
    assert (full.units, full.most) == ((6, 24), 24)
    full.check(24)
    with pytest.raises(ArgumentError, match=r"Two rails has 24 ranks \(6 in a node x 4 in a system\), and got 25: ask"):
        full.check(25)


def test_without_protocols(topology: Topology) -> None:
    flat = topology.without_protocols("LL", 65536)
    assert (flat.rank.fold, flat.levels[1].alpha, flat.levels[1].beta) == (2e-12, 2.7e-6, 8e-11)
    assert flat.levels[1].links == Links("node", 2, 6e9)
    assert (flat.protocols, flat.sizes) == ({}, ())
    assert flat.without_protocols(None, 1) == flat
    with pytest.raises(ArgumentError, match="Two rails has several protocols: name one of LL, Simple"):
        topology.without_protocols(None, 65536)
    with pytest.raises(ArgumentError, match="Two rails has no protocol 'Simpel': did you mean Simple?"):
        topology.without_protocols("Simpel", 65536)
    with pytest.raises(ArgumentError, match="Two rails has no protocol 'LL': leave it out"):
        flat.without_protocols("LL", 65536)


@pytest.mark.parametrize(
    ("nbytes", "fold"),
    [(0, 1.0), (1, 1.0), (4096, 1.0), (16384, 1.5), (65536, 2.0), (262144, 3.0), (1 << 20, 4.0), (1 << 40, 4.0)],
)
def test_constants_between_sizes_are_on_the_logarithm(topology: Topology, nbytes: int, fold: float) -> None:
    assert topology.without_protocols("Simple", nbytes).rank.fold == pytest.approx(fold * 1e-12)


def test_with_value(topology: Topology) -> None:
    changed = topology.with_value("node.alpha", 3e-6)
    assert [changed.without_protocols(name, 1).levels[0].alpha for name in ("LL", "Simple")] == [3e-6, 3e-6]
    assert changed.levels[0].alpha == 3e-6 and "node.alpha" not in changed.sources
    changed = topology.with_value("system.alpha", 4e-6)
    assert [changed.without_protocols(name, 1).levels[1].alpha for name in ("LL", "Simple")] == [2.7e-6, 4e-6]
    changed = topology.with_value("LL.system.links.number", 4)
    assert [changed.without_protocols(name, 1).levels[1].links for name in ("LL", "Simple")] == [
        Links("node", 4, 6e9),
        Links("node", 2, 12.5e9),
    ]
    assert topology.with_value("LL.rank.lends", True).protocols["LL"][0].lends
    assert topology.with_value("node.size", 8).without_protocols("LL", 1).units == (8, 0)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("system.alpa", 1.0, "Two rails has no constant 'system.alpa': did you mean system.alpha"),
        ("", 1.0, "Two rails has no constant '': there are rank.launch, "),
        ("rank", 1.0, "Two rails has no constant 'rank': "),
        ("rank.name", 1.0, "Two rails has no constant 'rank.name': "),
        ("node.links", 1.0, "Two rails has no constant 'node.links': did you mean "),
        ("node.links.per", 1.0, "Two rails has no constant 'node.links.per': did you mean "),
        ("LL.node.size", 1, "Two rails has no constant 'LL.node.size': did you mean node.size"),
        ("node.alpha", -1.0, f"node.alpha: wanted is {AT} -1.0"),
        ("LL.node.alpha", True, f"LL.node.alpha: wanted is {AT} True"),
        ("node.links.number", 3.0, "node.links.number: wanted is an integer, 1 to 65536, and got 3.0"),
        ("node.alpha", (1.0, 2.0), "node.alpha: wanted is a number, or one for each of the 3 sizes, and got a list of"),
        ("node.size", 0, "node.size: wanted is an integer, 1 or more, on every level but the last, and got 0"),
    ],
)
def test_with_a_value_that_it_can_not_have(topology: Topology, place: str, value: Any, told: str) -> None:
    assert refusal(topology.with_value, place, value).startswith(told)


def test_with_a_value_that_no_protocol_would_use(topology: Topology) -> None:
    changed = topology.with_value("Simple.system.alpha", 1e-6)
    with pytest.raises(ArgumentError, match="every protocol of Two rails has its own system.alpha: change LL.system"):
        changed.with_value("system.alpha", 4e-6)


def test_a_topology_made_in_python_is_checked_alike() -> None:
    with pytest.raises(WrongField, match=r"^level\[1\].alpha: wanted is seconds, 0 to 1e6, and got -1$"):
        Topology("x", "", Rank(), (Level("node", 2), Level("all", 0, alpha=-1)))
    with pytest.raises(WrongField, match=r"^protocol\[0\].level: wanted are the levels of the topology"):
        Topology("x", "", Rank(), (Level("all", 0),), {"LL": (Rank(), ())})
    with pytest.raises(WrongField, match=r"^level\[0\].size: wanted is an integer, 1 or more, on every level but"):
        Topology("x", "", Rank(), (Level("node", 0), Level("all", 0)))


# ---- any text

WORDS = st.sampled_from(
    ["name", "about", "sizes", "rank", "level", "protocol", "sources", "links", "per", "number", "capacity", "through"]
) | st.sampled_from(["alpha", "beta", "size", "cores", "fold", "node", "system", "LL", "rank.fold", "node.alpha"])
SCALARS = st.integers() | st.booleans() | st.floats() | WORDS | st.text(max_size=4) | st.dates()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3)
)
MESSAGE = re.compile(r"two\.toml(, line ([0-9]+), .+: .+| is no TOML: .*)", re.DOTALL)


def check_read_or_refused(text: str) -> None:
    """A topology that can be used, or an ArgumentError that names the file, a line of it and a field."""
    try:
        topology = parse(text, "two.toml")
    except ArgumentError as error:
        told = MESSAGE.fullmatch(str(error))
    else:
        for name in topology.protocols or (None,):
            topology.without_protocols(name, 1000)
        return
    assert told
    assert not told[2] or 1 <= int(told[2]) <= text.count("\n") + 1


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text(text: str) -> None:
    check_read_or_refused(text)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_value_anywhere(data: st.DataObject) -> None:
    document: Any = tomllib.loads(TEXT)
    for _ in range(data.draw(st.integers(1, 3))):
        inner: Any = document
        while isinstance(inner, (dict, list)) and inner:
            outer = inner
            key: Any = data.draw(st.sampled_from(list(outer) if isinstance(outer, dict) else range(len(outer))))
            inner = outer[key]
            if data.draw(st.integers(0, 2)) == 0:
                break
        if isinstance(outer, dict) and data.draw(st.booleans()):
            key = data.draw(WORDS)
        outer[key] = data.draw(VALUES)
    check_read_or_refused("\n".join(f"{in_toml(key)} = {in_toml(value)}" for key, value in document.items()))


# ---- docs/topologies.md


def test_the_example_in_the_docs(root: Path) -> None:
    docs = (root / "docs/topologies.md").read_text()
    example, protocols = re.findall(r"```toml\n(.*?)```", docs, re.DOTALL)
    topology = parse(example, "racks.toml")
    assert (topology.units, topology.unit_ranks("rack"), topology.sources["system.links"]) == (
        (4, 32, 0),
        32,
        "8 uplinks of 100 Gbit/s a rack",
    )
    both = parse(example + protocols, "racks.toml")
    assert both.without_protocols("Simple", 1) == replace(topology, sources=both.sources)
    assert both.without_protocols("LL", 1).levels[2].links == Links("rack", 8, 6e9)
    (told,) = re.findall(r"`(racks.toml, line .*?)`", docs)
    with pytest.raises(ArgumentError, match=f"^{re.escape(told)}$"):
        parse(example.replace("alpha = 2e-6", "alpha = -1"), "racks.toml")


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("## The file", ("name", "about", "sizes", "[rank]", "[[level]]", "[[protocol]]")),
        ("### `[rank]`", (*checks.RANK, "sources")),
        ("### `[[level]]`", (*checks.LEVEL, "links", "sources", *checks.LINKS)),
    ],
)
def test_the_docs_have_every_field(root: Path, heading: str, fields: tuple[str, ...]) -> None:
    docs = (root / "docs/topologies.md").read_text()
    section = re.split(r"^##+ ", docs[docs.index(f"\n{heading}\n") + 4 :], maxsplit=1, flags=re.MULTILINE)[0]
    assert sorted(re.findall(r"^\| `(.*?)`", section, re.MULTILINE)) == sorted(fields)
