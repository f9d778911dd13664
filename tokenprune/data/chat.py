"""Samples as text: the chat template writes prompts and conversations, or else LLaVA's plain form.

What a template takes, and where it ends an answer, is asked of the template itself, by rendering
probes: published ones differ in nearly everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from transformers import ProcessorMixin

from tokenprune.data.sample import IMAGE, Sample, Turn, num_places

_PROBE = "Say what is asked."
#: Stands for an answer where it is to be found again.
_ANSWER = "\ue000{}\ue001"

Content = Callable[[str], Any]
Spans = list[tuple[int, int]]


class Writer:
    """Prompts and conversations as text.

    Args:
        processor: Belongs to the model.

    Raises:
        ValueError: It has neither a template nor an image token, or a template that takes no
            questions with images, or no answers.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self._processor = processor
        self._image_token: str | None = getattr(processor, "image_token", None)
        # A processor expands these, too, and a sample has none.
        names = ("video_token", "audio_token")
        self._others = [token for name in names if (token := getattr(processor, name, None))]
        tokenizer = processor.tokenizer
        # Some chat models' end of turn is special, but none of the named special tokens.
        added = [own.content for own in tokenizer.added_tokens_decoder.values() if own.special]
        special = {token for token in (*tokenizer.all_special_tokens, *added) if token}
        self._template = self._find_template()
        self._systems: dict[bool, Content] = {}
        self._answer: Content = _text
        if self._template is not None:
            self._answer = self._find_answer()
        #: What is written behind answers that the template does not end: those in the middle of a
        #: conversation, and the last; and whether it sets the former off by a token all the same.
        self._ends, self._is_set_off = ("", ""), False
        eos = tokenizer.eos_token or ""
        self._stops = {eos} - {""}
        self._find_ends(special, eos)
        self._has_told = False

    def prompt(self, sample: Sample) -> str:
        """The conversation up to the answer of its last turn."""
        self._check(sample)
        return self._render(sample.turns, _num_leading(sample), open_end=True, taught=False)

    def conversation(self, sample: Sample) -> str:
        """All turns, answers included."""
        self._check(sample)
        return self._render(sample.turns, _num_leading(sample))

    def answers(self, sample: Sample, text: str) -> Spans:
        """Start and end, in characters of `text`, of what the model is to write in each turn.

        That is an answer, and the token that ends it.
        """
        for find in (self._by_prompts, self._by_template, self._by_answers):
            spans = find(sample, text)
            if spans is not None:
                return [self._ended(text, *span) for span in spans]
        raise ValueError(
            f"ConversationCollator, sample {sample.id!r}: expected a chat template that writes "
            "answers as they are, starts a conversation with its prompt or marks answers by "
            "{% generation %}, got none of it. Set processor.chat_template."
        )

    def check_system(self, whole: bool) -> None:
        """Refuses a chat template that takes no system messages.

        Args:
            whole: Whether it is to take them in whole conversations as well, not in prompts only.

        Raises:
            ValueError: It takes none.
        """
        if self._template is not None:
            self._system(whole)

    # -- where answers are -----------------------------------------------------------------------

    def _by_prompts(self, sample: Sample, text: str) -> Spans | None:
        """An answer is what a conversation has beyond its prompt."""
        spans = []
        leading, most = _num_leading(sample), len(sample.turns)
        for number in range(1, most + 1):
            turns = sample.turns[:number]
            prompt = self._render(turns, leading, open_end=True)
            whole = self._render(turns, leading, goes_on=number < most)
            if not (text.startswith(whole) and whole.startswith(prompt)):
                return None
            spans.append((len(prompt), len(whole)))
        return spans

    def _by_template(self, sample: Sample, text: str) -> Spans | None:
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

    def _by_answers(self, sample: Sample, text: str) -> Spans | None:
        """An answer is what stands where another would; templates may strip it."""
        marked = [
            Turn(turn.question, _ANSWER.format(number), system=turn.system)
            for number, turn in enumerate(sample.turns)
        ]
        pieces = self._between(self._render(marked, _num_leading(sample)), len(marked))
        if not text.startswith(pieces[0]):
            return None
        spans, place = [], len(pieces[0])
        for turn, after in zip(sample.turns, pieces[1:], strict=True):
            own = turn.answer
            for answer in (own, own.strip(), own.lstrip(), own.rstrip()):
                if text.startswith(answer + after, place):
                    break
            else:
                return None
            spans.append((place, place + len(answer)))
            place += len(answer + after)
        if place != len(text):
            return None
        if self._has_told:
            return spans
        self._has_told = True
        warnings.warn(
            "collate: expected a chat template whose conversations start as their prompts do, got "
            f"one of {type(self._processor).__name__} that asks in other words than it records: "
            "answers are learnt after the latter.",
            UserWarning,
            stacklevel=2,
        )
        return spans

    @staticmethod
    def _between(text: str, number: int) -> list[str]:
        """The text before, between and after so many marked answers."""
        pieces = []
        for own in range(number):
            before, _, text = text.partition(_ANSWER.format(own))
            pieces.append(before)
        return [*pieces, text]

    def _ended(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A span up to and with the token that ends the answer."""
        written = max(self._ends, key=len)
        if written and written in text[start:end]:  # what a template writes behind it is no answer
            return start, text.rindex(written, start, end) + len(written)
        own = text[start:end].rstrip()
        if not own.endswith(tuple(self._stops)):
            end += len(_leading(text[end:], self._stops))
        return start, start + len(text[start:end].rstrip())

    def _find_ends(self, special: set[str], eos: str) -> None:
        """Where the template ends answers, and by which token.

        Args:
            special: All special tokens.
            eos: The one that ends a sequence, or nothing.
        """
        turns = [Turn("?", _ANSWER.format(number)) for number in range(2)]
        _, after = self._between(self._render(turns[:1], 1), 1)
        if own := _leading(after, special).strip():
            self._stops.add(own)
        if any(token in after for token in special):
            return
        middle = eos
        try:
            _, between, _ = self._between(self._render(turns, 1), 2)
        except Exception:  # a template of single questions
            between = ""
        if _leading(between, self._stops):
            middle = ""
        self._ends, self._is_set_off = (middle, eos), bool(_leading(between, special))

    # -- what a template is given ----------------------------------------------------------------

    def _render(
        self,
        turns: Sequence[Turn],
        leading: int,
        open_end: bool = False,
        goes_on: bool = False,
        taught: bool = True,
    ) -> str:
        """Turns as text, with `leading` images before the first question.

        Args:
            turns: The turns.
            leading: Images.
            open_end: Without the last answer.
            goes_on: The last answer is written as one that further turns follow.
            taught: Answers have ends that can be learnt. Else those are left out that the template
                does without.
        """
        if self._template is None:
            token = self._image_token
            assert token is not None
            parts = [f" {turn.answer}{self._ends[1]}" for turn in turns]
            if open_end:
                parts[-1] = ""
            questions = [turn.question.replace(IMAGE, token) for turn in turns]
            questions[0] = f"{token}\n" * leading + questions[0]
            told = [f"{turn.system} " if turn.system else "" for turn in turns]
            return "".join(
                f"{system}USER: {question} ASSISTANT:{part}"
                for system, question, part in zip(told, questions, parts, strict=True)
            )
        messages = self._messages(turns, leading, not open_end, goes_on, taught)
        return self._apply(messages[:-1] if open_end else messages, open_end)

    def _messages(
        self,
        turns: Sequence[Turn],
        leading: int,
        whole: bool = True,
        goes_on: bool = False,
        taught: bool = True,
    ) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        middle, last = self._ends
        if self._is_set_off and not taught:
            middle = ""
        for number, turn in enumerate(turns):
            if turn.system:
                content = self._system(whole)(turn.system)
                messages.append({"role": "system", "content": content})
            images = [{"type": "image"}] * (leading if number == 0 else 0)
            asked = [*images, *_parts(turn.question)] or _text("")
            messages.append({"role": "user", "content": asked})
            end = middle if goes_on or number < len(turns) - 1 else last
            messages.append({"role": "assistant", "content": self._answer(turn.answer + end)})
        return messages

    def _apply(self, messages: list[Any], open_end: bool = False) -> str:
        own = getattr(self._processor, "chat_template", None)
        other: dict[str, Any] = {} if own == self._template else {"chat_template": self._template}
        text: str = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_end, **other
        )
        return text

    def _find_template(self) -> str | None:
        """The processor's, or that of its tokenizer, if it shows images; None for the plain form.

        Raises:
            ValueError: The plain form cannot be used, or the template takes no such questions.
        """
        own: Any = getattr(self._processor, "chat_template", None)
        token, name = self._image_token, type(self._processor).__name__
        if own is None and token is not None:
            own = _default(getattr(self._processor.tokenizer, "chat_template", None))
            self._template = own
            try:
                return own if own is not None and token in self._apply(_QUESTION) else None
            except Exception:  # one of a language model
                return None
        if own is None:
            raise ValueError(
                "collate: expected a processor with a chat template or an image token, got "
                f"{name} with neither. Set processor.chat_template."
            )
        self._template = own = _default(own)
        try:
            self._apply(_QUESTION, True)
        except Exception as error:  # however a template refuses
            raise ValueError(
                "collate: expected a chat template that takes questions as parts, images and "
                f"texts, got one of {name} that does not: {error}. Set processor.chat_template."
            ) from error
        return str(own)

    def _find_answer(self) -> Content:
        """Makes an answer's content, as the template takes it.

        Raises:
            ValueError: It takes none.
        """
        before = self._apply(_QUESTION, True)
        for content in (_text, str):
            try:
                told = self._apply([*_QUESTION, {"role": "assistant", "content": content(_PROBE)}])
            except Exception:
                continue
            if _holds(told, before):
                return content
        raise ValueError(
            "collate: expected a chat template that takes answers, got one of "
            f"{type(self._processor).__name__} that refuses them, leaves them out or repeats them. "
            "Set processor.chat_template."
        )

    def _system(self, whole: bool) -> Content:
        """Makes a system message's content, as the template takes it.

        Args, Raises: As for `check_system`.
        """
        if whole not in self._systems:
            self._systems[whole] = self._find_system(whole)
        return self._systems[whole]

    def _find_system(self, whole: bool) -> Content:
        talk = [*_QUESTION, {"role": "assistant", "content": self._answer("0")}]
        for content in (_text, str):
            led = [{"role": "system", "content": content(_PROBE)}, *talk]
            try:
                told, without = (
                    [self._apply(own[:-1], True), *([self._apply(own)] if whole else [])]
                    for own in (led, talk)
                )
            except Exception:
                continue
            if all(_holds(*pair) for pair in zip(told, without, strict=True)):
                return content
        raise ValueError(
            "collate: expected a chat template that takes system messages, got one of "
            f"{type(self._processor).__name__} that refuses them, leaves them out or repeats them. "
            "Put their text into the first question, or set processor.chat_template."
        )

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


def _leading(text: str, tokens: set[str]) -> str:
    """The token that a text starts with, and blanks before it; nothing if it starts with none."""
    blanks = len(text) - len(text.lstrip())
    own = [len(token) for token in tokens if text.startswith(token, blanks)]
    return text[: blanks + max(own)] if own else ""


def _default(template: Any) -> Any:
    """The one that is used where there are several."""
    return template.get("default") if isinstance(template, dict) else template


def _holds(text: str, without: str) -> bool:
    """Whether a rendering says the probe once, and not as what Python or JSON prints."""
    same = all(text.count(quoted) == without.count(quoted) for quoted in ("'text'", '"text"'))
    return text.count(_PROBE) == 1 and same


def _num_leading(sample: Sample) -> int:
    """Images that come before the first question, as no question says where."""
    return 0 if num_places(sample.turns) else len(sample.images)


def _text(text: str) -> list[dict[str, Any]]:
    """A text as the one part of a message."""
    return [{"type": "text", "text": text}]


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
            parts += _text(text)
    return parts


#: What templates are asked with.
_QUESTION = [{"role": "user", "content": _parts(IMAGE + "0")}]
