"""Rows that hold several sequences: each is pruned as it is pruned alone."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from far import Device, far
from models import ROWS, SEED, Row, batch, build
from oracles import (
    DROPPING,
    EVERY,
    SCHEDULE,
    all_visual,
    assert_close,
    assert_same_choice,
    masked,
    runnable,
    seed_of,
    split,
)
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import DataCollatorWithFlattening
from zoo.flash import attention as use_attention
from zoo.flash import stand_in
from zoo.qwen import SPECIMENS

import tokenprune as tp
from tokenprune.strategy import vision_needs

FAMILIES = ("llava", "llava_next", "llama")
POLICIES = ("original", "renumbered")
#: What keeps sequences apart: a mask over pairs of tokens, positions that start anew, or both.
FORMS = ("mask", "positions", "both")
PDROP, UNIFORM = tp.build_strategy("pyramiddrop"), tp.build_strategy("uniform")
#: Two rows of different lengths: an image first, one text alone, two images, one.
PACKS = [[ROWS[0], ROWS[1], ROWS[2]], [ROWS[3], ROWS[0]]]
ALONE = 3e-5


@dataclass
class Packed:
    """A call of packed rows, and what it is made of.

    Attributes:
        call: Its arguments; rows are padded on the right.
        spans: Row, first column and end of each sequence.
        apart: Bool (B, T, T), who sees whom.
        alone: The call of each sequence alone.
        visual: Bool (B, T).
    """

    call: dict[str, Tensor]
    spans: list[tuple[int, int, int]]
    apart: Tensor
    alone: list[dict[str, Tensor]]
    visual: Tensor


def pack(model, packs: list[list[Row]], form: str, seed: int = SEED) -> Packed:
    """Sequences of each row end to end."""
    rows = [row for packed in packs for row in packed]
    alone = [batch(model, [row], seed=seed) for row in rows]
    whole = batch(model, rows, "right", seed)  # its images are in the order of the sequences
    lengths = whole.pop("attention_mask").sum(1).tolist()
    numbers = iter(range(len(rows)))
    members = [[next(numbers) for _ in packed] for packed in packs]
    width = max(sum(lengths[number] for number in own) for own in members)
    spans, positions = [], torch.zeros(len(packs), width, dtype=torch.int64)
    apart = torch.eye(width).bool().repeat(len(packs), 1, 1)
    for row, own in enumerate(members):
        end = 0
        for number in own:
            start, end = end, end + lengths[number]
            spans.append((row, start, end))
            positions[row, start:end] = torch.arange(end - start)
            apart[row, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()

    def laid(table: Tensor) -> Tensor:
        joined = [torch.cat([table[n, : lengths[n]] for n in own]) for own in members]
        return torch.stack([pad(row, (0, width - len(row))) for row in joined])

    tables = ("input_ids", "visual_mask")
    call = {key: laid(value) if key in tables else value for key, value in whole.items()}
    visual = all_visual(model, call)
    if form != "mask":
        call["position_ids"] = positions
    if form != "positions":
        call["attention_mask"] = over_pairs(model, apart)
    return Packed(call, spans, apart, alone, visual)


def over_pairs(model, apart: Tensor) -> Tensor:
    """As its attention reads it."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        return apart[:, None]
    low = torch.finfo(torch.float32).min
    return torch.zeros(apart.shape).masked_fill(~apart, low)[:, None]


def pieces(trace: tp.Trace, packed: Packed) -> list[tuple[int, slice]]:
    """Where each sequence's survivors stand in the pruned rows."""
    found, ends = [], [0] * len(packed.apart)
    for (row, _, _), length in zip(packed.spans, trace.lengths[-1].tolist(), strict=True):
        found.append((row, slice(ends[row], ends[row] + length)))
        ends[row] += length
    return found


def mixed_fairly(pairs, every: int = 1, **axes):
    """One in `every` pair of a family and a strategy, in some way; by `make test-all` all in all.

    tests/engine/test_oracles.py sees of each strategy what does not depend on packing.
    """
    ways = list(itertools.product(*axes.values()))
    cases = []
    for number, (family, strategy) in enumerate(pairs):
        often = number % len(ways) if family != "llama" and number % every == 0 else None
        for place, way in enumerate(ways):
            marks = () if place == often else pytest.mark.matrix
            cases.append(pytest.param(family, strategy, *way, marks=marks))
    names = ("family", "strategy", *axes)
    return pytest.mark.parametrize(names, cases, ids=lambda v: str(getattr(v, "name", v)))


def forms_of(strategy: tp.PruningStrategy, form: str) -> str:
    """Keys are rotated by the positions that are given, which a mask alone does not start anew."""
    reads_keys = any(isinstance(need, tp.DecoderKeys) for need in strategy.needs())
    return "both" if form == "mask" and reads_keys else form


# ------------------------------------------------------------------------------- packed = alone


@mixed_fairly(runnable(FAMILIES, EVERY), attention=("sdpa", "eager"), form=FORMS, policy=POLICIES)
@pytest.mark.share(3)
def test_a_sequence_gives_what_it_gives_alone(family, strategy, attention, form, policy) -> None:
    model = build(family, attention, seed_of(strategy))
    packed = pack(model, PACKS, forms_of(strategy, form), seed_of(strategy))
    call, mask = split(packed.call)
    with torch.no_grad():
        with tp.prune(model, strategy, SCHEDULE, policy, visual_mask=mask) as trace:
            together = model(**call, use_cache=False).logits
        assert len(trace.stages[0].kept) == len(packed.spans) == 5
        for number, (row, piece) in enumerate(pieces(trace, packed)):
            single, own = split(packed.alone[number])
            with tp.prune(model, strategy, SCHEDULE, policy, visual_mask=own) as other:
                alone = model(**single).logits[0]
            if other.stages:
                assert_same_choice(trace.stages, other.stages, [(number, 0)])
                assert torch.equal(trace.places[number], other.places[0])
            assert trace.lengths[:, number].tolist() == other.lengths[:, 0].tolist()
            assert_close(together[row, piece], alone, ALONE)


def as_row(trace: tp.Trace, packed: Packed) -> SimpleNamespace:
    """The trace with the visual tokens of a row numbered through."""
    stages = []
    for stage in trace.stages:
        kept: list[list[Tensor]] = [[] for _ in packed.apart]
        for own, (row, start, _) in zip(stage.kept, packed.spans, strict=True):
            kept[row].append(own + packed.visual[row, :start].sum())
        stages.append(SimpleNamespace(layer=stage.layer, kept=[torch.cat(own) for own in kept]))
    return SimpleNamespace(stages=stages)


@mixed_fairly(runnable(FAMILIES, DROPPING), every=3, attention=("sdpa", "eager"), form=FORMS)
def test_drop_is_mask(family, strategy, attention, form) -> None:
    model = build(family, attention)
    packed = pack(model, PACKS, form)
    call, mask = split(packed.call)
    everything = torch.ones(packed.visual.shape)
    with torch.no_grad():
        with tp.prune(model, strategy, SCHEDULE, visual_mask=mask) as trace:
            got = model(**call, use_cache=False).logits
        with masked(
            model, everything, packed.visual, as_row(trace, packed), extra=0, apart=packed.apart
        ):
            expected = model(**call, use_cache=False).logits
    for number, (row, piece) in enumerate(pieces(trace, packed)):
        _, start, end = packed.spans[number]
        stays = ~packed.visual[row, start:end]
        stays[packed.visual[row, start:end].nonzero()[trace.stages[-1].kept[number], 0]] = True
        assert_close(got[row, piece], expected[row, start:end][stays])


@pytest.mark.filterwarnings("ignore:prune. expected labels on answers alone")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", FORMS)
def test_identity(form, policy) -> None:
    model = build("llava")
    call = pack(model, PACKS, form).call
    labels = call["input_ids"].masked_fill(call["input_ids"] == 99, -100)
    labels[pack(model, PACKS, "positions").call["position_ids"] == 0] = -100
    with torch.no_grad():
        plain = model(**call, labels=labels, use_cache=False)
        keep_all = tp.Schedule.pyramid(layers=[1, 2, 4], lam=1.0)
        with tp.prune(model, PDROP, keep_all, policy) as trace:
            got = model(**call, labels=labels, use_cache=False)
    assert torch.equal(got.logits, plain.logits)
    assert torch.equal(got.loss, plain.loss)
    assert [len(kept) for kept in trace.stages[0].kept] == [16, 0, 32, 16, 16]


# ----------------------------------------------------------------------------------------- labels


def answered(model, form: str) -> tuple[Packed, dict[str, Tensor], dict[str, Tensor]]:
    """Packed rows with answers, and the same sequences as rows of a batch.

    One sequence has no label, one has nothing else.
    """
    packed = pack(model, PACKS, form)
    labels = torch.full_like(packed.call["input_ids"], -100)
    for number, (row, start, end) in enumerate(packed.spans):
        first = {0: end - 2, 2: start, 4: end}.get(number, end - 4)
        labels[row, first:end] = packed.call["input_ids"][row, first:end]
    rows = batch(model, [row for own in PACKS for row in own], "right")
    of_rows = torch.full_like(rows["input_ids"], -100)
    for number, (row, start, end) in enumerate(packed.spans):
        of_rows[number, : end - start] = labels[row, start:end]
    return packed, packed.call | {"labels": labels}, rows | {"labels": of_rows}


def shift(call: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**call, "shift_labels": pad(call["labels"], (0, 1), value=-100)[:, 1:].contiguous()}


def learned(model, call: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, and its gradients."""
    model.zero_grad()
    loss = model(**call, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {name: grad.clone() for name, grad in gradients.items()}


def checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """A layer whose hooks run inside its checkpoint, as under transformers 5.17."""

    def call(layer, *args, **kwargs):
        return checkpoint(partial(kind.__call__, layer, **kwargs), *args, use_reentrant=False)

    return type(kind.__name__, (kind,), {"__call__": call})


@pytest.mark.filterwarnings("ignore:prune. expected labels on answers alone")
@pytest.mark.parametrize(
    ("name", "logits", "form", "way"),
    [
        ("pyramiddrop", "all", "mask", "labels"),
        ("pyramiddrop", "supervised", "positions", "labels"),
        ("pyramiddrop", "full", "both", "labels"),
        ("pyramiddrop", "all", "positions", "shift_labels"),
        ("pyramiddrop", "supervised", "mask", "shift_labels"),
        ("pyramiddrop", "full", "positions", "shift_labels"),
        ("pyramiddrop", "supervised", "positions", "checkpointing"),
        ("pyramiddrop", "all", "mask", "hooks_computed_anew"),
        ("pool", "supervised", "mask", "labels"),  # gradients flow through its mixtures
        ("uniform", "full", "mask", "labels"),
    ],
)
@pytest.mark.share(2)
def test_a_step_is_that_of_the_sequences_as_rows(name, logits, form, way) -> None:
    model = build("llava").train()
    if way == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if way == "hooks_computed_anew":
        for layer in model.get_decoder().layers:
            layer.__class__ = checkpointed(type(layer))
    _, call, rows = answered(model, form)
    if way == "shift_labels":
        call, rows = shift(call), shift(rows)
    with tp.prune(model, tp.build_strategy(name), SCHEDULE, logits=logits) as trace:
        expected, gradients = learned(model, rows)
        kept = [own for stage in trace.stages for own in stage.kept]
        loss, own = learned(model, call)
        assert all(map(torch.equal, kept, (k for stage in trace.stages for k in stage.kept)))
    assert [len(own) for own in trace.stages[0].kept] == [9, 0, 32, 9, 16]
    torch.testing.assert_close(loss, expected)
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(own[key], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:prune. expected labels on answers alone")
@pytest.mark.parametrize("form", FORMS)
def test_full_logits_stand_where_the_ids_stand(form) -> None:
    model = build("llava")
    packed, call, _ = answered(model, form)
    with torch.no_grad():
        with tp.prune(model, PDROP, SCHEDULE, logits="full") as trace:
            got = model(**call, use_cache=False)
        everything = torch.ones(packed.visual.shape)
        with masked(
            model, everything, packed.visual, as_row(trace, packed), extra=0, apart=packed.apart
        ):
            expected = model(**call, use_cache=False)
    assert got.logits.shape == expected.logits.shape
    assert got.logits.isfinite().all()
    for number, (row, start, end) in enumerate(packed.spans):
        alive = torch.arange(start, end)[~packed.visual[row, start:end]]
        assert_close(got.logits[row, alive], expected.logits[row, alive])
        assert len(trace.stages[-1].kept[number]) <= int(packed.visual[row, start:end].sum())


@pytest.mark.parametrize("logits", ["all", "supervised", "full"])
@pytest.mark.parametrize("way", ["labels", "shift_labels"])
def test_no_sequence_is_predicted_by_the_one_before_it(way, logits) -> None:
    """Neither its first token nor, where an image is dropped whole, the first that is left."""
    model = build("llava")
    rows = [Row([5]), Row([(30, 60), 6]), Row([4, (30, 60), 2])]
    packed = pack(model, [rows], "positions")
    whole = batch(model, rows, "right")
    labels = packed.call["input_ids"].masked_fill(packed.visual, -100)
    labels[0, -2] = -100
    call = {**packed.call, "labels": labels}
    of_rows = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    of_rows[2, 20] = -100
    batched = {**whole, "labels": of_rows.masked_fill(all_visual(model, whole), -100)}
    if way == "shift_labels":
        call, batched = shift(call), shift(batched)
    nothing = tp.Schedule.one_shot(1, 0)
    with torch.no_grad(), tp.prune(model, UNIFORM, nothing, logits=logits) as trace:
        expected = model(**batched).loss
        loss = model(**call, use_cache=False).loss
    assert trace.lengths[-1].tolist() == [5, 6, 6]
    torch.testing.assert_close(loss, expected)


# --------------------------------------------------------------------- several axes, flash kernels


#: Sequences of each packed row: all in one, or in rows of different lengths.
ONE, SEVERAL = [[0, 1, 2, 3]], [[0, 1], [2], [3, 0, 1]]


def of_axes(
    specimen, model, form: str, packs=ONE, pads: int = 0
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Prompts of a model with M-RoPE packed into rows with pads on the right, and each alone."""
    kinds = [(3, "image", 5), (9,), (2, "image", 3, "image", 7), (1, "image", 12)]
    prompts = [kinds[number] for own in packs for number in own]
    alone = [specimen.batch(model, [prompt]) for prompt in prompts]
    whole = specimen.batch(model, prompts, "right")
    real = whole.pop("attention_mask").bool()
    lengths, numbers = real.sum(1).tolist(), iter(range(len(prompts)))
    members = [[next(numbers) for _ in own] for own in packs]
    width = max(sum(lengths[number] for number in own) for own in members) + pads

    def laid(parts: list[Tensor]) -> Tensor:
        """Tables (..., t) of each sequence as one (..., B, T)."""
        rows = [torch.cat([parts[number] for number in own], -1) for own in members]
        return torch.stack([pad(row, (0, width - row.shape[-1])) for row in rows], -2)

    call = {
        key: laid([row[own] for row, own in zip(value, real, strict=True)])
        if value.shape == real.shape
        else value
        for key, value in whole.items()
    }
    positions = []
    for one in alone:
        grids = {key: one[key] for key in ("image_grid_thw",) if key in one}
        axes, _ = model.model.get_rope_index(one["input_ids"], one["mm_token_type_ids"], **grids)
        length = axes.shape[-1]
        positions.append(torch.cat([torch.arange(length)[None], axes[:, 0].long()]))
    call["position_ids"] = laid(positions)
    if form != "positions":
        apart = torch.eye(width).bool().repeat(len(packs), 1, 1)
        for row, own in enumerate(members):
            block = torch.block_diag(*(torch.ones(lengths[n], lengths[n]).tril() for n in own))
            apart[row, : len(block), : len(block)] = block.bool()
        call["attention_mask"] = over_pairs(model, apart)
    if form == "mask":  # no axis of text
        call["position_ids"] = call["position_ids"][1:]
    return call, alone


def assert_as_alone(model, strategy, schedule, call, alone, packs=ONE) -> None:
    """Each sequence of packed rows gives what it gives alone."""
    ends, rows = [0] * len(packs), [row for row, own in enumerate(packs) for _ in own]
    with torch.no_grad(), tp.prune(model, strategy, schedule) as trace:
        together = model(**call, use_cache=False).logits
        stages, lengths = trace.stages, trace.lengths[-1].tolist()
        for number, (one, row) in enumerate(zip(alone, rows, strict=True)):
            expected = model(**one).logits[0]
            if trace.stages:
                assert_same_choice(stages, trace.stages, [(number, 0)])
            assert lengths[number] == len(expected)
            start, ends[row] = ends[row], ends[row] + len(expected)
            assert_close(together[row, start : ends[row]], expected, ALONE)
    assert max(ends) == together.shape[1]


AXES = {
    specimen.model_type: specimen
    for specimen in SPECIMENS
    if specimen.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
}


def needs_a_class(strategy: tp.PruningStrategy) -> bool:
    return any(getattr(need, "queries", "") == "class" for need in strategy.needs())


CLASSLESS = [strategy for strategy in EVERY if not needs_a_class(strategy)]


@pytest.mark.parametrize(
    ("model_type", "strategy", "attention", "form"),
    [
        pytest.param(*case, marks=() if place == number * 7 % 18 else pytest.mark.matrix)
        for number, strategy in enumerate(CLASSLESS)
        for place, case in enumerate(itertools.product(AXES, [strategy], ("sdpa", "eager"), FORMS))
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
@pytest.mark.share(3)
def test_a_sequence_with_positions_of_several_axes(model_type, strategy, attention, form) -> None:
    specimen = AXES[model_type]
    model = specimen.build(attention)
    call, alone = of_axes(specimen, model, form)
    schedule = tp.Schedule.pyramid(layers=list(specimen.cuts), lam=0.6)
    assert_as_alone(model, strategy, schedule, call, alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [(0,), (1, 4), (0, 2)])
@pytest.mark.share(2)
def test_features_that_come_after_the_first_cut_follow_their_sequences(cuts, form) -> None:
    """Which the model adds between its first layers, by a mask over the columns of the call."""
    specimen = AXES["qwen3_vl"]
    model = specimen.build("sdpa")
    call, alone = of_axes(specimen, model, form)
    stages = tuple(tp.Stage(cut, 0.6 ** (number + 1)) for number, cut in enumerate(cuts))
    assert_as_alone(model, PDROP, tp.Schedule(stages), call, alone)


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_several_rows_with_pads_and_positions_of_several_axes(model_type, form, pads) -> None:
    """Also where features come after the first cut."""
    specimen = AXES[model_type]
    model = specimen.build("sdpa")
    call, alone = of_axes(specimen, model, form, SEVERAL, pads)
    schedule = tp.Schedule((tp.Stage(1, 0.6), tp.Stage(4, 0.4)))
    assert_as_alone(model, PDROP, schedule, call, alone, SEVERAL)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ends", [False, True])
def test_flash_kernels_are_told_where_sequences_end(ends, policy) -> None:
    model = build("llava", "eager")
    packed = pack(model, [[*PACKS[0], *PACKS[1]]], "positions")
    lengths = [end - start for _, start, end in packed.spans]
    call = dict(packed.call)
    if ends:
        call |= varlen(lengths)
    with (
        torch.no_grad(),
        stand_in(),
        use_attention(model, "flash_attention_2"),
        tp.prune(model, PDROP, SCHEDULE, policy) as trace,
    ):
        together = model(**call, use_cache=False).logits
        found, stages = pieces(trace, packed), trace.stages
        for number, (row, piece) in enumerate(found):
            alone = model(**packed.alone[number]).logits[0]
            if trace.stages:
                assert_same_choice(stages, trace.stages, [(number, 0)])
            assert_close(together[row, piece], alone, ALONE)


def varlen(lengths: list[int]) -> dict[str, object]:
    """Where sequences end, as padding-free collators say it beside positions."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    most = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": most,
        "max_length_k": most,
    }


def test_the_end_of_a_lone_sequence_moves_too() -> None:
    """Padding-free batches of one say where it ends, which it no longer does after a cut."""
    model = build("llava", "eager")
    one = batch(model, ROWS[:1])
    length = one["input_ids"].shape[1]
    with (
        torch.no_grad(),
        stand_in(),
        use_attention(model, "flash_attention_2"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        expected = model(**one).logits
        del one["attention_mask"]
        positions = torch.arange(length)[None]
        got = model(**one, **varlen([length]), position_ids=positions, use_cache=False).logits
    assert torch.equal(got, expected)


# --------------------------------------------------------------------- of libraries' collators


def of_collator(model, more: bool) -> tuple[dict[str, object], list[dict[str, Tensor]]]:
    """Samples with answers, joined by transformers' collator for padding-free training."""
    rows = [ROWS[0], ROWS[3], ROWS[1]]
    samples, features = [batch(model, [row]) for row in rows], []
    for sample in samples:
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][:, :-3] = -100
        features.append({key: sample[key][0].tolist() for key in ("input_ids", "labels")})
    join = DataCollatorWithFlattening(return_flash_attn_kwargs=more, return_seq_idx=more)
    pixels = torch.cat([sample["pixel_values"] for sample in samples if "pixel_values" in sample])
    return {**join(features), "pixel_values": pixels}, samples


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_batches_of_the_flattening_collator(attention, more) -> None:
    flash = attention.startswith("flash")
    model = build("llava", "eager" if flash else attention)
    call, samples = of_collator(model, more)
    with ExitStack() as stack:
        if flash:
            stack.enter_context(stand_in())
            stack.enter_context(use_attention(model, attention))
        stack.enter_context(torch.no_grad())
        trace = stack.enter_context(tp.prune(model, PDROP, SCHEDULE, logits="supervised"))
        loss = model(**call, use_cache=False).loss
        assert trace.visual_lengths[-1].tolist() == [3, 3, 0]
        expected = sum(model(**sample).loss for sample in samples) / 3
    torch.testing.assert_close(loss, expected)


# --------------------------------------------------------------------------- asked and refused


@pytest.mark.parametrize(
    ("name", "form"), [("pyramiddrop", "mask"), ("uniform", "both"), ("fastervlm", "positions")]
)
def test_a_packed_call_asks_the_device_once(name, form) -> None:
    near_model = build("llava")
    model, call = far(near_model), far(pack(near_model, PACKS, form).call)
    strategy = tp.build_strategy(name)
    with torch.no_grad(), tp.prune(model, strategy, SCHEDULE):
        with Device():
            model(**call, use_cache=False)
        with Device() as device:
            model(**call, use_cache=False)
    # Where tokens stand goes up once a level.
    expected = {"fetch: read": 1, "_moved: upload": 1, "layout: upload": 1 + len(SCHEDULE.stages)}
    expected |= {"_placed: upload": 1} if vision_needs(strategy) else {}
    assert device.crossings == expected


def shared_prefix(model, packed: Packed) -> dict[str, Tensor]:
    """The second sequence's later tokens see the first one."""
    apart = packed.apart.clone()
    _, start, end = packed.spans[1]
    apart[0, start + 1 : end, :start] = True
    return {"attention_mask": over_pairs(model, apart)}


def hole(model, packed: Packed) -> dict[str, Tensor]:
    apart = packed.apart.clone()
    column = packed.spans[1][1] + 3
    apart[0, :, column] = apart[0, column] = False
    apart[0, column, column] = True
    return {"attention_mask": over_pairs(model, apart)}


def numbered(model, packed: Packed) -> dict[str, Tensor]:
    mask = torch.zeros(packed.visual.shape, dtype=torch.int64)
    for number, (row, start, end) in enumerate(packed.spans):
        mask[row, start:end] = number + 1
    return {"attention_mask": mask}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (shared_prefix, "an attention_mask under which one of several sees tokens of another"),
        (hole, "an attention_mask that hides tokens within one of several"),
        (numbered, r"an attention_mask with numbers up to 5\. Keep sequences apart by a mask"),
        (
            lambda model, packed: {"attention_mask": torch.ones(packed.visual.shape).long()},
            r"position_ids that start anew within one, beside an attention_mask, .* Leave it out",
        ),
        (
            lambda model, packed: {"use_cache": True},
            r"position_ids that .*, with a cache, .*get_text_config\(\)\.use_cache = False",
        ),
        (
            lambda model, packed: {
                "use_cache": True,
                "attention_mask": over_pairs(model, packed.apart),
            },
            r"several in a row, and a cache\. Pass use_cache=False",
        ),
        (
            lambda model, packed: {
                "position_ids": None,
                "cu_seq_lens_q": torch.tensor([0, 20, 31, 80]),
            },
            "cu_seq_lens_q of 3 and no position_ids that start anew with each",
        ),
    ],
    ids=["prefix", "hole", "numbers", "mask", "cache", "cache_and_mask", "ends"],
)
def test_what_cannot_be_kept_apart_is_refused(change, match) -> None:
    model = build("llava")
    packed = pack(model, PACKS, "positions")
    call = {"use_cache": False} | packed.call | change(model, packed)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"expected one sequence a row.* got {match}"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        model(**call)


def test_several_after_a_cache_are_refused() -> None:
    model = build("llava")
    packed = pack(model, PACKS[1:], "mask")
    with torch.no_grad(), tp.prune(model, PDROP, SCHEDULE):
        cache = model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
        packed.call["attention_mask"] = pad(packed.call["attention_mask"], (3, 0))
        packed.call["attention_mask"][..., : packed.spans[0][2], :3] = True
        with pytest.raises(ValueError, match="several in a row, and a cache"):
            model(**packed.call, past_key_values=cache)


def test_positions_of_one_axis_keep_nothing_apart_under_several() -> None:
    specimen = AXES["qwen2_5_vl"]
    model = specimen.build("eager")
    call, _ = of_axes(specimen, model, "positions")
    call["position_ids"] = call["position_ids"][0]
    schedule = tp.Schedule.one_shot(3, 0.5)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="got several that Qwen2_5_VLTextModel does not keep apart"),
        tp.prune(model, PDROP, schedule),
    ):
        model(**call, use_cache=False)


def test_rows_beyond_the_first_are_not_kept_apart_by_flash_kernels() -> None:
    model = build("llava", "eager")
    packed = pack(model, PACKS, "positions")
    with (
        torch.no_grad(),
        stand_in(),
        use_attention(model, "flash_attention_2"),
        pytest.raises(ValueError, match=r"in one of several rows, .* Flatten them to one row"),
        tp.prune(model, PDROP, SCHEDULE),
    ):
        model(**packed.call, use_cache=False)


def test_text_alone_is_passed_by() -> None:
    """Nothing is pruned, so nothing need be known."""
    model = build("llava")
    packed = pack(model, [[ROWS[1], Row([4])]], "positions")
    with torch.no_grad():
        expected = model(**packed.call, use_cache=True).logits
        with tp.prune(model, PDROP, SCHEDULE) as trace:
            assert torch.equal(model(**packed.call, use_cache=True).logits, expected)
    assert trace.stages == []
