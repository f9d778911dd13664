"""Strategies that installed packages offer by entry points."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from own import BROKEN, NORM, REGISTERED, importable, offer, write
from processes import run

import tokenprune as tp
from tokenprune.cli import main as cli
from tokenprune.strategy import strategy_class


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of installed packages: one whose module is `own_norm`."""
    importable(tmp_path, monkeypatch)
    return write(tmp_path, {"own_norm.py": NORM})


def listed(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["list"]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("code", [NORM, REGISTERED], ids=["plain", "that registers itself"])
def test_a_package_s_strategy_has_its_name(
    code: str, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(packages, {"own_norm.py": code})
    offer(packages, "own_norm = own_norm:Norm")
    assert "own_norm" in tp.available()
    assert tp.build_strategy("fastv").name == "fastv"
    with pytest.raises(KeyError, match="Did you mean 'own_norm'"):
        tp.build_strategy("own_nrm")
    assert "own_norm" not in sys.modules  # nobody has asked for it
    built = tp.build_strategy("own_norm", power=3.0)
    assert (type(built), built.name, built.power) == (strategy_class("own_norm"), "own_norm", 3.0)
    assert "own_norm (no YAML file) Keeps the tokens with the largest hidden" in listed(capsys)


def test_a_module_that_registers_it_is_an_entry_as_well(packages: Path) -> None:
    write(packages, {"own_norm.py": REGISTERED})
    offer(packages, "own_norm = own_norm")
    assert tp.build_strategy("own_norm").power == 2.0


@pytest.mark.parametrize("kind", BROKEN)
def test_i2_a_broken_package_breaks_no_other(
    kind: str, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, cause = BROKEN[kind]
    write(packages, files)
    offer(packages, "own_broken = own_broken:Norm", "broken-package")
    offer(packages, "own_norm = own_norm:Norm")
    with pytest.raises(ValueError, match=r"^strategy 'own_broken': expected the package") as caught:
        tp.build_strategy("own_broken")
    message = str(caught.value)
    assert "'broken-package' to give it, got 'own_broken:Norm': " in message
    assert cause in message
    assert "\n" not in message
    assert tp.build_strategy("own_norm").power == 2.0
    found = listed(capsys)
    assert "own_broken (no YAML file) (cannot be loaded: ValueError: strategy 'own_broken'" in found
    assert "own_norm (no YAML file) Keeps the tokens" in found
    assert "arXiv 2410.17247" in found


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("own_x = own_norm:ScoreStrategy.score", "expected a subclass of PruningStrategy, got"),
        ("own_x = own_norm:ScoreStrategy", "expected a frozen dataclass, got ScoreStrategy"),
        ("own-x = own_norm:Norm", "expected a lower-case identifier"),
    ],
)
def test_what_is_no_strategy(entry: str, message: str, packages: Path) -> None:
    offer(packages, entry)
    with pytest.raises(ValueError, match=message):
        tp.build_strategy(entry.split(" ")[0])


def test_two_packages_with_one_name(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offer(packages, "own_norm = own_norm:Norm")
    offer(packages, "own_norm = own_other:Norm", "another")
    with pytest.raises(ValueError, match=r"expected one package that offers it, got \["):
        tp.build_strategy("own_norm")
    assert "arXiv 2410.17247" in listed(capsys)


def test_ours_keep_their_names(packages: Path) -> None:
    offer(packages, "fastv = own_norm:Norm")
    assert tp.available().count("fastv") == 1
    assert strategy_class("fastv").__module__ == "tokenprune.strategies.fastv"
    assert "own_norm" not in sys.modules


def test_a_name_registered_since_is_the_one(packages: Path) -> None:
    write(packages, {"own_norm.py": REGISTERED})
    offer(packages, "own_norm = own_missing:Norm")
    __import__("own_norm")
    assert tp.build_strategy("own_norm").power == 2.0


def test_packages_are_not_imported_by_what_needs_none(packages: Path) -> None:
    """In a new process: neither with the package, nor to name or to build another strategy."""
    offer(packages, "own_norm = own_norm:Norm")
    code = (
        f"import sys; sys.path.insert(0, {str(packages)!r})\n"
        "import tokenprune as tp\n"
        "tp.available(), tp.build_strategy('fastv'), tp.strategies\n"
        "print('own_norm' in sys.modules)"
    )
    assert run([sys.executable, "-c", code]).stdout.strip() == "False"
