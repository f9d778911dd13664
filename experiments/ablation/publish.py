"""After `make demo`: keeps the ablation's table and figures, and draws the README's picture."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pandas as pd
from PIL import Image

from tokenprune.cli.main import main as tokenprune_command

ROOT = Path(__file__).resolve().parent
SOURCE = Path("outputs/ablation")
KEPT = "kept_8.png"  # the sign, which needs six patches
TEASER = ROOT.parents[1] / "docs" / "images" / "teaser.png"
HEIGHT = 720


def main() -> None:
    """Copies what the README quotes, without timings of single runs, which are noise."""
    table = pd.read_csv(SOURCE / "results.csv")
    table.drop(columns=["run"]).round(5).to_csv(ROOT / "results.csv", index=False)
    shutil.copy(SOURCE / "figures" / "accuracy.png", ROOT / "accuracy.png")
    shutil.copy(SOURCE / "figures" / KEPT, ROOT / "kept.png")
    with tempfile.TemporaryDirectory() as name:
        # Four stages only: with two, the cut comes after everything has been read.
        folder = Path(name)
        for run in SOURCE.iterdir():
            if run.is_dir() and run.name != "figures" and "num_stages=2" not in run.name:
                shutil.copytree(run, folder / run.name)
        assert tokenprune_command(["report", str(folder)]) == 0
        parts = [ROOT / "kept.png", folder / "figures" / "accuracy.png"]
        images = [Image.open(part).convert("RGB") for part in parts]
    images = [
        image.resize((round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.LANCZOS)
        for image in images
    ]
    sheet = Image.new("RGB", (sum(image.width for image in images), HEIGHT), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    TEASER.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(TEASER, optimize=True)


if __name__ == "__main__":
    main()
