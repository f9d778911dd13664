"""What a pruned run is compared with: the unmodified model, and how equal two runs are.

Bit for bit is a promise between the same operations on the same shapes. Products of other shapes
agree to rounding, which differs from one processor to the next: their logits are compared by
`assert_close`, and what is decided by them by `assert_same_tokens` and `assert_same_choice`,
which make sure that rounding could not have decided otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import IMAGE, NUM_LAYERS, ROWS, SEED, batch, build
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import tokenprune as tp
from tokenprune.strategy import vision_needs

SCHEDULE = tp.Schedule.pyramid(layers=[1, 2, 4], lam=0.6)
PDROP = tp.build_strategy("pyramiddrop")
STEPS = 5


@dataclass(frozen=True)
class Frozen(tp.ScoreStrategy):
    """A choice that depends on nothing but a token's place in the conversation."""

    def score(self, view: tp.TokenView) -> Tensor:
        return (view.positions * 37 % 101).float()


def runnable(
    families: Iterable[str], strategies: Iterable[tp.PruningStrategy]
) -> list[tuple[str, tp.PruningStrategy]]:
    """Families with the strategies that they can run: a plain language model has no vision tower.

    tests/engine/test_vision.py sees that it refuses the others.
    """
    pairs = itertools.product(families, strategies)
    return [(family, own) for family, own in pairs if family != "llama" or not vision_needs(own)]


def merges(strategy: tp.PruningStrategy) -> bool:
    """Whether a strategy mixes its survivors from others."""
    model = build("llava")
    schedule = tp.Schedule.one_shot(1, 0.6)
    with torch.no_grad(), tp.prune(model, strategy, schedule) as trace:
        model(**batch(model, [ROWS[0]]))
    return trace.stages[0].weights is not None


#: Fields of methods whose own do not fit tiny models, or cuts at any layer.
TINY = {
    "hiprune": {"middle": 0},
    "prumerge": {"space": "decoder"},
    "prumerge_plus": {"space": "decoder"},
    "visionzip": {"space": "decoder"},
    "vscan": {"shallow": 0, "window": 2},
}


def tiny(name: str) -> tp.PruningStrategy:
    """A strategy by its name, for tiny models."""
    return tp.build_strategy(name, **TINY.get(name, {}))


#: One of each method, and one whose budget follows the decoder; those that merge apart: no mask
#: gives what a mixture gives.
EVERY = [*(tiny(name) for name in tp.available()), tp.build_strategy("sparsevlm", version="1.0")]
MERGING = [strategy for strategy in EVERY if merges(strategy)]
DROPPING = [strategy for strategy in EVERY if strategy not in MERGING]


#: Where rounding could choose a token to say or to keep, another model and batch.
SEEDS = {"dart": 7, "evs": 7, "sparsevlm": 7, "vtw": 7}


def seed_of(strategy: tp.PruningStrategy) -> int:
    return SEEDS.get(strategy.name, SEED)


# ------------------------------------------------------------------------------------------- calls


def counted(strategy: tp.PruningStrategy, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs whose positions count from each row's first token where a method depends on that.

    Keys are rotated by their positions, and a forward call counts pads, where `generate` does not.
    """
    if not any(isinstance(need, tp.DecoderKeys) for need in strategy.needs()):
        return inputs
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return {**inputs, "position_ids": positions}


def split(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs that `generate` takes, and the visual mask beside them."""
    inputs = dict(inputs)
    return inputs, inputs.pop("visual_mask", None)


def generate(model, inputs, **options):
    inputs, _ = split(inputs)
    return model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=[IMAGE],  # a random model would say it, and then be asked for the image
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def all_visual(model, inputs) -> Tensor:
    if "visual_mask" in inputs:
        return inputs["visual_mask"]
    return tp.visual_mask(model, inputs["input_ids"])


# --------------------------------------------------------------------------- the unmodified model


@contextmanager
def masked(
    model,
    padding: Tensor,
    visual: Tensor,
    trace: tp.Trace,
    extra: int = STEPS + 1,
    apart: Tensor | None = None,
):
    """The unmodified model whose layers are given masks that hide what the trace dropped.

    `apart`, bool (B, T, T), says who sees whom where rows hold several sequences.
    """
    decoder = model.get_decoder()
    num_rows, prompt = visual.shape
    hidden_BLK = torch.zeros(num_rows, NUM_LAYERS, prompt + extra, dtype=torch.bool)
    for stage in trace.stages:
        for row, kept in enumerate(stage.kept):
            columns = visual[row].nonzero()[:, 0]
            dropped = torch.ones(len(columns), dtype=torch.bool)
            dropped[kept] = False
            hidden_BLK[row, stage.layer :, columns[dropped]] = True
    offsets = {}

    def hook(index):
        def before(module, args, kwargs):
            length = args[0].shape[1]
            cache = kwargs.get("past_key_values")
            offset = cache.get_seq_length(index) if cache is not None else 0
            offsets[index] = offset
            total = offset + length
            real = torch.nn.functional.pad(padding.bool(), (0, extra), value=True)[:, :total]
            causal = torch.arange(total) <= torch.arange(offset, total)[:, None]
            allowed = causal & (real & ~hidden_BLK[:, index, :total])[:, None, None]
            allowed = allowed if apart is None else allowed & apart[:, None]
            allowed = allowed | torch.eye(total, dtype=torch.bool)[offset:]
            low = torch.finfo(args[0].dtype).min
            mask = torch.zeros(allowed.shape, dtype=args[0].dtype)
            kwargs["attention_mask"] = mask.masked_fill(~allowed, low)
            return args, kwargs

        return before

    hooks = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def survivors(trace: tp.Trace, padding: Tensor, visual: Tensor, row: int) -> Tensor:
    """Columns of a row that reach the last layer."""
    alive = padding[row].bool() & ~visual[row]
    alive[visual[row].nonzero()[:, 0][trace.stages[-1].kept[row]]] = True
    return alive.nonzero()[:, 0]


# ------------------------------------------------------------------------------------ comparisons


def assert_close(ours: Tensor, theirs: Tensor, share: float = 1e-5) -> None:
    """Equal to a share of the largest logit.

    In float32 each of the two is ten times as far from what float64 gives.
    """
    limit = share * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)


def assert_same_tokens(ours: Any, theirs: Any, share: float = 1e-5) -> None:
    """Two generations with their logits: the same at every step, and so the same tokens."""
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert_close(a, b, share)
        assert_decided(b[..., :IMAGE], share)
    assert torch.equal(ours.sequences, theirs.sequences)


def assert_decided(logits: Tensor, share: float = 1e-5) -> None:
    """The most likely token leads by more than the logits of two runs differ."""
    first, second = logits.topk(2).values.unbind(-1)
    lead = (first - second).min().item()
    largest = logits[logits.isfinite()].abs().max().item()
    assert lead > 4 * share * largest, f"a token leads by {lead / largest:.1e}: take another seed"


@contextmanager
def decided(share: float = 3e-5) -> Iterator[None]:
    """Rounding chooses no token of a greedy generation inside its `with`."""
    original = LogitsProcessorList.__call__

    def watched(self: Any, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        scores = original(self, input_ids, scores, **options)
        assert_decided(scores, share)
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogitsProcessorList, "__call__", watched)
        yield


class Noise(LogitsProcessor):
    """Moves logits by up to a share of the largest."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.generator = share, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        largest = scores[scores.isfinite()].abs().max()
        noise = 2 * torch.rand(scores.shape, generator=self.generator) - 1
        return scores + self.share * largest * noise


def assert_steady(run: Callable[..., Tensor], expected: Tensor, share: float = 1e-4) -> None:
    """Rounding decides nothing in a generation: noise of several times its size changes no token.

    Args:
        run: Generates with what is given to it besides, and gives the tokens.
        expected: Its tokens.
        share: Of the noise.
    """
    for seed in range(3):
        shaken = run(logits_processor=[Noise(share, seed)])
        assert torch.equal(shaken, expected), "take another seed"


def assert_same_choice(
    ours: Sequence[tp.TracedStage],
    theirs: Sequence[tp.TracedStage],
    rows: Iterable[tuple[int, int]] | None = None,
) -> None:
    """The same survivors at every cut of two runs, in all rows or these pairs of them."""
    rows = [(row, row) for row in range(len(theirs[0].kept))] if rows is None else list(rows)
    for row, other in rows:
        assert is_decided(ours, theirs, row, other), "take another seed"
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.kept[row], b.kept[other])


def is_decided(
    ours: Sequence[tp.TracedStage], theirs: Sequence[tp.TracedStage], row: int, other: int
) -> bool:
    """Whether a row's survivors lead by more than its scores in two runs differ."""
    alive: Tensor | None = None
    for a, b in zip(ours, theirs, strict=True):
        before, alive = alive, b.kept[other]
        if b.scores is None or not len(b.scores[other]):
            continue
        first, second = a.scores[row], b.scores[other]
        assert_close(first, second, 1e-4)
        before = torch.arange(len(second)) if before is None else before
        kept = torch.isin(before, alive)
        difference = (first - second).abs().max()
        if difference > 0 and kept.any() and not kept.all():
            lead = second[kept].min() - second[~kept].max()
            if lead <= 2 * difference:
                return False
    return True
