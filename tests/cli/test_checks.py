"""What is refused before anything is loaded or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint import NUM_LAYERS
from commands import TINY, random_llava, refused
from PIL import Image


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.lam=0"], "lam: expected a number in (0, 1], got 0"),
        (["schedule.lam=1.5"], "lam: expected a number in (0, 1], got 1.5"),
        (["schedule.lam=half"], "lam: expected a number in (0, 1], got 'half'"),
        (["schedule.num_stages=9"], f"expected at most num_layers={NUM_LAYERS}, got 9"),
        (["schedule.num_stages=3", "schedule.layers=[3,2]"], "strictly rising layers, got [3, 2]"),
        (["schedule.num_stages=3", "schedule.layers=[2,9]"], f"layers below {NUM_LAYERS}"),
        (["schedule=one_shot", "schedule.layer=-1"], "Stage.layer: expected an integer >= 0"),
        (["schedule=one_shot", "schedule.keep=-0.1"], "Stage.keep: expected a number in [0, 1]"),
        (["schedule.rounding=up"], "Schedule.rounding: expected one of"),
        (["schedule=explicit", "schedule.stages=[{layer:2}]"], "the keys layer and keep"),
        (["schedule=explicit", "schedule.stages=2"], "schedule.stages: expected a list of cuts"),
        (["positions=moved"], "positions: expected one of ['auto', 'original', 'renumbered']"),
        (["strategy.queries=some"], "queries: expected one of ['last', 'all'], got 'some'"),
        (["strategy.name=fastvv"], "got 'fastvv'. Did you mean 'fastv'?"),
        (["+strategy.sauce=x"], "expected fields among"),
        (["strategy=fastv", "schedule.layer=0"], "expected cuts at layer 1 or later for FastV"),
        (["model.dtype=float8"], "model.dtype: expected one of"),
        (["model.attention=fast"], "model.attention: expected one of"),
        (["-m", "schedule.lam=0.5,2"], "lam: expected a number in (0, 1], got 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.share(3)
def test_values_out_of_range(
    overrides: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["eval", *random_llava(checkpoint), *overrides], capsys)


def damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config":
        (folder / "config.json").write_text("{")
    elif kind == "no weights":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "missing tensors":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors.pop(next(name for name in tensors if "q_proj" in name))
        save_file(tensors, weights, {"format": "pt"})
    elif kind == "no processor":
        for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    elif kind == "text only":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "expected a checkpoint with config.json"),
        ("config", "expected a readable config.json"),
        ("no weights", "expected weights in safetensors files"),
        ("cut off", "expected a complete checkpoint"),
        ("missing tensors", "without 1 of them, such as 'model.language_model.layers"),
        ("no processor", "expected a complete checkpoint"),
        ("text only", "expected a model that reads images and text into one decoder stream"),
    ],
)
@pytest.mark.share(3)
def test_broken_checkpoints(
    kind: str,
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    damage(folder, kind)
    assert message in refused(["eval", *random_llava(folder)], capsys)


def test_a_decoder_that_reads_images_by_cross_attention(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    text |= heads | {"cross_attention_layers": [1], "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_global_layers": 1, "attention_heads": 4, "image_size": 32, "patch_size": 8}
    vision |= {"intermediate_layers_indices": [1], "vision_output_dim": 64}
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    folder = Path(shutil.copytree(checkpoint, tmp_path / "mllama"))
    model.save_pretrained(folder)
    message = refused(["eval", *random_llava(folder)], capsys)
    assert "expected visual tokens in the decoder's stream" in message


def test_no_code_from_a_hub_unless_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("open('ran', 'w')\nclass Config: ...\n")
    assert "trust_remote_code" in refused(["eval", *random_llava(folder)], capsys)


@pytest.mark.matrix
def test_bad_data(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", *random_llava(checkpoint), *TINY, "data=folder"]
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    rows = tmp_path / "rows.jsonl"
    good = {"image": "good.png", "question": "what is this ?", "answer": "red"}

    assert "expected" in refused([*command, f"data.path={tmp_path / 'none.jsonl'}"], capsys)
    rows.write_text("")
    assert "expected" in refused([*command, f"data.path={rows}"], capsys)
    for changes in ({"image": "bad.png"}, {"image": "none.png"}, {"image": None}):
        rows.write_text("".join(json.dumps(row) + "\n" for row in (good, good | changes)))
        message = refused([*command, f"data.path={rows}"], capsys)
        assert "expected" in message
        assert "row 2" in message or "line 2" in message or ":2" in message


def test_no_gpu(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    message = refused(["eval", *random_llava(checkpoint), "trainer=gpu"], capsys)
    assert "trainer.accelerator: expected a device of this machine, got 'gpu'" in message
