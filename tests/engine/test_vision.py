"""What the vision tower says of each visual token (oracle: tests/zoo/tower.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import build as build_small
from torch import Tensor, nn
from transformers import DynamicCache
from zoo import ZOO, Specimen
from zoo.checks import forward, generate, schedule
from zoo.flash import attention as attention_of
from zoo.flash import stand_in
from zoo.tower import (
    CLOSE,
    TILES,
    Listening,
    assert_heard,
    attention_per_patch,
    counts_of,
    expected_signals,
    make_features,
    needs_of,
    recorded,
)

import tokenprune as tp
from tokenprune.families.adapter import adapter_of
from tokenprune.families.anatomy import examine

#: One of each way from patches to tokens, and of each form of attention; the rest with `matrix`.
COMMON = (
    *("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "gemma3", "internvl", "smolvlm"),
    *("mistral3", "llama4", "hunyuan_vl"),
)
ALL = [name for name in ZOO if adapter_of(name).tower is not None]
#: Of VideoLLaMA 3, features of a video are left out on the way to the decoder: see below.
SEES_VIDEOS = [name for name in ALL if "video" in ZOO[name].pictures and name != "video_llama_3"]
#: Their videos are images to them: there is no call with both.
VIDEOS_AS_IMAGES = ("internvl", "smolvlm")


def parametrized(names: list[str]) -> list[Any]:
    return [n if n in COMMON else pytest.param(n, marks=pytest.mark.matrix) for n in names]


TYPES = parametrized(ALL)


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """Expected signals of the usual batch, by model type; rows of 1, 0, 2 and 1 images."""
    made: dict[str, Any] = {}

    def of(model_type: str) -> Any:
        if model_type not in made:
            model = ZOO[model_type].build("eager")
            inputs = ZOO[model_type].batch(model)
            needs = needs_of(model_type)
            made[model_type] = expected_signals(model, inputs, needs)
        return made[model_type]

    return of


def prepared(model_type: str, attention: str = "sdpa") -> tuple[Specimen, Any, Any, Listening]:
    specimen = ZOO[model_type]
    model = specimen.build(attention)
    return specimen, model, specimen.batch(model), Listening(needs_of(model_type))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.share(3)
def test_signals_of_a_forward(model_type, attention, known) -> None:
    specimen, model, inputs, strategy = prepared(model_type, attention)
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
    assert_heard(strategy, known(model_type), counts_of(model, inputs))


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "mistral3", "smolvlm"])
@pytest.mark.share(2)
def test_signals_under_flash_attention(model_type, known) -> None:
    """Where nothing makes a mask, and runs are said in another way."""
    specimen, model, inputs, strategy = prepared(model_type, "eager")
    with (
        stand_in(),
        attention_of(model, "flash_attention_2"),
        tp.prune(model, strategy, schedule(specimen)),
    ):
        forward(model, inputs)
    assert_heard(strategy, known(model_type), counts_of(model, inputs))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.share(3)
def test_signals_at_a_later_cut(model_type, known) -> None:
    specimen, model, inputs, strategy = prepared(model_type)
    with tp.prune(model, strategy, schedule(specimen)) as trace:
        forward(model, inputs)
    seen, has, valid = strategy.notes[1]
    starts = torch.tensor([0, *counts_of(model, inputs)]).cumsum(0)
    left = torch.cat([kept + start for kept, start in zip(trace.stages[0].kept, starts[:-1],
                                                          strict=True)])  # fmt: skip
    assert torch.equal(has[valid], known(model_type)[None][left])
    for need in strategy.wants:
        torch.testing.assert_close(seen[need][valid], known(model_type)[need][left], **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2},
                                     {"do_sample": True, "num_return_sequences": 2}])  # fmt: skip
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.share(7)
def test_signals_of_a_generation(model_type, options, known) -> None:
    specimen, model, inputs, strategy = prepared(model_type)
    if options and "beams" in specimen.unable:
        pytest.skip(specimen.unable["beams"])
    torch.manual_seed(0)
    with tp.prune(model, strategy, schedule(specimen)):
        generate(model, inputs, **options)
    assert len(strategy.notes) == 2  # the prompt's two cuts, and none later
    times = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    seen, has, valid = strategy.notes[0]
    alone = {need: value[::times] for need, value in seen.items()}
    for offset in range(times):  # each copy of a row is shown what the row is
        rows = slice(offset, None, times)
        assert torch.equal(has[rows], has[::times])
        for need, value in seen.items():
            assert torch.equal(value[rows], alone[need])
    strategy.notes[0] = alone, has[::times], valid[::times]
    assert_heard(strategy, known(model_type), counts_of(model, inputs))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.share(3)
def test_a_row_of_a_batch_is_shown_what_it_is_alone(model_type) -> None:
    specimen, model, inputs, strategy = prepared(model_type)
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
        alone = specimen.batch(model, [(2, "image", 3, "image", 7)])
        forward(model, alone)
    (together, _, valid), (own, _, whole) = strategy.notes[0], strategy.notes[2]
    for need in strategy.wants:
        torch.testing.assert_close(together[need][2][valid[2]], own[need][0][whole[0]], **CLOSE)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.share(3)
def test_an_image_of_a_later_turn(model_type) -> None:
    """Its own tower's signals, not those of the image before; none for a turn of text."""
    specimen, model, _, strategy = prepared(model_type)
    turns = [specimen.batch(model, [prompt]) for prompt in ((3, "image", 5), (2, "image", 4))]
    expected = expected_signals(model, turns[1], strategy.wants)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad(), tp.prune(model, strategy, schedule(specimen)):
        for turn in (turns[0], {"input_ids": torch.tensor([[5, 6, 7]])}, turns[1]):
            named = {key: value for key, value in turn.items() if key != "attention_mask"}
            model(**named, past_key_values=cache, use_cache=True)
    assert len(strategy.notes) == 4
    strategy.notes[0] = strategy.notes[2]
    assert_heard(strategy, expected, [len(expected[None])])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.share(4)
def test_training(model_type, checkpointing, known) -> None:
    """Labels and gradient checkpointing: recomputed layers of the tower change nothing."""
    specimen, model, inputs, strategy = prepared(model_type)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with tp.prune(model, strategy, schedule(specimen)) as trace:
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        assert trace.stages
        assert len(strategy.notes) == 2
        assert_heard(strategy, known(model_type), counts_of(model, inputs))
    parts = examine(model).vision
    assert all(parameter.grad is not None for parameter in parts.layers[0].parameters())


def test_text_alone_asks_for_nothing() -> None:
    specimen, model, _, strategy = prepared("llava")
    with tp.prune(model, strategy, schedule(specimen)) as trace:
        forward(model, specimen.batch(model, [(9,)]))
        generate(model, specimen.batch(model, [(9,), (4,)]))
    assert trace.stages == []
    assert strategy.notes == []


# --------------------------------------------------------------------- what else becomes of patches


@pytest.mark.parametrize("model_type", parametrized(SEES_VIDEOS))
def test_videos(model_type) -> None:
    specimen = ZOO[model_type]
    model = specimen.build("sdpa")
    inputs = specimen.batch(model, specimen.video_prompts)
    strategy = Listening(needs_of(model_type))
    kind = "image" if model_type in VIDEOS_AS_IMAGES else "video"
    expected = expected_signals(model, inputs, strategy.wants, kind)
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
        assert_heard(strategy, expected, counts_of(model, inputs))
        strategy.notes.clear()
        generate(model, inputs)
    assert_heard(strategy, expected, counts_of(model, inputs))


@pytest.mark.parametrize(
    "model_type", parametrized([n for n in SEES_VIDEOS if n not in VIDEOS_AS_IMAGES])
)
def test_images_and_videos_in_one_call(model_type) -> None:
    """Each placeholder is shown what is of its kind, in whatever order they stand."""
    specimen = ZOO[model_type]
    model = specimen.build("sdpa")
    prompts = [(3, "image", 2, "video", 4), (2, "video", 1, "image", 5), (1, "image", 4), (3,)]
    inputs = specimen.batch(model, prompts)
    strategy = Listening(needs_of(model_type))
    by_kind = [expected_signals(model, inputs, strategy.wants, kind) for kind in ("image", "video")]
    parts = examine(model).placeholders
    ids = inputs["input_ids"]
    kinds = torch.where(torch.isin(ids, torch.tensor(parts("video"))), 1, 0)
    kinds = kinds[tp.visual_mask(model, ids)]
    expected = {}
    by_kind[1][TILES] += (by_kind[1][TILES] >= 0) * (by_kind[0][TILES].max() + 1)
    for need in (None, TILES, *strategy.wants):
        joined = torch.zeros(len(kinds), *by_kind[0][need].shape[1:], dtype=by_kind[0][need].dtype)
        for kind, known_signals in enumerate(by_kind):
            joined[kinds == kind] = known_signals[need]
        expected[need] = joined
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
        assert_heard(strategy, expected, counts_of(model, inputs))
        strategy.notes.clear()
        generate(model, inputs, num_beams=2)
    seen, has, valid = strategy.notes[0]
    strategy.notes[0] = {need: value[::2] for need, value in seen.items()}, has[::2], valid[::2]
    assert_heard(strategy, expected, counts_of(model, inputs))


@pytest.mark.parametrize("queries", ["class", "all"])
def test_a_class_token_that_is_a_visual_token_has_no_patch(queries) -> None:
    specimen = ZOO["llava"]
    model = specimen.build("sdpa")
    model.config.vision_feature_select_strategy = "full"
    inputs = specimen.batch(model, [(3, "image", 5)])
    ids = inputs["input_ids"]
    first = (ids[0] == model.config.image_token_id).nonzero()[0, 0]
    ids = torch.cat([ids[:, :first], ids[:, first : first + 1], ids[:, first:]], 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    strategy = Listening((tp.VisionRows(queries=queries), tp.VisionStates()))
    expected = expected_signals(model, inputs, strategy.wants)
    assert expected[None].tolist() == [False] + [True] * 16
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
    assert_heard(strategy, expected, [17])


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.share(2)
def test_tiles_that_are_partly_padding(model_type, attention) -> None:
    """Padding gets no attention and pays none; tiles of zeros make no tokens."""
    specimen = ZOO[model_type]
    model = specimen.build(attention)
    inputs = specimen.batch(model)
    mask = inputs["pixel_attention_mask"]
    mask[0, 1, 16:] = 0
    mask[2, 3, :, 24:] = 0
    assert (inputs["pixel_values"] == 0).all((2, 3, 4)).any()
    strategy = Listening(needs_of(model_type))
    expected = expected_signals(model, inputs, strategy.wants)
    assert (expected[tp.VisionRows(0, "all")] == 0).all(1).any()
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
    assert_heard(strategy, expected, counts_of(model, inputs))


def test_a_large_mosaic_is_shrunk() -> None:
    """OneVision interpolates: a token is a weighted mean of four patches of the mosaic."""
    specimen = ZOO["llava_onevision"]
    model = specimen.build("sdpa")
    for config in (model.config, model.model.config):
        config.vision_aspect_ratio = "anyres_max_1"
        config.image_grid_pinpoints = [[64, 48]]
    own = torch.Generator().manual_seed(0)
    pixels, size = torch.randn(1, 13, 3, 16, 16, generator=own), torch.tensor([[60, 48]])
    call = {"pixel_values": pixels, "image_sizes": size}
    needs = (tp.VisionRows(-1, "all"), tp.VisionStates(-1, "hidden"))
    # 8 x 6 patches are nearly as many as they were, unpadded, and leave a smaller grid.
    features = make_features(model, call)
    ids = torch.tensor([[5, *[model.config.image_token_id] * len(features), 6, 7]])
    strategy = Listening(needs)
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, call | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    base = examine(model).vision.base
    with recorded(model) as notes:
        make_features(model, call)
    known = notes(-1)
    values = [attention_per_patch(known["weights"], "all", None), known["hidden"][0].flatten(0, 1)]
    seen, has, _ = strategy.notes[0]
    for need, value in zip(needs, values, strict=True):
        # The family's own packing does to them what it does to features.
        (packed,), _ = base.pack_image_features(
            [value.view(13, 4, -1)],
            size,
            image_newline=torch.zeros(value.shape[1]),
            vision_aspect_ratio="anyres_max_1",
        )
        torch.testing.assert_close(seen[need][0], packed, **CLOSE)
    rows = len(features) - 4 - int((~has).sum())
    assert rows < 48
    assert rows % int((~has).sum()) == 0


def test_queries_in_chunks(monkeypatch) -> None:
    """As many rows at a time as memory allows give what all give."""
    for model_type in ("llava", "qwen2_5_vl"):
        specimen, model, inputs, strategy = prepared(model_type)
        with tp.prune(model, strategy, schedule(specimen)):
            forward(model, inputs)
            monkeypatch.setattr("tokenprune.engine.vision.CHUNK_BYTES", 3000)
            forward(model, inputs)
        monkeypatch.undo()
        for need in strategy.wants:
            torch.testing.assert_close(
                strategy.notes[2][0][need], strategy.notes[0][0][need], rtol=0, atol=1e-6
            )


def test_mixed_tokens_are_shown_mixed_alike() -> None:
    @dataclass(frozen=True)
    class Halving(Listening):
        """Keeps every second token, as the mean of it and the next."""

        def select(self, view: tp.TokenView, keep: Tensor) -> tp.Selection:
            super().score(view)
            alive = view.valid.shape[1]
            weights = torch.eye(alive)[::2] / 2 + torch.eye(alive)[1::2] / 2
            kept = (torch.arange(alive) % 2 == 0).expand(1, -1)
            return tp.Selection(kept, weights=weights[None])

    specimen, model, inputs, _ = image_inputs()
    strategy = Halving(needs_of("llava"))
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
    before, after = strategy.notes[0][0], strategy.notes[1][0]
    for need in strategy.wants:
        pairs = before[need].unflatten(1, (8, 2)).mean(2)
        torch.testing.assert_close(after[need], pairs, **CLOSE)


# ----------------------------------------------------------------------------------------- refusals


def image_inputs(model_type: str = "llava") -> tuple[Specimen, Any, dict[str, Tensor], Listening]:
    specimen = ZOO[model_type]
    model = specimen.build("sdpa")
    return specimen, model, specimen.batch(model, [(3, "image", 5)]), Listening()


REFUSED = "expected images that the vision tower encodes while the model is pruned"


def test_features_made_before_are_refused() -> None:
    specimen, model, inputs, strategy = image_inputs()
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        before = model.model.get_image_features(pixels, return_dict=True)
    with tp.prune(model, strategy, schedule(specimen)):
        with pytest.raises(ValueError, match=REFUSED):
            forward(model, inputs | {"mm_encoder_outputs": {"image": before}})
        forward(model, inputs | {"pixel_values": pixels})
        with pytest.raises(ValueError, match=REFUSED):  # that of the call before is not its own
            forward(model, inputs | {"mm_encoder_outputs": {"image": before}})
        with torch.no_grad():
            during = model.model.get_image_features(pixels, return_dict=True)
        with pytest.raises(ValueError, match=REFUSED):  # nor is what is known of others
            forward(model, inputs | {"mm_encoder_outputs": {"image": before}})
        forward(model, inputs | {"mm_encoder_outputs": {"image": during}})


def test_features_left_out_on_the_way_are_refused() -> None:
    """VideoLLaMA 3 makes features of what looks like the frame before, and then drops them."""
    specimen = ZOO["video_llama_3"]
    model = specimen.build("sdpa")
    strategy = Listening((tp.VisionRows(queries="all"),))
    with (
        tp.prune(model, strategy, schedule(specimen)),
        pytest.raises(ValueError, match=REFUSED),
    ):
        forward(model, specimen.batch(model, specimen.video_prompts))


def test_embeddings_instead_of_pixels_are_refused() -> None:
    specimen, model, inputs, strategy = image_inputs()
    mask = tp.visual_mask(model, inputs["input_ids"])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with tp.prune(model, strategy, schedule(specimen)):
        forward(model, inputs)
        for call in ({"inputs_embeds": embeds}, {"input_ids": inputs["input_ids"]}):
            with pytest.raises(ValueError, match=REFUSED):
                forward(model, call | {"visual_mask": mask})


def test_two_runs_of_the_model_in_one_call_are_apart() -> None:
    """Within a module that runs the model twice, the second does not find the first's images."""
    specimen, model, inputs, strategy = image_inputs()
    mask = tp.visual_mask(model, inputs["input_ids"])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, embeddings: bool) -> None:
            self.model(**inputs)
            call = {"inputs_embeds": embeds, "visual_mask": mask} if embeddings else inputs
            self.model(**call)

    twice = Twice()
    with torch.no_grad(), tp.prune(twice, strategy, schedule(specimen)):
        twice(False)
        with pytest.raises(ValueError, match=REFUSED):
            twice(True)


def test_features_in_parts_are_refused() -> None:
    specimen, model, inputs, strategy = image_inputs()
    with (
        tp.prune(model, strategy, schedule(specimen)),
        pytest.raises(ValueError, match=REFUSED + "|expected an image in one call"),
    ):
        generate(model, inputs, prefill_chunk_size=7)


def test_a_tower_without_a_class_token_is_refused() -> None:
    specimen = ZOO["gemma3"]
    model = specimen.build("sdpa")
    match = r"with a class token, for VisionRows\(layer=-2, queries='class'.*, got Gemma3"
    with pytest.raises(ValueError, match=match):
        tp.attach(model, Listening(), schedule(specimen))


def test_a_model_without_a_tower_is_refused() -> None:
    text = build_small("llama")
    match = r"vision tower is known, for VisionRows\(.*\), got LlamaForCausalLM \(llama\)"
    with pytest.raises(ValueError, match=match):
        tp.attach(text, Listening(), tp.Schedule.one_shot(2, 0.5))


def test_a_layer_that_the_tower_lacks_is_refused() -> None:
    specimen, model, _, _ = image_inputs()
    with pytest.raises(
        ValueError, match=r"expected a layer from -2 to 1 of Llava.*got 5 .VisionRows"
    ):
        tp.attach(model, Listening((tp.VisionRows(5),)), schedule(specimen))


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"VisionRows.queries: expected one of .* got 'last'"):
        tp.VisionRows(queries="last")
    with pytest.raises(ValueError, match=r"VisionRows.heads: expected one of .* got 'all'"):
        tp.VisionRows(heads="all")
    with pytest.raises(ValueError, match=r"VisionStates.what: expected one of .* got 'values'"):
        tp.VisionStates(what="values")


def test_what_is_not_declared_is_refused() -> None:
    @dataclass(frozen=True)
    class Asking(Listening):
        def score(self, view):
            return view.vision_rows(-1).mean(1)

    specimen, model, inputs, _ = image_inputs()
    with (
        tp.prune(model, Asking(), schedule(specimen)),
        pytest.raises(ValueError, match=r"expected what is declared in needs\(\)"),
    ):
        forward(model, inputs)


# ------------------------------------------------------------------------------- the model as found


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was_found() -> None:
    specimen, model, inputs, strategy = prepared("llava")
    forward(model, inputs)  # transformers adds hooks of its own at a model's first call
    names, keys = hooks_of(model), set(vars(model.model))
    handle = tp.attach(model, strategy, schedule(specimen))
    assert hooks_of(model) > names
    forward(model, inputs)
    handle.remove()
    assert hooks_of(model) == names
    assert set(vars(model.model)) == keys


def test_nothing_hears_the_tower_unless_it_is_asked() -> None:
    specimen, model, _, _ = prepared("llava")
    tower = model.model.vision_tower
    with tp.prune(model, tp.build_strategy("pyramiddrop"), schedule(specimen)):
        assert hooks_of(tower) == 0
    handle = tp.attach(model, tp.build_strategy("pyramiddrop"), schedule(specimen))
    assert handle._watch is None
    handle.remove()
    with tp.prune(model, Listening(), schedule(specimen)):
        assert hooks_of(tower) == 3  # arguments, queries and keys of one layer


def test_signals_die_with_their_features() -> None:
    specimen, model, inputs, strategy = image_inputs()
    handle = tp.attach(model, strategy, schedule(specimen))
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    assert len(handle._watch._known) == 1
    del features
    assert len(handle._watch._known) == 0
    handle.remove()
