"""Fuzzing of what Python parses: files that people and other processes write, and words that come over a network.

    python tests/fuzz/parsers.py TARGET --seconds 600 [--seed 1]
    python tests/fuzz/parsers.py TARGET FILE...

A target takes any bytes. It returns, or raises an error of abccl's that names the file; anything else is a bug, and so
is an input that takes longer than `LIMIT`. Inputs are made from valid ones: pieces of the document are changed, or of
its text. Where `atheris` is installed (`pip install atheris`) it chooses the changes by what code they reach.
Nothing in abccl reads XML, YAML or pickles, so there is no target for them.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flight_records
from toml_texts import in_toml

from abccl.algorithms.simulator import toml_topology
from abccl.algorithms.toml_file import load
from abccl.collectives.offline import layout_of, offline_tuner
from abccl.collectives.tuner import rules
from abccl.collectives.tuner.table import built_in
from abccl.errors import AbcclError
from abccl.tools import trace
from abccl.transports.errand import error_from_json

LIMIT = 10
"""Seconds that one input may take."""

FILE = "the-input"
"""In the name of every file: errors must show it."""

Text = Callable[[bytes, Path], None]

_TOPOLOGIES = Path(toml_topology.__file__).parent / "topologies"

_RULES = """# What was measured here.
[[rule]]
collective = ["all_reduce", 'reduce']   # both
from = "64KiB"
ranks = [
    "2-16",
    32,
]
algorithm = "knomial(radix=4)"

[[rule]]
collective = "all_gather"
algorithm = \"\"\"ring\"\"\"
protocol = "cached"
"""


@dataclass(frozen=True)
class Target:
    """Something that parses.

    Attributes:
        seeds: valid documents.
        write: a document as text.
        parse: takes the text, and a folder to put it in.
        texts: valid texts, as people lay them out.
    """

    seeds: Callable[[], list[Any]]
    write: Callable[[Any], str]
    parse: Text
    texts: Callable[[], list[str]] = list


# ---- the targets


def _tables() -> list[Any]:
    key = {
        "cpu": "c",
        "cores": 2,
        "ranks": [2, 2],
        "link": "near",
        "transports": "joint gloo",
        "version": "0",
        "format": 1,
    }
    content = built_in("near").to_json()
    content["measured"] = {
        "all_reduce": [
            {"nbytes": 64, "algorithm": "ring", "protocol": None, "segment": None, "lanes": 2, "seconds": 1e-6}
        ]
    }
    return [{"key": key, "checksum": "", "content": content}]


def _signed(document: Any) -> str:
    """With the checksum that its content has, so that changes get as far as the content."""
    if isinstance(document, dict) and document.get("checksum") == "":
        canonical = json.dumps(document.get("content"), sort_keys=True, separators=(",", ":"))
        document = document | {"checksum": hashlib.sha256(canonical.encode()).hexdigest()}
    return json.dumps(document)


def _read_table(data: bytes, folder: Path) -> None:
    file = folder / f"{FILE}.json"
    file.write_bytes(data)
    tuner = offline_tuner(*layout_of(file), file=file)
    for nbytes in (0, 1, 1000, 1 << 40):
        tuner.table.at("cached", nbytes)
        tuner.table.native_seconds("all_reduce", nbytes)
    json.dumps(tuner.table.to_json(), allow_nan=False)


def _topologies() -> list[Any]:
    return [load(text, "a shipped one") for text in _shipped()]


def _shipped() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(_TOPOLOGIES.glob("*.toml"))]


def _read_topology(data: bytes, folder: Path) -> None:
    file = folder / f"{FILE}.toml"
    file.write_bytes(data)
    toml_topology.read(file)


def _rules() -> list[Any]:
    rule = {"collective": "all_reduce", "from": "64KiB", "to": 1 << 20, "ranks": ["2-16", 32], "algorithm": "ring"}
    tuned = {"collective": ["broadcast", "reduce"], "hosts": 1, "algorithm": "knomial(radix=4)", "segment": "8KiB"}
    return [{"rule": [rule, tuned | {"lanes": 2, "protocol": "cached"}]}]


def _read_rules(data: bytes, folder: Path) -> None:
    file = folder / f"{FILE}.toml"
    file.write_bytes(data)
    for rule in rules.parse(rules.read(file), str(file)):
        rule.holds(rule.collective, 1 << 16, 4, 1)


def _records() -> list[Any]:
    operations = [flight_records.operation(1, 5.0, 4.0), flight_records.operation(2, 3.0)]
    there = flight_records.snapshot(
        1,
        operations,
        steps=[flight_records.step(1, 2, 4.5, peer=0)],
        messages=[flight_records.message("send", 1, 2.0)],
        waiting=flight_records.waiting(2, 1.0, 0, "waits at step 3 for block 1 from rank 0"),
        peers=[{"rank": 0, "pid": 1, "entered": 2, "finished": 1, "closed": False, "gone": False}],
    )
    return [there, flight_records.snapshot(0, operations[:1])]


def _read_record(data: bytes, folder: Path) -> None:
    file = folder / f"{FILE}.json"
    file.write_bytes(data)
    whole = folder / f"{FILE}-whole.json"
    whole.write_text(json.dumps(_records()[1]))
    found = trace.newest(trace.read([file, whole]))
    hosts = trace.clocks(found)
    trace.slices_of(found, {host: clock.offset for host, clock in hosts.items()})


def _read_told(data: bytes, folder: Path) -> None:
    error = error_from_json(data)
    if not isinstance(error, AbcclError):
        raise Broken(f"no error of ours: {error!r}")


def _toml(document: Any) -> str:
    if not isinstance(document, dict):
        return in_toml(document)
    return "".join(f"{in_toml(str(key))} = {in_toml(value)}\n" for key, value in document.items())


TARGETS = {
    "table": Target(_tables, _signed, _read_table),
    "topology": Target(_topologies, _toml, _read_topology, _shipped),
    "rules": Target(_rules, _toml, _read_rules, lambda: [_RULES]),
    "record": Target(_records, json.dumps, _read_record),
    "told": Target(lambda: [["PeerLost", "rank 1 ended"]], json.dumps, _read_told),
}


# ---- inputs


WORDS: list[Any] = [
    0, 1, -1, 2, 3, 64, 2**31, 2**53, 2**63 - 1, 2**64, 10**400, 0.0, -0.5, 1e308, 1e-320, float("inf"), float("nan"),
    True, False, "", "0", "ring", "all_reduce", "native", "x" * 300, "é\u2028\U0001f600", "a.b", "2-", "9999999999KiB",
    "1-0", "knomial(radix=0)", "knomial(radix=99999999)", "hierarchical", "composed(2x2)", [], {}, [[]], [{}], {"": {}},
]  # fmt: skip


class Maker:
    """Makes inputs of a target, the same ones from the same seed."""

    def __init__(self, target: Target, seed: int) -> None:
        self.target, self.random = target, random.Random(seed)
        self.seeds, self.texts = target.seeds(), target.texts()

    def document(self) -> Any:
        """A valid document, a few of whose pieces are changed."""
        document = copy.deepcopy(self.random.choice(self.seeds))
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            document = self._changed(document, self.random.random() * 6)
        return document

    def _changed(self, value: Any, depth: float) -> Any:
        pick = self.random
        if depth < 1 or not isinstance(value, (dict, list)) or not value:
            return self._other(value)
        if isinstance(value, list):
            at = pick.randrange(len(value))
            rest = [value[at], value[at]] if pick.random() < 0.1 else [self._changed(value[at], depth - 1)]
            return value[:at] + (rest if pick.random() > 0.1 else []) + value[at + 1 :]
        key = pick.choice(list(value))
        if pick.random() < 0.1:
            return {other: kept for other, kept in value.items() if other != key}
        if pick.random() < 0.1:
            return value | {pick.choice(("", "x", f"{key}s", key.upper())): value[key]}
        return value | {key: self._changed(value[key], depth - 1)}

    def _other(self, value: Any) -> Any:
        pick = self.random
        match pick.randrange(6):
            case 0 if isinstance(value, (int, float)) and abs(value) < 1e300:
                return value + pick.choice((-1, 1, 0.5))
            case 1 if isinstance(value, str) and value:
                at = pick.randrange(len(value))
                return value[:at] + pick.choice(("", "(", ")", "=", ",", "-", "0", " ", "ß")) + value[at + 1 :]
            case 2:
                return [value] * pick.choice((1, 2, 100))
            case 3:
                return {"x": value}
            case 4:
                for _ in range(pick.choice((3, 30, 500))):
                    value = [value]
                return value
        return copy.deepcopy(pick.choice(WORDS))

    def text(self) -> bytes:
        """An input: half of them documents, the others with changes of the text, too, or of people's texts."""
        if self.texts and self.random.random() < 0.3:
            return self.spoilt(self.random.choice(self.texts).encode())
        try:
            data = self.target.write(self.document()).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):  # a number of too many digits
            data = self.target.write(self.random.choice(self.seeds)).encode()
        return self.spoilt(data) if self.random.random() < 0.5 else data

    def spoilt(self, data: bytes) -> bytes:
        """With some of its text removed, doubled or replaced."""
        pick = self.random
        for _ in range(pick.choice((1, 1, 2, 5))):
            start = pick.randrange(len(data) + 1)
            end = min(len(data), start + pick.choice((0, 1, 1, 4, 40, 400)))
            marks = b"[]{}\"'=,.:#\\\n\0\xff\xed\xa0-+e0_T"
            middle = pick.choice((
                b"", data[start:end] * 2, bytes([pick.choice(marks)]), b"[" * pick.choice((2, 2000)), b"9" * 5000,
            ))  # fmt: skip
            data = data[:start] + middle + data[end:]
        return data


# ---- running


class Broken(AssertionError):
    """A target did what it must not."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Ends what takes longer; in the main thread."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Broken(f"an input took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(target: Target, data: bytes, folder: Path) -> bool:
    """Whether the input was accepted.

    Raises:
        Broken: what was raised is no error of abccl's, or does not name the file.
    """
    try:
        target.parse(data, folder)
    except AbcclError as error:
        if FILE not in str(error):
            raise Broken(f"the error does not name the file: {error}") from error
        return False
    return True


def run(name: str, seed: int, count: int | None, seconds: float, folder: Path) -> tuple[int, int]:
    """Try inputs, so many or for so long; returns how many there were, and how many of them were accepted.

    Raises:
        Broken: by an input, which is kept in the folder.
    """
    target = TARGETS[name]
    maker, accepted, done = Maker(target, seed), 0, 0
    for valid in [*map(target.write, maker.seeds), *maker.texts]:
        if not attempt(target, valid.encode(), folder):
            raise Broken(f"a seed of {name} is refused")
    end = time.monotonic() + seconds
    while (done < count) if count is not None else (time.monotonic() < end):
        data = maker.text()
        try:
            with limited(LIMIT):
                accepted += attempt(target, data, folder)
        except Exception as error:
            kept = folder / f"crash-{name}"
            kept.write_bytes(data)
            told = f"{type(error).__name__}: {error}"
            raise Broken(f"{name}, seed {seed}, input {done}, which is kept as {kept}: {told}") from error
        done += 1
    return done, accepted


def _by_atheris(name: str, seconds: float, folder: Path) -> None:
    import atheris

    target = TARGETS[name]

    def one(data: bytes) -> None:
        attempt(target, data, folder)

    def change(data: bytes, most: int, seed: int) -> bytes:
        pick = random.Random(seed)
        maker = Maker(target, seed)
        way = pick.random()
        changed = maker.text() if way < 0.2 else maker.spoilt(data) if way < 0.6 else atheris.Mutate(data, most)
        return bytes(changed[:most])

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for index, document in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_text(target.write(document))
    options = [f"-max_total_time={int(seconds)}", "-max_len=20000", f"-timeout={LIMIT}", f"-artifact_prefix={folder}/"]
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("files", nargs="*", type=Path, help="run these inputs instead")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for what is written; a temporary one, if not given")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="abccl-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    for file in given.files:
        print(file, "accepted" if attempt(TARGETS[given.target], file.read_bytes(), folder) else "refused")
    if given.files:
        return
    if importlib.util.find_spec("atheris"):
        _by_atheris(given.target, given.seconds, folder)
    else:
        done, accepted = run(given.target, given.seed, None, given.seconds, folder)
        print(f"fuzz: ok, {given.target}: {done} inputs, {accepted} accepted")


if __name__ == "__main__":
    main()
