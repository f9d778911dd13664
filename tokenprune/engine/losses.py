"""Labels and logits: what the model's own loss and head are handed once the survivors are known.

Shape suffixes: B batch rows, T columns of a call, N positions at a level.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine.passes import Call, Pass
from tokenprune.engine.rows import IGNORED
from tokenprune.engine.settings import Settings
from tokenprune.tensors import take


def promise_labels(
    settings: Settings, call: Call, module: nn.Module, named: dict[str, Any], labels: Tensor
) -> None:
    """Hands the model's own loss label tensors that are filled when the survivors are known."""
    if settings.supervised and named.get("return_dict") is False:
        raise ValueError(
            'prune: expected return_dict=True with logits="supervised", got False. '
            "Leave return_dict out."
        )
    mask = named.get("attention_mask")
    if settings.asks_router(named) and isinstance(mask, Tensor) and mask.dim() == 2 and mask.all():
        named["attention_mask"] = None  # the router's terms would read it beside pruned logits
    named["labels"] = labels.clone()
    call.late_labels.append((named["labels"], False))
    computes_loss = hasattr(module, "loss_function")  # a wrapper around the model need not
    if (settings.supervised and computes_loss) or named.get("shift_labels") is not None:
        named["shift_labels"] = labels.clone()
        call.late_labels.append((named["shift_labels"], True))


def finish(run: Pass, output: Any) -> Any:
    """What the decoder gives its head, with the labels for it: the promise of `promise_labels`."""
    settings, last = run.settings, len(run.levels) - 1
    cut = run.levels[last].columns is not None
    if settings.full and cut:
        own = run.apart(output.last_hidden_state, last)
        output.last_hidden_state = run.together(_at_full_length(run, own), 0)
    if not run.call.late_labels:
        return output
    hidden = output.last_hidden_state
    if settings.supervised:
        hidden = run.apart(hidden, last)
    if settings.supervised and run.rows.targets is not None and run.plan is not None:
        output.last_hidden_state, learned = _learned(run, hidden)
        _keep_promise(run, learned, learned)
        return output
    labels, shifted = _labels(run, hidden.device)
    if cut and not settings.full:
        labels, shifted = _of_survivors(run, labels, shifted)
    stand = 0 if settings.full else last
    if run.rows.packing is not None:
        labels, shifted = _within(run, stand, labels, shifted)
    if settings.supervised:
        chosen = (shifted != IGNORED).flatten().nonzero()[:, 0]
        if len(chosen) == 0:  # the loss of nothing is the model's own affair
            chosen = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        output.last_hidden_state = hidden.flatten(0, 1)[chosen][None]
        labels = shifted = shifted.flatten()[chosen][None]
    else:
        labels, shifted = (run.together(each, stand, pad=IGNORED) for each in (labels, shifted))
    _keep_promise(run, labels, shifted)
    return output


def _keep_promise(run: Pass, labels: Tensor, shifted: Tensor) -> None:
    for tensor, is_shifted in run.call.late_labels:
        filled = shifted if is_shifted else labels
        tensor.data = filled.to(tensor.device).contiguous()


def _learned(run: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (1, M, D) that predict a label each, and these labels, (1, M).

    Which they are is known before the pass: the device is not waited for.
    """
    device = hidden.device
    level, plan = run.at(len(run.levels) - 1, device), run.plan_on(device)
    assert plan.targets is not None
    assert plan.learned is not None
    rows_B1 = torch.arange(len(plan.targets), device=device)[:, None]
    before_BL = level.find(plan.targets) - 1 + rows_B1 * level.length
    labels_BL = take(run.apart(run.call.inputs["labels"].to(device), 0), plan.targets)
    chosen = before_BL.flatten()[plan.learned]
    return hidden.flatten(0, 1)[chosen][None], labels_BL.flatten()[plan.learned][None]


def _labels(run: Pass, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels (B, T), and shifted to where they are predicted; what no survivor predicts is none."""
    labels = run.apart(run.call.inputs["labels"].to(device), 0, pad=IGNORED)
    shifted = run.call.inputs.get("shift_labels")
    if shifted is None:
        shifted = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    else:
        shifted = run.apart(shifted.to(device), 0, pad=IGNORED)
    if run.settings.full and run.levels[-1].columns is not None:
        alive = torch.zeros_like(labels, dtype=torch.bool).scatter(1, _known(run, device), True)
        predicted = alive & (alive.cumsum(1) > 1)  # nothing stands before a row's first survivor
        labels = labels.masked_fill(~predicted, IGNORED)
        followed = nn.functional.pad(predicted, (0, 1), value=True)[:, 1:]
        shifted = shifted.masked_fill(~followed, IGNORED)
    return labels, shifted


def _within(run: Pass, number: int, labels: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of sequences on a level, (G, n), without what would be predicted across their ends."""
    real = run.at(number, labels.device).real
    real = torch.ones_like(labels, dtype=torch.bool) if real is None else real
    preceded = real & nn.functional.pad(real, (1, 0))[:, :-1]
    inside = nn.functional.pad(real[:, :-1], (0, 1))  # they end in the last column
    return labels.masked_fill(~preceded, IGNORED), shifted.masked_fill(~inside, IGNORED)


def _known(run: Pass, device: torch.device) -> Tensor:
    """Columns of the survivors, int64 (B, N); pads repeat one of them."""
    level = run.at(len(run.levels) - 1, device)
    assert level.columns is not None
    if level.real is None:
        return level.columns
    some = level.columns.masked_fill(~level.real, -1).amax(1, keepdim=True).clamp_min(0)
    return torch.where(level.real, level.columns, some)


def _at_full_length(run: Pass, hidden: Tensor) -> Tensor:
    """Hidden states (B, T, D): a dropped token's column holds the survivor's before it.

    So that a label is predicted by the same survivor whether logits are full or not.
    """
    level = run.at(len(run.levels) - 1, hidden.device)
    assert level.columns is not None
    columns = level.columns
    length = run.levels[0].length
    if level.real is not None:
        columns = columns.masked_fill(~level.real, -1 if level.pads_left else length)
    every = torch.arange(length, device=hidden.device).expand(columns.shape[0], -1).contiguous()
    index = torch.searchsorted(columns, every, right=True) - 1
    return take(hidden, index.clamp_min(0))


def _of_survivors(run: Pass, labels: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of the survivors, (B, N), and shifted to the survivors that predict them."""
    level = run.at(len(run.levels) - 1, labels.device)
    columns, real = level.columns, level.real
    assert columns is not None
    # What a survivor predicts stands, shifted, just before the next survivor.
    ends = torch.full_like(columns[:, :1], labels.shape[1])
    before_next = torch.cat([columns[:, 1:], ends], 1) - 1
    if real is None:
        return take(labels, columns), take(shifted, before_next)
    followed = nn.functional.pad(real, (0, 1), value=True)[:, 1:]
    before_next = torch.where(followed, before_next, columns).clamp_min(0)
    preceded = real & nn.functional.pad(real, (1, 0))[:, :-1]  # no pad predicts a row's first
    return (
        take(labels, columns).masked_fill(~preceded, IGNORED),
        take(shifted, before_next).masked_fill(~real, IGNORED),
    )
