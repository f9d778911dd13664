"""What pruning saves, measured: prefill, decoding and training of a model with random weights.

Speed does not depend on the weights, so none are downloaded. Unpruned and pruned runs alternate in
one process (A B B A), after a warm-up, and are compared round by round: whatever else the machine
does hits both. The decoder is fed embeddings; the vision tower, which pruning leaves alone, is not
part of any figure.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from tokenprune import cost
from tokenprune.bench.check import check
from tokenprune.bench.load import Load
from tokenprune.bench.machine import choose_device, machine
from tokenprune.bench.memory import cache_bytes, is_out_of_memory
from tokenprune.bench.model import build_model, prepare_training
from tokenprune.bench.summary import summarise
from tokenprune.bench.table import RESULT, read
from tokenprune.bench.timing import interleave
from tokenprune.bench.variants import Bench
from tokenprune.runs import files, results
from tokenprune.runs.compose import AUTO, fit_pruning, plain
from tokenprune.runs.shapes import num_tokens, shape_config


def measure(config: DictConfig) -> dict[str, Any]:
    """Measures what a config asks for: columns of the table, and every round under `rounds_s`.

    A model that does not fit the device's memory is a result, `status` says so; its figures are
    missing.

    Args:
        config: As composed from configs/bench.yaml.
    """
    check(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = choose_device(config.device)
    cuda = device.type == "cuda"
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
        return told | {"status": "ok"} | _measure(config, load, getattr(torch, name), device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return told | {"status": "out of memory"}
    finally:
        gc.collect()  # the next run of a sweep needs the memory
        if cuda:
            torch.cuda.empty_cache()


def _measure(
    config: DictConfig, load: Load, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    model = build_model(shape_config(config), dtype, config.attention, device)
    weights = sum(weight.nbytes for weight in model.parameters())
    pruning = fit_pruning(config, model)
    assert pruning is not None, "checked before"
    logits = config.logits if config.measure == "train" else "all"
    graph = config.graph and config.measure == "prefill"
    bench = Bench(model, pruning, load, logits, list(config.ways), graph)
    optimizer = prepare_training(model, config) if config.measure == "train" else None
    variants = bench.variants(config.measure, optimizer)
    timing = interleave(bench, variants, config.rounds, config.warmup)
    bench.check_graphs(config.warmup + config.rounds)
    found = summarise(bench, config.measure, timing)
    found |= {"positions": pruning.positions, "weights_mb": weights / 1e6}
    if config.measure != "train":
        with bench.pruned():
            found["pruned_kv_mb"] = cache_bytes(bench.prefill()) / 1e6
        found["unpruned_kv_mb"] = cache_bytes(bench.prefill()) / 1e6
        if bench.shape.caches_alike:
            found["expected_kv_mb"] = bench.theory.cache_bytes() / 1e6
        for own in found.get("ways", []):
            with bench.pruned(own["way"]):
                own["pruned_kv_mb"] = cache_bytes(bench.prefill()) / 1e6
    return found


def run(config: DictConfig, folder: Path, names: Mapping[str, str], again: bool) -> dict[str, Any]:
    """Measures, and writes bench.json into the run's folder.

    Args:
        config: As composed from configs/bench.yaml.
        folder: The run's folder.
        names: What to call `shape`, `strategy` and `schedule`.
        again: Measures even where the folder holds the same run, complete.
    """
    resolved = plain(config)
    sizes = asdict(cost.DecoderShape.from_config(shape_config(config)))
    marks = results.fingerprint(resolved) | {"shape": json.dumps(sizes, sort_keys=True)}
    marks["machine"] = str(machine(choose_device(config.device))["machine"])
    changes = None if again else results.changes(folder, resolved, marks, RESULT)
    if changes == []:
        return read(folder)
    if changes:
        print(f"{folder.name}: again, {', '.join(changes)} changed", flush=True)
    found = dict(names) | measure(config)
    with files.together(folder, RESULT) as stage:
        results.write_text(stage / results.CONFIG, OmegaConf.to_yaml(OmegaConf.create(resolved)))
        results.write_versions(stage, marks)
        results.write_text(stage / RESULT, json.dumps(found, indent=2, ensure_ascii=False))
    return found
