"""Samples to model inputs, for any Hugging Face processor.

Paddings are passed per call: the processor stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from tokenprune.data.chat import Writer
from tokenprune.data.images import check_scale, shrink
from tokenprune.data.sample import Sample
from tokenprune.data.unknown import UnknownWords

#: Labels of positions that carry no loss.
IGNORED = -100


class PromptCollator:
    """Prompts that end where the last turn's answer begins, padded on the left.

    The turns before it are part of the prompt, with their answers.

    Args:
        processor: Belongs to the model.
        image_scale: Share of each image's pixels that the processor is given.
    """

    def __init__(self, processor: ProcessorMixin, image_scale: float = 1.0) -> None:
        self.processor, self.image_scale = processor, check_scale(image_scale)
        self._writer = Writer(processor)
        self._unknown = UnknownWords(processor.tokenizer, answered=False)

    def check_system(self) -> None:
        """Refuses a chat template that takes no system messages.

        Raises:
            ValueError: So it is.
        """
        self._writer.check_system(whole=False)

    def text(self, sample: Sample) -> str:
        """The prompt of a sample, image placeholders not expanded.

        Raises:
            ValueError: Its placeholders are not as expected, or its system message has no place in
                the chat template.
        """
        return self._writer.prompt(sample)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Inputs for `generate`, and the samples; of smaller images also the ids of whole ones."""
        texts = [self.text(sample) for sample in samples]
        inputs = _process(self.processor, texts, samples, "left", self.image_scale)
        self._unknown.tell(samples, inputs)
        batch = {"inputs": inputs, "samples": list(samples)}
        if self.image_scale != 1:
            whole = _process(self.processor, texts, samples, "left", 1.0)
            batch["whole_ids"] = whole["input_ids"]  # how many tokens a whole image makes
        return batch


class ConversationCollator:
    """Whole conversations with labels on what the model is to write, padded on the right.

    Labelled is what follows each generation prompt, up to and with the token that ends the answer.
    A template that ends answers with no special token gets the tokenizer's end-of-sequence token:
    a model trained without one never stops.

    Args:
        processor: Belongs to the model; its tokenizer must be a fast one.
        image_scale: As for `PromptCollator`.

    Raises:
        ValueError: The tokenizer gives no character offsets.
    """

    def __init__(self, processor: ProcessorMixin, image_scale: float = 1.0) -> None:
        if not processor.tokenizer.is_fast:
            raise ValueError(
                f"ConversationCollator: expected a fast tokenizer, got "
                f"{type(processor.tokenizer).__name__}. Load the processor with a tokenizer.json."
            )
        self.processor, self.image_scale = processor, check_scale(image_scale)
        self._writer = Writer(processor)
        self._unknown = UnknownWords(processor.tokenizer, answered=True)

    def check_system(self) -> None:
        """As for `PromptCollator`."""
        self._writer.check_system(whole=True)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Inputs with `labels`, int64 (B, T), and the samples."""
        texts = [self._writer.conversation(sample) for sample in samples]
        inputs = _process(self.processor, texts, samples, "right", self.image_scale)
        self._unknown.tell(samples, inputs)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        lengths = inputs["attention_mask"].sum(1).tolist()
        for row, (sample, text, length) in enumerate(zip(samples, texts, lengths, strict=True)):
            spans = self._writer.answers(sample, text)
            own = inputs["input_ids"][row, :length]
            labels[row, :length] = _labels(self.processor, text, spans, own, sample.id)
        inputs["labels"] = labels
        return {"inputs": inputs, "samples": list(samples)}


def _special_tokens(tokenizer: Any, text: str) -> dict[str, bool]:
    """Whether they are to be added, as `processor.apply_chat_template` decides it."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if begins else {}


def _process(
    processor: ProcessorMixin,
    texts: Sequence[str],
    samples: Sequence[Sample],
    side: str,
    scale: float,
) -> BatchFeature:
    call: Any = processor
    images = [[_smaller(processor, image, scale) for image in sample.images] for sample in samples]
    inputs: BatchFeature = call(
        text=list(texts),
        images=images if any(images) else None,
        padding=True,
        padding_side=side,
        return_tensors="pt",
        **_special_tokens(processor.tokenizer, texts[0]),
    )
    return inputs


def _smaller(processor: Any, image: Image.Image, scale: float) -> Image.Image:
    """The image with a share of the pixels that the processor would take of it.

    Of a picture larger than that the rest is lost anyway. It enlarges what is too small for a
    tower of one size.
    """
    if scale == 1:
        return image
    own = processor.image_processor
    made = own(images=[image], return_tensors="pt").get("pixel_values")
    pixels = image.width * image.height
    taken = pixels if made is None else made.numel() / 3 / getattr(own, "temporal_patch_size", 1)
    if getattr(own, "do_center_crop", False):  # what is cut off was as large
        taken *= max(image.size) / min(image.size)
    return shrink(image, scale * min(1.0, taken / pixels))


def _labels(
    processor: Any, text: str, spans: Sequence[tuple[int, int]], ids: torch.Tensor, name: str
) -> torch.Tensor:
    """Labels of one row, int64 (T,).

    The processor expands image placeholders and leaves other tokens alone: those of the plain text
    after its last image are the row's last, those between two images are looked for.

    Args:
        processor: Its tokenizer is a fast one.
        text: The conversation, placeholders not expanded.
        spans: Characters that are labelled.
        ids: The row's tokens, int64 (T,), without pads.
        name: Of the sample.

    Raises:
        ValueError: An answer is not found in the row.
    """
    tokenizer = processor.tokenizer
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        **_special_tokens(tokenizer, text),
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
    labels = torch.full_like(ids, IGNORED)
    rest, end = len(plain) - shared, len(ids) - shared
    labels[end:] = torch.where(inside[rest:], ids[end:], IGNORED)
    row = ids.tolist()
    for start, stop in reversed(_between_images(processor, plain[:rest])):
        labelled = inside[start:stop].nonzero()[:, 0] + start
        if not len(labelled):
            continue
        found = _find(row, plain[:rest].tolist(), start, stop, labelled.tolist(), end)
        if found is None:
            raise ValueError(
                f"ConversationCollator, sample {name!r}: expected its answers among the tokens of "
                f"{type(processor).__name__}, got other tokens. Put all images into the first turn."
            )
        end = found + int(labelled[0])
        labels[labelled + found] = ids[labelled + found]
    return labels


def _between_images(processor: Any, plain: torch.Tensor) -> list[tuple[int, int]]:
    """Start and end of the runs of tokens between placeholders."""
    token = getattr(processor, "image_token", None)
    own = None if token is None else processor.tokenizer.convert_tokens_to_ids(token)
    cuts = [] if own is None else (plain == own).nonzero()[:, 0].tolist()
    return list(zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(plain)], strict=True))


def _find(
    row: list[int], plain: list[int], start: int, stop: int, labelled: list[int], end: int
) -> int | None:
    """How far plain[start:stop] is shifted in `row[:end]`, at its last occurrence.

    Next to an image, a token may have joined with what the processor put there: without a full
    match, up to four tokens without a label are left out on either side.
    """
    for trimmed in range(5):
        first = min(start + trimmed, labelled[0])
        last = max(stop - trimmed, labelled[-1] + 1)
        own = plain[first:last]
        for place in range(end - len(own), -1, -1):
            if row[place] == own[0] and row[place : place + len(own)] == own:
                return place - first
    return None
