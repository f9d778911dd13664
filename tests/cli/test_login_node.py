"""Where Slurm is installed, a run of one process is as quiet as anywhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commands import TINY, random_llava

from tokenprune.cli import main as cli

#: Variables of Slurm's, without `SLURM_`.
SESSIONS = {
    "login node": {},
    "interactive job": {"JOB_ID": "7", "JOB_NAME": "bash", "NTASKS": "2"},
    "batch job": {
        **{"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "NNODES": "1"},
        **{"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "node7"},
    },
}


@pytest.fixture(params=SESSIONS)
def _slurm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "srun"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in SESSIONS[request.param].items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.usefixtures("_slurm")
@pytest.mark.filterwarnings("error:The .srun. command:UserWarning")
@pytest.mark.parametrize("command", ["eval", "train"])
@pytest.mark.share(6)
def test_a_run_says_nothing_alarming(
    command: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*random_llava(checkpoint), "hydra.run.dir=run"]
    if command == "eval":
        own += [*TINY, "data.test.num_samples=2"]
    else:
        own += ["trainer.callbacks=[]", "+trainer.enable_progress_bar=false", "data.batch_size=2"]
        own += ["trainer.max_steps=1", "data.train.num_samples=2", "data.validation.num_samples=2"]
    assert cli.main([command, *own]) == 0
    assert capsys.readouterr().err == ""
