"""Trains the shipped model: `python experiments/miniatures/tiny.py`. Resumable: run it again.

Phases:

1. `tower`: vision tower, projector and the words' embeddings read symbol, colour, row and column
   out of every patch of crowded scenes.
2. `lookup`: all but the decoder is frozen, which learns the questions on two objects, then on more
   whenever 85 % of the lookups are right.
3. `final`: full scenes while the learning rate falls to zero, mostly with image tokens that do not
   see each other, so that evidence stays in its own patch.
4. `settle`: as at inference, nothing hidden, at a lower learning rate; half of the images are
   followed by questions whose positions start earlier, as after a shorter image.

Every image carries several questions. They share its tokens, and a mask keeps them apart: each sees
the image and itself alone, at the positions that it would have alone. Half-way up the decoder a
read-out that is not shipped tells what the words of a question point at (`Questions.pointer`).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from model import VOCABULARIES, build_model
from publish import publish
from recipe import WORDS, Asking, Naming, Packed, Phase, Phases, arguments, pixels_of, weighed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AttentionInterface

from tokenprune.data.scenes import (
    COLOURS,
    SYMBOLS,
    Scene,
    SceneDataset,
    draw_scene,
    easy,
)

GRID, KINDS = easy.STYLE.grid, easy.KINDS
VOCABULARY = VOCABULARIES["easy"]
PREFIX = [*WORDS, *["<image>"] * GRID**2]
TURN_LENGTH = 8  # tokens of the longest turn, its answer and </s> included
FIRST_LOOK = 2  # layer from which on questions may look at the image in the third phase
POINTED_LAYER = 4  # layers below the read-out of what a word points at
POINTED_CLASSES = (GRID, GRID, len(SYMBOLS), len(COLOURS))
NOTHING = (-100, -100, -100, -100)
MOSTLY_YES_OR_NO = (*KINDS, "exist", "exist", "relation", "relation", "relation")
FULL = (6, 8)  # objects of a full scene


# ------------------------------------------------------------------------------------- 1. the tower


class CrowdedScenes(Dataset[tuple[Tensor, Tensor]]):
    """Scenes full of symbols; classes of every patch (144, 4): symbol, colour, row, column.

    Class 0 of symbol and colour means none; the colour after the last is that of a sign.
    """

    def __init__(self, num_scenes: int, seed: int) -> None:
        self.num_scenes, self.seed = num_scenes, seed

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"crowded/{self.seed}/{index}")
        scene = easy.make_scene(rng, rng.randint(8, 50), rng.randint(1, 5), distinct=False)
        classes = torch.zeros(GRID, GRID, 4, dtype=torch.int64)
        classes[..., 2] = torch.arange(GRID)[:, None]
        classes[..., 3] = torch.arange(GRID)
        for item in scene.items:
            classes[item.row, item.column, 0] = 1 + SYMBOLS.index(item.symbol)
            classes[item.row, item.column, 1] = 1 + list(COLOURS).index(item.colour)
        for sign in scene.signs:
            for offset, glyph in enumerate(sign.text):
                classes[sign.row, sign.column + offset, 0] = 1 + SYMBOLS.index(glyph)
                classes[sign.row, sign.column + offset, 1] = 1 + len(COLOURS)
        return pixels_of(draw_scene(rng, scene, easy.STYLE)), classes.flatten(0, 1)


class Tower(Naming):
    """Patch features, through the projector, must match the words for what the patch shows."""

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        super().__init__(model, num_steps, VOCABULARY)
        self.place = nn.Linear(model.config.text_config.hidden_size, 2 * GRID)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        pixels, classes = batch
        states = self.model.model.vision_tower(pixels).last_hidden_state[:, 1:]
        features, symbols, colours = self.read(states)
        logits = (symbols, colours, *self.place(features).split(GRID, -1))
        loss = weighed(logits, classes, (1, 1, 0.2, 0.2))
        right = torch.stack([own.argmax(-1) for own in logits], -1) == classes
        shown = classes[..., 0] > 0
        self.log("loss", loss.detach())
        self.log("patch_accuracy", right[..., :2].all(-1)[shown].float().mean())
        self.log("place_accuracy", right[..., 2:].float().mean())
        return loss


# ------------------------------------------------------------------- 2. and 3. the questions


def facts_of(scene: Scene) -> dict[str, tuple[int, int, int, int]]:
    """What each word of a question points at: its row, column, symbol and colour."""
    facts = {}
    for item in scene.items:
        symbol, colour = SYMBOLS.index(item.symbol), list(COLOURS).index(item.colour)
        facts[item.symbol] = facts[item.colour] = (item.row, item.column, symbol, colour)
    for sign in scene.signs:
        facts["say"] = (sign.row, sign.column, SYMBOLS.index(sign.text[0]), -100)
    return facts


class PackedScenes(Dataset[dict[str, Any]]):
    """Scenes with several questions each, as tensors."""

    def __init__(self, scenes: SceneDataset) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, (scene, _) = self.scenes[index], self.scenes.scene(index)
        facts = facts_of(scene)
        ids, labels, evidence = [], [], []
        for turn in sample.turns:
            question = turn.question.replace("?", "").split()
            answer = [*turn.answer.split(), "</s>"]
            pads = TURN_LENGTH - len(question) - len(answer)
            evidence += [facts.get(word, NOTHING) for word in question]
            evidence += [NOTHING] * (TURN_LENGTH - len(question))
            words = [VOCABULARY.index(w) for w in question + answer] + [0] * pads
            ids += words
            labels += (
                [-100] * len(question)
                + words[len(question) : len(question) + len(answer)]
                + [-100] * pads
            )
        return {
            "pixel_values": pixels_of(sample.image),
            "ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "evidence": torch.tensor(evidence),
            "kinds": torch.tensor([KINDS.index(turn.kind) for turn in sample.turns]),
        }


PACKED = Packed(TURN_LENGTH, FIRST_LOOK)
AttentionInterface.register("packed", PACKED)


class Questions(Asking):
    """The decoder answers questions; the rest stays as it is."""

    growing = "objects"

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        num_steps: int,
        curve: str,
        objects: int,
        hides: bool = False,
        shifts: bool = False,
    ) -> None:
        super().__init__(model, rate, num_steps, curve, hides, KINDS)
        self.shifts = shifts
        # Reads row, column, symbol and colour of the object that a word names out of that word's
        # token. Yes or no is a coin that says little; this says which lookup went wrong.
        self.pointer = nn.Linear(model.config.text_config.hidden_size, sum(POINTED_CLASSES))
        self.objects = objects  # most objects per scene now

    def answer(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, labels = batch["ids"], batch["labels"]
        num_rows, packed = ids.shape
        start, device = len(PREFIX), ids.device
        prefix = torch.tensor([VOCABULARY.index(word) for word in PREFIX], device=device)
        order = torch.arange(start + packed, device=device)
        positions = torch.where(order < start, order, start + (order - start) % TURN_LENGTH)
        positions = positions.repeat(num_rows, 1)
        if self.training and self.shifts:
            shift = self.shift(num_rows, GRID**2, device)
            positions = torch.where(order < start, positions, positions - shift)
        PACKED.start, PACKED.hides = start, self.now_hides()
        output = self.model(
            input_ids=torch.cat([prefix.expand(num_rows, -1), ids], 1),
            pixel_values=batch["pixel_values"],
            position_ids=positions,
            use_cache=False,
            logits_to_keep=packed + 1,
            output_hidden_states=True,
        )
        logits = output.logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        states = output.hidden_states[POINTED_LAYER][:, start:]
        pointed = self.pointer(nn.functional.rms_norm(states, states.shape[-1:])).float()
        classes = pointed.flatten(0, 1).split(POINTED_CLASSES, -1)
        evidence = batch["evidence"].flatten(0, 1).unbind(-1)
        for own, target in zip(classes, evidence, strict=True):
            loss = loss + 0.25 * nn.functional.cross_entropy(own, target)
        columns = (classes[1].argmax(-1) == evidence[1])[evidence[1] >= 0]
        self.log("pointed_column", columns.float().mean())
        wrong = (logits.argmax(-1) != labels) & (labels != -100)
        right = ~wrong.unflatten(1, (-1, TURN_LENGTH)).any(-1)
        return loss, right

    def on_train_epoch_end(self) -> None:
        means = self.means(50)
        self.log("objects_now", float(self.objects))
        # One object more when the lookups work; comparisons may lag behind.
        lookups = [means[kind] for kind in ("read", "colour") if kind in means]
        if self.curve == "constant" and lookups and np.mean(lookups) > 0.85:
            self.objects = min(self.objects + (1 if self.objects < 4 else 2), FULL[1])
        print(f"epoch {self.current_epoch} objects {self.objects} "
              + " ".join(f"{k} {v:.3f}" for k, v in means.items()), flush=True)  # fmt: skip


class Feed(pl.LightningDataModule):
    """A fresh stretch of scenes every epoch, as hard as the module has got to."""

    def __init__(self, phase: Phase, steps: int, batch_size: int, turns: int) -> None:
        super().__init__()
        self.phase, self.steps, self.batch_size, self.turns = phase, steps, batch_size, turns

    def train_dataloader(self) -> DataLoader[Any]:
        epoch, num_scenes = self.trainer.current_epoch, self.steps * self.batch_size
        data: Dataset[Any]
        if isinstance(self.phase, Questions):
            most = self.phase.objects
            least = FULL[0] if self.phase.curve == "cosine" else max(2, most - 2)
            scenes = SceneDataset(
                "train",
                num_scenes,
                seed=10_000 * (self.phase.curve == "cosine") + 10_000 * self.phase.hides + epoch,
                num_turns=self.turns,
                min_objects=least,
                max_objects=most,
                kinds=KINDS if least < FULL[0] else MOSTLY_YES_OR_NO,
            )
            data = PackedScenes(scenes)
        else:
            data = CrowdedScenes(num_scenes, epoch)
        return DataLoader(data, self.batch_size, num_workers=1, prefetch_factor=4)


def main() -> None:
    """Runs the phases that are not done yet, then publishes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/miniatures/tiny"))
    given = arguments(parser, tower=14, lookup=12, final=28, settle=10)
    model = build_model("easy")
    phases = Phases(model, given.folder)

    tower = Tower(model, 75 * given.tower_epochs)
    phases.run("tower", tower, given.tower_epochs, lambda own: Feed(own, 75, 64, 20))

    def ask(name: str, questions: Questions, epochs: int) -> None:
        phases.run(name, questions, epochs, lambda own: Feed(own, 100, 16, 20), "bf16-mixed")

    epochs = given.lookup_epochs
    ask("lookup", Questions(model, 1.5e-3, 100 * epochs, "constant", 2), epochs)
    epochs = given.final_epochs
    ask("final", Questions(model, 1.2e-3, 100 * epochs, "cosine", FULL[1], True), epochs)
    epochs = given.settle_epochs
    ask("settle", Questions(model, 5e-4, 100 * epochs, "cosine", FULL[1], shifts=True), epochs)
    phases.save("model", "easy")
    publish("tiny", given.folder, phases.times)


if __name__ == "__main__":
    main()
