"""What a cell holds is what a model reads, whichever reader brings it."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from readers import ARROW, CSV, JSON, READERS, parquet

from tokenprune.data import FolderDataset, HubDataset, Turn

ROW = {"image": "a.png", "question": "q", "answer": "x"}


def answers(data) -> list[str]:
    return [data[index].turns[-1].answer for index in range(len(data))]


def ids(data) -> list[str]:
    return [data[index].id for index in range(len(data))]


# ---------------------------------------------------------------------------------------- texts, e3

TEXTS = [
    *("3", "007", "1.50", "-0", "1e3", "0x1F", "1_000", "33471", "000000033471"),
    *("None", "null", "nan", "NaN", "NA", "N/A", "#N/A", "inf", "true", "TRUE", "no"),
    *("2020-01-02", "2020-01-02T03:04:05", "12:30", "[1]", '{"a": 1}', "'x'", "1,5", "50 %"),
    *(" x ", "\tx", "a\nb", "a\r\nb", 'say "hi", ok', "é\u2028y\u0085z", "x\0y", "答え", "🙂"),
]


@pytest.mark.parametrize("reader", READERS)
def test_e3_texts_are_read_as_they_are_written(reader, tmp_path):
    rows = [ROW | {"answer": text, "question": text, "kind": text, "id": text} for text in TEXTS]
    data = READERS[reader](tmp_path / "d", rows)
    assert [data[index].turns for index in range(len(data))] == [
        (Turn(text, text, text),) for text in TEXTS
    ]
    assert ids(data) == TEXTS
    assert data[0].image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("numbers", [["3", "4"], ["1.50", "2"], ["007", "08"], ["true", "false"]])
@pytest.mark.share(3)
def test_e3_a_missing_cell_changes_no_other(reader, numbers, tmp_path, capsys):
    rows = [ROW | {"answer": text} for text in (numbers[0], None, numbers[1], "  ", "")]
    with pytest.raises(ValueError, match=r"row 2: expected 'answer', got .*\. Fill it in"):
        READERS[reader](tmp_path / "d", rows)
    data = READERS[reader](tmp_path / "e", rows, skip_bad=True)
    assert (answers(data), ids(data)) == (numbers, ["1", "3"])
    assert "skipped 3 of 5 rows" in capsys.readouterr().err


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("column", ["image", "question"])
def test_e3_what_is_missing_is_named(reader, column, tmp_path):
    rows = [ROW, ROW | {column: None}]
    with pytest.raises(ValueError, match=rf"row 2: expected '{column}', got .*\. Fill it in"):
        READERS[reader](tmp_path / "d", rows)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=9))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("reader", ["json", "lines", "csv", "hub csv", "parquet"])
def test_e3_any_text_is_read_as_it_is_written(reader, texts):
    rows = [ROW] + [ROW | {"answer": text} for text in texts]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        data = READERS[reader](Path(folder) / "d", rows, skip_bad=True)
        assert answers(data) == ["x"] + [text for text in texts if text.strip()]


LITERALS = {
    "3": "3",
    "1.50": "1.50",
    "3.0": "3.0",
    "1e3": "1e3",
    "-0.0": "-0.0",
    "1e999": "1e999",
    "12345678901234567890123": "12345678901234567890123",
    "true": "true",
    "false": "false",
    '["red", 1.50, true]': ("red", "1.50", "true"),
}


@pytest.fixture
def literals(monkeypatch):
    """Has literals of JSON written as they are where a cell is one of these: `<<1.50>>`."""
    dumps = json.dumps

    def written(own: Any, **options: Any) -> str:
        text = dumps(own, **options)
        return re.sub(r'"<<(.*?)>>"', lambda found: found[1].replace('\\"', '"'), text)

    monkeypatch.setattr(json, "dumps", written)


@pytest.mark.parametrize("reader", JSON)
def test_e3_numbers_of_json_are_read_as_they_are_written(reader, tmp_path, literals):
    rows = [ROW | {"answer": f"<<{literal}>>"} for literal in LITERALS]
    data = JSON[reader](tmp_path / "d", rows)
    turns = [data[index].turns[0] for index in range(len(data))]
    assert [turn.accepted or turn.answer for turn in turns] == list(LITERALS.values())


def test_e3_numbers_in_conversations_and_kinds_are_text(tmp_path):
    line = (
        '{"image": "a.png", "kind": 2.0, "messages": [{"role": "user", "content": 1.50},'
        ' {"role": "assistant", "content": [{"type": "text", "text": 007.5}]}]}'
    ).replace("007.5", "7.50")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(line)
    row = {"kind_column": "kind", "conversations_column": "messages"}
    for data in (FolderDataset(tmp_path), HubDataset(str(tmp_path / "rows.jsonl"), **row)):
        assert data[0].turns == (Turn("1.50", "7.50", "2.0"),)


TYPED = {
    "int8": ([3, -4], "int8", ["3", "-4"]),
    "uint64": ([2**64 - 1], "uint64", [str(2**64 - 1)]),
    "bool": ([True, False], "bool", ["true", "false"]),
    "decimal": ([decimal.Decimal("1.50")], "decimal128(9, 2)", ["1.50"]),
    "float16": ([0.1], "float16", ["0.1"]),
    "float32": ([0.1, 1e-7], "float32", ["0.1", "1e-07"]),
    "float64": ([0.1, -2.5], "float64", ["0.1", "-2.5"]),
    "large_string": (["007"], "large_string", ["007"]),
    "string_view": (["007"], "string_view", ["007"]),
}


def _typed(values: list[Any], kind: str) -> Any:
    import pyarrow as pa

    if kind.startswith("decimal"):
        return pa.array(values, pa.decimal128(9, 2))
    if kind == "float16":
        values = np.array(values, "f2")
    return pa.array(values, pa.bool_() if kind == "bool" else getattr(pa, kind)())


def _save(path: Path, **columns: Any) -> str:
    """A parquet file with one picture a row, unless it brings its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    length = len(next(iter(columns.values())))
    Image.new("RGB", (4, 4), "red").save(path / "a.png")
    rows = {key: pa.array([cell] * length) for key, cell in ROW.items()} | columns
    pq.write_table(pa.table(rows), path / "rows.parquet")
    return str(path / "rows.parquet")


@pytest.mark.parametrize("name", TYPED)
def test_e3_typed_columns_have_one_text(name, tmp_path):
    values, kind, texts = TYPED[name]
    assert answers(HubDataset(_save(tmp_path, answer=_typed(values, kind)))) == texts


def test_e3_typed_cells_inside_lists_and_labels(tmp_path):
    import datasets
    import pyarrow as pa

    lists = pa.array([[0.1, 0.2]], pa.list_(pa.float32()))
    data = HubDataset(_save(tmp_path, answer=lists))
    assert data[0].turns[0].accepted == ("0.1", "0.2")
    data = HubDataset(
        _save(tmp_path, answer=pa.array(["x", "y", None, "x"]).dictionary_encode()), skip_bad=True
    )
    assert answers(data) == ["x", "y", "x"]
    columns = {"image": ["a.png"] * 2, "question": ["q"] * 2, "answer": [1, 0], "told": ["1", 2.50]}
    text, label = datasets.Value("string"), datasets.ClassLabel(names=["no", "yes"])
    kinds = {"image": text, "question": text, "answer": label, "told": text}
    datasets.Dataset.from_dict(columns, datasets.Features(kinds)).to_parquet(tmp_path / "l.parquet")
    assert answers(HubDataset(str(tmp_path / "l.parquet"))) == ["yes", "no"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([3.0, 1.5], r"got 3.0, a floating-point number that may have been written in other ways"),
        ([1.5, 4.0, None], r"row 2: .* got 4.0, a floating-point number"),
        ([b"x"], r"expected text as 'answer', got b'x'"),
        ([datetime.date(2020, 1, 2)], r"expected text as 'answer', got datetime.date"),
        ([datetime.timedelta(1)], r"expected text as 'answer', got datetime.timedelta"),
        ([{"text": ["x"]}], r"expected text as 'answer', got {'text'"),
        ([[["x"]]], r"'answer': expected text as 'answer', got \['x'\]"),
        ([[]], r"expected 'answer', got \[\]"),
        ([["x", None]], r"'answer': expected 'answer', got None"),
    ],
)
def test_e3_cells_without_one_text_are_refused(values, told, tmp_path):
    import pyarrow as pa

    with pytest.raises(ValueError, match=told):
        HubDataset(_save(tmp_path, answer=pa.array(values)))


# -------------------------------------------------------------------------------- no number, e2


@pytest.mark.parametrize("column", ["answer", "question"])
@pytest.mark.parametrize("reader", JSON)
def test_e2_what_is_no_text_is_refused(reader, column, tmp_path, literals):
    bad = ["NaN", "Infinity", "-Infinity", "null", '["x", NaN]']
    rows = [ROW, *[ROW | {column: f"<<{literal}>>"} for literal in bad], ROW]
    with pytest.raises(
        ValueError, match=rf"row 2: expected text as '{column}', got the number nan"
    ):
        JSON[reader](tmp_path / "d", rows)
    data = JSON[reader](tmp_path / "e", rows, skip_bad=True)
    assert ids(data) == ["1", "7"]
    for told, got in zip(data.skipped, ["nan", "inf", "-inf", "None", "nan"], strict=True):
        assert re.search(rf"row \d.*: expected .*'{column}', got .*{got}", told)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("reader", ARROW)
def test_e2_what_is_no_number_is_refused(reader, value, tmp_path):
    rows = [ROW | {"answer": 1.5}, ROW | {"answer": value}]
    with pytest.raises(ValueError, match=r"row 2: expected .*'answer', got .*(nan|inf|None)"):
        ARROW[reader](tmp_path / "d", rows)
    assert answers(ARROW[reader](tmp_path / "e", rows, skip_bad=True)) == ["1.5"]


@pytest.mark.parametrize("key", ["id", "kind", "image"])
def test_e2_nan_elsewhere_is_refused(key, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {key: float("nan")}))
    with pytest.raises(ValueError, match=r"row 1: expected .* got .*nan"):
        FolderDataset(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"score": float("nan")}))
    assert answers(FolderDataset(tmp_path)) == ["x"]


# ------------------------------------------------------------------------------------------ ids, e4


@pytest.mark.parametrize("reader", READERS)
def test_e4_rows_with_one_id_are_all_read(reader, tmp_path):
    given = ["000000033471", "33471", "000000033471", "a", "a#2", "a", "a", None, "8"]
    rows = [ROW | {"id": own, "answer": str(place)} for place, own in enumerate(given)]
    rows[3]["answer"] = " "  # its id counts all the same
    data = READERS[reader](tmp_path / "d", rows, skip_bad=True)
    names = ["000000033471", "33471", "000000033471#2", "a#2", "a#3", "a#4", "8", "8#2"]
    assert ids(data) == names
    assert answers(data) == ["0", "1", "2", "4", "5", "6", "7", "8"]


def test_e4_turns_of_rows_with_one_id_differ(tmp_path):
    talk = [{"from": own, "value": "x"} for own in ("human", "gpt") * 2]
    rows = [ROW | {"id": "t/1"}, *[{"image": "a.png", "id": "t", "conversations": talk}] * 2]
    data = READERS["lines"](tmp_path, rows, turns="each")
    assert ids(data) == ["t/1", "t/1#2", "t/2", "t#2/1", "t#2/2"]


def test_e4_many_rows_may_have_one_id(tmp_path):
    data = READERS["csv"](tmp_path, [ROW | {"id": own} for own in ("x", "x#3") * 500])
    assert len(set(ids(data))) == 1000
    assert [data[place].id for place in (0, 1, 2, 3, 4)] == ["x", "x#3", "x#2", "x#3#2", "x#4"]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([3.0, None, 33471.0], ["3", "2", "33471"]),  # integers with a gap, as pandas keeps them
        ([2**63 - 1, 7], ["9223372036854775807", "7"]),
    ],
)
def test_e4_ids_of_tables(values, names, tmp_path):
    rows = [ROW | {"id": value} for value in values]
    assert ids(parquet(tmp_path, rows)) == names


@pytest.mark.parametrize("reader", ["lines", "hub lines"])
@pytest.mark.parametrize(("literal", "name"), [("33471", "33471"), ("3.0", "3"), ("null", "1")])
def test_e4_ids_of_json(reader, literal, name, tmp_path, literals):
    assert ids(JSON[reader](tmp_path, [ROW | {"id": f"<<{literal}>>"}])) == [name]


@pytest.mark.parametrize("literal", ["1.5", "true", "[1]", "NaN", "1e999"])
def test_e4_other_ids_are_refused(literal, tmp_path, literals):
    with pytest.raises(ValueError, match=r"row 1: expected .*id.*, got"):
        READERS["lines"](tmp_path, [ROW | {"id": f"<<{literal}>>"}])


# --------------------------------------------------------------------------------------- videos, e5

TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]


def _asked(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, TALK[1]]


def _part(part: dict[str, Any]) -> list[dict[str, Any]]:
    told = [{"type": "text", "text": "x"}]
    return [{"role": "user", "content": [part]}, {"role": "assistant", "content": told}]


VIDEOS: dict[str, dict[str, Any]] = {
    "key": {"video": "v.mp4", "conversations": _asked("<video>\nWhat?")},
    "key alone": {"video": "v.mp4", "conversations": TALK},
    "key and image": {"video": "v.mp4", "image": "a.png", "conversations": TALK},
    "keys": {"videos": ["v.mp4"], "conversations": TALK},
    "other key": {"Video_Path": "v.mp4", "conversations": TALK},
    "sound": {"audio": "a.wav", "conversations": TALK},
    "placeholder": {"image": "a.png", "conversations": _asked("<video>\nWhat?")},
    "later placeholder": {"image": "a.png", "conversations": TALK + _asked("<Video>Why?")},
    "Qwen's placeholder": {"image": "a.png", "conversations": _asked("<|video_pad|>What?")},
    "question": {"image": "a.png", "question": "<video> What?", "answer": "x"},
    "question and key": {"image": "a.png", "video": "v.mp4", "question": "What?", "answer": "x"},
    "part": {"image": "a.png", "messages": _part({"type": "video", "video": "v.mp4"})},
    "address": {"image": "a.png", "messages": _part({"type": "video_url", "video_url": "v"})},
    "text part": {"image": "a.png", "messages": _part({"type": "text", "text": "<video> q"})},
    "name": {"image": "a.png", "video_name": "v", "conversations": TALK},
    "id": {"image": "a.png", "video_id": "v7", "conversations": TALK},
    "clip": {"image": "a.png", "clip": "v.mp4", "conversations": TALK},
    "media, the video": {"image": "a.png", "media": ["v.mp4"], "conversations": TALK},
    "sound, of audio": {"image": "a.png", "sound": "https://x.org/v", "conversations": TALK},
    **{
        f"{tag}, a video or audio": {"image": "a.png", "question": f"{tag}What?", "answer": "x"}
        for tag in ("<video_soft_token>", "<video1>", "<vid>", "[Video]", "<speech>", "<|audio_1|>")
    },
    "pairs": {"image": "a.png", "conversations": [{"user": "<video> q", "assistant": "x"}]},
    "as image": {"image": "v.mp4", "question": "q", "answer": "x"},
    "as images": {"image": ["a.png", "clips/v.WEBM"], "question": "q", "answer": "x"},
}


def _fits(reader: str, form: str) -> bool:
    """Whether a reader's files can say it: CSV has no lists."""
    return reader not in CSV or not any(isinstance(cell, list) for cell in VIDEOS[form].values())


@pytest.mark.parametrize(
    ("reader", "form"), [(own, form) for own in READERS for form in VIDEOS if _fits(own, form)]
)
@pytest.mark.share(6)
def test_e5_videos_are_refused_by_name(reader, form, tmp_path):
    row = {"image": None} | VIDEOS[form]
    with pytest.raises(ValueError, match=r"row 1.*: expected .*(?i:video|audio)"):
        READERS[reader](tmp_path / "d", [row])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("empty", [None, ""])
def test_e5_an_empty_cell_is_no_video(reader, empty, tmp_path):
    rows = [ROW | {"video": empty}, ROW | {"video": "v.mp4"}]
    assert answers(READERS[reader](tmp_path / "d", rows, skip_bad=True)) == ["x"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "cells",
    [
        {"clip": 0.31, "sound": "meow", "media": "oil on canvas"},
        {"question": "Is <videotape> or a [video player] on the speech <b>?"},
    ],
    ids=["keys", "texts"],
)
def test_e5_words_of_other_meanings_are_no_video(reader, cells, tmp_path):
    assert answers(READERS[reader](tmp_path / "d", [ROW | cells])) == ["x"]


def test_e5_lists_of_a_table_are_looked_into(tmp_path):
    import pyarrow as pa

    assert len(HubDataset(_save(tmp_path, clip=pa.array([[0.1, 0.2]])))) == 1
    with pytest.raises(ValueError, match="row 1: expected images and text, got a 'clip' as well"):
        HubDataset(_save(tmp_path, clip=pa.array([["a", "v.mp4"]])))


def test_e5_embedded_videos_are_refused_and_frames_read(tmp_path):
    import pyarrow as pa

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for cell, refused in (
        ({"bytes": b"x", "path": None}, True),
        ({"bytes": None, "path": None}, False),
    ):
        path = _save(tmp_path, video=pa.array([cell], kind))
        if refused:
            with pytest.raises(ValueError, match="row 1: expected images and text, got a 'video'"):
                HubDataset(path)
        else:
            assert len(HubDataset(path)) == 1
    frames = _save(tmp_path, video=pa.array([["a.png", "a.png"]]))
    assert len(HubDataset(frames, image_column="video")[0].images) == 2


# ------------------------------------------------------------------------------ embedded images, e6


def _png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def _pictures() -> dict[str, Any]:
    import pyarrow as pa

    png = _png()
    whole = {"bytes": png, "path": None}
    struct = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})
    return {
        "struct": pa.array([whole]),
        "struct of large ones": pa.array([whole], struct),
        "struct with a path": pa.array([{"bytes": png, "path": "gone.png"}]),
        "struct of bytes": pa.array([{"bytes": png}]),
        "struct of a path": pa.array([{"bytes": None, "path": "a.png"}]),
        "binary": pa.array([png]),
        "large binary": pa.array([png], pa.large_binary()),
        "binary view": pa.array([png], pa.binary_view()),
        "fixed size": pa.array([png], pa.binary(len(png))),
        "path": pa.array(["a.png"], pa.large_string()),
        "dictionary of paths": pa.array(["a.png"]).dictionary_encode(),
        "list of structs": pa.array([[whole]]),
        "large list of binary": pa.array([[png]], pa.large_list(pa.binary())),
        "fixed list of paths": pa.array([["a.png"]], pa.list_(pa.string(), 1)),
    }


@pytest.mark.parametrize("form", _pictures())
def test_e6_images_of_tables_need_no_metadata(form, tmp_path):
    import pyarrow as pa

    own = _pictures()[form]
    column = pa.concat_arrays([pa.nulls(1, own.type), own, pa.nulls(1, own.type), own])
    path = _save(tmp_path, image=column)
    with pytest.raises(ValueError, match="row 1: expected 'image', got none"):
        HubDataset(path)
    data = HubDataset(path, skip_bad=True)
    assert ids(data) == ["2", "4"]
    assert [own.getpixel((0, 0)) for own in data[1].images] == [(255, 0, 0)]


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ({"bytes": b"", "path": None}, "expected 'image', got an image of 0 bytes"),
        (b"", "expected 'image', got an image of 0 bytes"),
        ("gone.png", "expected an image file, got '.*gone.png', which does not exist"),
        ("empty.png", "expected an image file, got '.*empty.png', which is empty"),
        ("a\0.png", "expected an image file, got .*, which does not exist"),
        ("iVBORw0K" * 999, r"expected an image file, got .{400,500}\.\.\., which does not exist"),
        ("/etc/hostname", "expected an image in the data's own folder"),
        ({"path": "/etc/hostname"}, "expected an image in the data's own folder"),
        (["a.png", None], "expected 'image', got None"),
        (3, r"expected images or paths in the column 'image' of .*, got Value\('int64'\)"),
        ([1, 2], r"expected images or paths in the column 'image' of .*, got Value\('int64'\)"),
        ({"data": b"x"}, r"expected images or paths in the column 'image' of .*, got \{'data'"),
    ],
)
def test_e6_cells_without_an_image_are_refused(cell, told, tmp_path):
    import pyarrow as pa

    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=told):
        HubDataset(_save(tmp_path, image=pa.array([cell])))
