"""Samples as inputs of a processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processors import BLUE, CHATML, LLAVA, OTHERS, RED, SAMPLES, TEMPLATES, build_processor
from tokenizers import AddedToken

from tokenprune.data import ConversationCollator, PromptCollator, Sample, Turn
from tokenprune.data.collate import IGNORED


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_conversations_are_labelled_on_answers_and_nowhere_else(family, template):
    processor = build_processor(family, TEMPLATES[template])
    tokenizer = processor.tokenizer
    inputs = ConversationCollator(processor)(SAMPLES)["inputs"]
    assert inputs["attention_mask"][:, 0].all()  # padded on the right
    end = "<|im_end|>" if template == "chatml" else "</s>"
    for row, sample in enumerate(SAMPLES):
        labelled = inputs["labels"][row] != IGNORED
        assert (inputs["labels"][row] == inputs["input_ids"][row])[labelled].all()
        text = tokenizer.decode(inputs["labels"][row][labelled])
        parts = [part.strip() for part in text.split(end)]
        assert parts == [turn.answer for turn in sample.turns] + [""]
        assert int((inputs["input_ids"][row] == processor.image_token_id).sum()) > 1
        assert not (labelled & (inputs["attention_mask"][row] == 0)).any()
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_prompt_is_a_conversation_up_to_its_last_answer(family, template):
    """What training has the model write is what generation asks it for."""
    processor = build_processor(family, TEMPLATES[template])
    whole = ConversationCollator(processor)(SAMPLES)["inputs"]
    prompts = PromptCollator(processor)(SAMPLES)
    assert [sample.id for sample in prompts["samples"]] == ["a", "b", "c"]
    for row in range(len(SAMPLES)):
        labelled = whole["labels"][row] != IGNORED
        last = int((labelled[1:] & ~labelled[:-1]).nonzero()[-1, 0]) + 1
        mask = prompts["inputs"]["attention_mask"][row].bool()
        assert mask[-1]  # padded on the left
        torch.testing.assert_close(
            prompts["inputs"]["input_ids"][row][mask], whole["input_ids"][row, :last]
        )
    torch.testing.assert_close(prompts["inputs"]["pixel_values"], whole["pixel_values"])


MIXED = [
    Sample("none", (), (Turn("Which colour is it?", "red"),)),
    Sample("two", (RED, BLUE), (Turn("<image>\nis it red?\n<image>", "no"), Turn("it?", "7"))),
    Sample("front", (BLUE, RED), (Turn("Which?", "blue"),)),
    Sample("later", (RED, BLUE), (Turn("it <image>", "red"), Turn("<image>\nit?", "red"))),
    Sample("third", (RED,), (Turn("q", "no"), Turn("q", "no"), Turn("is <image> it?", "yes"))),
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_images_are_where_questions_say(family, template):
    processor = build_processor(family, TEMPLATES[template])
    tokenizer = processor.tokenizer
    inputs = ConversationCollator(processor)(MIXED)["inputs"]
    end = "<|im_end|>" if template == "chatml" else "</s>"
    for row, sample in enumerate(MIXED):
        labelled = inputs["labels"][row] != IGNORED
        told = tokenizer.decode(inputs["labels"][row][labelled])
        assert [part.strip() for part in told.split(end)] == [t.answer for t in sample.turns] + [""]
        assert (inputs["labels"][row] == inputs["input_ids"][row])[labelled].all()
        ids = inputs["input_ids"][row]
        if family == "llava":  # LLaVA-NeXT cuts large images into tiles
            assert int((ids == processor.image_token_id).sum()) == 16 * len(sample.images)
        first_answer = int(labelled.nonzero()[0, 0])
        before = bool((ids[:first_answer] == processor.image_token_id).any())
        assert before == (sample.id in ("two", "front", "later"))
        after = bool((ids[first_answer:] == processor.image_token_id).any())
        assert after == (sample.id in ("later", "third"))
    assert "pixel_values" not in ConversationCollator(processor)(MIXED[:1])["inputs"]


def test_a_place_in_a_question_is_where_the_template_puts_it():
    collate = ConversationCollator(build_processor("llava", CHATML))
    shown = collate._writer.conversation(MIXED[1])
    assert shown.startswith("<|im_start|>user\n<image>is it red?<image><|im_end|>\n")


def test_line_breaks_beside_images_between_texts_are_kept():
    """As the processor writes the same parts itself."""
    processor = build_processor("llava", CHATML)
    image = {"type": "image"}
    texts = [{"type": "text", "text": text} for text in ("First:\n", "\nSecond:\n", "\nAlike?")]
    parts = [texts[0], image, texts[1], image, texts[2]]
    for own, images in ((parts, (RED, BLUE)), (parts[:4], (RED, BLUE)), (parts[1:3], (RED,))):
        question = "".join("<image>" if one is image else one["text"] for one in own)
        shown = PromptCollator(processor)._writer.prompt(Sample("x", images, (Turn(question, ""),)))
        if own == parts[1:3]:  # one text, which its image is set apart from
            own = [image, {"type": "text", "text": "Second:\n"}]
        assert shown == processor.apply_chat_template(
            [{"role": "user", "content": own}], tokenize=False, add_generation_prompt=True
        )


# How templates of the field take system messages: as parts, as a text, before the first question.
AS_TEXT = CHATML.replace(
    "{% for part",
    "{% if message['role'] == 'system' %}{{ message['content'] }}{% else %}{% for part",
).replace("{% endfor %}{{ '<|im_end|>", "{% endfor %}{% endif %}{{ '<|im_end|>")
JOINED = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
) + CHATML.replace("in messages", "in rest").replace(
    "message['role'] + '\n' }}", "message['role'] + '\n' + (first if loop.first else '') }}"
)
# As Pixtral's: it is told before the last question, if that is where the conversation ends.
LATE = (
    "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
) + CHATML.replace("in messages", "in rest").replace(
    "message['role'] + '\n' }}",
    "message['role'] + '\n' + (told + '\n' if loop.last and told is defined "
    "and message['role'] == 'user' else '') }}",
)
TWICE = CHATML.replace(
    "{% for part",
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}{% endif %}{% for part",
)
NO_IMAGE = (
    "{% if messages[0]['role'] == 'system' and messages[1]['content'][0]['type'] == 'image' %}"
    "{{ raise_exception('none') }}{% endif %}"
) + CHATML
QUOTES = "{{ 'Answer as {\"text\": ...} ' }}" + CHATML
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML
)
LEAVES_OUT = CHATML.replace(
    "in messages %}", "in messages if message['role'] != 'system' %}"
)  # fmt: skip
TOLD = Sample("told", (RED,), (Turn("Which?", "red", system="Be it\nno"), Turn("it?", "yes")))


@pytest.mark.parametrize("template", [LLAVA, CHATML, AS_TEXT, JOINED, QUOTES, None])
def test_a_system_message_is_where_the_template_puts_it(template):
    processor = build_processor("llava", template)
    collate = ConversationCollator(processor)
    shown, prompt = collate._writer.conversation(TOLD), collate._writer.prompt(TOLD)
    silent = Sample("silent", TOLD.images, (Turn("Which?", "red"), TOLD.turns[1]))
    without = collate._writer.conversation(silent)
    own = {
        LLAVA: "SYSTEM: Be it\nno ",
        JOINED: "Be it\nno\n\n",
        None: "Be it\nno ",
    }.get(template, "<|im_start|>system\nBe it\nno<|im_end|>\n")
    assert shown.count("Be it\nno") == 1
    assert shown.replace(own, "") == without
    assert shown.startswith(prompt)
    inputs = collate([TOLD, silent])["inputs"]
    labels = inputs["labels"]
    said = [row[row != IGNORED].tolist() for row in labels]
    assert said[0] == said[1]  # it is read, not taught
    assert inputs["attention_mask"][0].sum() > inputs["attention_mask"][1].sum()


@pytest.mark.parametrize("template", [REFUSES, LEAVES_OUT, TWICE, NO_IMAGE])
def test_a_template_without_system_messages_is_named(template):
    prompts = PromptCollator(build_processor("llava", template))
    assert len(prompts([Sample("a", (RED,), (Turn("Which?", ""),))])["inputs"]["input_ids"]) == 1
    for check in (prompts.check_system, lambda: prompts([TOLD])):
        with pytest.raises(ValueError, match="template that takes system messages, got one"):
            check()


def test_a_template_may_take_system_messages_in_prompts_only():
    processor = build_processor("llava", LATE)
    PromptCollator(processor).check_system()
    assert PromptCollator(processor).text(TOLD).count("Be it\nno") == 1
    with pytest.raises(ValueError, match="template that takes system messages"):
        ConversationCollator(processor).check_system()


def test_a_template_that_marks_answers_agrees_with_its_prompts():
    collate = ConversationCollator(build_processor("llava", LLAVA))
    expected = collate(SAMPLES)["inputs"]["labels"]
    collate._writer._by_prompts = lambda sample, text: None
    torch.testing.assert_close(collate(SAMPLES)["inputs"]["labels"], expected)


def test_an_end_of_turn_that_has_no_name_ends_answers():
    """As in Gemma 3, whose <end_of_turn> is special and not among the named special tokens."""
    processor = build_processor("llava", CHATML.replace("<|im_end|>", "<turn>"))
    processor.tokenizer.add_tokens(AddedToken("<turn>", special=True))
    assert "<turn>" not in processor.tokenizer.all_special_tokens
    labels = ConversationCollator(processor)(SAMPLES[:1])["inputs"]["labels"][0]
    text = processor.tokenizer.decode(labels[labels != IGNORED])
    assert text.replace(" ", "") == "red<turn>"


def test_a_template_that_changes_answers_is_refused():
    rigid = CHATML.replace("assistant\\n", "assistant\\nWell:").replace(
        "part['text']", "part['text'] | replace('red', 'RED')"
    )
    rigid = rigid.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant: '")
    with pytest.raises(ValueError, match=r"sample 'a': expected a chat template that .* none of"):
        ConversationCollator(build_processor("llava", rigid))(SAMPLES)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (Turn("<image>\nWhich <image>?", "red"), "expected one <image> per image .* got 2 for 1"),
        (Turn("Which?", "<image>"), "expected plain text, got the image placeholder '<image>'"),
        (Turn("Which <|im_start|>?", "red"), "expected plain text, .* '<|im_start|>' in 'Which"),
    ],
)
def test_placeholders_elsewhere_are_refused(turn, message):
    processor = build_processor("llava", LLAVA)
    if "im_start" in turn.question:
        processor.image_token = "<|im_start|>"
    for collator in (PromptCollator, ConversationCollator):
        with pytest.raises(ValueError, match=f"sample 'z': {message}"):
            collator(processor)([Sample("z", (RED,), (turn,))])


@pytest.mark.parametrize("name", ["video_token", "audio_token"])
def test_e5_placeholders_of_what_is_not_read_are_refused(name):
    processor = build_processor("llava", LLAVA)
    setattr(processor, name, "<clip>")
    for turn in (Turn("<clip>\nWhich?", "red"), Turn("Which?", "a <clip>")):
        for collator in (PromptCollator, ConversationCollator):
            with pytest.raises(
                ValueError, match=r"sample 'z': expected text and images, .*'<clip>'"
            ):
                collator(processor)([Sample("z", (RED,), (turn,))])


#: By how many images their rows have: one, two between words, none.
ROWS = {
    1: Sample("one", (RED,), (Turn("Which colour is it?", "red"),)),
    2: Sample("two", (RED, BLUE), (Turn("Which <image> colour <image> is it?", "blue 7"),)),
    0: Sample("none", (), (Turn("Which colour is it?", "no"),)),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_take_any_number_of_images(family: str) -> None:
    """By their own processors: a row is what it is alone, and its prompt begins it."""
    processor = OTHERS[family]()
    for numbers in ((1,), (1, 2), (1, 0), (0,), (0, 1)):
        check_rows(processor, numbers)


def check_rows(processor: Any, numbers: tuple[int, ...]) -> None:
    samples = [ROWS[number] for number in numbers]
    prompts = PromptCollator(processor)(samples)["inputs"]
    whole = ConversationCollator(processor)(samples)["inputs"]
    placeholder = processor.image_token_id
    assert prompts["attention_mask"][:, -1].all()  # padded on the left
    assert whole["attention_mask"][:, 0].all()  # and on the right
    for row, number in enumerate(numbers):
        own = whole["input_ids"][row][whole["attention_mask"][row].bool()]
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        labelled = whole["labels"][row] != IGNORED
        assert torch.equal(prompt, own[: len(prompt)])
        assert labelled.nonzero()[0, 0] == len(prompt)
        said = processor.tokenizer.decode(whole["labels"][row][labelled], skip_special_tokens=True)
        assert said.strip() == ROWS[number].turns[0].answer
        assert ((own == placeholder).sum() > 0) == (number > 0)
        alone = PromptCollator(processor)([ROWS[number]])["inputs"]
        assert torch.equal(prompt, alone["input_ids"][0])
    assert ("pixel_values" in prompts) == (sum(numbers) > 0)
    if sum(numbers):
        torch.testing.assert_close(prompts["pixel_values"], whole["pixel_values"])


@pytest.mark.parametrize("collator", [PromptCollator, ConversationCollator])
def test_words_that_a_tokenizer_does_not_know_are_told_once(collator, recwarn):
    """Whole words, where letters are unknown, of rows that are padded, too; pads are none."""
    collate = collator(build_processor("llava", LLAVA))
    collate(SAMPLES)
    assert not recwarn
    odd = Sample("odd", (RED,), (Turn("<image>\nWhich Zèbre is it?", "no"),))
    with pytest.warns(UserWarning, match=r"got 'Zèbre': it reads all of them as <unk>"):
        collate([*SAMPLES, odd])
    recwarn.clear()
    collate([odd])
    assert not recwarn


def test_an_answer_that_is_not_read_is_not_told(recwarn):
    """Whatever the template says in words of its own; nor is that searched for ever."""
    processor = build_processor("llava", LLAVA.replace("USER", "ÛSER"))
    tokenizer = processor.tokenizer
    sample = Sample("odd", (RED,), (Turn("Which is it?", "Žlutý"),))
    collate = PromptCollator(processor)
    inputs = collate([sample])["inputs"]
    assert tokenizer.unk_token_id in inputs["input_ids"][0].tolist()
    assert not recwarn
    with pytest.warns(UserWarning, match="got 'Žlutý'"):
        ConversationCollator(processor)([sample])
    for _ in range(8):
        collate([sample])
    recwarn.clear()
    collate([Sample("late", (RED,), (Turn("Which Žlutý is it?", "no"),))])
    assert not recwarn


def test_an_end_of_sequence_that_is_called_unknown_is_none(recwarn):
    processor = build_processor("llava", LLAVA)
    processor.tokenizer.unk_token = processor.tokenizer.eos_token
    ConversationCollator(processor)(SAMPLES)
    assert not recwarn
