"""Parity with recorded outputs of the published PyramidDrop and FastV code (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import tokenprune as tp

GOLDEN = Path(__file__).parents[1] / "golden"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
LAMS = {"lam05": 0.5, "lam04": 0.4, "lam06": 0.6}


class Case:
    """One recorded case: its tensors, its runs and a model with its weights."""

    def __init__(self, name: str, attention: str) -> None:
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.meta = json.loads((GOLDEN / f"{name}.json").read_text())
        config = dict(self.meta["config"])
        theta = config.pop("rope_theta")
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation=attention)).eval()
        weights = "weights_gqa2" if config["num_key_value_heads"] == 2 else "weights_mha"
        self.model.load_state_dict(load_file(GOLDEN / f"{weights}.safetensors"), strict=True)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def spans(self, run: str) -> list[tuple[int, int]]:
        """First column and number of the visual tokens of each row."""
        meta = self.meta["runs"][run]
        spans = zip(meta["image_token_posi"], meta["image_tokens"], strict=True)
        return [(start, n if start >= 0 else 0) for start, n in spans]


def visual_mask(spans: list[tuple[int, int]], length: int) -> torch.Tensor:
    mask = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, (start, count) in enumerate(spans):
        if count:
            mask[row, start : start + count] = True
    return mask


class Spy:
    """Records what each decoder layer is handed."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.hidden: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
        self.cos: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
        self.hooks = [
            layer.register_forward_pre_hook(self._record(i), with_kwargs=True)
            for i, layer in enumerate(model.model.layers)
        ]

    def _record(self, index):
        def hook(module, args, kwargs):
            self.hidden[index].append(args[0].detach())
            self.cos[index].append(kwargs["position_embeddings"][0].detach())

        return hook


def assert_stages(case: Case, trace: tp.Trace, prefix: str) -> None:
    for s, stage in enumerate(trace.stages):
        for row, (kept, scores) in enumerate(zip(stage.kept, stage.scores, strict=True)):
            key = f"{prefix}stage{s}.sample{row}"
            if f"{key}.kept" not in case.tensors:
                continue
            assert kept.tolist() == case[f"{key}.kept"].tolist()
            torch.testing.assert_close(scores, case[f"{key}.scores"].float(), **CLOSE)


def assert_cache(case: Case, cache, run: str) -> None:
    for layer in (0, 3, 7):
        for kind, ours in (
            ("key", cache.layers[layer].keys),
            ("value", cache.layers[layer].values),
        ):
            name = f"{run}.final_{kind}.layer{layer}"
            if name in case.tensors:
                torch.testing.assert_close(ours, case[name], **CLOSE)


def assert_positions(spy: Spy, model: LlamaForCausalLM, layer: int, call: int, expected, real):
    """The layer's cosines are those of the recorded positions, at real tokens."""
    cos, _ = model.model.rotary_emb(spy.hidden[layer][call], position_ids=expected)
    got = spy.cos[layer][call]
    rows = real.shape[0]
    torch.testing.assert_close(
        got.expand(rows, -1, -1)[real], cos.expand(rows, -1, -1)[real], **CLOSE
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("run", LAMS)
@pytest.mark.parametrize("name", ["pdrop_a_mha", "pdrop_a_gqa2_PATCHED"])
def test_pyramiddrop_prefill(name: str, run: str, attention: str) -> None:
    case = Case(name, attention)
    model, embeds = case.model, case["inputs_embeds"]
    mask = visual_mask(case.spans(run), embeds.shape[1])
    schedule = tp.Schedule.pyramid(num_layers=8, num_stages=4, lam=LAMS[run])
    strategy = tp.build_strategy("pyramiddrop")
    with tp.prune(model, strategy, schedule, positions="renumbered") as trace, torch.no_grad():
        spy = Spy(model)
        output = model(inputs_embeds=embeds, visual_mask=mask, output_hidden_states=True)
    assert_stages(case, trace, f"{run}.")
    assert trace.lengths[:, 0].tolist() == case.meta["runs"][run]["layer_input_seq_len"]
    torch.testing.assert_close(output.logits, case[f"{run}.logits"], **CLOSE)
    torch.testing.assert_close(output.hidden_states[-1], case[f"{run}.final_hidden"], **CLOSE)
    for layer in range(8):
        expected = case[f"{run}.layer{layer}.position_ids"]
        assert_positions(spy, model, layer, 0, expected, torch.ones_like(expected).bool())
        if f"{run}.layer{layer}.input" in case.tensors:
            torch.testing.assert_close(
                spy.hidden[layer][0], case[f"{run}.layer{layer}.input"], **CLOSE
            )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("run", LAMS)
def test_pyramiddrop_padded_batch(run: str, attention: str) -> None:
    case = Case("pdrop_b_batch3", attention)
    model, embeds = case.model, case["inputs_embeds"]
    mask = visual_mask(case.spans(run), embeds.shape[1])
    schedule = tp.Schedule.pyramid(num_layers=8, num_stages=4, lam=LAMS[run])
    strategy = tp.build_strategy("pyramiddrop")
    with (
        tp.prune(model, strategy, schedule, positions="renumbered", visual_mask=mask) as trace,
        torch.no_grad(),
    ):
        spy = Spy(model)
        output = model(inputs_embeds=embeds, attention_mask=case["attention_mask"])
    assert_stages(case, trace, f"{run}.")
    assert trace.lengths.T.tolist() == [
        [layer[row] for layer in case.meta["runs"][run]["valid_len_per_layer"]] for row in range(3)
    ]
    final = case[f"{run}.layer7.mask2d"].bool()
    torch.testing.assert_close(output.logits[final], case[f"{run}.logits"][final], **CLOSE)
    for layer in range(8):
        real = case[f"{run}.layer{layer}.mask2d"].bool()
        expected = case[f"{run}.layer{layer}.position_ids"]
        assert_positions(spy, model, layer, 0, expected, real)


def test_pyramiddrop_rows_that_drop_unequally() -> None:
    case = Case("pdrop_b_batch3", "sdpa")
    model, embeds = case.model, case["eq.inputs_embeds"]
    spans = case.spans("eq")
    mask = visual_mask(spans, embeds.shape[1])
    schedule = tp.Schedule.pyramid(num_layers=8, num_stages=4, lam=0.5)
    strategy = tp.build_strategy("pyramiddrop")
    with (
        tp.prune(model, strategy, schedule, positions="renumbered", visual_mask=mask) as trace,
        torch.no_grad(),
    ):
        output = model(inputs_embeds=embeds)
    assert_stages(case, trace, "eq.")
    # The published code leaves the pads at full length; ours trims them. Compare real tokens.
    for row, length in enumerate(trace.lengths[-1].tolist()):
        ours = output.logits[row, -length:]
        torch.testing.assert_close(ours, case["eq.logits"][row, :length], **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("run", ["c1", "c2"])
def test_pyramiddrop_training(run: str, train: bool, attention: str) -> None:
    case = Case("pdrop_c_train", attention)
    model = case.model.train(train)
    embeds = case[f"{run}.inputs_embeds"].clone().requires_grad_()
    mask = visual_mask(case.spans(run), embeds.shape[1])
    attention_mask = case.tensors.get(f"{run}.attention_mask")
    schedule = tp.Schedule.pyramid(num_layers=8, num_stages=4, lam=0.5)
    strategy = tp.build_strategy("pyramiddrop")
    with tp.prune(model, strategy, schedule, positions="renumbered", visual_mask=mask) as trace:
        output = model(
            inputs_embeds=embeds, attention_mask=attention_mask, labels=case[f"{run}.labels_in"]
        )
        output.loss.backward()
    assert_stages(case, trace, f"{run}.")
    torch.testing.assert_close(output.loss.reshape(1), case[f"{run}.loss"], **CLOSE)
    torch.testing.assert_close(embeds.grad, case[f"{run}.inputs_embeds_grad"], **CLOSE)
    parameters = dict(model.named_parameters())
    for key in [k for k in case.tensors if k.startswith(f"{run}.grad.")]:
        name = key.removeprefix(f"{run}.grad.")
        torch.testing.assert_close(parameters[name].grad, case[key], **CLOSE)
    norms = case.meta["runs"][run]["grad_norms"]
    for name, norm in norms.items():
        if name in parameters and parameters[name].grad is not None:
            assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-4)
    if attention_mask is None:
        torch.testing.assert_close(output.logits, case[f"{run}.logits"], **CLOSE)


def decode(case: Case, num_steps: int, cache: bool, mask: torch.Tensor):
    """Greedy steps by hand; yields logits, tokens, cache lengths and a layer spy."""
    model, spy = case.model, Spy(case.model)
    embeds, steps, lengths = case["inputs_embeds"], [], []
    past, token = None, None
    for step in range(num_steps):
        if cache:
            inputs = {"inputs_embeds": embeds} if step == 0 else {"input_ids": token[:, None]}
            output = model(**inputs, past_key_values=past, use_cache=True)
            past = output.past_key_values
            lengths.append([past.get_seq_length(i) for i in range(8)])
        else:
            output = model(inputs_embeds=embeds, use_cache=False)
        token = output.logits[:, -1].argmax(-1)
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)[:, None]], 1)
        steps.append(output.logits[0, -1])
    tokens = [int(logits.argmax()) for logits in steps]
    return torch.stack(steps), tokens, lengths, spy, past


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("run", LAMS)
def test_pyramiddrop_decode(run: str, attention: str) -> None:
    case = Case("pdrop_d_decode", attention)
    mask = visual_mask(case.spans(run), case["inputs_embeds"].shape[1])
    schedule = tp.Schedule.pyramid(num_layers=8, num_stages=4, lam=LAMS[run])
    strategy = tp.build_strategy("pyramiddrop")
    with (
        tp.prune(case.model, strategy, schedule, positions="renumbered", visual_mask=mask) as trace,
        torch.no_grad(),
    ):
        logits, tokens, lengths, spy, past = decode(case, 6, True, mask)
    assert_stages(case, trace, f"{run}.prefill.")
    assert tokens == case[f"{run}.tokens"].tolist()
    assert lengths == case[f"{run}.kv_len"].tolist()
    torch.testing.assert_close(logits, case[f"{run}.step_logits"], **CLOSE)
    for call in range(6):
        for layer in range(8):
            newest = case[f"{run}.layer_position"][call, layer].view(1, 1)
            cos, _ = case.model.model.rotary_emb(spy.hidden[layer][call], position_ids=newest)
            torch.testing.assert_close(spy.cos[layer][call][:, -1:], cos, **CLOSE)
    assert_cache(case, past, run)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("run", ["cache", "nocache"])
@pytest.mark.parametrize("name", ["fastv_k2_r50_mha", "fastv_k2_r50_gqa2"])
def test_fastv(name: str, run: str, attention: str) -> None:
    case = Case(name, attention)
    kept, masks = [], torch.zeros(1, 70, dtype=torch.bool)
    masks[0, 12:60] = True
    strategy, schedule, positions = tp.published("fastv", num_layers=8)
    handle = tp.attach(case.model, strategy, schedule, positions=positions, visual_mask=masks)
    case.model.register_forward_hook(
        lambda *_: kept.append(handle.trace.stages[0].kept[0].tolist())
    )
    with torch.no_grad():
        logits, tokens, lengths, _spy, past = decode(case, 6, run == "cache", masks)
    assert tokens == case[f"{run}.tokens"].tolist()
    torch.testing.assert_close(logits, case[f"{run}.step_logits"], **CLOSE)
    for call in range(6):
        if f"{run}.call{call}.kept" in case.tensors:
            assert kept[call] == case[f"{run}.call{call}.kept"].tolist()
    if run == "cache":
        assert lengths == case["cache.kv_len"].tolist()
        assert_cache(case, past, "cache")
    handle.remove()
