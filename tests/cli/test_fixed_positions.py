"""The commands with a model whose positions cannot be counted anew."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint import save_qwen
from commands import refused
from omegaconf import OmegaConf
from PIL import Image

from tokenprune.cli import main as cli
from tokenprune.runs import compose

LINE = (
    "positions: original, not renumbered as published: this model has rotary embeddings with "
    "several axes\n"
)
#: Few samples and short answers.
SMALL = ["trainer.callbacks=[]", "max_new_tokens=2", "num_pictures=1", "data.test.num_samples=4"]
TRAIN = ["parts=[decoder]", "trainer.max_steps=1", "trainer.callbacks=[]", "data.batch_size=2"]
TRAIN += ["data.validation.num_samples=2", "trainer.num_sanity_val_steps=0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 32), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs every test in an empty folder, and as if in a process of its own."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    compose._say.cache_clear()
    yield
    compose._say.cache_clear()


def qwen(checkpoint: Path) -> list[str]:
    return ["model=hub", f"model.path={checkpoint}"]


def bench(checkpoint: Path) -> list[str]:
    return ["bench", "shape=hub", f"shape.path={checkpoint}", "num_visual=32", "num_text=8",
            "rounds=1", "warmup=1", "device=cpu"]  # fmt: skip


def test_eval_says_and_writes_that_positions_stay(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *qwen(checkpoint), *SMALL, "hydra.run.dir=run"]) == 0
    assert capsys.readouterr().out.count(LINE) == 1
    assert json.loads(Path("run/metrics.json").read_text())["positions"] == "original"
    assert OmegaConf.load("run/config.yaml").positions == "auto"


@pytest.mark.matrix
def test_a_sweep_says_it_once(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "-m", *qwen(checkpoint), *SMALL, "schedule=pyramid", "schedule.lam=0.3,0.5"]
    command += ["strategy=none,fastv,pyramiddrop", "hydra.sweep.dir=sweep"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count(LINE) == 1
    with Path("sweep/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["strategy"] for row in rows} == {"none", "fastv", "pyramiddrop"}
    assert {row["positions"] for row in rows} == {"original"}
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("complete already") == 6


def test_verify_and_show(
    checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", *qwen(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(LINE) == 1
    assert "identity, original positions" in printed
    assert "renumbered positions" not in printed
    assert "FAILED" not in printed
    compose._say.cache_clear()
    command = ["show", str(picture), "what ?", *qwen(checkpoint), "max_new_tokens=2"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(LINE)
    assert printed.count(LINE) == 1


def test_train(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *qwen(checkpoint), *TRAIN, "hydra.run.dir=run"]) == 0
    assert capsys.readouterr().out.count(LINE) == 1
    assert json.loads(Path("run/training.json").read_text())["positions"] == "original"


def test_bench_and_flops(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*bench(checkpoint), "hydra.run.dir=run"]) == 0
    assert capsys.readouterr().out.count(LINE) == 1
    with Path("run/bench.csv").open(newline="") as file:
        assert [row["positions"] for row in csv.DictReader(file)] == ["original"]
    assert cli.main(["flops", *qwen(checkpoint), "budget.num_visual=32"]) == 0


@pytest.mark.parametrize("command", ["eval", "verify", "show", "train", "bench"])
@pytest.mark.share(3)
def test_what_was_asked_for_and_cannot_be_is_refused(
    command: str, checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "eval": ["eval", *qwen(checkpoint), *SMALL],
        "verify": ["verify", *qwen(checkpoint)],
        "show": ["show", str(picture), "what ?", *qwen(checkpoint), "max_new_tokens=2"],
        "train": ["train", *qwen(checkpoint), *TRAIN],
        "bench": bench(checkpoint),
    }
    message = refused([*given[command], "positions=renumbered"], capsys)
    assert 'expected one-dimensional rotary embeddings with positions="renumbered"' in message
    assert message.endswith('Use positions="original".\n')
