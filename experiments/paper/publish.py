"""After `make paper`: keeps the tables of all runs, draws the figures, writes tables.md.

Means over seeds come with the 95 % interval of Student's t.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent
SOURCE = Path("outputs/paper")
RESULTS = ROOT / "results"
T = {2: 12.706, 3: 4.303}  # Student's t for 95 %, by number of seeds
RECIPES = {
    "none": "vanilla",
    "pyramiddrop,lam=0.5": "λ = 0.5",
    "pyramiddrop,lam=0.3": "λ = 0.3",
    "pyramiddrop,num_stages=8": "λ = 0.5, 8 stages",
}
VANILLA, FASTV_HALF, FASTV_TENTH = "vanilla", "FastV, half", "FastV, a tenth"
KINDS = ("read", "colour", "exist", "relation", "count", "compare", "steps", "text")


def read_trainings() -> pd.DataFrame:
    """A row per training: how, its seed, what it ended with."""
    rows = []
    for path in sorted((SOURCE / "training").glob("*/training.json")):
        recipe, _, seed = path.parent.name.rpartition(",seed=")
        found = json.loads(path.read_text())
        rows.append(
            {"trained": RECIPES[recipe], "seed": int(seed), "steps": found["steps"]}
            | {"avg_tokens": found["avg_tokens"], "train_loss": found["train_loss"]}
            | {f"val_{name}": found["validation"][name] for name in ("loss", "accuracy")}
        )
    return pd.DataFrame(rows)


def read_sweep(name: str) -> pd.DataFrame:
    """A sweep's table, with how its models were trained."""
    table = pd.read_csv(SOURCE / name / "results.csv")
    configs = [OmegaConf.load(SOURCE / name / run / "config.yaml") for run in table["run"]]
    table["trained"] = [RECIPES[config.trained] for config in configs]
    return table.drop(columns=["run", "model", "prefill_ms"])


def inferred(row: pd.Series) -> str:
    """What a model ran with, by the names of the tables."""
    if row["strategy"] == "none":
        return VANILLA
    if row["strategy"] == "fastv":
        return FASTV_HALF if float(row["keeps"]) == 0.5 else FASTV_TENTH
    stages = int(row["num_stages"])
    return f"λ = {row['lam']:g}" + ("" if stages == 4 else f", {stages} stages")


def mean(values: pd.Series, form: str = ".1f") -> str:
    """Mean and interval of a share over seeds, in %."""
    share = f"{100 * values.mean():{form}}"
    if len(values) < 2:
        return f"{share} (1 seed)"
    half = 100 * T[len(values)] * values.std() / len(values) ** 0.5
    return f"{share} ± {half:.1f}"


def lines(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def write_tables(
    runs: pd.DataFrame, steps: dict[str, str], share: Callable[[str], float]
) -> list[str]:
    """The paper's tables 1 to 4."""

    def cell(trained: str, ran: str, column: str = "accuracy") -> str:
        return mean(runs[(runs["trained"] == trained) & (runs["inferred"] == ran)][column])

    def gain(trained: str, ran: str) -> str:
        """Points over the vanilla training of the same seed."""
        own = runs[runs["inferred"] == ran].pivot(
            columns="trained", index="seed", values="accuracy"
        )
        return "" if trained == VANILLA else mean(own[trained] - own[VANILLA], "+.1f")

    usual, hard, hardest = [name for name in RECIPES.values() if name != VANILLA]
    one = [
        [trained, ran, f"{100 * share(ran):.0f}", steps[trained], cell(trained, ran)]
        + [cell(trained, ran, f"accuracy_{kind}") for kind in KINDS]
        for trained, ran in [
            (VANILLA, VANILLA), (usual, usual), (VANILLA, usual), (hard, hard), (VANILLA, hard),
            (hardest, hardest), (VANILLA, hardest),
        ]
    ]  # fmt: skip
    header = ["trained", "inferred", "FLOPs, %", "training step, %", "right, %", *KINDS]
    texts = ["## Tables 1 and 2: trained and inferred with PyramidDrop", lines(header, one)]
    three = [
        [trained, ran, f"{100 * share(ran):.0f}", cell(trained, ran), gain(trained, ran)]
        + [cell(trained, ran, f"accuracy_{kind}") for kind in KINDS]
        for ran in (FASTV_HALF, FASTV_TENTH)
        for trained in RECIPES.values()
    ]
    header = ["trained", "inferred", "FLOPs, %", "right, %", "over vanilla, points", *KINDS]
    texts += ["## Table 3: another pruner at inference", lines(header, three)]
    four = [
        [
            *(recipe, f"{100 * share(recipe):.0f}", steps[recipe]),
            *(cell(recipe, recipe), cell(VANILLA, recipe), gain(recipe, recipe)),
            cell(recipe, VANILLA),
        ]
        for recipe in RECIPES.values()
    ]
    header = ["schedule", "FLOPs, %", "training step, %", "trained and inferred with it",
              "inferred with it only", "gain of training, points",
              "trained with it, inferred unpruned"]  # fmt: skip
    return [*texts, "## Table 4: λ and stages", lines(header, four)]


def heat(axes: Axes, grid: pd.DataFrame, low: float) -> None:
    """A matrix of shares with its numbers."""
    axes.imshow(grid, origin="lower", vmin=low, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(grid.columns)), [str(name) for name in grid.columns])
    axes.set_yticks(range(len(grid.index)), [str(name) for name in grid.index])
    for row, values in enumerate(grid.to_numpy()):
        for column, value in enumerate(values):
            axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8,
                      color="white" if value < (1 + low) / 2 else "black")  # fmt: skip


def draw_matrix(runs: pd.DataFrame) -> None:
    """Every training under every schedule."""
    grid = runs.pivot_table("accuracy", "trained", "inferred", aggfunc="mean")
    order = list(RECIPES.values())
    grid = grid.loc[order[::-1], [*order, FASTV_HALF, FASTV_TENTH]]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    heat(axes, grid, 0.6)
    axes.set(xlabel="inferred", ylabel="trained")
    axes.tick_params(axis="x", rotation=25)
    figure.savefig(RESULTS / "matrix.png", dpi=120)


def draw_cuts(cuts: pd.DataFrame) -> None:
    """Right answers by layer and fraction of one cut, per training."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    names = ["vanilla", "λ = 0.5", "λ = 0.3"]
    for axes, name in zip(figure.subplots(1, 3, sharey=True), names, strict=True):
        own = cuts[cuts["trained"] == name].astype({"layers": float, "keeps": float})
        grid = own.pivot_table("accuracy", "keeps", "layers", aggfunc="mean")
        heat(axes, grid.rename(columns=int), 0.2)
        title = "vanilla" if name == "vanilla" else f"PyramidDrop, {name}"
        axes.set(title=f"trained: {title}", xlabel="layer of the cut")
        if name == names[0]:
            axes.set_ylabel("fraction kept")
    figure.savefig(RESULTS / "one_cut.png", dpi=120)


def keep() -> None:
    """Copies what the runs left into results/."""
    RESULTS.mkdir(exist_ok=True)
    tables = {"training": read_trainings(), "inference": read_sweep("inference")}
    tables |= {
        "one_cut": read_sweep("one_cut"),
        "steps": pd.read_csv(SOURCE / "steps" / "bench.csv"),
    }
    tables["inference"]["inferred"] = tables["inference"].apply(inferred, axis=1)
    for name, table in tables.items():
        table.round(5).to_csv(RESULTS / f"{name}.csv", index=False)


def tables() -> str:
    """The text of tables.md, from results/."""
    runs, bench = (pd.read_csv(RESULTS / f"{name}.csv") for name in ("inference", "steps"))
    shares = runs.groupby("inferred")["tflops_ratio"].mean()
    steps = {VANILLA: "100"}
    for row in bench.to_dict("records"):
        name = str(row["run"]).replace("num_stages=", "λ = 0.5, ").replace("lam=", "λ = ")
        name += " stages" if "," in name else ""
        low, high = (100 * row[f"time_ratio_{end}"] for end in ("low", "high"))
        steps[name] = f"{100 * row['time_ratio']:.0f} ({low:.0f}-{high:.0f})"
    texts = write_tables(runs, steps, lambda name: float(shares[name]))
    return "\n\n".join(texts) + "\n"


def main() -> None:
    """Keeps, draws and writes."""
    keep()
    (RESULTS / "tables.md").write_text(tables(), encoding="utf-8")
    draw_matrix(pd.read_csv(RESULTS / "inference.csv"))
    draw_cuts(pd.read_csv(RESULTS / "one_cut.csv"))


if __name__ == "__main__":
    main()
