"""Visual features that are added between the first layers (oracle: layers run by hand)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from mixing import Mixing
from torch import Tensor
from zoo import ZOO
from zoo.checks import drop_is_mask, forward, greedy, identity, training

import tokenprune as tp
from tokenprune.families.anatomy import examine
from tokenprune.tensors import causal

CLOSE = {"rtol": 0, "atol": 2e-5}
#: By the types' own code: a list of what comes after layers, and a dict of what comes before them.
KINDS = ["qwen3_vl", "granite4_vision"]
OTHERS = ["qwen3_vl_moe", "qwen3_omni_moe_thinker", "cosmos3_omni", "cohere_compass"]


def decoder_arguments(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the unmodified model gives its decoder."""
    seen: list[Any] = []
    hook = examine(model).decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        forward(model, inputs)
    hook.remove()
    return seen[0]


def by_hand(model: Any, given: dict[str, Any], trace: tp.Trace) -> Tensor:
    """Last hidden states of the only row: layers one by one, hidden states and features mixed."""
    decoder = examine(model).decoder
    hidden = given["inputs_embeds"]
    visual = given["visual_pos_masks"][0].nonzero()[:, 0]
    features = list(given["deepstack_visual_embeds"])
    turned = decoder.rotary_emb(hidden, given["position_ids"][-3:])
    order, alive = torch.arange(hidden.shape[1]), visual
    stages = {stage.layer: stage for stage in trace.stages}
    for index, layer in enumerate(decoder.layers):
        if index in stages:
            left = visual[stages[index].kept[0]]
            weights = stages[index].weights
            weights = (left[:, None] == alive).float() if weights is None else weights[0]
            features = [weights @ of_layer for of_layer in features]
            mixed = weights @ hidden[0, torch.isin(order, alive)]
            stays = ~torch.isin(order, alive) | torch.isin(order, left)
            order, alive, hidden = order[stays], left, hidden[:, stays].clone()
            hidden[0, torch.isin(order, alive)] = mixed
        allowed = causal(torch.arange(len(order))[None], len(order), 0)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        pair = tuple(part[:, order] for part in turned)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=pair)
        if index < len(features):
            hidden = hidden.clone()
            hidden[0, torch.isin(order, alive)] += features[index]
    return decoder.norm(hidden)


@pytest.mark.parametrize("strategy", [Mixing(), tp.build_strategy("uniform")], ids=repr)
@pytest.mark.parametrize("cuts", [(0,), (1,), (0, 1), (0, 2), (1, 4)])
def test_features_follow_their_tokens_and_are_mixed_alike(cuts, strategy) -> None:
    model = ZOO["qwen3_vl"].build("eager")
    inputs = ZOO["qwen3_vl"].batch(model, [(3, "image", 2, "image", 5)])
    given = decoder_arguments(model, inputs)
    stages = tuple(tp.Stage(cut, 0.6 ** (number + 1)) for number, cut in enumerate(cuts))
    with torch.no_grad(), tp.prune(model, strategy, tp.Schedule(stages)) as trace:
        ours = model(**inputs, use_cache=False).logits
        expected = model.lm_head(by_hand(model, given, trace))
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore")  # of transformers' own names for checkpointing
@pytest.mark.parametrize("model_type", [*KINDS, *(pytest.param(o, marks=pytest.mark.matrix)
                                                  for o in OTHERS)])  # fmt: skip
@pytest.mark.share(2)
def test_cuts_before_they_are_added_are_exact(model_type) -> None:
    """Ragged batches, generation, training: as where nothing is added."""
    specimen = ZOO[model_type]
    model = specimen.build("sdpa")
    early = dataclasses.replace(specimen, cuts=(0, 2))
    for check in (identity, drop_is_mask, greedy, training):
        check(early, model)


def test_gradients_reach_the_tower_through_them() -> None:
    """As they do in the unmodified model, when everything is kept."""
    gradients = []
    for keep in (None, 1.0):
        model = ZOO["qwen3_vl"].build("sdpa").train()
        inputs = ZOO["qwen3_vl"].batch(model)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :-3] = -100
        if keep is None:
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        else:
            cut = tp.Schedule.one_shot(0, keep)
            with tp.prune(model, tp.build_strategy("uniform"), cut):
                model(**inputs, labels=labels, use_cache=False).loss.backward()
        mergers = model.model.visual.deepstack_merger_list
        gradients.append([parameter.grad for parameter in mergers.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_features_after_the_last_layer_are_refused() -> None:
    specimen = ZOO["qwen3_vl"]
    model = specimen.build("sdpa")
    given = decoder_arguments(model, specimen.batch(model, [(3, "image", 5)]))
    features = given["deepstack_visual_embeds"][:1] * 6
    decoder, mask = examine(model).decoder, given["visual_pos_masks"]
    call = given | {"deepstack_visual_embeds": features}
    with tp.prune(
        model, tp.build_strategy("uniform"), tp.Schedule.one_shot(0, 0.5), visual_mask=mask
    ):
        with pytest.raises(ValueError, match="before layer 5 at the latest, got some after it"):
            decoder(**call)
        decoder(**call | {"deepstack_visual_embeds": features[:5]})


def test_features_of_other_tokens_than_the_visual_ones_are_refused() -> None:
    specimen = ZOO["qwen3_vl"]
    model = specimen.build("sdpa")
    inputs = specimen.batch(model, [(3, "image", 2, "image", 5)])
    mask = tp.visual_mask(model, inputs["input_ids"])
    mask[:, mask[0].nonzero()[-1]] = False
    early, late = tp.Schedule.one_shot(1, 0.5), tp.Schedule.one_shot(2, 0.5)
    with (
        tp.prune(model, tp.build_strategy("uniform"), early, visual_mask=mask),
        pytest.raises(ValueError, match=r"expected 11 visual tokens .* got features of \[12\]"),
    ):
        forward(model, inputs)
    with tp.prune(model, tp.build_strategy("uniform"), late, visual_mask=mask) as trace:
        forward(model, inputs)
    assert len(trace.stages[0].kept[0]) == 6
