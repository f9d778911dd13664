"""Sizes of what is measured, from configs alone: the decoder's, and an image's in visual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune.cost import DecoderShape
from tokenprune.runs import targets
from tokenprune.runs.models import load_config

#: CLIP ViT-L/14 at 336 pixels, the tile of LLaVA-1.5 and LLaVA-NeXT: 24 x 24 patches of 14 pixels.
TILE_PIXELS, TILE_TOKENS = 336, 576


def llama_config(
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int,
) -> Any:
    """A LLaMA-like decoder's config."""
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=2**17,
        bos_token_id=None,
        eos_token_id=None,
    )


def checkpoint_config(path: str, revision: str | None = None) -> Any:
    """The config of a checkpoint, by Hub id or folder; its weights are not read.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        return load_config(path, revision=revision)
    try:  # a folder without weights will do
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"shape.path: expected a config that transformers reads, got {path!r}: "
            f"{str(error).splitlines()[0]} Check the folder."
        ) from error


def shape_config(config: Mapping[str, Any]) -> Any:
    """The Hugging Face config that the choice of `shape` names.

    Args:
        config: As composed from configs/bench.yaml.
    """
    return targets.build(config["shape"], "shape")


def decoder_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Sizes of the decoder that the choice of `shape` names.

    Those that stand in the config are read without transformers, which takes seconds to load.

    Args:
        config: As composed from configs/bench.yaml.

    Raises:
        ValueError: If a size is no count, or the heads do not share the width evenly.
    """
    sizes = dict(config["shape"])
    if sizes.pop("_target_", None) != f"{__name__}.{llama_config.__name__}":
        return DecoderShape.from_config(shape_config(config))
    return _llama_shape(**sizes)


def _llama_shape(
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int,
) -> DecoderShape:
    """The sizes of `llama_config`."""
    for name, value in locals().items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"shape.{name}: expected an integer >= 1, got {value!r}. See configs/shape."
            )
    for name, size, heads in (
        ("num_heads", hidden_size, num_heads),
        ("num_kv_heads", num_heads, num_kv_heads),
    ):
        if size % heads:
            raise ValueError(
                f"shape.{name}: expected a divisor of {size}, got {heads}. Heads are of one width, "
                "and as many of them share each key."
            )
    return DecoderShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=vocab_size,
    )


def num_tokens(resolution: str) -> int:
    """Visual tokens that LLaVA makes of an image.

    One tile of 336 x 336 pixels as LLaVA-1.5; else so many tiles as cover the image and one of
    the whole, as LLaVA-NeXT (Liu et al., 2024): 2 880 for 672x672, and 5 184 for 672x1344, the five
    and nine patches of PyramidDrop's tables. Newline tokens and unpadding are left out there, too.

    Args:
        resolution: Width x height in pixels, such as `672x672`.

    Raises:
        ValueError: If it is not of that form.
    """
    sides = str(resolution).lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(
            f"resolution: expected width x height in pixels, got {resolution!r}. "
            "Write resolution=672x672, or set num_visual."
        )
    across, down = (-(-int(side) // TILE_PIXELS) for side in sides)
    tiles = across * down
    return TILE_TOKENS * (tiles if tiles == 1 else tiles + 1)
