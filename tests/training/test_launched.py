"""Training by processes that torchrun has started: as by one, and none is lost without a word."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PIPE, STDOUT, run, started
from safetensors.torch import load_file

pytestmark = pytest.mark.matrix

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = [
    *("-m", "tokenprune.cli", "train", "model=tiny", "trainer.accelerator=cpu"),
    *("data.train.num_samples=12", "data.validation.num_samples=5"),
    *("trainer.log_every_n_steps=1", "trainer.val_check_interval=2", "checkpoint_every=2"),
    *("trainer.max_steps=6", "+trainer.enable_progress_bar=false", "learning_rate=1e-3"),
]
#: Steps of four samples, whoever does them.
SHARES = {1: "data.batch_size=4", 2: "data.batch_size=2", 4: "data.batch_size=1"}


def port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def callback(**options: Any) -> str:
    told = "".join(f",{key}:{value}" for key, value in options.items())
    return (
        f"trainer.callbacks=[{{_target_:failures.Fail{told}}}]"
        if options
        else ("trainer.callbacks=[]")
    )


def train(
    processes: int,
    *overrides: str,
    nodes: int = 1,
    how: str = "ddp",
    code: int = 0,
    **failure: Any,
) -> str:
    """Trains under torchrun, in this folder, in the run's folder `run`; what is said."""
    own = [*TRAIN, f"trainer={how}", SHARES[processes], "hydra.run.dir=run", callback(**failure)]
    meets = port()
    said = ""
    with ExitStack() as stack:
        agents = []
        for node in range(nodes):
            place = [f"--nnodes={nodes}", f"--node-rank={node}", "--master-addr=127.0.0.1"]
            place += [f"--master-port={meets}", f"--nproc-per-node={processes // nodes}"]
            command = [*TORCHRUN, *place, *own, *overrides]
            streams = {"stdout": PIPE, "stderr": STDOUT}
            agents.append(stack.enter_context(started(command, **streams)))
        for agent in agents:
            said += agent.communicate(timeout=230)[0]
    assert {agent.returncode for agent in agents} == {code}, said
    return said


def told(said: str) -> str:
    """The one line that the command says; whom the launcher stops, too, adds how to go on."""
    lines = re.findall(r"tokenprune: (?!what is done is kept).*", said)
    assert len(lines) == 1, said
    return str(lines[0])


def curve(folder: Path) -> dict[tuple[str, int], float]:
    """Losses and accuracies by step; none is there twice."""
    with (folder / "csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("train_loss", "val_loss", "val_accuracy")
    values = [((name, int(row["step"])), row[name]) for row in rows for name in names if row[name]]
    assert len(dict(values)) == len(values)
    return {key: float(value) for key, value in values}


def assert_same(one: Path, other: Path) -> None:
    """Same curves, same weights, same summary."""
    assert curve(other) == pytest.approx(curve(one), abs=1e-4)
    summaries = [json.loads((folder / "training.json").read_text()) for folder in (one, other)]
    validations = [summary["validation"] for summary in summaries]
    assert validations[0].pop("loss") == pytest.approx(validations[1].pop("loss"), abs=1e-4)
    for name in ("steps", "avg_tokens", "validation"):
        assert summaries[0][name] == summaries[1][name]
    weights, others = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by one process, which starts no other."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    own = [*TRAIN, "trainer=cpu", SHARES[1], f"hydra.run.dir={folder}", "trainer.callbacks=[]"]
    run([sys.executable, *own])
    return folder


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("how", "processes", "nodes"), [("ddp", 2, 2), ("ddp", 4, 2), ("fsdp", 4, 2), ("fsdp", 2, 1)]
)
def test_processes_of_torchrun_are_one(alone: Path, how: str, processes: int, nodes: int) -> None:
    said = train(processes, how=how, nodes=nodes)
    assert said.count("6 steps") == 1
    assert_same(alone, Path("run"))
    assert [path.name for path in Path().iterdir()] == ["run"]
    last = Path("run/checkpoints/last.ckpt")
    assert last.is_dir() == (how == "fsdp")
    if how == "fsdp":
        assert len(list(last.glob("*.distcp"))) == processes
    assert not [path for path in Path("run").rglob(".*") if path.name != ".metadata"]


def test_plain_lightning_is_started_once_a_machine(alone: Path) -> None:
    own = [sys.executable, *TRAIN, "trainer=ddp", SHARES[2], "hydra.run.dir=run", callback()]
    own += ["trainer.num_nodes=2", "trainer.devices=1"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    with ExitStack() as stack:
        for node in "01":
            options: Any = {"env": os.environ | place | {"NODE_RANK": node}}
            command = stack.enter_context(started(own, **options))
        assert command.wait(230) == 0
        assert_same(alone, Path("run"))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("numbers", [(4, 1, 4), (1, 2, 4)], ids=str)
def test_other_numbers_of_processes_go_on(alone: Path, how: str, numbers: Sequence[int]) -> None:
    """Each attempt loses a process in the middle of a step, two steps after the one before."""
    again: list[str] = []
    for number, processes in enumerate(numbers):
        if number == 2:
            train(processes, *again, how=how)
            break
        failure = {"failure": "kill", "rank": processes - 1, "at": 3}
        said = train(processes, *again, how=how, code=1, **failure)
        if processes > 1:
            assert f"process {processes - 1} of {processes} (process " in told(said)
            assert "is gone: killed" in told(said)
        assert last_step() == 2 * number + 2
        again = ["ckpt_path=last"]
    assert_same(alone, Path("run"))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_process_that_fails_is_named(how: str) -> None:
    said = train(2, how=how, code=1, rank=1, at=3)
    assert "got from process 1 of 2 (process " in told(said)
    assert told(said).endswith("in the middle of a step (RuntimeError)")
    assert said.count("RuntimeError: in the middle of a step") == 1  # where it happened
    assert last_step() == 2


@pytest.mark.parametrize(("how", "rank"), [("ddp", 0), ("fsdp", 0), ("fsdp", 1)])
def test_a_full_disk_of_one_process(alone: Path, how: str, rank: int) -> None:
    """It cannot write its checkpoint of step 4: the one before stays, and all end."""
    said = train(2, how=how, code=1, rank=rank, at=3, failure="disk")
    assert "files: expected to read and write what a run needs, got: [Errno" in told(said)
    assert "checkpoints/last.ckpt'" in told(said)
    if how == "fsdp":
        assert f"(process {rank})" in told(said)
    assert last_step() == 2
    train(2, "ckpt_path=last", how=how)
    assert_same(alone, Path("run"))


def last_step() -> int:
    """Of the last checkpoint, which is whole."""
    path = Path("run/checkpoints/last.ckpt")
    content = torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)
    return int(content["global_step"])
