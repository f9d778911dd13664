"""The recipes of the shipped models: what they compute, and that they go on where they stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tokenprune.data.scenes import SceneDataset, hard

RECIPES = Path(__file__).parents[1] / "experiments" / "miniatures"


@pytest.fixture(scope="module")
def recipes() -> Iterator[SimpleNamespace]:
    """The scripts, as they see each other."""
    if not RECIPES.is_dir():
        pytest.skip("no checkout")
    names = ("model", "publish", "recipe", "tiny", "small")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(RECIPES))
    try:
        import model
        import recipe
        import small

        yield SimpleNamespace(model=model, recipe=recipe, small=small)
    finally:
        sys.path.remove(str(RECIPES))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
def test_packed_turns_see_the_prefix_and_themselves(
    recipes: SimpleNamespace, hides: bool, layer: int
) -> None:
    words, patches, length, turns = len(recipes.recipe.WORDS), 5, 4, 3
    start, total = words + patches, words + patches + length * turns
    attend = recipes.recipe.Packed(length, first_look=2, watched=(2,))
    attend.hides, attend.start = hides, start
    made = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, total, 8, generator=made)
    module = SimpleNamespace(layer_idx=layer, training=True)
    found, _ = attend(module, query, key, value, None, scaling=0.3)

    sees = torch.ones(total, total, dtype=torch.bool).tril()
    turn = torch.cat([torch.full((start,), -1), torch.arange(length * turns) // length])
    sees &= (turn == turn[:, None]) | (turn == -1)
    is_patch = torch.zeros(total, dtype=torch.bool)
    is_patch[words:start] = True
    if hides:
        sees[is_patch] &= ~is_patch | torch.eye(total, dtype=torch.bool)[is_patch]
        if layer < 2:
            sees[start:] &= ~is_patch
    expected = nn.functional.scaled_dot_product_attention(query, key, value, sees, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert (set(attend.looked) == {2}) == (layer == 2)
    if layer == 2:
        weights = (query @ key.transpose(-1, -2) * 0.3).masked_fill(~sees, -torch.inf).softmax(-1)
        looked = attend.looked[2]
        torch.testing.assert_close(looked[..., :start], weights[:, :, start:, :start])
        own = weights[:, :, start:, start:].reshape(2, 2, turns, length, turns, length)
        own = torch.stack([own[:, :, n, :, n] for n in range(turns)], 2).flatten(2, 3)
        torch.testing.assert_close(looked[..., start:], own)


def test_what_is_told_of_a_question_is_what_it_asks(recipes: SimpleNamespace) -> None:
    """Every answer follows from the cells and facts that the recipe tells."""
    scenes = SceneDataset("train", 60, num_turns=11, level="hard")
    packed = recipes.small.PackedScenes(scenes, 64)
    length = recipes.small.TURN_LENGTH
    for index in range(60):
        scene, questions = scenes.scene(index)
        given = packed[index]
        shown = {(item.row, item.column): item for item in scene.items}
        (sign,) = scene.signs
        glyphs = dict(zip(sign.cells, sign.text, strict=True))
        assert given["kept"].tolist() == sorted(set(given["kept"].tolist()))
        cells = [divmod(patch, hard.STYLE.grid) for patch in given["kept"].tolist()]
        assert {*shown, *glyphs} <= set(cells)
        for number, question in enumerate(questions):
            own = slice(number * length, (number + 1) * length)
            looked = [
                [cells[place] for place in row.nonzero().flatten().tolist()]
                for row in given["looks"][own]
            ]
            words = question.turn.question.removesuffix("?").split()
            last, answer = len(words) - 1, question.turn.answer
            kind = question.turn.kind
            if kind in ("read", "colour"):
                (cell,) = looked[last]
                assert answer in (shown[cell].symbol, shown[cell].colour)
            elif kind == "count":
                assert hard.NUMBERS[len(looked[last])] == answer
            elif kind == "compare":
                assert (len(looked[last - 2]) > len(looked[last])) == (answer == "yes")
            elif kind == "text":
                said = [glyphs[cell] for (cell,) in looked[last : last + len(answer.split())]]
                assert " ".join(said) == answer
            elif kind == "steps":
                (place,) = given["second_looks"][own][last].nonzero().flatten().tolist()
                assert shown[cells[place]].symbol == answer
                assert given["steps"][own][last].tolist()[:2] == list(cells[place])
            elif kind == "exist" and answer == "yes":
                (cell,) = looked[last]
                assert [shown[cell].colour, shown[cell].symbol] == words[-2:]


@pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice on what is so small
def test_a_phase_goes_on_where_it_was_stopped(recipes: SimpleNamespace, tmp_path: Path) -> None:
    import pytorch_lightning as pl

    class Line(recipes.recipe.Phase):
        def training_step(self, batch: Any, index: int) -> Any:
            if self.global_step == stop:
                raise KeyboardInterrupt
            return self.model(batch[0]).square().mean()

    class Feed(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            made = torch.Generator().manual_seed(3)
            data = torch.utils.data.TensorDataset(torch.randn(6, 2, generator=made))
            return torch.utils.data.DataLoader(data, 2)

    def ran(folder: Path, *stops: int) -> Any:
        nonlocal stop
        for stop in (*stops, -1):
            torch.manual_seed(0)
            model = nn.Linear(2, 1)
            phases = recipes.recipe.Phases(model, folder)
            line = Line(model, 1e-2, 12, "cosine")
            try:
                phases.run("line", line, 4, lambda own: Feed())
            except (KeyboardInterrupt, SystemExit):
                assert stop >= 0
        return phases, model.weight.detach().clone()

    stop = -1
    phases, whole = ran(tmp_path / "whole")
    assert list(phases.times) == ["line"]
    _, stopped = ran(tmp_path / "stopped", 7)
    assert torch.equal(whole, stopped)
    before = (tmp_path / "whole" / "line.pt").stat().st_mtime_ns
    _, again = ran(tmp_path / "whole")
    assert torch.equal(whole, again)
    assert (tmp_path / "whole" / "line.pt").stat().st_mtime_ns == before


def test_models_are_built_for_their_level(recipes: SimpleNamespace) -> None:
    for level, tokens in (("easy", 144), ("hard", 576)):
        model = recipes.model.build_model(level)
        vision = model.config.vision_config
        assert (vision.image_size // vision.patch_size) ** 2 == tokens
        processor = recipes.model.build_processor(level)
        scenes = SceneDataset("train", 40, level=level, num_turns=8)
        for index in range(40):
            for question in scenes.scene(index)[1]:
                words = f"{question.turn.question} {question.turn.answer}"
                assert processor.tokenizer.unk_token_id not in processor.tokenizer(words).input_ids
