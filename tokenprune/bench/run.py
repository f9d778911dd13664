"""What pruning saves, measured: prefill, decoding and training of a model with random weights.

Speed does not depend on the weights, so none are downloaded. Unpruned and pruned runs alternate in
one process (A B B A), after a warm-up, and are compared round by round: whatever else the machine
does hits both. The decoder is fed embeddings; the vision tower, which pruning leaves alone, is not
part of any figure.
"""

from __future__ import annotations

import copy
import csv
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import tokenprune as tp
from tokenprune import cost
from tokenprune.bench import ways
from tokenprune.runs import results
from tokenprune.runs.compose import AUTO, Pruning, build_pruning, fit_pruning, plain

MEASURES = ("prefill", "decode", "train")
TUNINGS = ("full", "lora")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULT, TABLE, PLOT = "bench.json", "bench.csv", "bench.png"
#: Columns of bench.csv: what ran, what came out (medians; low and high are quartiles), on what.
COLUMNS = (
    *("measure", "shape", "strategy", "schedule", "positions", "batch_size", "num_visual"),
    *("num_text", "avg_tokens", "tuning", "logits", "way", "status"),
    *("unpruned_ms", "unpruned_ms_low", "unpruned_ms_high"),
    *("pruned_ms", "pruned_ms_low", "pruned_ms_high"),
    *("time_ratio", "time_ratio_low", "time_ratio_high", "flops_ratio", "over_flops"),
    *("over_product", "over_product_low", "over_product_high"),
    *("pruning_ms", "pruning_share", "keys_ms", "pruning_over_keys"),
    *("unpruned_peak_mb", "pruned_peak_mb", "unpruned_kv_mb", "pruned_kv_mb", "expected_kv_mb"),
    *("weights_mb", "rounds", "dtype", "attention", "machine", "threads", "torch", "transformers"),
    "run",
)
#: What a row of another way of pruning leaves open.
PRODUCT_ONLY = ("pruning_ms", "pruning_share", "keys_ms", "pruning_over_keys", "expected_kv_mb")
#: CLIP ViT-L/14 at 336 pixels, the tile of LLaVA-1.5 and LLaVA-NeXT: 24 x 24 patches of 14 pixels.
TILE_PIXELS, TILE_TOKENS = 336, 576
#: LLaVA-1.5's script finetune_lora.sh; weights of all linear maps but the vocabulary's.
LORA: dict[str, Any] = {"r": 128, "lora_alpha": 256, "target_modules": "all-linear"}


# ------------------------------------------------------------------------------------ what is run


def llama_config(
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int,
) -> Any:
    """A LLaMA-like decoder's config."""
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=2**17,
        bos_token_id=None,
        eos_token_id=None,
    )


def checkpoint_config(path: str, revision: str | None = None) -> Any:
    """The config of a checkpoint, by Hub id or folder; its weights are not read.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoConfig

    from tokenprune.runs.models import load_config

    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        return load_config(path, revision=revision)
    try:  # a folder without weights will do
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"shape.path: expected a config that transformers reads, got {path!r}: "
            f"{str(error).splitlines()[0]} Check the folder."
        ) from error


def num_tokens(resolution: str) -> int:
    """Visual tokens that LLaVA makes of an image.

    One tile of 336 x 336 pixels as LLaVA-1.5; else so many tiles as cover the image and one of
    the whole, as LLaVA-NeXT (Liu et al., 2024): 2 880 for 672x672, and 5 184 for 672x1344, the five
    and nine patches of PyramidDrop's tables. Newline tokens and unpadding are left out there, too.

    Args:
        resolution: Width x height in pixels, such as `672x672`.

    Raises:
        ValueError: If it is not of that form.
    """
    sides = str(resolution).lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(
            f"resolution: expected width x height in pixels, got {resolution!r}. "
            "Write resolution=672x672, or set num_visual."
        )
    across, down = (-(-int(side) // TILE_PIXELS) for side in sides)
    tiles = across * down
    return TILE_TOKENS * (tiles if tiles == 1 else tiles + 1)


def build_model(config: Any, dtype: torch.dtype, attention: str, device: torch.device) -> Any:
    """A model with random weights: the decoder of the config where it stands alone, else all of it.

    Args:
        config: A Hugging Face config, of a decoder or of a vision-language model.
        dtype: Of the weights.
        attention: Attention implementation.
        device: Where the weights are made.

    Raises:
        ValueError: If transformers has no such model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text = config.get_text_config(decoder=True)
    options = {"dtype": dtype, "attn_implementation": attention}
    candidates = ((AutoModelForCausalLM, text), (AutoModelForImageTextToText, config))
    for family, own in candidates:
        builder: Any = family
        if type(own) in builder._model_mapping:
            with torch.device(device):
                return builder.from_config(own, **options).eval()
    raise ValueError(
        f"shape: expected a decoder or a vision-language model, got {type(config).__name__}. "
        "Choose shape=llava_1_5_7b, or another checkpoint."
    )


@dataclass(frozen=True)
class Load:
    """What the model is given.

    Attributes:
        num_visual: Visual tokens per row.
        num_text: Text tokens per row, half of them before the visual ones; of the others half have
            labels in training.
        batch_size: Rows.
        new_tokens: Tokens that decoding adds.
    """

    num_visual: int
    num_text: int
    batch_size: int
    new_tokens: int

    @property
    def length(self) -> int:
        return self.num_visual + self.num_text

    @property
    def visual_mask(self) -> Tensor:
        """Bool (B, T)."""
        mask = torch.zeros(self.batch_size, self.length, dtype=torch.bool)
        before = self.num_text // 2
        mask[:, before : before + self.num_visual] = True
        return mask

    @property
    def num_labels(self) -> int:
        """Labelled tokens per row: the answer, at the end."""
        return max(1, self.num_text // 4)


# ------------------------------------------------------------------------------- clock and memory


class Clock:
    """Marks moments: device events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start)
        return float(start.elapsed_time(end)) / 1e3


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Most memory that was allocated at a time while `work` ran, beyond what was before.

    From torch's allocator: on a GPU by its statistics, on a CPU by the profiler's record of every
    allocation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    # Its library tells of its start and end on standard error, past Python.
    with (
        _silent(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing that a library writes to the process's standard error; exceptions come through."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cache_bytes(cache: Any) -> int:
    """Memory behind the keys and values of a cache, every storage once."""
    storages = [
        tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# ------------------------------------------------------------------------------------ the variants


class Variant(NamedTuple):
    """One of the things compared.

    Attributes:
        context: Holds around `prepare` and `work`.
        prepare: Makes what `work` uses up; not timed.
        work: What is timed.
    """

    context: Callable[[], AbstractContextManager[Any]]
    prepare: Callable[[], Any]
    work: Callable[[Any], Any]


class Bench:
    """A model with random weights, and what can be measured on it.

    Args:
        model: From `build_model`.
        pruning: Strategy, schedule and positions.
        load: What the model is given.
        logits: Of which positions training makes logits, `all` or `supervised`.
        ways: Ways of published code to measure beside, of `ways.WAYS`.
    """

    def __init__(
        self,
        model: Any,
        pruning: Pruning,
        load: Load,
        logits: str = "all",
        ways: Sequence[str] = (),
    ) -> None:
        self.model, self.pruning, self.load, self.logits = model, pruning, load, logits
        self.ways = tuple(ways)
        self.decoder: Any = model.get_decoder()
        self.device: torch.device = self.decoder.embed_tokens.weight.device
        self.clock = Clock(self.device)
        #: Moments before and after what the engine's hooks do, of the latest pruned run.
        self.marks: list[Any] = []
        self.shape = cost.DecoderShape.from_config(model.config)
        weight = self.decoder.embed_tokens.weight
        rows, width = load.batch_size, weight.shape[1]
        self.embeds = torch.randn(rows, load.length, width, device=self.device, dtype=weight.dtype)
        self.embeds *= 0.02  # the scale of the embeddings
        self.labels = torch.full((rows, load.length), -100, device=self.device)
        vocabulary = self.shape.vocab_size
        self.labels[:, -load.num_labels :] = torch.randint(vocabulary, (rows, load.num_labels))

    # -- contexts --------------------------------------------------------------------------------

    @contextmanager
    def pruned(self, way: str | None = None, marked: bool = True) -> Iterator[tp.Trace]:
        """The model pruned; yields the trace.

        Args:
            way: How published code does it, one of `ways.WAYS`, in place of the product's way.
            marked: Whether `marks` gets a moment before and after each module's own hooks.
        """

        def mark(*_: Any) -> None:
            self.marks.append(self.clock.mark())

        modules: list[nn.Module] = [self.decoder, *self.decoder.layers] if marked else []
        handles = [module.register_forward_pre_hook(mark, prepend=True) for module in modules]
        own, strategy = self.pruning, self.pruning.strategy
        cuts = [stage.layer for stage in own.schedule.stages]
        rows: ways.Rows = {}
        if way in ways.SCORES:
            strategy = ways.FromRows(strategy, self.load.num_text // 2, rows)
        try:
            with tp.prune(
                self.model,
                strategy,
                own.schedule,
                own.positions,
                self.logits,
                self.load.visual_mask.to(self.device),
            ) as trace:
                handles += [module.register_forward_pre_hook(mark) for module in modules]
                with ways.WAYS[way](self.decoder.layers, cuts, rows) if way else nullcontext():
                    yield trace
        finally:
            for handle in handles:
                handle.remove()

    def hook_seconds(self) -> float:
        """Time in the engine's hooks before decoder and layers, in the latest pruned run.

        Scoring and selecting, and gathering what survives: all that pruning adds to the layers.
        """
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(self.clock.seconds(start, end) for start, end in pairs)

    # -- prefill, decoding, training -------------------------------------------------------------

    @torch.no_grad()
    def prefill(self) -> Any:
        """From embeddings to the logits of the first new token; the filled cache."""
        output = self.model(inputs_embeds=self.embeds, use_cache=True, logits_to_keep=1)
        return output.past_key_values

    @torch.no_grad()
    def decode(self, cache: Any) -> None:
        """Greedy decoding of `new_tokens` tokens."""
        ids = torch.zeros(self.load.batch_size, 1, dtype=torch.int64, device=self.device)
        for _ in range(self.load.new_tokens):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            ids = output.logits[:, -1:].argmax(-1)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Forward, backward and the optimiser's update."""
        output = self.model(inputs_embeds=self.embeds, labels=self.labels, use_cache=False)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def before_cuts(self) -> list[tuple[Any, Tensor]]:
        """Layer of each cut, and hidden states (B, T, D) as long as those before it."""
        lengths = self.lengths()
        found = []
        for stage in self.pruning.schedule.stages:
            before = lengths[stage.layer - 1] if stage.layer else self.load.num_visual
            hidden = self.embeds[:, : before + self.load.num_text].contiguous()
            found.append((self.decoder.layers[stage.layer], hidden))
        return found

    @torch.no_grad()
    def project_keys(self, before_cuts: list[tuple[Any, Tensor]]) -> None:
        """Key projections alone, of the tokens before each cut: the least that scoring needs."""
        for layer, hidden in before_cuts:
            layer.self_attn.k_proj(hidden)

    def variants(self, measure: str, optimizer: torch.optim.Optimizer | None) -> dict[str, Variant]:
        """What is compared: `unpruned`, `pruned` and, for strategies that score, `keys`.

        Decoding also has `marked`, which the time in the hooks is read from: a step is so short
        that two device events per layer would be seen in `pruned`. The ways follow by name.
        """
        contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "unpruned": nullcontext,
            "pruned": partial(self.pruned, marked=measure != "decode"),
        }
        contexts |= {way: partial(self.pruned, way) for way in self.ways}
        if measure == "decode":
            # Every round continues from a copy of the same cache, so that its context is the same.
            filled = {}
            for name, context in contexts.items():
                with context():
                    filled[name] = self.prefill()
            contexts["marked"], filled["marked"] = self.pruned, filled["pruned"]
            found = {
                name: Variant(context, partial(copy.deepcopy, filled[name]), self.decode)
                for name, context in contexts.items()
            }
        elif measure == "train":
            assert optimizer is not None
            found = {
                name: Variant(context, lambda: optimizer, self.step)
                for name, context in contexts.items()
            }
        else:
            found = {
                name: Variant(context, lambda: None, lambda _: self.prefill())
                for name, context in contexts.items()
            }
        attention: Any = getattr(self.decoder.layers[0], "self_attn", None)
        scores = any(r.source for r in self.pruning.strategy.attention_rows())
        if measure != "decode" and scores and hasattr(attention, "k_proj"):
            found["keys"] = Variant(nullcontext, self.before_cuts, self.project_keys)
        return found

    # -- theory ----------------------------------------------------------------------------------

    def lengths(self) -> list[int]:
        """Visual tokens that each layer of the pruned model processes."""
        return self.pruning.schedule.lengths(self.shape.num_layers, self.load.num_visual)

    def flops(self, measure: str, pruned: bool) -> float:
        """FLOPs of one row by the cost model, causal attention as half, without the scoring.

        Training: of the forward pass. The backward pass costs twice that in either variant; under
        LoRA less, without the weights' gradients, which makes the ratio about 1 % larger.

        Raises:
            ValueError: If the cost model does not know the model's layers.
        """
        lengths = self.lengths() if pruned else [self.load.num_visual] * self.shape.num_layers
        shape, num_text = self.shape, self.load.num_text
        if measure == "decode":
            return cost.decode_flops(shape, lengths, num_text)
        projected = 1
        if measure == "train":
            supervised = pruned and self.logits == "supervised"
            projected = self.load.num_labels if supervised else lengths[-1] + num_text
        terms = cost.exact(shape, lengths, num_text, num_logits=projected)
        return terms.layers + terms.vocabulary

    def expected_cache_bytes(self) -> int:
        """Bytes of the pruned cache after the prefill, by the cost model."""
        bytes_per_value = self.embeds.element_size()
        row = cost.kv_bytes(self.shape, self.lengths(), self.load.num_text, bytes_per_value)
        return row * self.load.batch_size


# ------------------------------------------------------------------------------------- one figure


class Timing(NamedTuple):
    """Seconds of every round and the peak memory of the warm-up, by variant; time in the hooks."""

    seconds: dict[str, list[float]]
    hooks: list[float]
    peaks: dict[str, int]


def interleave(bench: Bench, variants: Mapping[str, Variant], rounds: int, warmup: int) -> Timing:
    """Times the variants in turn, the order reversed every other round: A B B A A B.

    Args:
        bench: Whose clock and hooks are read.
        variants: By name.
        rounds: How often each is timed.
        warmup: How often each runs before, at least once; the last time its peak memory is read.
    """
    hooked = "marked" if "marked" in variants else "pruned"
    timing = Timing({name: [] for name in variants}, [], {})
    names = list(variants)
    for number in range(-warmup, rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            context, prepare, work = variants[name]
            with context():
                state = prepare()
                if number == -1:
                    timing.peaks[name] = peak_bytes(bench.device, partial(work, state))
                    del state
                    continue
                bench.marks.clear()
                bench.clock.wait()
                start = bench.clock.mark()
                work(state)
                end = bench.clock.mark()
                bench.clock.wait()
                del state  # a copy of a cache; the next one is made before this name is bound anew
            if number >= 0:
                timing.seconds[name].append(bench.clock.seconds(start, end))
                if name == hooked:
                    timing.hooks.append(bench.hook_seconds())
    bench.marks.clear()
    return timing


def figures(bench: Bench, measure: str, timing: Timing) -> dict[str, Any]:
    """Medians with quartiles, ratios round by round, and theory beside them."""
    # Decoding is told per token.
    scale = 1e3 / (bench.load.new_tokens if measure == "decode" else 1)
    unpruned, pruned = timing.seconds["unpruned"], timing.seconds["pruned"]
    ratios = [b / a for a, b in zip(unpruned, pruned, strict=True)]
    flops_ratio = None  # of layers that the cost model does not know
    if not bench.shape.unlike:
        flops_ratio = bench.flops(measure, True) / bench.flops(measure, False)
    lengths = bench.lengths()
    found: dict[str, Any] = {
        **_spread("unpruned_ms", [scale * value for value in unpruned]),
        **_spread("pruned_ms", [scale * value for value in pruned]),
        **_spread("time_ratio", ratios),
        "flops_ratio": flops_ratio,
        "over_flops": flops_ratio and statistics.median(ratios) / flops_ratio,
        "avg_tokens": sum(lengths) / len(lengths),
        "pruning_ms": scale * statistics.median(timing.hooks),
        "pruning_share": statistics.median(
            hooks / whole
            for hooks, whole in zip(timing.hooks, timing.seconds.get("marked", pruned), strict=True)
        ),
        "unpruned_peak_mb": timing.peaks["unpruned"] / 1e6,
        "pruned_peak_mb": timing.peaks["pruned"] / 1e6,
        "rounds_s": timing.seconds | {"hooks": timing.hooks},
    }
    if "keys" in timing.seconds:
        keys = timing.seconds["keys"]
        found["keys_ms"] = scale * statistics.median(keys)
        found["pruning_over_keys"] = statistics.median(
            hooks / alone for hooks, alone in zip(timing.hooks, keys, strict=True)
        )
    if bench.ways:
        found["ways"] = [_way_figures(way, timing, scale, flops_ratio) for way in bench.ways]
    return found


def _way_figures(
    way: str, timing: Timing, scale: float, flops_ratio: float | None
) -> dict[str, Any]:
    """A way's columns of its own: what is `pruned` there is the way."""
    own = timing.seconds[way]
    by_unpruned, by_product = (
        [b / a for a, b in zip(timing.seconds[name], own, strict=True)]
        for name in ("unpruned", "pruned")
    )
    return {
        "way": way,
        **_spread("pruned_ms", [scale * value for value in own]),
        **_spread("time_ratio", by_unpruned),
        **_spread("over_product", by_product),
        "over_flops": flops_ratio and statistics.median(by_unpruned) / flops_ratio,
        "pruned_peak_mb": timing.peaks[way] / 1e6,
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; the ends themselves where there are fewer than four."""
    ends = (min(values), max(values))
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        ends = (low, high)
    return {name: statistics.median(values), f"{name}_low": ends[0], f"{name}_high": ends[1]}


# -------------------------------------------------------------------------------- a run by config


def check(config: DictConfig) -> None:
    """What can be known of a run before its model is made.

    Raises:
        ValueError: If a value is out of range, or the schedule does not fit the shape.
        KeyError: If the strategy is unknown.
    """
    choices = {
        "measure": MEASURES,
        "tuning": TUNINGS,
        "logits": ("all", "supervised"),
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("auto", *DTYPES),
    }
    for key, allowed in choices.items():
        if config[key] not in allowed:
            raise ValueError(
                f"{key}: expected one of {list(allowed)}, got {config[key]!r}. "
                f"Set {key}={allowed[0]}."
            )
    counts = {"batch_size": 1, "num_text": 2, "new_tokens": 1, "rounds": 1, "warmup": 1}
    optional = {"num_visual": 1, "num_threads": 1}
    for key, lowest in (counts | optional).items():
        value = config[key]
        if value is None and key in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"{key}: expected an integer >= {lowest}, got {value!r}. Set {key}=8.")
    num_tokens(config.resolution)
    if config.tuning == "lora" and config.measure == "train" and find_spec("peft") is None:
        raise ValueError(
            "tuning: expected the package peft for tuning=lora, got none. Run pip install peft."
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, got none. Set device=cpu.")
    if config.strategy is None:
        raise ValueError(
            "strategy: expected one that prunes, to compare with the unpruned model, got none. "
            "Choose strategy=pyramiddrop."
        )
    if config.ways and config.measure != "prefill":
        raise ValueError(
            f"ways: expected measure=prefill, got measure={config.measure}. Set ways=[]."
        )
    shape = cost.DecoderShape.from_config(_shape_config(config))
    pruning = build_pruning(config, shape.num_layers)
    assert pruning is not None, "a strategy was asked for"
    ways.check(config.ways, pruning.strategy, config.attention)


def _shape_config(config: DictConfig) -> Any:
    from hydra.utils import instantiate

    return instantiate(config.shape)


def measure(config: DictConfig) -> dict[str, Any]:
    """Measures what a config asks for: columns of `COLUMNS`, and every round under `rounds_s`.

    A model that does not fit the device's memory is a result, `status` says so; its figures are
    missing.

    Args:
        config: As composed from configs/bench.yaml.
    """
    check(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    cuda = torch.cuda.is_available() and config.device != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    name = config.dtype if config.dtype != "auto" else "bfloat16" if cuda else "float32"
    told: dict[str, Any] = {
        "measure": config.measure,
        "positions": None if config.positions == AUTO else config.positions,
        "batch_size": config.batch_size,
        "num_visual": config.num_visual or num_tokens(config.resolution),
        "num_text": config.num_text,
        "tuning": config.tuning if config.measure == "train" else None,
        "logits": config.logits if config.measure == "train" else None,
        "rounds": config.rounds,
        "dtype": name,
        "attention": config.attention,
        **machine(device),
    }
    load = Load(told["num_visual"], config.num_text, config.batch_size, config.new_tokens)
    torch.manual_seed(config.seed)
    try:
        return told | {"status": "ok"} | _measure(config, load, DTYPES[name], device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return told | {"status": "out of memory"}
    finally:
        gc.collect()  # the next run of a sweep needs the memory
        if cuda:
            torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device was full: torch's allocator says so by type, libraries and CPUs by text."""
    texts = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
    full = isinstance(error, torch.OutOfMemoryError)
    return full or any(text in str(error) for text in texts)


def _measure(
    config: DictConfig, load: Load, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    model = build_model(_shape_config(config), dtype, config.attention, device)
    weights = sum(weight.nbytes for weight in model.parameters())
    pruning = fit_pruning(config, model)
    assert pruning is not None, "checked before"
    bench = Bench(model, pruning, load, config.logits, list(config.ways))
    optimizer = _tune(model, config) if config.measure == "train" else None
    variants = bench.variants(config.measure, optimizer)
    timing = interleave(bench, variants, config.rounds, config.warmup)
    found = figures(bench, config.measure, timing)
    found |= {"positions": pruning.positions, "weights_mb": weights / 1e6}
    if config.measure != "train":
        with bench.pruned():
            found["pruned_kv_mb"] = cache_bytes(bench.prefill()) / 1e6
        found["unpruned_kv_mb"] = cache_bytes(bench.prefill()) / 1e6
        if bench.shape.caches_alike:
            found["expected_kv_mb"] = bench.expected_cache_bytes() / 1e6
        for own in found.get("ways", []):
            with bench.pruned(own["way"]):
                own["pruned_kv_mb"] = cache_bytes(bench.prefill()) / 1e6
    return found


def _tune(model: Any, config: DictConfig) -> torch.optim.Optimizer:
    """The optimiser, with its state made; the model ready to train."""
    if config.tuning == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(**LORA), model)
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # PyTorch's fused update, on either device; a rate at which random weights stay finite.
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes its state, so that neither variant pays for that
    optimizer.zero_grad()
    return optimizer


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that is measured: name, threads, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc") else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }


def run(config: DictConfig, folder: Path, names: Mapping[str, str], again: bool) -> dict[str, Any]:
    """Measures, and writes bench.json into the run's folder.

    Args:
        config: As composed from configs/bench.yaml.
        folder: The run's folder.
        names: What to call `shape`, `strategy` and `schedule`.
        again: Measures even where the folder holds the same run, complete.
    """
    resolved = plain(config)
    marks = results.fingerprint(resolved) | {"shape": json.dumps(_facts(config), sort_keys=True)}
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    marks["machine"] = str(machine(device)["machine"])
    if not again and results.changes(folder, resolved, marks, RESULT) == []:
        return read(folder)
    found = dict(names) | measure(config)
    (folder / RESULT).unlink(missing_ok=True)
    results.write_text(folder / results.CONFIG, OmegaConf.to_yaml(OmegaConf.create(resolved)))
    results.write_versions(folder, marks)
    results.write_text(folder / RESULT, json.dumps(found, indent=2, ensure_ascii=False))
    return found


def _facts(config: DictConfig) -> dict[str, Any]:
    return asdict(cost.DecoderShape.from_config(_shape_config(config)))


def read(folder: Path) -> dict[str, Any]:
    """What a complete run measured."""
    found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


# ---------------------------------------------------------------------------- table and figure


def publish(folder: Path) -> list[dict[str, Any]]:
    """Writes bench.csv and bench.png of a run's or a sweep's folder; the rows."""
    paths = sorted(folder.glob(f"*/{RESULT}")) or [folder / RESULT]
    runs = [read(path.parent) | {"run": path.parent.name} for path in paths]
    rows = [row for run in runs for row in with_ways(run)]
    # A stable sort: the rows of a run stay together, its ways in their order.
    rows.sort(key=lambda row: [MEASURES.index(row["measure"]), str(row["shape"]), row["num_visual"],
                               row["batch_size"], row["run"]])  # fmt: skip
    draft = folder / f".{TABLE}.{os.getpid()}"
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows([{key: _rounded(value) for key, value in row.items()} for row in rows])
    os.replace(draft, folder / TABLE)
    plot([r for r in rows if r.get("flops_ratio") and not r.get("way")], folder / PLOT)
    return rows


def with_ways(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's row, and one for each way measured beside it."""
    row = {key: value for key, value in found.items() if key != "ways"}
    others = {key: value for key, value in row.items() if key not in PRODUCT_ONLY}
    return [row, *(others | own for own in found.get("ways", []))]


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Measured against theoretical speed-up, with the quartiles of the rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Okabe and Ito's hues, as in the report.
    looks = {"prefill": ("#0072b2", "o"), "decode": ("#009e73", "D"), "train": ("#d55e00", "s")}
    for name in [m for m in MEASURES if any(row["measure"] == m for row in rows)]:
        own = [row for row in rows if row["measure"] == name]
        theory = [1 / row["flops_ratio"] for row in own]
        measured = [1 / row["time_ratio"] for row in own]
        spread = [
            [abs(1 / row["time_ratio"] - 1 / row[f"time_ratio_{end}"]) for row in own]
            for end in ("high", "low")
        ]
        colour, marker = looks[name]
        axes.errorbar(theory, measured, spread, fmt=marker, color=colour, capsize=2, label=name)
    most = max([1.0, *(1 / min(row["flops_ratio"], row["time_ratio"]) for row in rows)])
    axes.plot([1, most], [1, most], color="#5f5e5a", linewidth=0.8, linestyle="--")
    axes.set_xlabel("speed-up by FLOPs")
    axes.set_ylabel("measured speed-up")
    machines = sorted({f"{row['machine']}, {row['dtype']}" for row in rows})
    axes.set_title("; ".join(machines), fontsize=9, loc="left")
    if rows:
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints what was measured as a table for people."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("measure", "shape", "strategy"):
        table.add_column(name)
    for name in ("tokens", "rows", "unpruned", "pruned", "time", "FLOPs", "pruning", "KV cache"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in [line for found in rows for line in with_ways(found)]:
        head = [row["measure"], row["shape"], row["strategy"]]
        head[2] += f" ({row['way']})" if row.get("way") else ""
        head += [f"{row['num_visual']}+{row['num_text']}", str(row["batch_size"])]
        if row["status"] != "ok":
            table.add_row(*map(escape, head), escape(row["status"]), *[""] * 5)
            continue
        kept = [row.get(key) for key in ("unpruned_kv_mb", "pruned_kv_mb")]
        table.add_row(
            *map(escape, head),
            f"{row['unpruned_ms']:.4g} ms",
            f"{row['pruned_ms']:.4g} ms",
            f"{100 * row['time_ratio']:.1f} %",
            f"{100 * row['flops_ratio']:.1f} %" if row["flops_ratio"] else "unknown",
            f"{100 * row['pruning_share']:.1f} %" if "pruning_share" in row else "",
            "" if None in kept else f"{kept[0]:.4g} -> {kept[1]:.4g} MB",
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=140).print(table)
