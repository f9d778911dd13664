"""Sweeps by patterns (h5), and by sweepers of others, which search (i4)."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import TINY, random_llava, refused
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from own import write

from tokenprune.cli import main as cli
from tokenprune.runs.compose import config_dir

STRATEGIES, SCHEDULES = (
    sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    for group in ("strategy", "schedule")
)


def name_of(config: DictConfig) -> str:
    """What a run's strategy is called; of several, the first."""
    own = config.strategy[0] if OmegaConf.is_list(config.strategy) else config.strategy
    return own.name if own else "none"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """The configs of a sweep's runs, none of which is checked or run."""
    configs: list[DictConfig] = []
    monkeypatch.setattr("tokenprune.cli.checks.check", lambda found, own: configs.extend(found))
    monkeypatch.setattr("tokenprune.cli.hydra_start.start", lambda *arguments: None)
    return configs


def own_configs(folder: Path) -> list[str]:
    own = "# Mine.\n_target_: tokenprune.build_strategy\nname: uniform\n"
    write(folder, {"strategy/own_a.yaml": own, "strategy/own_b.yaml": own})
    return ["--config-dir", str(folder)]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("glob(*)", STRATEGIES),
        ("glob([fastv*,pyr*])", ["fastv", "pyramiddrop"]),
        ("glob([fast*,pyr*],exclude=fast*)", ["pyramiddrop"]),
        ("glob(*,exclude=[none,r*])", [s for s in STRATEGIES if s not in ("none", "random")]),
        ("glob(?astv)", ["fastv"]),
        ("choice(fastv,none)", ["fastv", "none"]),
    ],
)
@pytest.mark.share(4)
def test_h5_a_pattern_is_all_that_fits(
    pattern: str, expected: list[str], seen: list[DictConfig]
) -> None:
    assert cli.main(["eval", "-m", f"strategy={pattern}", "schedule=pyramid"]) == 0
    assert list(map(name_of, seen)) == expected


def test_h5_patterns_know_further_folders(tmp_path: Path, seen: list[DictConfig]) -> None:
    place = own_configs(tmp_path / "mine")
    assert cli.main(["eval", "-m", "strategy=glob(own*)", *place]) == 0
    path = f"hydra.searchpath=[{tmp_path / 'mine'}]"
    assert cli.main(["eval", "-m", "strategy=glob([own*,u*])", path]) == 0
    assert len(seen) == 2 + 3


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        (["schedule=glob(*)"], len(SCHEDULES)),
        (
            ["strategy=glob(r*)", "schedule=glob(*,exclude=e*)", "seed=1,2"],
            2 * sum(name[0] != "e" for name in SCHEDULES),
        ),
        (["logger=glob(*)"], 5),
        (
            ["hydra.sweeper.grids=[{strategy: 'glob(*,exclude=none)'},{strategy: none}]"],
            len(STRATEGIES),
        ),
    ],
)
@pytest.mark.share(4)
def test_h5_patterns_of_any_group(
    overrides: list[str], number: int, seen: list[DictConfig]
) -> None:
    assert cli.main(["eval", "-m", *overrides]) == 0
    assert len(seen) == number


@pytest.mark.matrix
def test_h5_patterns_of_the_benchmark(seen: list[DictConfig]) -> None:
    assert cli.main(["bench", "-m", "strategy=glob(*,exclude=none)", "shape=glob(t*)"]) == 0
    assert len(seen) == len(STRATEGIES) - 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["-m", "strategy=glob(zz*)"],
            "strategy: expected a pattern that fits some of ['cdpruner'",
        ),
        (["-m", "seed=glob(*)"], "seed: expected values separated by commas, got 'glob(*)'"),
        (["-m", "schedule.lam=glob(*)"], "schedule.lam: expected values separated by commas, got"),
        (["-m", "experiment=glob(*)"], "experiment: expected several that are no sweeps"),
        (["strategy=glob(*)"], "strategy: expected one value, got 'glob(*)'. Add -m"),
        (["-m", "seed=interval(1,2)"], "seed: expected values separated by commas"),
    ],
)
@pytest.mark.share(3)
def test_h5_patterns_that_fit_nothing(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["eval", *overrides], capsys)


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.matrix
def test_h5_a_pattern_runs(
    searched: bool, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*random_llava(checkpoint), *TINY, "data.test.num_samples=2"]
    place = own_configs(tmp_path / "mine")
    if searched:
        place = [f"hydra.searchpath=[{place[1]}]"]
    sweep = [
        "eval",
        "-m",
        *few,
        *place,
        "strategy=glob([fastv,n*,own*,r*,u*])",
        "hydra.sweep.dir=sweep",
    ]
    assert cli.main(sweep) == 0
    with Path("sweep/results.csv").open(newline="") as file:
        names = [row["strategy"] for row in csv.DictReader(file)]
    assert names == ["fastv", "none", "own_a", "own_b", "random", "uniform"]


class Search(Sweeper):
    """As others' sweepers: tries values of its own, and keeps the best in `best.txt`."""

    def __init__(self, key: str, values: list[Any], direction: str) -> None:
        self.key, self.values, self.direction = key, values, direction

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        jobs = [[*arguments, f"{self.key}={value}"] for value in self.values]
        found = [float(job.return_value) for job in self.launcher.launch(jobs, initial_job_idx=0)]
        best = {"minimize": min, "maximize": max}[self.direction](found)
        text = f"{self.direction} {self.values[found.index(best)]}"
        Path(self.config.hydra.sweep.dir, "best.txt").write_text(text)


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that choose `Search`, as if its package were installed."""
    home = ModuleType("hydra_plugins.search")
    home.Search = Search
    monkeypatch.setitem(sys.modules, home.__name__, home)
    monkeypatch.setattr(Search, "__module__", home.__name__)
    Plugins.instance().register(Search)
    config = "_target_: hydra_plugins.search.Search\nkey: strategy\nvalues: [fastv, random]\n"
    write(tmp_path / "sweepers", {"hydra/sweeper/search.yaml": f"{config}direction: minimize\n"})
    return ["-m", "--config-dir", str(tmp_path / "sweepers"), "hydra/sweeper=search"]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("given", "direction"),
    [([], "maximize"), (["hydra.sweeper.direction=minimize"], "minimize")],
)
@pytest.mark.share(2)
def test_i4_another_s_sweeper_maximizes_accuracy_and_has_a_table(
    given: list[str],
    direction: str,
    search: list[str],
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = [*random_llava(checkpoint), *TINY, "data.test.num_samples=2"]
    assert cli.main(["eval", *search, *few, *given]) == 0
    printed = capsys.readouterr().out
    assert ("hydra.sweeper.direction=maximize, for accuracy" in printed) is (not given)
    (folder,) = Path("outputs").iterdir()
    assert f"2 runs: outputs/{folder.name}/results.csv" in printed
    assert (folder / "best.txt").read_text().startswith(direction)
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # However deep: overrides with paths name the folders.
    assert {row["strategy"] for row in rows} == {"fastv", "random"}
    assert all((folder / row["run"] / "metrics.json").is_file() for row in rows)


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice on what is so small
@pytest.mark.parametrize(
    ("monitor", "direction"), [("val_loss", "minimize"), ("val_accuracy", "maximize")]
)
@pytest.mark.share(2)
def test_i4_a_search_over_trainings_follows_what_they_monitor(
    monitor: str, direction: str, search: list[str], checkpoint: Path
) -> None:
    few = ["trainer.callbacks=[]", "trainer.max_steps=1", "data.batch_size=2"]
    few += [*random_llava(checkpoint), "data.validation.num_samples=2", f"monitor={monitor}"]
    assert cli.main(["train", *search, *few, "hydra.sweep.dir=there"]) == 0
    assert Path("there/best.txt").read_text().startswith(direction)


@pytest.mark.matrix
def test_i4_a_search_over_benchmarks_minimizes_the_time(search: list[str]) -> None:
    few = ["shape=tiny", "num_visual=48", "rounds=1", "warmup=1", "hydra.sweep.dir=there"]
    assert cli.main(["bench", *search, *few, "hydra.sweeper.direction=maximize"]) == 0
    assert Path("there/best.txt").read_text().startswith("maximize")
    assert cli.main(["bench", *search, *few]) == 0
    assert Path("there/best.txt").read_text().startswith("minimize")
    with Path("there/bench.csv").open(newline="") as file:
        assert {row["strategy"] for row in csv.DictReader(file)} == {"fastv", "random"}
