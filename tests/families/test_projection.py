"""Queries and keys of a layer, by the cheaper of two ways where it is right."""

from __future__ import annotations

import pytest
import torch
from models import ROWS, batch, build
from zoo import ZOO

import tokenprune as tp
from tokenprune.families import projection
from tokenprune.families.anatomy import examine

#: Types some of whose layers do more than LLaMA's to make queries and keys: heard as they run.
CAPTURED = {
    *("aya_vision", "blip-2", "cohere2_vision", "exaone4_5", "fuyu", "gemma4", "gemma4_unified"),
    *("hunyuan_vl", "instructblip", "instructblipvideo", "kimi_k25", "llama4", "mistral4"),
    *("kosmos-2", "kosmos-2.5", "molmo2", "muse_glimmer", "muse_spark"),
}


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.share(8)
def test_layers_like_llamas_are_not_run_to_be_heard(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cheaper way to queries and keys is right for them, for partly rotated heads, too; of one
    query in a short prompt, which is rotated beside the keys, as in a long one."""
    specimen = ZOO[name]
    model = specimen.build("sdpa")
    schedule = tp.Schedule(tuple(tp.Stage(cut, 0.5) for cut in specimen.cuts))
    inputs = specimen.batch(model, [(3, "image", 5)])
    mask = inputs.get("image_embeds_position_mask")  # the Kosmos types know no placeholder ids
    mask = None if mask is None else mask.bool()
    exact, asked = projection.ordinary, []
    monkeypatch.setattr(projection, "ordinary", lambda *own: asked.append(own) or exact(*own))
    with (
        torch.no_grad(),
        tp.prune(model, tp.build_strategy("pyramiddrop"), schedule, visual_mask=mask),
    ):
        model(**inputs)
        asked.clear()
        model(**inputs)
    layers = [examine(model).layers[cut] for cut in specimen.cuts]
    assert all(projection._is_ordinary[layer][0] for layer in layers) == (name not in CAPTURED)
    for layer, hidden, rows, named in asked:
        theirs = projection.captured(layer, hidden, rows, named)
        for most in (projection._SHORT, 0):
            monkeypatch.setattr(projection, "_SHORT", most)
            ours = exact(layer, hidden, rows, named)
            torch.testing.assert_close(ours.queries, theirs.queries)
            torch.testing.assert_close(ours.keys, theirs.keys)
        monkeypatch.undo()


def test_one_query_is_rotated_beside_all_keys_where_they_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a long prompt that would take as much memory as the queries of all tokens."""
    from transformers.models.llama import modeling_llama as llama

    model, rotate, turned = build("llava"), llama.apply_rotary_pos_emb, []

    def noted(queries, *others):
        turned.append(queries.shape[2])
        return rotate(queries, *others)

    strategy, schedule = tp.build_strategy("pyramiddrop"), tp.Schedule.one_shot(2, 0.5)
    with torch.no_grad(), tp.prune(model, strategy, schedule):
        inputs = batch(model, ROWS[:1])
        length = model(**inputs).logits.shape[1]
        monkeypatch.setattr(llama, "apply_rotary_pos_emb", noted)
        model(**inputs)
        assert turned[2] > length
        turned.clear()
        monkeypatch.setattr(projection, "_SHORT", 0)
        model(**inputs)
        assert turned[2] == 1
