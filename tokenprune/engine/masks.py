"""Attention masks in the form that each attention implementation reads.

Shape suffixes: B batch rows, Q query rows, K keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def padding(mask: Any, cache: Any, known: bool) -> Tensor | None:
    """Which tokens of the conversation are real, (B, columns), as far as a mask tells.

    A 2-D mask says it. For a cache of fixed size `generate` hands a 4-D one that it has made of it,
    or one per kind of layer: there the last row sees every real token. Once it is `known` what the
    cache holds, there is no more to learn from it.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    fixed = getattr(cache, "is_compileable", False)
    if not fixed or known or not isinstance(mask, Tensor):
        return None
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last == 0


def dense(mask: Any, num_rows: int) -> Tensor | None:
    """A given mask as a tensor (B, 1|H, Q, K), bool or additive; None if it is none."""
    if isinstance(mask, Tensor):
        return mask.expand(num_rows, -1, -1, -1) if mask.dim() == 4 else None
    if mask is None or not hasattr(mask, "mask_mod"):
        return None
    from torch.nn.attention.flex_attention import create_mask

    num_queries, num_keys = mask.seq_lengths
    device = mask.kv_num_blocks.device
    allowed = create_mask(mask.mask_mod, num_rows, 1, num_queries, num_keys, device=device)
    return allowed.bool()


def form(allowed: Tensor, attention: str, dtype: torch.dtype, num_keys: int) -> Any:
    """A mask (B, 1, Q, K), bool or additive, as `attention` reads it.

    Args:
        allowed: Bool (True may be attended to) or additive.
        attention: `"eager"`, `"sdpa"` or `"flex_attention"`.
        dtype: Of an additive mask.
        num_keys: Keys that the layer shows, if more than K: those after are not filled yet.
    """
    low = torch.finfo(dtype).min
    if attention != "flex_attention" and attention != "sdpa" and allowed.dtype == torch.bool:
        allowed = torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, low)
    missing = num_keys - allowed.shape[-1]
    if missing > 0:
        value = False if allowed.dtype == torch.bool else low
        allowed = nn.functional.pad(allowed, (0, missing), value=value)
    if attention != "flex_attention":
        return allowed
    from torch.nn.attention.flex_attention import create_block_mask

    num_rows, _, num_queries, num_keys = allowed.shape

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed[row, 0, query, key]

    return create_block_mask(
        may_attend, num_rows, None, num_queries, num_keys, device=str(allowed.device)
    )
