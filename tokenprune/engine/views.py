"""What a strategy sees at a cut.

Shape suffixes: B batch rows, V visual tokens alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine import chance
from tokenprune.engine.passes import Pass
from tokenprune.families.anatomy import device_of, final_norm
from tokenprune.strategy import (
    BESIDE,
    Change,
    DecoderKeys,
    DecoderRows,
    Entered,
    HasPatches,
    Need,
    Normed,
    Projected,
    PruningStrategy,
    Question,
    RandomNumbers,
    Text,
    TextView,
    Tiles,
    TileShape,
    TokensAndText,
    TokenView,
    Videos,
    VisionNeed,
    VisionRows,
    vision_needs,
)
from tokenprune.tensors import take, to_device


def make_view(
    run: Pass,
    number: int,
    device: torch.device,
    hidden: Tensor | None,
    heard: Mapping[Need, Any],
) -> TokenView:
    """What the strategy sees at cut `number`.

    Args:
        run: The pass.
        number: The cut's.
        device: Where it chooses.
        hidden: (B, N, D), what enters the layer after the cut; None for one that is blind.
        heard: What layers answered to each request that the strategy declared: attention
            (B, H, V), keys of visual tokens and of text, or what had entered it (B, V, D).
    """
    layer, strategy = run.settings.cuts[number - 1], run.settings.strategies[number - 1]
    level, plan = run.at(number - 1, device), run.plan_on(device)
    visual_BV = level.visual
    assert visual_BV is not None

    def content(what: str) -> Tensor:
        if hidden is None:
            raise ValueError(
                f"{type(strategy).__name__}: expected a strategy with blind = True to look at no "
                f"content, got one that reads {what}. Set blind to False."
            )
        return hidden

    def signal(need: Need) -> Any:
        declared = run.settings.declared[number - 1]
        if need not in declared and not (need in BESIDE and vision_needs(strategy)):
            raise ValueError(
                f"{type(strategy).__name__}: expected what is declared in needs(), "
                f"{list(declared)}, got {need}. Declare it there."
            )
        if isinstance(need, DecoderRows):
            return heard[need]
        if isinstance(need, VisionNeed):
            return _vision(run, number, need, device)
        if isinstance(need, RandomNumbers):
            known = plan.random.get((number - 1, need))
            if known is None:  # an earlier cut has left as many as it pleased
                drawn = chance.draw(run.rows, level.num_visual, need.seed, layer)
                known = torch.from_numpy(drawn).to(device)
            return known
        if isinstance(need, DecoderKeys):
            return TokensAndText(*heard[need])
        if isinstance(need, Change):
            entering: Tensor = take(content("hidden states"), level.seats()).detach()
            return entering.float() - heard[need].float()
        if isinstance(need, Question):
            return _question(run, strategy)
        if isinstance(need, Normed):
            return _normed(run, number, content("hidden states"))
        if isinstance(need, Videos):
            return _seated(run, number, run.videos_on(device))
        makers = {Projected(): _projected, Entered(): _entered, Text(): _text}
        return makers[need](run, number, device)

    def positions() -> Tensor:
        content("positions")
        return _positions(run, visual_BV)

    def places() -> Tensor:
        number_BV = level.numbers(run.at(0, device))()
        return take(run.places_on(device), number_BV)

    return TokenView(
        layer=layer,
        num_layers=len(run.settings.anatomy.layers),
        num_original=plan.counts[0],
        max_keep=max(map(min, level.num_visual, run.budgets[number - 1])),
        ragged=level.ragged,
        _valid=lambda: level.valid(plan),
        _positions=positions,
        _hidden=lambda: take(content("hidden states"), level.seats()).detach(),
        _places=places,
        _signal=signal,
    )


def _entered(run: Pass, number: int, device: torch.device) -> Tensor:
    """What entered the decoder, of the visual tokens of the call, (B, U, D)."""
    first = run.at(0, device).visual
    assert run.embeddings is not None
    assert first is not None
    return take(to_device(run.embeddings, device), first)


def _projected(run: Pass, number: int, device: torch.device) -> Tensor:
    """What entered the decoder, of the visual tokens alive before a cut, (B, V, D)."""
    values, plan = _entered(run, number, device), run.plan_on(device)
    for earlier in range(1, number):
        values = run.at(earlier, device).states(values, plan)
    return values


def _normed(run: Pass, number: int, hidden: Tensor) -> TokensAndText:
    """What enters the layer after a cut, as the model's last norm would leave it."""
    device = hidden.device
    level, plan = run.at(number - 1, device), run.plan_on(device)
    norm = final_norm(run.settings.anatomy.decoder)
    assert norm is not None
    assert plan.prompt is not None
    text_BS = level.find(plan.prompt).clamp(0, level.length - 1)
    place = device_of(norm, hidden)

    def normed(seats: Tensor) -> Tensor:
        made: Tensor = norm(take(hidden, seats).detach().to(place))
        return made.to(device)

    return TokensAndText(normed(level.seats()), normed(text_BS))


def _vision(run: Pass, number: int, need: VisionNeed, device: torch.device) -> Any:
    """What the vision tower says of the visual tokens alive before a cut."""
    plan = run.plan_on(device)
    assert run.seen is not None
    assert plan.seen is not None
    assert plan.tiles is not None
    most, length = run.seen.tile_shape
    alive = max(run.levels[number - 1].num_visual)
    if need == TileShape():
        return min(most, alive), length
    if need == Tiles():
        tiles = _seated(run, number, plan.tiles)
        return tiles if most <= alive else _dense(tiles)  # or a number would be beyond all tokens
    if need == HasPatches():
        return _alive(run, number, plan.tiles[..., None] >= 0)[..., 0]
    signal = _alive(run, number, run.seen.signal(need, plan.seen))
    return signal.transpose(1, 2) if isinstance(need, VisionRows) else signal


def _dense(tiles_BV: Tensor) -> Tensor:
    """Tiles numbered anew among those of which tokens are left; -1 stays."""
    sorted_BV, order_BV = tiles_BV.sort(dim=1, stable=True)
    new_BV = sorted_BV >= 0
    new_BV[:, 1:] &= sorted_BV[:, 1:] != sorted_BV[:, :-1]
    return torch.empty_like(tiles_BV).scatter(1, order_BV, new_BV.long().cumsum(1) - 1)


def _seated(run: Pass, number: int, values: Tensor) -> Tensor:
    """What cannot be mixed of a call's visual tokens (B, V), of the seats alive before a cut."""
    for earlier in range(1, number):
        chosen = run.at(earlier, values.device).chosen
        values = values if chosen is None else take(values, chosen)
    return values


def _alive(run: Pass, number: int, values: Tensor) -> Tensor:
    """What is known of a call's visual tokens (B, V, ...), of those alive before a cut."""
    for earlier in range(1, number):
        values = run.at(earlier, values.device).follow(values)
    return values


def _text(run: Pass, number: int, device: torch.device) -> TextView:
    """The prompt's text as it entered the decoder."""
    plan = run.plan_on(device)
    assert run.embeddings is not None
    assert plan.prompt is not None
    assert plan.num_prompt is not None
    assert plan.num_follow is not None
    order_S = torch.arange(plan.prompt.shape[1], device=device)
    valid_BS = order_S < plan.num_prompt
    return TextView(
        embeddings=take(to_device(run.embeddings, device), plan.prompt),
        valid=valid_BS,
        follows=valid_BS & (order_S >= plan.num_prompt - plan.num_follow),
        positions=_positions(run, plan.prompt),
    )


def _question(run: Pass, strategy: PruningStrategy) -> tuple[tuple[int, ...], ...]:
    """Of each row the ids of the prompt's text after the last image, or all of them."""
    rows = run.rows
    assert rows.prompt is not None
    if rows.ids is None:
        raise ValueError(
            f"{type(strategy).__name__}: expected input_ids, for a strategy that reads the "
            "question's words, got inputs_embeds alone. Pass input_ids beside them, or choose "
            "another strategy."
        )
    asked = []
    for ids, prompt, count in zip(rows.ids, rows.prompt, rows.num_follow, strict=True):
        words = ids[prompt].tolist()
        asked.append(tuple(words[len(words) - count :] if count else words))
    return tuple(asked)


def _positions(run: Pass, columns: Tensor) -> Tensor:
    """Positions of some columns, int64 (B, N), counted from the row's first token.

    Qwen3-Omni counts in floats.
    """
    assert run.positions is not None
    known = to_device(run.positions, columns.device)
    return (take(known, columns) - _start(run, known)).long()


def _start(run: Pass, positions_BT: Tensor) -> Tensor | int:
    """Position of each row's first token, int64 (B, 1): pads may have been counted before it."""
    if run.record is not None:
        return 0
    real_BT = run.at(0, positions_BT.device).real
    if real_BT is None:
        return positions_BT[:, :1]
    return positions_BT.masked_fill(~real_BT, positions_BT.max()).amin(1, keepdim=True)
