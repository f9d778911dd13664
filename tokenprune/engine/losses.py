"""Labels: the model's own loss is handed tensors that are filled when the survivors are known.

Shape suffixes: B batch rows, T positions of a call, N positions at a level.
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


def fill_labels(run: Pass, output: Any) -> Any:
    """Keeps the promise of `promise_labels`; `"supervised"` drops rows without a label."""
    level = run.levels[-1]
    labels = run.call.inputs["labels"].to(output.last_hidden_state.device)
    shifted = run.call.inputs.get("shift_labels")
    if shifted is None:
        shifted = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    if level.columns is not None:
        columns = level.columns.to(labels.device)
        # What a survivor predicts stands, shifted, just before the next survivor.
        ends = torch.full_like(columns[:, :1], labels.shape[1])
        before_next = torch.cat([columns[:, 1:], ends], 1) - 1
        if level.real is not None:
            real = level.real.to(labels.device)
            followed = nn.functional.pad(real, (0, 1), value=True)[:, 1:]
            before_next = torch.where(followed, before_next, columns).clamp_min(0)
        labels, shifted = take(labels, columns), take(shifted.to(labels.device), before_next)
        if level.real is not None:
            labels = labels.masked_fill(~real, IGNORED)
            shifted = shifted.masked_fill(~real, IGNORED)
    if run.settings.supervised:
        hidden = output.last_hidden_state
        chosen = (shifted != IGNORED).flatten().nonzero()[:, 0]
        if len(chosen) == 0:  # the loss of nothing is the model's own affair
            chosen = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        output.last_hidden_state = hidden.flatten(0, 1)[chosen][None]
        labels = shifted = shifted.flatten()[chosen][None]
    for tensor, is_shifted in run.call.late_labels:
        tensor.data = (shifted if is_shifted else labels).to(tensor.device).contiguous()
    return output
