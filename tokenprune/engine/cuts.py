"""A cut: the strategy is shown the visual tokens alive and marks those that stay.

Shape suffixes: B batch rows, V visual tokens alive.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine import side
from tokenprune.engine.attention import hear
from tokenprune.engine.levels import Level
from tokenprune.engine.passes import Asked, Pass
from tokenprune.engine.trace import TracedStage
from tokenprune.engine.upload import HOST
from tokenprune.engine.views import make_view
from tokenprune.strategy import BeforeProjector, PruningStrategy, ScoreStrategy, Selection
from tokenprune.strategy.base import check_scores
from tokenprune.tensors import ascending, single_precision, take, to_device


def begin(run: Pass, device: torch.device) -> None:
    """Brings to the device of the first layer what is known before it runs."""
    if run.prunes:
        _cut_blindly(run, 1, device)
    run.bring(0, device)


def _cut_blindly(run: Pass, number: int, device: torch.device) -> None:
    """Adds the levels after the cuts from `number` on whose strategies look at no content.

    Their choices are made on the host, where all that they look at is, and cost the device nothing.
    """
    strategies = run.settings.strategies
    while number <= len(strategies) and strategies[number - 1].blind:
        _cut(run, number, HOST, device, None, {})
        number += 1


def cut(run: Pass, number: int, module: nn.Module, hidden: Tensor, named: dict[str, Any]) -> None:
    """Adds the level after cut `number`: asks the strategy, keeps what it chose.

    Args:
        run: The pass.
        number: The cut's, from 1.
        module: The layer before which it happens.
        hidden: (B, N, D), what would enter the layer.
        named: Its other arguments, for the whole call.
    """
    device, requests = hidden.device, run.settings.requests[number - 1]
    if run.settings.strategies[number - 1].blind:
        _cut_blindly(run, number, device)
        run.bring(number, device)
        return
    layer, heard = run.settings.cuts[number - 1], {}
    if any(run.levels[number - 1].num_visual):
        late = [request for request in requests if request.source == "next"]
        if late:
            listen(run, number - 1, module, hidden, named, late, layer, layer)
        heard = {need: to_device(run.heard.pop((layer, need)), device) for need in requests}
    own = run.apart(hidden.detach(), number - 1)
    _cut(run, number, device, device, own, heard)


def _cut(
    run: Pass,
    number: int,
    device: torch.device,
    home: torch.device,
    hidden: Tensor | None,
    heard: dict[Any, Any],
) -> None:
    """Adds the level after a cut.

    Args:
        run: The pass.
        number: The cut's, from 1.
        device: Where it is chosen.
        home: Where its trace is.
        hidden: (B, N, D), what would enter the layer, sequences apart; None ahead of it.
        heard: What layers answered to each request of the strategy.
    """
    layer, strategy = run.settings.cuts[number - 1], run.settings.strategies[number - 1]
    level, plan = run.at(number - 1, device), run.plan_on(device)
    if any(level.num_visual):
        view = make_view(run, number, device, hidden, heard)
        with torch.no_grad(), single_precision(device):
            selection = strategy.select(view, plan.counts[number])
    else:  # there is nothing to choose from
        none = torch.zeros(len(level.num_visual), 0, device=device)
        selection = Selection(none.bool(), none if isinstance(strategy, ScoreStrategy) else None)
    kept_BV, num_kept, counts_B1 = _checked(run, number, selection, level)
    weights_BKV = _mixture(run, strategy, selection, num_kept, counts_B1, level)
    after = level.after(kept_BV, num_kept, counts_B1, plan)
    after.weights = weights_BKV
    if weights_BKV is not None and selection.space == "vision":
        after.source, after.project = _before_projector(run, strategy, device)
    run.levels.append(after)
    seen = [0] * len(num_kept) if run.record is None else run.record.num_visual
    run.stages.append(  # it must keep alive neither the model nor the call
        partial(
            _traced,
            type(strategy).__name__,
            layer,
            home,
            kept_BV,
            num_kept,
            level.numbers(run.at(0, device)),
            seen,
            selection.scores,
            weights_BKV,
            level.num_visual,
        )
    )


def listen(
    run: Pass,
    number: int,
    module: nn.Module,
    hidden: Tensor,
    named: dict[str, Any],
    requests: list[Any],
    layer: int,
    cut_layer: int,
) -> None:
    """Computes what a cut's strategy asks of a layer that runs on level `number`."""
    own = side.follow(run, number, module, hidden, named)
    asked = Asked(layer, module, hidden, own, named.get("attention_mask"))
    with torch.no_grad():
        asked = side.asked_apart(run, number, asked)
        for request in requests:
            run.heard[cut_layer, request] = hear(run, number, asked, request)


def _checked(
    run: Pass, number: int, selection: Selection, level: Level
) -> tuple[Tensor, list[int], Tensor]:
    """The survivors that a strategy chose, and how many per row, here and on the device."""
    strategy, budget = run.settings.strategies[number - 1], run.budgets[number - 1]
    if not isinstance(selection, Selection):
        raise ValueError(
            f"{type(strategy).__name__}.select: expected a Selection, got a "
            f"{type(selection).__name__}. Return Selection(kept=mask)."
        )
    kept = selection.kept
    expected = (len(level.num_visual), max(level.num_visual))
    if selection.scores is not None:
        check_scores(strategy, selection.scores, expected)
    if kept.dtype != torch.bool or kept.shape != expected:
        raise ValueError(
            f"{type(strategy).__name__}.select: expected a bool mask of shape "
            f"{expected}, got {kept.dtype} of shape {tuple(kept.shape)}. "
            "Return Selection(kept=mask)."
        )
    most = [min(alive, keep) for alive, keep in zip(level.num_visual, budget, strict=True)]
    plan = run.plan_on(kept.device)
    if strategy.keeps_exactly:
        counts_B1 = plan.counts[number][:, None]
        if most != budget:  # an earlier cut has left fewer
            assert level.counts is not None
            counts_B1 = torch.minimum(level.counts, counts_B1)
        return kept, most, counts_B1
    if level.ragged:
        kept = kept & level.valid(plan)
    counts_B1 = kept.sum(1, keepdim=True)
    counts: list[int] = counts_B1[:, 0].tolist()
    if any(count > keep for count, keep in zip(counts, most, strict=True)):
        raise ValueError(
            f"{type(strategy).__name__}.select: expected at most {most} "
            f"tokens per row, got {counts}. Respect `keep`."
        )
    return kept, counts, counts_B1


def _mixture(
    run: Pass,
    strategy: PruningStrategy,
    selection: Selection,
    num_kept: list[int],
    counts_B1: Tensor,
    level: Level,
) -> Tensor | None:
    """How the survivors are mixed, (B, K, V), from tokens that exist alone; None if they are not.

    A row that loses nothing is mixed, too, but one whose labels keep it whole.
    """
    weights = selection.weights
    if weights is None:
        return None
    most = max(num_kept)
    expected = (len(num_kept), most, max(level.num_visual))
    given = weights[:, :most] if weights.dim() == 3 else weights
    if not weights.is_floating_point() or given.shape != expected:
        raise ValueError(
            f"{type(strategy).__name__}.select: expected float weights of shape {expected}, got "
            f"{weights.dtype} of shape {tuple(weights.shape)}. Give each survivor a row."
        )
    plan = run.plan_on(given.device)
    if level.ragged:
        given = given.masked_fill(~level.valid(plan)[:, None], 0)
    if min(num_kept) < most:  # what stands there may be anything, and would reach gradients
        given = given.masked_fill(plan.order[:most, None] >= counts_B1[..., None], 0)
    if run.rows.mute:
        itself = torch.eye(most, expected[2], device=given.device, dtype=given.dtype)
        given = torch.where(plan.num_asking[..., None] == 0, itself, given)
    return given


def _before_projector(
    run: Pass, strategy: PruningStrategy, device: torch.device
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the projector was given of the call's visual tokens (B, V, C), and the projector."""
    if BeforeProjector() not in strategy.needs():
        raise ValueError(
            f"{type(strategy).__name__}.select: expected BeforeProjector() in needs() for "
            'space="vision", got none. Declare it there.'
        )
    parts, plan = run.settings.anatomy.vision, run.plan_on(device)
    assert parts is not None
    assert parts.projector is not None
    assert run.seen is not None
    assert plan.seen is not None
    return run.seen.given(plan.seen), parts.projector


def _traced(
    name: str,
    layer: int,
    device: torch.device,
    kept_BV: Tensor,
    num_kept: list[int],
    numbers: Callable[[], Tensor],
    seen: list[int],
    scores_BV: Tensor | None,
    weights_BKV: Tensor | None,
    num_visual: list[int],
) -> TracedStage:
    """The trace of a cut, for people.

    Args:
        name: The class of the strategy.
        layer: The cut's.
        device: Where its tensors are to be.
        kept_BV: What the strategy marked.
        num_kept: How many per row.
        numbers: Makes the tokens' numbers within the call.
        seen: Visual tokens of each row before the call.
        scores_BV: The strategy's scores, or None.
        weights_BKV: How the survivors were mixed, or None.
        num_visual: Visual tokens alive before the cut, per row.
    """
    kept = take(numbers(), ascending(kept_BV, max(num_kept))).to(device)
    rows = zip(kept, num_kept, seen, strict=True)
    scores = None
    if scores_BV is not None:
        counts = zip(scores_BV.to(device), num_visual, strict=True)
        scores = [row[:count] for row, count in counts]
        if any(len(row) and row.isnan().all() for row in scores):  # asks the device, late
            warnings.warn(
                f"{name}.score: expected numbers, got NaN for all tokens of a row before layer "
                f"{layer}, which keeps the first ones. Look for a division by zero, or scores in "
                "half precision.",
                UserWarning,
                stacklevel=2,
            )
    return TracedStage(
        layer=layer,
        kept=[row[:count] + before for row, count, before in rows],
        scores=scores,
        weights=None
        if weights_BKV is None
        else [
            row[:left, :count]
            for row, left, count in zip(weights_BKV, num_kept, num_visual, strict=True)
        ],
    )
