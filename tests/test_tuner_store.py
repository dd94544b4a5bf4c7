"""Tables on disk: what is saved is read, by others too; what is damaged or could be another's is passed over."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abccl.collectives.tuner import store
from abccl.errors import ArgumentError

KEY = {
    "format": 1,
    "cpu": "Example(R) CPU @ 2.50GHz",
    "cores": [[0, 1], [2, 3]],
    "ranks": [2],
    "transports": ["shm"],
    "version": "0.1.0",
    "class": "near",
}
CONTENT = {"alpha": 1.25e-07, "rows": [[4, 1e-06, None], [65536, 2.5e-05, True]], "words": {"a": "é"}}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that is not there yet."""
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_warned", set())
    return tmp_path / "cache"


def heard(function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    """What a function returns, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments)
    assert all(warning.category is RuntimeWarning for warning in caught)
    return result, [str(warning.message) for warning in caught]


def in_another_process(script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A process that has imported the store, KEY and CONTENT."""
    prelude = f"import json, os, sys\nfrom abccl.collectives.tuner import store\nKEY = {KEY!r}\nCONTENT = {CONTENT!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


# ---- where


def test_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv(store.ENVIRONMENT, "/named")
    assert store.directory() == Path("/named")
    monkeypatch.setenv(store.ENVIRONMENT, "")
    assert store.directory() == Path("/caches/abccl")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert store.directory() == Path("/home/somebody/.cache/abccl")


def test_without_a_home(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(store.ENVIRONMENT)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ArgumentError, match=f"no home directory: set {store.ENVIRONMENT}"):
        store.path(KEY)
    for function, arguments in ((store.load, (KEY,)), (store.save, (KEY, CONTENT))):
        result, (message,) = heard(function, *arguments)
        assert result is None
        assert "no home directory" in message


def test_the_path_is_readable_and_tells_keys_apart(cache: Path) -> None:
    found = store.path(KEY)
    assert found.parent == cache / "tuner"
    assert found.name.startswith("near-example-r-cpu-2-50ghz-1-0-1-0-")
    assert store.path(dict(reversed(KEY.items()))) == found
    assert store.path({**KEY, "cores": [[0, 1, 2, 3]]}) != found
    assert store.path({**KEY, "cores": ((0, 1), (2, 3))}) == found
    assert len(store.path({"cpu": "../x" * 1000}).name) < 100
    assert store.path({}).parent == store.path({"cpu": "/.."}).parent == cache / "tuner"


# ---- kept


def test_what_is_saved_is_loaded(cache: Path) -> None:
    assert heard(store.load, KEY) == (None, [])
    assert heard(store.save, KEY, CONTENT) == (store.path(KEY), [])
    assert heard(store.load, KEY) == (CONTENT, [])
    assert store.load({**KEY, "class": "far"}) is None
    store.save(KEY, {"another": 1})
    assert store.load(KEY) == {"another": 1}


def test_names_that_are_numbers_and_tuples(cache: Path) -> None:
    store.save(KEY, {"by ranks": {10: (1, 2), 9: None}})
    assert heard(store.load, KEY) == ({"by ranks": {"10": [1, 2], "9": None}}, [])


@pytest.mark.parametrize("content", [{"time": float("nan")}, {"time": float("inf")}])
def test_what_is_no_json_is_refused(cache: Path, content: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        store.save(KEY, content)
    assert store.load(KEY) is None


def test_only_the_user_can_read_it(cache: Path) -> None:
    cache.parent.chmod(0o755)
    file = store.save(KEY, CONTENT)
    assert file is not None
    modes = [stat.S_IMODE(place.stat().st_mode) for place in (cache, cache / "tuner", file)]
    assert modes == [0o700, 0o700, 0o600]


def test_a_restart(cache: Path) -> None:
    store.save(KEY, CONTENT)
    with in_another_process("print(json.dumps(store.load(KEY))); store.save(KEY, {'from': 'there'})") as other:
        told, _ = other.communicate(timeout=100)
    assert json.loads(told) == CONTENT
    assert store.load(KEY) == {"from": "there"}


# ---- damaged


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    """A file, and what stands in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(store.ENVIRONMENT, str(tmp_path_factory.mktemp("cache", numbered=True) / "cache"))
        file = store.save(KEY, CONTENT)
        assert file is not None
        yield file, file.read_bytes()


def check_damaged(file: Path, data: bytes) -> str | None:
    """Either exactly the content, or nothing and one warning, which is returned."""
    store._warned.clear()
    file.write_bytes(data)
    found, messages = heard(store.load, KEY)
    if found is None:
        (message,) = messages
        assert f"{file} is damaged: " in message
        assert message.endswith("It is passed over; who measures anew replaces it.")
        assert heard(store.load, KEY) == (None, []), "warned twice of one file"
        return message
    assert found == CONTENT and not messages
    return None


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_bits_flip(saved: tuple[Path, bytes], data: st.DataObject) -> None:
    file, whole = saved
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check_damaged(file, bytes(changed))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_part_is_lost(saved: tuple[Path, bytes], data: st.DataObject) -> None:
    file, whole = saved
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    check_damaged(file, whole[:start] + whole[end:])


@settings(deadline=None, max_examples=100)
@given(data=st.binary())
def test_other_bytes(saved: tuple[Path, bytes], data: bytes) -> None:
    assert check_damaged(saved[0], data)


@settings(deadline=None, max_examples=100)
@given(content=st.dictionaries(st.text(), JSON, max_size=5))
def test_any_content(saved: tuple[Path, bytes], content: dict[str, Any]) -> None:
    store.save(KEY, content)
    assert heard(store.load, KEY) == (content, [])


def table(**changes: Any) -> bytes:
    return json.dumps({"key": KEY, "checksum": store._checksum(CONTENT), "content": CONTENT, **changes}).encode()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "Expecting value"),
        (b"\xff", "can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"[1]", "wanted are key, checksum and content"),
        (b'{"content": {}}', "wanted are key, checksum and content"),
        (table(key={**KEY, "class": "far"}), 'it is of another key, {"class":"far"'),
        (table(content={**CONTENT, "alpha": 1.25e-06}), "its content is not that of its checksum"),
        (table(content=[]), "its content is a list, not a table"),
        (table(checksum=None), "its content is not that of its checksum"),
        (table(content={"alpha": float("nan")}), "Out of range float"),
        (table().replace(b"1.25e-07", b"1e999"), "Out of range float"),
        (table().replace(b"65536", b"9" * 5000), "5000 digits"),
    ],
)
def test_what_is_wrong_is_told(saved: tuple[Path, bytes], data: bytes, told: str) -> None:
    message = check_damaged(saved[0], data)
    assert message is not None and told in message


def test_what_is_damaged_is_replaced(saved: tuple[Path, bytes]) -> None:
    check_damaged(saved[0], b"{")
    assert heard(store.save, KEY, CONTENT) == (saved[0], [])
    assert heard(store.load, KEY) == (CONTENT, [])


# ---- several processes, and those that are killed


@pytest.mark.ranks
def test_two_write_and_a_third_reads(cache: Path, tmp_path: Path) -> None:
    """Two write 200 times each, and go on until the third has seen enough."""
    script = (
        "import warnings; warnings.simplefilter('error')\n"
        "who, enough = sys.argv[1:]\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "turn = 0\n"
        "while turn < 200 or not os.path.exists(enough):\n"
        "    turn += 1\n"
        "    assert store.save(KEY, {'who': who, 'turn': turn, 'long': [who] * (turn % 300)}) is not None\n"
    )
    enough = tmp_path / "enough"
    seen = set()
    with (
        in_another_process(script, "a", str(enough)) as one,
        in_another_process(script, "b", str(enough)) as two,
    ):
        for process in (one, two):
            assert process.stdout and process.stdin
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("go\n")
            process.stdin.flush()
        try:
            while None in (one.poll(), two.poll()):
                content, messages = heard(store.load, KEY)
                assert not messages
                if content:
                    assert content["long"] == [content["who"]] * (content["turn"] % 300)
                    seen.add((content["who"], content["turn"]))
                if len(seen) >= 20:
                    enough.touch()
        finally:
            enough.touch()
    assert (one.returncode, two.returncode) == (0, 0)
    assert len(seen) >= 20
    last = store.load(KEY)
    assert last is not None and last["turn"] >= 200
    assert os.listdir(cache / "tuner") == [store.path(KEY).name]


def test_a_process_is_killed_while_it_writes(cache: Path) -> None:
    store.save(KEY, CONTENT)
    killed = "os.replace = lambda *names, **folders: os.kill(os.getpid(), 9)\nstore.save(KEY, {'never': 'seen'})\n"
    with in_another_process(killed) as other:
        assert other.wait(100) == -signal.SIGKILL
    assert heard(store.load, KEY) == (CONTENT, [])
    (unfinished,) = (cache / "tuner").glob(".*")
    other_file = cache / "tuner" / ".of-somebody-else.tmp"
    other_file.touch()
    store.save(KEY, CONTENT)
    assert unfinished.exists(), "it may still be written"
    for file in (unfinished, other_file):
        os.utime(file, (0, 0))
    store.save(KEY, CONTENT)
    assert sorted(file.name for file in (cache / "tuner").iterdir()) == [other_file.name, store.path(KEY).name]


def test_another_process_finishes_what_is_looked_at(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(KEY, CONTENT)
    names = [f".{store.path(KEY).name}.{'0' * 16}"]
    monkeypatch.setattr(os, "listdir", lambda folder: names)
    assert heard(store.save, KEY, CONTENT) == (store.path(KEY), [])


def test_nothing_is_left_of_a_write_that_fails(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    store.save(KEY, CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result, (message,) = heard(store.save, KEY, {"new": 1})
    assert result is None and "No space left on device" in message
    assert store.load(KEY) == CONTENT
    assert os.listdir(cache / "tuner") == [store.path(KEY).name]


# ---- not the user's own, or not to be had


def refused(told: str) -> None:
    """Neither read nor written, and each is said once."""
    result, (message,) = heard(store.load, KEY)
    assert result is None
    assert f"{store.path(KEY)} can not be read: " in message and told in message and "is passed over" in message.lower()
    result, (message,) = heard(store.save, KEY, CONTENT)
    assert result is None
    assert f"{store.path(KEY)} can not be written: " in message and told in message
    assert message.endswith(f"set {store.ENVIRONMENT} to a directory of your own.")
    assert heard(store.load, KEY) == heard(store.save, KEY, CONTENT) == (None, [])


def test_a_file_stands_where_the_directory_should(cache: Path) -> None:
    cache.write_text("")
    result, (message,) = heard(store.load, KEY)
    assert result is None and "Not a directory" in message
    result, (message,) = heard(store.save, KEY, CONTENT)
    assert result is None and "File exists" in message and store.ENVIRONMENT in message


def test_a_directory_that_can_not_be_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.ENVIRONMENT, "/proc/abccl")  # where not even root makes any
    assert heard(store.load, KEY) == (None, [])
    result, (message,) = heard(store.save, KEY, CONTENT)
    assert result is None and store.ENVIRONMENT in message


@pytest.mark.parametrize("folder", ["", "tuner"])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_directories_that_others_can_write(cache: Path, folder: str, mode: int) -> None:
    store.save(KEY, CONTENT)
    (cache / folder).chmod(mode)
    refused(f"{cache / folder} can be written by others (mode {mode:04o})")


def test_directories_of_another_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(KEY, CONTENT)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    refused(f"{cache} belongs to user {user}, and this process runs as {user + 1}")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away, which needs root")
def test_a_file_of_another_user(cache: Path) -> None:
    file = store.save(KEY, CONTENT)
    assert file is not None
    os.chown(file, 12345, -1)
    result, (message,) = heard(store.load, KEY)
    assert result is None and "the file belongs to user 12345" in message


def test_a_file_that_others_can_write(cache: Path) -> None:
    file = store.save(KEY, CONTENT)
    assert file is not None
    file.chmod(0o620)
    result, (message,) = heard(store.load, KEY)
    assert result is None and "the file can be written by others" in message
    store.save(KEY, CONTENT)
    assert store.load(KEY) == CONTENT


def test_a_link_is_not_followed(cache: Path, tmp_path: Path) -> None:
    file = store.save(KEY, CONTENT)
    assert file is not None
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    result, (message,) = heard(store.load, KEY)
    assert result is None and "a symbolic link, which is not followed" in message
    store.save(KEY, {"new": 1})
    assert not file.is_symlink() and store.load(KEY) == {"new": 1}
    assert json.loads(elsewhere.read_bytes())["content"] == CONTENT


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file(cache: Path, make: Callable[..., None]) -> None:
    file = store.save(KEY, CONTENT)
    assert file is not None
    file.unlink()
    make(file, 0o600)
    result, (message,) = heard(store.load, KEY)
    assert result is None and "can not be read: " in message


def test_a_directory_may_be_a_link(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir(mode=0o700)
    cache.symlink_to(tmp_path / "scratch")
    assert heard(store.save, KEY, CONTENT) == (store.path(KEY), [])
    assert heard(store.load, KEY) == (CONTENT, [])
