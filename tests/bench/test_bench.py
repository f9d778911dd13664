"""A run of the benchmark: what it leaves, errors that are results, the command."""

from __future__ import annotations

import csv
import gc
import json
import statistics
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from benches import TINY, config
from commands import refused
from far import capture

import tokenprune as tp
from tokenprune.bench import run as bench
from tokenprune.bench import ways
from tokenprune.bench.check import MEASURES
from tokenprune.bench.table import COLUMNS, print_table
from tokenprune.bench.variants import Bench
from tokenprune.cli import main as cli


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.share(2)
def test_what_a_run_leaves(measure: str) -> None:
    found = bench.measure(config(f"measure={measure}", "batch_size=2"))
    assert found["status"] == "ok"
    assert set(found) <= {*COLUMNS, "rounds_s"}
    assert "ways" not in found
    rounds = found["rounds_s"]
    assert len(rounds["unpruned"]) == len(rounds["pruned"]) == len(rounds["hooks"]) == 2
    ratios = [b / a for a, b in zip(rounds["unpruned"], rounds["pruned"], strict=True)]
    assert found["time_ratio"] == pytest.approx(statistics.median(ratios))
    assert found["over_flops"] == pytest.approx(found["time_ratio"] / found["flops_ratio"])
    per = 3 if measure == "decode" else 1  # decoding is told per token
    assert found["pruned_ms"] == pytest.approx(1e3 * statistics.median(rounds["pruned"]) / per)
    assert 0 < found["pruning_share"] < 1
    assert found["machine"]
    assert found["torch"] == torch.__version__
    assert found["avg_tokens"] == (96 + 48 + 24 + 12) / 4
    if measure == "train":
        assert found["pruned_peak_mb"] < found["unpruned_peak_mb"]
    else:
        assert found["pruned_kv_mb"] == found["expected_kv_mb"] < found["unpruned_kv_mb"]
    assert ("keys_ms" in found) == (measure != "decode")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate"),
    ],
)
@pytest.mark.share(2)
def test_a_model_too_large_is_a_result(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self, *_: object) -> None:
        raise error

    monkeypatch.setattr(Bench, "prefill", full)
    found = bench.measure(config())
    assert found["status"] == "out of memory"
    assert "time_ratio" not in found


def test_a_model_too_large_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run of a sweep needs its memory, so nothing of the error may hold on to it."""
    alive, seen = [], []

    def full(self, *_: object) -> None:
        alive.append(weakref.ref(self.model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Bench, "prefill", full)
    collect = gc.collect

    def collecting() -> None:
        collect()
        seen.append(alive[0]())

    monkeypatch.setattr(gc, "collect", collecting)
    bench.measure(config())
    assert seen == [None]


def test_other_errors_are_no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, *_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Bench, "prefill", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        bench.measure(config())


@pytest.mark.matrix
def test_a_run_by_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")  # a narrow terminal gets words in pieces
    assert cli.main(["bench", "train", *TINY, "hydra.run.dir=here"]) == 0
    assert "pyramiddrop" in capsys.readouterr().out
    files = {"config.yaml", "versions.json", "bench.json", "bench.csv", "bench.png"}
    assert {path.name for path in Path("here").iterdir()} == files
    (row,) = csv.DictReader(Path("here/bench.csv").read_text().splitlines())
    told = json.loads(Path("here/bench.json").read_text())
    assert row["measure"] == "train"
    assert row["shape"] == "tiny"
    assert float(row["time_ratio"]) == pytest.approx(told["time_ratio"], rel=1e-4)
    assert row["machine"] == told["machine"]
    assert Path("here/bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.matrix
def test_a_sweep_ends_in_one_table_and_skips_what_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: Counter[str] = Counter()
    original = bench.measure

    def counting(own):
        counts[own.measure] += 1
        return original(own)

    monkeypatch.setattr(bench, "measure", counting)
    sweep = ["bench", "-m", *TINY, "measure=prefill,decode", "batch_size=1",
             "hydra.sweep.dir=there"]  # fmt: skip
    assert cli.main(sweep) == 0
    rows = list(csv.DictReader(Path("there/bench.csv").read_text().splitlines()))
    assert [(row["measure"], row["batch_size"]) for row in rows] == [
        ("prefill", "1"),
        ("decode", "1"),
    ]
    assert cli.main(sweep) == 0
    assert counts == {"prefill": 1, "decode": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["measure=speed"], "measure: expected one of ['prefill', 'decode', 'train'], got 'speed'"),
        (["strategy=none"], "strategy: expected one that prunes"),
        (["rounds=0"], "rounds: expected an integer >= 1, got 0"),
        (["num_text=many"], "num_text: expected an integer >= 2, got 'many'"),
        (["resolution=large"], "resolution: expected width x height in pixels, got 'large'"),
        (["schedule.num_stages=9"], "expected"),
        (["ways=[flash]"], "ways: expected some of ['eager_layer', 'full_maps', "),
        (["ways=null"], "ways: expected a list, got None. Set ways=[]."),
        (["ways=full_maps"], "ways: expected a list, got 'full_maps'. Set ways=[full_maps]"),
        (["ways=[dense_masks,dense_masks]"], "ways: expected each once"),
        (["ways=[dense_masks]", "attention=eager"], "ways: expected attention=sdpa"),
        (["ways=[dense_masks]", "measure=decode"], "ways: expected measure=prefill"),
        (["ways=[full_maps]"], "Set strategy=pyramiddrop strategy.source=previous."),
        (["shape=hub"], "shape.path: expected a value"),
        (["shape=hub", "shape.path=./nowhere"], "expected a folder, got './nowhere'"),
        (["shape=hidden_2048"], "shape: expected one of"),
        (["speed=1"], "speed: expected a key of the config"),
        (["graph=many"], "graph: expected true or false, got 'many'"),
        (["graph=true", "warmup=1"], "warmup: expected 2 or more with graph=true"),
        (["graph=true", "device=cpu"], "graph: expected a CUDA device, got none"),
    ],
)
@pytest.mark.share(3)
def test_bad_input_is_told_in_a_line(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["bench", "shape=tiny", *overrides], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "device: expected a CUDA device" in refused(["bench", "device=cuda"], capsys)


def test_captured_prefills_are_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tokenprune.bench.check._has_gpu", lambda: True)
    monkeypatch.setattr(tp.Graphs, "_capture", capture)
    found = bench.measure(config("graph=true"))
    assert set(found) <= {*COLUMNS, "rounds_s"}
    for name in ("unpruned_graph_ms", "pruned_graph_ms", "graph_ratio", "graph_ratio_captured"):
        assert found[name] > 0
    assert {len(found["rounds_s"][name]) for name in ("unpruned_graph", "pruned_graph")} == {2}
    ratios = [
        captured / run
        for captured, run in zip(
            found["rounds_s"]["pruned_graph"], found["rounds_s"]["unpruned"], strict=True
        )
    ]
    assert found["graph_ratio"] == pytest.approx(sum(ratios) / 2)
    print_table([found | {"shape": "tiny", "strategy": "pyramiddrop"}], "measured")
    assert "pyramiddrop (captured)" in capsys.readouterr().out
    assert "graph_ratio" not in bench.measure(config("graph=true", "measure=decode"))


def test_figures_of_captures_that_were_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.bench.check._has_gpu", lambda: True)
    refuses = pytest.raises(ValueError, match="graph: expected prefills that can be captured")
    with pytest.warns(UserWarning, match="a model on cpu"), refuses:
        bench.measure(config("graph=true"))


def test_help_names_the_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "shape: hidden_1024, hub, llava_1_5_7b, llava_next_7b, tiny" in printed
    assert "data:" not in printed


@pytest.mark.matrix
def test_the_gpu_experiment_runs_on_a_cpu_with_a_tiny_shape() -> None:
    """Every kind of run in it: prefill, decode, full and LoRA training, both kinds of logits."""
    pytest.importorskip("peft")
    folder = Path(__file__).parents[2] / "experiments" / "gpu"
    small = ["shape=tiny", "num_visual=48", "num_text=8", "rounds=1", "new_tokens=1"]
    command = ["bench", f"--config-dir={folder}", "experiment=gpu", *small, "resolution=336x336"]
    command += ["device=cpu", "graph=false"]
    assert cli.main([*command, "hydra.sweep.dir=there"]) == 0
    rows = list(csv.DictReader(Path("there/bench.csv").read_text().splitlines()))
    found = {(row["measure"], row["tuning"], row["logits"]) for row in rows}
    assert {measure for measure, _, _ in found} == set(MEASURES)
    assert {
        ("train", "lora", "all"),
        ("train", "full", "all"),
        ("train", "lora", "supervised"),
    } <= found
    assert {row["batch_size"] for row in rows} == {"1", "8"}
    assert {row["way"] for row in rows} == {"", *ways.WAYS}
    assert {row["status"] for row in rows} == {"ok"}
