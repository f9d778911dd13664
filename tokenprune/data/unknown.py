"""Words that a tokenizer does not know: a model reads all of them alike, and answers something."""

from __future__ import annotations

import string
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import get_worker_info

from tokenprune.data.sample import IMAGE, Sample

#: Words that are named.
_MOST = 5
#: Batches that are searched in vain: then it is the template that has such words.
_TRIES = 8


class UnknownWords:
    """Tells once of such words in questions, system messages and answers.

    Most tokenizers know all words, by their bytes; those of small models do not. One in Python says
    not where its tokens stand, and is asked nothing. Of several workers the first one tells.

    Args:
        tokenizer: The processor's.
        answered: Whether the last answers are part of the texts.
    """

    def __init__(self, tokenizer: Any, answered: bool) -> None:
        self._tokenizer, self._answered, self._left = tokenizer, answered, _TRIES
        own = tokenizer.unk_token_id
        # Some call the end of a sequence so, which texts do hold.
        others = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        self._id = own if tokenizer.is_fast and own not in others else None

    def tell(self, samples: Sequence[Sample], inputs: Mapping[str, Any]) -> None:
        """Warns of the first batch that holds some.

        Args:
            samples: The batch's.
            inputs: What the processor made of them: int64 `input_ids`, (B, T), and, where there are
                pads, `attention_mask`.
        """
        worker = get_worker_info()
        if self._id is None or self._left == 0 or (worker is not None and worker.id > 0):
            return
        unknown, mask = inputs["input_ids"] == self._id, inputs.get("attention_mask")
        unknown = unknown if mask is None else unknown & mask.bool()
        rows = unknown.any(1).nonzero()[:, 0].tolist()
        texts = (text for row in rows for text in self._texts(samples[row]))
        words = sorted({word for text in texts for word in self._words(text)})
        if not words:
            self._left -= bool(rows)
            return
        self._left = 0
        named = ", ".join(map(repr, words[:_MOST])) + (", ..." if len(words) > _MOST else "")
        warnings.warn(
            f"collate: expected words that the model's tokenizer knows, got {named}: it reads all "
            f"of them as {self._tokenizer.unk_token}. Ask in words of the model, or choose another "
            "model.",
            UserWarning,
            stacklevel=2,
        )

    def _words(self, text: str) -> list[str]:
        """The words of a text of which the tokenizer does not know a part."""
        read = self._tokenizer(text, return_offsets_mapping=True)
        pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
        places = {at for token, span in pairs if token == self._id for at in range(*span)}
        words, start = [], 0
        for word in text.split():
            start = text.index(word, start)
            if places & {*range(start, start + len(word))}:
                words.append(word.strip(string.punctuation) or word)
            start += len(word)
        return words

    def _texts(self, sample: Sample) -> Iterator[str]:
        """What is read of a sample, without the places of its images."""
        for number, turn in enumerate(sample.turns, start=1):
            yield from (turn.system, turn.question.replace(IMAGE, " "))
            if self._answered or number < len(sample.turns):
                yield turn.answer
