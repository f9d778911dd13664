"""After training: ships the weights, tests them on unseen scenes, draws the learning curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from tokenprune.cli.main import main as tokenprune_command
from tokenprune.runs.models import LEVELS, SHIPPED

ROOT = Path(__file__).resolve().parent
#: Column of the log that says how full scenes were, and what it says.
FULLNESS = {"objects": "most objects per scene", "max_alike": "most objects of one colour"}
NUM_TEST = 2000


def publish(name: str, folder: Path, times: dict[str, float]) -> None:
    """Copies a model into the package and writes `results/`.

    Args:
        name: Of the model, as `model=` knows it.
        folder: Where the recipe left its model and logs.
        times: Seconds of each phase.
    """
    target, shipped = ROOT / "results" / name, SHIPPED[name]
    target.mkdir(parents=True, exist_ok=True)
    log = read_logs(folder)
    log.to_csv(target / "log.csv", index=False)
    draw(log, target / "learning_curve.png")
    shutil.rmtree(shipped, ignore_errors=True)
    shutil.copytree(folder / "model", shipped)
    run = folder / "test"
    shutil.rmtree(run, ignore_errors=True)
    data = "scenes" if LEVELS[name] == "easy" else "scenes_hard"
    code = tokenprune_command(
        [
            *("eval", "strategy=none", f"model={name}", f"data={data}"),
            *(f"data.test.num_samples={NUM_TEST}", f"hydra.run.dir={run}"),
        ]
    )
    assert code == 0, code
    metrics = json.loads((run / "metrics.json").read_text())
    kept = {
        key: metrics[key] for key in ("num_samples", "accuracy", "accuracy_low", "accuracy_high")
    }
    summary = kept | {"kinds": metrics["kinds"], "seconds": times}
    (target / "test.json").write_text(json.dumps(summary, indent=2) + "\n")


def read_logs(folder: Path) -> pd.DataFrame:
    """The phases' logs, one after another, every tenth step; a resumed run's log wins."""
    parts, steps = [], 0
    for phase in ("tower", "lookup", "final", "measure", "join", "settle"):
        logs = sorted((folder / phase).glob("log_*/metrics.csv"))
        part = pd.DataFrame()
        for log in map(pd.read_csv, logs):
            part = pd.concat([part[part["step"] < log["step"].min()] if len(part) else part, log])
        if len(part):
            part.insert(0, "phase", phase)
            part.insert(1, "total_step", part["step"] + steps)
            steps = int(part["total_step"].max()) + 1
            parts.append(part)
    return pd.concat(parts).round(4)


def draw(log: pd.DataFrame, path: Path) -> None:
    """Accuracy per kind over training, with the number of objects behind it."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    crowd = log.dropna(subset=["patch_accuracy"])
    axes.plot(crowd["total_step"], crowd["patch_accuracy"], color="0.5", label="patches (tower)")
    kinds = [c for c in log if c.startswith("accuracy_")]
    for column in kinds:
        part = log.dropna(subset=[column])
        axes.plot(part["total_step"], part[column], label=column.removeprefix("accuracy_"))
    for start in log.groupby("phase", sort=False)["total_step"].min().iloc[1:]:
        axes.axvline(start, color="0.8", zorder=0)
    axes.set(xlabel="step", ylabel="training accuracy", ylim=(0, 1.02))
    axes.legend(loc="lower right", fontsize=8, ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    objects = axes.twinx()
    (column,) = FULLNESS.keys() & {*log.columns}
    part = log.dropna(subset=[column])
    objects.step(part["total_step"], part[column], color="0.85", zorder=0)
    objects.set(ylabel=FULLNESS[column], ylim=(0, 10))
    objects.spines[["top"]].set_visible(False)
    figure.savefig(path, dpi=120)
