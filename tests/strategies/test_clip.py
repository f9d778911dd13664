"""CDPruner's relevance by a CLIP model that the user names, made from a config."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import second
import torch
from made_views import WIDTH, made
from models import build, vision_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import tokenprune as tp
from tokenprune.strategy import HasPatches

#: Words of the tiny tokenizers: `w0` to `w99`, by number.
WORDS = 100
#: What the text tower reads at once.
LENGTH = 12
START, END = WORDS, WORDS + 1


def save_tokenizer(folder: Path, special: bool) -> None:
    """A tokenizer of words between spaces, which CLIP's puts between a start and an end."""
    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"<s>": START, "</s>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        pair = [("<s>", START), ("</s>", END)]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=pair)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module", params=[WIDTH])
def named(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """Folders of a tiny CLIP and of a model's own tokenizer, and the CLIP."""
    return save(tmp_path_factory.mktemp("clip"), {"hidden_size": request.param})


def save(folder: Path, vision: dict[str, Any]) -> tuple[dict[str, str], Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    text = {"vocab_size": WORDS + 2, "max_position_embeddings": LENGTH, "eos_token_id": END,
            "bos_token_id": START, "pad_token_id": 0}  # fmt: skip
    picture = {"image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=sizes | text,
            vision_config=sizes | picture | vision,
            projection_dim=5,
            initializer_factor=20.0,
        )
        clip = CLIPModel(config).eval()
    clip.save_pretrained(folder / "clip")
    save_tokenizer(folder / "clip", special=True)
    save_tokenizer(folder / "own", special=False)
    return {"clip": str(folder / "clip"), "tokenizer": str(folder / "own")}, clip


def pieces_of(clip: Any, question: tuple[int, ...]) -> list[Any]:
    """Embeddings of a question's pieces, cut and filled up by hand."""
    ids = [START, *question, END]
    ids += [0] * (-len(ids) % LENGTH)
    found = []
    for start in range(0, len(ids), LENGTH):
        with torch.no_grad():
            own = clip.get_text_features(input_ids=torch.tensor([ids[start : start + LENGTH]]))
        found.append(getattr(own, "pooler_output", own)[0].double().numpy())
    return found


def test_the_same_picks_as_the_second_implementation(named: Any) -> None:
    fields, clip = named
    strategy = tp.build_strategy("cdpruner", relevance="clip", **fields)
    for seed in range(0, 300, 7):
        batch = made(seed)
        kept = strategy.select(batch.view, batch.keep).kept
        for row, question in enumerate(batch.answers[tp.Question()]):
            pieces = pieces_of(clip, question)
            expected, _ = second.cdpruner_clip(batch, row, clip, pieces)
            assert kept[row].nonzero()[:, 0].tolist() == expected


def test_long_questions_are_read_in_pieces(named: Any) -> None:
    """Thirty words are three pieces, the last filled up; no word is left out."""
    from tokenprune.strategies._clip import likeness

    fields, clip = named
    states = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    question = tuple(range(30))
    with torch.no_grad():
        normed = clip.vision_model.post_layernorm(states[0])
        patches = torch.nn.functional.normalize(clip.visual_projection(normed), dim=-1)
    pieces = [torch.from_numpy(piece).float() for piece in pieces_of(clip, question)]
    assert len(pieces) == 3
    cosines = torch.stack([patches @ piece / piece.norm() for piece in pieces])
    found = likeness(states, [question], **fields)
    torch.testing.assert_close(found[0], cosines.mean(0))
    assert not torch.allclose(found, likeness(states, [(*question[:-1], 7)], **fields))


def test_on_a_model_whose_tower_is_the_clip_s(tmp_path: Path) -> None:
    """The words after the image, by the model's own ids; the states that it projects."""
    sizes = vision_config()
    vision = {key: getattr(sizes, key) for key in ("hidden_size", "intermediate_size",
              "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")}  # fmt: skip
    fields, clip = save(tmp_path, vision)
    model = build("llava")
    image = model.config.image_token_id
    ids = torch.tensor([[5, 6, *[image] * 16, 7, 8, 9]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": pixels}
    seen: list[Any] = []

    class Watched(tp.PruningStrategy):
        def needs(self) -> tuple[Any, ...]:
            return (tp.Question(), tp.VisionStates(-2, "hidden"), tp.Projected())

        def select(self, view: tp.TokenView, keep: torch.Tensor) -> tp.Selection:
            seen.append((view.question, view.vision_states(-2, "hidden"), view.projected))
            return tp.Selection(view.valid)

    whole, half = tp.Schedule.one_shot(0, 1.0), tp.Schedule.one_shot(0, 0.5)
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        with tp.prune(model, Watched(), whole):
            model(**inputs)
        strategy = tp.build_strategy("cdpruner", relevance="clip", **fields)
        with tp.prune(model, strategy, half) as trace:
            model(**inputs)
    question, states, projected = seen[0]
    assert question == ((7, 8, 9),)
    torch.testing.assert_close(states, tower[:, 1:])
    answers = {
        tp.VisionStates(-2, "hidden"): states,
        tp.Projected(): projected,
        HasPatches(): torch.ones(1, 16, dtype=torch.bool),
    }
    by_hand: Any = SimpleNamespace(answers=answers, counts=[16], keep=torch.tensor([8]))
    expected, _ = second.cdpruner_clip(by_hand, 0, clip, pieces_of(clip, (7, 8, 9)))
    assert trace.stages[0].kept[0].tolist() == expected


def test_what_is_missing_or_of_another_size_is_refused(named: Any) -> None:
    fields, _ = named
    with pytest.raises(ValueError, match=r"CDPruner.clip, tokenizer: .* got None and None"):
        tp.build_strategy("cdpruner", relevance="clip")
    with pytest.raises(ValueError, match=r"CDPruner.relevance: expected one of"):
        tp.build_strategy("cdpruner", relevance="text")
    model = build("llava")
    ids = torch.tensor([[5, *[model.config.image_token_id] * 16, 7]])
    pixels = torch.zeros(1, 3, 32, 32)
    strategy = tp.build_strategy("cdpruner", relevance="clip", **fields)
    cut = tp.Schedule.one_shot(0, 0.5)
    with (
        tp.prune(model, strategy, cut),
        pytest.raises(ValueError, match=rf"CDPruner.clip: .* width 32, got .* width {WIDTH}"),
    ):
        model(input_ids=ids, pixel_values=pixels)
    text = build("llama")
    with pytest.raises(ValueError, match="expected a model whose vision tower is known"):
        tp.attach(text, strategy, cut)
