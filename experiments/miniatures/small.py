"""Trains the model `small`: `python experiments/miniatures/small.py`. Resumable: run it again.

Phases:

1. `tower`: vision tower, projector and the words' embeddings read symbol, colour, place and, on a
   sign, the glyph's number out of every patch of crowded scenes; the class token tells which
   symbols and colours a picture has.
2. `lookup`: all but the decoder is frozen, which learns the questions on scenes with few objects,
   then on fuller ones whenever lookups work. Most empty patches are left out, which is quick, and
   image tokens do not see each other, so that evidence stays in its own patch.
3. `final`: full scenes while the learning rate falls.
4. `measure` and `join`: with more read-outs (`Questions.measure`, `result`), and shown where to
   look for what is counted and compared.
5. `settle`: as at inference, nothing hidden; every patch in half of the batches, a part in others.

Every image carries several questions. They share its tokens, and a mask keeps them apart. Half-way
up the decoder, read-outs that are not shipped tell what the words of a question point at.
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

from tokenprune.data.scenes import COLOURS, SYMBOLS, Question, Scene, SceneDataset, draw_scene, hard

GRID = hard.STYLE.grid
COLOUR_NAMES = list(COLOURS)
VOCABULARY = VOCABULARIES["hard"]
TURN_LENGTH = 12  # tokens of the longest turn, its answer and </s> included
NUM_TURNS = 16
BATCH = 16  # scenes
FIRST_LOOK = 2  # layer from which on questions may look at the image before the last phase
POINTED_LAYER, STEPPED_LAYER = 4, 6  # layers below the read-outs
#: Layers in which half of the heads are shown where to look: for what words name; for the second
#: step.
LOOKS = {2: "looks", 3: "looks", 5: "second_looks"}
COUNTED_LAYER = 3  # here a third head spreads over what is counted, and over the first token
JOINED_LAYER = 4  # here the last word looks at the other word that it is compared with
NUM_HEADS = 4
POINTED_CLASSES = (GRID, GRID, len(SYMBOLS), len(COLOURS), hard.MAX_ALIKE + 1)
PLACE_CLASSES = (GRID, GRID, 1 + max(hard.SIGN_LENGTHS))  # row, column, number on a sign
WHOLE_CLASSES = (len(SYMBOLS), len(COLOURS) + 2)
NOTHING = (-100,) * len(POINTED_CLASSES)
NO_STEP = (-100,) * 3
SCALES = (GRID, GRID, hard.MAX_ALIKE)  # of rows, columns, numbers
UNTOLD = -100.0
FEW, MANY = 48, 160  # patches that the decoder is given in the second and the third phase
KIND_WEIGHTS = (*hard.KINDS, "relation", "count", "compare", "steps", "exist")


# ------------------------------------------------------------------------------------- 1. the tower


class CrowdedScenes(Dataset[tuple[Tensor, Tensor]]):
    """Scenes full of symbols; classes of every patch (576, 5): symbol, colour, row, column, number.

    Class 0 of symbol, colour and number means none; the colour after the last is that of a sign.
    """

    def __init__(self, num_scenes: int, seed: int) -> None:
        self.num_scenes, self.seed = num_scenes, seed

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"crowded/{self.seed}/{index}")
        scene = hard.make_crowd(rng, rng.randint(10, 200), rng.randint(1, 8))
        classes = torch.zeros(GRID, GRID, 5, dtype=torch.int64)
        classes[..., 2] = torch.arange(GRID)[:, None]
        classes[..., 3] = torch.arange(GRID)
        for item in scene.items:
            classes[item.row, item.column, 0] = 1 + SYMBOLS.index(item.symbol)
            classes[item.row, item.column, 1] = 1 + COLOUR_NAMES.index(item.colour)
        for sign in scene.signs:
            for number, (cell, glyph) in enumerate(zip(sign.cells, sign.text, strict=True)):
                classes[*cell, 0] = 1 + SYMBOLS.index(glyph)
                classes[*cell, 1] = 1 + len(COLOURS)
                classes[*cell, 4] = 1 + number
        return pixels_of(draw_scene(rng, scene, hard.STYLE)), classes.flatten(0, 1)


class Tower(Naming):
    """Patch features, through the projector, must match the words for what the patch shows."""

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        super().__init__(model, num_steps, VOCABULARY)
        self.place = nn.Linear(model.config.text_config.hidden_size, sum(PLACE_CLASSES))
        self.whole = nn.Linear(model.config.vision_config.hidden_size, sum(WHOLE_CLASSES))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        pixels, classes = batch
        states = self.model.model.vision_tower(pixels).last_hidden_state
        features, symbols, colours = self.read(states[:, 1:])
        logits = (symbols, colours, *self.place(features).split(PLACE_CLASSES, -1))
        loss = weighed(logits, classes, (1, 1, 0.2, 0.2, 0.5))
        # The class token: how the objects of the picture are spread over symbols and colours.
        shown = classes[..., 0] > 0
        whole = self.whole(states[:, 0]).split(WHOLE_CLASSES, -1)
        for own, shows, most in zip(whole, classes[..., :2].unbind(-1), WHOLE_CLASSES, strict=True):
            ones = nn.functional.one_hot((shows - 1).clamp_min(0), most)
            share = (ones * shown[..., None]).sum(1).float()
            share = share / share.sum(-1, keepdim=True)
            loss = loss + 0.5 * nn.functional.cross_entropy(own, share)
        right = torch.stack([own.argmax(-1) for own in logits], -1) == classes
        self.log("loss", loss.detach())
        self.log("patch_accuracy", right[..., :2].all(-1)[shown].float().mean())
        self.log("place_accuracy", right[..., 2:4].all(-1).float().mean())
        self.log("number_accuracy", right[..., 4][classes[..., 4] > 0].float().mean())
        return loss

    def on_train_epoch_end(self) -> None:
        said = {k: round(float(v), 3) for k, v in self.trainer.logged_metrics.items()}
        print(f"epoch {self.current_epoch} {said}", flush=True)


# ---------------------------------------------------------------------------- 2. - 4. the questions


def facts_of(
    scene: Scene, question: Question
) -> tuple[list[tuple[int, ...]], tuple[int, int, int]]:
    """What each word of a question points at, and what its last word does in the second step.

    Of a word: row, column, symbol, colour of the object that it names, objects of its colour.
    """
    facts = []
    words = question.turn.question.replace("?", "").split()
    for number, word in enumerate(words):
        own = list(NOTHING)
        named: list[Any] = []
        if word in COLOURS:
            named = [item for item in scene.items if item.colour == word]
            own[4] = len(named)
        elif word in SYMBOLS:
            named = [item for item in scene.items if item.symbol == word]
            if question.turn.kind == "exist":
                named = [item for item in named if item.colour == words[number - 1]]
        if word == "say":
            (sign,) = scene.signs
            own[:3] = [sign.row, sign.column, SYMBOLS.index(sign.text[0])]
        elif len(named) == 1:
            (item,) = named
            places = [item.row, item.column]
            own[:4] = [*places, SYMBOLS.index(item.symbol), COLOUR_NAMES.index(item.colour)]
        facts.append(tuple(own))
    step = NO_STEP
    if question.turn.kind == "steps":
        step = (*question.cells[1], SYMBOLS.index(question.turn.answer))
    return facts, step


Cells = tuple[tuple[int, int], ...]


def looks_of(scene: Scene, question: Question) -> tuple[list[Cells], list[Cells]]:
    """The cells that each token of a turn asks for, and those that its last word asks for next."""
    kind, words = question.turn.kind, question.turn.question.replace("?", "").split()
    first: list[Cells] = []
    for number, word in enumerate(words):
        own = [item for item in scene.items if word in (item.colour, item.symbol)]
        if kind == "exist" and word in SYMBOLS:
            own = [item for item in own if item.colour == words[number - 1]] or own
        first.append(tuple((item.row, item.column) for item in own))
    second: list[Cells] = [()] * len(words)
    if kind == "text":  # glyph after glyph
        first[-1] = question.cells[:1]
        first += [(cell,) for cell in question.cells[1:]]
    if kind == "steps":
        second[-1] = question.cells[1:]
    return first, second


def result_of(scene: Scene, question: Question) -> float:
    """What a question comes to, from -1 to 1: a number, or by how much the second is ahead."""
    kind, words = question.turn.kind, question.turn.question.replace("?", "").split()
    counts = [sum(item.colour == word for item in scene.items) for word in words]
    if kind == "count":
        return counts[-1] / hard.MAX_ALIKE
    if kind == "compare":
        return (counts[4] - counts[-1]) / hard.MAX_ALIKE
    if kind == "relation":
        axis = int("left" in words)
        return (question.cells[1][axis] - question.cells[0][axis]) / GRID
    return UNTOLD


def turn(own: list[Any], nothing: Any) -> list[Any]:
    """An entry for each token of a turn: those that there are, then `nothing`."""
    return [*own, *[nothing] * (TURN_LENGTH - len(own))]


def marked(cells: list[Cells], kept: Tensor) -> Tensor:
    """Bool (tokens, patches): which of the patches that are kept each token asks for."""
    place = {int(patch): number for number, patch in enumerate(kept)}
    marks = torch.zeros(len(cells), len(kept), dtype=torch.bool)
    for token, own in enumerate(cells):
        for row, column in own:
            marks[token, place[row * GRID + column]] = True
    return marks


class PackedScenes(Dataset[dict[str, Any]]):
    """Scenes with several questions each, as tensors.

    Args:
        scenes: Where they come from.
        num_kept: Patches that the decoder is given: all with evidence, the others at random.
    """

    def __init__(self, scenes: SceneDataset, num_kept: int) -> None:
        self.scenes, self.num_kept = scenes, num_kept

    def __len__(self) -> int:
        return len(self.scenes)

    def _number(self, index: int) -> int:
        """Patches of a sample: where all are given, every other batch has a part of them still."""
        batch = index // BATCH
        if self.num_kept < GRID**2 or batch % 2 == 0:
            return self.num_kept
        return random.Random(f"kept/{batch}").randint(MANY, GRID**2)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, (scene, questions) = self.scenes[index], self.scenes.scene(index)
        ids, labels, evidence, steps = [], [], [], []
        measured: list[float] = []
        counts: list[bool] = []
        joins: list[int] = []
        looks: list[Cells] = []
        second_looks: list[Cells] = []
        for question in questions:
            words = question.turn.question.replace("?", "").split()
            answer = [*question.turn.answer.split(), "</s>"]
            kind, last = question.turn.kind, len(words) - 1
            facts, step = facts_of(scene, question)
            first, second = looks_of(scene, question)
            other = {"relation": 1, "compare": 4}.get(kind, -1)
            numbers = [VOCABULARY.index(word) for word in words + answer]
            ids += turn(numbers, 0)
            labels += turn([*[-100] * len(words), *numbers[len(words) :]], -100)
            evidence += turn(facts, NOTHING)
            steps += turn([*[NO_STEP] * last, step], NO_STEP)
            measured += turn([*[UNTOLD] * last, result_of(scene, question)], UNTOLD)
            is_counted = [kind in ("count", "compare") and word in COLOURS for word in words]
            counts += turn(is_counted, False)
            joins += turn([*[-1] * last, other], -1)
            looks += turn(first, ())
            second_looks += turn(second, ())
        shown = torch.zeros(GRID, GRID)
        for item in scene.items:
            shown[item.row, item.column] = 2
        for sign in scene.signs:
            for cell in sign.cells:
                shown[cell] = 2
        noise = torch.rand(GRID**2, generator=torch.Generator().manual_seed(index))
        kept = (shown.flatten() + noise).topk(self._number(index)).indices.sort().values
        return {
            "pixel_values": pixels_of(sample.image),
            "kept": kept,
            "ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "evidence": torch.tensor(evidence),
            "steps": torch.tensor(steps),
            "results": torch.tensor(measured),
            "counts": torch.tensor(counts),
            "joins": torch.tensor(joins),
            "looks": marked(looks, kept),
            "second_looks": marked(second_looks, kept),
            "kinds": torch.tensor([hard.KINDS.index(turn.kind) for turn in sample.turns]),
        }


PACKED = Packed(TURN_LENGTH, FIRST_LOOK, {*LOOKS, JOINED_LAYER})
AttentionInterface.register("packed", PACKED)


class Questions(Asking):
    """The decoder answers questions; the rest stays as it is."""

    growing = "max_alike"

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        num_steps: int,
        curve: str,
        max_alike: int = hard.MAX_ALIKE,
        hides: bool = False,
        measures: bool = True,
        joins: bool = True,
    ) -> None:
        super().__init__(model, rate, num_steps, curve, hides, hard.KINDS)
        self.joins = joins  # see `_look`
        width = model.config.text_config.hidden_size
        self.pointer = nn.Linear(width, sum(POINTED_CLASSES))
        self.stepper = nn.Linear(width, sum(POINTED_CLASSES[:3]))
        # Read out as quantities: row, column and number of what a word names; what is asked for.
        self.measure = nn.Linear(width, 3) if measures else None
        self.result = nn.Linear(width, 1) if measures else None
        self.max_alike = max_alike

    def answer(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, labels, kept = batch["ids"], batch["labels"], batch["kept"]
        num_rows, device, words = len(ids), ids.device, len(WORDS)
        inner = self.model.model
        with torch.no_grad():
            states = inner.vision_tower(batch["pixel_values"]).last_hidden_state[:, 1:]
            features = inner.multi_modal_projector(
                states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))
            )
            embed = self.model.get_input_embeddings()
            prefix = torch.tensor([VOCABULARY.index(word) for word in WORDS], device=device)
            inputs = torch.cat(
                [embed(prefix).expand(num_rows, -1, -1), features, embed(ids)], dim=1
            )
        PACKED.start = words + kept.shape[1]
        order = torch.arange(words, device=device).expand(num_rows, -1)
        turns = words + GRID**2 + torch.arange(ids.shape[1], device=device) % TURN_LENGTH
        turns = turns.expand(num_rows, -1)
        if self.training and self.curve != "constant":
            turns = turns - self.shift(num_rows, GRID**2, device)
        PACKED.hides = self.now_hides()
        output = inner.language_model(
            inputs_embeds=inputs,
            position_ids=torch.cat([order, words + kept, turns], 1),
            use_cache=False,
            output_hidden_states=True,
        )
        # Answers alone, which are a quarter of the tokens.
        asked = labels != -100
        logits = self.model.lm_head(
            output.last_hidden_state[:, PACKED.start :][:, :-1][asked[:, 1:]]
        )
        loss = nn.functional.cross_entropy(logits, labels[:, 1:][asked[:, 1:]])
        loss = loss + self._point(output.hidden_states, batch)
        if self.measure is not None:
            loss = loss + self._measure(output.hidden_states, batch)
        if self.training:
            loss = loss + self._look(batch)
        wrong = torch.zeros_like(asked)
        wrong[:, 1:][asked[:, 1:]] = logits.argmax(-1) != labels[:, 1:][asked[:, 1:]]
        return loss, ~wrong.unflatten(1, (-1, TURN_LENGTH)).any(-1)

    def _point(self, hidden: tuple[Tensor, ...], batch: dict[str, Tensor]) -> Tensor:
        """Loss of the read-outs."""
        loss = hidden[0].new_zeros(())
        for layer, reader, classes, name in (
            (POINTED_LAYER, self.pointer, POINTED_CLASSES, "evidence"),
            (STEPPED_LAYER, self.stepper, POINTED_CLASSES[:3], "steps"),
        ):
            targets = batch[name]
            told = (targets >= 0).any(-1)
            states = hidden[layer][:, PACKED.start :][told]
            read = reader(nn.functional.rms_norm(states, states.shape[-1:])).split(classes, -1)
            targets = targets[told]
            for own, target in zip(read, targets.unbind(-1), strict=True):
                loss = loss + 0.25 * nn.functional.cross_entropy(own, target)
            right = (read[1].argmax(-1) == targets[:, 1])[targets[:, 1] >= 0]
            self.log(f"column_of_{name}", right.float().mean())
        return loss

    def _look(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of heads that look elsewhere."""
        loss = batch["ids"].new_zeros((), dtype=torch.float32)
        all_looked, PACKED.looked = PACKED.looked, {}
        half, words = NUM_HEADS // 2, len(WORDS)
        if self.joins:
            # Of n things, n parts of n + 2: what is averaged says how many there are.
            asked = batch["counts"]
            cells = batch["looks"][asked].float()
            parts = torch.cat([2 * torch.ones_like(cells[:, :1]), cells], 1)
            parts = parts / parts.sum(1, keepdim=True)
            third = all_looked[COUNTED_LAYER][:, half][asked]
            seen = torch.cat([third[:, :1], third[:, words : PACKED.start]], 1)
            loss = loss - 0.2 * (parts * (seen + 1e-4).log()).sum(1).mean()
            joins = batch["joins"]
            joined = all_looked[JOINED_LAYER][:, :half, :, PACKED.start :].mean(1)[joins >= 0]
            share = joined.gather(1, joins[joins >= 0][:, None])
            loss = loss - 0.2 * (share + 1e-4).log().mean()
            self.log(f"look_{JOINED_LAYER}", share.detach().mean())
        for layer, name in LOOKS.items():
            looked = all_looked[layer][:, :half, :, words : PACKED.start].mean(1)
            wanted = batch[name]
            share = (looked * wanted).sum(-1)[wanted.any(-1)]
            loss = loss - 0.2 * (share + 1e-4).log().mean()
            self.log(f"look_{layer}", share.detach().mean())
        return loss

    def _measure(self, hidden: tuple[Tensor, ...], batch: dict[str, Tensor]) -> Tensor:
        """Loss of the read-outs of quantities, in which near misses cost less than far ones."""
        loss = hidden[0].new_zeros(())
        for layer, reader, wanted in (
            (POINTED_LAYER, self.measure, batch["evidence"][..., [0, 1, 4]] / torch.tensor(SCALES)),
            (STEPPED_LAYER, self.result, batch["results"][..., None]),
        ):
            assert reader is not None
            states = hidden[layer][:, PACKED.start :]
            read = reader(nn.functional.rms_norm(states, states.shape[-1:]))
            is_told = wanted > -2
            miss = (read - wanted)[is_told].abs().mean()
            loss = loss + miss
            self.log(f"miss_{layer}", miss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        means = self.means(30)
        lookups = [means[kind] for kind in ("read", "colour")]
        if self.curve == "constant" and np.mean(lookups) > 0.8:
            self.max_alike = min(self.max_alike + 2, hard.MAX_ALIKE)
        told = {
            k: float(v)
            for k, v in self.trainer.logged_metrics.items()
            if "column" in k or "look" in k
        }
        said = " ".join(f"{name} {value:.2f}" for name, value in (means | told).items())
        print(f"epoch {self.current_epoch} alike {self.max_alike} {said}", flush=True)


class Feed(pl.LightningDataModule):
    """A fresh stretch of scenes every epoch, as hard as the module has got to."""

    def __init__(
        self, phase: Phase, steps: int, batch_size: int, seed: int = 0, kept: int = 0
    ) -> None:
        super().__init__()
        self.phase, self.steps, self.batch_size = phase, steps, batch_size
        self.seed, self.kept = seed, kept

    def train_dataloader(self) -> DataLoader[Any]:
        epoch, num_scenes = self.trainer.current_epoch, self.steps * self.batch_size
        data: Dataset[Any]
        if isinstance(self.phase, Questions):
            scenes = SceneDataset(
                "train",
                num_scenes,
                seed=10_000 * self.seed + epoch,
                num_turns=NUM_TURNS,
                kinds=KIND_WEIGHTS,
                level="hard",
                max_alike=self.phase.max_alike,
            )
            data = PackedScenes(scenes, self.kept)
        else:
            data = CrowdedScenes(num_scenes, epoch)
        return DataLoader(data, self.batch_size, num_workers=1, prefetch_factor=4)


def main() -> None:
    """Runs the phases that are not done yet, then publishes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/miniatures/small"))
    given = arguments(parser, tower=8, lookup=6, final=16, measure=4, join=12, settle=3)
    model = build_model("hard")
    phases = Phases(model, given.folder)

    tower = Tower(model, 75 * given.tower_epochs)
    phases.run("tower", tower, given.tower_epochs, lambda own: Feed(own, 75, 32))

    def ask(name: str, questions: Questions, epochs: int, seed: int, kept: int) -> None:
        phases.run(name, questions, epochs, lambda own: Feed(own, 100, BATCH, seed, kept))

    hidden = {"hides": True, "measures": False, "joins": False}
    epochs = given.lookup_epochs
    lookup = Questions(model, 1.5e-3, 100 * epochs, "constant", max_alike=0, **hidden)
    ask("lookup", lookup, epochs, 1, FEW)
    epochs = given.final_epochs
    ask("final", Questions(model, 1.2e-3, 2_200, "cosine", **hidden), epochs, 2, MANY)
    epochs = given.measure_epochs
    measure = Questions(model, 1e-3, 1_200, "cosine", hides=True, joins=False)
    ask("measure", measure, epochs, 4, MANY)
    epochs = given.join_epochs
    ask("join", Questions(model, 1e-3, 100 * epochs, "cosine", hides=True), epochs, 5, MANY)
    epochs = given.settle_epochs
    ask("settle", Questions(model, 5e-4, 100 * epochs, "cosine"), epochs, 3, GRID**2)
    phases.save("model", "hard")
    publish("small", given.folder, phases.times)


if __name__ == "__main__":
    main()
