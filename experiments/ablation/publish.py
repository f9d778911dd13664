"""After `make demo`: keeps the ablation's table and figures, and draws the README's picture."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parent
SOURCE = Path("outputs/ablation")
FIGURES = ("kept_1.png", "accuracy.png")
TEASER = ROOT.parents[1] / "docs" / "images" / "teaser.png"


def main() -> None:
    """Copies what the README quotes, without timings of single runs, which are noise."""
    table = pd.read_csv(SOURCE / "results.csv")
    table.drop(columns=["run"]).round(5).to_csv(ROOT / "results.csv", index=False)
    parts, width = [], 1400
    for name in FIGURES:
        shutil.copy(SOURCE / "figures" / name, ROOT / name)
        part = Image.open(ROOT / name).convert("RGB")
        size = (width, round(part.height * width / part.width))
        parts.append(part.resize(size, Image.Resampling.LANCZOS))
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    sheet.paste(parts[0], (0, 0))
    sheet.paste(parts[1], (0, parts[0].height))
    TEASER.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(TEASER, optimize=True)


if __name__ == "__main__":
    main()
