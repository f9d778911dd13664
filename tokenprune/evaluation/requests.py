"""What lmms-eval asks for, as samples of ours and options of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from tokenprune.data.sample import IMAGE, Sample, Turn

#: Options of `generate` that a task may set.
_OPTIONS = (
    *("do_sample", "temperature", "top_p", "top_k", "num_beams", "min_new_tokens"),
    *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "early_stopping"),
)
#: A task that says nothing gets answers of at most so many tokens, as from lmms-eval's own models.
_LONGEST = 1024


def from_text(name: str, context: str, visuals: Sequence[object] | None) -> Sample:
    """A question with its images, as tasks of the simple kind give them.

    Args:
        name: Of the request.
        context: The question; may hold one `<image>` per image.
        visuals: Its images; None for a question about none.

    Raises:
        ValueError: One of them is no image.
    """
    images = _images(name, visuals or ())
    return Sample(name, images, (Turn(context, ""),))


def from_messages(name: str, messages: Sequence[Mapping[str, Any]]) -> Sample:
    """A conversation, as tasks of the chat kind give it; its last message is the question.

    Args:
        name: Of the request.
        messages: Mappings with `role` and `content`, a text or a list of parts.

    Raises:
        ValueError: It has a system message later than first, other media than images, or ends with
            an answer.
    """
    images: list[object] = []
    turns: list[Turn] = []
    question: str | None = None
    system = ""
    leading = True  # whether all images so far come before the first text
    for number, message in enumerate(messages):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        told = "".join(part["text"] for part in parts if part["type"] == "text")
        if message["role"] == "assistant" and question is not None:
            turns.append(Turn(question, told))
            question = None
            continue
        if number == 0 and message["role"] == "system":
            if any(part["type"] != "text" for part in parts):
                raise ValueError(
                    f"lmms-eval, {name}: expected a system message of text, got other parts in it. "
                    "Choose a task of another form."
                )
            system = told if told.strip() else ""
            continue
        if message["role"] != "user" or question is not None:
            raise ValueError(
                f"lmms-eval, {name}: expected questions and answers by turns, got a message of "
                f"{message['role']!r} there. Choose a task of another form."
            )
        found = [part for part in parts if part["type"] != "text"]
        others = {part["type"] for part in found} - {"image"}
        if others:
            raise ValueError(
                f"lmms-eval, {name}: expected text and images, got {sorted(others)}, which are not "
                "read. Choose tasks with images."
            )
        images += [part.get("url", part.get("image")) for part in found]
        kinds = [part["type"] for part in parts]
        leading = leading and (kinds == sorted(kinds) if not turns else not found)
        question = "".join(IMAGE if part["type"] == "image" else part["text"] for part in parts)
    if question is None:
        raise ValueError(
            f"lmms-eval, {name}: expected a question at the end, got none. Choose another task."
        )
    turns.append(Turn(question, ""))
    if leading:  # where templates and LLaVA's plain form put them
        turns[0] = replace(turns[0], question=turns[0].question[len(IMAGE) * len(images) :])
    turns[0] = replace(turns[0], system=system)
    return Sample(name, _images(name, images), tuple(turns))


def _images(name: str, visuals: Sequence[object]) -> tuple[Image.Image, ...]:
    images: list[Image.Image] = []
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise ValueError(
                f"lmms-eval, {name}: expected images, got a {type(visual).__name__}. Videos and "
                "sounds are not read: choose tasks with images."
            )
        images.append(visual.convert("RGB"))
    return tuple(images)


def options(
    given: Mapping[str, Any], warn: Callable[[str], None]
) -> tuple[int, tuple[str, ...], dict[str, Any]]:
    """Longest answer, texts that end one, and options of `generate`.

    Args:
        given: The task's `generation_kwargs`.
        warn: Told the names of options that no model of Hugging Face has.
    """
    rest = dict(given)
    longest = int(rest.pop("max_new_tokens", None) or rest.pop("max_gen_toks", None) or _LONGEST)
    until = rest.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    taken = {key: rest.pop(key) for key in _OPTIONS if key in rest}
    if not taken.get("temperature"):  # 0 means greedy, which `generate` says otherwise
        taken["do_sample"] = False
    elif "do_sample" not in taken:
        taken["do_sample"] = True
    if not taken["do_sample"]:
        for key in ("temperature", "top_p", "top_k"):
            taken.pop(key, None)
    if rest:
        warn(f"options of the task that are not used: {', '.join(sorted(rest))}")
    return longest, until, {key: value for key, value in taken.items() if value is not None}


def cut(text: str, until: Sequence[str]) -> str:
    """An answer up to the first of the texts that end it."""
    for stop in until:
        if stop:
            text = text.split(stop, 1)[0]
    return text.strip()
