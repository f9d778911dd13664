"""What starts one command as several processes: torchrun, srun, mpirun and their like.

A run starts its processes itself (`trainer=ddp`). Under a launcher, each of several would be a
whole run of its own, in one folder. Trusted are a process's number and the number of processes as a
launcher sets them for the processes that it starts. What an allocation may hold says nothing:
SLURM_NTASKS is there in a batch script and in the shell of `salloc`, too, of which there is one.
"""

from __future__ import annotations

import os

#: Launcher, and its variables for a process's number and the number of processes.
_LAUNCHERS = (
    # Kubeflow and DeepSpeed set the same.
    ("torchrun", "RANK", "WORLD_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    # Open MPI; MPICH and Intel MPI; MVAPICH.
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE"),
    ("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
)


def check_launch() -> None:
    """Refuses to be one of several processes that somebody else has started.

    Raises:
        ValueError: It is one.
    """
    for launcher, rank_name, size_name in _LAUNCHERS:
        rank, size = _number(rank_name), _number(size_name)
        if rank is None:
            continue
        if size is None and launcher == "srun":
            size = rank + 1  # a batch script has number 0, and no number of processes
        if size is not None and size > 1:
            told = [
                f"{name}={os.getenv(name)}" for name in (rank_name, size_name) if os.getenv(name)
            ]
            raise ValueError(
                f"{launcher}: expected to be started once, got {', '.join(told)}: one of several "
                "processes. Start the command by itself (under Slurm: in the batch script, or by "
                "srun --ntasks=1): trainer=ddp and trainer=fsdp start their processes on one "
                "machine; trainer.devices says how many."
            )


def check_torchrun(num_processes: int) -> None:
    """Refuses to start processes under torchrun, whose meeting place they would wait at.

    Args:
        num_processes: That a trainer starts.

    Raises:
        ValueError: There are several, under a torchrun of one.
    """
    if num_processes > 1 and os.getenv("TORCHELASTIC_RUN_ID"):
        raise ValueError(
            f"trainer.devices: expected 1 under torchrun, got {num_processes}. Start the command "
            "by itself: it starts its processes."
        )


def is_own_child() -> bool:
    """Whether Lightning has started this process, as one of a run's."""
    return _number("LOCAL_RANK") is not None and _number("RANK") is None


def num_processes() -> int:
    """How many processes torchrun or accelerate has started beside this one, itself included."""
    return _number("WORLD_SIZE") or 1


def _number(name: str) -> int | None:
    text = os.getenv(name, "")
    return int(text) if text.isdecimal() else None
