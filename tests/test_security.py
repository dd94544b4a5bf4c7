"""What docs/security.md says: who may touch the memory, what runs what it reads, which sockets there are."""

from __future__ import annotations

import ast
import ctypes
import fcntl
import json
import os
import re
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import abccl
from abccl.errors import AbcclError
from abccl.transports import _native
from abccl.transports.errand import error_from_json
from abccl.transports.shm import shm_threads

BYTES = 1 << 16
F_GET_SEALS, SHRINK, GROW = 1034, 2, 4
NOBODY = 65534


# ---- memory


@pytest.fixture(params=["region", "heap", "named"])
def memory(request: pytest.FixtureRequest) -> Iterator[_native.Region]:
    """Memory of each kind that a rank makes."""
    if request.param == "region":
        yield _native.Region.create(BYTES)
    elif request.param == "named":
        region = _native.Region.create_named(BYTES, f"/abccl-test-{os.getpid()}")
        yield region
        region.unlink_name()
    else:
        ranks = shm_threads(2)
        yield ranks[0].native.heap(BYTES)
        for rank in ranks:
            rank.close()


def test_only_the_owner_may_open_the_memory(memory: _native.Region) -> None:
    found = os.fstat(memory.fd)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()


def test_no_process_can_change_the_length_of_the_memory() -> None:
    memory = _native.Region.create(BYTES)
    assert fcntl.fcntl(memory.fd, F_GET_SEALS) & (SHRINK | GROW) == SHRINK | GROW
    for length in (0, 2 * BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, length)
    # Pages can be given back all the same.
    ctypes.memset(memory.address, 1, BYTES)
    before = os.fstat(memory.fd).st_blocks
    memory.forget(0, BYTES)
    assert os.fstat(memory.fd).st_blocks < before
    assert ctypes.string_at(memory.address, 1) == b"\0"


def test_no_name_is_left_once_all_have_the_memory() -> None:
    name = f"/abccl-test-{os.getpid()}"
    memory = _native.Region.create_named(BYTES, name)
    path = Path("/dev/shm") / name[1:]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    memory.unlink_name()
    assert not path.exists()


def test_a_file_that_is_no_memory_of_a_rank_is_not_mapped(tmp_path: Path) -> None:
    """What a peer says of its memory comes from outside: it must not make this rank write to another file."""
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(BYTES)
        said = in_a_child(lambda: outcome(lambda: _native.Region.attach(os.getppid(), file.fileno(), BYTES)))
    assert said.startswith("TransportError") and "not sealed" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_neither_open_nor_read_the_memory(memory: _native.Region) -> None:
    pid, fd, address = os.getpid(), memory.fd, memory.address
    named = os.readlink(f"/proc/self/fd/{fd}")

    def attack() -> str:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        said = [
            outcome(lambda: os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)),
            outcome(lambda: _native.Region.attach(pid, fd, BYTES)),
            outcome(lambda: _native.read_flight(pid, fd)),
            outcome(lambda: read_process(pid, address)),
        ]
        if named.startswith("/dev/shm"):
            said.append(outcome(lambda: os.open(named, os.O_RDONLY)))
        return json.dumps(said)

    said = json.loads(in_a_child(attack))
    assert [words.split(":")[0] for words in said] == [
        "PermissionError", "TransportError", "TransportError", "PermissionError", "PermissionError"
    ][: len(said)]  # fmt: skip
    assert read_process(pid, address) == 8  # as the owner can


def read_process(pid: int, address: int) -> int:
    """How many of eight bytes of a process's memory could be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(8)
    here = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
    there = (ctypes.c_size_t * 2)(address, 8)
    read = int(libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0))
    if read < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return read


def outcome(attempt: Callable[[], object]) -> str:
    try:
        return f"done: {attempt()}"
    except (OSError, AbcclError) as error:
        return f"{type(error).__name__}: {error}"


def in_a_child(body: Callable[[], str]) -> str:
    """What the body returns in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, body().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


# ---- what is read


LISTED = {
    # What the parent's own children write to the pipe that it has made for them.
    "collectives/launch.py": {"pickle"},
    # Formulas of its own table.
    "tools/forms.py": {"eval"},
}
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "eval", "exec", "allow_pickle"}


def dangerous(tree: ast.AST) -> set[str]:
    """What can run what it reads: modules that are imported, functions that are called, arguments."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                found |= {alias.name.split(".")[0] for alias in node.names}
            case ast.ImportFrom(module=str(module)):
                found.add(module.split(".")[0])
            case ast.Call(func=ast.Name(id=name)) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.Attribute(attr="loads" | "load", value=ast.Name(id="torch")):
                found.add("torch.load")
    return found & (FORBIDDEN | {"torch.load"})


def test_nothing_runs_what_it_reads_but_where_it_is_known(root: Path) -> None:
    rooms = ("algorithms", "bench", "collectives", "cuda", "examples", "tools", "transports")
    files = [root / "__init__.py", *(file for room in rooms for file in (root / room).rglob("*.py"))]
    found = {str(file.relative_to(root)): dangerous(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
    assert len(found) > 100
    assert {file: names for file, names in found.items() if names} == LISTED


def test_such_places_are_found() -> None:
    text = "import yaml\nfrom pickle import loads\neval('1')\nnumpy.load(f, allow_pickle=True)\ntorch.load(f)"
    assert dangerous(ast.parse(text)) == {"yaml", "pickle", "eval", "allow_pickle", "torch.load"}


def test_mpi_moves_bytes(root: Path) -> None:
    """mpi4py's calls in small letters pickle."""
    small = {"bcast", "gather", "allgather", "scatter", "alltoall", "reduce", "allreduce"}
    small |= {"send", "recv", "isend", "irecv", "ssend", "issend", "sendrecv"}
    for name in ("transports/mpi.py", "transports/mpi_collectives.py", "collectives/bootstrap.py"):
        tree = ast.parse((root / name).read_text(encoding="utf-8"))
        called = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert any(call.startswith("I") for call in called)
        assert called.isdisjoint(small), name


@pytest.mark.parametrize("data", [b"", b"[", b"\xff", b"{}", b'["SystemExit", "x"]', b'["__all__", 1]', b"[" * 99999])
def test_what_a_rank_is_told_over_a_network_is_an_error_whatever_it_is(data: bytes) -> None:
    assert isinstance(error_from_json(data), AbcclError)


def test_pickled_words_are_not_unpickled() -> None:
    """A gadget that would make a folder is told as an error."""
    marker = Path(f"/tmp/abccl-test-{os.getpid()}")
    gadget = b"cos\nmkdir\n(S'" + str(marker).encode() + b"'\ntR."
    assert isinstance(error_from_json(gadget), AbcclError)
    assert not marker.exists()


# ---- sockets


def sockets() -> list[str]:
    """The sockets of this process: "tcp LISTEN", "unix", ..."""
    own = {
        found[1]
        for file in Path("/proc/self/fd").iterdir()
        if (found := re.fullmatch(r"socket:\[([0-9]+)\]", readlink(file)))
    }
    listed = []
    for kind, column in (("tcp", 9), ("tcp6", 9), ("udp", 9), ("udp6", 9), ("unix", 6)):
        table = Path("/proc/self/net") / kind
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            words = line.split()
            if words[column] in own:
                own.remove(words[column])
                listed.append(kind + (" LISTEN" if kind == "tcp" and words[3] == "0A" else ""))
    return sorted(listed + ["other"] * len(own))


def readlink(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def uses_shared_memory() -> tuple[str, list[str], list[str]]:
    before = sockets()
    with abccl.init() as communicator:
        communicator.all_reduce(np.ones(1000, dtype=np.float32))
        during = sockets()
    return communicator._transport.name, before, during


def test_ranks_in_shared_memory_open_no_socket(here: ModuleType) -> None:
    for transport, before, during in abccl.spawn(here.uses_shared_memory, 2):
        assert transport == "shm"
        # The pair to the parent that Python's multiprocessing makes: it has no name, so nobody else can connect.
        assert during == before == ["unix"]


def test_sockets_are_seen() -> None:
    before = sockets()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        assert list((Counter(sockets()) - Counter(before)).elements()) == ["tcp LISTEN"]
