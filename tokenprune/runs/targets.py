"""From `_target_` to object: what a config names is imported and called.

A name that cannot be imported, and arguments that it does not take, are told in a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tokenprune.imports import load_module, locate, reason

#: Packages whose names are looked up when they are used, not before: they take seconds to load.
_SLOW = ("tokenprune", "pytorch_lightning", "torch", "transformers")
_OWN = Path(__file__).parents[1]


def load_imports(config: Mapping[str, Any] | DictConfig) -> None:
    """Imports the modules under a config's key `imports`, which may register what it names.

    Raises:
        ValueError: If it is no list of modules, or one of them cannot be imported.
    """
    given = config.get("imports")
    names = [] if given is None else given
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"imports: expected a list of modules, got {given!r}. Write imports=[my_package.mine]."
        )
    for name in names:
        try:
            load_module(name)
        except ImportError as error:
            raise ValueError(
                f"imports: expected modules that can be imported, got {name!r}: {error}. {_HINT}"
            ) from error


_HINT = "Repair it, install its package, or put its folder on PYTHONPATH."


def check(config: Any, key: str = "") -> None:
    """Refuses what cannot be imported, except of packages that take seconds to load.

    Args:
        config: Any part of a config.
        key: Its place in the whole.

    Raises:
        ValueError: Names the key, the module, and what was wrong in the first place.
    """
    for place, path in _targets(config, key):
        if path.partition(".")[0] not in _SLOW:
            _locate(place, path)


def build(config: Any, key: str, kind: type | None = None, **arguments: Any) -> Any:
    """What a config's `_target_` makes of the config.

    Args:
        config: Has a `_target_`; what is inside it may have its own.
        key: Its place in the whole config.
        kind: What is expected to come back; None takes anything.
        arguments: Further ones, as Hydra's `instantiate` takes them.

    Raises:
        ValueError: If it cannot be imported or called so, or another kind of thing comes back.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    for place, path in _targets(config, key):
        _locate(place, path)
    try:
        built = instantiate(config, **arguments)
    except InstantiationException as error:
        message = _explain(error, key, set(arguments))
        if message is None:
            raise
        raise ValueError(message) from error
    if kind is not None and not isinstance(built, kind):
        raise ValueError(
            f"{key}: expected a {kind.__name__}, got {built!r}. Let {key}._target_ name one."
        )
    return built


def _targets(config: Any, key: str) -> Iterator[tuple[str, str]]:
    """Each `_target_` with its place; those that refer to others are found where these are."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, Mapping):
        for name, value in config.items():
            place = f"{key}.{name}".lstrip(".")
            if name != "_target_":
                yield from _targets(value, place)
            elif isinstance(value, str) and "${" not in value:
                yield place, value
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for number, value in enumerate(config):
            yield from _targets(value, f"{key}.{number}")


def _locate(place: str, path: str) -> None:
    try:
        found = locate(path)
    except ImportError as error:
        raise ValueError(
            f"{place}: expected a class or function that can be imported, got {path!r}: {error}. "
            f"{_HINT}"
        ) from error
    if not callable(found):
        raise ValueError(
            f"{place}: expected a class or function, got {path!r}, a {type(found).__name__}. "
            "Name what is in it."
        )


def _explain(error: Exception, key: str, given: Set[str]) -> str | None:
    """What does not fit a target that was called; None for what was raised by our own code.

    Args:
        error: What Hydra raised.
        key: Where the target stands.
        given: Arguments that no config has.
    """
    cause = error.__cause__
    if nested := re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE):
        key = nested[1]
    if cause is None:
        return None
    frames = list(_frames(cause.__traceback__))
    calls = [i for i, frame in enumerate(frames) if frame.tb_frame.f_code.co_name == "_call_target"]
    if not calls:
        return None
    inside = frames[calls[-1] + 1 :]
    files = [Path(frame.tb_frame.f_code.co_filename) for frame in inside]
    if isinstance(cause, ImportError):
        target = re.search(r"call to target '\S*?(\w+)'", str(error))
        return (
            f"{key}: expected the package that {target[1] if target else 'it'} needs, got "
            f"{reason(cause)}. Install it, or choose another {key}."
        )
    if not inside and isinstance(cause, TypeError):
        surplus = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
        remedy = f"Remove it: ~{key}.{surplus[1]}." if surplus else "See its signature."
        if surplus and surplus[1] in given:
            remedy = f"It is always passed: let the target take {surplus[1]}."
        return f"{key}: expected keys that its target knows, got {cause}. {remedy}"
    if isinstance(cause, ValueError) and not any(file.is_relative_to(_OWN) for file in files):
        return f"{key}: expected values that its target takes, got {reason(cause)}."
    return None


def _frames(frames: TracebackType | None) -> Iterator[TracebackType]:
    while frames is not None:
        yield frames
        frames = frames.tb_next
