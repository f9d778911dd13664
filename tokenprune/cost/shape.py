"""The sizes of a decoder that its cost depends on, read from a config or of a published model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.strategy import unknown_name


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        num_layers: Decoder layers.
        hidden_size: Width of the hidden states.
        intermediate_size: Inner width of the MLP; of a mixture of experts, the widths that one
            token passes through, together.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; fewer than `num_heads` where queries are grouped.
        head_dim: Width of a head.
        vocab_size: Rows of the vocabulary projection.
        num_matrices: Matrices of the MLP: 3 with a gate (LLaMA), 2 without (OPT).
        router_size: Scores that a mixture of experts makes per token; 0 without one.
        unlike: What of the layers the formula of `"exact"` does not know; empty if nothing.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_matrices: int = 3
    router_size: int = 0
    unlike: str = ""

    @property
    def caches_alike(self) -> bool:
        """Whether every layer caches `num_kv_heads` x `head_dim` keys, and so many values."""
        return self.unlike not in _CACHED_OTHERWISE

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Reads the text part of any Hugging Face config.

        Raises:
            ValueError: If the config lacks one of the sizes.
        """
        text = _text(config)
        heads = _first(text, "num_attention_heads", "n_heads", "decoder_attention_heads")
        hidden = _first(text, "hidden_size", "d_model", "n_embd")
        inner = _first(text, "intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner")
        found = {
            "num_hidden_layers": _first(text, "num_hidden_layers", "num_layers", "n_layers"),
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "vocab_size": _first(text, "vocab_size"),
        }
        missing = [name for name, value in found.items() if not isinstance(value, int)]
        if missing:
            raise ValueError(
                f"DecoderShape.from_config: expected a decoder config, got "
                f"{type(config).__name__} without {missing[0]}. Give the sizes by hand."
            )
        routed, active = _experts(text)
        return cls(
            num_layers=found["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=active or inner,
            num_heads=heads,
            num_kv_heads=_first(text, "num_key_value_heads", "num_kv_heads") or heads,
            head_dim=_first(text, "head_dim") or hidden // heads,
            vocab_size=found["vocab_size"],
            num_matrices=2 if getattr(text, "model_type", "") in _UNGATED else 3,
            router_size=routed,
            unlike=_unlike(text),
        )

    @classmethod
    def preset(cls, name: str) -> DecoderShape:
        """The decoder of a published model, by its name in `PRESETS` or its Hub id.

        Raises:
            KeyError: If the name is unknown.
        """
        return find_preset(name).shape


_LATENT, _GAPS, _SIZES = "latent attention", "layers without attention", "layers of several sizes"
_CACHED_OTHERWISE = (_LATENT, _GAPS, _SIZES)
#: Text models whose MLP has no gate: two matrices.
_UNGATED = {
    *("opt", "kosmos_2_text_model", "kosmos_2_5_text_model", "gpt2", "gpt_neox", "phi"),
    *("persimmon", "starcoder2", "bloom", "falcon", "mpt", "gpt_neo", "gptj", "cosmos3_edge_text"),
}
#: Text models with maps that no size in their config shows.
_WITH_MORE = {
    "muse_glimmer_text": "a gate on the attention",
    "muse_spark_text": "a gate on the attention",
    "step3p5": "a gate on the attention",
    "minimax_m3_vl_text": "shared experts and sparse attention of their own",
}


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _first(config: Any, *names: str) -> Any:
    """The first of the attributes that is there and not None."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # Gemma 4's differ by layer; the config's own is the usual one
            value = config.to_dict().get(name)
        if value is not None:
            return value
    return None


def _experts(text: Any) -> tuple[int, int]:
    """Of a mixture of experts: experts routed to, and inner width that a token passes through."""
    number = _first(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    each = _first(text, "num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk")
    size = _first(text, "moe_intermediate_size", "expert_dim", "intermediate_size")
    if not (isinstance(number, int) and isinstance(each, int) and isinstance(size, int)):
        return 0, 0
    shared = _first(text, "shared_expert_intermediate_size")
    if shared is None:
        shared = size * (_first(text, "n_shared_experts", "moe_num_shared_experts") or 0)
    return number, each * size + shared


def _unlike(text: Any) -> str:
    """What sets the layers apart from LLaMA's, as far as a config shows it."""
    if _first(text, "kv_lora_rank", "q_lora_rank"):
        return _LATENT
    if getattr(text, "model_type", "") in _WITH_MORE:
        return _WITH_MORE[text.model_type]
    kinds = set(_first(text, "layer_types") or ())
    if any("linear" in kind or "conv" in kind or "mamba" in kind for kind in kinds):
        return _GAPS
    if _first(text, "hidden_size_per_layer_input", "global_head_dim", "num_kv_shared_layers"):
        return _SIZES
    if _differs_by_layer(text):
        return _SIZES
    mixed = (
        len(set(_first(text, "mlp_layer_types") or ())) > 1
        or any(
            _first(text, name)
            for name in ("first_k_dense_replace", "mlp_only_layers", "moe_layer_start_index")
        )
        or any(
            (_first(text, name) or 1) != 1
            for name in ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval")
        )
    )
    return "experts in some layers only" if mixed else ""


def _differs_by_layer(text: Any) -> bool:
    """Whether some layers have sizes of their own, which transformers keeps beside the config's.

    Gemma 4's layers of full attention: wider heads, fewer of them for keys, and no map for values.
    """
    named = text.to_dict() if hasattr(text, "to_dict") else {}
    others = named.get("per_layer_config") or {}
    own = others.values() if isinstance(others, Mapping) else others
    return any(
        isinstance(value, int) and value != named.get(name)
        for sizes in own
        for name, value in (sizes or {}).items()
    )


# ----------------------------------------------------------------------------- published models


@dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        shape: Its decoder.
        num_visual: Visual tokens of one image at the size that papers report; None where the image
            decides. LLaVA-NeXT's newline tokens, up to 48 more in transformers, are not in it.
        hub_ids: Checkpoints with these sizes.
    """

    shape: DecoderShape
    num_visual: int | None
    hub_ids: tuple[str, ...] = ()


# Vicuna and Mistral have 32 000 tokens; transformers' conversions pad them to 32 064.
_VICUNA_7B = DecoderShape(32, 4096, 11008, 32, 32, 128, 32064)
_VICUNA_13B = DecoderShape(40, 5120, 13824, 40, 40, 128, 32064)
_MISTRAL_7B = DecoderShape(32, 4096, 14336, 32, 8, 128, 32064)
_QWEN2_7B = DecoderShape(28, 3584, 18944, 28, 4, 128, 152064)

#: Published models by name; sizes from their config.json.
PRESETS: Mapping[str, Preset] = {
    "llava-1.5-7b": Preset(_VICUNA_7B, 576, ("llava-hf/llava-1.5-7b-hf",)),
    "llava-1.5-13b": Preset(_VICUNA_13B, 576, ("llava-hf/llava-1.5-13b-hf",)),
    "llava-next-7b": Preset(_VICUNA_7B, 2880, ("llava-hf/llava-v1.6-vicuna-7b-hf",)),
    "llava-next-13b": Preset(_VICUNA_13B, 2880, ("llava-hf/llava-v1.6-vicuna-13b-hf",)),
    "llava-next-mistral-7b": Preset(_MISTRAL_7B, 2880, ("llava-hf/llava-v1.6-mistral-7b-hf",)),
    "video-llava-7b": Preset(_VICUNA_7B, 2048, ("LanguageBind/Video-LLaVA-7B-hf",)),
    "qwen2-vl-2b": Preset(
        DecoderShape(28, 1536, 8960, 12, 2, 128, 151936), None, ("Qwen/Qwen2-VL-2B-Instruct",)
    ),
    "qwen2-vl-7b": Preset(_QWEN2_7B, None, ("Qwen/Qwen2-VL-7B-Instruct",)),
    "qwen2.5-vl-3b": Preset(
        DecoderShape(36, 2048, 11008, 16, 2, 128, 151936), None, ("Qwen/Qwen2.5-VL-3B-Instruct",)
    ),
    "qwen2.5-vl-7b": Preset(_QWEN2_7B, None, ("Qwen/Qwen2.5-VL-7B-Instruct",)),
    "qwen2.5-vl-72b": Preset(
        DecoderShape(80, 8192, 29568, 64, 8, 128, 152064), None, ("Qwen/Qwen2.5-VL-72B-Instruct",)
    ),
    "llava-onevision-7b": Preset(
        DecoderShape(28, 3584, 18944, 28, 4, 128, 152000),
        None,
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf",),
    ),
    "internvl3-8b": Preset(
        DecoderShape(28, 3584, 18944, 28, 4, 128, 151674), None, ("OpenGVLab/InternVL3-8B-hf",)
    ),
    "smolvlm2-2.2b": Preset(
        DecoderShape(24, 2048, 8192, 32, 32, 64, 49280),
        None,
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct",),
    ),
    "gemma-3-4b": Preset(
        DecoderShape(34, 2560, 10240, 8, 4, 256, 262208), 256, ("google/gemma-3-4b-it",)
    ),
    "qwen3-vl-4b": Preset(
        DecoderShape(36, 2560, 9728, 32, 8, 128, 151936), None, ("Qwen/Qwen3-VL-4B-Instruct",)
    ),
    "qwen3-vl-8b": Preset(
        DecoderShape(36, 4096, 12288, 32, 8, 128, 151936), None, ("Qwen/Qwen3-VL-8B-Instruct",)
    ),
}


def find_preset(name: str) -> Preset:
    """A published model by its name in `PRESETS` or its Hub id.

    Raises:
        KeyError: If there is none.
    """
    for known, preset in PRESETS.items():
        if name == known or name in preset.hub_ids:
            return preset
    raise unknown_name("cost.preset", name, list(PRESETS))


def visual_tokens(config: Any) -> int | None:
    """Visual tokens of one image at the size that a Hugging Face config names.

    LLaVA: the patches of its vision tower. LLaVA-NeXT: the largest grid of tiles and the whole
    image, (2 x 2 + 1) x 576, as papers count it, without the newline token of each row. Of larger
    grids LLaVA-OneVision keeps as many tokens as N tiles have, with `anyres_max_N`.

    Returns:
        None where the image decides (Qwen-VL, Pixtral) or the config does not say.
    """
    fixed = _first(config, "mm_tokens_per_image", "num_query_tokens")
    if isinstance(fixed, int):
        return fixed
    vision = getattr(config, "vision_config", None)
    size, patch = (
        value[0] if isinstance(value, list | tuple) and value else value  # InternVL's are pairs
        for value in (_first(vision, "image_size"), _first(vision, "patch_size"))
    )
    kind = str(getattr(vision, "model_type", ""))
    if (
        kind.startswith(("qwen", "pixtral"))
        or not isinstance(size, int)
        or not isinstance(patch, int)
    ):
        return None
    ratio, factor = _first(config, "downsample_ratio"), _first(config, "scale_factor")
    per_tile = (size // patch) ** 2
    if ratio is not None:  # InternVL's pixel shuffle
        per_tile = int(per_tile * ratio**2)
    elif isinstance(factor, int):  # Idefics 3's
        per_tile //= factor**2
    if _first(config, "vision_feature_select_strategy") == "full" and "clip" in kind:
        per_tile += 1  # the class token
    grids = _first(config, "image_grid_pinpoints") or [[0, 0]]
    most = max((height // size) * (width // size) for height, width in grids)
    start, _, limit = str(getattr(config, "vision_aspect_ratio", "")).rpartition("_")
    if start == "anyres_max" and limit.isdigit():
        most = min(most, int(limit))
    return per_tile * (most + 1) if most else per_tile


def check_lengths(where: str, shape: DecoderShape, lengths: Sequence[int | float]) -> None:
    """Refuses lengths that do not fit the decoder."""
    if len(lengths) != shape.num_layers or any(length < 0 for length in lengths):
        raise ValueError(
            f"{where}.lengths: expected {shape.num_layers} counts >= 0, one per layer, got "
            f"{len(lengths)}: {list(lengths)}. Use Schedule.lengths."
        )


def check_layers(shape: DecoderShape) -> None:
    """Refuses decoders whose layers the formula of `"exact"` does not know."""
    if shape.unlike:
        raise ValueError(
            f"cost.exact: expected decoder layers of one size like LLaMA's, got {shape.unlike}. "
            'Use the convention "pyramiddrop", or count with torch.utils.flop_counter.'
        )
