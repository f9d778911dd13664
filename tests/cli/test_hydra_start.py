"""What is relied upon of Hydra beyond its public interface: a version that differs fails here."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tokenprune.cli import hydra_start
from tokenprune.cli.mistakes import BadInput


def test_hydra_s_own_functions_are_as_expected() -> None:
    given = {"args", "args_parser", "task_function", "config_path", "config_name"}
    parameters = inspect.signature(_run_hydra).parameters
    assert given <= set(parameters)
    others = [p for name, p in parameters.items() if name not in given]
    assert all(p.default is not inspect.Parameter.empty for p in others)
    options = vars(get_args_parser().parse_args([]))
    read = {"overrides", "cfg", "resolve", "multirun", "config_dir", "help", "hydra_help", "info"}
    assert read | {"shell_completion"} <= set(options)


def test_overrides_may_follow_options() -> None:
    args = hydra_start.parse("eval", ["seed=1", "--config-dir", "mine", "-m", "strategy=fastv"])
    assert (args.overrides, args.config_dir) == (["seed=1", "strategy=fastv"], "mine")
    assert args.multirun
    with pytest.raises(BadInput, match=r"^eval: unrecognized arguments: --foo"):
        hydra_start.parse("eval", ["--foo"])


def test_a_task_gets_the_config_of_its_command() -> None:
    seen: list[tuple[DictConfig, str, str]] = []

    def task(config: DictConfig) -> None:
        hydra = HydraConfig.get()
        seen.append((config, hydra.job.config_name, hydra.runtime.output_dir))

    overrides = ["strategy=fastv", "seed=7", "hydra.run.dir=here"]
    hydra_start.start("eval", hydra_start.parse("eval", overrides), task)
    ((config, name, folder),) = seen
    assert (config.strategy.name, config.seed, name) == ("fastv", 7, "eval")
    assert Path(folder) == Path("here").absolute()
    assert not GlobalHydra.instance().is_initialized()


def test_a_sweep_is_one_task_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    """By our own sweeper, which Hydra finds among its plugins."""
    seen: list[tuple[str, str]] = []

    def task(config: DictConfig) -> None:
        seen.append((config.strategy.name, Path(HydraConfig.get().runtime.output_dir).name))

    args = hydra_start.parse("eval", ["-m", "strategy=fastv,random", "hydra.sweep.dir=there"])
    hydra_start.start("eval", args, task)
    assert seen == [("fastv", "fastv"), ("random", "random")]
