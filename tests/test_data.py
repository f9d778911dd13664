"""Data sets, collators and the data module."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava_next import LlavaNextImageProcessorPil, LlavaNextProcessor

from tokenprune.data import (
    ConversationCollator,
    FolderDataset,
    HubDataset,
    PromptCollator,
    Sample,
    SceneDataset,
    Turn,
)
from tokenprune.data.collate import IGNORED
from tokenprune.data.module import EpochShuffle, VQADataModule
from tokenprune.data.scenes import COLOURS, KINDS, SYMBOLS

# ------------------------------------------------------------------------------------------ scenes


def test_scenes_are_the_same_for_the_same_seed_split_and_index():
    first, second = (SceneDataset("test", 40, seed=3)[17] for _ in range(2))
    assert first.turns == second.turns
    assert first.id == second.id
    assert first.image.tobytes() == second.image.tobytes()
    assert first.image.mode == "RGB"


def test_splits_and_seeds_have_no_scene_in_common():
    streams = [("train", 0), ("validation", 0), ("test", 0), ("test", 1)]
    scenes = [SceneDataset(split, 300, seed=seed) for split, seed in streams]
    shown = [{str(own.scene(index)) for index in range(300)} for own in scenes]
    assert len(set().union(*shown)) == sum(map(len, shown)) == 1200


def _answer(question: str, scene) -> str:
    """Answers a question from the description of its scene, without the generator's help."""
    by_symbol = {item.symbol: item for item in scene.items}
    by_colour = {item.colour: item for item in scene.items}
    if match := re.fullmatch(r"Which symbol is (\w+)\?", question):
        return by_colour[match[1]].symbol
    if match := re.fullmatch(r"Which colour is (\w+)\?", question):
        return by_symbol[match[1]].colour
    if match := re.fullmatch(r"Is there a (\w+) (\w+)\?", question):
        found = any((item.colour, item.symbol) == match.groups() for item in scene.items)
        return "yes" if found else "no"
    if match := re.fullmatch(r"Is (\w+) (left of|above) (\w+)\?", question):
        a, b = by_colour[match[1]], by_colour[match[3]]
        holds = a.column < b.column if match[2] == "left of" else a.row < b.row
        return "yes" if holds else "no"
    assert question == "What does the sign say?"
    return " ".join(scene.signs[0].text)


@pytest.mark.parametrize("num_turns", [1, 7])
def test_answers_agree_with_the_scene(num_turns):
    scenes = SceneDataset("train", 400, num_turns=num_turns)
    for index in range(400):
        scene, questions = scenes.scene(index)
        assert len(questions) == num_turns
        for question in questions:
            assert question.turn.answer == _answer(question.turn.question, scene)
        symbols = [item.symbol for item in scene.items]
        colours = [item.colour for item in scene.items]
        assert len(set(symbols)) == len(symbols)
        assert len(set(colours)) == len(colours)
        assert set(symbols) <= set(SYMBOLS)
        assert set(colours) <= set(COLOURS)


def test_kinds_and_answers_are_balanced():
    scenes = SceneDataset("test", 2000)
    turns = [scenes.scene(index)[1][0].turn for index in range(2000)]
    assert Counter(turn.kind for turn in turns) == dict.fromkeys(KINDS, 400)
    for kind in ("exist", "relation"):
        share = sum(turn.answer == "yes" for turn in turns if turn.kind == kind) / 400
        assert 0.42 < share < 0.58
    for kind, answers in (("read", SYMBOLS), ("colour", COLOURS)):
        counts = Counter(turn.answer for turn in turns if turn.kind == kind)
        assert set(counts) == set(answers)
        assert max(counts.values()) < 3 * 400 / len(answers)


def test_colours_of_objects_can_be_seen_where_the_scene_says():
    scenes = SceneDataset("test", 5)
    for index in range(5):
        scene, _ = scenes.scene(index)
        image = scenes[index].image
        for item in scene.items:
            box = (item.column * 16, item.row * 16, item.column * 16 + 16, item.row * 16 + 16)
            pixels = list(image.crop(box).get_flattened_data())
            near = [
                all(abs(a - b) <= 14 for a, b in zip(pixel, COLOURS[item.colour], strict=True))
                for pixel in pixels
            ]
            assert sum(near) >= 4, (index, item)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "SceneDataset.split: expected one of .*'test'.*, got 'dev'. Each"),
        ({"num_samples": 0}, "expected num_samples and num_turns >= 1, got 0 and 1. Ask"),
        ({"min_objects": 9}, "max_objects <= 8 .*, got 9 and 8. Change"),
        ({"kinds": ["count"]}, r"expected some of .*, got \['count'\]. Name"),
    ],
)
def test_bad_scenes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneDataset(**({"split": "test", "num_samples": 3} | arguments))


# ------------------------------------------------------------------------------------------ folder


def _folder(path: Path, rows: list) -> Path:
    path.mkdir(exist_ok=True)
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (20, 10), colour).save(path / name)
    (path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (path / "questions.jsonl").write_text(text, encoding="utf-8")
    return path


ROW = {"image": "a.png", "question": "Which colour?", "answer": "red"}


def test_folder(tmp_path):
    other = {"image": "b.png", "question": "¿Color?", "answer": 3, "id": "x/1", "kind": "count"}
    folder = _folder(tmp_path, [ROW, "", other])
    for path in (folder, str(folder / "questions.jsonl")):
        data = FolderDataset(path)
        assert len(data) == 2
        assert (data[0].id, data[0].turns) == ("1", (Turn("Which colour?", "red"),))
        assert data[0].image.getpixel((0, 0)) == (255, 0, 0)
        assert (data[1].id, data[1].turns) == ("x/1", (Turn("¿Color?", "3", "count"),))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "FolderDataset: expected at least one row, got none in .*questions.jsonl'. Write"),
        ([ROW, "{oops"], "questions.jsonl, row 2: expected a JSON object, got '{oops': .*. Write"),
        ([ROW, "[1]"], r"questions.jsonl, row 2: expected a JSON object, got '\[1\]'. Write"),
        (
            [{k: v for k, v in ROW.items() if k != "image"}],
            "questions.jsonl, row 1: expected 'image', got only the keys .*'question'.*. Fill",
        ),
        (
            [ROW, ROW | {"image": "gone.png", "id": 7}],
            r"row 2 \(id '7'\): expected an image file, got '.*gone.png', which .* exist. Check",
        ),
        ([ROW | {"answer": ["red"]}], r"row 1: expected text as 'answer', got \['red'\]. Write"),
        ([ROW | {"question": " "}], "row 1: expected 'question', got ' '. Fill"),
        ([ROW | {"id": 1.5}], "row 1: expected an id that is text or an integer, got 1.5. Leave"),
        (
            [ROW | {"id": "q"}, ROW | {"id": "q"}],
            r"row 2 \(id 'q'\): expected an id of its own, got that of row 1. Leave",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        FolderDataset(_folder(tmp_path, rows))


def test_a_line_ends_where_json_lines_end(tmp_path):
    question = "a\u2028b\u0085c"
    row = json.dumps(ROW | {"question": question}, ensure_ascii=False)
    data = FolderDataset(_folder(tmp_path, [row, ROW]))
    assert (len(data), data[0].turns[0].question) == (2, question)


def test_images_outside_the_folder_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    for image in ("../secret.png", str(tmp_path / "secret.png")):
        folder = _folder(tmp_path / "data", [ROW, ROW | {"image": image}])
        with pytest.raises(ValueError, match=r"row 2: expected an image in the data's own folder"):
            FolderDataset(folder)
        module = VQADataModule.from_folder(path=str(folder), allow_outside=True)
        assert module.test[1].image.size == (4, 4)
    own = str(tmp_path / "data" / "a.png")
    assert len(FolderDataset(_folder(tmp_path / "data", [ROW | {"image": own}]))) == 1


def test_an_unreadable_image_is_named_when_it_is_opened(tmp_path):
    data = FolderDataset(_folder(tmp_path, [ROW, ROW | {"image": "broken.png", "id": "b"}]))
    assert data[0].turns[0].answer == "red"
    with pytest.raises(ValueError, match=r"row 2 \(id 'b'\): expected an image .* got broken.png"):
        data[1]


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a .jsonl file .*got '.*nowhere', which"):
        FolderDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected exactly one .jsonl file in '.*', got \[\]"):
        FolderDataset(tmp_path)
    _folder(tmp_path, [ROW])
    (tmp_path / "more.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"got \['more.jsonl', 'questions.jsonl'\]. Give the path"):
        FolderDataset(tmp_path)


# --------------------------------------------------------------------------------------------- hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small data set in every form that can be read."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    images = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue")]
    columns = {
        "image": images,
        "query": [f"Question {i}?" for i in range(3)],
        "answer": ["red", "green", "blue"],
        "number": [11, 12, 13],
        "sort": ["a", "b", "a"],
    }
    features = datasets.Features(
        image=datasets.Image(),
        query=datasets.Value("string"),
        answer=datasets.Value("string"),
        number=datasets.Value("int64"),
        sort=datasets.Value("string"),
    )
    data = datasets.Dataset.from_dict(columns, features=features)
    data.save_to_disk(str(root / "plain"))
    datasets.DatasetDict({"val": data, "test": data.select([2, 0])}).save_to_disk(
        str(root / "splits")
    )
    data.to_parquet(str(root / "file.parquet"))
    for i, image in enumerate(images):
        image.save(root / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": "q", "answer": "a"} for i in range(3)]
    (root / "paths.json").write_text(json.dumps(rows))
    yield root
    patch.undo()


def test_hub_reads_every_form(saved):
    options = {"question_column": "query", "id_column": "number", "kind_column": "sort"}
    for path in ("plain", "file.parquet"):
        data = HubDataset(str(saved / path), **options)
        assert [data[i].id for i in range(len(data))] == ["11", "12", "13"]
        assert data[1].turns == (Turn("Question 1?", "green", "b"),)
        assert data[1].image.getpixel((0, 0)) == (0, 128, 0)
    data = HubDataset(str(saved / "splits"), split="test", question_column="query")
    assert [data[i].turns[0].answer for i in range(len(data))] == ["blue", "red"]
    assert [data[i].id for i in range(len(data))] == ["1", "2"]
    assert data[0].turns[0].kind == "all"
    data = HubDataset(str(saved / "paths.json"))
    assert data[2].image.getpixel((0, 0)) == (0, 0, 255)


def test_hub_names_what_is_wrong(saved, tmp_path, monkeypatch):
    import datasets

    path = str(saved / "plain")
    with pytest.raises(ValueError, match=r"expected the column 'question' in .*'query'.*. Set"):
        HubDataset(path)
    with pytest.raises(ValueError, match=r"expected one of the splits \['test', 'val'\].*'dev'"):
        HubDataset(str(saved / "splits"), split="dev")
    with pytest.raises(ValueError, match=r"expected a file or a folder, got '.*/nowhere', which"):
        HubDataset(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"ends in one of \['.arrow', .*\], got '.*.png'"):
        HubDataset(str(saved / "0.png"))
    with pytest.raises(ValueError, match="expected images or paths in the column 'number'"):
        HubDataset(path, question_column="query", image_column="number")
    empty = datasets.Dataset.from_dict({"image": [], "question": [], "answer": []})
    empty.to_parquet(tmp_path / "empty.parquet")
    empty.save_to_disk(str(tmp_path / "empty"))
    for name in ("empty.parquet", "empty"):
        with pytest.raises(ValueError, match=rf"one row, got none in '.*{name}', split 'test'"):
            HubDataset(str(tmp_path / name))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"expected a data set on the Hub or on disk, got .*none"):
        HubDataset(str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'Install it with pip install "tokenprune\[hub\]"'):
        HubDataset(path)


def test_hub_names_the_row_of_a_bad_image(tmp_path):
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no image")

    def save(images: list, feature) -> str:
        rows = {"image": images, "question": ["q"] * 2, "answer": ["a"] * 2, "id": ["x", "y"]}
        features = datasets.Features(
            image=feature, **{k: datasets.Value("string") for k in ("question", "answer", "id")}
        )
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
        for name in ("a.png", "bad.png"):
            shutil.copy(tmp_path / name, folder)
        return str(folder)

    good, bad = "a.png", "bad.png"
    text = datasets.Value("string")
    with pytest.raises(ValueError, match=r"row 2 \(id 'y'\): expected 'image', got none. Fill"):
        HubDataset(save([str(tmp_path / good), None], datasets.Image()), id_column="id")
    with pytest.raises(ValueError, match=r"row 2: expected an image file, got '.*gone.png'"):
        HubDataset(save([good, "gone.png"], text))
    embedded = [{"bytes": (tmp_path / name).read_bytes()} for name in ("a.png", "bad.png")]
    for path in (save([good, bad], text), save(embedded, datasets.Image())):
        data = HubDataset(path, id_column="id")
        assert data[0].image.size == (4, 4)
        with pytest.raises(ValueError, match=r"row 2 \(id 'y'\): expected an image that Pillow"):
            data[1]


def test_hub_checks_every_row_when_it_is_built(tmp_path):
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path.parent / "secret.png")

    def build(**changes) -> HubDataset:
        row = {"image": "a.png", "question": "q", "answer": "a", "id": "x"}
        rows = [row, row | {"id": "y"} | changes]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
        return HubDataset(str(path), id_column="id")

    assert len(build()) == 2
    with pytest.raises(ValueError, match=r"row 2 \(id 'y'\): expected 'answer', got None"):
        build(answer=None)
    with pytest.raises(ValueError, match=r"row 2 \(id 'x'\): expected an id of its own, .* row 1"):
        build(id="x")
    outside = ["../secret.png", str(tmp_path.parent / "secret.png")]
    outside += [f"file://{outside[1]}", f"zip://secret.png::{outside[1]}"]
    for image in outside:
        with pytest.raises(ValueError, match=r"row 2 .*: expected an image"):
            build(image=image)


# ---------------------------------------------------------------------------------------- collators

LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif message['role'] == 'user' %}{{ part['text'] + ' ' }}{% else %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"llava": LLAVA, "chatml": CHATML, "none": None}


def _tokenizer(words: str) -> PreTrainedTokenizerFast:
    """Byte pairs in which a space belongs to the word after it."""
    core = Tokenizer(BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator([words] * 3, BpeTrainer(vocab_size=300, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "start": "<|im_start|>",
            "end": "<|im_end|>",
        },
        padding_side="left",
    )


def build_processor(family: str, template: str | None):
    tokenizer = _tokenizer(
        "USER: ASSISTANT: user assistant Which colour is it? red blue 7 2 yes no"
    )
    common = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    if family == "llava":
        images = CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        return LlavaProcessor(
            images, tokenizer, chat_template=template, num_additional_image_tokens=1, **common
        )
    tiles = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    return LlavaNextProcessor(
        tiles, tokenizer, chat_template=template, num_additional_image_tokens=1, **common
    )


SAMPLES = [
    Sample("a", Image.new("RGB", (40, 30), "red"), (Turn("Which colour is it?", "red"),)),
    Sample(
        "b",
        Image.new("RGB", (20, 60), "blue"),
        (Turn("Which?", "7"), Turn("is it red?", "no red"), Turn("blue?", "yes")),
    ),
    Sample("c", Image.new("RGB", (60, 20), "blue"), (Turn("it?", "2 7"),)),
]


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
def test_a_prompt_is_a_conversation_up_to_its_first_label(family, template):
    """What training has the model write is what generation asks it for."""
    processor = build_processor(family, TEMPLATES[template])
    whole = ConversationCollator(processor)(SAMPLES)["inputs"]
    prompts = PromptCollator(processor)(SAMPLES)
    assert [sample.id for sample in prompts["samples"]] == ["a", "b", "c"]
    for row in range(len(SAMPLES)):
        first = int((whole["labels"][row] != IGNORED).nonzero()[0, 0])
        mask = prompts["inputs"]["attention_mask"][row].bool()
        assert mask[-1]  # padded on the left
        torch.testing.assert_close(
            prompts["inputs"]["input_ids"][row][mask], whole["input_ids"][row, :first]
        )
    torch.testing.assert_close(prompts["inputs"]["pixel_values"], whole["pixel_values"])


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


def test_a_template_with_neither_is_refused():
    rigid = CHATML.replace("assistant\\n", "assistant\\nWell:").replace(
        "assistant\n", "assistant: "
    )
    with pytest.raises(
        ValueError, match=r"sample 'a': expected a chat template that .*got neither"
    ):
        ConversationCollator(build_processor("llava", rigid))(SAMPLES)


def test_a_placeholder_in_a_question_is_refused():
    sample = Sample("z", SAMPLES[0].image, (Turn("<image>\nWhich?", "red"),))
    for collator in (PromptCollator, ConversationCollator):
        with pytest.raises(ValueError, match="sample 'z': expected plain text, got the image"):
            collator(build_processor("llava", LLAVA))([sample])


# ------------------------------------------------------------------------------------------ module


def test_the_module_gives_every_loop_its_batches():
    scenes = {name: SceneDataset(name, 10) for name in ("train", "validation", "test")}
    data = VQADataModule(**scenes, processor=build_processor("llava", LLAVA), batch_size=4)
    before = torch.get_rng_state()
    batches = {
        name: list(getattr(data, f"{name}_dataloader")())
        for name in ("train", "val", "test", "predict")
    }
    assert torch.equal(before, torch.get_rng_state())
    for name, own in batches.items():
        assert [len(batch["samples"]) for batch in own] == [4, 4, 2]
        assert ("labels" in own[0]["inputs"]) == (name in ("train", "val"))
        ids = [sample.id for batch in own for sample in batch["samples"]]
        assert (ids == sorted(ids)) == (name != "train")
    assert "test-0-0" in {sample.id for sample in batches["predict"][0]["samples"]}
    pickle.loads(pickle.dumps(data))


def test_workers_give_the_same_batches():
    scenes = SceneDataset("train", 9)
    processor = build_processor("llava", LLAVA)
    alone, helped = (
        VQADataModule(train=scenes, processor=processor, batch_size=4, num_workers=workers)
        for workers in (0, 1)
    )
    for a, b in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert [sample.id for sample in a["samples"]] == [sample.id for sample in b["samples"]]
        torch.testing.assert_close(a["inputs"]["labels"], b["inputs"]["labels"])


def _epoch(order: EpochShuffle, epoch: int) -> list[int]:
    order.set_epoch(epoch)
    return list(order)


def test_shuffling_is_seeded_per_epoch_and_resumes():
    order = EpochShuffle(20, 3, seed=1)
    epochs = [_epoch(order, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert list(EpochShuffle(20, 3, seed=2)) != epochs[0]
    resumed = EpochShuffle(20, 3, seed=1, start=(1, 4))
    assert list(resumed) == epochs[1][12:]  # before anyone has set its epoch
    assert len(resumed) == 20
    assert _epoch(resumed, 2) == _epoch(order, 2)


@given(length=st.integers(4, 50), batch=st.integers(1, 7), processes=st.integers(1, 4))
def test_processes_share_the_steps_of_one(length, batch, processes):
    """A step has the same samples, however many processes share its batch."""

    def steps(number: int, size: int, seen: int = 0) -> list[set[int]]:
        shares = []
        for rank in range(number):
            start = (3, seen)
            order = EpochShuffle(length, size, processes=number, rank=rank, start=start)
            own = list(order)
            assert len(own) == max(0, len(order) - seen * size)
            shares.append([own[i : i + size] for i in range(0, len(own), size)])
        assert len(set(map(len, shares))) == 1  # or one waits for the others for ever
        return [set().union(*parts) for parts in zip(*shares, strict=True)]

    alone, together = steps(1, batch * processes), steps(processes, batch)
    assert set().union(*alone) == set(range(length))
    assert together[:-1] == alone[:-1]
    if len(alone[-1]) >= processes:
        assert together[-1] == alone[-1]
    else:
        assert together[-1] - alone[-1] <= alone[0] | alone[-1]
    assert steps(processes, batch, seen=1) == together[1:]


def _trainer(batches: int, per_epoch: int, processes: int = 1) -> SimpleNamespace:
    progress = SimpleNamespace(total=SimpleNamespace(processed=batches))
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(
        fit_loop=loops, num_training_batches=per_epoch, world_size=processes, global_rank=0
    )


def test_the_order_does_not_change_in_the_middle_of_an_epoch():
    """At its end it may: another batch size counts on from there."""

    def module(batches: int, per_epoch: int, **options) -> VQADataModule:
        processor = build_processor("llava", LLAVA)
        options = {"batch_size": 4, "seed": 3} | options
        data = VQADataModule(train=SceneDataset("train", 14), processor=processor, **options)
        data.trainer = _trainer(batches, per_epoch, options.pop("processes", 1))
        return data

    middle, end = module(6, 4).state_dict(), module(8, 4).state_dict()
    assert (middle["epoch"], middle["batch"], end["epoch"], end["batch"]) == (1, 2, 2, 0)
    data = module(6, 4)
    data.load_state_dict(middle)
    epoch = _epoch(EpochShuffle(14, 4, seed=3), 1)
    assert list(data.train_dataloader().sampler) == epoch[8:]

    for change, message in {
        "batch_size": "data.batch_size: expected 4, as when .*, got 2. Set it back",
        "seed": "data.seed: expected 3, as when .*, got 2. Set it back",
    }.items():
        data = module(6, 4, **{change: 2})
        data.load_state_dict(middle)
        with pytest.raises(ValueError, match=message):
            data.train_dataloader()
    data = module(6, 4)
    data.trainer.world_size = 2
    data.load_state_dict(middle)
    with pytest.raises(ValueError, match=r"trainer.devices: expected 1, as when .*, got 2. Set"):
        data.train_dataloader()

    data = module(8 + 9, 7, batch_size=2)
    data.load_state_dict(end)
    assert list(data.train_dataloader().sampler) == _epoch(EpochShuffle(14, 2, seed=3), 2)
    again = data.state_dict()
    assert (again["epoch"], again["batch"]) == (3, 2)


def test_validation_gives_each_sample_to_one_process():
    def ids(rank: int, processes: int) -> list[str]:
        scenes = SceneDataset("validation", 5)
        data = VQADataModule(
            validation=scenes, test=scenes, processor=build_processor("llava", None), batch_size=2
        )
        data.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
        return [sample.id for batch in data.val_dataloader() for sample in batch["samples"]]

    assert sorted(ids(0, 2) + ids(1, 2)) == [f"validation-0-{i}" for i in range(5)]
    with pytest.raises(ValueError, match=r"one process per sample of 'validation', got 6 for 5"):
        ids(0, 6)


def test_the_module_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"data.batch_size: expected an integer >= 1, got 0. Set"):
        VQADataModule(batch_size=0)
    with pytest.raises(ValueError, match=r"expected a data set for 'train', got none. Set data"):
        VQADataModule().train_dataloader()
    with pytest.raises(ValueError, match=r"expected a processor, got None. Pass"):
        VQADataModule(test=SceneDataset("test", 1)).predict_dataloader()
    with pytest.raises(ValueError, match=r"data: expected the path of a .jsonl file .*got none"):
        VQADataModule.from_folder()
    folder = _folder(tmp_path, [ROW])
    module = VQADataModule.from_folder(path=str(folder), train_path=str(folder))
    assert module.validation is None
    assert len(module.train) == len(module.test) == 1
