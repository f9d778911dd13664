"""After `tokenprune eval -m experiment=variants`: keeps the table, prints it for the README."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent
SOURCE = Path("outputs/variants/results.csv")


def main() -> None:
    """A line per variant: accuracy with its interval, and of the two kinds that differ most."""
    table = pd.read_csv(SOURCE)
    runs = table["run"]
    table.drop(columns=["prefill_ms"]).round(5).to_csv(ROOT / "results.csv", index=False)
    for name, row in zip(runs, table.to_dict("records"), strict=True):
        kinds = " ".join(f"{k.removeprefix('accuracy_')} {100 * v:.1f}" for k, v in row.items()
                         if k.startswith("accuracy_"))  # fmt: skip
        interval = f"{100 * row['ci_low']:.1f}-{100 * row['ci_high']:.1f}"
        print(f"{name}: {100 * row['accuracy']:.1f} ({interval})  {kinds}")


if __name__ == "__main__":
    main()
