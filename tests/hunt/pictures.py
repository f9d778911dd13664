"""The models that have conversations, their images, and what the vision tower says of those."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from models import SEED, build
from torch import Tensor

import tokenprune as tp
from hunt.witness import TOWER


@functools.cache
def model_of(family: str, attention: str) -> Any:
    if not attention.startswith("flash"):
        return build(family, attention)
    model = build(family, "eager")  # a stand-in, which no check of transformers knows
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = attention
    return model


@functools.cache
def assistant(family: str, kind: str) -> Any:
    """A model that guesses what another says: `"same"`, `"other"` weights, or a `"llama"`."""
    return build("llama" if kind == "llama" else family, seed=SEED + (kind != "same"))


@dataclass
class Picture:
    """An image, and what the decoder is given for it.

    Attributes:
        pixels: (1, 3, 32, 32), or (1, tiles, 3, 32, 32).
        features: (V, D).
        given: (V, C), what the projector is given of each token; NaN for newlines.
        patch: int64 (V,), the tower's patch of each token, tile after tile; -1 for newlines.
    """

    pixels: Tensor
    features: Tensor
    given: Tensor
    patch: Tensor


@functools.cache
def picture(family: str, seed: int, size: tuple[int, int]) -> Picture:
    model = model_of(family, "eager")
    own = torch.Generator().manual_seed(seed)
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    if family == "llava":
        pixels = torch.randn(1, 3, 32, 32, generator=own)
        more: dict[str, Tensor] = {}
    else:
        num_tiles = 1 + (4 if size == (64, 64) else 2)
        pixels = torch.randn(1, num_tiles, 3, 32, 32, generator=own)
        more = {"image_sizes": torch.tensor([size])}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        features = model.get_image_features(pixels, **more).pooler_output[0]
        hook.remove()
        (given,) = seen
        patch = torch.arange(given.shape[0] * given.shape[1]).view(*given.shape[:2], 1)
        if family == "llava":
            return Picture(pixels, features, given[0], patch.flatten())
        placed = [
            model.model.pack_image_features(
                [values], more["image_sizes"], "default", image_newline=newline
            )[0][0]
            for values, newline in (
                (given, torch.full(given.shape[2:], torch.nan)),
                (patch.float(), torch.tensor([-1.0])),
            )
        ]
    return Picture(pixels, features, placed[0], placed[1][:, 0].long())


@functools.cache
def signals(family: str, seed: int, size: tuple[int, int]) -> dict[Any, Tensor]:
    """What the tower, run eager, says of an image's tokens, by need; zeros for newlines."""
    model, image = model_of(family, "eager"), picture(family, seed, size)
    layers = [m for m in model.modules() if type(m).__name__ == "CLIPEncoderLayer"]
    heard: dict[tuple[int, str], Tensor] = {}
    hooks = []
    for number, layer in enumerate(layers):
        for what, module in (
            ("keys", layer.self_attn.k_proj),
            ("queries", layer.self_attn.q_proj),
            ("hidden", layer),
        ):

            def note(module: Any, args: Any, output: Any, key: Any = (number, what)) -> None:
                heard[key] = output[0] if isinstance(output, tuple) else output

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        model.model.vision_tower(image.pixels.view(-1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    found: dict[Any, Tensor] = {}
    for need in TOWER:
        number = need.layer % len(layers)
        if isinstance(need, tp.VisionStates):
            values = heard[number, need.what][:, 1:].flatten(0, 1)
        else:
            heads = 1 if need.heads == "one" else layers[number].self_attn.num_heads
            queries, keys = (
                heard[number, what].unflatten(-1, (heads, -1)).transpose(1, 2)
                for what in ("queries", "keys")
            )
            weights = (queries @ keys.mT / keys.shape[-1] ** 0.5).softmax(-1)
            rows = weights[:, :, :1] if need.queries == "class" else weights[:, :, 1:]
            values = rows.mean(2)[:, :, 1:].transpose(1, 2).flatten(0, 1)
        taken = values[image.patch.clamp_min(0)]
        found[need] = taken.masked_fill((image.patch < 0)[:, None], 0)
    return found
