"""Composes the config of a command from overrides; a mistake in them is told in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenprune.cli.guide import BENCH_GROUPS, GROUPS
from tokenprune.cli.mistakes import BadInput, one_line, unknown
from tokenprune.runs.compose import config_dir


def compose(
    command: str, overrides: Sequence[str], extra_dir: str | None = None, hydra: bool = False
) -> DictConfig:
    """Composes a config; mistakes become `BadInput`.

    Args:
        command: Name of the primary config, `eval` or `train`.
        overrides: As on the command line.
        extra_dir: A folder with further configs (`--config-dir`).
        hydra: Keeps the `hydra` node.
    """
    overrides = list(overrides)
    if extra_dir is not None:
        if not Path(extra_dir).is_dir():
            raise BadInput(f"--config-dir: expected a folder, got {extra_dir!r}. Check the path.")
        overrides.append(f"hydra.searchpath=[file://{Path(extra_dir).resolve()}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3", job_name=command):
        try:
            config = hydra_compose(command, overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise BadInput(_translate(command, overrides, error)) from error
    if not hydra:
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        OmegaConf.set_struct(config, True)
    return config


def check_folder(extra_dir: str) -> None:
    """Refuses a user's configs named as those of tokenprune: Hydra would read these, silently."""
    for path in sorted(Path(extra_dir).rglob("*.yaml")):
        own = path.relative_to(extra_dir)
        if (config_dir() / own).exists():
            raise BadInput(
                f"--config-dir: expected names of their own, got {own}, which tokenprune has "
                "as well. Rename yours."
            )


def single(overrides: Sequence[str]) -> list[str]:
    """The overrides without those that sweep."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise BadInput(_translate("", overrides, error)) from error
    return [
        item
        for item, override in zip(overrides, parsed, strict=True)
        if not override.is_sweep_override()
    ]


def reject_sweep_values(overrides: Sequence[str]) -> None:
    """Refuses overrides that sweep."""
    swept = sorted(set(overrides) - set(single(overrides)))
    if swept:
        raise BadInput(
            f"{swept[0].split('=')[0]}: expected one value, got {swept[0].split('=', 1)[1]!r}. "
            "Add -m to run them all."
        )


def missing(config: DictConfig, prefix: str = "") -> list[str]:
    """Keys that wait for a value; unlike OmegaConf's, resolves nothing, for no run exists yet."""
    keys = []
    for key in map(str, config):
        if OmegaConf.is_missing(config, key):
            keys.append(f"{prefix}{key}")
        elif not OmegaConf.is_interpolation(config, key) and OmegaConf.is_dict(config[key]):
            keys += missing(config[key], f"{prefix}{key}.")
    return keys


def _translate(command: str, overrides: Sequence[str], error: Exception) -> str:
    """Hydra's several lines in one of ours."""
    text = str(error)
    group = re.search(r"Could not find '([\w./-]+?)/([^/']+)'", text)
    if group:
        folder = config_dir() / group[1]
        choices = sorted(path.stem for path in folder.glob("*.yaml"))
        choices = re.findall(r"^\t(\S+)$", text, re.MULTILINE) or choices
        return unknown(group[1], group[2], choices)
    key = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text)
    if key or "No match in the defaults list" in text:
        name = (key[1] or key[2]) if key else text.split("'")[1]
        given = next((o for o in overrides if o.lstrip("+~").split("=")[0] == name), f"{name}=")
        known = _known_keys(command, [o for o in overrides if o != given])
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{name}: expected a key of the config, got {given!r}.{hint}"
    if "Ambiguous value" in text:
        given = text.split("'")[1]
        return (
            f"{given.split('=')[0]}: expected one value, got {given.split('=', 1)[-1]!r}. "
            "Add -m to run them all."
        )
    broken = [o for o in overrides if "=" not in o and not o.startswith("~")]
    if broken:
        return f"override: expected key=value, got {broken[0]!r}. See tokenprune --help."
    return f"config: {one_line(text.splitlines()[0])}"


def _known_keys(command: str, overrides: Sequence[str]) -> list[str]:
    """Keys and groups that an override can name."""
    try:
        config = compose(command or "eval", overrides)
    except BadInput:
        config = compose(command or "eval", [])
    keys = list(BENCH_GROUPS if command == "bench" else GROUPS)

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            keys.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                walk(child, f"{prefix}{key}.")

    walk(config, "")
    return keys
