"""Hosts on one machine, to try programs of several: network namespaces, each with a cable of 1 Gbit/s to one switch.

    python tests/hosts.py --hosts 2 sh -c 'torchrun --nnodes 2 --node-rank $HOST --master-addr h0 ... program.py'
    python tests/hosts.py --hosts 2 --on h0 mpirun --host h0:2,h1:2 -x PATH python program.py

runs a command in every host, or in those named by --on, and removes the hosts when all have ended. HOST is the host's
number there, from 0. A host has its own name (h0, h1, ...), which the others know, one interface (eth0, 10.77.0.1 and
up), a TMPDIR, and a command `ssh` that reaches the others. Processes, files and memory are the machine's.

Needs Linux, root, and iproute2. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# `ip netns exec` gives a namespace its own /sys, too, but hides the cgroups, and all hosts would have one name.
ENTER = """#!/bin/sh
set -e
echo "$1" >/proc/sys/kernel/hostname
mount --bind {tools}/hosts /etc/hosts
mount -t sysfs sysfs {tools}/sys
mount --rbind /sys/fs/cgroup {tools}/sys/fs/cgroup
mount --move {tools}/sys /sys
shift
exec "$@"
"""

# A login gets an environment of its own, not the caller's.
SSH = """#!/bin/sh
while :; do
    case "$1" in -[bcDEeFIiJLlmOopQRSWw]) shift 2 ;; -*) shift ;; *) break ;; esac
done
host=$1
shift
case "$host" in
{cases}esac
echo "ssh: no host $host here" >&2
exit 255
"""

_serial = itertools.count()


class HostsError(Exception):
    """Hosts can not be made here; the message says why."""


@dataclass(frozen=True)
class Host:
    """One of the hosts.

    Attributes:
        number: from 0.
        namespace: its network namespace's name.
        switch: the switch's.
        tools: a folder of what all hosts share: ssh, their names.
    """

    number: int
    namespace: str
    switch: str
    tools: Path

    @property
    def name(self) -> str:
        """h0, h1, ..."""
        return f"h{self.number}"

    @property
    def address(self) -> str:
        """Of its interface, eth0."""
        return f"10.77.0.{self.number + 1}"

    def command(self, *command: Any) -> list[str]:
        """The command that runs `command` in this host, in the same process."""
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--mount", "--uts", self.tools / "enter"]
        own = ["env", f"HOST={self.number}", f"TMPDIR={self.tools / self.name}"]
        return list(map(str, [*enter, self.name, *own, *command]))

    def start(self, *command: Any, env: Mapping[str, str] = os.environ, **options: Any) -> subprocess.Popen[str]:
        """A process in the host, which finds the host's ssh; its output is text. `options` are Popen's."""
        path = f"{self.tools}:{env.get('PATH', SYSTEM_PATH)}"
        return subprocess.Popen(self.command(*command), env={**env, "PATH": path}, text=True, **options)

    def cut(self) -> None:
        """Pull the cable at the switch: the host keeps its address, and reaches nobody but itself."""
        _ip("-n", self.switch, "link", "set", self.name, "down")

    def mend(self) -> None:
        """Put the cable back, and wait until both ends have seen it."""
        _ip("-n", self.switch, "link", "set", self.name, "up")
        deadline = time.monotonic() + 60
        for namespace, device in (self.switch, self.name), (self.namespace, "eth0"):
            while " state UP " not in _ip("-n", namespace, "link", "show", "dev", device):
                if time.monotonic() > deadline:
                    raise HostsError(f"the cable of {self.name} carries nothing after 60 s")
                time.sleep(0.01)

    def end_all(self) -> None:
        """Kill what runs in the host."""
        _end_all(self.namespace)


@contextlib.contextmanager
def make(count: int, rate: str = "1gbit") -> Iterator[list[Host]]:
    """Hosts for as long as the context lasts; what still runs in them at its end is killed.

    Hosts that a killed process has left are removed by the next call.

    Raises:
        HostsError: this user or machine can not make them.
    """
    if os.geteuid() != 0:
        raise HostsError("network namespaces need root")
    _remove_left_over()
    prefix = f"abccl-{os.getpid()}-{next(_serial)}"
    switch = f"{prefix}-switch"
    with contextlib.ExitStack() as stack:
        tools = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{prefix}-")))
        hosts = [Host(number, f"{prefix}-h{number}", switch, tools) for number in range(count)]
        for namespace in (switch, *(host.namespace for host in hosts)):
            stack.callback(_remove, namespace)
            _ip("netns", "add", namespace)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in hosts:
            _connect(host, rate)
        _equip(tools, hosts)
        yield hosts


@functools.cache
def unavailable() -> str:
    """Why hosts can not be made here; empty if they can."""
    try:
        with make(1):
            return ""
    except HostsError as error:
        return str(error)


def _connect(host: Host, rate: str) -> None:
    """A cable from the switch to the host, with the rate in both directions."""
    _ip("-n", host.switch, "link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("-n", host.switch, "link", "set", host.name, "master", "bridge", "up")
    _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    for device in "lo", "eth0":
        _ip("-n", host.namespace, "link", "set", device, "up")
    for namespace, device in (host.switch, host.name), (host.namespace, "eth0"):
        shape = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
        _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, *shape)


def _equip(tools: Path, hosts: list[Host]) -> None:
    """Write what the hosts share."""
    for folder in "sys", *(host.name for host in hosts):
        (tools / folder).mkdir()
    (tools / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in hosts))
    login = ["env", "-i", f"HOME={Path.home()}", "USER=root", f"PATH={tools}:{SYSTEM_PATH}", "bash", "-c"]
    cases = "".join(f'{h.name} | {h.address}) exec {shlex.join(h.command(*login))} "$*" ;;\n' for h in hosts)
    for name, text in ("enter", ENTER.format(tools=tools)), ("ssh", SSH.format(cases=cases)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)


def _remove(namespace: str) -> None:
    """A namespace, with what runs in it. It may be gone, or never have been made."""
    with contextlib.suppress(HostsError):
        _end_all(namespace)
        _ip("netns", "del", namespace)


def _end_all(namespace: str) -> None:
    for process in _ip("netns", "pids", namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def _remove_left_over() -> None:
    def left_over(name: str) -> bool:
        maker = re.match(r"abccl-(\d+)-\d+-", name)
        return maker is not None and not Path("/proc", maker[1]).exists()

    for namespace in filter(left_over, _ip("netns", "list").split()):
        _remove(namespace)
    for folder in filter(left_over, os.listdir(tempfile.gettempdir())):
        shutil.rmtree(Path(tempfile.gettempdir(), folder), ignore_errors=True)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise HostsError(f"{tool} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _tool(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    if not found:
        raise HostsError(f"there is no command {name}: install iproute2")
    return found


def _stop(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, metavar="N", help="how many (default: 2)")
    parser.add_argument("--rate", default="1gbit", help="of each cable, as tc writes it (default: 1gbit)")
    parser.add_argument("--on", default="", metavar="h0,h1", help="the hosts that run the command (default: all)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if not given.command:
        parser.error("wanted a command to run")
    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, _stop)
    try:
        with make(given.hosts, given.rate) as hosts:
            chosen = [host for host in hosts if not given.on or host.name in given.on.split(",")]
            processes = [host.start(*given.command) for host in chosen]
            return max((process.wait() for process in processes), key=abs, default=0) % 256
    except HostsError as error:
        print(f"hosts: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
