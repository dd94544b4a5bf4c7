"""The flight recorder's hooks in a process: dumps when a communicator fails, a report when a signal comes.

One thread of the process does both, so that neither a rank that is stuck in native code nor one that has failed needs
its caller's. ABCCL_FLIGHT_DIR says where dumps go, ABCCL_SIGNAL which signal asks for a report.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import secrets
import select
import signal
import stat
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import AbcclError, ArgumentError
from ..transports import _native
from ..transports.flight import Snapshot, own_snapshot, together
from .hang_report import report as in_words

FOLDER = "ABCCL_FLIGHT_DIR"
"""Where dumps go: a folder, or "off". By default abccl-UID in the folder for temporary files."""

SIGNAL = "ABCCL_SIGNAL"
"""The signal that asks for a report, by name or number: USR1 by default; "none"."""

OFF, NONE = "off", "none"

KEPT = 32
"""Communicators whose dumps are kept. Older ones are removed whole."""

PATIENCE = 5.0
"""Seconds that a process that ends gives its dumps."""


# ---- dumps


def dump(communicator: Any, path: str | os.PathLike[str] | None = None) -> Path:
    """See `Communicator.dump_flight_record`."""
    snapshot = communicator.flight_record()
    if path is None:
        folder = _folder(snapshot)
        if folder is None:
            raise ArgumentError(f"{FOLDER} is {OFF}: pass the path of a file")
        file = folder / _file_name(snapshot)
    else:
        file = Path(path)
    try:
        _write(snapshot, file)
    except OSError as error:
        raise ArgumentError(f"the flight record can not be written to {file}: {error.strerror}") from error
    return file


def home() -> Path | None:
    """The folder below which dumps lie, made if need be; None if they are switched off.

    Raises:
        ArgumentError: it can not be made, or the default one is not this user's alone.
    """
    asked = os.environ.get(FOLDER)
    if asked == OFF:
        return None
    path = Path(asked) if asked else Path(tempfile.gettempdir()) / f"abccl-{os.geteuid()}"
    instead = f"set {FOLDER} to a folder of yours, or to {OFF}"
    try:
        path.mkdir(mode=0o700, parents=bool(asked), exist_ok=bool(asked))
    except FileExistsError:
        # Anybody can make what is called so in a folder for all, and a link there leads anywhere.
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            what = f"flight records are not written: {path} is not a folder that this user alone may use"
            raise ArgumentError(f"{what}: {instead}") from None
    except OSError as error:
        raise ArgumentError(f"flight records are not written to {path}: {error.strerror}: {instead}") from error
    return path


def _folder(snapshot: Snapshot) -> Path | None:
    """The folder of a communicator, the same for its ranks on this host; None if dumps are switched off."""
    group = re.sub(r"[^A-Za-z0-9_.-]", "_", snapshot["group"] or "unnamed")[:64]
    path = home()
    # Ranks that share no memory have no token: they are threads of one process.
    return path and path / f"{group}-{snapshot['token'] or snapshot['pid']:016x}"


_FOLDER_NAME = re.compile(r"[A-Za-z0-9_.-]+-[0-9a-f]{16}(-failed)?")
_FILE_NAME = re.compile(r"rank-\d+\.json(\.[0-9a-f]+\.tmp)?")


def _file_name(snapshot: Snapshot) -> str:
    return f"rank-{snapshot['rank']}.json"


def _write(snapshot: Snapshot, file: Path) -> None:
    """The whole file or none: others may read or write it at the same time."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            json.dump(snapshot, stream, separators=(",", ":"))
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _dump_failure(recorder: Any) -> None:
    """Write the record of a communicator that has failed; the first of its ranks on this host says where."""
    snapshot = own_snapshot(recorder)
    folder = _folder(snapshot)
    if folder is None:
        return
    folder = folder.with_name(f"{folder.name}-failed")
    first = True
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        first = False
    _write(snapshot, folder / _file_name(snapshot))
    if first:
        _say(f'flight records of group "{snapshot["group"]}" in {folder}: abccl trace {folder}')
        _forget_old(folder)


def _forget_old(newest: Path) -> None:
    """Remove the oldest folders of dumps, never what else there may be."""
    folders = []
    for path in newest.parent.iterdir():
        with contextlib.suppress(OSError):
            if path != newest and _FOLDER_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                folders.append((path.stat().st_mtime, path))
    for _, path in sorted(folders, reverse=True)[KEPT - 1 :]:
        with contextlib.suppress(OSError):  # another rank removes it, or something else lies in it
            for file in path.iterdir():
                if _FILE_NAME.fullmatch(file.name):
                    file.unlink(missing_ok=True)
            path.rmdir()


# ---- the thread


class _Watch:
    """The thread that dumps and reports, of one process."""

    def __init__(self, number: int | None) -> None:
        self.pid = os.getpid()
        self._failed: deque[Any] = deque()  # the first is being written
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._asked: int | None = None if number is None else _native.on_signal(number)
        threading.Thread(target=self._run, name="abccl flight recorder", daemon=True).start()

    def failed(self, recorder: Any) -> None:
        """Have the record written. From any thread; waits for nothing."""
        self._failed.append(recorder)
        with contextlib.suppress(OSError):  # it is full: the thread wakes anyway
            os.write(self._wake, b"x")

    def finish(self, seconds: float) -> None:
        """Let what was begun be written."""
        deadline = time.monotonic() + seconds
        while self._failed and self.pid == os.getpid() and time.monotonic() < deadline:
            time.sleep(0.002)

    def _run(self) -> None:
        news = select.poll()
        for descriptor in (self._woken, self._asked):
            if descriptor is not None:
                news.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in news.poll()}
            for descriptor in ready:
                os.read(descriptor, 4096)
            while self._failed:
                _loudly(_dump_failure, self._failed[0])
                self._failed.popleft()
            if self._asked in ready:
                _loudly(_report_here)


def _report_here() -> None:
    _say(report())


def _loudly(work: Callable[..., None], *arguments: Any) -> None:
    try:
        work(*arguments)
    except Exception as error:  # the thread serves other communicators, too
        _say(str(error) if isinstance(error, (AbcclError, OSError)) else f"a flight record failed: {error!r}")


def _say(text: str) -> None:
    """Lines on standard error by one write, so that those of several ranks do not mix."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None where there was none
        sys.stderr.write("".join(f"abccl: {line}\n" for line in text.splitlines()))
        sys.stderr.flush()


_watch: _Watch | None = None
_lock = threading.Lock()


def _renew_lock() -> None:
    """In a forked child: a thread that had it is not there."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def install() -> None:
    """Print a report on standard error whenever the signal of ABCCL_SIGNAL comes. Does nothing the second time.

    The signal is left alone if the program has a handler for it.

    Raises:
        ArgumentError: ABCCL_SIGNAL is no signal.
    """
    global _watch
    with _lock:
        if _watch is None or _watch.pid != os.getpid():
            _watch = _Watch(signal_number())


def signal_number() -> int | None:
    """The signal that ABCCL_SIGNAL names; None if it is "none".

    Raises:
        ArgumentError: it is no signal.
    """
    asked = os.environ.get(SIGNAL) or "USR1"
    if asked == NONE:
        return None
    numbers = {name.removeprefix("SIG"): int(number) for name, number in signal.Signals.__members__.items()}
    number = int(asked) if asked.isdecimal() else numbers.get(asked.removeprefix("SIG"))
    if number not in numbers.values() or number in (signal.SIGKILL, signal.SIGSTOP):
        raise ArgumentError(f"{SIGNAL}={asked!r}: wanted is a signal that can be handled, as USR1 or 10, or {NONE}")
    return number


def attend(communicator: Any) -> None:
    """Have a communicator's record written when it fails, and reported when the signal comes.

    Raises:
        ArgumentError: ABCCL_SIGNAL is no signal.
    """
    install()
    watch = _watch
    assert watch is not None
    # Weak, or the recorder would keep itself alive.
    reference = weakref.ref(communicator._recorder)

    def failed() -> None:
        recorder = reference()
        if recorder is not None:
            watch.failed(recorder)

    communicator._recorder.set_recorder_failure(failed)


def report() -> str:
    """What the communicators of this process do, and all their ranks on this machine, in words."""
    try:
        return in_words(together(os.getpid()))
    except ArgumentError:
        return "this process has no communicator, or still meets its ranks"


@atexit.register
def _finish() -> None:
    if _watch is not None:
        _watch.finish(PATIENCE)
