"""What starts one command as several processes: torchrun and srun, which a run joins; others.

Trusted are a process's number and the number of processes as a launcher sets them for the processes
that it starts. What an allocation may hold says nothing: SLURM_NTASKS is there in a batch script
and in the shell of `salloc`, too, of which there is one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE"),
)
#: Those whose processes a run joins, and what they must have told each of them.
_NEEDED = {
    "torchrun": ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "srun": ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST"),
}
_PORTS = (15000, 15000)  # of Slurm's steps: the lowest, and how many


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher has started of one command.

    Attributes:
        launcher: Its name.
        rank: This process's number.
        size: The number of processes.
        local_rank: This process's number among those of its machine.
        local_size: How many a machine has.
        num_nodes: Machines.
        address: Of the machine where all meet.
        port: Of the meeting place.
        keeps_store: Whether the launcher itself keeps a store there, as torchrun does.
        attempt: How often the launcher has started the processes anew.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    num_nodes: int
    address: str
    port: int
    keeps_store: bool = False
    attempt: int = 0

    @property
    def node_rank(self) -> int:
        """The machine's number: launchers fill one machine after another."""
        return self.rank // self.local_size


def launched() -> Launch | None:
    """This process among several of one command; None where it is the only one.

    Raises:
        ValueError: They cannot find each other by what their launcher tells them.
    """
    found = _several()
    if found is None:
        # A torchrun of one keeps the meeting place of processes that it does not know, too.
        if _number("RANK") == 0 and os.getenv("TORCHELASTIC_RUN_ID"):
            return _torchrun(0, 1)
        return None
    launcher, rank, size, told = found
    if launcher not in _NEEDED:
        raise ValueError(
            f"{launcher}: expected to be started once, or by torchrun or srun, got {told}: one of "
            f"several processes. {_ALONE}"
        )
    lacking = [name for name in _NEEDED[launcher] if not os.getenv(name)]
    if size is None or lacking:
        raise ValueError(
            f"{launcher}: expected it to tell {', '.join(lacking) or 'how many there are'}, got "
            f"{told}: one of several processes that cannot find the others. {_ALONE}"
        )
    return _torchrun(rank, size) if launcher == "torchrun" else _srun(rank, size)


def is_alone() -> bool:
    """Whether this process is no launcher's, and starts those of a run itself."""
    return launched() is None


def is_first() -> bool:
    """Whether this process is the one that tells people and writes what is not shared."""
    launch = launched()
    return launch is None or launch.rank == 0


def check_launch() -> None:
    """Refuses to be one of several processes, for what one process does.

    Raises:
        ValueError: It is one.
    """
    if (found := _several()) is not None:
        raise ValueError(
            f"{found[0]}: expected to be started once, got {found[3]}: one of several processes. "
            f"{_ALONE}"
        )


_ALONE = (
    "Start the command by itself (under Slurm: in the batch script, or by srun --ntasks=1): "
    "trainer=ddp and trainer=fsdp start their processes on one machine; trainer.devices says how "
    "many."
)


def variables(launcher: str) -> str:
    """The variables by which a process knows its number, and how many there are."""
    return " and ".join(next(own[1:] for own in _LAUNCHERS if own[0] == launcher))


def _several() -> tuple[str, int, int | None, str] | None:
    """Launcher, number, number of processes and what told them, where there are several."""
    for launcher, rank_name, size_name in _LAUNCHERS:
        rank, size = _number(rank_name), _number(size_name)
        if rank is None:
            continue
        # A batch script of Slurm's has number 0, and no number of processes.
        if (size is None and launcher == "srun" and rank > 0) or (size is not None and size > 1):
            told = [f"{key}={os.getenv(key)}" for key in (rank_name, size_name) if os.getenv(key)]
            return launcher, rank, size, ", ".join(told)
    return None


def _torchrun(rank: int, size: int) -> Launch:
    local_size = _number("LOCAL_WORLD_SIZE") or size
    return Launch(
        launcher="torchrun",
        rank=rank,
        size=size,
        local_rank=int(os.getenv("LOCAL_RANK", "")),
        local_size=local_size,
        num_nodes=_even("torchrun", size, local_size, size // local_size),
        address=os.getenv("MASTER_ADDR", ""),
        port=int(os.getenv("MASTER_PORT", "")),
        keeps_store=os.getenv("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number("TORCHELASTIC_RESTART_COUNT") or 0,
    )


def _srun(rank: int, size: int) -> Launch:
    nodes = int(os.getenv("SLURM_STEP_NUM_NODES", ""))
    local_size = size // nodes
    local_rank = int(os.getenv("SLURM_LOCALID", ""))
    _even("srun", size, local_size, nodes)
    if rank != int(os.getenv("SLURM_NODEID", "")) * local_size + local_rank:
        raise ValueError(
            f"srun: expected {local_size} tasks on each machine, one machine after another, got "
            f"task {rank} as number {local_rank} of machine {os.getenv('SLURM_NODEID')}. Set "
            "--ntasks-per-node, and leave out --distribution."
        )
    job, step = (_number(name) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    # A script that exports them wants them used.
    own = (job * 10 + step) % _PORTS[1] + _PORTS[0]
    return Launch(
        launcher="srun",
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        num_nodes=nodes,
        address=os.getenv("MASTER_ADDR") or _first(os.getenv("SLURM_STEP_NODELIST", "")),
        port=_number("MASTER_PORT") or own,
        attempt=_number("SLURM_RESTART_COUNT") or 0,
    )


def _even(launcher: str, size: int, local_size: int, nodes: int) -> int:
    """The number of machines, each of which has as many processes."""
    if local_size * nodes != size:
        raise ValueError(
            f"{launcher}: expected as many processes on each machine, got {size} on "
            f"{max(nodes, 2)}. Set "
            f"{'--nproc-per-node' if launcher == 'torchrun' else '--ntasks-per-node'}."
        )
    return nodes


def _first(nodes: str) -> str:
    """The first of Slurm's list of machines: `n1` of `n[1-2,7],m3`."""
    first = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\]([^,]*))?", nodes)
    assert first is not None
    return "".join(part or "" for part in first.groups())


def exec_torchrun(nodes: int, processes: int, arguments: Sequence[str]) -> None:
    """Becomes a torchrun of this machine's processes, where the command was started once a machine.

    That is how plain Lightning starts: NODE_RANK, MASTER_ADDR and MASTER_PORT say where all meet.

    Args:
        nodes: Machines.
        processes: Of each.
        arguments: Of the command.

    Raises:
        ValueError: They do not say.
    """
    names = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.getenv(name) for name in names}
    if not all(given.values()):
        lacking = ", ".join(name for name in names if not given[name])
        raise ValueError(
            f"trainer.num_nodes: expected {', '.join(names)} to say where {nodes} machines meet, "
            f"got none for {lacking}. Set them and start the command once on each machine, or use "
            "srun or torchrun (docs/scale.md)."
        )
    own = [f"--nnodes={nodes}", f"--nproc-per-node={processes}"]
    own += [f"--node-rank={given['NODE_RANK']}", f"--master-addr={given['MASTER_ADDR']}"]
    own += [f"--master-port={given['MASTER_PORT']}", "-m", "tokenprune.cli"]
    command = [sys.executable, "-m", "torch.distributed.run", *own, *arguments]
    os.execv(sys.executable, command)


def fit_trainer(options: Mapping[str, Any], launch: Launch | None) -> dict[str, Any]:
    """Numbers of processes and machines as they are, where a launcher has started them.

    Args:
        options: A trainer's config.
        launch: This process among them.

    Raises:
        ValueError: The config asks for others.
    """
    if launch is None:
        return {}
    there = {"devices": launch.local_size, "num_nodes": launch.num_nodes}
    free = {"devices": (None, "auto", -1, "-1"), "num_nodes": (None, 1)}
    for name, number in there.items():
        asked = options.get(name)
        if asked not in (*free[name], number) and str(asked) != str(number):
            what = "a machine" if name == "devices" else "machines"
            raise ValueError(
                f"trainer.{name}: expected {number}, as many {what} as {launch.launcher} has "
                f"started processes {'for' if name == 'devices' else 'on'}, got {asked!r}. Set "
                "trainer=ddp or trainer=fsdp, and leave the numbers to the launcher."
            )
    return there


def is_own_child() -> bool:
    """Whether Lightning has started this process, as one of a run's."""
    return _number("LOCAL_RANK") is not None and _number("RANK") is None


def num_processes() -> int:
    """How many processes torchrun or accelerate has started beside this one, itself included."""
    return _number("WORLD_SIZE") or 1


def _number(name: str) -> int | None:
    text = os.getenv(name, "")
    return int(text) if text.isdecimal() else None
