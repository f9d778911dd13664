"""The benchmark measures what it says: time in turn, memory, caches, and theory beside them."""

from __future__ import annotations

import csv
import gc
import json
import statistics
import time
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from commands import refused
from oracles import assert_same_choice
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from tokenprune import TracedStage, cost
from tokenprune.bench import run as bench
from tokenprune.bench import ways
from tokenprune.cli import main as cli
from tokenprune.cli.main import compose
from tokenprune.runs.compose import build_pruning

TINY = ["shape=tiny", "num_visual=96", "num_text=16", "rounds=2", "new_tokens=3"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test in an empty folder."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def config(*overrides: str):
    return compose("bench", [*TINY, *overrides])


def made(*overrides: str) -> bench.Bench:
    own = config(*overrides)
    torch.manual_seed(0)
    model = bench.build_model(bench._shape_config(own), torch.float32, "sdpa", CPU)
    pruning = build_pruning(own, 4)
    assert pruning is not None
    load = bench.Load(own.num_visual, own.num_text, own.batch_size, own.new_tokens)
    return bench.Bench(model, pruning, load, own.logits, list(own.ways))


# -------------------------------------------------------------------------------------- one figure


@pytest.mark.parametrize("measure", bench.MEASURES)
def test_what_a_run_leaves(measure: str) -> None:
    found = bench.measure(config(f"measure={measure}", "batch_size=2"))
    assert found["status"] == "ok"
    assert set(found) <= {*bench.COLUMNS, "rounds_s"}
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


def test_unpruned_and_pruned_take_turns() -> None:
    """A B, B A, A B: whatever slows the machine down hits both."""
    order = []
    variants = {
        name: bench.Variant(nullcontext, lambda name=name: name, order.append) for name in "AB"
    }
    one = made()
    with one.pruned():
        pass
    timing = bench.interleave(one, variants, rounds=3, warmup=2)
    assert order == list("AB") + list("BA") + list("AB") + list("BA") + list("AB")
    assert {name: len(seconds) for name, seconds in timing.seconds.items()} == {"A": 3, "B": 3}
    assert set(timing.peaks) == {"A", "B"}


def test_time_of_the_hooks_is_the_strategy_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that sleeps 20 ms at each of its three cuts is seen to."""
    one = made("strategy=uniform", "schedule=pyramid")
    kind = type(one.pruning.strategy)
    original = kind.select

    def slow(self, view, keep):
        time.sleep(0.02)
        return original(self, view, keep)

    monkeypatch.setattr(kind, "select", slow)
    timing = bench.interleave(one, one.variants("prefill", None), rounds=2, warmup=1)
    assert all(0.06 < hooks < whole for hooks, whole in zip(timing.hooks, timing.seconds["pruned"],
                                                           strict=True))  # fmt: skip
    assert "keys" not in timing.seconds  # it reads no attention


def test_the_model_is_left_as_it_was() -> None:
    one = made()
    before = [len(module._forward_pre_hooks) for module in one.model.modules()]
    bench.interleave(one, one.variants("prefill", None), rounds=1, warmup=1)
    assert [len(module._forward_pre_hooks) for module in one.model.modules()] == before


def test_peak_memory_is_the_allocator_s(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        large = torch.empty(2**20, dtype=torch.float32)  # 4 MiB
        both = large + 1  # 4 more
        del large
        both.add_(1)

    # Allocations are rounded up to a cache line or so.
    assert bench.peak_bytes(CPU, work) == pytest.approx(8 * 2**20, rel=1e-3)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("strategy", ["pyramiddrop", "fastv", "random"])
def test_bytes_in_the_cache_are_the_cost_model_s(strategy: str, positions: str) -> None:
    one = made(f"strategy={strategy}", f"positions={positions}", "schedule.num_stages=4",
               "schedule=pyramid", "batch_size=3")  # fmt: skip
    with one.pruned():
        held = bench.cache_bytes(one.prefill())
    assert held == one.expected_cache_bytes()
    # 4 layers with 2 key heads of 16 entries, keys and values in float32.
    assert held == 3 * 2 * (96 + 48 + 24 + 12 + 4 * 16) * 2 * 16 * 4


def test_keys_are_those_before_the_cuts() -> None:
    one = made("batch_size=2")
    found = one.before_cuts()
    assert [tuple(hidden.shape) for _, hidden in found] == [(2, n, 64) for n in (112, 64, 40)]
    layers = list(one.decoder.layers)
    assert [layers.index(layer) for layer, _ in found] == [1, 2, 3]
    one.project_keys(found)


def test_every_round_of_decoding_starts_at_the_same_context() -> None:
    one = made()
    prepare, work = one.variants("decode", None)["pruned"][1:]
    for _ in range(2):
        with one.pruned():
            cache = prepare()
            assert [layer.keys.shape[2] for layer in cache.layers] == [112, 64, 40, 28]
            work(cache)
            assert [layer.keys.shape[2] for layer in cache.layers] == [115, 67, 43, 31]


def test_decoding_is_timed_without_marks() -> None:
    """Two device events per layer would be seen in a step; time in hooks has rounds of its own."""
    one = made("measure=decode")
    variants = one.variants("decode", None)
    for name, per_step in (("pruned", 0), ("marked", 2 * 5)):  # a decoder and four layers
        context, prepare, work = variants[name]
        with context():
            cache = prepare()
            one.marks.clear()
            work(cache)
        assert len(one.marks) == 3 * per_step
    timing = bench.interleave(one, variants, rounds=2, warmup=1)
    told = bench.figures(one, "decode", timing)
    shares = [a / b for a, b in zip(timing.hooks, timing.seconds["marked"], strict=True)]
    assert told["pruning_share"] == pytest.approx(statistics.median(shares))


def test_no_copy_of_a_cache_outlives_its_round() -> None:
    """Two copies at a time of a large batch's cache would not fit where one does."""
    alive: set[int] = set()
    most = 0

    class State:
        def __init__(self) -> None:
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    variants = {name: bench.Variant(nullcontext, State, lambda _: None) for name in "AB"}
    one = made()
    bench.interleave(one, variants, rounds=2, warmup=2)
    assert most == 1


def test_training_makes_all_parameters_move_or_the_adapters_alone() -> None:
    for tuning, moved in (("full", False), ("lora", True)):
        if tuning == "lora":
            pytest.importorskip("peft")
        one = made("measure=train", f"tuning={tuning}")
        optimizer = bench._tune(one.model, config("measure=train", f"tuning={tuning}"))
        before = {name: weight.clone() for name, weight in one.model.named_parameters()}
        with one.pruned():
            one.step(optimizer)
        changed = {n for n, w in one.model.named_parameters() if not torch.equal(w, before[n])}
        assert changed
        assert all("lora" in name for name in changed) == moved


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for choice in ("false", "true"):
        own = config("measure=train", f"gradient_checkpointing={choice}")
        one = made("measure=train")
        bench._tune(one.model, own)
        with one.pruned():
            torch.manual_seed(1)
            output = one.model(inputs_embeds=one.embeds, labels=one.labels, use_cache=False)
            output.loss.backward()
        gradients.append([weight.grad for weight in one.decoder.layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ------------------------------------------------------------------- the ways of published code

PREVIOUS = ["schedule=pyramid", "schedule.num_stages=4", "strategy.source=previous"]


def answer(one: bench.Bench, way: str | None) -> tuple[torch.Tensor, list[TracedStage], int]:
    """Logits of the first new token, the cuts, bytes in the cache."""
    with one.pruned(way) as trace, torch.no_grad():
        output = one.model(inputs_embeds=one.embeds, use_cache=True, logits_to_keep=1)
    return output.logits, list(trace.stages), bench.cache_bytes(output.past_key_values)


@pytest.mark.parametrize("strategy", ["pyramiddrop", "fastv"])
@pytest.mark.parametrize("way", ways.WAYS)
def test_a_way_keeps_what_the_product_keeps(way: str, strategy: str) -> None:
    one = made(f"strategy={strategy}", *PREVIOUS, "batch_size=2")
    one.embeds *= 50  # embeddings of scale 1, so that attention is not flat
    logits, stages, held = answer(one, None)
    own_logits, own_stages, own_held = answer(one, way)
    assert [len(stage.kept) for stage in stages] == [2] * 3
    assert_same_choice(own_stages, stages)
    assert not torch.equal(*stages[0].kept)
    torch.testing.assert_close(own_logits, logits, rtol=1e-4, atol=1e-5)
    # Before the three cuts 112, 64 and 40 tokens; a layer holds two tensors of 2 heads of 16.
    twice = 2 * (112 + 64 + 40) * 2 * 2 * 16 * 4 if way == "cached_twice" else 0
    assert own_held == held + twice
    again_logits, again_stages, again_held = answer(one, None)
    torch.testing.assert_close(again_logits, logits, rtol=0, atol=0)  # and nothing is left behind
    for first, again in zip(stages, again_stages, strict=True):
        assert all(map(torch.equal, first.kept, again.kept))
    assert again_held == held


@pytest.mark.parametrize("way", ways.WAYS)
def test_a_way_does_the_work_that_it_names(way: str) -> None:
    """Products that torch counts; on a CPU it does not see into sdpa, only into eager attention."""
    from torch.utils.flop_counter import FlopCounterMode

    one = made(*PREVIOUS)
    counts = []
    for name in (None, way):
        answer(one, name)  # the first call compares two ways to queries and keys
        with FlopCounterMode(display=False) as counter:
            answer(one, name)
        counts.append(counter.get_total_flops())
    lengths = (112, 64, 40)  # hidden size 64, 4 heads of 16, 2 key heads, MLP of 176
    scoring = sum(cost.scoring_flops(one.shape, n, "last") for n in lengths)
    extra = {
        "eager_layer": sum(4 * n * n * 64 for n in lengths) - scoring,
        "full_maps": sum(2 * n * 64 * (64 + 32) + 2 * n * n * 64 for n in lengths) - scoring,
        "all_projections": sum(2 * n * 64 * (64 + 2 * 32 + 1) for n in lengths) - scoring,
        "dense_masks": 0,
        "cached_twice": sum(2 * n * 64 * (2 * 64 + 2 * 32 + 3 * 176) for n in lengths),
    }
    assert counts[1] - counts[0] == extra[way]


@pytest.mark.parametrize("way", [None, *ways.WAYS])
def test_masks_that_sdpa_gets(way: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made(*PREVIOUS, "schedule.num_stages=2", "batch_size=2")
    answer(one, way)
    seen = []
    original = nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **options):
        seen.append((attn_mask, options["is_causal"]))
        return original(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    answer(one, way)
    # 4 layers; one of them eager, or run twice.
    assert len(seen) == {"eager_layer": 3, "cached_twice": 5}.get(way or "", 4)
    if way != "dense_masks":
        assert all(mask is None and causal for mask, causal in seen)
        return
    assert [tuple(mask.shape) for mask, _ in seen] == [(2, 1, n, n) for n in (112, 112, 64, 64)]
    assert all(mask.dtype == torch.float32 and not causal for mask, causal in seen)
    first, second, third, fourth = (mask for mask, _ in seen)
    assert first is second  # made once per stage
    assert third is fourth


def test_rows_of_the_ways() -> None:
    names = list(ways.WAYS)
    listed = ",".join(names)
    command = ["bench", "prefill", *TINY, "strategy.source=previous", f"ways=[{listed}]"]
    assert cli.main([*command, "hydra.run.dir=here"]) == 0
    product, *rows = csv.DictReader(Path("here/bench.csv").read_text().splitlines())
    rounds = json.loads(Path("here/bench.json").read_text())["rounds_s"]
    assert product["way"] == product["over_product"] == ""
    assert [row["way"] for row in rows] == names
    for row in rows:
        ratios = [b / a for a, b in zip(rounds["pruned"], rounds[row["way"]], strict=True)]
        assert float(row["over_product"]) == pytest.approx(statistics.median(ratios), rel=1e-4)
        assert float(row["over_product_low"]) == pytest.approx(min(ratios), rel=1e-4)
        median = 1e3 * statistics.median(rounds[row["way"]])
        assert float(row["pruned_ms"]) == pytest.approx(median, rel=1e-4)
        assert row["unpruned_ms"] == product["unpruned_ms"]
        assert all(row[name] == "" for name in bench.PRODUCT_ONLY)
    held = {row["way"]: float(row["pruned_kv_mb"]) for row in rows}
    assert held.pop("cached_twice") > float(product["pruned_kv_mb"])
    assert set(held.values()) == {float(product["pruned_kv_mb"])}
    maps = {row["way"]: float(row["pruned_peak_mb"]) for row in rows}
    assert min(maps["eager_layer"], maps["full_maps"]) > float(product["pruned_peak_mb"])


# ------------------------------------------------------------------------------------------ theory


def test_flops_are_those_of_the_model() -> None:
    """Against torch's own counter, with attention in matrix products that it sees."""
    from torch.utils.flop_counter import FlopCounterMode

    one = made()
    one.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        one.prefill()
    masked = 112**2 * 64 * 4 * 2  # eager attention computes the half that the mask hides
    assert counter.get_total_flops() == one.flops("prefill", False) + masked
    cache = one.prefill()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        one.model(input_ids=torch.tensor([[1]]), past_key_values=cache)
    assert counter.get_total_flops() == one.flops("decode", False)


def test_training_counts_the_logits_that_are_made() -> None:
    every, supervised = made("logits=all"), made("logits=supervised")
    rows = 12 + 16 - supervised.load.num_labels  # survivors of the last layer without a label
    saved = every.flops("train", True) - supervised.flops("train", True)
    assert saved == 2 * rows * 64 * 1000
    assert every.flops("train", False) == supervised.flops("train", False)


@pytest.mark.parametrize(
    ("resolution", "tokens"),
    [("336x336", 576), ("672x672", 2880), ("672x1344", 5184), ("300x300", 576), ("337x336", 1728)],
)
def test_visual_tokens_of_a_resolution(resolution: str, tokens: int) -> None:
    assert bench.num_tokens(resolution) == tokens


def test_shapes_are_those_of_the_models() -> None:
    for name, weights in (
        ("llava_1_5_7b", 6.7e9),
        ("llava_next_7b", 6.7e9),
        ("hidden_1024", 2.7e8),
    ):
        own = bench._shape_config(compose("bench", [f"shape={name}"]))
        with torch.device("meta"):
            model = bench.build_model(own, torch.bfloat16, "sdpa", torch.device("meta"))
        counted = sum(weight.numel() for weight in model.parameters())
        assert counted == pytest.approx(weights, rel=0.02)
        assert cost.DecoderShape.from_config(own).num_layers == len(model.get_decoder().layers)


def test_any_checkpoint_s_config_will_do(tmp_path: Path) -> None:
    """A folder with nothing but config.json: the decoder of a vision-language model."""
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                       num_attention_heads=4, vocab_size=100)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                              num_attention_heads=2, image_size=32, patch_size=8)  # fmt: skip
    LlavaConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    found = bench.measure(config("shape=hub", f"shape.path={tmp_path}"))
    assert found["pruned_kv_mb"] == found["expected_kv_mb"]
    text.global_head_dim = 16  # what says that layers differ in size
    LlavaConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    found = bench.measure(config("shape=hub", f"shape.path={tmp_path}"))
    assert found["pruned_kv_mb"] < found["unpruned_kv_mb"]
    assert found["flops_ratio"] is None
    assert "expected_kv_mb" not in found


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate"),
    ],
)
def test_a_model_too_large_is_a_result(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self, *_: object) -> None:
        raise error

    monkeypatch.setattr(bench.Bench, "prefill", full)
    found = bench.measure(config())
    assert found["status"] == "out of memory"
    assert "time_ratio" not in found


def test_a_model_too_large_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run of a sweep needs its memory, so nothing of the error may hold on to it."""
    alive, seen = [], []

    def full(self, *_: object) -> None:
        alive.append(weakref.ref(self.model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.Bench, "prefill", full)
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

    monkeypatch.setattr(bench.Bench, "prefill", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        bench.measure(config())


# ------------------------------------------------------------------------------------- the command


def test_a_run_by_command(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_sweep_ends_in_one_table_and_skips_what_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: Counter[str] = Counter()
    original = bench.measure

    def counting(own):
        counts[own.measure] += 1
        return original(own)

    monkeypatch.setattr(bench, "measure", counting)
    sweep = ["bench", "-m", *TINY, "measure=prefill,decode", "batch_size=1,2",
             "hydra.sweep.dir=there"]  # fmt: skip
    assert cli.main(sweep) == 0
    rows = list(csv.DictReader(Path("there/bench.csv").read_text().splitlines()))
    assert [(row["measure"], row["batch_size"]) for row in rows] == [
        ("prefill", "1"),
        ("prefill", "2"),
        ("decode", "1"),
        ("decode", "2"),
    ]
    assert cli.main(sweep) == 0
    assert counts == {"prefill": 2, "decode": 2}


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
        (["ways=full_maps"], "ways: expected a list, got 'full_maps'. Set ways=[full_maps]"),
        (["ways=[dense_masks,dense_masks]"], "ways: expected each once"),
        (["ways=[dense_masks]", "attention=eager"], "ways: expected attention=sdpa"),
        (["ways=[dense_masks]", "measure=decode"], "ways: expected measure=prefill"),
        (["ways=[full_maps]"], "Set strategy=pyramiddrop strategy.source=previous."),
        (["shape=hub"], "shape.path: expected a value"),
        (["shape=hub", "shape.path=./nowhere"], "expected a folder, got './nowhere'"),
        (["shape=hidden_2048"], "shape: expected one of"),
        (["speed=1"], "speed: expected a key of the config"),
    ],
)
def test_bad_input_is_told_in_a_line(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["bench", "shape=tiny", *overrides], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "device: expected a CUDA device" in refused(["bench", "device=cuda"], capsys)


def test_help_names_the_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "shape: hidden_1024, hub, llava_1_5_7b, llava_next_7b, tiny" in printed
    assert "data:" not in printed


def test_the_gpu_experiment_runs_on_a_cpu_with_a_tiny_shape() -> None:
    """Every kind of run in it: prefill, decode, full and LoRA training, both kinds of logits."""
    pytest.importorskip("peft")
    folder = Path(__file__).parents[2] / "experiments" / "gpu"
    small = ["shape=tiny", "num_visual=48", "num_text=8", "rounds=1", "new_tokens=1"]
    command = ["bench", f"--config-dir={folder}", "experiment=gpu", *small, "resolution=336x336"]
    assert cli.main([*command, "device=cpu", "hydra.sweep.dir=there"]) == 0
    rows = list(csv.DictReader(Path("there/bench.csv").read_text().splitlines()))
    found = {(row["measure"], row["tuning"], row["logits"]) for row in rows}
    assert {measure for measure, _, _ in found} == set(bench.MEASURES)
    assert {
        ("train", "lora", "all"),
        ("train", "full", "all"),
        ("train", "lora", "supervised"),
    } <= found
    assert {row["batch_size"] for row in rows} == {"1", "8"}
    assert {row["way"] for row in rows} == {"", *ways.WAYS}
    assert {row["status"] for row in rows} == {"ok"}
