"""Every YAML file composes, explains itself, and says what the papers' code does."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

import tokenprune as tp
from tokenprune.cli.configs import compose
from tokenprune.cli.guide import GROUPS
from tokenprune.runs.compose import build_pruning, config_dir, describe

FILES = sorted(config_dir().rglob("*.yaml"))
CHOICES = [
    (group, path.stem) for group in GROUPS for path in sorted((config_dir() / group).glob("*.yaml"))
]


def name(path: Path) -> str:
    return str(path.relative_to(config_dir()))


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids="=".join)
@pytest.mark.share(4)
def test_every_choice_composes(group: str, choice: str) -> None:
    config = compose("eval", [f"{group}={choice}"])
    assert {"model", "data", "strategy", "schedule", "positions", "trainer"} <= set(config)


@pytest.mark.parametrize("path", sorted(config_dir().glob("*.yaml")), ids=name)
def test_every_command_composes(path: Path) -> None:
    assert compose(path.stem, []) is not None


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_file_describes_itself_in_a_line(path: Path) -> None:
    assert 10 <= len(describe(path)) <= 110


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_key_has_a_comment(path: Path) -> None:
    OmegaConf.load(path)  # well-formed
    above, bare = "", []
    for line in _body(path.read_text().splitlines()):
        key, _, value = line.lstrip(" -").partition(":")
        commented = line.lstrip().startswith("#") or above.lstrip().startswith("#")
        if value.strip() and key != "_target_" and not commented:
            bare.append(line.strip())
        above = line
    assert not bare


def _body(lines: list[str]) -> list[str]:
    """Lines outside the defaults list, long texts, and overrides that repeat other files' keys."""
    body: list[str] = []
    skipping: int | None = None  # indent of the key whose content is skipped
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if skipping is not None and (not line.strip() or indent > skipping):
            continue
        skipping = None
        if line.strip() in ("defaults:", "grids:") or line.endswith("|-"):
            skipping = indent
        body.append(line)
    return [line for line in body if not line.endswith("|-")]


def test_strategies_and_files_are_the_same() -> None:
    files = {path.stem for path in (config_dir() / "strategy").glob("*.yaml")}
    assert files == {"none", *tp.available()}


@pytest.mark.parametrize("strategy", tp.available())
@pytest.mark.parametrize("num_layers", [8, 32])
@pytest.mark.share(4)
def test_a_strategy_alone_is_the_method_as_published(strategy: str, num_layers: int) -> None:
    pruning = build_pruning(compose("eval", [f"strategy={strategy}"]), num_layers)
    assert pruning is not None
    published = tp.published(strategy, num_layers=num_layers)
    assert (pruning.strategy, pruning.schedule, pruning.positions) == published


def test_thirteen_billion_parameters_as_published() -> None:
    config = compose("eval", ["strategy=pyramiddrop", "schedule.layers=[8,16,24]"])
    pruning = build_pruning(config, 40)
    assert pruning is not None
    assert pruning.schedule == tp.published("pyramiddrop", num_layers=40)[1]


def test_none_is_the_unpruned_model() -> None:
    assert build_pruning(compose("eval", ["strategy=none"]), 8) is None


@pytest.mark.parametrize("strategy", sorted(set(tp.available()) - {"vscan"}))  # two at two cuts
@pytest.mark.share(4)
def test_every_strategy_takes_every_schedule(strategy: str) -> None:
    own = tp.published(strategy, num_layers=8)
    for schedule, expected in {
        "pyramid": tp.Schedule.pyramid(8, 4, 0.5),
        "one_shot": tp.Schedule.one_shot(2, 0.5),
        "explicit": tp.Schedule((tp.Stage(2, 0.5),)),
    }.items():
        config = compose("eval", [f"strategy={strategy}", f"schedule={schedule}"])
        pruning = build_pruning(config, 8)
        assert pruning is not None
        assert (pruning.strategy, pruning.schedule, pruning.positions) == (
            own[0],
            expected,
            own[2],
        )


def test_a_list_has_a_strategy_for_each_cut() -> None:
    pruning = build_pruning(compose("eval", ["strategy=vscan", "strategy.0.window=4"]), 8)
    assert pruning is not None
    first, second = pruning.strategy.strategies
    assert (first.window, second) == (4, tp.build_strategy("pyramiddrop"))
    assert [stage.layer for stage in pruning.schedule.stages] == [0, 4]
    with pytest.raises(ValueError, match=r"PerStage: expected a strategy for each of the cuts"):
        build_pruning(compose("eval", ["strategy=vscan", "schedule=one_shot"]), 8)


def test_the_class_of_several_strategies_may_be_named() -> None:
    """The strategies inside it are strategies, not configs made of them."""
    config = compose("eval", ["schedule=explicit", "schedule.stages=[{layer:2,keep:0.5}]"])
    inside = [{"_target_": "tokenprune.build_strategy", "name": "fastv", "queries": "all"}]
    own = {"_target_": "tokenprune.PerStage", "strategies": inside}
    OmegaConf.update(config, "strategy", own, merge=False)
    pruning = build_pruning(config, 8)
    assert pruning is not None
    assert pruning.strategy == tp.PerStage((tp.build_strategy("fastv", queries="all"),))


def test_explicit_stages() -> None:
    stages = "schedule.stages=[{layer:1,keep:0.5},{layer:3,keep:0.1}]"
    pruning = build_pruning(compose("eval", ["schedule=explicit", stages]), 8)
    assert pruning is not None
    assert pruning.schedule.stages == (tp.Stage(1, 0.5), tp.Stage(3, 0.1))


@pytest.mark.parametrize("data", ["scenes", "folder", "hub"])
def test_the_order_of_training_samples_follows_the_seed(data: str) -> None:
    assert compose("train", [f"data={data}", "seed=7"]).data.seed == 7
    assert compose("train", [f"data={data}", "seed=7", "data.seed=1"]).data.seed == 1


def test_one_seed_for_everything_that_draws() -> None:
    pruning = build_pruning(compose("eval", ["strategy=random", "seed=7"]), 8)
    assert pruning is not None
    assert pruning.strategy == tp.build_strategy("random", seed=7)
