"""Samples to model inputs, for any Hugging Face processor.

The processor's chat template writes the prompts; without one, LLaVA's plain form does. Paddings are
passed per call: the processor stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from tokenprune.data.images import check_scale, shrink
from tokenprune.data.sample import IMAGE, Sample, Turn, num_places

#: Labels of positions that carry no loss.
IGNORED = -100
_PROBE = "0"
_SYSTEM = "Say what is asked."


class PromptCollator:
    """Prompts that end where the last turn's answer begins, padded on the left.

    The turns before it are part of the prompt, with their answers.

    Args:
        processor: Belongs to the model.
        image_scale: Share of each image's pixels that the processor is given.
    """

    def __init__(self, processor: ProcessorMixin, image_scale: float = 1.0) -> None:
        self.processor, self.image_scale = processor, check_scale(image_scale)
        self._writer = _Writer(processor)

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
        self._writer = _Writer(processor)

    def check_system(self) -> None:
        """As for `PromptCollator`."""
        self._writer.check_system(whole=True)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Inputs with `labels`, int64 (B, T), and the samples."""
        texts = [self._writer.conversation(sample) for sample in samples]
        inputs = _process(self.processor, texts, samples, "right", self.image_scale)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        lengths = inputs["attention_mask"].sum(1).tolist()
        for row, (sample, text, length) in enumerate(zip(samples, texts, lengths, strict=True)):
            spans = self._writer.answers(sample, text)
            own = inputs["input_ids"][row, :length]
            labels[row, :length] = _labels(self.processor, text, spans, own, sample.id)
        inputs["labels"] = labels
        return {"inputs": inputs, "samples": list(samples)}


class _Writer:
    """Prompts and conversations as text."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self._processor = processor
        self._template = getattr(processor, "chat_template", None)
        self._image_token: str | None = getattr(processor, "image_token", None)
        # A processor expands these, too, and a sample has none.
        names = ("video_token", "audio_token")
        self._others = [token for name in names if (token := getattr(processor, name, None))]
        if self._template is None and self._image_token is None:
            raise ValueError(
                "collate: expected a processor with a chat template or an image token, got "
                f"{type(processor).__name__} with neither. Set processor.chat_template."
            )
        self._contents: dict[bool, Callable[[str], Any]] = {}
        self._end = ""
        # Does the template itself end an answer by a special token?
        text = self._render([Turn(_PROBE, _PROBE)], 1)
        after = text[text.rindex(_PROBE) + len(_PROBE) :]
        tokenizer = processor.tokenizer
        # Some chat models' end of turn is special, but none of the named special tokens.
        added = [own.content for own in tokenizer.added_tokens_decoder.values() if own.special]
        if not any(token in after for token in (*tokenizer.all_special_tokens, *added)):
            self._end = tokenizer.eos_token or ""

    def prompt(self, sample: Sample) -> str:
        """The conversation up to the answer of its last turn."""
        self._check(sample)
        return self._render(sample.turns, _num_leading(sample), open_end=True)

    def conversation(self, sample: Sample) -> str:
        """All turns, answers included."""
        self._check(sample)
        return self._render(sample.turns, _num_leading(sample))

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
        leading = _num_leading(sample)
        for number in range(1, len(sample.turns) + 1):
            prompt = self._render(sample.turns[:number], leading, open_end=True)
            whole = self._render(sample.turns[:number], leading)
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
            conversations=[self._messages(sample.turns, _num_leading(sample))],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._processor.tokenizer.special_tokens_map,
        )
        _, spans = rendered
        return [(start, end) for start, end in spans[0]]

    def _render(self, turns: Sequence[Turn], leading: int, open_end: bool = False) -> str:
        """Turns as text, with `leading` images before the first question."""
        if self._template is None:
            token = self._image_token
            assert token is not None
            parts = [f" {turn.answer}{self._end}" for turn in turns]
            if open_end:
                parts[-1] = ""
            questions = [turn.question.replace(IMAGE, token) for turn in turns]
            questions[0] = f"{token}\n" * leading + questions[0]
            told = [f"{turn.system} " if turn.system else "" for turn in turns]
            return "".join(
                f"{system}USER: {question} ASSISTANT:{part}"
                for system, question, part in zip(told, questions, parts, strict=True)
            )
        messages = self._messages(turns, leading, not open_end)
        return self._apply(messages[:-1] if open_end else messages, open_end)

    def _apply(self, messages: list[Any], open_end: bool = False) -> str:
        text: str = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_end
        )
        return text

    def check_system(self, whole: bool) -> None:
        """Refuses a chat template that takes no system messages.

        Args:
            whole: Whether it is to take them in whole conversations as well, not in prompts only.

        Raises:
            ValueError: It takes none.
        """
        if self._template is not None:
            self._content(whole)

    def _content(self, whole: bool) -> Callable[[str], Any]:
        """Makes a system message's content, as the template takes it.

        Args, Raises: As for `check_system`.
        """
        if whole not in self._contents:
            self._contents[whole] = self._find_content(whole)
        return self._contents[whole]

    def _find_content(self, whole: bool) -> Callable[[str], Any]:
        talk = [
            {"role": "user", "content": _parts(IMAGE + _PROBE)},
            {"role": "assistant", "content": _parts(_PROBE)},
        ]
        for content in (_parts, str):
            led = [{"role": "system", "content": content(_SYSTEM)}, *talk]
            try:
                told, without = (
                    [self._apply(own[:-1], True), *([self._apply(own)] if whole else [])]
                    for own in (led, talk)
                )
            except Exception:  # however a template refuses
                continue
            if all(_holds(*pair) for pair in zip(told, without, strict=True)):
                return content
        raise ValueError(
            "collate: expected a chat template that takes system messages, got one of "
            f"{type(self._processor).__name__} that refuses them, leaves them out or repeats them. "
            "Put their text into the first question, or set processor.chat_template."
        )

    def _messages(
        self, turns: Sequence[Turn], leading: int, whole: bool = True
    ) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns):
            images = [{"type": "image"}] * (leading if number == 0 else 0)
            told = {"type": "text", "text": turn.answer + self._end}
            if turn.system:
                content = self._content(whole)(turn.system)
                messages.append({"role": "system", "content": content})
            messages.append({"role": "user", "content": [*images, *_parts(turn.question)]})
            messages.append({"role": "assistant", "content": [told]})
        return messages

    def _check(self, sample: Sample) -> None:
        places, images = num_places(sample.turns), len(sample.images)
        if places not in (0, images):
            raise ValueError(
                f"collate, sample {sample.id!r}: expected one {IMAGE} per image in the questions, "
                f"or none, got {places} for {images} images. Add or remove some."
            )
        for turn in sample.turns:
            for text in (turn.system, turn.question.replace(IMAGE, ""), turn.answer):
                for token in self._others:
                    if token in text:
                        raise ValueError(
                            f"collate, sample {sample.id!r}: expected text and images, got the "
                            f"placeholder {token!r} in {text[:60]!r}. Videos and sounds are not "
                            "read: remove it."
                        )
                for token in filter(None, {IMAGE, self._image_token}):
                    if token in text:
                        raise ValueError(
                            f"collate, sample {sample.id!r}: expected plain text, got the image "
                            f"placeholder {token!r} in {text[:60]!r}. Remove it; {IMAGE} in a "
                            "question stands for an image."
                        )


def _holds(text: str, without: str) -> bool:
    """Whether a rendering says the system message once, and not as what Python or JSON prints."""
    same = all(text.count(quoted) == without.count(quoted) for quoted in ("'text'", '"text"'))
    return text.count(_SYSTEM) == 1 and same


def _num_leading(sample: Sample) -> int:
    """Images that come before the first question, as no question says where."""
    return 0 if num_places(sample.turns) else len(sample.images)


def _parts(question: str) -> list[dict[str, Any]]:
    """A question as texts and images.

    Line breaks that set its images apart from its one text are the template's. Between texts that
    images part, they are the question's own.
    """
    parts: list[dict[str, Any]] = []
    texts = question.split(IMAGE)
    single = sum(bool(text.strip("\n")) for text in texts) < 2
    for number, text in enumerate(texts):
        if number:
            parts.append({"type": "image"})
            text = text.removeprefix("\n") if single else text
        if number < len(texts) - 1 and single:
            text = text.removesuffix("\n")
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _add_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer is to add its own, as `processor.apply_chat_template` decides it."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


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
        add_special_tokens=_add_special_tokens(processor.tokenizer, texts[0]),
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
