"""Hugging Face data sets."""

from __future__ import annotations

import json
import pickle
import shutil
import sys

import pytest
from PIL import Image
from questions import talk

from tokenprune.data import HubDataset, Turn
from tokenprune.data.module import VQADataModule


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small data set in every form that can be read."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
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
    return root


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
    for name in ("paths.json", "file.parquet"):
        data = HubDataset(str(saved / name), **options if name == "file.parquet" else {})
        data = pickle.loads(pickle.dumps(data))  # as processes that prepare batches get it
        assert data[2].image.getpixel((0, 0)) == (0, 0, 255)


def test_hub_reads_conversations_and_several_images(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    talks = [
        talk("<image> or <image>?", "red")["conversations"],
        talk("<image>?", "blue", "Sure?", "yes")["conversations"],
        talk("Hello", "hi")["conversations"],
        talk("<image>", "one", "<image>", "two")["conversations"],
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


def test_hub_reads_images_that_messages_name(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "q"}]
    talk = [{"role": "user", "content": parts}]
    talk += [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    options = {"image_column": "images", "conversations_column": "messages"}

    def build(images: list) -> HubDataset:
        path = tmp_path / "rows.parquet"
        parquet.write_table(pa.Table.from_pylist([{"messages": talk, "images": images}]), path)
        return HubDataset(str(path), **options)

    embedded = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    for images in (["b.png"], [embedded]):
        assert len(build(images)[0].images) == 1
    with pytest.raises(ValueError, match="row 1: expected images of the row or of its messages"):
        build(["a.png"])


def test_hub_knows_its_commit(tmp_path, monkeypatch):
    """As `datasets` says it: without asking the Hub again."""
    datasets = pytest.importorskip("datasets")
    row = {"image": "https://example.org/a.png", "question": "q", "answer": "a"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    found = datasets.load_dataset_builder(str(tmp_path))
    assert HubDataset(str(tmp_path)).commit is None  # what is here has a digest
    commit = found.hash = "0123456789" * 4
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *given, **options: found)
    assert HubDataset("owner/name").commit == commit
    assert VQADataModule.from_hub(path="owner/name").commit == commit
    assert VQADataModule().commit is None


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
    with pytest.raises(ValueError, match=r'Install it with pip install "tokenprune-vlm\[hub\]"'):
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
    outside = ["../secret.png", str(tmp_path.parent / "secret.png")]
    outside += [f"file://{outside[1]}", f"zip://secret.png::{outside[1]}"]
    for image in outside:
        with pytest.raises(ValueError, match=r"row 2 .*: expected an image"):
            build(image=image)
