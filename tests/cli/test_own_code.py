"""A user's own classes, by `_target_`, `imports` and configs of their own, in every command.

Rows i1 (own strategies), i2 (broken imports), i3 (further folders of configs).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import COMMAND, TINY, random_llava, refused
from own import BROKEN, NORM, REGISTERED, configs, importable, offer, write
from PIL import Image
from processes import run

from tokenprune.cli import main as cli
from tokenprune.runs import results
from tokenprune.runs.compose import config_dir

DELETED = ["~strategy.name", "~strategy.queries", "~strategy.source"]
WAYS = {
    "target": ["strategy._target_=own_norm.Norm", *DELETED],
    "target and key": ["strategy._target_=own_norm.Norm", *DELETED, "+strategy.power=3"],
    "another's target": ["strategy=uniform", "strategy._target_=own_norm.Norm", "~strategy.name"],
    "whole file": ["--config-dir", "CONFIGS", "strategy=own"],
    "short file": ["--config-dir", "CONFIGS", "strategy=own_short", "strategy.power=1"],
    "search path": ["hydra.searchpath=[file://CONFIGS]", "strategy=own"],
    "plain search path": ["hydra.searchpath=[CONFIGS]", "strategy=own_short"],
}
COMMANDS = {
    "flops": ["flops"],
    "verify": ["verify"],
    "show": ["show", "picture.png", "what ?", "max_new_tokens=2"],
    "eval": ["eval", *TINY, "data.test.num_samples=2", "hydra.run.dir=run"],
    "train": ["train", "trainer.max_steps=1", "trainer.callbacks=[]", "data.batch_size=2",
              "data.validation.num_samples=2", "hydra.run.dir=run"],
    "bench": ["bench", "shape=tiny", "num_visual=48", "rounds=1", "warmup=1", "hydra.run.dir=run"],
}  # fmt: skip
#: Every command in every way by `make test-all`; by default each command in some, each way in some.
SAMPLE = [
    pytest.param(name, way, marks=() if (row + column) % 3 == 0 else pytest.mark.matrix)
    for row, name in enumerate(COMMANDS)
    for column, way in enumerate(WAYS)
]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's code, with configs beside it."""
    importable(tmp_path / "code", monkeypatch)
    configs(tmp_path / "configs")
    return write(tmp_path / "code", {"own_norm.py": NORM})


def command(name: str, checkpoint: Path) -> list[str]:
    """A command on a small model, as far as it takes one."""
    if name == "show":
        Image.new("RGB", (32, 32), "red").save("picture.png")
    return COMMANDS[name] + ([] if name == "bench" else random_llava(checkpoint))


@pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice on what is so small
@pytest.mark.parametrize(("name", "way"), SAMPLE)
@pytest.mark.share(20)
def test_i1_i3_a_strategy_of_your_own_works_in_every_command(
    name: str, way: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("CONFIGS", str(tmp_path / "configs")) for word in WAYS[way]]
    assert cli.main([*command(name, checkpoint), *given]) == 0, capsys.readouterr().err
    printed = " ".join(capsys.readouterr().out.split())
    label = {"whole file": "own", "search path": "own", "plain search path": "own_short",
             "short file": "own_short(power=1)", "target and key": "Norm(power=3)"}  # fmt: skip
    if name in ("eval", "bench"):  # whose tables tell choices apart
        assert f" {label.get(way, 'Norm')} " in printed
    elif name != "train":
        assert "Norm" in printed


def test_i1_keys_that_a_class_does_not_know(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["strategy._target_=own_norm.Norm"]
    message = refused(["eval", *random_llava(checkpoint), *own], capsys)
    assert "unexpected keyword argument 'name'. Remove it: ~strategy.name." in message
    message = refused(["flops", *own, *DELETED, "+strategy.power=-1"], capsys)
    assert "strategy: expected values that its target takes, got ValueError: power must" in message


@pytest.mark.matrix
def test_i1_an_edited_strategy_runs_again(
    checkpoint: Path, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["eval", "-m", *random_llava(checkpoint), *TINY, "data.test.num_samples=2"]
    sweep += ["strategy=uniform", "strategy._target_=own_norm.Norm", "~strategy.name", "seed=1"]
    assert cli.main(sweep) == 0
    assert cli.main(sweep) == 0
    assert capsys.readouterr().out.count("complete already") == 1
    write(own, {"own_norm.py": NORM.replace("dim=-1", "dim=2")})
    importable(own, monkeypatch)
    assert cli.main(sweep) == 0
    assert "again: strategy.code changed" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice on what is so small
@pytest.mark.parametrize("name", ["eval", "verify"])
@pytest.mark.share(2)
def test_i1_what_a_class_raises_is_one_line(
    name: str, own: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(own, {"own_norm.py": NORM.replace("view.hidden.float()", "view.hiden")})
    own_class = ["strategy._target_=own_norm.Norm", *DELETED]
    sized = [*TINY, "data.test.num_samples=2"]
    code = cli.main([name, *random_llava(checkpoint), *own_class, *sized])
    message = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in message
    assert "Norm.score: expected it to run, got AttributeError: 'TokenView' object" in message
    assert f"{own / 'own_norm.py'}, line 18. Repair it" in message
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.share(4)
def test_i2_a_broken_import_is_one_line(
    kind: str, own: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, cause = BROKEN[kind]
    write(own, files)
    target = ["strategy._target_=own_broken.Norm", *DELETED]
    message = refused(["eval", *random_llava(checkpoint), *target], capsys)
    assert "got 'own_broken.Norm': " in message
    assert cause in message
    if kind != "no class":  # the module itself
        message = refused(["flops", "imports=[own_broken]"], capsys)
        assert "imports: expected modules that can be imported, got 'own_broken': " in message
        assert cause in message


@pytest.mark.parametrize(
    "words",
    [
        "eval logger=csv logger._target_=T",
        "eval +logger._target_=T",
        "eval trainer.callbacks=[{_target_:T}]",
        "eval trainer._target_=T",
        "eval model._target_=T",
        "eval data._target_=T",
        "eval data.test._target_=T",
        "eval schedule._target_=T",
        "eval -m seed=1,2 data.test._target_=T",
        "train logger._target_=T",
        "train trainer.callbacks=[{_target_:T}]",
        "train trainer.strategy={_target_:T}",
        "train data.train._target_=T",
        "train model._target_=T",
        "bench shape._target_=T",
        "bench imports=[own_broken]",
        "flops shape=tiny shape._target_=T",
        "flops schedule._target_=T",
        "verify model._target_=T",
        "verify imports=[own_broken]",
        "show picture.png what model._target_=T",
        "list imports=[own_broken]",
    ],
)
@pytest.mark.share(8)
def test_i2_a_broken_import_of_anything_is_one_line(
    words: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, cause = BROKEN["an import in it"]
    write(own, files)
    assert cause in refused(words.replace("=T", "=own_broken.X").replace(":T", ":own_broken.X")
                            .split(), capsys)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval data._target_=tokenprune.data.module.VQADataModul", "no 'VQADataModul', but 'VQA"),
        ("eval model._target_=own_norm", "model._target_: expected a class or function, got"),
        ("eval model._target_=own_norm..Norm", "model._target_: expected a class or function"),
        ("eval data._target_=own_norm.Norm", "data: expected keys that its target knows"),
        ("eval +logger._target_=own_norm.Norm", "logger: expected a Logger, got Norm(power=2.0)"),
        ("eval strategy=none +strategy._target_=builtins.dict", "strategy: expected a Pruning"),
        ("eval imports=own_norm", "imports: expected a list of modules, got 'own_norm'"),
        ("train imports=3", "imports: expected a list of modules, got 3"),
        ("eval -m seed=1,2 hydra.sweeper._target_=own_norm.X", "expected a plugin of Hydra's"),
        ("eval -m hydra/sweeper=own_search", "Others come with Hydra's plugins, such as hydra-opt"),
    ],
)
@pytest.mark.share(4)
def test_i2_what_is_no_such_thing_is_one_line(
    words: str, message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = words.split()
    few = [] if "imports=3" in words else ["num_pictures=0", "data.batch_size=2"]
    model = [] if "model." in words else random_llava(checkpoint)
    assert message in refused([name, *model, *few, *rest], capsys)


def test_i3_list_shows_your_configs_and_what_they_import(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(own, {"own_norm.py": REGISTERED})
    places = ["--config-dir", str(tmp_path / "configs")]
    for given in (places, [f"hydra.searchpath=[{tmp_path / 'configs'}]"]):
        assert cli.main(["list", *given, "imports=[own_norm]"]) == 0
        listed = " ".join(capsys.readouterr().out.split())
        assert "own The norm, on a schedule of its own." in listed
        assert "own_short The norm, in a short file." in listed
        assert "own_norm (no YAML file) Keeps the tokens with the largest hidden states." in listed
        assert "arXiv 2403.06764" in listed


def test_i3_help_shows_your_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "configs", {"experiment/own_try.yaml": "# @package _global_\nseed: 3\n"})
    assert cli.main(["eval", "--help", "-cd", str(tmp_path / "configs")]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("strategy: ")]
    assert {"fastv", "none", "own", "own_short"} <= set(line.split(": ")[1].split(", "))
    assert "own_try" in printed


@pytest.mark.matrix
def test_i3_a_report_takes_the_folder_as_well(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--config-dir", str(tmp_path / "configs")]
    few = [*random_llava(checkpoint), *TINY, "data.test.num_samples=2", "hydra.run.dir=run"]
    assert cli.main(["eval", *few, *place, "strategy=own"]) == 0
    assert cli.main(["report", "run", *place]) == 0
    assert "own" in Path("run/report.html").read_text()


@pytest.mark.parametrize("name", ["list", "show", "verify", "flops", "report", "eval", "bench"])
def test_i3_folders_that_cannot_be(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"show": ["picture.png", "what ?"], "report": ["."]}.get(name, [])
    message = refused([name, *words, "--config-dir", "nowhere"], capsys)
    assert "--config-dir: expected a folder, got 'nowhere'" in message
    write(tmp_path / "taken", {"strategy/fastv.yaml": "strategy: null\n"})
    message = refused([name, *words, "--config-dir", str(tmp_path / "taken")], capsys)
    assert "expected names of their own, got strategy/fastv.yaml, which tokenprune" in message
    if name == "report":
        return
    for given, said in (
        ("[nowhere]", "hydra.searchpath: expected a folder, got 'nowhere'"),
        ("[pkg://own_nowhere]", "hydra.searchpath: expected a folder, got 'pkg://own_nowhere'"),
        ("nowhere", "hydra.searchpath: expected a list of folders"),
        (f"[{tmp_path / 'taken'}]", "hydra.searchpath: expected names of their own"),
    ):
        assert said in refused([name, *words, f"hydra.searchpath={given}"], capsys)


def test_i3_a_folder_and_a_search_path_and_a_package_s(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--config-dir", str(tmp_path / "configs")]
    second = write(
        tmp_path / "a folder, named = so", {"strategy/own_2.yaml": "_target_: own_norm.N"}
    )
    write(own, {"own_package/__init__.py": "", "own_package/strategy/own_3.yaml":
                "_target_: own_norm.Norm"})  # fmt: skip
    path = f"hydra.searchpath=['{second}',pkg://own_package]"
    assert cli.main(["flops", *place, path, "strategy=own_3"]) == 0
    assert cli.main(["flops", *place, path, "strategy=own"]) == 0
    assert cli.main(["eval", "--cfg", "job", *place, path, "strategy=own_2"]) == 0
    assert "_target_: own_norm.N\n" in capsys.readouterr().out


@pytest.mark.matrix
def test_imports_register_names_for_every_command(
    own: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(own, {"own_norm.py": REGISTERED})
    by_name = "_target_: tokenprune.build_strategy\nname: own_norm\npower: 1\n"
    write(tmp_path / "configs", {"strategy/own_norm.yaml": by_name})
    given = ["--config-dir", str(tmp_path / "configs"), "strategy=own_norm", "imports=[own_norm]"]
    assert cli.main(["flops", *given]) == 0
    assert "own_norm: 144 visual" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*command("eval", checkpoint), *given]) == 0
    assert json.loads(Path("run/metrics.json").read_text())["strategy"] == "own_norm"
    assert "strategy.code" in json.loads(Path("run").joinpath(results.VERSIONS).read_text())


def test_a_registered_name_without_a_yaml_says_what_to_write(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(own, "own_norm = own_norm:Norm")
    message = refused(["flops", "strategy=own_norm"], capsys)
    assert (
        "expected strategy/own_norm.yaml, got none for 'own_norm', which is registered" in message
    )


@pytest.mark.parametrize("name", ["eval", "train", "bench"])
def test_imports_is_a_key_of_every_command(name: str) -> None:
    assert "\nimports: []\n" in (config_dir() / f"{name}.yaml").read_text()


@pytest.mark.matrix
def test_imports_reach_every_process(own: Path, checkpoint: Path) -> None:
    """Which a run starts itself: an adapter that is registered there must be known there."""
    noted = "import os, pathlib\npathlib.Path(__file__).with_name(f'{os.getpid()}.txt').touch()\n"
    write(own, {"own_noted.py": noted})
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    few = ["eval", *TINY, "data.test.num_samples=4", "data.batch_size=2"]
    path = os.pathsep.join([str(own), os.environ["PYTHONPATH"]])
    run([*COMMAND, *few, *random_llava(checkpoint), *two, "imports=[own_noted]"],
        env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    assert len(list(own.glob("*.txt"))) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults:\n  - hub\n  - override /data: folder\npath: x\n", "In 'model/mine'"),
        ("defaults:\n  - hub\n  - _self_\n  - nowhere: x\n", "nowhere"),
    ],
)
def test_a_mistake_in_a_file_of_configs_is_told(
    text: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "configs" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(text)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    error = refused(["eval", "--config-dir", str(tmp_path / "configs"), "model=mine"], capsys)
    assert message in error
