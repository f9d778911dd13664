"""Whether a case went right: every row what it must be, or refused for a reason that it gives."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from zoo.flash import stand_in

import tokenprune as tp
from hunt.cases import NEW_TOKENS, Case, reasons
from hunt.draw import draw_ways
from hunt.packed import PackedConversation, draw_packs
from hunt.pictures import model_of, picture
from hunt.reference import Row, as_cut, tower
from hunt.replayed import draw_replayed, other_numbers, replayed
from hunt.talk import BEAMS, CHANCE, TEMPERATURE, Conversation, gradients
from hunt.witness import Witness
from tokenprune.strategy import DecoderKeys, Entered, Normed, decoder_rows
from tokenprune.tensors import top_k

CLOSE = {"atol": 3e-4, "rtol": 1e-3}
SCORES = {"atol": 2e-5, "rtol": 2e-3}
#: Of what a row alone is refused for: text of another row, or a pad between, spares a batch that.
SPARED = ("expected at least one token to be left", "expected an image in one call")
#: Two ways to the same in bfloat16: norm of what differs, as a share of the whole's.
ROUGH = 0.5


def check(case: Case, often: float = 1.0) -> list[str]:
    """Of each way to have the conversation `exact`, or why it was refused; an error otherwise.

    Args:
        case: The case.
        often: How often it is had in other ways, as a share of the usual.
    """
    with stand_in() if case.attention.startswith("flash") else nullcontext():
        outcomes = [_check(Conversation(case))]
        packs = draw_packs(case, often)
        if packs is not None:
            try:
                outcomes.append(f"packed: {_check(PackedConversation(case, packs))}")
            except Exception as error:
                error.add_note(str(packs))
                raise
        for other in draw_ways(case, often):
            outcomes.append(_check_way(other))
        own = draw_replayed(case, often)
        if own is not None and outcomes[0] == "exact":
            outcomes.append(_check_replayed(own))
    return outcomes


def _check_way(case: Case) -> str:
    """A generation by chance, or with guesses: logits as ever, and the words that they call for."""
    conversation, last = Conversation(case), case.turns[-1]
    outcome = _check(conversation)
    if outcome == "exact":
        said = conversation.output.sequences[:, -last.new_tokens :]
        logits = conversation.output.logits
        assert len(logits) == last.new_tokens
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(CHANCE)
            for step, own in enumerate(logits):
                chances = (own.float() / TEMPERATURE).softmax(-1)
                drawn = torch.multinomial(chances, 1)[:, 0]
                words = drawn if last.way == "sample" else own.argmax(-1)
                assert torch.equal(said[:, step], words), f"word {step}"
    return f"{last.way}: {outcome}"


def _check_replayed(case: Case) -> str:
    def results(graphs: tp.Graphs | None, case: Case = case) -> list[Tensor]:
        conversation = Conversation(case, graphs)
        conversation.run()
        return conversation.results()

    def other(graphs: tp.Graphs) -> None:
        try:
            results(graphs, other_numbers(case))
        except ValueError as error:  # guesses are others
            if not any(reason in str(error) for reason in reasons(case)):
                raise

    try:
        expected = results(None)
    except ValueError as error:  # text of another row spared it that
        if any(reason in str(error) for reason in reasons(case)):
            return "not replayed: refused"
        raise
    return replayed(expected, results, other)


def _check(conversation: Conversation) -> str:
    case = conversation.case
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="prune: expected labels on answers alone")
            conversation.run()
    except ValueError as error:
        message = str(error)
        known = next((reason for reason in reasons(case) if reason in message), None)
        if known is None:
            raise
        return known
    trains = bool(conversation.gradients)
    low = torch.autocast("cpu", torch.bfloat16) if case.precision != "float32" else nullcontext()
    sums, counts = [], []
    with torch.set_grad_enabled(trains), low:
        for number, told in enumerate(conversation.told):
            if not any(call.tokens for call in told):
                continue
            row = Row(case, told)
            check_row(row)
            if case.turns[-1].way == "beams" and row.alive[-1][-1]:  # else an earlier one answers
                _check_beams(row, conversation.output, number)
            if case.precision == "float32" and _is_thorough(case):
                with torch.no_grad():
                    _check_alone(row)
            if case.turns[-1].labelled and told[-1].tokens:
                total, count = _loss(row)
                sums.append(total)
                counts.append(count)
    if not sum(counts):
        return "exact"
    loss = sum(sums) / sum(counts)
    for ours in conversation.losses:
        _close(ours, loss.detach(), case, atol=3e-4, rtol=1e-3)
    if trains:
        _check_gradients(case, conversation, loss)
    return "exact"


def _is_thorough(case: Case) -> bool:
    """Whether a case is also run row by row: every third is."""
    return int(case.seed.rpartition(":")[2]) % 3 == 0


def _close(ours: Tensor, theirs: Tensor, case: Case, **limits: float) -> None:
    if case.precision == "float32":
        torch.testing.assert_close(ours, theirs, **limits)
        return
    apart = (ours - theirs).float().norm()
    assert apart <= ROUGH * theirs.float().norm(), f"{apart} apart"


def check_row(row: Row) -> None:
    """Holds a row against the unmodified model."""
    for number, call in enumerate(row.told):
        own = (row.turns == number) & row.alive[-1]
        if call.logits is not None and own.any():
            _close(call.logits.float(), row.logits[own][call.which].detach().float(), row.case,
                   **CLOSE)  # fmt: skip
        if call.counts is not None:
            assert call.counts == int(own.sum()), "trace.lengths"
    for number in row.shown:
        for stage, strategy in enumerate(row.case.strategies):
            _check_choice(row, number, stage)
            if isinstance(strategy, Witness) and row.case.precision == "float32":
                _check_witness(row, number, stage, strategy)


def _check_choice(row: Row, number: int, stage: int) -> None:
    """Attention scores are those of the unmodified layers, and the highest are kept."""
    strategy, cut = row.case.strategies[stage], row.told[number].stages[stage]
    before = row.before(stage, number)
    if cut.scores is None or not len(before):
        return
    numbers = ((row.turns == number) & row.visual).nonzero()[:, 0].tolist()
    candidates = [numbers.index(column) for column in before.tolist()]
    chosen = top_k(cut.scores[None], None, torch.tensor([len(cut.kept)]))[0]
    assert [n for n, yes in zip(candidates, chosen, strict=True) if yes] == cut.kept, "top k"
    if not isinstance(strategy, tp.AttentionStrategy):
        return
    for request in decoder_rows(strategy):
        weights = _rows(row, number, stage, request)
        if weights is not None:
            _close(cut.scores, weights.mean(0).float(), row.case, **SCORES)


def _rows(row: Row, number: int, stage: int, request: Any) -> Tensor | None:
    """Attention (H, V), or (H, S, V) of text, that the unmodified layer pays; None if unknown."""
    if not row.comparable(number, request.source):
        return None
    layer, view = row.view_at(stage, number, request.source)
    before, alive = row.before(stage, number), row.alive[stage]
    weights = row.attentions[layer][view].detach()[..., before]
    if request.queries == "text":
        return weights[:, row.prompt(number)]
    own = ((row.turns == number) & alive).nonzero()[:, 0]
    if request.queries == "all":
        return weights[:, own].mean(1)
    asking = row.asking(number)
    if not asking:
        return None
    rows = [column for column in asking if alive[column]] or [int(own[-1])]
    return weights[:, rows].mean(1)


def _check_witness(row: Row, number: int, stage: int, strategy: Witness) -> None:
    """What a strategy is shown is what the unmodified model has."""
    seen, before = row.told[number].stages[stage].seen, row.before(stage, number)
    if seen is None:  # nothing was alive in any row
        assert not len(before)
        return
    call, cut = row.told[number], row.case.cuts[stage]
    own = ((row.turns == number) & row.visual).nonzero()[:, 0]
    view = 1 + row.views.index((stage, number))
    entered, text = row.entered[cut][view], row.prompt(number)
    assert seen["original"] == len(own)
    start = call.positions[0] if number == 0 else 0
    assert seen["positions"].tolist() == (row.given[before] - start).tolist()
    torch.testing.assert_close(seen["hidden"], entered[before], **CLOSE)
    _check_places(row, number, seen["places"], torch.isin(own, before))
    for need in strategy.wants:
        if isinstance(need, tp.DecoderRows):
            expected = _rows(row, number, stage, need)
            if expected is not None and (need.queries != "text" or tp.Text() in strategy.wants):
                torch.testing.assert_close(seen[need], expected, **SCORES)
        elif isinstance(need, DecoderKeys) and row.comparable(number, need.source):
            keys = row.keys(*row.view_at(stage, number, need.source))
            torch.testing.assert_close(seen[need][0], keys[before], **CLOSE)
            if seen[need][1] is not None:
                torch.testing.assert_close(seen[need][1], keys[text], **CLOSE)
        elif isinstance(need, Normed):
            normed = model_of(row.case.family, "eager").get_decoder().norm(entered)
            torch.testing.assert_close(seen[need][0], normed[before], **CLOSE)
            if seen[need][1] is not None:
                torch.testing.assert_close(seen[need][1], normed[text], **CLOSE)
        elif isinstance(need, tp.Change):
            earlier = row.into(*row.view_at(stage, number, need.source))[0]
            torch.testing.assert_close(seen[need], (entered - earlier)[before], **CLOSE)
        elif isinstance(need, tp.Projected):
            expected = row.followed(row.embeds[own], stage, number, ahead=True)
            torch.testing.assert_close(seen[need], expected, **CLOSE)
        elif isinstance(need, Entered):
            torch.testing.assert_close(seen[need], row.embeds[own])
        elif isinstance(need, tp.Text):
            embeddings, follows, positions = seen[need]
            torch.testing.assert_close(embeddings, row.embeds[text])
            assert follows.tolist() == [column > int(own[-1]) for column in text]
            assert positions.tolist() == (row.given[text] - start).tolist()
        elif isinstance(need, tp.VisionRows | tp.VisionStates):
            whole = row.pictures(number, tower(row.case.family, need))
            expected = row.followed(whole, stage, number)
            torch.testing.assert_close(seen[need], expected, **CLOSE)
    if "tiles" in seen:
        _check_tiles(row, number, stage, seen)


def _check_places(row: Row, number: int, places: Tensor, alive: Tensor) -> None:
    if row.case.family == "llama":
        return
    sizes = [len(picture(row.case.family, *own).features) for own in row.told[number].images]
    image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert places[:, 0].tolist() == image[alive].tolist(), "images"
    if row.case.family == "llava":
        place = torch.arange(len(image))[alive] % 16
        assert places[:, 1:].tolist() == [[0, p // 4, p % 4] for p in place.tolist()], "places"


def _check_tiles(row: Row, number: int, stage: int, seen: dict[Any, Any]) -> None:
    """Tiles and patches are those of the seats."""
    own = ((row.turns == number) & row.visual).nonzero()[:, 0]
    tiles, start = [], 0
    for image in row.told[number].images:
        patch = picture(row.case.family, *image).patch
        tiles.append(torch.where(patch < 0, -1, patch // 16 + start))
        start = int(tiles[-1].max()) + 1
    expected = torch.cat(tiles)[torch.isin(own, row.before(stage, number))]
    ours = seen["tiles"]
    assert ((ours < 0) == (expected < 0)).all(), "tiles"
    same = ours[:, None] == ours
    assert torch.equal(same, expected[:, None] == expected), "tiles"
    has = row.followed((torch.cat(tiles) >= 0).float()[:, None], stage, number)[:, 0]
    mixes = any(m.turn == number and m.stage < stage for m in row.mixtures)
    assert mixes or torch.equal(seen["patches"], has > 0), "patches"


# ------------------------------------------------------------------------------- whole generations


def _check_beams(row: Row, output: Any, number: int) -> None:
    """A beam search is the unmodified model's from the row alone."""
    case, (told, *_) = row.case, row.told
    call: dict[str, Any] = {"input_ids": torch.tensor([[token.id for token in told.tokens]])}
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    call |= _pixels(row, 0)
    with as_cut(case, row):
        expected = model_of(case.family, "eager").generate(
            **call, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=BEAMS,
            num_return_sequences=BEAMS, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    own = slice(number * BEAMS, (number + 1) * BEAMS)
    torch.testing.assert_close(
        output.sequences_scores[own], expected.sequences_scores, atol=1e-4, rtol=1e-4
    )
    said = output.sequences[own, -NEW_TOKENS:]
    scores = expected.sequences_scores
    if (scores[0] - scores[1]).abs() > 1e-3:
        assert torch.equal(said[0], expected.sequences[0, -NEW_TOKENS:]), "beams"


def _pixels(row: Row, number: int) -> dict[str, Tensor]:
    images = row.told[number].images
    if row.case.family == "llama" or not images:
        return {}
    shown = [picture(row.case.family, *image).pixels for image in images]
    if row.case.family == "llava":
        return {"pixel_values": torch.cat(shown)}
    most = max(tiles.shape[1] for tiles in shown)
    padded = [nn.functional.pad(t, (0, 0) * 3 + (0, most - t.shape[1])) for t in shown]
    return {
        "pixel_values": torch.cat(padded),
        "image_sizes": torch.tensor([image[1] for image in images]),
    }


# -------------------------------------------------------------------------------------- a row alone


def _check_alone(row: Row) -> None:
    """A row of a batch is what it is alone."""
    if row.case.attention.startswith("flash") and (row.given.diff() != 1).any():
        return  # gaps pass for packed sequences, unpruned too
    case, model = row.case, model_of(row.case.family, row.case.attention)
    cache = DynamicCache(config=model.config.get_text_config()) if len(row.told) > 1 else None
    real, visual = 0, torch.zeros(1, 0, dtype=torch.bool)
    with (
        warnings.catch_warnings(),
        tp.prune(model, case.strategy, case.schedule, case.policy) as trace,
    ):
        warnings.filterwarnings("ignore", message="prune: expected labels on answers alone")
        seen = 0
        for number, told in enumerate(row.told):
            if not told.tokens:
                continue
            ids = torch.tensor([[token.id for token in told.tokens]])
            marks = torch.tensor([[token.visual for token in told.tokens]])
            visual, real = torch.cat([visual, marks], 1), real + ids.shape[1]
            call: dict[str, Any] = {
                "input_ids": ids,
                "attention_mask": torch.ones(1, real, dtype=torch.int64),
                "position_ids": torch.tensor([told.positions]),
                **_pixels(row, number),
            }
            if case.family == "llama":
                call["visual_mask"] = visual
            if case.words == "embeds":
                call["inputs_embeds"] = model.get_input_embeddings()(call.pop("input_ids"))
            if case.turns[-1].labelled and number == len(row.told) - 1:
                call["labels"] = torch.tensor([[token.label for token in told.tokens]])
            try:
                output = model(**call, past_key_values=cache, use_cache=cache is not None)
            except ValueError as error:
                if any(reason in str(error) for reason in SPARED):
                    return
                raise
            if marks.any():
                embeds = row.embeds[(row.turns == number) & row.visual]
                for ours, theirs in zip(told.stages, trace.stages, strict=True):
                    kept = (theirs.kept[0] - seen).tolist()
                    scores = (ours.scores, None if theirs.scores is None else theirs.scores[0])
                    if not same_choice(ours.kept, kept, scores, embeds):
                        return
                seen += int(marks.sum())
            if told.logits is not None and told.which:
                torch.testing.assert_close(told.logits, output.logits[0, told.which], **CLOSE)


def same_choice(
    kept: list[int], alone: list[int], scores: tuple[Tensor | None, Tensor | None], embeds: Tensor
) -> bool:
    """Whether a row kept the same in a batch and alone; False where rounding may have decided.

    Args:
        kept: Numbers of its tokens.
        alone: The same of the row alone.
        scores: Of both, of what was alive.
        embeds: What entered the decoder, of all its tokens (V, D): some, as newlines, are alike.
    """
    ours, theirs = scores
    if ours is not None and theirs is not None:
        torch.testing.assert_close(ours, theirs, equal_nan=True, **SCORES)
    if kept == alone:
        return True
    words = f"kept {kept}, alone {alone}"
    if theirs is not None:
        order = theirs.sort(descending=True).values
        assert order[len(alone) - 1] - order[len(alone)] < 1e-5, words
        return False
    here, there = (sorted(set(a) - set(b)) for a, b in ((kept, alone), (alone, kept)))
    apart = torch.cdist(embeds[here].float(), embeds[there].float())
    assert apart.numel(), words
    assert max(apart.amin(0).max(), apart.amin(1).max()) < 1e-3, words
    return False


# ----------------------------------------------------------------------------------------- learning


def _loss(row: Row) -> tuple[Tensor, int]:
    """Loss of the last turn, summed, and over how many labels."""
    own = ((row.turns == len(row.told) - 1) & row.alive[-1]).nonzero()[:, 0]
    labels = torch.tensor([row.tokens[index].label for index in own.tolist()])
    loss = nn.functional.cross_entropy(
        row.logits[own][:-1].float(), labels[1:], ignore_index=-100, reduction="sum"
    )
    return loss, int((labels[1:] != -100).sum())


def _check_gradients(case: Case, conversation: Conversation, loss: Tensor) -> None:
    """Those of the unmodified model, whose rows run one by one."""
    model = model_of(case.family, "eager")
    loss.backward()
    try:
        expected = gradients(model)
    finally:
        model.zero_grad(set_to_none=True)
    assert conversation.gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        apart = float((conversation.gradients[name] - gradient).abs().max())
        assert apart <= 1e-3 * float(gradient.abs().max()) + 1e-5 * largest, f"gradient of {name}"
