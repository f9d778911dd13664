"""What is compared does what it says: keys, decoding, training steps."""

from __future__ import annotations

import pytest
import torch
from benches import config, made

from tokenprune.bench.model import prepare_training


def test_keys_are_those_before_the_cuts() -> None:
    one = made("batch_size=2")
    found = one.before_cuts()
    assert [tuple(hidden.shape) for _, hidden in found] == [(2, n, 64) for n in (112, 64, 40)]
    layers = list(one.decoder.layers)
    assert [layers.index(layer) for layer, _ in found] == [1, 2, 3]
    one.project_keys(found)


def test_theory_counts_what_is_kept_where_the_image_decides() -> None:
    """By the rank of what the question's words pay, not the schedule: 94 of 96 would be allowed."""
    cut = "schedule.stages=[{layer:1,keep:0.98}]"
    one = made("strategy=sparsevlm", "strategy.version=1.0", "strategy.scale=0.1", cut)
    assert one.pruning.schedule.lengths(4, one.load.num_visual)[-1] == 94
    assert one.theory.lengths()[-1] < 47
    with one.pruned():
        layers = one.prefill().layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert one.theory.cache_bytes() == held


def test_every_round_of_decoding_starts_at_the_same_context() -> None:
    one = made()
    prepare, work = one.variants("decode", None)["pruned"][1:]
    for _ in range(2):
        with one.pruned():
            cache = prepare()
            assert [layer.keys.shape[2] for layer in cache.layers] == [112, 64, 40, 28]
            work(cache)
            assert [layer.keys.shape[2] for layer in cache.layers] == [115, 67, 43, 31]


def test_training_makes_all_parameters_move_or_the_adapters_alone() -> None:
    for tuning, moved in (("full", False), ("lora", True)):
        if tuning == "lora":
            pytest.importorskip("peft")
        one = made("measure=train", f"tuning={tuning}")
        optimizer = prepare_training(one.model, config("measure=train", f"tuning={tuning}"))
        before = {name: weight.clone() for name, weight in one.model.named_parameters()}
        with one.pruned():
            one.step(optimizer)
        changed = {n for n, w in one.model.named_parameters() if not torch.equal(w, before[n])}
        assert changed
        assert all("lora" in name for name in changed) == moved


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for choice in ("false", "true"):
        own = config("measure=train", f"gradient_checkpointing={choice}")
        one = made("measure=train")
        prepare_training(one.model, own)
        with one.pruned():
            torch.manual_seed(1)
            output = one.model(inputs_embeds=one.embeds, labels=one.labels, use_cache=False)
            output.loss.backward()
        gradients.append([weight.grad for weight in one.decoder.layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
