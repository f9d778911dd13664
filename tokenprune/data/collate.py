"""Samples to model inputs, for any Hugging Face processor.

The processor's chat template writes the prompts; without one, LLaVA's plain form does. Paddings are
passed per call: the processor stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from tokenprune.data.sample import Sample, Turn

#: Labels of positions that carry no loss.
IGNORED = -100
_PROBE = "0"


class PromptCollator:
    """Prompts that end where the answer begins, padded on the left.

    Only the first turn of a sample is asked.

    Args:
        processor: Belongs to the model.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self._writer = _Writer(processor)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Inputs for `generate`, and the samples."""
        texts = [self._writer.prompt(sample, sample.turns[:1]) for sample in samples]
        inputs = _process(self.processor, texts, samples, "left")
        return {"inputs": inputs, "samples": list(samples)}


class ConversationCollator:
    """Whole conversations with labels on what the model is to write, padded on the right.

    Labelled is what follows each generation prompt, up to and with the token that ends the answer.
    A template that ends answers with no special token gets the tokenizer's end-of-sequence token:
    a model trained without one never stops.

    Args:
        processor: Belongs to the model; its tokenizer must be a fast one.

    Raises:
        ValueError: The tokenizer gives no character offsets.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        if not processor.tokenizer.is_fast:
            raise ValueError(
                f"ConversationCollator: expected a fast tokenizer, got "
                f"{type(processor.tokenizer).__name__}. Load the processor with a tokenizer.json."
            )
        self.processor = processor
        self._writer = _Writer(processor)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Inputs with `labels`, int64 (B, T), and the samples."""
        texts = [self._writer.conversation(sample) for sample in samples]
        inputs = _process(self.processor, texts, samples, "right")
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        lengths = inputs["attention_mask"].sum(1).tolist()
        for row, (sample, text, length) in enumerate(zip(samples, texts, lengths, strict=True)):
            spans = self._writer.answers(sample, text)
            own = inputs["input_ids"][row, :length]
            labels[row, :length] = _labels(self.processor.tokenizer, text, spans, own, sample.id)
        inputs["labels"] = labels
        return {"inputs": inputs, "samples": list(samples)}


class _Writer:
    """Prompts and conversations as text."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self._processor = processor
        self._template = getattr(processor, "chat_template", None)
        self._image_token: str | None = getattr(processor, "image_token", None)
        if self._template is None and self._image_token is None:
            raise ValueError(
                "collate: expected a processor with a chat template or an image token, got "
                f"{type(processor).__name__} with neither. Set processor.chat_template."
            )
        self._end = ""
        # Does the template itself end an answer by a special token?
        text = self._render([Turn(_PROBE, _PROBE)])
        after = text[text.rindex(_PROBE) + len(_PROBE) :]
        tokenizer = processor.tokenizer
        # Some chat models' end of turn is special, but none of the named special tokens.
        added = [own.content for own in tokenizer.added_tokens_decoder.values() if own.special]
        if not any(token in after for token in (*tokenizer.all_special_tokens, *added)):
            self._end = tokenizer.eos_token or ""

    def prompt(self, sample: Sample, turns: Sequence[Turn]) -> str:
        """The conversation up to the answer of its last turn."""
        self._check(sample)
        return self._render(turns, open_end=True)

    def conversation(self, sample: Sample) -> str:
        """All turns, answers included."""
        self._check(sample)
        return self._render(sample.turns)

    def answers(self, sample: Sample, text: str) -> list[tuple[int, int]]:
        """Start and end, in characters of `text`, of what the model is to write in each turn."""
        spans = self._by_prompts(sample, text)
        if spans is None:
            spans = self._by_template(sample)
        if spans is None:
            raise ValueError(
                f"ConversationCollator, sample {sample.id!r}: expected a chat template that starts "
                "a conversation with its prompt or marks answers by {% generation %}, got neither. "
                "Set processor.chat_template."
            )
        return [(start, start + len(text[start:end].rstrip())) for start, end in spans]

    def _by_prompts(self, sample: Sample, text: str) -> list[tuple[int, int]] | None:
        """An answer is what a conversation has beyond its prompt."""
        spans = []
        for number in range(1, len(sample.turns) + 1):
            prompt = self._render(sample.turns[:number], open_end=True)
            whole = self._render(sample.turns[:number])
            if not (text.startswith(whole) and whole.startswith(prompt)):
                return None
            spans.append((len(prompt), len(whole)))
        return spans

    def _by_template(self, sample: Sample) -> list[tuple[int, int]] | None:
        """An answer is what the template says it is."""
        if self._template is None or "{% generation" not in self._template.replace("{%-", "{%"):
            return None
        from transformers.utils import chat_template_utils

        rendered: Any = chat_template_utils.render_jinja_template(
            conversations=[self._messages(sample.turns)],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._processor.tokenizer.special_tokens_map,
        )
        _, spans = rendered
        return [(start, end) for start, end in spans[0]]

    def _render(self, turns: Sequence[Turn], open_end: bool = False) -> str:
        if self._template is None:
            parts = [f" {turn.answer}{self._end}" for turn in turns]
            if open_end:
                parts[-1] = ""
            texts = [
                f"USER: {turn.question} ASSISTANT:{part}"
                for turn, part in zip(turns, parts, strict=True)
            ]
            texts[0] = texts[0].replace("USER: ", f"USER: {self._image_token}\n", 1)
            return "".join(texts)
        messages = self._messages(turns)
        text: str = self._processor.apply_chat_template(
            messages[:-1] if open_end else messages, tokenize=False, add_generation_prompt=open_end
        )
        return text

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns):
            image = [{"type": "image"}] if number == 0 else []
            asked = {"type": "text", "text": turn.question}
            told = {"type": "text", "text": turn.answer + self._end}
            messages.append({"role": "user", "content": [*image, asked]})
            messages.append({"role": "assistant", "content": [told]})
        return messages

    def _check(self, sample: Sample) -> None:
        if self._image_token is None:
            return
        for turn in sample.turns:
            if self._image_token in turn.question + turn.answer:
                raise ValueError(
                    f"collate, sample {sample.id!r}: expected plain text, got the image "
                    f"placeholder {self._image_token!r} in {turn.question[:60]!r}. Remove it; the "
                    "image is put in front of the first question."
                )


def _add_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer is to add its own, as `processor.apply_chat_template` decides it."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def _process(
    processor: ProcessorMixin, texts: Sequence[str], samples: Sequence[Sample], side: str
) -> BatchFeature:
    call: Any = processor
    inputs: BatchFeature = call(
        text=list(texts),
        images=[[sample.image] for sample in samples],
        padding=True,
        padding_side=side,
        return_tensors="pt",
        add_special_tokens=_add_special_tokens(processor.tokenizer, texts[0]),
    )
    return inputs


def _labels(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], ids: torch.Tensor, name: str
) -> torch.Tensor:
    """Labels of one row, int64 (T,).

    The processor expands image placeholders, which only changes what comes before the answers: the
    tokens of the plain text are compared with the row's from its end.

    Args:
        tokenizer: A fast one.
        text: The conversation, placeholders not expanded.
        spans: Characters that are labelled.
        ids: The row's tokens, int64 (T,), without pads.
        name: Of the sample.
    """
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        add_special_tokens=_add_special_tokens(tokenizer, text),
    )
    plain = torch.tensor(encoded["input_ids"])
    shared = min(len(plain), len(ids))
    differs = (plain[len(plain) - shared :] != ids[len(ids) - shared :]).nonzero()
    if len(differs):
        shared -= int(differs.max()) + 1
    # A token that shares a character with an answer is part of it: many tokenizers join the space
    # before a word to the word.
    inside = torch.tensor(
        [
            any(start < own_end and own_start < end for start, end in spans)
            for own_start, own_end in encoded["offset_mapping"]
        ]
    )
    assert not inside[: len(plain) - shared].any(), f"answers of {name} before its image"
    labels = torch.full_like(ids, IGNORED)
    tail = inside[len(plain) - shared :]
    labels[len(ids) - shared :] = torch.where(tail, ids[len(ids) - shared :], IGNORED)
    return labels
