"""Chat templates of the kinds that published checkpoints have: what is asked, what is learnt."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from processors import CHATML, LLAVA, RED, build_processor
from tokenizers.processors import TemplateProcessing

from tokenprune.data import ConversationCollator, PromptCollator, Sample, Turn
from tokenprune.data.collate import IGNORED

ONE = Sample("one", (RED,), (Turn("Which?", "red"),))
TALK = Sample("talk", (RED,), (Turn("Which?", "red"), Turn("it?", "no"), Turn("Why?", "")))

# As LLaVA-OneVision's: the mark around an answer ends before the token that ends it, and what is
# recorded has a blank more than what is asked.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '\n' + part['text'] }}"
    "{% endgeneration %}{% else %}{{ '\n' + part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As GLM-4.1V's: an answer is a text, and what ends it is the next question.
NEXT_ENDS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|im_start|>\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% else %}{{ '<|im_end|>\n' }}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}"
)
# As vLLM's for Pixtral: a text that an end is added to.
ADDED = NEXT_ENDS.replace(
    "{{ message['content'] }}", "{{ message['content'] + eos_token }}"
)  # fmt: skip
# As an older one of LLaVA-NeXT on Mistral: what ends an answer is no token.
LITERAL = NEXT_ENDS.replace(
    "{{ message['content'] }}", "{{ message['content'][0]['text'] + '<\\\\s> ' }}"
).replace("<|im_start|>", "USER:").replace("<|im_end|>", "ASSISTANT:")  # fmt: skip
# As Molmo 2's: the next question ends the answer before it, by what ends a sequence.
LATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '' if loop.first else '</s>\n' }}{{ '<|im_start|>user\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ ' <|im_start|>assistant\n' + message['content'][0]['text'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Gemma 4's: what is asked has a thought that is not recorded; answers are stripped.
THINKS = CHATML.replace("part['text']", "part['text'] | trim").replace(
    "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think></think>' }}{% endif"
)
THREE = {
    "marked": (MARKED, ["\nred<|im_end|>", "\nno<|im_end|>", "\n<|im_end|>"]),
    "next ends": (NEXT_ENDS, ["red</s>", "no</s>", "</s>"]),
    "added": (ADDED, ["red</s>", "no</s>", "</s>"]),
    "literal": (LITERAL, ["red</s>", "no</s>", "</s>"]),
    "late": (LATE, ["red</s>", "no</s>", "</s>"]),
    "thinks": (THINKS, ["red<|im_end|>", "no<|im_end|>", "<|im_end|>"]),
}


def learnt(collate: ConversationCollator, sample: Sample) -> list[str]:
    """What is labelled, run by run, as text."""
    writer = collate._writer
    text = writer.conversation(sample)
    spans = writer.answers(sample, text)
    row = collate([sample])["inputs"]["labels"][0]
    said = collate.processor.tokenizer.decode(row[row != IGNORED]).replace("<unk>", "")
    own = [text[start:end] for start, end in spans]
    assert "".join(said.split()) == "".join("".join(own).split())
    return own


@pytest.mark.parametrize("kind", THREE)
@pytest.mark.filterwarnings("ignore:collate. expected a chat template whose conversations")
def test_an_answer_is_learnt_with_what_ends_it(kind: str) -> None:
    template, expected = THREE[kind]
    processor = build_processor("llava", template)
    assert learnt(ConversationCollator(processor), TALK) == expected


@pytest.mark.parametrize("kind", THREE)
def test_a_prompt_is_what_the_template_makes_of_it(kind: str) -> None:
    """With the answers before it as the template writes them, however it takes them."""
    template, _ = THREE[kind]
    processor = build_processor("llava", template)
    as_text = kind in ("next ends", "added")
    messages: list[dict[str, Any]] = []
    for turn in TALK.turns:
        image = [{"type": "image"}] if turn is TALK.turns[0] else []
        asked = [*image, {"type": "text", "text": turn.question}]
        said = turn.answer + ("</s>" if kind == "literal" else "")
        told = said if as_text else [{"type": "text", "text": said}]
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    expected = processor.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    assert PromptCollator(processor).text(TALK) == expected


@pytest.mark.parametrize("kind", ["marked", "next ends", "late"])
@pytest.mark.filterwarnings("ignore:collate. expected a chat template whose conversations")
def test_special_tokens_of_an_answer_do_not_end_it(kind: str) -> None:
    """As GLM-V's, whose answers are boxed."""
    template, expected = THREE[kind]
    turns = [Turn(turn.question, f"<pad>{turn.answer}<pad>") for turn in TALK.turns]
    processor = build_processor("llava", template)
    boxed = learnt(ConversationCollator(processor), Sample("boxed", (RED,), tuple(turns)))
    assert [own.replace("<pad>", "") for own in boxed] == expected
    assert all(own.count("<pad>") == 2 for own in boxed)


@pytest.mark.parametrize("opens", ["<s>", "<|im_start|>"])
def test_what_opens_a_question_ends_no_answer(opens: str) -> None:
    template = (
        "{% for message in messages %}{{ 'OPENS' if message['role'] == 'user' else ' ' }}"
        "{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    ).replace("OPENS", opens)
    collate = ConversationCollator(build_processor("llava", template))
    assert learnt(collate, TALK) == [" red</s>", " no</s>", " </s>"]


def test_a_template_may_take_single_questions_only() -> None:
    single = "{% if messages | length > 2 %}{{ raise_exception('one') }}{% endif %}" + CHATML
    processor = build_processor("llava", single)
    assert learnt(ConversationCollator(processor), ONE) == ["red<|im_end|>"]
    unended = single.replace("{{ '<|im_end|>\n' }}", "")
    assert learnt(ConversationCollator(build_processor("llava", unended)), ONE) == ["red</s>"]


def test_a_processor_may_know_its_own_template_alone() -> None:
    processor = build_processor("llava", CHATML)
    expected = PromptCollator(processor).text(TALK)
    whole = processor.apply_chat_template
    processor.apply_chat_template = lambda messages, tokenize, add_generation_prompt: whole(
        messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt
    )
    assert PromptCollator(processor).text(TALK) == expected


def test_a_template_that_asks_in_other_words_is_told_of() -> None:
    collate = ConversationCollator(build_processor("llava", THINKS))
    with pytest.warns(UserWarning, match="asks in other words than it records"):
        collate([ONE])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConversationCollator(build_processor("llava", CHATML))([ONE, TALK])
        PromptCollator(build_processor("llava", THINKS))([ONE, TALK])


def test_a_tokenizer_may_have_the_template() -> None:
    """One that shows images; that of the language model alone does not."""
    processor, other = (build_processor("llava", CHATML) for _ in range(2))
    expected = PromptCollator(processor).text(TALK)
    other.tokenizer.chat_template, other.chat_template = CHATML, None
    assert PromptCollator(other).text(TALK) == expected
    plain = build_processor("llava", None)
    expected = PromptCollator(plain).text(TALK)
    for language in (
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}",
        CHATML.replace("<image>", ""),
    ):
        plain.tokenizer.chat_template = language
        assert PromptCollator(plain).text(TALK) == expected


def test_of_several_templates_the_default_is_used() -> None:
    processor = build_processor("llava", MARKED)
    expected = learnt(ConversationCollator(processor), TALK)
    processor.chat_template = {"tool_use": LLAVA, "default": MARKED}
    assert learnt(ConversationCollator(processor), TALK) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] + 'x' }}{% endfor %}", "takes questions as parts"),
        (CHATML.replace("in messages %}", "in messages[:1] %}"), "takes answers, got one of Llava"),
        (NEXT_ENDS.replace("message['content'] }", "message['content'] * 2 }"), "or repeats them"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptCollator(build_processor("llava", template))


def test_nothing_is_asked_about_nothing() -> None:
    """Some templates look at the first part of a question."""
    looks = "{{ messages[0]['content'][0]['type'] }}" + CHATML
    text = PromptCollator(build_processor("llava", looks)).text(Sample("a", (), (Turn("", "b"),)))
    assert text.startswith("text<|im_start|>user")


def test_a_processor_says_whether_special_tokens_are_added() -> None:
    """As HunYuan-VL's, whose template writes them all; most leave them to the tokenizer."""
    processor = build_processor("llava", CHATML)
    begins = {"single": "<s> $A", "special_tokens": [("<s>", processor.tokenizer.bos_token_id)]}
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**begins)
    collate = PromptCollator(processor)
    with_them = collate([ONE])["inputs"]["input_ids"][0].tolist()

    class Silent(type(processor)):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return super().__call__(*arguments, **{"add_special_tokens": False} | options)

    processor.__class__ = Silent
    without = collate([ONE])["inputs"]["input_ids"][0].tolist()
    assert with_them == [processor.tokenizer.bos_token_id, *without]
