"""Tables on disk: one JSON file for each key, below the user's cache directory.

A file is written as a whole or not at all, carries its key and a checksum, and is passed over with a warning if it is
damaged. What others could have written is not read: the directories and the file must be the user's own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ArgumentError

ENVIRONMENT = "ABCCL_CACHE_DIR"
"""Names the directory; it must belong to the user, and nobody else may write there."""

_FOLDER = "tuner"
_UNFINISHED = re.compile(r"\..*\.json\.[0-9a-f]{16}")
_ABANDONED = 86400.0
"""After so many seconds nobody writes an unfinished file any more: whoever began it was killed."""

_warned: set[tuple[str, str]] = set()


def directory() -> Path:
    """The cache directory: as the environment names it, else abccl's part of the user's.

    Raises:
        ArgumentError: the environment names none, and the user has no home directory.
    """
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).absolute()
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        try:
            caches = Path.home() / ".cache"
        except RuntimeError:
            raise ArgumentError(f"there is no home directory: set {ENVIRONMENT}") from None
    return caches / "abccl"


def path(key: Mapping[str, Any]) -> Path:
    """The file of this key.

    Raises:
        ArgumentError: there is no cache directory.
    """
    return directory() / _FOLDER / _name(_plain(key))


def load(key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was saved under this key; None if nothing was, or, with a warning, if it can not be trusted or read.

    Of each file is warned once in a process.
    """
    key = _plain(key)
    file = _name(key)
    try:
        with _folder() as folder:
            data = _read(folder, file)
    except FileNotFoundError:
        return None
    except (OSError, ArgumentError) as error:
        _warn("read", file, f"can not be read: {_reason(error)}. It is passed over.")
        return None
    try:
        return _content(data, key)
    except (ValueError, RecursionError) as error:
        _warn("read", file, f"is damaged: {error}. It is passed over; who measures anew replaces it.")
        return None


def save(key: Mapping[str, Any], content: dict[str, Any]) -> Path | None:
    """Replace what is kept under this key; None, with a warning, where that can not be written.

    Whoever reads meanwhile finds the old file or the new one, whole; of several who write at once the last one wins.

    Raises:
        TypeError, ValueError: key or content are no JSON (NaN is none).
    """
    key, content = _plain(key), _plain(content)
    file = _name(key)
    table = {"key": key, "checksum": _checksum(content), "content": content}
    data = json.dumps(table, indent=1).encode() + b"\n"
    try:
        # The folder's parents get the usual mode, as mkdir -p gives it.
        for place in _places():
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _folder() as folder:
            _sweep(folder)
            _replace(folder, file, data)
        return path(key)
    except (OSError, ArgumentError) as error:
        told = f"can not be written: {_reason(error)}. It is measured anew by the next process"
        _warn("written", file, f"{told}: set {ENVIRONMENT} to a directory of your own.")
        return None


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The key and the content of a file that `save` wrote, wherever it lies now.

    Raises:
        ArgumentError: it can not be read, or is damaged.
    """
    try:
        data = file.read_bytes()
        key = json.loads(data)["key"]
        if not isinstance(key, dict):
            raise ValueError(f"its key is a {type(key).__name__}, not a table")
        return key, _content(data, key)
    except OSError as error:
        raise ArgumentError(f"{file} can not be read: {_reason(error)}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArgumentError(f"{file} is no table of the tuner: {type(error).__name__}: {error}") from None


# ---- names and content


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as it will be read: names are strings, and there are no tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    return plain


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checksum(content: Any) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _name(key: dict[str, Any]) -> str:
    """What of the key is a word or a number, as far as there is room; then what tells it from all others."""
    words = " ".join(str(value) for _, value in sorted(key.items()) if isinstance(value, (str, int)))
    readable = re.sub(r"[^a-z0-9]+", "-", words.lower())[:60].strip("-")
    return f"{readable}-{_checksum(key)[:16]}.json".lstrip("-")


def _content(data: bytes, key: dict[str, Any]) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ValueError: it is not what was saved under this key.
        RecursionError: it is nested too deeply.
    """
    table = json.loads(data)
    if not isinstance(table, dict) or table.keys() != {"key", "checksum", "content"}:
        raise ValueError("wanted are key, checksum and content")
    if _canonical(table["key"]) != _canonical(key):
        raise ValueError(f"it is of another key, {_canonical(table['key'])}")
    content = table["content"]
    if not isinstance(content, dict):
        raise ValueError(f"its content is a {type(content).__name__}, not a table")
    if table["checksum"] != _checksum(content):
        raise ValueError("its content is not that of its checksum")
    return content


# ---- the files, by descriptors, so that what was checked is what is read


def _places() -> tuple[Path, Path]:
    return directory(), directory() / _FOLDER


@contextlib.contextmanager
def _folder() -> Iterator[int]:
    """The folder of the tables, open.

    Raises:
        OSError: it can not be opened, or is not the user's own.
    """
    with contextlib.ExitStack() as stack:
        for place in _places():
            opened = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, opened)
            _check_own(opened, f"the directory {place}")
        yield opened


def _check_own(descriptor: int, what: str) -> None:
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{what} belongs to user {found.st_uid}, and this process runs as {os.geteuid()}")
    if found.st_mode & 0o022:
        raise PermissionError(f"{what} can be written by others (mode {stat.S_IMODE(found.st_mode):04o}): chmod go-w")


def _read(folder: int, file: str) -> bytes:
    # O_NONBLOCK: a pipe in the file's place must not make us wait for its writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(file, flags, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError("it is a symbolic link, which is not followed") from None
        raise
    with open(descriptor, "rb") as opened:
        _check_own(descriptor, "the file")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no ordinary file")
        return opened.read()


def _replace(folder: int, file: str, data: bytes) -> None:
    half = f".{file}.{secrets.token_hex(8)}"
    descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(descriptor)
        os.replace(half, file, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(half, dir_fd=folder)
        raise


def _sweep(folder: int) -> None:
    """Remove what processes that were killed have left unfinished."""
    for entry in os.listdir(folder):
        if _UNFINISHED.fullmatch(entry):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps, or has finished
                if time.time() - os.stat(entry, dir_fd=folder, follow_symlinks=False).st_mtime > _ABANDONED:
                    os.unlink(entry, dir_fd=folder)


# ---- warnings


def _reason(error: Exception) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _warn(attempt: str, file: str, told: str) -> None:
    """Say once in this process, for each attempt at this file, what is wrong."""
    try:
        place = str(directory() / _FOLDER / file)
    except ArgumentError:
        place = file
    if (attempt, place) not in _warned:
        _warned.add((attempt, place))
        warnings.warn(f"the tuner's table {place} {told}", RuntimeWarning, stacklevel=3)
