"""`tokenprune show`."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint import NUM_VISUAL
from commands import random_llava
from PIL import Image

from tokenprune.cli import main as cli
from tokenprune.cli import prompt


def test_show_prints_both_answers_and_draws(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32), "red").save("picture.png")
    command = ["show", "picture.png", "what is this ?", *random_llava(checkpoint)]
    assert cli.main([*command, "strategy=uniform", "max_new_tokens=2"]) == 0
    printed = capsys.readouterr().out
    assert "unpruned" in printed
    assert f"visual tokens   {NUM_VISUAL} -> 2" in printed
    with Image.open("outputs/show/picture-uniform.png") as drawn:
        assert drawn.width > drawn.height


def test_show_turns_a_photo_as_data_sets_do(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken upright, stored lying
    Image.new("RGB", (40, 32), "red").save("photo.png", exif=exif)
    seen = []
    made = prompt.prompt

    def noted(loaded, image, question):
        seen.append(image.size)
        return made(loaded, image, question)

    monkeypatch.setattr(prompt, "prompt", noted)
    assert cli.main(["show", "photo.png", "what ?", *random_llava(checkpoint)]) == 0
    assert seen == [(32, 40)]
