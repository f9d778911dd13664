"""After `tokenprune eval experiment=difficulty`: keeps the tables, prints one for the README."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent
SOURCE = Path("outputs/difficulty")
TABLES = {"results": ["run", "prefill_ms"], "comparisons": ["run", "against_run"]}
TABLES |= {"difficulty": ["run", "downsample_run"]}


def main() -> None:
    """A line per method and budget: right answers, easy and hard ones, and verdicts."""
    kept = {name: pd.read_csv(SOURCE / f"{name}.csv") for name in TABLES}
    for name, columns in TABLES.items():
        table = kept[name].drop(columns=columns).round(5)
        table.to_csv(ROOT / f"{name}.csv", index=False)
    compared = kept["comparisons"].set_index(["run", "against"])
    for row in kept["difficulty"].to_dict("records"):
        pairs = [
            compared.loc[(row["run"], against)] if (row["run"], against) in compared.index else None
            for against in ("random", "pool", "downsample")
        ]
        cells = [
            row["method"],
            f"{row['keeps']:g} at {row['layers']:g}" if row["layers"] >= 0 else "",
            f"{100 * row['token_share']:.0f} %",
            f"{100 * row['easy']:.0f}",
            f"{100 * row['hard']:.0f} ({100 * row['hard_low']:.0f}-{100 * row['hard_high']:.0f})",
            *("" if p is None else f"{100 * p['difference']:+.1f} {p['verdict']}" for p in pairs),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
