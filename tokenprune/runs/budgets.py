"""Budgets in configs: which model, sample, target and family of schedules a config means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenprune import cost
from tokenprune.cost.figures import Workload
from tokenprune.cost.solver import (
    TARGETS,
    Dial,
    Places,
    Solution,
    one_shot,
    one_shot_layer,
    pyramid,
    pyramid_layers,
    solve,
)
from tokenprune.runs.models import SHIPPED, load_config
from tokenprune.runs.shapes import decoder_shape, num_tokens
from tokenprune.schedule import Schedule
from tokenprune.strategy import PruningStrategy

#: Entries of a config that `read_sizes` and `workload` read.
SIZES = ("model", "shape", "resolution", "num_visual", "num_text")


def known_model(path: str) -> tuple[cost.DecoderShape, int | None] | None:
    """As `read_model`, for a model whose sizes are at hand without transformers; else None.

    Those are the published ones of `cost.PRESETS`, at any revision, and the shipped ones.
    """
    known = [p for name, p in cost.PRESETS.items() if path == name or path in p.hub_ids]
    if known and not Path(path).is_dir():
        return known[0].shape, known[0].num_visual
    if path in SHIPPED:
        text = (SHIPPED[path] / "config.json").read_text(encoding="utf-8")
        config = json.loads(text, object_hook=lambda entries: SimpleNamespace(**entries))
        return cost.DecoderShape.from_config(config.text_config), cost.visual_tokens(config)
    return None


def read_model(
    path: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[cost.DecoderShape, int | None]:
    """Shape of a model's decoder and visual tokens of one image; no weights are needed.

    Args:
        path: A name of `cost.PRESETS` or its Hub id, a name of `SHIPPED`, a folder with a
            config.json, or any other Hub id, whose config is fetched.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Runs code that comes with the config.

    Raises:
        ValueError: If there is no such config.
    """
    known = known_model(path)
    if known is not None:
        return known
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever transformers makes of a broken file
            raise ValueError(
                f"model.path: expected a readable config.json, got {path!r}: "
                f"{str(error).splitlines()[0]}. Save it again."
            ) from error
    else:
        config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    return cost.DecoderShape.from_config(config), cost.visual_tokens(config)


def read_sizes(config: Mapping[str, Any]) -> tuple[cost.DecoderShape, int | None]:
    """The decoder that a config names by `shape` or by `model`, and its visual tokens of a sample.

    Args:
        config: Has `shape`, as configs/bench.yaml, or `model`, as configs/eval.yaml.

    Raises:
        ValueError: If there is none, or its sizes cannot be read.
    """
    if config.get("shape") is not None:
        asked = config.get("num_visual")
        return decoder_shape(config), num_tokens(config["resolution"]) if asked is None else asked
    model = config["model"]
    if model.get("path") is None:
        raise ValueError(
            "budget: expected a model with a path, whose config says its sizes, got one without. "
            "Use model=hub, or set the schedule by hand."
        )
    return read_model(
        model["path"], model.get("revision"), bool(model.get("trust_remote_code", False))
    )


def workload(config: Mapping[str, Any], strategy: PruningStrategy | None) -> Workload:
    """The sample that a config's budget is about.

    Args:
        config: As for `read_sizes`, with `budget` as configs/budget/default.yaml has it.
        strategy: Whose scoring counts, or None.

    Raises:
        ValueError: If the number of visual tokens is neither given nor known.
    """
    budget = config["budget"]
    shape, num_visual = read_sizes(config)
    num_visual = num_visual if budget.get("num_visual") is None else budget["num_visual"]
    if num_visual is None:
        raise ValueError(
            f"budget.num_visual: expected the visual tokens of a sample, which "
            f"{config['model']['path']!r} leaves to the image, got none. "
            "Set budget.num_visual=1280."
        )
    return Workload(
        shape,
        num_visual,
        num_text=budget.get("num_text") or config.get("num_text") or 0,
        dtype=budget.get("dtype", "float16"),
        strategy=strategy,
    )


def solve_config(
    config: Mapping[str, Any],
    shape: str,
    options: Mapping[str, Any],
    num_layers: int,
    strategy: PruningStrategy | None,
    chosen: str | None = None,
) -> Solution:
    """Solves a config's budget for what its schedule leaves open.

    Args:
        config: As for `workload`, with a target.
        shape: Name of the `tokenprune.Schedule` constructor that the config's schedule calls.
        options: Its keyword arguments.
        num_layers: Decoder layers of the model.
        strategy: Whose scoring counts, or None.
        chosen: What the config's schedule is called, where that is known.

    Raises:
        ValueError: If it cannot be solved; says why, and what is possible.
        KeyError: If a name is unknown.
    """
    budget = config["budget"]
    target = asked(budget)
    assert target is not None
    return solve(
        workload(config, strategy),
        family(shape, options, num_layers, budget, chosen),
        *target,
        convention=budget.get("convention", "pyramiddrop"),
    )


def asked(budget: Mapping[str, Any] | None) -> tuple[str, float] | None:
    """A config's target and its value; None without one.

    Raises:
        ValueError: If there are two.
    """
    given = {t: budget[t] for t in TARGETS if budget is not None and budget.get(t) is not None}
    if len(given) > 1:
        raise ValueError(
            f"budget: expected one target, got {list(given)}. One of them decides the others."
        )
    return next(iter(given.items()), None)


def family(
    shape: str,
    options: Mapping[str, Any],
    num_layers: int,
    budget: Mapping[str, Any],
    chosen: str | None = None,
) -> Dial | Places:
    """What a config leaves open.

    Args:
        shape: Name of the `tokenprune.Schedule` constructor that the config's schedule calls.
        options: Its keyword arguments.
        num_layers: Decoder layers of the model.
        budget: As configs/budget/default.yaml has it.
        chosen: What the config's schedule is called, where that is known.

    Raises:
        ValueError: If there is nothing to solve for.
    """
    opens = {"pyramid": ("lam", "layers"), "one_shot": ("keep", "layer")}
    if shape not in opens:
        named = "one that" if chosen is None else f"schedule={chosen}, which"
        raise ValueError(
            "budget: expected a schedule that leaves something open, got "
            f"{named} names every cut itself. "
            "Choose schedule=pyramid, or schedule=one_shot or another of one cut."
        )
    wanted = opens[shape][0] if budget.get("solve") is None else budget["solve"]
    if wanted not in opens[shape]:
        raise ValueError(
            f"budget.solve: expected one of {list(opens[shape])} for schedule={shape}, got "
            f"{wanted!r}. Leave it out to solve for {opens[shape][0]}."
        )
    first = budget.get("first_layer", 1)
    if wanted in ("layers", "layer") and (
        isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < num_layers
    ):
        raise ValueError(
            f"budget.first_layer: expected an integer from 0 to {num_layers - 1}, got {first!r}. "
            "Cuts come at this layer or later."
        )
    if shape == "one_shot":
        rounding = options.get("rounding", "nearest")
        if wanted == "keep":
            Schedule.one_shot(options["layer"], 1.0).check_depth(num_layers)
            return one_shot(options["layer"], rounding)
        return one_shot_layer(num_layers, options["keep"], rounding, first)
    start = Schedule.pyramid(**{**options, "num_layers": num_layers})
    rounding = options.get("rounding", "floor")
    layers = [stage.layer for stage in start.stages]
    if wanted == "lam":
        return pyramid(layers, rounding)
    return pyramid_layers(num_layers, len(layers) + 1, options.get("lam", 0.5), rounding, first)
