"""Questions and conversations from JSON files."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image
from questions import ROW, TALK, llava, save, talk

from tokenprune.data import FolderDataset, Turn
from tokenprune.data.module import VQADataModule


def test_folder(tmp_path):
    other = {"image": "b.png", "question": "¿Color?", "answer": 3, "id": "x/1", "kind": "count"}
    folder = save(tmp_path, [ROW, "", other])
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
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        FolderDataset(save(tmp_path, rows))


def test_llava_conversations(tmp_path):
    two = talk("A <image> and <image>?", "blue", image=["b.png", "a.png"])
    text = talk("Hello", "hi", id="text")
    path = llava(tmp_path, [TALK, two, text])
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
    data = FolderDataset(llava(tmp_path, rows), image_folder=tmp_path / "images")
    assert [data[i].turns for i in range(2)] == [
        (Turn("<image>Which?", "red"),),
        (Turn("Which?", "red"),),
    ]


def test_answers_that_are_evaluated(tmp_path):
    later = talk("<image>1", "a", "<image>2", "b", image=["a.png", "b.png"], id="x")
    folder = {"image_folder": str(tmp_path / "images")}
    path = str(llava(tmp_path, [TALK, later]))
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
    rows = {"text": talk("q", "a"), "late": talk("q", "a", "<image>", "b", image="a.png")}
    for turns, bad in (("last", "text"), ("each", "text"), ("each", "late")):
        path = str(llava(tmp_path, [TALK, rows[bad]]))
        with pytest.raises(ValueError, match="row 2: expected an image in front of each answer"):
            VQADataModule.from_folder(path=path, turns=turns, **folder)
        assert len(VQADataModule.from_folder(train_path=path, turns=turns, **folder).train) == 2


def test_a_list_of_questions_with_accepted_answers(tmp_path):
    said = ["red", "crimson", "red"]
    rows = [ROW | {"answer": said}, ROW | {"answers": [{"answer": text} for text in said]}]
    del rows[1]["answer"]
    path = save(tmp_path, []) / "questions.jsonl"
    path = path.rename(path.with_suffix(".json"))
    path.write_text(json.dumps(rows))
    data = FolderDataset(tmp_path)  # the only such file of the folder
    for index in range(2):
        assert data[index].turns == (Turn("Which colour?", "red", "all", tuple(said)),)


def test_all_answers_count_and_one_is_taught(tmp_path):
    said = ["crimson", "Red", "crimson"]
    data = FolderDataset(save(tmp_path, [ROW | {"answers": said}, ROW | {"answers": []}]))
    assert data[0].turns == (Turn("Which colour?", "red", "all", tuple(said)),)
    assert data[1].turns == (Turn("Which colour?", "red"),)
    with pytest.raises(ValueError, match="row 1: expected 'answer' to be one of 'answers', got"):
        FolderDataset(save(tmp_path, [ROW | {"answers": ["blue", "green"]}]))


def chat(*images, text="Which?"):
    """Messages of a question whose images are those parts of it."""
    parts = [{"type": "image"} | image for image in images]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
        {"role": "assistant", "content": "blue"},
    ]


def test_a_system_message_is_told_before_the_first_question(tmp_path):
    parts = [{"type": "text", "text": "Be kind."}]
    rows = [
        {"messages": [{"role": "system", "content": content}, *chat({}), *chat()], "image": "a.png"}
        for content in ("Be kind.", parts)
    ]
    first = {"from": "system", "value": "Be kind."}
    row = talk("<image>Which?", "blue", "Which?", "blue", image="a.png")
    rows.append(row | {"conversations": [first, *row["conversations"]]})
    asked = PAIR | {"user": "<image>Which?"}
    rows.append({"conversations": [asked | {"system": "Be kind."}, PAIR], "image": "a.png"})
    rows.append({"conversations": [first, asked, PAIR], "image": "a.png"})
    data = FolderDataset(llava(tmp_path, rows), image_folder=tmp_path / "images", turns="each")
    assert len(data) == 10
    assert data.has_systems
    for index in range(0, 10, 2):
        told = Turn("<image>Which?", "blue", system="Be kind.")
        assert data[index].turns == (told,)
        assert data[index + 1].turns == (told, Turn("Which?", "blue"))
    silent = [{"messages": [{"role": "system", "content": text}, *chat({})]} for text in ("", None)]
    silent += [{"conversations": [asked | {"system": text}]} for text in ("", None)]
    rows = [row | {"image": "a.png"} for row in silent]
    data = FolderDataset(llava(tmp_path, rows), image_folder=tmp_path / "images")
    assert {data[index].turns for index in range(4)} == {(Turn("<image>Which?", "blue"),)}
    assert not data.has_systems


def test_messages_name_their_images(tmp_path):
    for key in ("image", "path", "url"):
        for row in ({}, {"image": "./b.png"}):
            rows = [row | {"messages": chat({key: "b.png"})}]
            data = FolderDataset(llava(tmp_path, rows), image_folder=tmp_path / "images")
            assert data[0].turns == (Turn("<image>Which?", "blue"),)
            assert data[0].image.getpixel((0, 0)) == (0, 0, 255)
    rows = [{"messages": chat({"image": "b.png"}, {"image": "a.png"})}]
    asked = {"role": "user", "content": "Which?", "images": ["b.png", "a.png"]}
    rows += [{"messages": [asked, {"role": "assistant", "content": "blue"}]}]
    data = FolderDataset(llava(tmp_path, rows), image_folder=tmp_path / "images")
    for index in range(2):
        assert [own.getpixel((0, 0)) for own in data[index].images] == [(0, 0, 255), (255, 0, 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": "a.png", "messages": chat({"image": "b.png"})},
            r"row 1: expected images of the row or of its messages, got both: \['a.png'\] and \['b",
        ),
        (
            {"image": "a.png", "messages": chat({"image": "b.png"}, {})},
            "row 1, message 1: expected each of its images to be named once, or none, got",
        ),
        ({"messages": chat({"image": "b.png", "url": "a.png"})}, "message 1: expected each of its"),
        ({"messages": chat({"url": "https://x.org/b.png"})}, "row 1: .* got the address 'https:"),
        ({"messages": chat({"image": "gone.png"})}, "row 1: expected an image file, got .*gone"),
        ({"messages": chat({"image": "a.png", "video": "b"})}, "message 1: .* got a 'video' as"),
    ],
)
def test_images_that_messages_name_are_the_row_s(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        FolderDataset(llava(tmp_path, [row]), image_folder=tmp_path / "images")


PAIR = {"user": "Which?", "assistant": "blue"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "llava.json: expected a JSON list of rows, got dict. Put"),
        ([TALK, 3], "llava.json, row 2: expected a JSON object, got 3. Write"),
        (
            [talk("q", "a", "b", image="a.png")],
            r"row 1: .* in turn, .* got \['human', 'gpt', .*Re",
        ),
        ([talk(image="a.png")], r"row 1: expected 'conversations', got \[\]. Fill"),
        ([talk("q", " ", image="a.png")], "row 1, message 2: expected 'value', got ' '. Fill"),
        ([talk("<image>", "a")], "row 1: expected one <image> per image, .*got 1 for 0 images."),
        ([{"conversations": ["q"]}], "row 1, message 1: expected an object with from and value"),
        (
            [{"messages": [{"role": "system", "content": "Be kind."}]}],
            r"row 1: expected questions and answers in turn, human first .*, got \['system'\]",
        ),
        (
            [{"messages": [*chat(), {"role": "system", "content": "Be kind."}]}],
            r"row 1: .* in turn, .* got \['user', 'assistant', 'system'\]",
        ),
        (
            [{"messages": [{"role": "system", "content": "<image>"}, *chat()]}],
            "row 1: expected images in questions only, got one in a system message. Move it.",
        ),
        (
            [{"messages": [{"role": "system", "content": "Be.", "image": "a.png"}, *chat()]}],
            "row 1: expected images in questions only, got one in a system message. Move it.",
        ),
        (
            [{"conversations": [PAIR, PAIR | {"system": "Be kind."}]}],
            "row 1: expected one system message at most, .* got one in message 2. Leave",
        ),
        (
            [{"conversations": [{"role": "system", "content": "x"}, PAIR | {"system": "y"}]}],
            "row 1: expected one system message at most, .* got one in message 2. Leave",
        ),
        (
            [{"messages": [{"role": "system", "content": "<video>"}, *chat()]}],
            "row 1: expected images and text, got '<video>' in a system message",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "video"}]}]}],
            "row 1, message 1: expected parts of type text or image, got .*video.*. Leave",
        ),
    ],
)
def test_bad_conversations_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        FolderDataset(llava(tmp_path, rows), image_folder=tmp_path / "images")


def test_bad_rows_are_skipped_when_asked(tmp_path, capsys):
    rows = [ROW, ROW | {"image": "gone.png"}, "{oops", ROW | {"image": "broken.png"}, ROW]
    path = str(save(tmp_path, rows))
    with pytest.raises(ValueError, match=r"row 2: expected an image file"):
        VQADataModule.from_folder(path=path)
    data = VQADataModule.from_folder(path=path, skip_bad=True).test
    assert [data[i].id for i in range(len(data))] == ["1", "5"]
    assert all(f"row {n}:" in text for n, text in zip((2, 3, 4), data.skipped, strict=True))
    told = capsys.readouterr().err
    assert re.match(r".*questions.jsonl: skipped 3 of 5 rows, the first: .*row 2: expected", told)
    path = str(save(tmp_path, rows[1:4]))
    with pytest.raises(ValueError, match=r"got none in .* that is as expected: .*row 1: exp"):
        FolderDataset(path, skip_bad=True)


def test_a_line_ends_where_json_lines_end(tmp_path):
    question = "a\u2028b\u0085c"
    row = json.dumps(ROW | {"question": question}, ensure_ascii=False)
    data = FolderDataset(save(tmp_path, [row, ROW]))
    assert (len(data), data[0].turns[0].question) == (2, question)


def test_images_outside_the_folder_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    for image in ("../secret.png", str(tmp_path / "secret.png")):
        folder = save(tmp_path / "data", [ROW, ROW | {"image": image}])
        with pytest.raises(ValueError, match=r"row 2: expected an image in the data's own folder"):
            FolderDataset(folder)
        module = VQADataModule.from_folder(path=str(folder), allow_outside=True)
        assert module.test[1].image.size == (4, 4)
    own = str(tmp_path / "data" / "a.png")
    assert len(FolderDataset(save(tmp_path / "data", [ROW | {"image": own}]))) == 1


def test_an_unreadable_image_is_named_when_it_is_opened(tmp_path):
    data = FolderDataset(save(tmp_path, [ROW, ROW | {"image": "broken.png", "id": "b"}]))
    assert data[0].turns[0].answer == "red"
    with pytest.raises(ValueError, match=r"row 2 \(id 'b'\): expected an image .* got broken.png"):
        data[1]


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a .json, .jsonl, .* file, or a folder .*got '.*nowhere', which"
    ):
        FolderDataset(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"expected exactly one .jsonl or .json file in '.*', got \[\]"
    ):
        FolderDataset(tmp_path)
    save(tmp_path, [ROW])
    (tmp_path / "more.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"got \['more.jsonl', 'questions.jsonl'\]. Give the path"):
        FolderDataset(tmp_path)
