"""A Slurm cluster whose nodes are the hosts of `hosts.py`: a controller, and a daemon for each.

Debian's slurmctld, slurmd and slurm-client do. Nothing is written but to the cluster's folder, and everybody is
trusted: there is no munge. pytest does not collect this file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosts import SYSTEM_PATH, Host

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo")

# The hosts share the machine's cores, and are said to have 4 each.
CONFIGURATION = """
ClusterName=abccl
SlurmctldHost=h0
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MessageTimeout=60
MpiDefault=none
NodeName={nodes} CPUs=4
PartitionName=all Nodes=ALL Default=YES
"""


@dataclass(frozen=True)
class Cluster:
    """A running one.

    Attributes:
        nodes: its hosts. Commands are given on the first.
        environment: what a process needs to find it.
    """

    nodes: list[Host]
    environment: dict[str, str]

    def run(self, *command: Any, **variables: str) -> str:
        """What a command on the first node prints, errors too; it must succeed."""
        environment = os.environ | self.environment | variables
        process = self.nodes[0].start(*command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output: str = process.communicate()[0]
        assert process.returncode == 0, f"{command} ended with {process.returncode}:\n{output}"
        return output

    def batch(self, script: Path, **variables: str) -> str:
        """What a batch script prints, run to its end in its own folder; it must succeed."""
        output = script.with_suffix(".out")
        options = ["--parsable", f"--chdir={script.parent}", f"--output={output}"]
        job = self.run("sbatch", *options, script, **variables).strip()
        while (state := self._state(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            time.sleep(0.2)  # `sbatch --wait` looks after 2, 10 and 42 seconds
        text = output.read_text(errors="replace") if output.exists() else ""
        assert state == "COMPLETED", f"{script} is {state}:\n{text}"
        return text

    def _state(self, job: str) -> str:
        return re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[0]


def missing() -> str:
    """The first program of Slurm that is not installed; empty if all are."""
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    return next((program for program in PROGRAMS if not shutil.which(program, path=path)), "")


@contextlib.contextmanager
def start(nodes: list[Host], folder: Path, seconds: float = 60) -> Iterator[Cluster]:
    """The cluster, ready for jobs; ended with the context. What jobs leave behind ends with the hosts."""
    names = ",".join(node.name for node in nodes)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, nodes=names))
    cluster = Cluster(nodes, {"SLURM_CONF": str(configuration)})
    for name in "state", *(node.name for node in nodes):
        (folder / name).mkdir()
    with contextlib.ExitStack() as stack:
        daemons = [(nodes[0], "slurmctld"), *((node, "slurmd") for node in nodes)]
        for node, program in daemons:
            log = stack.enter_context((folder / f"{program}-{node.name}.log").open("w"))
            environment = os.environ | cluster.environment
            process = node.start(program, "-D", env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        deadline = time.monotonic() + seconds
        while _idle(cluster) < len(nodes):
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
                raise TimeoutError(f"Slurm's nodes are not ready after {seconds:g} s:\n{logs}")
            time.sleep(0.1)
        yield cluster


def _idle(cluster: Cluster) -> int:
    """The number of nodes that are ready, 0 while the controller does not answer."""
    with contextlib.suppress(AssertionError):
        return cluster.run("sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")
    return 0
