"""Commands under launchers of several processes: joined, or refused, and whole where there is one.

Trainings and evaluations of several: tests/training/test_launched.py, tests/evaluation.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import COMMAND, TINY, random_llava, refused
from lightning_utilities.core.rank_zero import rank_zero_only
from processes import run

from tokenprune.cli import main as cli
from tokenprune.runs import launchers, team
from tokenprune.runs.trainers import Launched, OwnProcesses, build_trainer

#: What launchers of two set for the second process, and what each of them is told as.
SEVERAL = {
    "torchrun": {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
                 "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    "srun": {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2",
             "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
             "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2",
             "SLURM_STEP_NODELIST": "n[07-08],m3"},
}  # fmt: skip
#: What no run joins: processes that cannot find each other.
LOST = {
    "srun, another node": {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"},
    "mpirun, MPICH": {"PMI_RANK": "1", "PMI_SIZE": "2"},
    "mpirun, MVAPICH": {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"},
    "jsrun": {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"},
    "flux run": {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2"},
    "horovodrun": {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1"},
}  # fmt: skip
#: What is around a process that is the only one.
ALONE = {
    "sbatch --ntasks=4": {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4",
                          "SLURM_NPROCS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
                          "SLURM_NODEID": "0", "SLURM_NNODES": "2", "SLURM_NODELIST": "n[1-2]"},
    "salloc --ntasks=4": {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive",
                          "SLURM_NTASKS": "4", "SLURM_NNODES": "2"},
    "srun --ntasks=1": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
                        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0",
                        "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    "torchrun of one": {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    "a cluster's habits": {"WORLD_SIZE": "8", "MASTER_ADDR": "n1", "MASTER_PORT": "1",
                           "NODE_RANK": "3", "RANK": ""},
}  # fmt: skip


@pytest.fixture
def around(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a process under the launcher of that name."""
    name = str(request.param)
    for variable, value in (SEVERAL | LOST | ALONE)[name].items():
        monkeypatch.setenv(variable, value)
    return name


@pytest.mark.parametrize("rank", ["first", "second"])
@pytest.mark.parametrize("around", LOST, indirect=True)
@pytest.mark.parametrize("command", ["eval", "train", "bench", "eval -m seed=0,1"])
def test_g1_one_of_several_processes_that_cannot_meet_is_refused(
    command: str,
    around: str,
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if rank == "first" and around != "srun, another node":  # a batch script has that number, too
        for name in LOST[around]:
            if name.endswith(("RANK", "PROCID", "LOCALID")):
                monkeypatch.setenv(name, "0")
    message = refused(command.split(), capsys)
    assert message.startswith(f"tokenprune: {around.partition(',')[0]}: expected ")
    assert "one of several processes" in message
    assert "Start the command by itself" in message


@pytest.mark.parametrize("around", SEVERAL, indirect=True)
def test_g1_one_process_does_measure(around: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["bench"], capsys)
    assert message.startswith(f"tokenprune: {around}: expected to be started once, got ")


@pytest.mark.parametrize("around", SEVERAL, indirect=True)
def test_g2_a_process_finds_its_place(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launchers.launched()
    assert launch is not None
    assert (launch.launcher, launch.rank, launch.size) == (around, 1, 2)
    own = Launched(launch)
    assert (own.global_rank(), own.world_size()) == (1, 2)
    assert own.creates_processes_externally
    if around == "srun":
        assert (own.local_rank(), own.node_rank(), launch.num_nodes) == (0, 1, 2)
        assert (own.main_address, own.main_port, launch.keeps_store) == ("n07", 15070, False)
        monkeypatch.setenv("SLURM_JOB_ID", "123456")
        assert 15000 <= Launched(launchers.launched()).main_port < 30000
        monkeypatch.setenv("MASTER_ADDR", "m3")
        monkeypatch.setenv("MASTER_PORT", "2000")
        assert Launched(launchers.launched()).main_address == "m3"
        assert Launched(launchers.launched()).main_port == 2000
        monkeypatch.setenv("SLURM_LOCALID", "1")
        with pytest.raises(ValueError, match=r"^srun: expected 1 tasks on each machine, one mach"):
            launchers.launched()
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
        with pytest.raises(ValueError, match=r"^srun: expected as many processes on each machine"):
            launchers.launched()
    else:
        assert (own.local_rank(), own.node_rank(), launch.num_nodes) == (1, 0, 1)
        assert (own.main_address, own.main_port) == ("127.0.0.1", 29500)
        assert launch.keeps_store


@pytest.mark.parametrize("around", SEVERAL, indirect=True)
def test_g2_a_trainer_has_the_processes_that_there_are(
    around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = launchers.launched()
    assert launch is not None
    there = {"devices": launch.local_size, "num_nodes": launch.num_nodes}
    for own in ({}, {"devices": "auto"}, {"devices": -1, "num_nodes": 1}, there):
        assert launchers.fit_trainer(own, launch) == there
    assert launchers.fit_trainer({"devices": 7}, None) == {}
    with pytest.raises(ValueError, match=rf"^trainer.devices: expected .* {around} has .* got 3"):
        launchers.fit_trainer({"devices": 3}, launch)
    with pytest.raises(ValueError, match=r"^trainer.num_nodes: expected .*, got 3. Set"):
        launchers.fit_trainer({"num_nodes": 3}, launch)
    # What a trainer takes its process for would hold for all later ones of this process.
    monkeypatch.setattr(rank_zero_only, "rank", rank_zero_only.rank)
    options = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "devices": "auto"}
    options |= {"strategy": "ddp_spawn", "logger": False, "enable_checkpointing": False}
    trainer = build_trainer(options)
    assert (trainer.world_size, trainer.global_rank) == (2, 1)
    assert trainer.num_nodes == launch.num_nodes
    assert trainer.strategy.launcher.procs == []


@pytest.mark.parametrize("command", ["list", "eval --help", "eval --cfg job", "flops model=tiny"])
@pytest.mark.parametrize("around", ["torchrun"], indirect=True)
def test_g1_what_leaves_nothing_works_anywhere(command: str, around: str) -> None:
    assert cli.main(command.split()) == 0


@pytest.mark.parametrize("command", ["eval", "train"])
@pytest.mark.parametrize("more", [[], ["trainer=ddp"], ["trainer=fsdp"]], ids=" ".join)
@pytest.mark.parametrize("value", [2, 0, "null2"])
@pytest.mark.share(6)
def test_g3_machines_that_nobody_has_started_are_refused_at_once(
    command: str, more: list[str], value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused([command, *more, f"trainer.num_nodes={value}"], capsys)
    if value == 2:
        assert "to say where 2 machines meet, got none for NODE_RANK, MASTER_ADDR" in message
    else:
        assert f"trainer.num_nodes: expected 1, this machine, got {value!r}" in message


def test_g3_started_once_a_machine_it_becomes_a_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """As plain Lightning is started."""
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    launchers.exec_torchrun(2, 4, ["train", "trainer=ddp", "trainer.num_nodes=2"])
    (command,) = started
    assert command[1:3] == ["-m", "torch.distributed.run"]
    own = {"--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--master-addr=n1"}
    assert own | {"--master-port=29500"} <= set(command)
    assert command[-5:] == ["-m", "tokenprune.cli", "train", "trainer=ddp", "trainer.num_nodes=2"]


@pytest.mark.parametrize("around", ALONE, indirect=True)
@pytest.mark.share(6)
def test_g1_a_process_alone_runs(around: str, checkpoint: Path) -> None:
    own = [*random_llava(checkpoint), *TINY, "data.test.num_samples=2", "hydra.run.dir=run"]
    assert cli.main(["eval", *own]) == 0
    assert Path("run/metrics.json").is_file()


@pytest.mark.parametrize("around", ALONE, indirect=True)
def test_g2_processes_of_a_run_meet_on_this_machine(
    around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a scheduler says: they would wait for processes that nobody starts."""
    # What a trainer takes its process for would hold for all later ones of this process.
    monkeypatch.setattr(rank_zero_only, "rank", rank_zero_only.rank)
    launchers.check_launch()
    own = OwnProcesses()
    assert (own.main_address, own.node_rank()) == ("127.0.0.1", 0)
    assert own.main_port not in (1, 29500)
    assert own.main_port == own.main_port
    if not ALONE[around].get("RANK"):
        monkeypatch.setenv("LOCAL_RANK", "1")  # as in the processes that Lightning starts
        assert own.main_address == "127.0.0.1"
    options = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "devices": 2}
    options |= {"strategy": "ddp_spawn", "logger": False, "enable_checkpointing": False}
    trainer = build_trainer(options)
    assert isinstance(trainer.strategy.cluster_environment, OwnProcesses)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "mistake",
    [
        "train trainer=ddp data.batch_size=0",
        "eval trainer=cpu",
        "eval trainer=ddp strategy=x",
    ],
)
def test_g1_a_mistake_is_told_by_one_process(mistake: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = run([*launcher, "--no-python", *COMMAND, *mistake.split()], 1)
    said = re.findall(r"^tokenprune: .*", done.stderr, re.MULTILINE)
    assert len(said) == 1, done.stderr
    assert ": expected " in said[0]
    assert re.search(r"exitcode +: 2 ", done.stderr)
    assert list(Path().iterdir()) == []


@pytest.fixture
def lone(monkeypatch: pytest.MonkeyPatch) -> launchers.Launch:
    """The first of two processes, the other of which nobody starts; patience is short."""
    for name, seconds in (("PATIENCE", 0.2), ("_START", 2.0), ("LOST", 0.5)):
        monkeypatch.setattr(team, name, seconds)
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
    return launchers.Launch("torchrun", 0, 2, 0, 2, 1, "127.0.0.1", port)


def test_g2_a_process_that_waits_for_nobody_says_so(
    lone: launchers.Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "processes: expected 2, as RANK and WORLD_SIZE say, got 1 in "
    with (
        pytest.raises(team.LostProcess, match=f"{told}.*, unset RANK and WORLD_SIZE"),
        team.led(lone),
    ):
        team.together(print, "nothing")
    said = capsys.readouterr()
    assert re.match(rf"tokenprune: {told}\d+ s. Start the others, or, where this is the", said.err)
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_g2_one_that_waits_for_the_first_says_so(
    lone: launchers.Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="torchrun: expected all processes to meet at "):
        team.follow(replace(lone, rank=1))
    assert capsys.readouterr().err.count("got 1 in 0 s. Start the others") == 1


def test_g2_a_process_that_waits_for_others_hears_signals(
    lone: launchers.Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "_START", 100.0)
    begun = time.monotonic()

    def wait() -> None:
        with team.led(lone):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            team.together(print, "nothing")

    with pytest.raises(SystemExit) as stop:
        wait()
    assert stop.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 60
