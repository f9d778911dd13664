"""After `tokenprune eval experiment=methods`: keeps the tables, sorts methods, draws the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenprune.report.groups import Group, average
from tokenprune.report.reading import load
from tokenprune.runs.comparisons import difference_of
from tokenprune.runs.methods import DOWNSAMPLE, UNPRUNED
from tokenprune.runs.paired import holm, verdict

ROOT = Path(__file__).resolve().parent
SOURCE = Path("outputs/methods")
TABLES = {"results": ["run", "prefill_ms"], "comparisons": ["run", "against_run"]}
TABLES |= {"difficulty": ["run", "downsample_run"]}
BUDGETS = (288, 192, 72)
# Of PyramidDrop as published.
LAMS = ("0.3", "0.7")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "0.4")


def name_of(group: Group) -> str:
    """The method and where it cuts."""
    layers = group.first.text("layers").strip("[]()")
    return f"{group.first.bare} at {layers}" if layers else group.first.bare


def sort(groups: Sequence[Group]) -> list[int]:
    """The number of each method's class, best methods first.

    A class is its best method and those after it that are not told apart from it, by paired tests
    after Holm's correction over all pairs; the first that is told apart begins the next.
    """
    pairs = [(a, b) for b in range(len(groups)) for a in range(b)]
    found = []
    for a, b in pairs:
        difference = difference_of(groups[a], groups[b])
        assert difference is not None, (groups[a].series, groups[b].series)
        found.append(difference)
    corrected = holm([difference.p for difference in found])
    apart = {
        pair: verdict(own, c) != "open"
        for pair, own, c in zip(pairs, found, corrected, strict=True)
    }
    classes, leader = [], 0
    for number in range(len(groups)):
        if number and apart[leader, number]:
            leader = number
        classes.append(0 if not number else classes[-1] + (leader == number))
    return classes


def line_of(group: Group) -> dict[str, object]:
    """What the tables say of a method, in percent and tokens."""
    return {
        "accuracy": round(100 * group.accuracy.value, 1),
        "avg_tokens": round(group.mean("avg_tokens") or 0, 1),
    }


def stages(groups: Sequence[Group]) -> pd.DataFrame:
    """PyramidDrop as published: right answers with their interval, by lambda and stages."""
    return pd.DataFrame(
        {
            "stages": group.first.text("num_stages"),
            "lam": group.first.text("lam"),
            **line_of(group),
            "ci_low": round(100 * (group.accuracy.low or 0), 1),
            "ci_high": round(100 * (group.accuracy.high or 0), 1),
        }
        for group in groups
    )


def draw(axes: Axes, groups: Sequence[Group], classes: Sequence[int], budget: int) -> None:
    """Right answers of each method at a budget, in the colour of its class."""
    for row, (group, number) in enumerate(zip(groups, classes, strict=True)):
        value, low, high = (
            100 * (part or 0.0)
            for part in (group.accuracy.value, group.accuracy.low, group.accuracy.high)
        )
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", color=colour)
    axes.set_yticks(range(len(groups)), [name_of(group) for group in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set(title=f"{budget} of 576 tokens", xlabel="right answers, %", xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Classes by budget: printed for the README, and drawn."""
    for name, columns in TABLES.items():
        table = pd.read_csv(SOURCE / f"{name}.csv").drop(columns=columns).round(5)
        table.to_csv(ROOT / f"{name}.csv", index=False)
    groups = average(load(SOURCE)[1])
    (whole,) = [group for group in groups if group.first.strategy == UNPRUNED]
    pruned = [g for g in groups if g.first.strategy not in (UNPRUNED, DOWNSAMPLE)]
    published = [g for g in pruned if g.first.text("lam") in LAMS]
    figure = Figure(figsize=(12, 5), layout="constrained")
    rows = []
    for axes, budget in zip(figure.subplots(1, len(BUDGETS)), BUDGETS, strict=True):
        at = [g for g in pruned if abs((g.mean("avg_tokens") or 0) - budget) < 0.02 * budget]
        at.sort(key=lambda group: -group.accuracy.value)
        classes = sort(at)
        draw(axes, at, classes, budget)
        axes.axvline(100 * whole.accuracy.value, color="0.3", linestyle=":", linewidth=1)
        for group, number in zip(at, classes, strict=True):
            kinds = {kind: round(100 * own.value, 1) for kind, own in group.kinds.items()}
            rows.append(
                {"budget": budget, "class": number + 1, "method": name_of(group)}
                | line_of(group)
                | kinds
            )
    figure.savefig(ROOT / "methods.png", dpi=110)
    stages(published).to_csv(ROOT / "stages.csv", index=False)
    table = pd.DataFrame(rows)
    table.to_csv(ROOT / "classes.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
