"""Which models take renumbered positions, and what becomes of positions=auto."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from compatibility import exists, read
from models import build
from zoo import ZOO

import tokenprune as tp
from tokenprune.cli.configs import compose as composed
from tokenprune.runs import compose

#: Types that the table says are exact with renumbered positions.
TAKES = {row[0]: row[3].startswith("exact") for row in read() if row[2] == "renumbered"}
SEVERAL = "rotary embeddings with several axes"


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> Iterator[None]:
    compose._say.cache_clear()
    yield
    compose._say.cache_clear()


@pytest.mark.filterwarnings("ignore")  # models warn of much that is their own affair
@pytest.mark.parametrize("model_type", ZOO)
@pytest.mark.share(4)
def test_the_table_says_which_models_take_renumbered_positions(model_type: str) -> None:
    if not exists(ZOO[model_type]):
        pytest.skip("not in this transformers")
    model = ZOO[model_type].build()
    assert (tp.fixed_positions(model) is None) == TAKES[model_type]
    if not TAKES[model_type]:
        with (
            pytest.raises(ValueError, match=r'renumbered".* Use positions="original"\.$'),
            tp.prune(model, tp.build_strategy("uniform"), tp.Schedule(), "renumbered"),
        ):
            pass


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen2_5_vl", SEVERAL),
        ("glm4v", SEVERAL),
        ("blip-2", "OPTDecoder, which adds positions before its first layer"),
    ],
)
@pytest.mark.share(3)
def test_auto_is_original_where_the_model_takes_nothing_else(
    model_type: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ZOO[model_type].build()
    capsys.readouterr()
    for _ in range(2):  # a sweep's runs
        pruning = compose.fit_pruning(composed("eval", ["strategy=pyramiddrop"]), model)
        assert pruning is not None
        assert pruning.positions == "original"
    line = f"positions: original, not renumbered as published: this model has {reason}\n"
    assert capsys.readouterr().out == line
    # What was published with original positions is nothing to speak of, nor is what was asked for.
    for overrides in (["strategy=fastv"], ["strategy=none"], ["positions=original"]):
        compose.fit_pruning(composed("eval", overrides), model)
    assert capsys.readouterr().out == ""


def test_what_was_asked_for_is_not_changed_silently() -> None:
    model = ZOO["qwen2_5_vl"].build()
    pruning = compose.fit_pruning(composed("eval", ["positions=renumbered"]), model)
    assert pruning is not None
    with (
        pytest.raises(ValueError, match=f"got {SEVERAL}"),
        tp.prune(model, pruning.strategy, pruning.schedule, pruning.positions),
    ):
        pass


@pytest.mark.parametrize("strategy", tp.available())
@pytest.mark.share(3)
def test_auto_is_the_published_policy_elsewhere(
    strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llava")
    pruning = compose.fit_pruning(composed("eval", [f"strategy={strategy}"]), model)
    assert pruning is not None
    assert pruning.positions == tp.published(strategy, num_layers=6)[2]
    assert capsys.readouterr().out == ""


@dataclass(frozen=True)
class Unpublished(tp.ScoreStrategy):
    def score(self, view: tp.TokenView) -> torch.Tensor:
        return view.positions.float()


def test_a_strategy_without_a_published_run_leaves_positions() -> None:
    config = composed("eval", [f"strategy._target_={__name__}.Unpublished", "~strategy.name",
                               "~strategy.queries", "~strategy.source"])  # fmt: skip
    pruning = compose.build_pruning(config, 8)
    assert pruning is not None
    assert pruning.strategy == Unpublished()
    assert pruning.positions == "original"
