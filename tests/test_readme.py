"""The README says what is true: its table, its example, its commands."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ROWS, batch, build

import tokenprune as tp
from tokenprune.cli import main as cli
from tokenprune.strategy import strategy_class

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def strategy_table() -> str:
    """One row per registered strategy: name, what survives and why, source."""
    rows = ["| name | keeps | source |", "| --- | --- | --- |"]
    for name in tp.available():
        cls = strategy_class(name)
        keeps = cls.__doc__.splitlines()[0].removeprefix("Keeps ").rstrip(".")
        first = sys.modules[cls.__module__].__doc__.splitlines()[0]
        source = first.partition(": ")[2].rstrip(".")
        rows.append(f"| `{name}` | {keeps} | {source} |")
    return "\n".join(rows)


def test_strategy_table_is_current() -> None:
    """To renew it: python tests/test_readme.py."""
    assert f"\n{strategy_table()}\n" in README.read_text()


def test_example_runs() -> None:
    (code,) = re.findall(r"## Six lines\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    model = build("llava")
    inputs = batch(model, ROWS)
    code = code.replace("num_layers=32", "num_layers=6")
    exec(code, {"model": model, "inputs": {**inputs, "max_new_tokens": 2}})


def test_whole_example_answers(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"## All of it\n.*?```python\n(.*?)```", README.read_text(), re.DOTALL)
    capsys.readouterr()
    exec(code, {})
    (said,) = re.findall(r"print\(.*  # (.*)\n", code)
    assert capsys.readouterr().out == f"{said}\n"


@pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice on what is so small
@pytest.mark.matrix
def test_sweep_over_strategies_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"^tokenprune (.*glob.*?)  #", README.read_text(), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    short = [
        "data.test.num_samples=1",
        "max_new_tokens=1",
        "num_pictures=0",
        "trainer.callbacks=[]",
    ]
    assert cli.main([*shlex.split(line), *short]) == 0
    (table,) = tmp_path.rglob("results.csv")
    assert len(table.read_text().splitlines()) == 1 + len(tp.available()) + 1 - 5  # and none


@pytest.mark.parametrize("path", sorted(re.findall(r"\]\(([^)#:]+)\)", README.read_text())))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


EXAMPLES = re.findall(
    r"```python\n(# tokenprune/strategies/(\w+).py\n.*?)```",
    (ROOT / "docs" / "add_a_strategy.md").read_text(),
    re.DOTALL,
)


def example(name: str) -> tp.PruningStrategy:
    """A strategy of docs/add_a_strategy.md, as it stands there, but for its place."""
    (code,) = [code for code, own in EXAMPLES if own == name]
    module = f"{name}_example"
    namespace: dict[str, Any] = {"__name__": module}
    sys.modules[module] = type(sys)(module)
    try:
        exec(compile(code.replace(f'@register("{name}")\n', ""), f"{name}.py", "exec"), namespace)
    finally:
        del sys.modules[module]
    (kind,) = [own for own in namespace.values()
               if isinstance(own, type) and own.__module__ == module]  # fmt: skip
    return kind()


def run_example(name: str) -> tuple[Any, dict[str, torch.Tensor], tp.Trace]:
    model = build("llava", "eager")
    inputs = batch(model, ROWS)
    schedule = tp.Schedule.pyramid(layers=[1, 3], lam=0.5)
    with torch.no_grad(), tp.prune(model, example(name), schedule) as trace:
        model(**inputs)
    return model, inputs, trace


def test_the_documented_strategies_are_three_short_ones() -> None:
    assert [name for _, name in EXAMPLES] == ["norm", "looked_at", "folded"]
    for code, name in EXAMPLES:
        assert len(code.splitlines()) < 40
        published = type(example(name)).published(32)
        assert published.schedule == "one_shot"


def test_the_documented_one_that_scores() -> None:
    _, _, trace = run_example("norm")
    assert [len(kept) for kept in trace.stages[0].kept] == [8, 0, 16, 8]


def test_the_documented_one_that_reads_the_tower() -> None:
    model, inputs, trace = run_example("looked_at")
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    received = tower.attentions[-2][:, :, 1:, 1:].mean((1, 2)).view(-1)  # four images of 16
    of_rows = received.split([16, 32, 16])
    for scores, expected in zip(
        [trace.stages[0].scores[row] for row in (0, 2, 3)], of_rows, strict=True
    ):
        torch.testing.assert_close(scores, expected)
    assert [len(kept) for kept in trace.stages[1].kept] == [4, 0, 8, 4]


def test_the_documented_one_that_merges() -> None:
    _, _, trace = run_example("folded")
    _, _, unmerged = run_example("norm")
    first = trace.stages[0]
    for kept, weights, alone in zip(
        first.kept, first.weights, unmerged.stages[0].kept, strict=True
    ):
        assert torch.equal(kept, alone)
        torch.testing.assert_close(weights.sum(1), torch.ones(len(kept)))  # means
        assert ((weights > 0).sum(0) == 1).all()  # of every token, once
        assert (weights[torch.arange(len(kept)), kept] > 0).all()  # each with itself


if __name__ == "__main__":
    text = README.read_text()
    start, end = "<!-- strategies: generated by tests/test_readme.py -->", "<!-- /strategies -->"
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    README.write_text(f"{before}{start}\n{strategy_table()}\n{end}{after}")
