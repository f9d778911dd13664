"""Published checkpoints whose weights are not here: at full depth, on no device at all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

import tokenprune as tp
from tokenprune.cli.configs import compose
from tokenprune.runs.budgets import known_model
from tokenprune.runs.compose import build_pruning
from tokenprune.runs.models import load_config

SHIPPED = ("tiny", "small", "hub")
#: Model type of each choice of `model=`, and what its config says beside the decoder's sizes.
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava_1_5_7b": ("Llava", {}),
    "llava_next_7b": ("LlavaNext", {}),
    "llava_onevision_7b": ("LlavaOnevision", {}),
    "qwen2_5_vl_7b": ("Qwen2_5_VL", {}),
    "qwen3_vl_8b": ("Qwen3VL", {}),
    "internvl3_8b": ("InternVL", {}),
    "smolvlm2_2b": ("SmolVLM", {}),
    "gemma3_4b": ("Gemma3", {}),
}


def test_every_choice_is_here() -> None:
    from tokenprune.runs.compose import config_dir

    choices = {path.stem for path in (config_dir() / "model").glob("*.yaml")}
    assert choices == {*SHIPPED, *TYPES}


@pytest.mark.parametrize("name", TYPES)
def test_a_published_model_is_pinned(name: str) -> None:
    """To a whole commit; its sizes are known without asking the Hub all the same."""
    config = compose("eval", [f"model={name}"])
    assert re.fullmatch("[0-9a-f]{40}", config.model.revision)
    assert known_model(config.model.path) is not None


def test_a_commit_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, revision: str | None, **kwargs: Any) -> None:
        raise OSError(f"{revision} is not a valid git identifier")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=r"than 0{40}: model\.revision=null is the newest\."):
        load_config("owner/name", revision="0" * 40)
    with pytest.raises(ValueError, match=r"Check the name and the connection\."):
        load_config("owner/name")


@pytest.mark.parametrize(
    "name",
    [
        "smolvlm2_2b",
        *(pytest.param(n, marks=pytest.mark.matrix) for n in TYPES if n[:5] != "smolv"),
    ],
)
def test_a_published_model_can_be_pruned(name: str) -> None:
    """Its sizes are the preset's; strategies of the configs fit its depth and find its parts."""
    config = compose("eval", [f"model={name}"])
    shape = tp.cost.DecoderShape.preset(config.model.path)
    own = getattr(transformers, f"{TYPES[name][0]}Config")()
    text = own.get_text_config()
    sizes = {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
    }
    for key, value in sizes.items():
        setattr(text, key, value)
    if getattr(text, "layer_types", None) is not None:  # one for each of so many layers
        text.layer_types = None
        text.__post_init__()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(own, dtype=torch.bfloat16)
    assert tp.cost.DecoderShape.from_config(model.config) == shape
    for strategy in ("pyramiddrop", "fastv", "divprune", "sparsevlm"):
        chosen = build_pruning(compose("eval", [f"strategy={strategy}"]), shape.num_layers)
        assert chosen is not None
        tp.attach(model, chosen.strategy, chosen.schedule, "original").remove()
