"""What loggers get: the config, the final table, pictures of kept tokens; and one of them a run.

W&B and MLflow have an environment of their own: `make test-loggers`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from commands import COMMAND, TINY, random_llava, refused
from PIL import Image
from processes import run

from tokenprune.cli import main as cli
from tokenprune.runs import extras

EVAL = ["eval", *TINY, "data.test.num_samples=2", "strategy=fastv", "hydra.run.dir=run"]
TRAIN = [
    *("train", "trainer.callbacks=[]", "trainer.max_steps=1", "data.batch_size=2"),
    *("data.validation.num_samples=2", "hydra.run.dir=run", "+trainer.enable_progress_bar=false"),
]
#: Two processes of one run.
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=1"]
TOLERANT = pytest.mark.filterwarnings("ignore:.*")  # of others, about themselves


@pytest.mark.parametrize("command", ["eval", "train"])
@pytest.mark.parametrize(
    ("logger", "package", "extra"),
    [("wandb", "wandb", "wandb"), ("mlflow", "mlflow", "mlflow"),
     ("tensorboard", "tensorboard", "train")],
)  # fmt: skip
@pytest.mark.share(3)
def test_a_logger_that_is_not_installed_is_refused(
    command: str,
    logger: str,
    package: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: (name != package and known(name)) or None)
    message = refused([command, f"logger={logger}"], capsys)
    assert f"logger: expected the package {package!r} for " in message
    assert f"pip install 'tokenprune-vlm[{extra}]'" in message


@TOLERANT
def test_tensorboard_shows_table_and_pictures(checkpoint: Path) -> None:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert cli.main([*EVAL, *random_llava(checkpoint), "logger=tensorboard"]) == 0
    tags = module.EventAccumulator("run/tensorboard").Reload().Tags()
    assert tags["images"] == ["kept/test-0-0"]
    assert "results/text_summary" in tags["tensors"]


@pytest.mark.matrix
@TOLERANT
@pytest.mark.parametrize("processes", [1, 2])
def test_mlflow(checkpoint: Path, processes: int) -> None:
    mlflow = pytest.importorskip("mlflow")
    own = [*random_llava(checkpoint), "logger=mlflow", *(TWO if processes == 2 else [])]
    for command in (EVAL, TRAIN):
        run([*COMMAND, *command, *own])
        client = mlflow.MlflowClient(f"sqlite:///{Path('run/mlflow.db').absolute()}")
        (experiment,) = (e for e in client.search_experiments() if e.name == "tokenprune")
        (entry, *before) = client.search_runs([experiment.experiment_id])
        assert len(before) == (command is TRAIN)  # one for each command, however many processes
        assert entry.data.params["model/path"] == str(checkpoint)
        assert entry.info.status == "FINISHED"
        names = {item.path for item in client.list_artifacts(entry.info.run_id)}
        assert "results.json" in names
        if command is EVAL:
            assert "accuracy" in entry.data.metrics
            (picture,) = client.list_artifacts(entry.info.run_id, "kept")
            assert Path("run/mlflow").rglob(Path(picture.path).name)
        else:
            assert "train_loss" in entry.data.metrics


@pytest.mark.matrix
@TOLERANT
@pytest.mark.parametrize("processes", [1, 2])
def test_wandb(checkpoint: Path, processes: int) -> None:
    pytest.importorskip("wandb")
    own = [*random_llava(checkpoint), "logger=wandb", "logger.offline=true"]
    own += TWO if processes == 2 else []
    for number, command in enumerate((EVAL, TRAIN), start=1):
        run([*COMMAND, *command, *own])
        folders = sorted(Path("run/wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime)
        assert len(folders) == number  # one for each command, however many processes
        (record,) = folders[-1].glob("*.wandb")
        content = record.read_bytes()
        assert str(checkpoint).encode() in content
        (table,) = folders[-1].glob("files/media/table/*.json")
        columns = json.loads(table.read_text())["columns"]
        if command is EVAL:
            assert "accuracy" in columns
            (picture,) = folders[-1].glob("files/media/images/*.png")
            with Image.open(picture) as image:
                assert image.width > 16
        else:
            assert "train_loss" in columns
            assert b"learning_rate_decoder" in content


@pytest.mark.matrix
@TOLERANT
def test_the_runs_of_a_sweep_are_runs_of_wandb(checkpoint: Path) -> None:
    pytest.importorskip("wandb")
    own = [*EVAL[:-1], *random_llava(checkpoint), "logger=wandb", "logger.offline=true"]
    run([*COMMAND, "eval", "-m", *own[1:], "seed=0,1", "hydra.sweep.dir=sweep"])
    assert len(list(Path("sweep").glob("*/wandb/offline-run-*"))) == 2
