"""Rows of a data file as turns: questions with answers, or whole conversations.

A row is one of

* `question`, `answer` (or `answers`: all that count as right) and, if wanted, `kind`;
* `conversations`: turns of LLaVA (`from`: human or gpt; `value`) or of a chat (`role`: user or
  assistant; `content`: a text, or a list of texts and images), with a system message before them
  or without, or pairs (`user`, `assistant`) as in The Cauldron. A question may say where its images
  belong by `<image>`; messages may name their images themselves, as Qwen's do, where the row does
  not.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenprune.data.cells import Number, is_missing, text_of
from tokenprune.data.errors import no_value, shown
from tokenprune.data.references import Reference, cells_of, reference_of
from tokenprune.data.sample import IMAGE, Turn, num_places

_ASKS, _TELLS = ("human", "user"), ("gpt", "assistant")
_MEDIA = ("video", "audio")
_ENDS = ("", "s", "_path", "_paths", "_file", "_url", "_name", "_id", "_bytes")
# Words with other meanings (a CLIP score, what an animal says): there the value decides.
_VAGUE = ("clip", "clips", "media", "sound", "sounds")
#: Columns that may hold what no sample can: see `holds_media`.
MEDIA = (*(f"{kind}{end}" for kind in _MEDIA for end in _ENDS), *_VAGUE)
_FILE = re.compile(r"://|\.\d?[a-z]\w{1,3}$", re.IGNORECASE)
# Their placeholders in a question: <video>, <|video_pad|>, <video_soft_token>, [video], <video1>.
_WORDS = "video|vid|audio|speech|sound"
_PLACEHOLDER = re.compile(
    rf"<\|?(?:{_WORDS})_?\d*(?:_(?:soft_)?(?:pad|token))?\|?>|\[(?:{_WORDS})_?\d*\]", re.IGNORECASE
)
# What a part of a message, or a message, may call its image by.
_PART, _MESSAGE = ("image", "path", "url"), ("image", "images")
_REMEDY = (
    "Videos and sounds are not read: give frames as images and leave it out, or remove the row."
)


@dataclass(frozen=True)
class Columns:
    """Where a row has what; `conversations` takes the place of questions and answers.

    Where both are filled, `answer` is what training teaches, and one of those in `accepted`.
    """

    question: str = "question"
    answer: str = "answer"
    conversations: str | None = None
    kind: str | None = None
    accepted: str | None = None


def turns_of(row: Mapping[str, Any], columns: Columns, where: str) -> tuple[Turn, ...]:
    """The turns of a row.

    Raises:
        ValueError: Something is missing or not as expected, or is a video; `where` names the row.
    """
    _refuse_media(row, where)
    kind = "all" if columns.kind is None else text_of(row, columns.kind, where)
    turns: tuple[Turn, ...]
    if columns.conversations is None:
        told, accepted = _told(row, columns, where)
        question = text_of(row, columns.question, where)
        turns = (Turn(question, told, kind, () if len(accepted) == 1 else accepted),)
    else:
        turns = _conversation(row.get(columns.conversations), columns.conversations, kind, where)
    for turn in turns:
        for name, text in (("system message", turn.system), ("question", turn.question)):
            if (found := _PLACEHOLDER.search(text)) is not None:
                raise ValueError(
                    f"{where}: expected images and text, got {found[0]!r} in a {name}. {_REMEDY}"
                )
    if any(IMAGE in answer for turn in turns for answer in (turn.answer, *turn.accepted)):
        raise ValueError(
            f"{where}: expected {IMAGE} in questions only, got it in an answer. Remove it."
        )
    return turns


def images_of(
    row: Mapping[str, Any], columns: Columns, cells: Sequence[Any], key: str, where: str
) -> list[Any]:
    """The cells of a row's images: the row's own, or those that its messages name themselves.

    Args:
        row: As for `turns_of`, which has found it good.
        columns: As there.
        cells: The row's own.
        key: What the row calls them.
        where: Names the row.

    Raises:
        ValueError: Messages name some of their images only, or others than the row.
    """
    talk = columns.conversations
    named: list[Any] = []
    messages = [] if talk is None else _messages(row.get(talk), talk, where)
    for number, own in enumerate(messages, 1):
        named += _named(own, f"{where}, message {number}")
    if not named:
        return list(cells)
    if cells and not _same(cells, named, key, where):
        raise ValueError(
            f"{where}: expected images of the row or of its messages, got both: "
            f"{shown(list(cells))} and {shown(named)}. Leave one out."
        )
    return list(cells) or named


def _named(message: Mapping[str, Any], where: str) -> list[Any]:
    """The images that a message names."""
    own = [cell for key in _MESSAGE for cell in cells_of(message.get(key))]
    said = message.get("content" if "role" in message else "value")
    parts = [part for part in said if part["type"] == "image"] if isinstance(said, list) else []
    cells = [{key: part[key] for key in _PART if not is_missing(part.get(key))} for part in parts]
    found = [next(iter(cell.values())) for cell in cells if cell]
    twice = next((cell for cell in cells if len(cell) > 1), None)
    if twice is not None or (found and (own or len(found) < len(parts))):
        raise ValueError(
            f"{where}: expected each of its images to be named once, or none, got "
            f"{shown(twice or [*own, *parts])}. Name each once."
        )
    return own or found


def _same(cells: Sequence[Any], named: Sequence[Any], key: str, where: str) -> bool:
    """Whether the images of a row may be those that its messages name."""
    if len(cells) != len(named):
        return False
    for pair in zip(cells, named, strict=True):
        one, other = (reference_of(cell, key, where) for cell in pair)
        if not _embedded(one, other) and _path(one) != _path(other):
            return False
    return True


def _embedded(*images: Reference) -> bool:
    """Whether one of several is there itself: its name, if it has one, may be of another place."""
    return any(image.size is not None for image in images)


def _path(image: Reference) -> str:
    return os.path.normpath(image.path or "")


def holds_media(key: str, value: Any) -> bool:
    """Whether a cell holds, or names, what no sample can have: a video or a sound."""
    key = key.lower()
    if key not in MEDIA or is_missing(value) or value == []:
        return False
    if key not in _VAGUE:
        return True
    if isinstance(value, str):
        return not isinstance(value, Number) and _FILE.search(value.strip()) is not None
    if isinstance(value, list):
        return any(holds_media(key, cell) for cell in value)
    return isinstance(value, bytes | Mapping) or value is True  # as of a column that is not read


def _refuse_media(row: Mapping[str, Any], where: str) -> None:
    """Refuses what would be left out in silence."""
    for key, value in row.items():
        if isinstance(key, str) and holds_media(key, value):
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


def _told(row: Mapping[str, Any], columns: Columns, where: str) -> tuple[str, tuple[str, ...]]:
    """The answer that training teaches, and all that count as right."""
    accepted = _answers(row, columns.answer, where)
    # What most people said.
    told = Counter(accepted).most_common(1)[0][0]
    more = columns.accepted
    if more is None or is_missing(row.get(more)) or row[more] == []:
        return told, accepted
    given, accepted = accepted, _answers(row, more, where)
    if not {_plain(own) for own in given} <= {_plain(own) for own in accepted}:
        raise ValueError(
            f"{where}: expected {columns.answer!r} to be one of {more!r}, got "
            f"{shown(row[columns.answer])} and {shown(row[more])}. Correct or leave out one."
        )
    return told, accepted


def _plain(answer: str) -> str:
    return " ".join(answer.split()).lower()


def _answers(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Accepted answers: a text, texts, or mappings with `answer`, as in VQAv2."""
    value = row.get(key)
    if not isinstance(value, list):
        return (text_of(row, key, where),)
    if not value:
        raise no_value(key, where, "[]")
    own = [item if isinstance(item, Mapping) else {"answer": item} for item in value]
    return tuple(text_of(item, "answer", f"{where}, {key!r}") for item in own)


def _messages(value: Any, key: str, where: str) -> list[Any]:
    """The messages of a conversation, of which there is at least one."""
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
    return value


def _conversation(value: Any, key: str, kind: str, where: str) -> tuple[Turn, ...]:
    value = _messages(value, key, where)
    system = _system(value[0], where)
    value = value if system is None else value[1:]
    first = 1 if system is None else 2
    if value and all(
        isinstance(own, Mapping) and {"user", "assistant"} <= set(own) for own in value
    ):
        turns = [
            Turn(text_of(own, "user", where), text_of(own, "assistant", where), kind)
            for own in value
        ]
        led = [number for number, own in enumerate(value, 1) if not is_missing(own.get("system"))]
        if led and (led != [1] or system is not None):
            raise ValueError(
                f"{where}: expected one system message at most, in front of the first question, "
                f"got one in message {led[-1] + first - 1}. Leave it out."
            )
        if led:
            system = _without_images(text_of(value[0], "system", where), where)
        return (replace(turns[0], system=system or ""), *turns[1:])
    told = [_message(own, number, where) for number, own in enumerate(value, first)]
    roles = [role for role, _ in told]
    if any(role not in (_ASKS, _TELLS)[number % 2] for number, role in enumerate(roles)) or (
        len(roles) % 2 or not roles
    ):
        raise ValueError(
            f"{where}: expected questions and answers in turn, {_ASKS[0]} first and {_TELLS[0]} "
            f"last, got {([] if system is None else ['system']) + roles[:6]}. Reorder them or "
            "remove the row."
        )
    texts = [text for _, text in told]
    turns = [
        Turn(question, answer, kind)
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]
    return (replace(turns[0], system=system or ""), *turns[1:])


def _system(own: Any, where: str) -> str | None:
    """The text of a first message if it is a system message, which may be empty; else None."""
    if not isinstance(own, Mapping):
        return None
    by, said = ("role", "content") if "role" in own else ("from", "value")
    if own.get(by) != "system":
        return None
    if is_missing(own.get(said)) or own[said] == []:
        return ""
    _, text = _message(own, 1, where)
    return _without_images(IMAGE if _named(own, where) else text, where)


def _without_images(system: str, where: str) -> str:
    if IMAGE in system:
        raise ValueError(
            f"{where}: expected images in questions only, got one in a system message. Move it."
        )
    return system


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
        if of not in ("text", "image") or (of == "text" and not is_missing(part.get("image"))):
            raise ValueError(
                f"{where}: expected parts of type text or image, got {shown(part)}. "
                "Leave out other parts."
            )
        _refuse_media(part, where)
        pieces.append(IMAGE if of == "image" else text_of(part, "text", where))
    return role, text_of({said: "".join(pieces)}, said, where)
