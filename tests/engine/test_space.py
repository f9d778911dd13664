"""Survivors that are mixed before the projector, which projects the mixture."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import ROWS, batch, build, labelled
from oracles import all_visual, assert_close, generate
from zoo import ZOO

import tokenprune as tp
from tokenprune.families.adapter import adapter_of
from tokenprune.families.anatomy import examine

NAMES = ("visionzip", "prumerge", "prumerge_plus")
TOWERS = {name: adapter_of(name).tower for name in ZOO}
PROJECTING = [name for name, tower in TOWERS.items() if tower and tower.projector]
HALF = tp.Schedule.one_shot(layer=0, keep=0.5)


def strategy(name: str) -> tp.PruningStrategy:
    fields = {"contextual": 0.5} if name == "visionzip" else {"neighbours": 3}
    return tp.build_strategy(name, **fields)


def given(model, inputs) -> torch.Tensor:
    """What the unmodified model's projector is given, (images or tiles, patches, C)."""
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def embeddings(model, inputs) -> torch.Tensor:
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_model_fed_projected_mixtures(name, attention) -> None:
    model = build("llava", attention)
    for row in (ROWS[0], ROWS[2]):
        inputs = batch(model, [row])
        visual, embeds = all_visual(model, inputs)[0], embeddings(model, inputs)
        patches = given(model, inputs).flatten(0, 1)
        with torch.no_grad(), tp.prune(model, strategy(name), HALF, "renumbered") as trace:
            ours = model(**inputs).logits
        stage = trace.stages[0]
        columns = visual.nonzero()[:, 0]
        mixed = stage.weights[0] @ patches
        with torch.no_grad():
            embeds[0, columns[stage.kept[0]]] = model.model.multi_modal_projector(mixed)
            left = ~visual
            left[columns[stage.kept[0]]] = True
            theirs = model.get_decoder()(inputs_embeds=embeds[:, left]).last_hidden_state
            assert_close(ours, model.lm_head(theirs))
        # The projector bends: to mix what it gives is something else.
        inside = dataclasses.replace(strategy(name), space="decoder")
        with torch.no_grad(), tp.prune(model, inside, HALF, "renumbered"):
            assert (model(**inputs).logits - ours).abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.share(3)
def test_a_row_of_a_batch_is_the_row_alone(name, family, side) -> None:
    model = build(family)
    inputs = batch(model, ROWS, side)
    with torch.no_grad(), tp.prune(model, strategy(name), HALF, "renumbered") as trace:
        together = model(**inputs).logits
        lengths = trace.lengths[-1].tolist()
        for number, row in enumerate(ROWS):
            alone = model(**batch(model, [row])).logits[0]
            count = lengths[number]
            own = together[number, -count:] if side == "left" else together[number, :count]
            assert_close(own, alone, 3e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("name", NAMES)
def test_who_keeps_all_changes_no_bit(name, family) -> None:
    model = build(family)
    inputs = batch(model, ROWS)
    with torch.no_grad():
        whole = model(**inputs).logits
        with tp.prune(model, strategy(name), tp.Schedule.one_shot(layer=0, keep=1.0)):
            assert torch.equal(model(**inputs).logits, whole)


def test_newlines_have_no_patch_and_stay_as_they_are() -> None:
    model = build("llava_next")
    inputs = batch(model, [ROWS[0]])
    visual = all_visual(model, inputs)[0]
    whole = embeddings(model, inputs)[0, visual]
    entered = []
    keep = tp.Schedule.one_shot(layer=0, keep=0.9)
    with torch.no_grad(), tp.prune(model, strategy("visionzip"), keep) as trace:
        first = model.get_decoder().layers[0].input_layernorm
        hook = first.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        model(**inputs)
        hook.remove()
    (kept,) = trace.stages[0].kept
    alone = (trace.stages[0].weights[0] != 0).sum(1) == 1
    before = int(visual.nonzero()[0])
    ours = entered[0][0, before : before + len(kept)]
    assert torch.equal(ours[alone], whole[kept][alone])
    assert not torch.equal(ours[~alone], whole[kept][~alone])


def test_generation_encodes_ahead_and_is_the_same() -> None:
    model = build("llava")
    inputs = batch(model, [ROWS[0], ROWS[3]])
    with torch.no_grad(), tp.prune(model, strategy("visionzip"), HALF, "renumbered"):
        cached = generate(model, inputs)
        whole = generate(model, inputs, use_cache=False)
        beams = generate(model, inputs, num_beams=2)
    for ours, theirs in zip(cached.logits, whole.logits, strict=True):
        assert_close(ours, theirs, 3e-5)
    assert beams.sequences.shape[0] == 2


@pytest.mark.parametrize("name", NAMES)
def test_training_reaches_the_projector_through_the_mixture(name) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build("llava").train()
        inputs, labels = labelled(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with tp.prune(model, strategy(name), HALF, "renumbered"):
            model(**inputs, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours = gradients[0]["model.multi_modal_projector.linear_1.weight"]
    assert ours.abs().max() > 0
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6)
    # Against a step along the gradient.
    model = build("llava").train()
    inputs, labels = labelled(model)
    weight = model.model.multi_modal_projector.linear_1.weight
    direction, losses = ours / ours.norm(), []
    with torch.no_grad(), tp.prune(model, strategy(name), HALF, "renumbered"):
        for step in (1e-3, -2e-3):
            weight += step * direction
            losses.append(model(**inputs, labels=labels).loss)
    assert (losses[0] - losses[1]).item() / 2e-3 == pytest.approx(ours.norm().item(), rel=2e-2)


@dataclasses.dataclass(frozen=True)
class Halves(tp.PruningStrategy):
    """Keeps half, each as the mean of itself and of the one behind it, of the token's patches."""

    def needs(self) -> tuple[object, ...]:
        return (tp.BeforeProjector(), tp.VisionStates(-1, "hidden"))

    def select(self, view: tp.TokenView, keep: torch.Tensor) -> tp.Selection:
        num_alive = view.valid.shape[1]
        weights = torch.eye(num_alive)
        weights = (weights + weights.roll(1, 1))[: int(keep[0])] / 2
        kept = torch.arange(num_alive) < keep[0]
        return tp.Selection(kept[None], weights=weights[None], space="vision")


@pytest.mark.parametrize("model_type", PROJECTING)
def test_every_named_projector_projects_a_patch_to_a_token(model_type) -> None:
    model = ZOO[model_type].build("sdpa")
    parts = examine(model).vision
    inputs = ZOO[model_type].batch(model, [(3, "image", 5)])
    visual = tp.visual_mask(model, inputs["input_ids"])[0]
    entered, given = [], []
    with torch.no_grad(), tp.prune(model, Halves(), HALF) as trace:
        hooks = [
            examine(model)
            .layers[0]
            .register_forward_pre_hook(
                lambda module, args, kwargs: entered.append(args[0]), with_kwargs=True
            ),
            parts.projector.register_forward_pre_hook(lambda module, args: given.append(args[0])),
        ]
        model(**inputs, use_cache=False)
        kept, mixed = trace.stages[0].kept[0], trace.stages[0].weights[0]
    for hook in hooks:
        hook.remove()
    count = min(len(kept), 3)  # the first tokens of an image are its first patches
    patches = given[0].flatten(0, -2)[: count + 1]
    with torch.no_grad():
        expected = parts.projector(mixed[:count, : count + 1] @ patches)
    start = int(visual.nonzero()[0])
    assert_close(entered[0][0, start : start + count], expected)


def test_where_it_cannot_be_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a cut at layer 0 .* VisionZip.*got layer 2"):
        tp.attach(build("llava"), strategy("visionzip"), tp.Schedule.one_shot(layer=2, keep=0.5))
    with pytest.raises(ValueError, match=r"VisionZip.space: expected one of"):
        tp.build_strategy("visionzip", space="tower")
