"""Rows about two images, written to files."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

ROW = {"image": "a.png", "question": "Which colour?", "answer": "red"}


def save(path: Path, rows: list) -> Path:
    path.mkdir(exist_ok=True)
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (20, 10), colour).save(path / name)
    (path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (path / "questions.jsonl").write_text(text, encoding="utf-8")
    return path


def talk(*texts: str, **more) -> dict:
    roles = ["human", "gpt"] * len(texts)
    turns = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    return {"conversations": turns} | more


TALK = talk("<image>\nWhich colour?", "red", "Sure?", "yes", image="a.png", id="t")


def llava(path: Path, rows: list) -> Path:
    """A JSON list, with its images in a folder of their own."""
    save(path / "images", []).joinpath("questions.jsonl").unlink()
    (path / "llava.json").write_text(json.dumps(rows), encoding="utf-8")
    return path / "llava.json"
