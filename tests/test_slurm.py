"""Jobs under a real Slurm, of two nodes that are network namespaces: its own launcher, and the files of the docs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
import slurm_cluster

import abccl

pytestmark = pytest.mark.timeout(170)

PROGRAM = Path(__file__).with_name("hosts_program.py")

TRAIN = """
import abccl, numpy as np
with abccl.init(timeout=60) as comm:
    x = np.full(1000, comm.rank)
    comm.all_reduce(x)
    assert np.all(x == 6)
    network = type(comm._transport.network).__name__
    print(f"OK rank {comm.rank} {comm.topology.groups} by {network}\\n", end="", flush=True)
    comm.barrier()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    """Two nodes, h0 and h1."""
    if missing := slurm_cluster.missing():
        pytest.skip(f"there is no {missing}: install slurmctld, slurmd and slurm-client")
    if reason := hosts.unavailable():
        pytest.skip(f"hosts can not be made here: {reason}")
    with hosts.make(2) as nodes, slurm_cluster.start(nodes, tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """An activated environment that has abccl, for ranks that share the cores of one machine."""
    (tmp_path / "abccl").symlink_to(Path(abccl.__file__).parent)
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }


@pytest.mark.torch
def test_srun(cluster: slurm_cluster.Cluster, variables: dict[str, str]) -> None:
    """Without MPI; neighbours in rank are on different hosts."""
    step = ["srun", "--nodes=2", "--ntasks=4", "--distribution=cyclic", "--mpi=none"]
    output = cluster.run(*step, sys.executable, PROGRAM, "check", "0,2", "1,3", **variables)
    assert sorted(re.findall(r"OK rank (\d)", output)) == ["0", "1", "2", "3"], output


@pytest.mark.parametrize(
    ("word", "network"),
    [
        pytest.param("srun python", "GlooTransport", marks=pytest.mark.torch),
        pytest.param("mpirun", "MPITransport", marks=pytest.mark.mpi),
        pytest.param("torchrun", "GlooTransport", marks=pytest.mark.torch),
    ],
)
def test_the_batch_files_of_the_docs(
    word: str, network: str, cluster: slurm_cluster.Cluster, variables: dict[str, str], root: Path, tmp_path: Path
) -> None:
    """As they stand there."""
    blocks = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH .*?)```", (root / "docs/clusters.md").read_text(), re.DOTALL)
    (text,) = [block for block in blocks if word in block]
    (tmp_path / "job.sh").write_text(text)
    (tmp_path / "train.py").write_text(TRAIN)
    output = cluster.batch(tmp_path / "job.sh", **variables)
    assert sorted(re.findall(r"OK rank (\d) .* by (\w+)", output)) == [(str(r), network) for r in range(4)], output
    assert output.count("((0, 1), (2, 3))") == 4, output
