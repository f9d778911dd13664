"""The picture of a table: measured against theoretical speed-up."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from tokenprune.bench.check import MEASURES


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Measured against theoretical speed-up, with the quartiles of the rounds: a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Okabe and Ito's hues, as in the report.
    looks = {"prefill": ("#0072b2", "o"), "decode": ("#009e73", "D"), "train": ("#d55e00", "s")}
    for name in [m for m in MEASURES if any(row["measure"] == m for row in rows)]:
        own = [row for row in rows if row["measure"] == name]
        theory = [1 / row["flops_ratio"] for row in own]
        measured = [1 / row["time_ratio"] for row in own]
        spread = [
            [abs(1 / row["time_ratio"] - 1 / row[f"time_ratio_{end}"]) for row in own]
            for end in ("high", "low")
        ]
        colour, marker = looks[name]
        axes.errorbar(theory, measured, spread, fmt=marker, color=colour, capsize=2, label=name)
    most = max([1.0, *(1 / min(row["flops_ratio"], row["time_ratio"]) for row in rows)])
    axes.plot([1, most], [1, most], color="#5f5e5a", linewidth=0.8, linestyle="--")
    axes.set_xlabel("speed-up by FLOPs")
    axes.set_ylabel("measured speed-up")
    machines = sorted({f"{row['machine']}, {row['dtype']}" for row in rows})
    axes.set_title("; ".join(machines), fontsize=9, loc="left")
    if rows:
        # A fixed place, for the best one takes seconds on a busy machine, with a warning: measured
        # speed seldom exceeds theory.
        axes.legend(frameon=False, loc="upper left")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
