"""The unmodified model as what a pruned one is judged by: tokens hidden in its layers' own masks.

Shape suffixes: B batch rows, T positions of the prompt, Q query rows, K keys, D hidden size, L
decoder layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.families.anatomy import examine

HALVES = (torch.float16, torch.bfloat16)
#: Attention implementations that read a mask over pairs of tokens, which all other masks can be.
_OVER_PAIRS = ("eager", "sdpa")
#: How much more memory float32 weights may take than the half that they were, before it is tried:
#: what a call takes besides comes on top.
_HEADROOM = 1.25


@contextmanager
def hidden(model: nn.Module, hidden_LT: Tensor, noise: float = 0.0) -> Iterator[None]:
    """Inside its `with`, layers do not see the hidden tokens, and attend else as they always do.

    Each starts from the mask that the model hands to it, so that images which see themselves, and
    windows, stay as they are. Layers whose attention reads no mask over pairs of tokens attend by
    sdpa meanwhile.

    Args:
        model: Called with one row without pads.
        hidden_LT: Tokens of the prompt that each layer is not to see, bool (L, T).
        noise: Share by which every number that enters a layer is moved, up or down by chance, the
            same every time: 0 for not at all.
    """
    anatomy = examine(model)
    config: Any = anatomy.decoder.config
    attention = config._attn_implementation
    replaced = None if attention in _OVER_PAIRS else "sdpa"
    generator = torch.Generator().manual_seed(0)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        config._attn_implementation_internal = attention

    hooks = []
    for index, layer in enumerate(anatomy.layers):
        narrow = _narrow(layer, index, hidden_LT[index])

        def before(
            module: nn.Module,
            args: Any,
            kwargs: dict[str, Any],
            narrow: Callable[..., dict[str, Any]] = narrow,
        ) -> Any:
            named = narrow(args, kwargs)
            if noise:
                named["hidden_states"] = _moved(named["hidden_states"], noise, generator)
            if replaced is not None:
                config._attn_implementation_internal = replaced
            return (), named

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        if replaced is not None:  # the model asks its config for the form of the next mask
            hooks.append(layer.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _narrow(layer: Any, index: int, hidden_T: Tensor) -> Callable[..., dict[str, Any]]:
    """Gives a layer's arguments by name, with a mask that hides tokens, whatever its form was."""
    parameters = inspect.signature(layer.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def narrow(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        named = dict(zip(names, args, strict=False)) | kwargs
        hidden_BQD = named["hidden_states"]
        device, dtype = hidden_BQD.device, hidden_BQD.dtype
        cache = named.get("past_key_values")
        offset = int(cache.get_seq_length(index)) if cache is not None else 0
        total = offset + hidden_BQD.shape[1]
        columns_K = torch.arange(total, device=device)
        rows_Q1 = columns_K[offset:, None]
        given: Any = named.get("attention_mask")
        if hasattr(given, "mask_mod"):  # of flex attention
            given = given.mask_mod(0, 0, rows_Q1, columns_K)[None, None]
        elif not isinstance(given, Tensor) or given.dim() != 4:
            given = (columns_K <= rows_Q1)[None, None]
        given = given.to(device)[..., :total]
        low = torch.finfo(dtype).min
        if given.dtype == torch.bool:
            given = torch.zeros(given.shape, dtype=dtype, device=device).masked_fill(~given, low)
        gone_K = nn.functional.pad(hidden_T.to(device), (0, max(0, total - len(hidden_T))))[:total]
        # A hidden token still sees itself: an empty row would be NaN and spread.
        gone_QK = gone_K & (columns_K != rows_Q1)
        return named | {"attention_mask": given.masked_fill(gone_QK, low)}

    return narrow


def _moved(hidden_BQD: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    signs = 2 * torch.randint(0, 2, hidden_BQD.shape, generator=generator) - 1
    return hidden_BQD + hidden_BQD * (noise * signs).to(hidden_BQD)


# ------------------------------------------------------------------------------- float32 weights


def why_not_float32(model: Any) -> str | None:
    """Why a model's weights cannot be float32 for a while; None if they can."""
    if "flash" in examine(model).attention:
        return "flash attention has no float32. Set model.attention=sdpa for a check without noise"
    tensors = [*model.parameters(), *model.buffers()]
    if getattr(model, "hf_quantizer", None) is not None:
        return "its weights are quantized"
    needed: dict[torch.device, int] = {}
    for tensor in {id(own): own for own in tensors}.values():
        if tensor.device.type == "meta":
            return "its weights are not all in memory"
        if tensor.dtype in HALVES:
            needed[tensor.device] = needed.get(tensor.device, 0) + tensor.nbytes
    for device, size in needed.items():
        free = _free_bytes(device)
        if free is not None and free < _HEADROOM * size:
            return (
                f"that takes {_HEADROOM * size / 2**30:.1f} GiB more on {device}, and "
                f"{free / 2**30:.1f} are free"
            )
    return None


def _free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had; None where nobody says."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":", 1) for line in file)
        return 1024 * int(sizes["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None


@contextmanager
def float32(model: nn.Module) -> Iterator[None]:
    """Inside its `with`, what a model holds in half precision is float32; no bit is lost."""
    halves = [own for own in (*model.parameters(), *model.buffers()) if own.dtype in HALVES]
    dtypes = [own.dtype for own in halves]
    try:
        for own in halves:
            own.data = own.data.float()
        yield
    finally:
        for own, dtype in zip(halves, dtypes, strict=True):
            own.data = own.data.to(dtype)
