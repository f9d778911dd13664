"""JSON and CSV files: their encodings, their form, what is broken in them, where they lie."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from readers import READERS

from tokenprune.data import FolderDataset, HubDataset

ROW = {"image": "a.png", "question": "q", "answer": "x"}


def answers(data) -> list[str]:
    return [data[index].turns[-1].answer for index in range(len(data))]


def ids(data) -> list[str]:
    return [data[index].id for index in range(len(data))]


@pytest.mark.parametrize("end", ["csv", "jsonl", "json"])
def test_encodings(end, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = {
        "csv": "image,question,answer\r\na.png,Où?,1.50\r\na.png,q,007\r\n",
        "jsonl": '{"image":"a.png","question":"Où?","answer":1.50}\r\n'
        '{"image":"a.png","question":"q","answer":"007"}\r\n',
    }
    rows["json"] = "[" + rows["jsonl"].replace("}\r\n{", "},\r\n{") + "]"
    path = tmp_path / f"rows.{end}"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(rows[end].encode(encoding))
        for data in (FolderDataset(path), HubDataset(str(path))):
            assert (data[0].turns[0].question, answers(data)) == ("Où?", ["1.50", "007"])
    for encoding in ("utf-16", "latin-1"):
        path.write_bytes(rows[end].encode(encoding))
        for reader in (FolderDataset, HubDataset):
            with pytest.raises(ValueError, match=r"expected a file with UTF-8 text, got .*Save it"):
                reader(str(path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image,question\na.png,q\n", r"expected .*'answer'"),
        ("image;question;answer\na.png;q;x\n", r"'image;question;answer'"),
        (
            "image,question,answer\na.png,what, then,x\n",
            "row 1: expected 3 cells, one a column, got 4",
        ),
        ("image,question,answer\na.png,q\n", "row 1: expected 3 cells, one a column, got 2"),
        ("image,question,answer,answer\na.png,q,x,y\n", "names of their own, got 'answer' twice"),
        (
            'image,question,answer\na.png,"q,x\n',
            r"line 2: expected CSV, got unexpected end of data",
        ),
        ('image,question,answer\na.png,"q"s,x\n', r"line 2: expected CSV, got ',' expected after"),
        ("image,question,answer\n", "expected at least one row, got none"),
        ("", "expected at least one row, got none"),
    ],
)
@pytest.mark.parametrize("reader", [FolderDataset, HubDataset])
def test_broken_csv_is_refused(reader, text, told, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        reader(str(tmp_path / "rows.csv"))


def test_a_table_without_a_header_is_told_so(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a.png,q,x\na.png,q,y\n")
    told = r"rows.csv: expected a first line that names the columns .*, got \['a.png', 'q', 'x'\]"
    with pytest.raises(ValueError, match=told):
        FolderDataset(path)
    path.write_text("a.png,q,x\n")  # one line that cannot be told from a header
    with pytest.raises(
        ValueError, match=r"got none in .*. Write a line of columns, then rows with"
    ):
        FolderDataset(path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"answer": "x", "answer": "y"}', "got .*: the key 'answer' twice in one object"),
        ('{"answer": 007}', "expected a JSON object, got .*delimiter"),
        ("[" * 100_000, "expected a JSON object, got .*recursion"),
        ('{"image": "a.png", "question": "\\ud83d?", "answer": "x"}', "half a character"),
        ('{"image": {"a": 1}, "question": "q", "answer": "x"}', "expected the path of an image"),
        ('{"image": "a.png", "images": ["b.png"], "question": "q", "answer": "x"}', "got both"),
        ('{"image": "https://x.org/a.png", "question": "q", "answer": "x"}', "got the address"),
    ],
)
def test_broken_json_is_refused(line, told, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    good = json.dumps(ROW)
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=f"row 2: .*{told}"):
        FolderDataset(tmp_path)
    assert ids(FolderDataset(tmp_path, skip_bad=True)) == ["1", "3"]


def test_a_column_that_is_null_gives_way_to_one_that_is_filled(tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    rows = [
        ROW | {"conversations": None, "kind": None, "video": None},
        {"image": None, "images": ["a.png", "b.png"], "conversations": None, "messages": talk},
        {"images": ["a.png"], "question": "q", "answer": None, "answers": ["x", "y"]},
    ]
    data = READERS["lines"](tmp_path, rows)
    assert [len(data[index].images) for index in range(3)] == [1, 2, 1]
    assert data[2].turns[0].accepted == ("x", "y")


def test_several_files_of_a_split_are_one(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for part, text in (("0", "007"), ("1", "1.50")):
        rows = f"image;question;answer\na.png;q;{text}\n".encode()
        (tmp_path / f"part-{part}.csv.gz").write_bytes(gzip.compress(rows))
    card = "configs:\n- config_name: default\n  sep: ';'\n  data_files:\n  - split: test\n"
    (tmp_path / "README.md").write_text(f"---\n{card}    path: part-*.csv.gz\n---\n")
    data = HubDataset(str(tmp_path))
    assert (ids(data), answers(data)) == (["1", "2"], ["007", "1.50"])
    (tmp_path / "README.md").write_text(
        f"---\n{card.replace('sep', 'thousands')}    path: part-*.csv.gz\n---\n"
    )
    with pytest.raises(ValueError, match="CSV with the option thousands=';' in its card"):
        HubDataset(str(tmp_path))


def test_a_card_may_name_the_columns(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "test.csv").write_text("a.png,q,007\n")
    card = "---\nconfigs:\n- config_name: default\n  {}\n  data_files: test.csv\n---\n"
    (tmp_path / "README.md").write_text(card.format("names: [image, question, answer]"))
    assert answers(HubDataset(str(tmp_path), split="train")) == ["007"]
    (tmp_path / "README.md").write_text(card.format("header: null"))
    with pytest.raises(ValueError, match="CSV with the option header=None in its card"):
        HubDataset(str(tmp_path), split="train")


def test_json_may_hold_its_rows_in_a_field(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "test.json").write_text(json.dumps({"rows": [ROW | {"answer": 3}]}))
    card = "configs:\n- config_name: default\n  field: rows\n  data_files:\n  - split: test\n"
    (tmp_path / "README.md").write_text(f"---\n{card}    path: test.json\n---\n")
    assert answers(HubDataset(str(tmp_path))) == ["3"]


def test_a_json_file_may_hold_one_line(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps(ROW) + "\n")
    assert answers(FolderDataset(tmp_path)) == answers(HubDataset(str(tmp_path / "rows.json")))


METADATA = {
    "metadata.csv": "file_name,question,answer\n{name},q,007\n",
    "metadata.jsonl": '{{"file_name": "{name}", "question": "q", "answer": "007"}}\n',
}


def _card(folder: Path, *paths: str) -> None:
    """Says which files are the split `test`."""
    lines = "".join(f"    - {path}\n" for path in paths)
    card = "configs:\n- config_name: default\n  data_files:\n  - split: test\n    path:\n"
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{card}{lines}---\n")


def test_fetched_files_are_read_as_they_are_written(tmp_path, served):
    folder, address = served
    Image.new("RGB", (4, 4), "red").save(folder / "a.png")
    rows = "image,question,answer\n{name},q,007\n".format(name=f"{address}/a.png")
    for name, text in {"test.csv": rows, **METADATA}.items():
        (folder / name).write_text(text.format(name="a.png"))
        own = tmp_path / name
        more = [f"{address}/a.png"] if name in METADATA else []
        _card(own, f"{address}/{name}", *more)
        data = HubDataset(str(own))
        assert answers(data) == ["007"]
        assert data[0].image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", METADATA)
def test_folders_of_pictures(name, tmp_path):
    inner = tmp_path / "data" / "test" / "deep"
    inner.mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(inner / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    file = tmp_path / "data" / "test" / name
    file.write_text(METADATA[name].format(name="deep/../deep/a.png"))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for folder in ("data", "link"):
        data = HubDataset(str(tmp_path / folder))
        assert answers(data) == ["007"]
        assert data[0].image.getpixel((0, 0)) == (255, 0, 0)
    for outside in ("../../secret.png", str(tmp_path / "secret.png"), "gone.png"):
        file.write_text(METADATA[name].format(name=outside))
        with pytest.raises(ValueError, match=r"row 1: expected an image (file|in the data's own)"):
            HubDataset(str(tmp_path / "data"))


def test_packed_folders_of_pictures(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "test.zip", "w") as packed:
        packed.write(tmp_path / "a.png", "own/a.png")
        packed.writestr("own/metadata.csv", METADATA["metadata.csv"].format(name="a.png"))
    data = HubDataset(str(tmp_path / "data"))
    assert (answers(data), data[0].image.getpixel((0, 0))) == (["007"], (255, 0, 0))


def test_skipped_rows_are_named(tmp_path, capsys):
    rows = [ROW] + [ROW | {"answer": None}] * 7
    data = READERS["lines"](tmp_path, rows, skip_bad=True)
    told = capsys.readouterr().err.splitlines()
    assert "skipped 7 of 8 rows, the first: rows.jsonl, row 2:" in told[0]
    assert [line.split(":")[1] for line in told[1:5]] == [
        f" rows.jsonl, row {number}" for number in (3, 4, 5, 6)
    ]
    assert told[5:] == ["  and 2 more"]
    assert len(data.skipped) == 7
