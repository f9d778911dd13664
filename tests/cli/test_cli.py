"""The command line: what it prints, what it leaves, and what it says about bad input."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from checkpoint import NUM_LAYERS, NUM_VISUAL, save_checkpoint
from commands import refused
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from processes import call

import tokenprune as tp
from tokenprune.cli import main as cli
from tokenprune.cli.main import compose

TINY = ["trainer.callbacks=[]", "max_new_tokens=2", "num_pictures=1", "data.batch_size=4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test in an empty folder."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def random_llava(checkpoint: Path) -> list[str]:
    return ["model=hub", f"model.path={checkpoint}"]


# ------------------------------------------------------------------------------------------- words


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"tokenprune {command}" in usage for command in cli.COMMANDS)
    assert cli.main([]) == 2


def test_eval_help_lists_choices_config_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    assert "strategy: fastv, none, pyramiddrop, random, uniform" in text
    assert "positions: renumbered" in text
    assert "tokenprune eval -m experiment=ablation" in text


def test_eval_help_explains_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Each stands under the comment on it, in whichever file it is."""
    assert cli.main(["eval", "--help", "strategy=fastv", "schedule=one_shot"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for key in ("positions: original", "keep: 0.5", "attention: sdpa", "batch_size: 32"):
        assert lines[lines.index(key) - 1].startswith("#"), key


@pytest.mark.parametrize("command", ["report", "list", "show", "verify"])
def test_help_of_other_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"usage: tokenprune {command}" in capsys.readouterr().out


def test_cfg_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--cfg", "job", "strategy=fastv", "schedule=pyramid"]) == 0
    printed = capsys.readouterr().out
    assert "name: fastv" in printed
    assert "Schedule.pyramid" in printed
    assert "positions: original" in printed
    assert list(Path().iterdir()) == []


def commands() -> list[str]:
    """Every command in the README and in the help of eval and train."""
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text() + cli.EXAMPLES
    found = re.findall(r"^ *`?(tokenprune \S.*?)(?:`|  |$)", text, re.MULTILINE)
    return [line for line in dict.fromkeys(found) if " COMMAND" not in line]


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_documents_are_understood(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(commands()) > 10
    monkeypatch.setattr(cli, "_check", lambda config: None)  # needs the model
    monkeypatch.setattr(cli, "_run_hydra", lambda **arguments: None)
    name, *rest = shlex.split(command)[1:]
    if name in ("eval", "train", "bench"):
        assert cli.main([name, *rest]) == 0
    elif name in ("verify", "show"):
        compose("eval", [item for item in rest if "=" in item])
    else:
        assert name in ("list", "report")


def test_list_shows_every_strategy_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    for word in [*tp.available(), "llava_next_7b", "ablation", "one_shot", "arXiv 2410.17247"]:
        assert word in listed


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evla"], "command: expected one of"),
        (["eval", "--foo"], "eval: unrecognized arguments: --foo"),
        (["eval", "foo"], "override: expected key=value, got 'foo'"),
        (["eval", "strategy=fastvv"], "got 'fastvv'. Did you mean 'fastv'?"),
        (["eval", "schedule=pyramidd"], "got 'pyramidd'. Did you mean 'pyramid'?"),
        (["eval", "model=tinny"], "got 'tinny'. Did you mean 'tiny'?"),
        (["eval", "stratgy=fastv"], "got 'stratgy=fastv'. Did you mean 'strategy'?"),
        (["eval", "schedule.lamm=1"], "got 'schedule.lamm=1'. Did you mean 'schedule.lam'?"),
        (["eval", "strategy.sauce=x"], "strategy.sauce: expected a key of the config"),
        (["eval", "hydra.run.dirr=x"], "hydra.run.dirr: expected a key of the config"),
        (["eval", "--cfg", "job", "model.pth=x"], "Did you mean 'model.path'?"),
        (["eval", "--cfg", "job", "-m"], "--cfg: expected a single run, got -m as well"),
        (["eval", "--resolve"], "--resolve: expected --cfg beside it"),
        (["eval", "strategy=fastv,random"], "expected one value, got 'fastv,random'. Add -m"),
        (["eval", "-m", "strategy=fastv,rondom"], "got 'rondom'. Did you mean 'random'?"),
        (["eval", "max_new_tokens=0"], "max_new_tokens: expected an integer >= 1, got 0"),
        (["eval", "num_pictures=-1"], "num_pictures: expected an integer >= 0, got -1"),
        (["eval", "seed=x"], "seed: expected an integer, got 'x'"),
        (["eval", "model=hub"], "model.path: expected a value, got none. Add model.path="),
        (["eval", "model=hub", "model.path=/no/where"], "model.path: expected a folder"),
        (["report", "/no/where"], "report: expected a folder with results, got /no/where"),
        (["report", "."], "report: expected results.csv or a run's metrics.json"),
        (["show", "no.png", "what?"], "show: expected a picture, got 'no.png'"),
        (["show"], "show: the following arguments are required"),
        (["verify", "strategy=none"], "strategy: expected one that prunes, got 'none'"),
        (["train", "strategy=fastvv"], "Did you mean 'fastv'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_cost_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    if arguments[0] in ("show", "verify") or "seed" in "".join(arguments):
        arguments = arguments + random_llava(checkpoint) if len(arguments) > 1 else arguments
    assert message in refused(arguments, capsys)


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
        (["positions=moved"], "positions: expected one of ['original', 'renumbered']"),
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


def test_bugs_keep_their_traceback(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("tokenprune.evaluation.run.evaluate", broken)
    assert cli.main(["eval", *random_llava(checkpoint)]) == 1
    assert "AssertionError: ours" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_only_our_own_messages_are_told_in_a_line() -> None:
    def told(text: str, file: str | Path) -> str | None:
        raising = compile(f"raise ValueError({text!r})", str(file), "exec")
        with pytest.raises(ValueError, match=r".") as caught:
            exec(raising)
        return cli.explain(caught.value)

    ours, message = Path(cli.__file__).parents[1], "x: expected a, got b."
    assert told(message, ours / "data" / "sources.py") == message
    assert told(message, "/home/u/tokenprune/.venv/lib/torch/nn/functional.py") is None
    assert (
        told("not enough values to unpack (expected 1, got 0)", ours / "training" / "run.py")
        is None
    )


def test_an_interruption_is_told_as_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning's loops do

    monkeypatch.setattr("tokenprune.evaluation.run.evaluate", interrupted)
    assert cli.main(["eval", *random_llava(checkpoint)]) == 130
    assert "stopped" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


# ------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_its_files(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*random_llava(checkpoint), *TINY, "data.test.num_samples=6", "hydra.run.dir=run"]
    HydraConfig.instance().cfg = None  # as in a fresh process
    assert cli.main(["eval", *overrides, "strategy=fastv", "logger=csv"]) == 0
    assert "fastv" in capsys.readouterr().out
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert (metrics["strategy"], metrics["schedule"]) == ("fastv", "one_shot")
    assert (metrics["layers"], metrics["keeps"], metrics["positions"]) == ([2], [0.5], "original")
    assert metrics["num_samples"] == 6
    assert metrics["model"] == str(checkpoint)
    assert "accuracy" in Path("run/csv/metrics.csv").read_text()
    assert len(Path("run/predictions.jsonl").read_text().splitlines()) == 6


def test_a_sweep_makes_a_table_and_skips_what_is_complete(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "-m", *random_llava(checkpoint), *TINY, "data.test.num_samples=5"]
    command += ["strategy=none,uniform", "schedule=pyramid", "schedule.lam=0.3,0.5"]
    assert cli.main(command) == 0
    assert "4 runs" in capsys.readouterr().out
    (folder,) = Path("outputs").iterdir()
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["strategy"] for row in rows] == ["none", "none", "uniform", "uniform"]
    assert [row["lam"] for row in rows] == ["", "", "0.3", "0.5"]

    stopped = folder / rows[3]["run"] / "metrics.json"
    stopped.unlink()
    kept = folder / rows[2]["run"] / "metrics.json"
    before = kept.stat().st_mtime_ns
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("complete already") == 3
    assert stopped.is_file()
    assert kept.stat().st_mtime_ns == before
    assert [path.name for path in Path("outputs").iterdir()] == [folder.name]

    # The first step of a report: the same folder, as a page.
    pytest.importorskip("tokenprune.report.page")
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()


def test_a_sweep_runs_again_what_has_other_data(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "question": "what ?", "answer": "red"}))
    command = ["eval", "-m", *random_llava(checkpoint), *TINY, "data=folder", f"data.path={rows}"]
    command += ["strategy=random", "strategy.seed=1,2"]
    assert cli.main(command) == 0
    rows.write_text(rows.read_text().replace("red", "green"))
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("again: data.path changed") == 2
    (folder,) = Path("outputs").iterdir()
    with (folder / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["seed"], row["data"], row["strategy"]) for row in table] == [
        ("1", str(rows), "random"),
        ("2", str(rows), "random"),
    ]
    assert json.loads((folder / table[0]["run"] / "predictions.jsonl").read_text())["answer"] == (
        "green"
    )


def test_the_ablation_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "_check", lambda config: seen.append(config))
    monkeypatch.setattr(cli, "_run_hydra", lambda **arguments: None)
    assert cli.main(["eval", "-m", "experiment=ablation"]) == 0
    runs = [
        (config.strategy and config.strategy.name, dict(config.schedule), config.positions)
        for config in seen
    ]
    assert len(runs) == 42
    assert runs[0][0] is None
    assert runs[1][0] == "fastv"
    assert runs[1][1]["_target_"] == "tokenprune.Schedule.one_shot"
    crossed = {(name, s["lam"], s["num_stages"]) for name, s, _ in runs[2:]}
    assert len(crossed) == 40
    assert {name for name, _, _ in crossed} == set(tp.available())
    assert {place for name, _, place in runs if name == "pyramiddrop"} == {"renumbered"}
    assert {place for name, _, place in runs if name == "fastv"} == {"original"}


def test_experiments_of_your_own(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "budget.yaml").write_text(
        "# @package _global_\n"
        "defaults: [override /model: hub]\n"
        f"model: {{path: {checkpoint}}}\n"
        "hydra:\n"
        "  mode: MULTIRUN\n"
        "  sweep: {dir: outputs/budget}\n"
        "  sweeper:\n"
        "    grids:\n"
        "      - strategy: none\n"
        "      - strategy: fastv\n"
        "        schedule.keep: 0.25,0.5\n"
    )
    command = ["eval", "--config-dir", str(tmp_path / "mine"), "experiment=budget"]
    few = ["data.test.num_samples=2", *TINY]
    assert cli.main([*command, *few]) == 0
    assert "3 runs: outputs/budget/results.csv" in capsys.readouterr().out
    rows = csv.DictReader(Path("outputs/budget/results.csv").read_text().splitlines())
    assert {row["model"] for row in rows} == {str(checkpoint)}
    assert cli.main([*command, "schedule.keep=2", *few]) == 2
    capsys.readouterr()
    (tmp_path / "mine" / "experiment" / "layers.yaml").write_text("# @package _global_\n")
    assert cli.main(command) == 2
    assert "got experiment/layers.yaml, which tokenprune has" in capsys.readouterr().err


def test_an_experiment_sweeps_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "_check", lambda config: seen.append(config.seed))
    monkeypatch.setattr(cli, "_run_hydra", lambda **arguments: None)
    chosen = ["strategy=random", "schedule.lam=0.5", "schedule.num_stages=2"]
    assert cli.main(["eval", "experiment=ablation", *chosen, "seed=3,4"]) == 0
    assert set(seen) == {3, 4}
    assert cli.main(["eval", "strategy=random", "seed=3,4"]) == 2


def test_a_signal_ends_an_evaluation(checkpoint: Path) -> None:
    own = [*random_llava(checkpoint), *TINY, "trainer.callbacks=[{_target_:commands.Kill}]"]
    assert call(cli.main, ["eval", *own]).returncode == -signal.SIGTERM


def test_keys_that_fit_the_swept_choices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "_check", lambda config: seen.append(config.schedule.keep))
    monkeypatch.setattr(cli, "_run_hydra", lambda **arguments: None)
    sweep = ["strategy=fastv,random", "schedule=one_shot", "schedule.keep=0.3,0.4"]
    assert cli.main(["eval", "-m", *sweep]) == 0
    assert seen == [0.3, 0.4, 0.3, 0.4]


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
    prompt = cli._prompt
    monkeypatch.setattr(
        cli,
        "_prompt",
        lambda loaded, image, q: (seen.append(image.size), prompt(loaded, image, q))[1],
    )
    assert cli.main(["show", "photo.png", "what ?", *random_llava(checkpoint)]) == 0
    assert seen == [(32, 40)]


@pytest.mark.parametrize("stages", ["[]", "[{layer:2,keep:1}]"])
def test_verify_needs_a_cut(
    stages: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", *random_llava(checkpoint), "schedule=explicit"]
    message = refused([*command, f"schedule.stages={stages}"], capsys)
    assert "verify: expected a schedule that drops visual tokens" in message


def test_verify_passes_on_an_exact_engine_and_fails_otherwise(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["verify", *random_llava(checkpoint), "strategy=pyramiddrop"]) == 0
    printed = capsys.readouterr().out
    assert "identity, renumbered positions" in printed
    assert "drop = mask, decoding" in printed
    assert "FAILED" not in printed

    import tokenprune.evaluation.verify as checks

    exact = checks._masked_logits
    monkeypatch.setattr(checks, "_masked_logits", lambda *given: exact(*given) * 1.01)
    assert cli.main(["verify", *random_llava(checkpoint)]) == 1
    assert "FAILED" in capsys.readouterr().out
