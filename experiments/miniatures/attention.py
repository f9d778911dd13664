"""Where the prompt's last token looks, by layer: `python experiments/miniatures/attention.py tiny`.

Writes results/NAME/attention.csv: per layer and kind, the share of its attention (mean over heads)
on the patches that hold the evidence, and the median rank of the last of them among all patches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from tokenprune.data.collate import PromptCollator
from tokenprune.data.scenes import LEVELS, SceneDataset
from tokenprune.runs import models

NUM_SCENES = 200


def main() -> None:
    """Measures on unseen scenes, one question each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=models.LEVELS)
    name = parser.parse_args().name
    level = models.LEVELS[name]
    loaded, grid = models.load(name, attention="eager"), LEVELS[level].STYLE.grid
    scenes = SceneDataset("test", NUM_SCENES, level=level)
    collate = PromptCollator(loaded.processor)
    rows = []
    for index in range(NUM_SCENES):
        _, (question,) = scenes.scene(index)
        cells = [row * grid + column for row, column in question.cells]
        if not cells:  # of which there is none
            continue
        inputs = collate([scenes[index]])["inputs"]
        first = int((inputs["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[0])
        with torch.no_grad():
            attentions = loaded.model(**inputs, output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            image = weights[0, :, -1].mean(0)[first : first + grid**2]
            rank = image.argsort(descending=True).argsort() + 1
            worst = max(int(rank[cell]) for cell in cells)
            share = float(image[cells].sum())
            kind = question.turn.kind
            rows.append({"layer": layer, "kind": kind, "share": share, "rank": worst})
    table = pd.DataFrame(rows).groupby(["layer", "kind"]).agg({"share": "mean", "rank": "median"})
    path = Path(__file__).resolve().parent / "results" / name / "attention.csv"
    table.round(3).reset_index().to_csv(path, index=False)
    print(table.unstack().round(2).to_string())


if __name__ == "__main__":
    main()
