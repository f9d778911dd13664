"""Strategies by name: those of the package, of installed packages, and those registered since."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from tokenprune.imports import locate
from tokenprune.strategy.base import PruningStrategy

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_REGISTRY: dict[str, type[PruningStrategy]] = {}
#: Has the strategies that come with the package, each in the file of its name.
_SHIPPED = "tokenprune.strategies"
#: Entry points by which installed packages offer strategies: `norm = "my_package.norm:Norm"`.
ENTRY_POINTS = "tokenprune.strategies"
StrategyClass = TypeVar("StrategyClass", bound=type[PruningStrategy])


def register(name: str) -> Callable[[StrategyClass], StrategyClass]:
    """Class decorator: makes a strategy buildable by `name`, in Python and in configs.

    Raises:
        ValueError: If the name is taken or malformed, or the class is no frozen dataclass of a
            `PruningStrategy`.
    """

    def add(cls: StrategyClass) -> StrategyClass:
        if not name.isidentifier() or name != name.lower() or name == "none":
            raise ValueError(
                f"register: expected a lower-case identifier other than 'none', got {name!r}. "
                "The name is used in configs and file names."
            )
        own_file = getattr(cls, "__module__", "") == f"{_SHIPPED}.{name}"
        if name in _REGISTRY or (name in _shipped() and not own_file):
            raise ValueError(
                f"register: expected a new name, got {name!r}, which is "
                f"{strategy_class(name).__qualname__}. Choose another name."
            )
        candidate: Any = cls  # what users decorate is not always what the annotation asks for
        if not (isinstance(candidate, type) and issubclass(candidate, PruningStrategy)):
            raise ValueError(
                f"register: expected a subclass of PruningStrategy, got {cls!r}. "
                "Subclass ScoreStrategy, or PruningStrategy for a joint choice."
            )
        parameters: Any = getattr(cls, "__dataclass_params__", None)
        if "__dataclass_params__" not in vars(cls) or not parameters.frozen:
            raise ValueError(
                f"register: expected a frozen dataclass, got {cls.__qualname__}. "
                "Put @dataclass(frozen=True) below @register."
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def available() -> list[str]:
    """Names of all strategies, sorted: of the package, of installed ones, and registered since.

    Installed packages offer them by entry points of the group `tokenprune.strategies`; none is
    imported before it is built.
    """
    return sorted({*_shipped(), *_REGISTRY, *_offered()})


def strategy_class(name: str) -> type[PruningStrategy]:
    """The class of that name; one of a package is loaded when it is first asked for.

    Raises:
        KeyError: If there is none; names the choices and the nearest.
        ValueError: If a file of the package registers no strategy of its name, or an installed
            package cannot give the one that it offers.
    """
    if name not in _REGISTRY:
        if name in _shipped():
            _load_shipped(name)
        elif name in (offered := _offered()):
            _load_offered(name, offered[name])
        else:
            raise unknown_name("strategy", name, available())
    return _REGISTRY[name]


def _shipped() -> list[str]:
    names: list[str] = importlib.import_module(_SHIPPED).names()
    return names


def _load_shipped(name: str) -> None:
    importlib.import_module(f"{_SHIPPED}.{name}")
    if name not in _REGISTRY:
        raise ValueError(
            f"strategies/{name}.py: expected @register({name!r}), got no strategy of that "
            "name. Name a file as its strategy."
        )


def _offered() -> dict[str, list[EntryPoint]]:
    """What installed packages offer, by name; nothing of theirs is imported."""
    from importlib import metadata  # takes a moment, and most commands ask for no strategy

    found: dict[str, list[EntryPoint]] = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if all(entry.value != other.value for other in found.setdefault(entry.name, [])):
            found[entry.name].append(entry)
    return found


def _load_offered(name: str, entries: list[EntryPoint]) -> None:
    """Registers what a package offers, unless that does so itself when it is imported."""
    packages = [entry.dist.name if entry.dist else entry.module for entry in entries]
    if len(entries) > 1:
        raise ValueError(
            f"strategy {name!r}: expected one package that offers it, got {packages}. "
            "Uninstall all others."
        )
    (entry,), (package,) = entries, packages
    broken = f"strategy {name!r}: expected the package {package!r} to give it, got {entry.value!r}"
    try:
        found = locate(".".join(filter(None, (entry.module, entry.attr))))
    except ImportError as error:
        raise ValueError(f"{broken}: {error}. Repair or uninstall it.") from error
    if name not in _REGISTRY:
        try:
            register(name)(found)
        except ValueError as error:
            raise ValueError(f"{broken}: {error}") from error


def build_strategy(name: str, **fields: Any) -> PruningStrategy:
    """Builds a registered strategy; keyword arguments are the strategy's own fields.

    Raises:
        KeyError: If the name is unknown.
        ValueError: If a field is unknown or its value is refused by the strategy.
    """
    cls = strategy_class(name)
    own: Iterable[dataclasses.Field[Any]] = (
        dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    )
    known = [field.name for field in own if field.init]
    for key in fields:
        if key not in known:
            raise ValueError(
                f"build_strategy({name!r}): expected fields among {known}, got {key!r}. "
                "See the strategy's docstring."
            )
    strategy = cls(**fields)
    strategy.needs()  # refuses here, not at the first call, what it could not ask for
    return strategy


def unknown_name(what: str, name: object, choices: list[str]) -> KeyError:
    """The error for a name that is not among `choices`: lists them and names the nearest."""
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return KeyError(f"{what}: expected one of {choices}, got {name!r}.{hint}")
