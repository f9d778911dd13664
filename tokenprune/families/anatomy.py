"""Where the parts of a model are, and which models cannot be pruned.

Shape suffixes: B batch rows, T sequence positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.families.adapter import Adapter, adapter_of
from tokenprune.families.inputs import mark_visual
from tokenprune.families.tower import VisionParts, find_tower


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where the parts of one model are.

    Attributes:
        entries: Modules from the outermost to the one just above the decoder.
        decoder: Module whose forward runs the layers.
        layers: The decoder layers, in order.
        config: The model's config.
        text_config: The decoder's part of it.
        visual_ids: Placeholder ids of visual tokens; empty for a plain language model.
        adapter: What its family does differently.
    """

    entries: tuple[nn.Module, ...]
    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    config: Any
    text_config: Any
    visual_ids: tuple[int, ...]
    adapter: Adapter

    @property
    def attention(self) -> str:
        """The attention implementation that the decoder is set to now."""
        decoder: Any = self.decoder
        return str(decoder.config._attn_implementation)

    @cached_property
    def vision(self) -> VisionParts | None:
        """The vision tower, where the family's is known."""
        if self.adapter.tower is None or self.seeing is None:
            return None
        return find_tower(self.adapter.tower, self.seeing)

    @property
    def seeing(self) -> nn.Module | None:
        """The module that makes features of images, if there is one."""
        seeing = [entry for entry in self.entries if hasattr(entry, "get_image_features")]
        return seeing[-1] if seeing else None

    @cached_property
    def video_ids(self) -> tuple[int, ...]:
        """Placeholder ids of videos' tokens."""
        return self.placeholders("video")

    def placeholders(self, kind: str) -> tuple[int, ...]:
        """Placeholder ids of one kind of visual tokens, `"image"` or `"video"`."""
        names = (name for name in self.adapter.placeholder_ids if name.startswith(kind))
        ids = {getattr(self.config, name, None) for name in names}
        return tuple(sorted(i for i in ids if isinstance(i, int)))


def examine(model: nn.Module) -> Anatomy:
    """Finds the decoder of a model, and what is known of its family.

    Raises:
        ValueError: If the model has no decoder layers, or its family cannot be pruned.
    """
    name = type(model).__name__
    inner: Any = next((m for m in model.modules() if hasattr(m, "get_decoder")), None)
    config = getattr(inner, "config", None)
    if inner is None or config is None:
        raise ValueError(
            f"prune: expected a Hugging Face model, got {name}. "
            "Pass a model loaded by transformers, or a module that wraps one."
        )
    adapter = adapter_of(config.model_type)
    if adapter.refusal:
        raise ValueError(
            "prune: expected visual tokens in the decoder's stream that can be taken out of it, "
            f"got {name} ({config.model_type}): {adapter.refusal}. Choose another model."
        )
    decoder = inner.get_submodule(adapter.decoder) if adapter.decoder else inner.get_decoder()
    while not hasattr(decoder, "layers") and hasattr(decoder, "get_decoder"):  # a head around it
        if (below := decoder.get_decoder()) is decoder:
            break
        decoder = below
    text_config = config.get_text_config(decoder=True)
    _check_kinds(config, text_config)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(layers[0], "self_attn"):
        raise ValueError(
            f"prune: expected a decoder with attention layers in `.layers`, got "
            f"{type(decoder).__name__} in {name} ({config.model_type}). "
            "Describe the model with register_adapter."
        )
    path = next(path for path, module in model.named_modules() if module is decoder)
    entries = [model]
    for part in path.split(".")[:-1] if path else []:
        entries.append(getattr(entries[-1], part))
    ids = {getattr(config, key, None) for key in adapter.placeholder_ids}
    return Anatomy(
        entries=tuple(entries) if path else (),
        decoder=decoder,
        layers=tuple(layers[: text_config.num_hidden_layers]),
        config=config,
        text_config=text_config,
        visual_ids=tuple(sorted(i for i in ids if isinstance(i, int))),
        adapter=adapter,
    )


#: Layers that attend to everything as long as the conversation fits into this entry of the config.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
#: Why other layers cannot be pruned; those that are not named here keep a state of what they saw.
_KINDS = {
    "indexed_attention": "It picks the keys that it reads by an index with a cache of its own",
    "reference_sliding_attention": "Its cache keeps the prompt apart from a window on the answer",
}


def _check_kinds(config: Any, text_config: Any) -> None:
    """Refuses layers that mix tokens in another way than by attention to keys of their own."""
    model = type(config).__name__.removesuffix("Config")
    if shared := getattr(text_config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"prune: expected layers with keys of their own, got {shared} layers of {model} that "
            "read the keys of an earlier one, where tokens may be that a cut has dropped since: "
            "choose another model."
        )
    for index, kind in enumerate(getattr(text_config, "layer_types", None) or []):
        if kind in _WINDOWS or kind == "full_attention":
            continue
        reason = _KINDS.get(kind, "A token that it has seen cannot be taken back")
        raise ValueError(
            f"prune: expected layers that mix tokens by attention alone, got {kind} in layer "
            f"{index} of {model}. {reason}: choose another model."
        )


def window(anatomy: Anatomy) -> int | None:
    """Columns up to which every layer attends to all that came before; None if without limit."""
    text = anatomy.text_config
    kinds = set(getattr(text, "layer_types", None) or [])
    if not kinds and getattr(text, "sliding_window", None):
        kinds = {"sliding_attention"}
    limits = [getattr(text, _WINDOWS[kind]) for kind in kinds if kind in _WINDOWS]
    if getattr(text, "attn_temperature_tuning", False):
        # From there on, layers scale their queries by how many tokens they hold.
        limits.append(text.floor_scale - 1)
    return min((limit for limit in limits if limit), default=None)


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """What makes a decoder's rotary embeddings, by transformers' names for it."""
    return [m for m in decoder.modules() if type(m).__name__.endswith("RotaryEmbedding")]


def has_device(layer: nn.Module) -> bool:
    """Whether a layer says where it runs, as those of models spread over devices do."""
    return "_hf_hook" in vars(layer)


def device_of(layer: nn.Module, hidden: Tensor) -> torch.device:
    """Where a layer runs: models spread over devices move what a layer is given only inside it."""
    device = getattr(vars(layer).get("_hf_hook"), "execution_device", None)
    if device is None:
        return hidden.device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


#: What decoders call the norm after their last layer: LLaMA's, Persimmon's, OPT's, Kosmos's.
_LAST_NORMS = ("norm", "final_layernorm", "final_layer_norm", "layer_norm")


def final_norm(decoder: nn.Module) -> nn.Module | None:
    """The norm after the last layer; None where it is not known."""
    found = (getattr(decoder, name, None) for name in _LAST_NORMS)
    return next((norm for norm in found if isinstance(norm, nn.Module)), None)


def visual_mask(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Which prompt tokens are visual, by the model's own placeholder ids: bool (B, T)."""
    return mark_visual(examine(model).visual_ids, input_ids)
