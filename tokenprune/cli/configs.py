"""Composes the config of a command from overrides; a mistake in them is told in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenprune.cli.guide import GROUPS, OWN_GROUPS, choice_files
from tokenprune.cli.loader import filled, split
from tokenprune.cli.mistakes import BadInput, one_line, unknown
from tokenprune.runs.compose import config_dir, describe
from tokenprune.strategy import available


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
    overrides = _with_folders(overrides, extra_dir)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3", job_name=command):
        try:
            config = hydra_compose(command, overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise BadInput(_translate(command, overrides, error)) from error
        except UnicodeDecodeError:
            for place in folders(overrides, extra_dir)[1:]:
                for path in sorted((*place.glob("*.yaml"), *place.glob("*/*.yaml"))):
                    describe(path)  # says which it is
            raise
    _check_files(config, folders(overrides, extra_dir))
    if not hydra:
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        OmegaConf.set_struct(config, True)
    return config


def _check_files(config: DictConfig, places: Sequence[Path]) -> None:
    """Refuses a choice whose file holds values without keys; strategies may be listed, as mappings.

    Raises:
        BadInput: There is one.
    """
    for group, choice in config.hydra.runtime.choices.items():
        node: Any = config.get(group) if "/" not in str(group) else None
        if not OmegaConf.is_list(node):
            continue
        paths = [place / group / f"{choice}.yaml" for place in places]
        path = next((own for own in paths if own.is_file()), None)
        mappings = [OmegaConf.is_dict(own) for own in node]
        if path is not None and not (group == "strategy" and mappings and all(mappings)):
            raise BadInput(
                f"{path}: expected keys with their values, got a list. Write key: value."
            )


def compose_all(
    command: str, jobs: Iterable[Sequence[str]], extra_dir: str | None = None
) -> Iterator[DictConfig]:
    """The configs of a sweep's runs; arguments as for `compose`.

    Runs that make the same choices have one composition, which takes 0.1 s, and their values set in
    copies of it, which take a hundredth of that.
    """
    made: dict[tuple[Any, ...], DictConfig] = {}
    for job in jobs:
        _parse(job)  # a mistake is told
        chosen, values = split(job)
        make = partial(compose, command, chosen, extra_dir)
        yield filled(made, tuple(chosen), make, values) or compose(command, job, extra_dir)


def composed_files(
    command: str, overrides: Sequence[str], extra_dir: str | None = None
) -> list[tuple[Path, str]]:
    """The files that a config is composed of, later ones winning, each with its place in it.

    Args:
        command: As for `compose`, which takes the same arguments without complaint.
        overrides: As there.
        extra_dir: As there.
    """
    overrides, places = _with_folders(overrides, extra_dir), folders(overrides, extra_dir)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3", job_name=command):
        loader = GlobalHydra.instance().config_loader()
        parts = loader.compute_defaults_list(command, overrides, RunMode.RUN).defaults
    found = [
        (place / f"{part.config_path}.yaml", part.package or "")
        for part in parts
        for place in places
    ]
    return [(path, package) for path, package in found if path.is_file()]


def _with_folders(overrides: Sequence[str], extra_dir: str | None) -> list[str]:
    """Overrides that name `--config-dir` as well; folders that are none are refused."""
    folders(overrides, extra_dir)
    if extra_dir is None:
        return list(overrides)
    others = [item for item in overrides if not item.startswith("hydra.searchpath=")]
    paths = [
        str(Path(path).resolve()) if key.startswith("--") else path
        for key, path in _search_path(overrides, extra_dir)
    ]
    quoted = ["'" + path.replace("'", "\\'") + "'" for path in paths]
    return [*others, f"hydra.searchpath=[{','.join(quoted)}]"]


def choices(group: str, overrides: Sequence[str], extra_dir: str | None = None) -> list[str]:
    """Names of all configs of a group; arguments as for `folders`."""
    places = folders(overrides, extra_dir)
    return sorted(path.stem for place in places for path in (place / group).glob("*.yaml"))


def folders(overrides: Sequence[str], extra_dir: str | None = None) -> list[Path]:
    """Where configs are: our own folder, `--config-dir`, and those of `hydra.searchpath`.

    Raises:
        BadInput: One of them is none, or has a file named as one of tokenprune, which Hydra would
            read instead, silently.
    """
    found = [config_dir()]
    for key, path in _search_path(overrides, extra_dir):
        folder = _folder(path)
        if folder is None:
            raise BadInput(f"{key}: expected a folder, got {path!r}. Check the path.")
        for own in sorted(config_dir().rglob("*.yaml")):
            name = own.relative_to(config_dir())
            if (folder / name).exists() and folder != config_dir():
                raise BadInput(
                    f"{key}: expected names of their own, got {name}, which tokenprune has "
                    "as well. Rename yours."
                )
        found.append(folder)
    return found


def _search_path(overrides: Sequence[str], extra_dir: str | None) -> list[tuple[str, str]]:
    """Further places of configs, each with the key that names it."""
    found = [] if extra_dir is None else [("--config-dir", extra_dir)]
    given = [item for item in overrides if item.startswith("hydra.searchpath=")]
    for override in _parse(given):
        value = override.value()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadInput(
                f"hydra.searchpath: expected a list of folders, got {override.input_line!r}. "
                "Write hydra.searchpath=[file:///my/configs]."
            )
        found += [("hydra.searchpath", item) for item in value]
    return found


def _folder(path: str) -> Path | None:
    """The folder of an entry of Hydra's search path: file://..., pkg://... or a plain path."""
    kind, _, rest = path.rpartition("://")
    if kind == "pkg":
        try:
            rest = str(resources.files(rest.strip("/").replace("/", ".")))
        except (ImportError, TypeError):
            return None
    elif kind not in ("", "file"):
        return None
    return Path(rest) if Path(rest).is_dir() else None


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise BadInput(_translate("", overrides, error)) from error
    return parsed


def single(overrides: Sequence[str]) -> list[str]:
    """The overrides without those that sweep."""
    return [
        item
        for item, override in zip(overrides, _parse(overrides), strict=True)
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
        if group[1] == "strategy" and group[2] in available():
            return (
                f"strategy: expected strategy/{group[2]}.yaml, got none for {group[2]!r}, which is "
                "registered. Write one (docs/add_a_strategy.md), and add --config-dir."
            )
        plugins = " Others come with Hydra's plugins, such as hydra-optuna-sweeper."
        hint = plugins if group[1].startswith("hydra/") else ""
        return unknown(group[1], group[2], choices) + hint
    key = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text)
    if key or "No match in the defaults list" in text:
        name = (key[1] or key[2]) if key else text.split("'")[1]
        given = next((o for o in overrides if o.lstrip("+~").split("=")[0] == name), "")
        if not given:  # a file's own mistake
            return f"config: {one_line(text)}"
        owners = _owners(name, overrides)
        known = [] if owners else _known_keys(command, [o for o in overrides if o != given])
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if owners:
            hint = f" Choices that have it: {', '.join(owners)}."
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


def _owners(key: str, overrides: Sequence[str]) -> list[str]:
    """The choices of a key's group that have that key, as `schedule=pyramid`."""
    group, _, rest = key.partition(".")
    found = []
    for path in choice_files(group, folders(overrides)) if rest else []:
        config: Any = OmegaConf.load(path)
        if "@package _global_" in path.read_text(encoding="utf-8"):
            config = config.get(group)
        if OmegaConf.is_dict(config) and rest in config:
            found.append(f"{group}={path.stem}")
    return found


def _known_keys(command: str, overrides: Sequence[str]) -> list[str]:
    """Keys and groups that an override can name."""
    try:
        config = compose(command or "eval", overrides)
    except BadInput:
        config = compose(command or "eval", [])
    keys = list(OWN_GROUPS.get(command, GROUPS))

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            keys.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                walk(child, f"{prefix}{key}.")

    walk(config, "")
    return keys
