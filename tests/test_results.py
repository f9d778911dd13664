"""Files of runs and sweeps, and which runs a sweep has."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from tokenprune import results
from tokenprune.sweep import expand, run_name, sweep_name

CONFIG = {"seed": 0, "model": {"path": "tiny"}, "strategy": None, "layers": [1, 2]}
METRICS = {
    "strategy": "fastv",
    "schedule": "pyramid",
    "lam": 0.5,
    "num_stages": 3,
    "layers": [2, 4],
    "keeps": [0.5, 0.25],
    "positions": "original",
    "seed": 0,
    "model": "tiny",
    "num_samples": 4,
    "accuracy": 0.75,
    "accuracy_low": 0.3,
    "accuracy_high": 0.95,
    "kinds": {"read": {"accuracy": 0.5}, "text": {"accuracy": 1.0}},
    "avg_tokens": 80.0,
    "final_tokens": 36.0,
    "tflops": 0.1,
    "tflops_ratio": 0.5,
    "prefill_ms": 1.5,
    "kv_mb": 0.2,
    "num_visual": 144.0,
}


def write(folder: Path, **changes: object) -> None:
    results.write_run(
        folder=folder,
        config=CONFIG,
        metrics=METRICS | changes,
        predictions=[{"id": "a", "answer": "é"}],
        kept=[],
        images={"images/a.png": Image.new("RGB", (4, 4))},
        device="cpu",
    )


def test_a_run_is_complete_with_its_own_config_only(tmp_path: Path) -> None:
    assert not results.is_complete(tmp_path, CONFIG)
    write(tmp_path)
    assert results.is_complete(tmp_path, CONFIG)
    assert not results.is_complete(tmp_path, CONFIG | {"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "images",
        "kept.json",
        "metrics.json",
        "predictions.jsonl",
        "versions.json",
    ]
    assert "torch" in json.loads((tmp_path / "versions.json").read_text())


def test_a_run_that_stops_halfway_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)

    def full(path: Path, text: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(results, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path)
    assert not results.is_complete(tmp_path, CONFIG)


def test_table_is_tidy(tmp_path: Path) -> None:
    write(tmp_path / "first")
    unpruned = {"strategy": "none", "schedule": None, "lam": None, "layers": None, "keeps": None}
    write(tmp_path / "second", **unpruned, kinds={"text": {"accuracy": 0.25}})
    (tmp_path / "third").mkdir()  # interrupted
    rows = results.collect(tmp_path, ["second", "first", "third", "first"])
    path = results.write_table(tmp_path, rows)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["run"] for row in read] == ["second", "first"]
    assert list(read[0])[:9] == [*results.COLUMNS[:9]]
    assert read[1]["layers"] == "2 4"
    assert read[1]["keeps"] == "0.5 0.25"
    assert (read[0]["lam"], read[0]["accuracy_read"], read[0]["accuracy_text"]) == ("", "", "0.25")
    assert (read[1]["accuracy_read"], read[1]["accuracy_text"]) == ("0.5", "1.0")


def test_finish_sweep_prints_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.finish_sweep(tmp_path, ["run"])  # training leaves no metrics
    assert not (tmp_path / "results.csv").exists()
    assert capsys.readouterr().out == ""
    write(tmp_path / "run")
    results.finish_sweep(tmp_path, ["run"])
    printed = capsys.readouterr().out
    assert "pyramid λ=0.5, 3 stages" in printed
    assert "75.0 %" in printed
    assert (tmp_path / "results.csv").is_file()


def test_cuts_without_lam_are_spelt_out() -> None:
    entry = results.row(METRICS | {"schedule": "explicit", "lam": None}, "run")
    assert results._schedule(entry) == "explicit, 0.5 at 2, 0.25 at 4"


@pytest.mark.parametrize("identifier", ["../../etc/passwd", "a/b c", "ä", "", "...", "test-0-1"])
def test_pictures_stay_in_their_folder(identifier: str) -> None:
    path = Path(results.image_name(identifier))
    assert path.parent == Path("images")
    assert path.suffix == ".png"


def test_grids_expand_one_after_another() -> None:
    grids = [{"strategy": "none"}, {"strategy": "a,b", "schedule.lam": "0.3,0.5", "x": 1}]
    jobs = expand(grids, ["seed=1,2"])
    assert jobs[:2] == [["strategy=none", "seed=1"], ["strategy=none", "seed=2"]]
    assert jobs[2] == ["strategy=a", "schedule.lam=0.3", "x=1", "seed=1"]
    assert len(jobs) == 2 + 8


def test_the_command_line_wins_over_grids() -> None:
    grids = [{"strategy": "none"}, {"strategy": "a,b", "lam": "0.3,0.5"}]
    assert expand(grids, ["strategy=c", "lam=0.7"]) == [["strategy=c", "lam=0.7"]]
    assert expand([], ["strategy=c,d"]) == [["strategy=c"], ["strategy=d"]]


def test_intervals_are_refused() -> None:
    with pytest.raises(ValueError, match="lam: expected values separated by commas"):
        expand([], ["lam=interval(0,1)"])


def test_names_of_runs_are_stable_and_distinct() -> None:
    job = ["strategy=fastv", "schedule=pyramid", "schedule.lam=0.3", "schedule.num_stages=4"]
    assert run_name(job) == "fastv,pyramid,lam=0.3,num_stages=4"
    assert run_name(["experiment=ablation", *job]) == run_name(job)
    assert run_name([]) == "default"
    paths = [run_name([f"model.path=/a/{name}"]) for name in ("b?", "b*", "x" * 300)]
    assert len(set(paths)) == 3
    assert all(len(path) <= 120 and "/" not in path for path in paths)
    assert sweep_name(["a=1", "b=2"]) == sweep_name(["b=2", "a=1"]) != sweep_name(["a=1"])
