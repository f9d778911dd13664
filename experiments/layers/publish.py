"""After `tokenprune eval -m experiment=layers`: keeps the table, draws the heat maps."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent
SOURCE = Path("outputs/layers/results.csv")


def main() -> None:
    """Accuracy by layer of the cut and fraction kept, for a ranking and for none."""
    table = pd.read_csv(SOURCE)
    table.drop(columns=["run", "prefill_ms"]).round(5).to_csv(ROOT / "results.csv", index=False)
    cuts = table[table["strategy"] != "none"].astype({"layers": float, "keeps": float})
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, strategy in zip(figure.subplots(1, 2), ("pyramiddrop", "random"), strict=True):
        own = cuts[cuts["strategy"] == strategy]
        grid = own.pivot(index="keeps", columns="layers", values="accuracy").sort_index()
        axes.imshow(grid, origin="lower", vmin=0.1, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(grid.columns)), [f"{layer:.0f}" for layer in grid.columns])
        axes.set_yticks(range(len(grid.index)), [f"{keep:g}" for keep in grid.index])
        axes.set(title=strategy, xlabel="layer of the cut", ylabel="fraction kept")
        for row, values in enumerate(grid.to_numpy()):
            for column, value in enumerate(values):
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                          color="white" if value < 0.7 else "black")  # fmt: skip
    figure.savefig(ROOT / "layers.png", dpi=120)


if __name__ == "__main__":
    main()
