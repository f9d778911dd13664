"""Rows of a data file as turns: questions with answers, or whole conversations.

A row is one of

* `question`, `answer` (or `answers`: all that count as right) and, if wanted, `kind`;
* `conversations`: turns of LLaVA (`from`: human or gpt; `value`) or of a chat (`role`: user or
  assistant; `content`: a text, or a list of texts and images), or pairs (`user`, `assistant`) as in
  The Cauldron. A question may say where its images belong by `<image>`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.data.cells import is_missing, text_of
from tokenprune.data.errors import no_value, shown
from tokenprune.data.sample import IMAGE, Turn, num_places

_ASKS, _TELLS = ("human", "user"), ("gpt", "assistant")
_MEDIA = ("video", "audio")
#: Columns that hold what no sample can: a row in which one is filled is refused.
MEDIA = tuple(
    f"{kind}{end}" for kind in _MEDIA for end in ("", "s", "_path", "_paths", "_file", "_url")
)
# Their placeholders in a question: <video>, <|video_pad|> and the like.
_PLACEHOLDER = re.compile(rf"<\|?({'|'.join(_MEDIA)})(_pad|_token)?\|?>", re.IGNORECASE)
_REMEDY = "Videos and sounds are not read: give frames as images, or remove the row."


@dataclass(frozen=True)
class Columns:
    """Where a row has what; `conversations` takes the place of questions and answers."""

    question: str = "question"
    answer: str = "answer"
    conversations: str | None = None
    kind: str | None = None


def turns_of(row: Mapping[str, Any], columns: Columns, where: str) -> tuple[Turn, ...]:
    """The turns of a row.

    Raises:
        ValueError: Something is missing or not as expected, or is a video; `where` names the row.
    """
    _refuse_media(row, where)
    kind = "all" if columns.kind is None else text_of(row, columns.kind, where)
    turns: tuple[Turn, ...]
    if columns.conversations is None:
        accepted = _answers(row, columns.answer, where)
        # Training teaches what most people said.
        told = Counter(accepted).most_common(1)[0][0]
        question = text_of(row, columns.question, where)
        turns = (Turn(question, told, kind, () if len(accepted) == 1 else accepted),)
    else:
        turns = _conversation(row.get(columns.conversations), columns.conversations, kind, where)
    for turn in turns:
        if (found := _PLACEHOLDER.search(turn.question)) is not None:
            raise ValueError(
                f"{where}: expected images and text, got {found[0]!r} in a question. {_REMEDY}"
            )
    if any(IMAGE in answer for turn in turns for answer in (turn.answer, *turn.accepted)):
        raise ValueError(
            f"{where}: expected {IMAGE} in questions only, got it in an answer. Remove it."
        )
    return turns


def _refuse_media(row: Mapping[str, Any], where: str) -> None:
    """Refuses what would be left out in silence."""
    for key, value in row.items():
        if isinstance(key, str) and key.lower() in MEDIA and not (is_missing(value) or value == []):
            raise ValueError(f"{where}: expected images and text, got a {key!r} as well. {_REMEDY}")


def check_places(turns: Sequence[Turn], images: int, where: str) -> None:
    """Refuses turns that ask for another number of images than a row has.

    Raises:
        ValueError: So it is.
    """
    places = num_places(turns)
    if places not in (0, images):
        raise ValueError(
            f"{where}: expected one {IMAGE} per image, or none, got {places} for {images} "
            f"image{'' if images == 1 else 's'}. Add or remove some."
        )


def _answers(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Accepted answers: a text, texts, or mappings with `answer`, as in VQAv2."""
    value = row.get(key)
    if not isinstance(value, list):
        return (text_of(row, key, where),)
    if not value:
        raise no_value(key, where, "[]")
    own = [item if isinstance(item, Mapping) else {"answer": item} for item in value]
    return tuple(text_of(item, "answer", f"{where}, {key!r}") for item in own)


def _conversation(value: Any, key: str, kind: str, where: str) -> tuple[Turn, ...]:
    if isinstance(value, Mapping) and value:  # as `datasets` gives a sequence of mappings
        columns = [own if isinstance(own, list) else [own] for own in value.values()]
        if len({len(cells) for cells in columns}) > 1:
            lengths = {name: len(cells) for name, cells in zip(value, columns, strict=True)}
            raise ValueError(
                f"{where}: expected as many of each in {key!r}, got {lengths}. Fill in what is "
                "missing or remove the row."
            )
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(value, list) or not value:
        raise no_value(key, where, "none" if value is None else shown(value))
    if all(isinstance(own, Mapping) and {"user", "assistant"} <= set(own) for own in value):
        return tuple(
            Turn(text_of(own, "user", where), text_of(own, "assistant", where), kind)
            for own in value
        )
    told = [_message(own, number, where) for number, own in enumerate(value, 1)]
    if told[0][0] == "system":
        raise ValueError(
            f"{where}: expected a conversation that starts with a question, got a system message. "
            "Put it into the model's chat template."
        )
    roles = [role for role, _ in told]
    if any(role not in (_ASKS, _TELLS)[number % 2] for number, role in enumerate(roles)) or (
        len(roles) % 2
    ):
        raise ValueError(
            f"{where}: expected questions and answers in turn, {_ASKS[0]} first and {_TELLS[0]} "
            f"last, got {roles[:6]}. Reorder them or remove the row."
        )
    texts = [text for _, text in told]
    return tuple(
        Turn(question, answer, kind)
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    )


def _message(own: Any, number: int, where: str) -> tuple[str, str]:
    """Role and text of one message."""
    where = f"{where}, message {number}"
    if not isinstance(own, Mapping):
        raise ValueError(
            f"{where}: expected an object with from and value, or role and content, got "
            f"{shown(own)}. Rewrite it."
        )
    _refuse_media(own, where)
    by, said = ("role", "content") if "role" in own else ("from", "value")
    role = text_of(own, by, where)
    if not isinstance(own.get(said), list):
        return role, text_of(own, said, where)
    pieces = []
    for part in own[said]:
        of = part.get("type") if isinstance(part, Mapping) else None
        if of not in ("text", "image"):
            raise ValueError(
                f"{where}: expected parts of type text or image, got {shown(part)}. "
                "Leave out other parts."
            )
        pieces.append(IMAGE if of == "image" else text_of(part, "text", where))
    return role, text_of({said: "".join(pieces)}, said, where)
