"""Words that a tokenizer does not know: a model reads all of them alike, and answers something."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenprune.data.sample import IMAGE, Sample

#: Words that are named.
_MOST = 5


class UnknownWords:
    """Tells once of such words in questions, system messages and answers.

    Most tokenizers know all words, by their bytes; those of small models do not. One in Python says
    not where its tokens stand, and is asked nothing.

    Args:
        tokenizer: The processor's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.unk_token_id
        # Some call the end of a sequence so, which texts do hold.
        others = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        self._id = own if tokenizer.is_fast and own not in others else None

    def tell(self, samples: Sequence[Sample], inputs: Mapping[str, Any]) -> None:
        """Warns of the first batch that holds some.

        Args:
            samples: The batch's.
            inputs: What the processor made of them: int64 `input_ids` and `attention_mask`, (B, T).
        """
        if self._id is None:
            return
        unknown = (inputs["input_ids"] == self._id) & inputs["attention_mask"].bool()
        rows = unknown.any(1).nonzero()[:, 0].tolist()
        texts = (text for row in rows for text in _texts(samples[row]))
        words = sorted({word for text in texts for word in self._words(text)})
        if not words:  # what templates are written in is theirs
            return
        self._id = None
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
        words = re.finditer(r"\w+|[^\w\s]", text)
        return [word[0] for word in words if places & {*range(*word.span())}]


def _texts(sample: Sample) -> Iterator[str]:
    """What a sample says, without the places of its images."""
    for turn in sample.turns:
        yield from (turn.system, turn.question.replace(IMAGE, " "), turn.answer)
