"""Loggers get the whole config of a run (i4), each that there is a config for."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import TINY, random_llava
from omegaconf import OmegaConf

from tokenprune.cli import main as cli
from tokenprune.runs.compose import config_dir

#: None, and those of tests/cli/test_loggers.py.
OTHERS = {"none", "wandb", "mlflow"}
LOGGERS = sorted({path.stem for path in (config_dir() / "logger").glob("*.yaml")} - OTHERS)
COMMANDS = {
    "eval": ["eval", *TINY, "data.test.num_samples=2"],
    "train": ["train", "trainer.callbacks=[]", "trainer.max_steps=1", "data.batch_size=2",
              "data.validation.num_samples=2"],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice on what is so small
@pytest.mark.parametrize("logger", LOGGERS)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.share(5)
def test_i4_a_logger_has_the_config(command: str, logger: str, checkpoint: Path) -> None:
    if logger == "tensorboard":
        pytest.importorskip("tensorboard")
    own = [*COMMANDS[command], *random_llava(checkpoint), f"logger={logger}", "hydra.run.dir=run"]
    for seed in (1, 2):  # the second in place of the first
        assert cli.main([*own, "strategy=fastv", f"seed={seed}"]) == 0
        (file,) = Path("run").rglob("hparams.yaml")
        told = OmegaConf.to_container(OmegaConf.load(file))
        assert told == OmegaConf.to_container(OmegaConf.load("run/config.yaml"))
        assert (told["seed"], told["strategy"]["name"]) == (seed, "fastv")


def test_i4_tensorboard_s_table_of_runs(checkpoint: Path) -> None:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    own = [*COMMANDS["eval"], *random_llava(checkpoint), "logger=tensorboard", "hydra.run.dir=run"]
    assert cli.main([*own, "schedule.lam=0.25"]) == 0
    events = module.EventAccumulator("run/tensorboard").Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"schedule/lam" in content
    assert b"max_new_tokens" in content
    assert "accuracy" in events.Tags()["scalars"]
