"""A cut: the strategy is shown the visual tokens alive and marks those that stay.

Shape suffixes: B batch rows, V visual tokens alive.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine import side
from tokenprune.engine.attention import hear
from tokenprune.engine.levels import Level, Plan
from tokenprune.engine.passes import Asked, Pass
from tokenprune.engine.trace import TracedStage
from tokenprune.engine.upload import HOST
from tokenprune.engine.views import make_view
from tokenprune.strategy import (
    BeforeProjector,
    PruningStrategy,
    ScoreStrategy,
    Selection,
    TokenView,
)
from tokenprune.strategy.base import check_scores
from tokenprune.tensors import ascending, best, no_grad, single_precision, take, to_device

#: What chooses the highest scores, unless a strategy, or whoever watches it, has its own way.
_HIGHEST = ScoreStrategy.select


@dataclass(frozen=True, eq=False)
class _Choice:
    """What a strategy chose at a cut.

    Attributes:
        index: int64 (B, K), the survivors among the tokens alive, ascending, then pads.
        num_kept: How many survive, per row.
        counts: The same on the device, int64 (B, 1).
        scores: float32 (B, V), the strategy's scores, or None.
        weights: (B, K, V), how the survivors are mixed, or None.
        space: Where they are mixed.
    """

    index: Tensor
    num_kept: list[int]
    counts: Tensor
    scores: Tensor | None
    weights: Tensor | None = None
    space: str = "decoder"


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
    view = make_view(run, number, device, hidden, heard)
    choice = _choose(run, number, level, plan, view)
    after = level.after(choice.index, choice.num_kept, choice.counts, plan)
    after.weights = choice.weights
    if choice.weights is not None and choice.space == "vision":
        after.source, after.project = _before_projector(run, strategy, device)
    run.levels.append(after)
    seen = [0] * len(choice.num_kept) if run.record is None else run.record.num_visual
    name, numbers = type(strategy).__name__, level.numbers(run.at(0, device))
    # It must keep alive neither the model nor the call.
    made = partial(_traced, name, layer, home, choice, numbers, seen, level.num_visual)
    run.stages.append(made)


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
    with no_grad():
        asked = side.asked_apart(run, number, asked)
        for request in requests:
            run.heard[cut_layer, request] = hear(run, number, asked, request)


def _choose(run: Pass, number: int, level: Level, plan: Plan, view: TokenView) -> _Choice:
    """What the strategy of a cut chooses, checked.

    Args:
        run: The pass.
        number: The cut's, from 1.
        level: The level before it.
        plan: The pass's, where it is chosen.
        view: What the strategy sees.
    """
    strategy, budget = run.settings.strategies[number - 1], run.budgets[number - 1]
    num_kept = list(map(min, level.num_visual, budget))
    expected = len(num_kept), max(level.num_visual)
    counts_B1, device = plan.counts[number, :, None], plan.order.device
    if num_kept != budget:  # an earlier cut has left fewer
        assert level.counts is not None
        counts_B1 = torch.minimum(level.counts, counts_B1)
    if not any(level.num_visual):  # there is nothing to choose from
        none = torch.zeros(expected, device=device)
        scores = none if isinstance(strategy, ScoreStrategy) else None
        return _Choice(none.long(), num_kept, counts_B1, scores)
    with no_grad(), single_precision(device):
        # As it would itself, but that nothing is marked and the marks are looked for.
        if isinstance(strategy, ScoreStrategy) and _ranks(strategy) and len(set(num_kept)) == 1:
            scores = strategy.score(view)
            check_scores(strategy, scores, expected)
            scores = scores.float()
            chosen = best(scores, view.valid if view.ragged else None, num_kept[0])
            return _Choice(chosen, num_kept, counts_B1, scores)
        selection = strategy.select(view, plan.counts[number])
    _check(strategy, selection, expected)
    kept = selection.kept
    if not strategy.keeps_exactly:
        kept = kept & level.valid(plan) if level.ragged else kept
        counts_B1, most = kept.sum(1, keepdim=True), num_kept
        num_kept = counts_B1[:, 0].tolist()
        if any(map(operator.gt, num_kept, most)):
            raise ValueError(
                f"{type(strategy).__name__}.select: expected at most {most} "
                f"tokens per row, got {num_kept}. Respect `keep`."
            )
    return _Choice(
        ascending(kept, max(num_kept)),
        num_kept,
        counts_B1,
        selection.scores,
        _mixture(run, strategy, selection, num_kept, counts_B1, level),
        selection.space,
    )


def _ranks(strategy: ScoreStrategy) -> bool:
    """Whether the highest scores are all there is to a choice."""
    return type(strategy).select is _HIGHEST and "select" not in vars(strategy)


def _check(strategy: PruningStrategy, selection: Any, expected: tuple[int, int]) -> None:
    """Refuses what is no selection of tokens (B, V)."""
    if not isinstance(selection, Selection):
        raise ValueError(
            f"{type(strategy).__name__}.select: expected a Selection, got a "
            f"{type(selection).__name__}. Return Selection(kept=mask)."
        )
    kept = selection.kept
    if selection.scores is not None:
        check_scores(strategy, selection.scores, expected)
    if kept.dtype != torch.bool or kept.shape != expected:
        raise ValueError(
            f"{type(strategy).__name__}.select: expected a bool mask of shape "
            f"{expected}, got {kept.dtype} of shape {tuple(kept.shape)}. "
            "Return Selection(kept=mask)."
        )


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
    choice: _Choice,
    numbers: Callable[[], Tensor],
    seen: list[int],
    num_visual: list[int],
) -> TracedStage:
    """The trace of a cut, for people.

    Args:
        name: The class of the strategy.
        layer: The cut's.
        device: Where its tensors are to be.
        choice: What the strategy chose.
        numbers: Makes the tokens' numbers within the call.
        seen: Visual tokens of each row before the call.
        num_visual: Visual tokens alive before the cut, per row.
    """
    kept = take(numbers(), choice.index).to(device)
    rows = zip(kept, choice.num_kept, seen, strict=True)
    scores, weights = None, None
    if choice.scores is not None:
        counts = zip(choice.scores.to(device), num_visual, strict=True)
        scores = [row[:count] for row, count in counts]
        if any(len(row) and row.isnan().all() for row in scores):  # asks the device, late
            warnings.warn(
                f"{name}.score: expected numbers, got NaN for all tokens of a row before layer "
                f"{layer}, which keeps the first ones. Look for a division by zero, or scores in "
                "half precision.",
                UserWarning,
                stacklevel=2,
            )
    if choice.weights is not None:
        mixed = zip(choice.weights, choice.num_kept, num_visual, strict=True)
        weights = [row[:left, :count] for row, left, count in mixed]
    return TracedStage(
        layer=layer,
        kept=[row[:count] + before for row, count, before in rows],
        scores=scores,
        weights=weights,
    )
