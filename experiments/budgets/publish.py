"""After `tokenprune eval -m experiment=budgets`: keeps the table, draws the curves."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent
SOURCE = Path("outputs/budgets/results.csv")
COLOURS = {"pyramiddrop": "#0072b2", "fastv": "#d55e00", "uniform": "#009e73", "random": "0.5"}


def main() -> None:
    """Accuracy against the share of FLOPs, one panel per family of schedules."""
    table = pd.read_csv(SOURCE)
    table.drop(columns=["run", "prefill_ms"]).round(5).to_csv(ROOT / "results.csv", index=False)
    unpruned = table[table["strategy"] == "none"].iloc[0]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"pyramid": "three cuts (layers 2, 4, 6)", "one_shot": "one cut (layer 2)"}
    for axes, (schedule, title) in zip(panels, titles.items(), strict=True):
        for strategy, colour in COLOURS.items():
            own = table[(table["strategy"] == strategy) & (table["schedule"] == schedule)]
            own = own.sort_values("tflops_ratio")
            error = [own["accuracy"] - own["ci_low"], own["ci_high"] - own["accuracy"]]
            axes.errorbar(100 * own["tflops_ratio"], own["accuracy"], error, label=strategy,
                          color=colour, marker="o", markersize=4, linewidth=1.5)  # fmt: skip
        axes.axhline(unpruned["accuracy"], color="0.2", linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="FLOPs of the visual tokens, % of the unpruned model's")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="right answers", ylim=(0.15, 1.02))
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "budgets.png", dpi=120)


if __name__ == "__main__":
    main()
