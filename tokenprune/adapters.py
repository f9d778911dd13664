"""What the engine must know of a model: one small entry per family, often none.

A family needs an entry only where it departs from the ordinary layout: `model.get_decoder()` has
`layers`, a layer attends in `self_attn`, and the config names the placeholder ids of visual tokens.

Shape suffixes: B batch rows, T sequence positions, Q query rows, D hidden size, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.projection import Projected, project

#: Places of one row's visual tokens: int64 (V, 4) of image, grid, row, column.
Places = Tensor
#: (model config, call arguments, visual tokens per row) -> places per row, or None if unknown.
Layout = Callable[[Any, Mapping[str, Any], Sequence[int]], "list[Places] | None"]
#: (layer, hidden (B, T, D), asked rows (B, Q), the layer's other arguments) -> queries and keys.
Project = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any]], Projected]


@dataclass(frozen=True)
class Adapter:
    """How one model family departs from the ordinary layout.

    Attributes:
        placeholder_ids: Names of the config entries that hold the ids of visual placeholders.
        layout: Where each visual token sits in its image.
        project: Queries and keys of a decoder layer, for attention rows.
        decoder: Path of the module that runs the layers, where `get_decoder()` finds another.
        token_arguments: Arguments of a layer with an entry per token, and the dimension it is in.
        first_layer: First decoder layer before which tokens can be pruned.
        refusal: Why the family cannot be pruned at all, if so.
    """

    placeholder_ids: tuple[str, ...] = (
        "image_token_id",
        "image_token_index",
        "video_token_id",
        "video_token_index",
    )
    layout: Layout = lambda config, inputs, num_visual: None
    project: Project = project
    decoder: str | None = None
    token_arguments: Mapping[str, int] = field(default_factory=dict)
    first_layer: int = 0
    refusal: str | None = None


def _grid(image: int, grid: int, rows: int, columns: int) -> Places:
    """Places of a raster-ordered grid, (rows * columns, 4)."""
    places = torch.empty(rows, columns, 4, dtype=torch.int64)
    places[..., 0], places[..., 1] = image, grid
    places[..., 2] = torch.arange(rows)[:, None]
    places[..., 3] = torch.arange(columns)
    return places.flatten(0, 1)


def _layout_llava(
    config: Any, inputs: Mapping[str, Any], num_visual: Sequence[int]
) -> list[Places] | None:
    vision = config.vision_config
    if not isinstance(getattr(vision, "image_size", None), int):
        return None
    side = vision.image_size // vision.patch_size
    rows = []
    for count in num_visual:
        images, rest = divmod(count, side * side)
        if rest:
            return None
        grids = [_grid(image, 0, side, side) for image in range(images)]
        rows.append(torch.cat(grids) if grids else torch.empty(0, 4, dtype=torch.int64))
    return rows


def _layout_llava_next(
    config: Any, inputs: Mapping[str, Any], num_visual: Sequence[int]
) -> list[Places] | None:
    """Base grid first, then the unpadded mosaic of tiles with a newline token per row.

    The mosaic's size follows Liu et al., 2024 (LLaVA-NeXT, "spatial_unpad").
    """
    from transformers.image_processing_utils import select_best_resolution

    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    images: list[list[Places]] = []

    def add(rows: int, columns: int) -> None:
        images.append([_grid(0, 0, side, side), _grid(0, 1, rows, columns + 1)])

    if inputs.get("image_sizes") is not None:
        for height, width in inputs["image_sizes"].tolist():
            tall, wide = select_best_resolution((height, width), config.image_grid_pinpoints)
            rows, columns = side * (tall // tile), side * (wide // tile)
            if width / height > columns / rows:
                rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
            else:
                columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
            add(rows, columns)
    else:
        for length in inputs.get("image_lengths", ()):
            fitting = _mosaics_of_length(config, length - side * side)
            if len(fitting) == 1:
                add(*fitting.pop())
            else:
                images.append([torch.full((length, 4), -1)])  # two shapes of that length
    return _number_images(images, num_visual)


def _mosaics_of_length(config: Any, length: int) -> set[tuple[int, int]]:
    """Unpadded mosaics (rows, columns) with that many tokens, newlines included; mostly one.

    `generate` in transformers 5.23 encodes images ahead of the call, which then shows no sizes.
    """
    patch, fitting = config.vision_config.patch_size, set()
    for tall, wide in config.image_grid_pinpoints:
        rows, columns = tall // patch, wide // patch
        fitting |= {(rows, c) for c in range(columns, 0, -2) if rows * (c + 1) == length}
        fitting |= {(r, columns) for r in range(rows, 0, -2) if r * (columns + 1) == length}
    return fitting


def _number_images(
    images: Sequence[list[Places]], num_visual: Sequence[int]
) -> list[Places] | None:
    """Hands the images of a batch, in order, to its rows, and numbers them within the row."""
    rows, queue = [], [torch.cat(grids) for grids in images]
    for count in num_visual:
        row: list[Places] = []
        while sum(map(len, row)) < count and queue:
            places = queue.pop(0)
            places[:, 0] = len(row)
            row.append(places)
        rows.append(torch.cat(row) if row else torch.empty(0, 4, dtype=torch.int64))
    fits = not queue and [len(row) for row in rows] == list(num_visual)
    return rows if fits else None


ORDINARY = Adapter()
_CROSS = (
    "its decoder reads the image through cross-attention, so no visual tokens sit in the decoder's "
    "stream"
)
_ENCODER = (
    "its visual tokens sit in an encoder, whose output every decoder layer reads, so none sit in "
    "the decoder's stream"
)
_ADAPTERS: dict[str, Adapter] = {
    "ernie4_5_vl_moe": Adapter(token_arguments={"moe_mm_token_type_ids": 1}),
    "llava": Adapter(layout=_layout_llava),
    "llava_next": Adapter(layout=_layout_llava_next),
    "vipllava": Adapter(layout=_layout_llava),
    "deepseek_vl": Adapter(layout=_layout_llava),
    "deepseek_vl_hybrid": Adapter(layout=_layout_llava),
    "janus": Adapter(layout=_layout_llava),
    "gemma4": Adapter(token_arguments={"per_layer_input": 1}),
    "kosmos-2": Adapter(decoder="text_model.model"),
    "kosmos-2.5": Adapter(decoder="text_model.model"),
    "llama4": Adapter(decoder="language_model.model"),
    "mllama": Adapter(refusal=_CROSS),
    "blip": Adapter(refusal=_CROSS),
    "florence2": Adapter(refusal=_CROSS),
    "pix2struct": Adapter(refusal=_CROSS),
    "vision-encoder-decoder": Adapter(refusal=_CROSS),
    "idefics": Adapter(refusal=_CROSS),
    "pp_formulanet": Adapter(refusal=_CROSS),
    "t5gemma2": Adapter(refusal=_ENCODER),
    "udop": Adapter(refusal=_ENCODER),
    "evolla": Adapter(
        refusal="its decoder reads a protein through cross-attention, and sees no images"
    ),
    "gemma3n": Adapter(
        refusal="its layers hand on several streams side by side, and the last ones read the keys "
        "of earlier ones"
    ),
    "git": Adapter(
        refusal="it puts them before the prompt itself, where no placeholder shows them"
    ),
    "pi0": Adapter(
        refusal="its action expert reads the keys of every layer of the language model, under one "
        "mask for all layers"
    ),
    "diffusion_gemma": Adapter(
        refusal="its decoder writes blocks of text by diffusion, and reads the keys of every layer "
        "of an encoder, under one mask for all layers"
    ),
}


def register_adapter(model_type: str, adapter: Adapter) -> None:
    """Teaches the engine a family, by its config's `model_type`.

    Raises:
        ValueError: If the family has an entry already.
    """
    if model_type in _ADAPTERS:
        raise ValueError(
            f"register_adapter: expected a new model type, got {model_type!r}. "
            "Subclass the config with a model_type of your own."
        )
    _ADAPTERS[model_type] = adapter


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
    adapter = _ADAPTERS.get(config.model_type, ORDINARY)
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


def device_of(layer: nn.Module, hidden: Tensor) -> torch.device:
    """Where a layer runs: models spread over devices move what a layer is given only inside it."""
    hook = getattr(layer, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:
        device = hook.execution_device  # type: ignore[union-attr]
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    own = next((parameter.device for parameter in layer.parameters()), hidden.device)
    return hidden.device if own.type == "meta" else own


def layers_that_add_features(inputs: Mapping[str, Any]) -> int:
    """First layer at which a cut comes after all visual features that a call adds.

    Those of a list are added after the first layers, those of a dict before the layers it names.
    """
    before: Mapping[int, Any] = inputs.get("deepstack_features") or {}
    return max(len(inputs.get("deepstack_visual_embeds") or ()), *before, 0)


def shows_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a call brings images along, as pixels or encoded ahead."""
    return any("pixel" in key for key in inputs) or bool(inputs.get("mm_encoder_outputs"))


def facts(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a `Layout` may know of a call: its integer tensors, and visual tokens per image.

    The latter, `image_lengths`, is there where images were encoded ahead of the call.
    """
    known: dict[str, Any] = {
        key: value
        for key, value in inputs.items()
        if isinstance(value, Tensor) and not value.is_floating_point()
    }
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None and isinstance(encoded.pooler_output, (list, tuple)):
        known["image_lengths"] = [len(features) for features in encoded.pooler_output]
    return known


def visual_mask(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Which prompt tokens are visual, by the model's own placeholder ids: bool (B, T)."""
    return mark_visual(examine(model).visual_ids, input_ids)


def mark_visual(visual_ids: Sequence[int], input_ids: Tensor) -> Tensor:
    """Bool (B, T): positions whose id is one of `visual_ids`."""
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for visual_id in visual_ids:
        mask |= input_ids == visual_id
    return mask


def places(
    layout: Layout,
    config: Any,
    inputs: Mapping[str, Any],
    visual_BT: Tensor,
    num_visual: Sequence[int],
) -> list[Places]:
    """Place of every visual token in its image, one (V, 4) tensor per row.

    Where the family's grid is unknown, a run of visual tokens counts as an image, and grid, row and
    column are -1.
    """
    known = layout(config, inputs, num_visual)
    if known is not None:
        return known
    starts_BT = visual_BT & ~nn.functional.pad(visual_BT, (1, 0))[:, :-1]
    image_BT = (starts_BT.cumsum(1) - 1).cpu()
    rows = []
    for row, mask in enumerate(visual_BT.cpu()):
        place = torch.full((num_visual[row], 4), -1, dtype=torch.int64)
        place[:, 0] = image_BT[row][mask]
        rows.append(place)
    return rows
