"""Checks a call of any model type of the zoo.

Held against the unmodified model whose layers are given masks that hide what the trace says was
dropped, and whose survivors are mixed as it says (`zoo.checks.masked`), and against each row alone.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from zoo.checks import generate, masked, refusal, survivors
from zoo.flash import stand_in
from zoo.specimen import TEXT

import tokenprune as tp
from hunt.beasts import Beast, assistant_of, model_of
from hunt.replayed import held, replayed, traced
from hunt.verdict import CLOSE, same_choice
from tokenprune.families.anatomy import examine
from tokenprune.strategy import DecoderKeys

#: Entries of `Specimen.unable` that a way needs.
CHECKED = {"beams": "beams", "lookup": "prompt_lookup", "static": "static_cache"}


class Impossible(Exception):
    """The unmodified model cannot do it."""


def check(case: Beast, often: float = 1.0) -> list[str]:
    """`exact`, or why it was refused or is impossible; an error otherwise.

    Args:
        case: The case.
        often: How often it is had in other ways, as a share of the usual.
    """
    with stand_in() if case.attention.startswith("flash") else nullcontext():
        return _check(case, often)


def _check(case: Beast, often: float) -> list[str]:
    model = model_of(case.model_type, case.attention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models warn of much that is their own affair
        if CHECKED.get(case.way) in case.specimen.unable:
            return ["impossible unpruned"]
        try:
            inputs = case.specimen.batch(model, case.prompts, case.side)
            with torch.no_grad():
                model(**inputs, use_cache=False)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return ["impossible unpruned"]
        does = {"forward": _forward, "labels": _labels, "train": _train, "turns": _turns}
        try:
            does.get(case.way, _generates)(case, model, inputs)
        except Impossible:
            return ["impossible unpruned"]
        except ValueError as error:
            return [refusal(error).split(", got")[0].split(", for a strategy")[0]]
        return ["exact", *_in_other_ways(case, model, inputs, often)]


def _in_other_ways(
    case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor], often: float
) -> Iterator[str]:
    """A call without gradients by graphs; a generation by chance, and with an assistant."""
    rng = random.Random(f"{case.seed}:ways")
    if case.way in ("forward", "greedy") and rng.random() < often:
        yield from _replayed(case, model, inputs)
    if case.way != "greedy":
        return
    if rng.random() < 0.4 * often:
        yield _by_chance(case, model, inputs)
    if rng.random() < often:
        yield from _assisted(case, model)


def _replayed(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Iterator[str]:
    if not inputs["attention_mask"].all():  # rows with pads are refused
        inputs = case.specimen.batch(model, case.prompts[:1])
    by = functools.partial(_results, case, model, inputs)
    pixels = {key: own.flip(0) * 0.5 for key, own in inputs.items() if own.is_floating_point()}
    other = functools.partial(_results, case, model, inputs | pixels)
    try:
        expected = by(None)
    except ValueError as error:  # text of another row spared it that
        if "expected at least one token to be left" not in str(error):
            raise
    else:
        yield replayed(expected, by, other)


def _prune(case: Beast, model: PreTrainedModel, graphs: tp.Graphs | None = None) -> Any:
    options = case.policy, case.logits
    return tp.prune(model, case.strategy, case.schedule, *options, graphs=graphs)


def _results(
    case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor], graphs: tp.Graphs | None
) -> list[Tensor]:
    """All that a call gives."""
    with torch.no_grad(), _prune(case, model, graphs) as trace:
        if case.way == "greedy":
            output = generate(model, inputs)
            return [*output.logits, output.sequences, *held(output.past_key_values)]
        caches = random.Random(f"{case.seed}:caches").random() < 0.5
        cache = DynamicCache(config=model.config.get_text_config(decoder=True)) if caches else None
        output = model(**inputs, past_key_values=cache, use_cache=caches)
        return [output.logits, *traced(trace.stages), *held(cache)]


def _known(case: Beast, trace: tp.Trace) -> bool:
    """Whether masks and mixtures say all that a cut does."""
    before = any(getattr(own, "space", "") == "vision" for own in case.strategies)
    return case.policy == "original" and not before


def _forward(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad(), _prune(case, model) as trace:
        ours = model(**inputs, use_cache=False).logits
        stages = list(trace.stages)
    seen = tp.Trace(stages=stages)
    columns = [survivors(model, inputs, seen, row) for row in range(len(case.prompts))]
    whole = _is_whole(stages, tp.visual_mask(model, inputs["input_ids"]))
    ends = bool(inputs["attention_mask"][:, -1].all())
    rows = [_of_row(case, ours[row], own, whole, ends) for row, own in enumerate(columns)]
    if _known(case, trace):
        with torch.no_grad(), masked(model, inputs, seen):
            theirs = model(**inputs, use_cache=False).logits
        for row, own in enumerate(columns):
            torch.testing.assert_close(rows[row], theirs[row, own], **CLOSE)
    _check_scores(case, model, inputs, stages)
    _each_alone(case, model, stages, rows)


def _of_row(case: Beast, logits: Tensor, columns: Tensor, whole: bool, ends: bool) -> Tensor:
    """Logits of a row's survivors.

    Args:
        case: The case.
        logits: Of the row.
        columns: Of its survivors.
        whole: Whether no row lost a token: then those of all columns are there.
        ends: Whether every row ends in a token: then pads come first.
    """
    if case.logits == "full" or whole:
        return logits[columns]
    return logits[-len(columns) :] if ends else logits[: len(columns)]


def _is_whole(stages: Sequence[tp.TracedStage], visual: Tensor) -> bool:
    return [len(kept) for kept in stages[-1].kept] == visual.sum(1).tolist()


def _check_scores(
    case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor], stages: list[tp.TracedStage]
) -> None:
    """Of the first cut, attention scores are those of the model's own attention."""
    strategy, real = case.strategies[0], inputs["attention_mask"].bool()
    if not isinstance(strategy, tp.AttentionStrategy) or "scores" in case.specimen.unable:
        return
    if case.attention != "eager":  # its model has the same weights
        model = model_of(case.model_type, "eager")
    with torch.no_grad():
        weights = model(**inputs, use_cache=False, output_attentions=True).attentions
    layer = case.schedule.stages[0].layer - (strategy.source == "previous")
    visual = tp.visual_mask(model, inputs["input_ids"])
    for row, ours in enumerate(stages[0].scores):
        own = real[row].nonzero()[:, 0]
        rows = own if strategy.queries == "all" else own[-1:]
        theirs = weights[layer][row].mean(0)[rows].mean(0)[visual[row]]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-3)


def _each_alone(
    case: Beast, model: PreTrainedModel, stages: list[tp.TracedStage], rows: list[Tensor]
) -> None:
    """Each row of a batch is what it is alone, as far as the unmodified model's are."""
    if "batch_is_alone" in case.specimen.unable or len(case.prompts) == 1:
        return
    if _by_position(case) and case.side == "left":
        return  # keys are turned by positions that count the pads
    with torch.no_grad(), _entering(model) as entering, _prune(case, model) as trace:
        for row, prompt in enumerate(case.prompts):
            entering.clear()
            inputs = case.specimen.batch(model, [prompt], case.side)
            try:
                alone = model(**inputs, use_cache=False).logits[0]
            except ValueError as error:
                if "expected at least one token to be left" in str(error):
                    continue  # text of another row spared the batch that
                raise
            theirs = list(trace.stages)
            marks = tp.visual_mask(model, inputs["input_ids"])
            if not theirs or not _same_choices(stages, theirs, row, entering[0][marks]):
                continue
            own = survivors(model, inputs, tp.Trace(stages=theirs), 0)
            whole = _is_whole(theirs, marks)
            torch.testing.assert_close(rows[row], _of_row(case, alone, own, whole, True), **CLOSE)


def _by_position(case: Beast) -> bool:
    """Whether a choice depends on where pads stand, if they are counted."""
    return any(isinstance(need, DecoderKeys) for own in case.strategies for need in own.needs())


def _same_choices(
    ours: list[tp.TracedStage], theirs: list[tp.TracedStage], row: int, embeds: Tensor
) -> bool:
    """Whether a row kept the same alone; False where rounding may have decided."""
    return all(
        same_choice(
            a.kept[row].tolist(),
            b.kept[0].tolist(),
            (None if a.scores is None else a.scores[row], b.scores and b.scores[0]),
            embeds,
        )
        for a, b in zip(ours, theirs, strict=True)
    )


@contextmanager
def _entering(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Notes what enters the first layer."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    hook = examine(model).layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


# ----------------------------------------------------------------------------------------- learning


def _answers(case: Beast, inputs: dict[str, Tensor]) -> Tensor:
    """Labels of the last token or two of each row; of a row that ends so, it asks for itself."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, prompt in enumerate(case.prompts):
        # A first token would be predicted by a pad.
        columns = inputs["attention_mask"][row].nonzero()[1:, 0][-min(2, int(prompt[-1])) :]
        labels[row, columns] = inputs["input_ids"][row, columns]
    return labels


def _labels(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    labels = _answers(case, inputs)
    with torch.no_grad(), _prune(case, model) as trace:
        ours = model(**inputs, labels=labels, use_cache=False).loss
        seen = tp.Trace(stages=list(trace.stages))
    if not _known(case, trace):
        return
    with torch.no_grad(), masked(model, inputs, seen):
        logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(ours, _loss(model, inputs, labels, logits, seen), **CLOSE)


def _loss(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor, logits: Tensor,
    trace: tp.Trace,
) -> Tensor:  # fmt: skip
    """Of each label, as the survivor before it predicts it."""
    total, count = torch.zeros(()), 0
    for row in range(len(labels)):
        own = survivors(model, inputs, trace, row)
        given = labels[row, own]
        total = total + nn.functional.cross_entropy(
            logits[row, own][:-1].float(), given[1:], ignore_index=-100, reduction="sum"
        )
        count += int((given[1:] != -100).sum())
    return total / count


def _train(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Gradients, with and without checkpoints, are those of the unmodified model."""
    labels = _answers(case, inputs)
    found, ways = [], [None, False, True]
    counted = [(buffer, buffer.clone()) for buffer in model.buffers()]  # averages of a tower
    model.train()
    try:
        if not _takes_reentrant(model, inputs, labels):
            ways.pop()
        for checkpointing in ways:
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.zero_grad()
            with _prune(case, model) as trace:
                loss = model(**inputs, labels=labels, use_cache=False).loss
                loss.backward()
                seen = tp.Trace(stages=list(trace.stages))
            found.append(_gradients(model))
            _uncheckpointed(model)
        for other in found[1:]:  # reentrant ones stop at the tower, whose input needs no gradient
            _near(other, {name: found[0][name] for name in other}, "checkpoints: ")
        if not _known(case, trace):
            return
        model.zero_grad()
        with masked(model, inputs, seen):
            logits = model(**inputs, use_cache=False).logits
            expected = _loss(model, inputs, labels, logits, seen)
        torch.testing.assert_close(loss, expected, **CLOSE)
        expected.backward()
        _near(found[0], _gradients(model))
    finally:
        _uncheckpointed(model)
        model.zero_grad()
        model.eval()
        for buffer, before in counted:
            buffer.data.copy_(before)


def _takes_reentrant(model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor) -> bool:
    """Whether the unmodified model can be trained so: some hand one tensor to several layers."""
    model.gradient_checkpointing_enable({"use_reentrant": True})
    try:
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    except RuntimeError:
        return False
    finally:
        _uncheckpointed(model)
    return True


def _uncheckpointed(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()  # whose hooks stay otherwise


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _near(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str = "") -> None:
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        apart = float((ours[name] - gradient).abs().max())
        assert apart <= 2e-3 * float(gradient.abs().max()) + 1e-5 * largest, what + name


# --------------------------------------------------------------------------------------- generation


def _generates(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    options: dict[str, Any] = {"greedy": {}, "beams": beams}.get(case.way, {})
    more: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }.get(case.way, {})
    if case.way == "lookup":  # something to look up
        inputs["input_ids"][:, -2:] = inputs["input_ids"][:, -5:-3]
    try:
        generate(model, inputs, **options, **more)
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Impossible from error
    with torch.no_grad(), _prune(case, model) as trace:
        model(**inputs, use_cache=False)
        seen = tp.Trace(stages=list(trace.stages))
        got = generate(model, inputs, **options)
        if more:
            other = generate(model, inputs, **more)
    if more:
        _same_words(other, got)
    if not _known(case, trace) or _by_position(case):
        return  # positions that count the pads, where `generate` counts none, turn other keys
    with torch.no_grad(), masked(model, inputs, seen):
        expected = generate(model, inputs, **options)
    if case.way == "beams":
        torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, **CLOSE)
    else:
        _same_words(got, expected)


def _by_chance(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> str:
    """Logits of each step are right, up to another word, and words are drawn from them."""
    options = {"do_sample": True, "top_k": 0, "output_scores": True}

    def drawn() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = generate(model, inputs, **options)
            torch.manual_seed(0)
            words = [torch.multinomial(own.softmax(-1), 1) for own in output.scores]
        assert torch.equal(output.sequences[:, -len(words) :], torch.cat(words, 1)), "words"
        return output

    with torch.no_grad(), _prune(case, model) as trace:
        model(**inputs, use_cache=False)
        seen = tp.Trace(stages=list(trace.stages))
        ours = drawn()
    if _known(case, trace) and not _by_position(case):
        with torch.no_grad(), masked(model, inputs, seen):
            theirs = drawn()
        for step, pair in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            torch.testing.assert_close(*pair, **CLOSE)
            words = [each.sequences[:, step - len(ours.logits)] for each in (ours, theirs)]
            if not torch.equal(*words):
                break  # rounding, at the edge of a chance
    return "sample: exact"


def _assisted(case: Beast, model: PreTrainedModel) -> Iterator[str]:
    """What a model without pruning guesses changes no word of the first row's."""
    if "prompt_lookup" in case.specimen.unable:
        return
    inputs = case.specimen.batch(model, case.prompts[:1])
    helps = {"assistant_model": assistant_of(case.model_type), "max_new_tokens": 8}
    try:
        generate(model, inputs, **helps)
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError):
        return
    try:
        with torch.no_grad(), _prune(case, model):
            plain = generate(model, inputs, max_new_tokens=8)
            guessed = generate(model, inputs, **helps)
    except ValueError as error:
        yield f"assisted: {refusal(error)}".split(", got")[0]
    else:
        _same_words(guessed, plain)
        yield "assisted: exact"


def _same_words(ours: Any, theirs: Any) -> None:
    """The same logits, step by step, up to where rounding may choose a token."""
    start = ours.sequences.shape[1] - len(ours.logits)
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE)
        said, expected = ours.sequences[:, start + step], theirs.sequences[:, start + step]
        if not torch.equal(said, expected):
            first, second = b[..., :TEXT].topk(2).values.unbind(-1)
            assert (first - second)[said != expected].max() < 1e-3, "other tokens"
            return


# -------------------------------------------------------------------------------- several turns


def _turns(case: Beast, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Text turns go on from the cache of a prompt."""
    num_rows = len(case.prompts)
    words = torch.Generator().manual_seed(len(case.seed))
    plain = bool(inputs["attention_mask"].all())  # then it goes without a mask
    between = functools.partial(_between, case, model, plain)
    says = [torch.randint(1, TEXT, (num_rows, n), generator=words) for n in (1, 4, 1)]

    def talk(does: Callable[[Any, Tensor], tuple[Any, Tensor]]) -> list[Tensor]:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        mask, rows = inputs["attention_mask"], torch.arange(num_rows)
        logits = [model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
        for turn, ids in enumerate(says):
            if turn == 1:
                cache, rows = does(cache, mask)
                mask = mask[rows]
            mask = nn.functional.pad(mask, (0, ids.shape[1]), value=1)
            more = {} if plain else {"attention_mask": mask}
            output = model(input_ids=ids[rows], **more, past_key_values=cache)
            logits.append(output.logits[:, -1])
        return logits

    try:
        with torch.no_grad():
            talk(between)
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Impossible from error
    with torch.no_grad(), _prune(case, model) as trace:
        ours = talk(between)
        seen = tp.Trace(stages=list(trace.stages))
    if not _known(case, trace):
        return
    with torch.no_grad(), masked(model, inputs, seen, extra=20):
        theirs = talk(between)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def _between(
    case: Beast, model: PreTrainedModel, plain: bool, cache: Any, mask: Tensor
) -> tuple[Any, Tensor]:
    """What is done to a cache, and which rows it holds then."""
    rows = torch.arange(len(mask))
    if case.after in ("copy", "crop"):
        left = cache
        cache = copy.deepcopy(cache) if case.after == "copy" else cache
        more = {} if plain else {"attention_mask": nn.functional.pad(mask, (0, 2), value=1)}
        model(input_ids=torch.full((len(mask), 2), 5), **more, past_key_values=left)
        if case.after == "crop":
            cache.crop(-2)
    elif case.after == "repeat":
        cache.batch_repeat_interleave(2)
        rows = rows.repeat_interleave(2)
    return cache, rows
