"""Visual features that a model adds between its first layers, added to the tokens that are left.

The model adds them to all visual tokens of a call, by a mask over all of its columns. Those that
come after the first cut are taken out of its hands before it begins.

Shape suffixes: B batch rows, T columns of the call, N positions at a level, V visual tokens alive;
G rows of tables, a sequence each, which are the batch's if a row has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.engine.passes import Late, Pass
from tokenprune.families.inputs import without_late_features
from tokenprune.tensors import take, to_device


def take_out(run: Pass, named: Mapping[str, Any], first: int) -> tuple[dict[str, Any], Late | None]:
    """The decoder's arguments without the features that come after a layer, and those.

    Args:
        run: The pass that begins.
        named: The decoder's arguments.
        first: The layer, before the first cut or there.

    Raises:
        ValueError: If features come after the last layer, or are not of the visual tokens.
    """
    anatomy, cuts = run.settings.anatomy, run.settings.cuts
    left, marked, features = without_late_features(named, first)
    if not features:
        return left, None
    assert marked is not None
    if max(features) >= len(anatomy.layers):
        raise ValueError(
            f"prune: expected visual features that the model adds before layer "
            f"{len(anatomy.layers) - 1} at the latest, got some after it, with cuts at "
            f"{list(cuts)}. Move the first cut to layer {max(features)} or later."
        )
    num_visual = int(run.rows.visual.sum())
    num_marked = {len(of_layer) for of_layer in features.values()}
    if marked.shape != run.rows.shape or num_marked != {num_visual}:
        if first < cuts[0]:  # the model may add those before the first cut itself
            return take_out(run, named, cuts[0])
        raise ValueError(
            f"prune: expected {num_visual} visual tokens in a model that adds features to "
            f"them between its layers, got features of {sorted(num_marked)}, with cuts at "
            f"{list(cuts)}. Leave visual_mask out, or move the first cut to layer "
            f"{max(features)} or later."
        )
    return left, Late(run.apart(marked, 0, pad=0), features)


def add(run: Pass, late: Late, number: int, layer: int, hidden: Tensor) -> Tensor:
    """What enters a layer (B, N, D), with the features that are added there.

    Args:
        run: The pass.
        late: What was taken out of the model's hands.
        number: Level of the hidden states.
        layer: The layer's number.
        hidden: (B, N, D), what would enter it.
    """
    if layer not in late.features:
        return hidden
    device = hidden.device
    plan, first, level = run.plan_on(device), run.at(0, device), run.at(number, device)
    assert first.visual is not None
    marked_GT = to_device(late.marked, device)
    rank_GT = marked_GT.flatten().cumsum(0).view_as(marked_GT) - 1
    rank_GV = take(rank_GT, first.visual).clamp_min(0)  # pads have that of some column
    values = to_device(late.features[layer], device).to(hidden.dtype)[rank_GV]
    for earlier in range(1, number + 1):
        values = run.at(earlier, device).follow(values)
    own = run.apart(hidden, number)
    made = run.together(level.put(own, take(own, level.seats()) + values, plan), number)
    if run.rows.packing is None or (real := run.layout(number, device).real) is None:
        return made
    return made.where(real[..., None], hidden)  # pads stay what they were
