"""The distribution: its name, its version, and what texts tell people to install."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import tokenprune as tp

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLACES = ("tokenprune", "hydra_plugins", "configs", "docs", "experiments", "tests")
SUFFIXES = {".py", ".md", ".yaml", ".html", ".js", ".toml", ".txt"}


def strangers(text: str) -> list[str]:
    """What a text tells people to install that is not ours, but has our command's name."""
    commands = re.findall(r"\b(?:pip|uv|pipx) (?:install|add)\b[^\n`;)]*", text)
    names = [
        name for line in commands for name in re.findall(r"[^\s'\"]*tokenprune[^\s'\"]*", line)
    ]
    return [
        name
        for name in [*names, *re.findall(r"tokenprune\[[a-z]+[,\]]", text)]
        if not re.match(r"tokenprune-vlm\b", name) and "/" not in name
    ]


def texts() -> Iterator[tuple[Path, str]]:
    """Every text that somebody reads; of code also its strings, which may span lines."""
    paths = [path for place in PLACES for path in (ROOT / place).rglob("*")]
    for path in sorted([*paths, *ROOT.glob("*"), ROOT / ".ci" / "run"]):
        known = path.suffix in SUFFIXES or path.name in ("Makefile", "run", "CITATION.cff")
        if not known or not path.is_file() or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        yield path, text
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield path, node.value
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                    yield path, "".join(map(str, parts))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install tokenprune", ["tokenprune"]),
        ("Run `pip install peft tokenprune`, then `tokenprune train`.", ["tokenprune"]),
        ("pip install --upgrade 'tokenprune[train]'", ["tokenprune[train]", "tokenprune[train]"]),
        ('Add "tokenprune[hub]" to them.', ["tokenprune[hub]"]),
        ("pip install 'tokenprune-vlm[train]'; tokenprune list", []),
        ("pip install '.[train]'", []),
        ("pip install dist/tokenprune_vlm-0.1.0-py3-none-any.whl", []),
    ],
)
def test_a_stranger_is_noticed(text: str, found: list[str]) -> None:
    assert strangers(text) == found


def test_nobody_is_told_to_install_a_stranger_s_package() -> None:
    seen = list(texts())
    assert {path.suffix for path, _ in seen} >= {".py", ".md", ".yaml", ".toml"}
    assert [(path, strangers(text)) for path, text in seen if strangers(text)] == []


def test_extras_that_texts_name_exist() -> None:
    """And each that adds something to the product is named somewhere."""
    named = {extra for _, text in texts() for extra in re.findall(r"tokenprune-vlm\[(\w+)", text)}
    assert named == set(PROJECT["optional-dependencies"]) - {"dev"}


def test_name_version_and_command() -> None:
    assert PROJECT["name"] == "tokenprune-vlm"
    assert PROJECT["version"] == tp.__version__
    assert list(PROJECT["scripts"]) == ["tokenprune"]


def test_citation_is_of_this_package() -> None:
    citation = OmegaConf.to_container(OmegaConf.load(ROOT / "CITATION.cff"))
    assert {"cff-version", "message", "title", "abstract"} <= set(citation)
    assert citation["type"] == "software"
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
