"""The cluster itself does what the other tests rely on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from slurm import NODES, Slurm, wait_for

pytestmark = pytest.mark.cluster


def test_processes_of_a_step_are_on_both_nodes(slurm: Slurm) -> None:
    said = slurm.run("srun", "-N2", "-n2", "sh", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME")
    assert sorted(said.splitlines()) == ["0 n1", "1 n2"]


def test_the_job_of_a_killed_node_runs_again_on_the_other(slurm: Slurm) -> None:
    script = "echo $SLURMD_NODENAME >> starts; sleep 3 && [ $(wc -l < starts) = 2 ] && touch done"
    slurm.run("sbatch", "--requeue", "--wrap", script)
    starts = Path("starts")
    wait_for(starts.exists, "the job's start")
    time.sleep(0.5)
    (first,) = starts.read_text().split()
    slurm.kill_node(first)
    slurm.hurry_requeued()
    wait_for(Path("done").exists, "the job's second run")
    assert starts.read_text().split() in ([first, other] for other in NODES if other != first)
