"""`tokenprune flops`: the layers of a schedule, a budget's schedule, without weights."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from commands import refused
from transformers import LlamaConfig, LlavaConfig

from tokenprune.cli import main as cli


def test_flops_prints_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "costs.png"
    arguments = ["flops", "model=llava_1_5_7b", "budget.avg_tokens=192", f"--output={picture}"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(✂ )?(\d+) +(\d+) ", printed, re.MULTILINE)
    assert [int(layer) for _, layer, _ in rows] == list(range(32))
    assert [int(layer) for cut, layer, _ in rows if cut] == [8, 16, 24]
    assert sum(int(visual) for _, _, visual in rows) / 32 == 192
    assert "solved    lam = 0.254" in printed
    assert "possible  144 to 576" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["flops", "model=llava_1_5_7b", "--output", str(tmp_path / "costs.txt")]) == 2
    assert "flops.output: expected a picture file" in capsys.readouterr().err


def test_flops_says_where_the_image_decides(capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, decides in (
        (["strategy=prumerge"], True),
        (["strategy=prumerge", "strategy.count=schedule"], False),
        (["strategy=pyramiddrop"], False),
    ):
        assert cli.main(["flops", "model=llava_1_5_7b", *overrides]) == 0
        assert ("no more than these" in capsys.readouterr().out) == decides


def test_flops_needs_a_config_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = LlamaConfig(num_hidden_layers=6, hidden_size=64, intermediate_size=96)
    LlavaConfig(text_config=text).save_pretrained(tmp_path)
    command = ["flops", "model=hub", f"model.path={tmp_path}", "strategy=none"]
    assert cli.main(command) == 0
    assert "576 visual tokens" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "config.json").write_text("{")
    assert cli.main(command) == 2
    assert "model.path: expected a readable config.json" in capsys.readouterr().err
    assert cli.main(["flops", "model=hub"]) == 2
    assert "model.path: expected a value" in capsys.readouterr().err


def test_flops_of_a_shape_are_those_of_its_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes, tokens and overrides are the benchmark's, budgets an evaluation's."""
    own = ["shape=tiny", "resolution=336x336", "num_text=24", "shape.num_layers=8"]
    assert cli.main(["flops", *own, "strategy=fastv", "budget.avg_tokens=300"]) == 0
    printed = capsys.readouterr().out
    assert "tiny, fastv: 576 visual and 24 text tokens" in " ".join(printed.split())
    layers = re.findall(r"^ +(?:✂ )?\d+ +(\d+) +(\d+) ", printed, re.MULTILINE)
    assert layers[0] == ("576", "600")
    assert len(layers) == 8
    assert sum(int(visual) for visual, _ in layers) / 8 == pytest.approx(300, abs=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["shape=tiiny"], "got 'tiiny'. Did you mean 'tiny'?"),
        (["shape=hub"], "shape.path: expected a value, got none. Add shape.path="),
        (["shape=tiny", "shape.num_heads=7"], "shape.num_heads: expected a divisor of 64, got 7"),
        (["shape=tiny", "model=tiny"], "shape: expected it or a model, got both"),
        (["shape=tiny", "schedule.num_stages=5"], "expected at most num_layers=4, got 5"),
        (["shape=tiny", "strategy=fastv,random"], "expected one value, got 'fastv,random'"),
    ],
)
def test_shapes_that_cannot_be(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["flops", *overrides], capsys)


def test_flops_as_csv_have_all_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["flops", "model=llava_1_5_7b", "--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [int(row["layer"]) for row in rows if row["cut"] == "1"] == [8, 16, 24]
    assert [int(row["visual"]) for row in rows[7:9]] == [576, 288]
    # 2 bytes of 32 heads of 128 values, keys and values, for each token.
    assert float(rows[0]["kv_mb"]) * 1e6 == pytest.approx(576 * 2 * 32 * 128 * 2, rel=1e-12)
