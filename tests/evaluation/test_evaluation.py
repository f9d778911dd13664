"""What an evaluation measures, and that it measures the same however it runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import NUM_LAYERS, NUM_VISUAL, save_checkpoint
from far import capture
from oracles import decided
from PIL import Image
from processes import call
from safetensors.torch import load_file, save_file
from trainings import DDP

import tokenprune as tp
from tokenprune.cli.configs import compose
from tokenprune.data import Sample
from tokenprune.evaluation import loading
from tokenprune.evaluation.run import evaluate
from tokenprune.evaluation.summary import summarise
from tokenprune.runs import models, results
from tokenprune.runs.images import share_interval
from tokenprune.runs.proportions import wilson

NUM_SAMPLES = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def task(checkpoint: Path, folder: Path, *overrides: str) -> tuple[Any, Path, dict[str, str]]:
    """What `evaluate` is given."""
    config = compose(
        "eval",
        [
            "model=hub",
            f"model.path={checkpoint}",
            f"data.test.num_samples={NUM_SAMPLES}",
            "data.batch_size=4",
            "max_new_tokens=3",
            "num_pictures=2",
            "trainer.callbacks=[]",
            *overrides,
        ],
    )
    strategy = "none" if config.strategy is None else config.strategy.name
    names = {"strategy": strategy, "schedule": "pyramid", "model": "random", "data": "scenes"}
    return config, folder, names


def run(checkpoint: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    return evaluate(*task(checkpoint, folder, *overrides))


@pytest.mark.parametrize("strategy", ["pyramiddrop", "none"])
def test_captured_prefills_change_no_answer(checkpoint, tmp_path, monkeypatch, strategy) -> None:
    made: list[tp.Graphs] = []
    graphs = tp.Graphs

    def noted(most: int) -> tp.Graphs:
        made.append(graphs(most))
        return made[-1]

    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(tp, "Graphs", noted)
    options = [f"strategy={strategy}", "data.batch_size=1", "num_pictures=2"]
    plain = run(checkpoint, tmp_path / "plain", *options)
    assert not made
    found = run(checkpoint, tmp_path / "captured", *options, "graphs=8")
    assert sum(own.replays for own in made) > 0
    told = {"prefill_ms"}
    assert {key: value for key, value in found.items() if key not in told} == {
        key: value for key, value in plain.items() if key not in told
    }
    assert predictions(tmp_path / "captured") == predictions(tmp_path / "plain")


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_metrics_are_means_over_samples() -> None:
    shape = tp.cost.DecoderShape(2, 8, 16, 2, 1, 4, 10)
    common = {"num_visual": 4, "real": [9, 7]}
    records = [
        common | {"kind": "a", "score": 1.0, "visual": [4, 2]},
        common | {"kind": "a", "score": 0.0, "visual": [4, 0]},
        common | {"kind": "b", "score": 1.0, "visual": [4, 1]},
    ]
    assert summarise(
        [common | {"kind": "a", "score": s, "visual": [4, 2]} for s in (0.3, 0.9)], [0.1], shape, 2
    )["accuracy"] == pytest.approx(0.6)
    metrics = summarise(records, [0.002, 0.001, 0.009], shape, bytes_per_value=2)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["kinds"]["a"]["accuracy"] == 0.5
    assert metrics["kinds"]["b"]["num_samples"] == 1
    assert metrics["visual_tokens_per_layer"] == [4, 1]
    assert (metrics["avg_tokens"], metrics["final_tokens"]) == (2.5, 1)
    each = [tp.cost.flops(shape, [4, count]) for count in (2, 0, 1)]
    assert metrics["tflops"] == pytest.approx(sum(each) / 3 / 1e12)
    assert metrics["tflops_ratio"] == pytest.approx(sum(each) / 3 / tp.cost.flops(shape, [4, 4]))
    assert metrics["kv_mb"] == pytest.approx(2 * 16 * 1 * 4 * 2 / 1e6)
    assert metrics["prefill_ms"] == pytest.approx(2)
    latent = replace(shape, unlike="latent attention")
    assert summarise(records, [0.1], latent, 2)["kv_mb"] is None
    assert metrics["num_images"] is None
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == wilson(2, 3)
    marked = [r | {"picture": mark} for r, mark in zip(records, "aab", strict=True)]
    metrics = summarise(marked, [0.1], shape, 2)
    assert metrics["num_images"] == 2
    expected = share_interval([1.0, 0.0, 1.0], [*"aab"])
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == expected


def test_no_samples_is_an_error() -> None:
    shape = tp.cost.DecoderShape(2, 8, 16, 2, 1, 4, 10)
    with pytest.raises(ValueError, match="expected at least one sample"):
        summarise([], [], shape, 2)


def test_text_alone_costs_no_visual_flops() -> None:
    shape = tp.cost.DecoderShape(2, 8, 16, 2, 1, 4, 10)
    record = {"kind": "a", "score": 1.0, "num_visual": 0, "visual": [0, 0], "real": [5, 5]}
    assert summarise([record], [0.1], shape, 2)["tflops_ratio"] == 1.0


def test_counts_follow_the_schedule(checkpoint: Path, tmp_path: Path) -> None:
    overrides = ["strategy=uniform", "schedule.num_stages=2", "schedule.lam=0.3"]
    metrics = run(checkpoint, tmp_path, *overrides)
    lengths = tp.Schedule.pyramid(NUM_LAYERS, 2, 0.3).lengths(NUM_LAYERS, NUM_VISUAL)
    assert metrics["visual_tokens_per_layer"] == lengths
    assert metrics["final_tokens"] == lengths[-1]
    assert metrics["num_visual"] == NUM_VISUAL
    shape = tp.cost.DecoderShape.from_config(models.load_config(str(checkpoint)))
    assert metrics["tflops"] == pytest.approx(tp.cost.flops(shape, lengths) / 1e12)
    assert metrics["num_samples"] == NUM_SAMPLES == len(predictions(tmp_path))
    assert metrics["num_images"] == len({p["picture"] for p in predictions(tmp_path)}) > 1
    assert set(metrics["kinds"]) == {"read", "colour", "exist", "relation", "text"}
    assert metrics["prefill_ms"] > 0

    kept = json.loads((tmp_path / "kept.json").read_text())
    assert len(kept) == 2
    assert kept[0]["grids"] == [[4, 4]]
    assert kept[0]["places"][5] == [0, 0, 1, 1]
    assert [stage["layer"] for stage in kept[0]["stages"]] == [2]
    assert len(kept[0]["stages"][0]["kept"]) == lengths[-1]
    assert all((tmp_path / entry["image"]).is_file() for entry in kept)


def test_keeping_everything_is_the_unpruned_model(checkpoint: Path, tmp_path: Path) -> None:
    whole = run(checkpoint, tmp_path / "none", "strategy=none")
    kept = run(checkpoint, tmp_path / "all", "strategy=fastv", "schedule.keep=1")
    assert predictions(tmp_path / "none") == predictions(tmp_path / "all")
    for key in ("accuracy", "tflops", "kv_mb", "avg_tokens", "num_visual"):
        assert whole[key] == kept[key]
    assert whole["visual_tokens_per_layer"] == [NUM_VISUAL] * NUM_LAYERS
    assert whole["tflops_ratio"] == 1.0
    assert whole["lam"] is None
    assert whole["schedule"] is None


def test_fewer_tokens_cost_less(checkpoint: Path, tmp_path: Path) -> None:
    cheap = run(checkpoint, tmp_path / "a", "strategy=random", "schedule.lam=0.3")
    dear = run(checkpoint, tmp_path / "b", "strategy=random", "schedule.lam=0.9")
    for key in ("tflops", "kv_mb", "avg_tokens", "final_tokens"):
        assert cheap[key] < dear[key]


def test_batches_change_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with decided():
        run(checkpoint, tmp_path / "one", "strategy=random", "data.batch_size=1")
    run(checkpoint, tmp_path / "many", "strategy=random", "data.batch_size=10")
    assert predictions(tmp_path / "one") == predictions(tmp_path / "many")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiles"), "llava_next")


WHOLE = 16 + 8 * 9  # base image, and a mosaic of 2 x 2 tiles with a newline per row


def test_tiles_run_with_the_same_config(tiles: Path, tmp_path: Path) -> None:
    metrics = run(tiles, tmp_path, "strategy=pyramiddrop", "schedule.num_stages=2")
    assert metrics["num_visual"] == WHOLE
    assert metrics["final_tokens"] == WHOLE // 2


def test_grids_of_tiles_are_known(tiles: Path, tmp_path: Path) -> None:
    run(tiles, tmp_path, "strategy=pyramiddrop", "schedule.num_stages=2")
    (first, _) = json.loads((tmp_path / "kept.json").read_text())
    assert first["grids"] == [[4, 4], [8, 8]]  # newlines are in no column
    assert len(first["places"]) == first["num_visual"] == WHOLE


@pytest.mark.matrix
def test_a_smaller_picture_is_a_method_of_its_own(
    checkpoint: Path, tiles: Path, tmp_path: Path
) -> None:
    """Of tiles it makes fewer tokens, and what it saves is told; a tower of one size makes all."""
    small = ["strategy=none", "data.image_scale=0.02"]
    metrics = run(tiles, tmp_path / "tiles", *small)
    assert (metrics["strategy"], metrics["image_scale"]) == ("downsample", 0.02)
    assert (metrics["schedule"], metrics["layers"], metrics["num_visual"]) == (None, None, WHOLE)
    assert metrics["avg_tokens"] == metrics["final_tokens"] < WHOLE
    assert metrics["tflops_ratio"] < 1
    fixed = run(checkpoint, tmp_path / "one", *small)
    assert (fixed["strategy"], fixed["avg_tokens"]) == ("downsample", NUM_VISUAL)
    assert fixed["tflops_ratio"] == 1
    whole = run(checkpoint, tmp_path / "whole", "strategy=none")
    assert (whole["strategy"], whole["image_scale"]) == ("none", 1.0)
    assert predictions(tmp_path / "one") != predictions(tmp_path / "whole")
    # A method may be given smaller pictures, too.
    pruned = run(tiles, tmp_path / "both", "strategy=random", "data.image_scale=0.02")
    assert pruned["strategy"] == "random"
    assert pruned["avg_tokens"] < metrics["avg_tokens"]
    (first, _) = json.loads((tmp_path / "both" / "kept.json").read_text())
    assert first["num_visual"] == len(first["places"]) == metrics["avg_tokens"]


@pytest.mark.matrix
def test_two_processes_count_every_sample_once(checkpoint: Path, tmp_path: Path) -> None:
    two = [*DDP, "trainer.callbacks=[{_target_:trainings.Apart}]"]
    samples = "data.test.num_samples=5"  # odd: a plain distributed sampler would repeat one
    with decided():
        alone = run(checkpoint, tmp_path / "one", "strategy=uniform", samples)
    (tmp_path / "two").mkdir()
    own = task(checkpoint, tmp_path / "two", "strategy=uniform", samples, *two)
    done = call(evaluate, *own)
    assert done.returncode == 0, done.stdout
    together = json.loads((tmp_path / "two/metrics.json").read_text())
    assert predictions(tmp_path / "one") == predictions(tmp_path / "two")
    assert [p["id"] for p in predictions(tmp_path / "two")] == [f"test-0-{i}" for i in range(5)]
    for key in ("accuracy", "tflops", "kv_mb", "num_samples"):
        assert alone[key] == together[key]
    assert (tmp_path / "one/kept.json").read_text() == (tmp_path / "two/kept.json").read_text()


def test_a_complete_run_is_not_run_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(checkpoint, tmp_path, "strategy=uniform")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *given: pytest.fail("loaded again"))
        assert run(checkpoint, tmp_path, "strategy=uniform") == first
    assert run(checkpoint, tmp_path, "strategy=uniform", "schedule.lam=0.9") != first


def test_other_weights_are_run_again(checkpoint: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    run(own, tmp_path / "run", "strategy=none")
    first = predictions(tmp_path / "run")
    weights = load_file(own / "model.safetensors")
    name = next(name for name in weights if "lm_head" in name)
    weights[name] = -weights[name]
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    run(own, tmp_path / "run", "strategy=none")
    assert predictions(tmp_path / "run") != first


@pytest.mark.matrix
def test_the_seed_is_the_one_that_draws(checkpoint: Path, tmp_path: Path) -> None:
    for overrides in (["seed=3"], ["strategy.seed=3"], ["strategy.seed=3", "seed=5"]):
        metrics = run(checkpoint, tmp_path, "strategy=random", *overrides)
        assert metrics["seed"] == 3
    assert run(checkpoint, tmp_path, "strategy=fastv", "seed=4")["seed"] == 4


def test_small_data_is_prepared_once_and_large_data_streams() -> None:
    class Loader:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            tensors = {"x": torch.zeros(2), "y": "text"}
            sample = Sample("a", (Image.new("L", (4, 2)),), ())  # 8 bytes, as many as the tensor
            return iter([{"inputs": tensors, "samples": [sample], "i": i} for i in range(3)])

        def __len__(self) -> int:
            return 3

    for limit, passes in ((48, 1), (47, 2)):
        loader = Loader()
        remembered = loading.RememberedBatches(loader, limit)
        assert [batch["i"] for batch in remembered] == [0, 1, 2] == [b["i"] for b in remembered]
        assert loader.passes == passes
        assert len(remembered) == 3
    looked = loading.RememberedBatches(loader := Loader(), 1000)
    next(iter(looked))  # a pass that stopped early remembers nothing
    assert len(list(looked)) == 3
    assert loader.passes == 2


def test_an_error_leaves_the_model_unhooked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("in a strategy")

    monkeypatch.setattr("tokenprune.strategies.uniform.Uniform.select", broken)
    with pytest.raises(RuntimeError, match="in a strategy"):
        run(checkpoint, tmp_path, "strategy=uniform")
    config = compose("eval", ["model=hub", f"model.path={checkpoint}"])
    model = loading.load_model(config).model
    hooked = [module for module in model.modules() if module._forward_pre_hooks]
    assert not hooked
    assert not list(tmp_path.iterdir())


def test_accepted_answers_and_turns_before(checkpoint: Path, tmp_path: Path) -> None:
    """The last answer of a conversation, by a metric that counts people."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    texts = ["<image>\nwhat is this ?", "red", "which colour ?", "blue"]
    roles = ["human", "gpt"] * 2
    talk = [{"from": r, "value": text} for r, text in zip(roles, texts, strict=True)]
    rows = [{"image": "a.png", "id": "talk", "conversations": talk}]
    path = tmp_path / "rows.json"
    options = ["data=folder", f"data.path={path}"]
    for own in (rows, [{"image": "a.png", "question": "which ?", "answer": ["x"] * 3 + ["y"]}]):
        path.write_text(json.dumps(own))
        config = compose(
            "eval",
            [
                "model=hub",
                f"model.path={checkpoint}",
                *options,
                "trainer.callbacks=[]",
                "max_new_tokens=1",
                f"metric={'exact' if own is rows else 'vqa'}",
            ],
        )
        names = {"strategy": "x", "schedule": "x", "model": "x", "data": "folder"}
        told = evaluate(config, tmp_path / config.metric, names)
        (line,) = predictions(tmp_path / config.metric)
        assert told["metric"] == config.metric
        assert told["accuracy"] == line["score"]
        if own is rows:
            assert (line["question"], line["answer"]) == ("which colour ?", "blue")
            assert line["score"] == (line["prediction"] == "blue")
        else:
            said = line["prediction"]
            assert line["score"] == pytest.approx({"x": 0.75, "y": 0.25}.get(said, 0))
    with pytest.raises(KeyError, match="metric: expected one of"):
        run(checkpoint, tmp_path / "none", "metric=f1")


def test_load_gives_the_asked_type_and_attention(checkpoint: Path) -> None:
    loaded = models.load(str(checkpoint), dtype="bfloat16", attention="eager")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config.get_text_config()._attn_implementation == "eager"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_mme_s_pairs_are_those_about_one_picture(checkpoint: Path, tmp_path: Path) -> None:
    """Two questions about each picture; the summary is part of the metrics."""
    rows = []
    for number in range(2):
        Image.new("RGB", (24, 24), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
        for question in ("Is there a red K?", "Is there a blue K?"):
            rows.append({"image": f"{number}.png", "question": question, "answer": "yes"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["data=folder", f"data.path={tmp_path / 'rows.jsonl'}", "metric=mme", "max_new_tokens=1"]
    config, folder, names = task(checkpoint, tmp_path / "run")
    config = compose(
        "eval", ["model=hub", f"model.path={checkpoint}", "trainer.callbacks=[]", *own]
    )
    metrics = evaluate(config, folder, names)
    assert metrics["metric_summary"]["unpaired"] == 0
    assert metrics["metric_summary"]["all"] >= 100 * metrics["accuracy"]
    row = results.row(metrics, "run")
    assert row["summary_all"] == metrics["metric_summary"]["all"]
    lines = predictions(tmp_path / "run")
    marks = [line["picture"] for line in lines]
    assert marks == [marks[0]] * 2 + [marks[2]] * 2
    assert metrics["num_images"] == len({*marks}) == 2
    expected = share_interval([line["score"] for line in lines], marks)
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == expected


def test_options_reach_the_processor() -> None:
    assert models.load("tiny").processor.patch_size != 8
    assert models.load("tiny", processor={"patch_size": 8}).processor.patch_size == 8
