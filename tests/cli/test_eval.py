"""`tokenprune eval`: what runs and sweeps leave, and which runs a sweep has."""

from __future__ import annotations

import csv
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND, TINY, random_llava, refused
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from processes import run

from tokenprune.cli import main as cli
from tokenprune.evaluation import loading
from tokenprune.runs.compose import build_pruning, config_dir
from tokenprune.runs.sweeps import expand, run_name, sweep_name


def test_a_run_leaves_its_files(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*random_llava(checkpoint), *TINY, "data.test.num_samples=6", "hydra.run.dir=run"]
    HydraConfig.instance().cfg = None  # as in a fresh process
    command = ["eval", *overrides, "strategy=fastv", "logger=csv"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "fastv" in said
    assert "complete already" not in said
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert (metrics["strategy"], metrics["schedule"]) == ("fastv", "one_shot")
    assert (metrics["layers"], metrics["keeps"], metrics["positions"]) == ([2], [0.5], "original")
    assert metrics["num_samples"] == 6
    assert metrics["model"] == str(checkpoint)
    assert "accuracy" in Path("run/csv/metrics.csv").read_text()
    assert len(Path("run/predictions.jsonl").read_text().splitlines()) == 6
    assert cli.main(command) == 0
    assert "complete already" in capsys.readouterr().out


def test_a_sweep_makes_a_table_and_skips_what_is_complete(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "-m", *random_llava(checkpoint), *TINY, "data.test.num_samples=5"]
    command += ["strategy=none,uniform", "schedule=pyramid", "schedule.lam=0.3,0.5"]
    assert cli.main(command) == 0
    assert "4 runs" in capsys.readouterr().out
    (folder,) = Path("outputs").iterdir()
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["strategy"] for row in rows] == ["none", "none", "uniform", "uniform"]
    assert [row["lam"] for row in rows] == ["", "", "0.3", "0.5"]

    stopped = folder / rows[3]["run"] / "metrics.json"
    stopped.unlink()
    kept = folder / rows[2]["run"] / "metrics.json"
    before = kept.stat().st_mtime_ns
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("complete already") == 3
    assert stopped.is_file()
    assert kept.stat().st_mtime_ns == before
    assert [path.name for path in Path("outputs").iterdir()] == [folder.name]

    # The first step of a report: the same folder, as a page.
    pytest.importorskip("tokenprune.report.page")
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()


@pytest.mark.matrix
def test_a_sweep_runs_again_what_has_other_data(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "question": "what ?", "answer": "red"}))
    command = ["eval", "-m", *random_llava(checkpoint), *TINY, "data=folder", f"data.path={rows}"]
    command += ["strategy=random", "strategy.seed=1,2"]
    assert cli.main(command) == 0
    rows.write_text(rows.read_text().replace("red", "green"))
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("again: data.path changed") == 2
    (folder,) = Path("outputs").iterdir()
    with (folder / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["seed"], row["data"], row["strategy"]) for row in table] == [
        ("1", str(rows), "random"),
        ("2", str(rows), "random"),
    ]
    assert json.loads((folder / table[0]["run"] / "predictions.jsonl").read_text())["answer"] == (
        "green"
    )


def test_rows_of_two_commits_of_a_data_set_are_told_apart(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is complete stays so, whatever has come to the Hub: nobody asks it."""
    datasets = pytest.importorskip("datasets")
    row = {"image": [Image.new("RGB", (32, 32))], "question": ["what ?"], "answer": ["red"]}
    (tmp_path / "data").mkdir()
    whole = datasets.Dataset.from_dict(row)
    whole.to_parquet(str(tmp_path / "data/test.parquet"))
    found = datasets.load_dataset_builder(str(tmp_path / "data"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *given, **options: found)
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: {"test": whole})
    command = ["eval", "-m", *random_llava(checkpoint), *TINY, "data=hub", "data.path=owner/name"]
    command += ["hydra.sweep.dir=sweep"]
    for commit, strategy in (("a" * 40, "none"), ("b" * 40, "none,fastv")):
        found.hash = commit
        loading.cached_data.cache_clear()
        loading.cached_batches.cache_clear()
        assert cli.main([*command, f"strategy={strategy}"]) == 0
    said = capsys.readouterr().out
    assert "complete already" in said
    assert "data.path: owner/name had other contents for some runs: aaaaaaaa (1), bbbbbbbb" in said
    files = Path("sweep").rglob("versions.json")
    made = sorted(json.loads(path.read_text())["data.path"] for path in files)
    assert made == ["a" * 40, "b" * 40]
    with Path("sweep/results.csv").open(newline="") as file:
        assert {row["device"] for row in csv.DictReader(file)} == {"cpu"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """The configs of a command's runs, none of which is checked or run."""
    configs: list[DictConfig] = []
    monkeypatch.setattr("tokenprune.cli.checks.check", lambda found, own: configs.extend(found))
    monkeypatch.setattr("tokenprune.cli.hydra_start.start", lambda *arguments: None)
    return configs


@pytest.mark.matrix
def test_the_ablation_is_one_command(seen: list[DictConfig]) -> None:
    assert cli.main(["eval", "-m", "experiment=ablation"]) == 0
    places = [pruning and pruning.positions for pruning in (build_pruning(c, 8) for c in seen)]
    runs = [
        (config.strategy and config.strategy.name, dict(config.schedule), place)
        for config, place in zip(seen, places, strict=True)
    ]
    assert len(runs) == 19
    assert [name for name, _, _ in runs[:2]] == [None, None]
    assert [config.data.image_scale for config in seen[:2]] == [1.0, 0.35]
    crossed = {(name, s["lam"], s["num_stages"]) for name, s, _ in runs[2:]}
    assert len(crossed) == 17
    four = {(name, lam) for name, lam, stages in crossed if stages == 4}
    names = ("fastv", "pool", "pyramiddrop", "random", "uniform")
    assert four == set(itertools.product(names, (0.3, 0.5, 0.7)))
    assert {(name, lam) for name, lam, stages in crossed if stages == 2} == {
        ("pyramiddrop", 0.3),
        ("pyramiddrop", 0.7),
    }
    assert {place for _, _, place in runs[2:]} == {"original"}


def test_difficulty_has_what_chooses_nothing_at_every_budget() -> None:
    """Smaller pictures and averages stand beside the methods."""
    config: Any = OmegaConf.load(config_dir() / "experiment" / "difficulty.yaml")
    jobs = expand(OmegaConf.to_container(config.hydra.sweeper.grids), [])
    runs = [dict(part.split("=") for part in job) for job in jobs]
    scales = [float(own["data.image_scale"]) for own in runs if own["strategy"] == "none"]
    assert scales == [1.0, 0.5, 0.3333, 0.25, 0.1]
    budgets: dict[tuple[int, float], set[str]] = {}
    for own in runs[len(scales) :]:
        place = (int(own["schedule.layer"]), float(own["schedule.keep"]))
        budgets.setdefault(place, set()).add(own["strategy"])
    assert len(budgets) == 5
    assert all({"pool", "random"} < found for found in budgets.values())
    # Each budget has a smaller picture of its share of the tokens: mean over the model's 8 layers.
    shares = [(layer + (8 - layer) * keep) / 8 for layer, keep in budgets]
    assert all(min(abs(scale - share) for scale in scales) < 0.01 for share in shares)
    assert list(config.baseline) == ["downsample", "pool"]


@pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice on what is so small
@pytest.mark.matrix
def test_difficulty_on_the_shipped_model(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["data.test.num_samples=25", "num_pictures=0", "trainer.callbacks=[]"]
    few += ["hydra.sweep.dir=few", "positions=original"]
    assert cli.main(["eval", "-m", "strategy=none", "data.image_scale=1.0,0.1", *few]) == 0
    cut = ["schedule=one_shot", "schedule.layer=0", "schedule.keep=0.1"]
    command = ["eval", "-m", "strategy=pool,random,divprune", *cut, *few]
    assert cli.main([*command, "baseline=[downsample,pool]"]) == 0
    assert "after Holm's correction" in capsys.readouterr().out
    with Path("few/difficulty.csv").open(newline="") as file:
        split = {row["method"]: row for row in csv.DictReader(file)}
    assert set(split) == {"downsample", "pool", "random", "divprune"}
    assert {row["downsample_scale"] for row in split.values()} == {"0.1"}
    assert int(split["pool"]["num_hard"]) >= 3  # a tenth of the pixels does not show all
    assert float(split["divprune"]["hard"]) > float(split["pool"]["hard"])
    with Path("few/comparisons.csv").open(newline="") as file:
        rows = {(row["method"], row["against"]): row for row in csv.DictReader(file)}
    assert {against for _, against in rows} == {"unpruned", "random", "downsample", "pool"}
    assert rows["divprune", "random"]["verdict"] == "better"
    assert rows["random", "unpruned"]["verdict"] == "worse"
    assert cli.main(["report", "few", "--baseline", "fastv"]) == 2
    assert "baseline: expected a strategy or a run" in capsys.readouterr().err


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:.*")
def test_difficulty_runs(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["data.test.num_samples=5", "trainer.callbacks=[]", "num_pictures=1"]
    assert cli.main(["eval", "experiment=difficulty", *few]) == 0
    assert "30 runs" in capsys.readouterr().out
    assert cli.main(["report", "outputs/difficulty"]) == 0


def test_a_sweep_is_compared_with_what_it_has_only(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["eval", "-m", "strategy=none,fastv"]
    error = refused([*sweep, "baseline=fast"], capsys)
    assert "baseline: expected a strategy or a run of this sweep, got 'fast'" in error
    assert "baseline=[fastv,pool]" in refused([*sweep, "baseline=fastv,pool"], capsys)
    assert "expected the name" in refused(["eval", "baseline=3"], capsys)


def test_what_a_sweep_is_compared_with_makes_it_no_other(seen: list[DictConfig]) -> None:
    command = ["eval", "-m", "strategy=fastv,pool"]
    assert sweep_name([*command, "baseline=fastv"]) == sweep_name(command)
    assert run_name(["strategy=fastv", "baseline=[fastv,pool]"]) == "fastv"
    assert run_name(["strategy=fastv", "shard=1/8", "shard_timeout=9"]) == "fastv"
    assert sweep_name(["a=1", "shard=1/8"]) == sweep_name(["a=1"])
    assert cli.main([*command, "baseline=[fastv,pool]"]) == 0
    assert [list(config.baseline) for config in seen] == [["fastv", "pool"]] * 2


@pytest.mark.matrix
def test_experiments_of_your_own(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "budget.yaml").write_text(
        "# @package _global_\n"
        "defaults: [override /model: hub]\n"
        f"model: {{path: {checkpoint}}}\n"
        "hydra:\n"
        "  mode: MULTIRUN\n"
        "  sweep: {dir: outputs/budget}\n"
        "  sweeper:\n"
        "    grids:\n"
        "      - strategy: none\n"
        "      - strategy: fastv\n"
        "        schedule.keep: 0.25,0.5\n"
    )
    command = ["eval", "--config-dir", str(tmp_path / "mine"), "experiment=budget"]
    few = ["data.test.num_samples=2", *TINY]
    assert cli.main([*command, *few]) == 0
    assert "3 runs: outputs/budget/results.csv" in capsys.readouterr().out
    rows = csv.DictReader(Path("outputs/budget/results.csv").read_text().splitlines())
    assert {row["model"] for row in rows} == {str(checkpoint)}
    assert cli.main([*command, "schedule.keep=2", *few]) == 2
    capsys.readouterr()
    (tmp_path / "mine" / "experiment" / "layers.yaml").write_text("# @package _global_\n")
    assert cli.main(command) == 2
    assert "got experiment/layers.yaml, which tokenprune has" in capsys.readouterr().err


def test_an_experiment_sweeps_without_being_told(seen: list[DictConfig]) -> None:
    chosen = ["strategy=random", "schedule.lam=0.5", "schedule.num_stages=2"]
    assert cli.main(["eval", "experiment=ablation", *chosen, "seed=3,4"]) == 0
    assert {config.seed for config in seen} == {3, 4}
    assert cli.main(["eval", "strategy=random", "seed=3,4"]) == 2


def test_keys_that_fit_the_swept_choices_only(seen: list[DictConfig]) -> None:
    sweep = ["strategy=fastv,random", "schedule=one_shot", "schedule.keep=0.3,0.4"]
    assert cli.main(["eval", "-m", *sweep]) == 0
    assert [config.schedule.keep for config in seen] == [0.3, 0.4, 0.3, 0.4]


@pytest.mark.matrix
def test_a_signal_ends_an_evaluation(checkpoint: Path) -> None:
    own = [*random_llava(checkpoint), *TINY, "trainer.callbacks=[{_target_:stops.Terminate}]"]
    run([*COMMAND, "eval", *own], -signal.SIGTERM)
