"""A stand-in for the flash-attention package: the same functions, in plain PyTorch, on a CPU.

What transformers does around the kernel (unpadding, detection of packed sequences) runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as flash


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """(B, T, H, E) queries, (B, K, G, E) keys and values; causal from the lower right corner."""
    length, total = q.shape[1], k.shape[1]
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    logits = torch.einsum("bthe,bkhe->bhtk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        logits = (logits / softcap).tanh() * softcap
    columns, rows = torch.arange(total), torch.arange(total - length, total)[:, None]
    if causal:
        logits = logits.masked_fill(columns > rows, -torch.inf)
    if window_size[0] >= 0:
        logits = logits.masked_fill(columns < rows - window_size[0], -torch.inf)
    return torch.einsum("bhtk,bkhe->bthe", logits.softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """The same for sequences end to end, (tokens, H, E)."""
    parts = []
    spans = zip(
        *(zip(c.tolist(), c.tolist()[1:], strict=False) for c in (cu_seqlens_q, cu_seqlens_k)),
        strict=True,
    )
    for (q0, q1), (k0, k1) in spans:
        one = (q[None, q0:q1], k[None, k0:k1], v[None, k0:k1])
        parts.append(
            flash_attn_func(
                *one,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                softcap=softcap,
            )[0]
        )
    return torch.cat(parts)


@contextmanager
def stand_in() -> Iterator[None]:
    """Inside, transformers takes the functions above for the package's."""
    names = [
        name for name in vars(flash) if name.startswith(("_flash", "_pad", "_unpad", "_process"))
    ]
    names = [*names, "_loaded_implementation", "_lazy_imports"]
    before = {name: getattr(flash, name) for name in names}

    def lazy_imports(*args: Any, **kwargs: Any) -> Any:
        functions = (flash_attn_func, flash_attn_varlen_func)
        return (*functions, None, before["_pad_input"], before["_unpad_input"])

    flash._lazy_imports = lazy_imports
    flash._loaded_implementation = None
    try:
        flash.lazy_import_flash_attention("flash_attention_2")
        yield
    finally:
        for name, value in before.items():
            setattr(flash, name, value)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Another attention implementation, unchecked, in all parts of a model."""
    configs = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
