"""What `tokenprune eval --help` prints: choices, every key with the comment on it, examples."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

#: Groups of configs, in the order in which they are told.
GROUPS = (
    "model",
    "data",
    "strategy",
    "schedule",
    "trainer",
    "logger",
    "launcher",
    "search",
    "experiment",
)
#: Those of commands that have others.
OWN_GROUPS = {
    "bench": ("shape", "strategy", "schedule", "launcher", "search"),
    "benchmark": ("benchmark", "model", "strategy", "schedule", "launcher", "search", "experiment"),
}
EXAMPLES = """\
tokenprune eval strategy=fastv                         FastV as published, on the shipped model
tokenprune eval strategy=fastv schedule=pyramid        FastV's choice on PyramidDrop's schedule
tokenprune eval -m strategy=fastv,pyramiddrop schedule=pyramid schedule.lam=0.3,0.5
tokenprune eval -m experiment=ablation                 the ablation: outputs/ablation/results.csv
tokenprune eval model=llava_1_5_7b trainer=gpu data=folder data.path=my/questions.jsonl
tokenprune eval model=hub model.path=/my/checkpoint    any model that transformers loads
tokenprune benchmark tasks=[pope,mme] model=llava_1_5_7b strategy=fastv limit=100
tokenprune train strategy=pyramiddrop data=folder data.train_path=my/train.jsonl
tokenprune bench prefill shape=llava_1_5_7b resolution=336x336
tokenprune bench -m measure=prefill,decode batch_size=1,8 resolution=336x336,672x672

--cfg job prints the config and stops; -m sweeps over comma-separated values;
`tokenprune list` describes every choice; --hydra-help has Hydra's own options."""
Comments = dict[tuple[str, ...], str]


def lines(
    command: str,
    config: DictConfig,
    folders: Sequence[Path],
    composed: Sequence[tuple[Path, str]],
) -> Iterator[str]:
    """The help of a command, with its config as composed.

    Args:
        command: Its name.
        config: As composed.
        folders: Where configs are.
        composed: The files that it is composed of, later ones winning, each with its package.
    """
    yield "Override anything below: `group=choice` picks a file, `key=value` sets a value.\n"
    yield "== Choices (group=choice) =="
    for group in OWN_GROUPS.get(command, GROUPS):
        choices = sorted(path.stem for path in choice_files(group, folders))
        yield f"{group}: {', '.join(choices)}"
    yield "\n== Config (key=value) =="
    yield from _lines(config, (), comments(composed))
    yield f"\n== Examples ==\n{EXAMPLES}"


def choice_files(group: str, folders: Sequence[Path]) -> list[Path]:
    """The YAML files of a group of configs, in the order of their names."""
    files = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    return sorted(files, key=lambda path: path.stem)


def comments(composed: Sequence[tuple[Path, str]]) -> Comments:
    """The comment above each key in the files of a config, by the key's path in it.

    Args:
        composed: As for `lines`.
    """
    found: Comments = {}
    for path, package in composed:
        place = tuple(package.split(".")) if package else ()
        for key, comment in _above(path.read_text(encoding="utf-8").splitlines()):
            found[(*place, *key)] = comment
    return found


def _above(lines: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    comment: list[str] = []
    path: list[tuple[int, str]] = []
    for line in lines:
        bare = line.strip()
        if bare.startswith("#"):
            comment.append(bare.lstrip("# "))
            continue
        key, colon, _ = bare.partition(":")
        if colon and not bare.startswith("-"):
            indent = len(line) - len(line.lstrip())
            path = [entry for entry in path if entry[0] < indent] + [(indent, key)]
            if comment:
                yield tuple(name for _, name in path), " ".join(comment)
        comment = []


def _lines(node: DictConfig, path: tuple[str, ...], known: Comments) -> Iterator[str]:
    indent = "  " * len(path)
    for key in map(str, node):
        here = (*path, key)
        if here in known:
            yield from textwrap.wrap(known[here], 88, initial_indent=f"{indent}# ",
                                     subsequent_indent=f"{indent}# ")  # fmt: skip
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and len(value):
            yield f"{indent}{key}:"
            yield from _lines(value, here, known)
        elif isinstance(value, ListConfig) and not value._is_none() and len(value):
            yield f"{indent}{key}:"
            yield from textwrap.indent(OmegaConf.to_yaml(value), indent + "  ").splitlines()
        else:
            yield f"{indent}{OmegaConf.to_yaml({key: value}).strip()}"
