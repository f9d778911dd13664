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
from processes import call
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from trainings import save_batches
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
        ([ROW | {"answer": [["red"]]}], r"row 1, 'answer': expected text .*, got \['red'\]. Write"),
        ([ROW | {"answer": []}], r"row 1: expected 'answer', got \[\]. Fill"),
        ([ROW | {"answer": "an <image>"}], "row 1: expected <image> in questions only, .* Remove"),
        (
            [ROW | {"question": "<image> <image>"}],
            "row 1: .* per image, or none, got 2 for 1 image.",
        ),
        ([ROW | {"image": ["a.png", ""]}], "row 1: expected 'image', got ''. Fill"),
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


def _talk(*texts: str, **more) -> dict:
    roles = ["human", "gpt"] * len(texts)
    turns = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    return {"conversations": turns} | more


TALK = _talk("<image>\nWhich colour?", "red", "Sure?", "yes", image="a.png", id="t")


def _llava(path: Path, rows: list) -> Path:
    """A JSON list, with its images in a folder of their own."""
    _folder(path / "images", []).joinpath("questions.jsonl").unlink()
    (path / "llava.json").write_text(json.dumps(rows), encoding="utf-8")
    return path / "llava.json"


def test_llava_conversations(tmp_path):
    two = _talk("A <image> and <image>?", "blue", image=["b.png", "a.png"])
    text = _talk("Hello", "hi", id="text")
    path = _llava(tmp_path, [TALK, two, text])
    data = FolderDataset(path, image_folder=tmp_path / "images")
    assert [data[i].id for i in range(3)] == ["t", "2", "text"]
    assert data[0].turns == (Turn("<image>\nWhich colour?", "red"), Turn("Sure?", "yes"))
    assert [image.getpixel((0, 0)) for image in data[1].images] == [(0, 0, 255), (255, 0, 0)]
    assert data[2].images == ()

    lines = tmp_path / "lines.json"  # JSON lines are often called so
    lines.write_text("\n".join(json.dumps(row) for row in (TALK, two)))
    again = FolderDataset(lines, image_folder=str(tmp_path / "images"))
    assert [again[i].turns for i in range(2)] == [data[i].turns for i in range(2)]
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "red"},
    ]
    pairs = [{"user": "Which?", "assistant": "red"}]
    rows = [{"messages": chat, "image": "a.png"}, {"conversations": pairs, "image": "a.png"}]
    data = FolderDataset(_llava(tmp_path, rows), image_folder=tmp_path / "images")
    assert [data[i].turns for i in range(2)] == [
        (Turn("<image>Which?", "red"),),
        (Turn("Which?", "red"),),
    ]


def test_answers_that_are_evaluated(tmp_path):
    later = _talk("<image>1", "a", "<image>2", "b", image=["a.png", "b.png"], id="x")
    folder = {"image_folder": str(tmp_path / "images")}
    path = str(_llava(tmp_path, [TALK, later]))
    last, each = (
        VQADataModule.from_folder(path=path, turns=turns, **folder).test
        for turns in ("last", "each")
    )
    assert [(own.id, len(own.turns), len(own.images)) for own in map(last.__getitem__, (0, 1))] == [
        ("t", 2, 1),
        ("x", 2, 2),
    ]
    shown = [(own.id, len(own.turns), len(own.images)) for own in map(each.__getitem__, range(4))]
    assert shown == [("t/1", 1, 1), ("t/2", 2, 1), ("x/1", 1, 1), ("x/2", 2, 2)]
    with pytest.raises(ValueError, match=r"data.turns: expected one of \['all', .*, got 'first'"):
        VQADataModule.from_folder(path=path, turns="first", **folder)
    rows = {"text": _talk("q", "a"), "late": _talk("q", "a", "<image>", "b", image="a.png")}
    for turns, bad in (("last", "text"), ("each", "text"), ("each", "late")):
        path = str(_llava(tmp_path, [TALK, rows[bad]]))
        with pytest.raises(ValueError, match="row 2: expected an image in front of each answer"):
            VQADataModule.from_folder(path=path, turns=turns, **folder)
        assert len(VQADataModule.from_folder(train_path=path, turns=turns, **folder).train) == 2


def test_a_list_of_questions_with_accepted_answers(tmp_path):
    said = ["red", "crimson", "red"]
    rows = [ROW | {"answer": said}, ROW | {"answers": [{"answer": text} for text in said]}]
    del rows[1]["answer"]
    path = _folder(tmp_path, []) / "questions.jsonl"
    path = path.rename(path.with_suffix(".json"))
    path.write_text(json.dumps(rows))
    data = FolderDataset(tmp_path)  # the only such file of the folder
    for index in range(2):
        assert data[index].turns == (Turn("Which colour?", "red", "all", tuple(said)),)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "llava.json: expected a JSON list of rows, got dict. Put"),
        ([TALK, 3], "llava.json, row 2: expected a JSON object, got 3. Write"),
        (
            [_talk("q", "a", "b", image="a.png")],
            r"row 1: .* in turn, .* got \['human', 'gpt', .*Re",
        ),
        ([_talk(image="a.png")], r"row 1: expected 'conversations', got \[\]. Fill"),
        ([_talk("q", " ", image="a.png")], "row 1, message 2: expected 'value', got ' '. Fill"),
        ([_talk("<image>", "a")], "row 1: expected one <image> per image, .*got 1 for 0 images."),
        ([{"conversations": ["q"]}], "row 1, message 1: expected an object with from and value"),
        (
            [{"messages": [{"role": "system", "content": "Be kind."}]}],
            "row 1: expected a conversation that starts with a question, got a system message.",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "video"}]}]}],
            "row 1, message 1: expected parts of type text or image, got .*video.*. Leave",
        ),
    ],
)
def test_bad_conversations_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        FolderDataset(_llava(tmp_path, rows), image_folder=tmp_path / "images")


def test_bad_rows_are_skipped_when_asked(tmp_path, capsys):
    rows = [ROW, ROW | {"image": "gone.png"}, "{oops", ROW | {"image": "broken.png"}, ROW]
    path = str(_folder(tmp_path, rows))
    with pytest.raises(ValueError, match=r"row 2: expected an image file"):
        VQADataModule.from_folder(path=path)
    data = VQADataModule.from_folder(path=path, skip_bad=True).test
    assert [data[i].id for i in range(len(data))] == ["1", "5"]
    assert all(f"row {n}:" in text for n, text in zip((2, 3, 4), data.skipped, strict=True))
    told = capsys.readouterr().err
    assert re.match(r".*questions.jsonl: skipped 3 of 5 rows, the first: .*row 2: expected", told)
    path = str(_folder(tmp_path, rows[1:4]))
    with pytest.raises(ValueError, match=r"got none in .* that is as expected: .*row 1: exp"):
        FolderDataset(path, skip_bad=True)


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
    with pytest.raises(
        ValueError, match=r"expected exactly one .jsonl or .json file in '.*', got \[\]"
    ):
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


def test_hub_reads_conversations_and_several_images(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    talks = [
        _talk("<image> or <image>?", "red")["conversations"],
        _talk("<image>?", "blue", "Sure?", "yes")["conversations"],
        _talk("Hello", "hi")["conversations"],
        _talk("<image>", "one", "<image>", "two")["conversations"],
    ]
    columns = {
        "images": [images, images[1:], [], images],
        "talk": talks,
        "answers": [["red", "crimson", "red"]] * 4,
        "question": ["q"] * 4,
    }
    own = [{"from": datasets.Value("string"), "value": datasets.Value("string")}]
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        talk=own,
        answers=datasets.List(datasets.Value("string")),
        question=datasets.Value("string"),
    )
    path = str(tmp_path / "talks.parquet")
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    options = {"image_column": "images", "conversations_column": "talk"}
    data = HubDataset(path, **options)
    assert [len(data[i].images) for i in range(4)] == [2, 1, 0, 2]
    assert data[0].images[1].getpixel((0, 0)) == (0, 0, 255)
    assert data[1].turns == (Turn("<image>?", "blue"), Turn("Sure?", "yes"))
    with pytest.raises(ValueError, match="row 3: expected an image in front of each answer"):
        HubDataset(path, **options, turns="each")
    data = HubDataset(path, **options, turns="each", skip_bad=True)
    assert [data[i].id for i in range(5)] == ["1", "2/1", "2/2", "4/1", "4/2"]
    assert len(data[3].images) == 1
    assert "skipped 1 of 4 rows, the first: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"row 3: expected 'images', got none. Fill"):
        HubDataset(path, image_column="images", answer_column="answers")
    data = HubDataset(path, image_column="images", answer_column="answers", skip_bad=True)
    assert data[0].turns == (Turn("q", "red", "all", ("red", "crimson", "red")),)


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
    Sample("a", (Image.new("RGB", (40, 30), "red"),), (Turn("Which colour is it?", "red"),)),
    Sample(
        "b",
        (Image.new("RGB", (20, 60), "blue"),),
        (Turn("Which?", "7"), Turn("is it red?", "no red"), Turn("blue?", "yes")),
    ),
    Sample("c", (Image.new("RGB", (60, 20), "blue"),), (Turn("it?", "2 7"),)),
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


RED, BLUE = SAMPLES[0].images[0], SAMPLES[1].images[0]
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


def test_workers_give_the_same_batches(tmp_path):
    scenes = SceneDataset("train", 9)
    processor = build_processor("llava", LLAVA)
    alone, helped = (
        VQADataModule(train=scenes, processor=processor, batch_size=4, num_workers=workers)
        for workers in (0, 1)
    )
    done = call(save_batches, helped, tmp_path / "batches.pt")
    assert done.returncode == 0, done.stdout
    batches = torch.load(tmp_path / "batches.pt", weights_only=True)
    for own, (ids, labels) in zip(alone.train_dataloader(), batches, strict=True):
        assert [sample.id for sample in own["samples"]] == ids
        assert torch.equal(own["inputs"]["labels"], labels)


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
