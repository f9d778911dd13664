"""Where the prompt's last token looks, layer by layer: `python experiments/tiny_vlm/attention.py`.

Writes results/attention.csv: per layer and kind, the share of its attention (mean over heads) on
the patches that hold the evidence, and the median rank of the last of them among the 144 patches.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from tokenprune.data.collate import PromptCollator
from tokenprune.data.scenes import GRID, SceneDataset
from tokenprune.runs.models import load

NUM_SCENES = 200


def main() -> None:
    """Measures on unseen scenes, one question each."""
    loaded = load("tiny", attention="eager")
    scenes, collate = SceneDataset("test", NUM_SCENES), PromptCollator(loaded.processor)
    rows = []
    for index in range(NUM_SCENES):
        inputs = collate([scenes[index]])["inputs"]
        _, (question,) = scenes.scene(index)
        first = int((inputs["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[0])
        cells = [row * GRID + column for row, column in question.cells]
        with torch.no_grad():
            attentions = loaded.model(**inputs, output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            image = weights[0, :, -1].mean(0)[first : first + GRID**2]
            rank = image.argsort(descending=True).argsort() + 1
            worst = max(int(rank[cell]) for cell in cells)
            share = float(image[cells].sum())
            kind = question.turn.kind
            rows.append({"layer": layer, "kind": kind, "share": share, "rank": worst})
    table = pd.DataFrame(rows).groupby(["layer", "kind"]).agg({"share": "mean", "rank": "median"})
    path = Path(__file__).resolve().parent / "results" / "attention.csv"
    table.round(3).reset_index().to_csv(path, index=False)
    print(table.unstack().round(2).to_string())


if __name__ == "__main__":
    main()
