"""Strategies on hand-made views, and the registry."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run
from torch import Tensor

import tokenprune as tp
from tokenprune import strategies, strategy
from tokenprune.strategy import strategy_class


def view(
    places: Tensor | None = None,
    valid: Tensor | None = None,
    attention: Tensor | None = None,
    random: Tensor | None = None,
) -> tp.TokenView:
    """A view of made-up tokens."""
    given_tensors = [t for t in (places, valid, attention, random) if t is not None]
    shape = valid.shape if valid is not None else (given_tensors[0].shape[0], 0)
    if valid is None:
        width = attention.shape[2] if attention is not None else given_tensors[0].shape[1]
        valid = torch.ones(shape[0], width, dtype=torch.bool)
    return tp.TokenView(
        layer=2,
        num_layers=8,
        num_original=valid.sum(1),
        max_keep=valid.shape[1],
        ragged=not valid.all(),
        _valid=lambda: valid,
        _positions=lambda: torch.arange(valid.shape[1]).expand(valid.shape),
        _hidden=lambda: torch.zeros(*valid.shape, 4),
        _places=lambda: places,
        _signal=lambda need: random if isinstance(need, tp.RandomNumbers) else attention,
    )


def grid(rows: int, columns: int, image: int = 0, part: int = 0) -> Tensor:
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    fixed = torch.tensor([image, part]).expand(rows, columns, 2)
    return torch.cat([fixed, row[..., None], column[..., None]], -1).flatten(0, 1)


def kept(strategy: tp.PruningStrategy, seen: tp.TokenView, keep: list[int]) -> list[list[int]]:
    selection = strategy.select(seen, torch.tensor(keep))
    return [row.nonzero()[:, 0].tolist() for row in selection.kept]


# ----------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("name", ["pyramiddrop", "fastv"])
def test_attention_is_averaged_over_heads(name: str) -> None:
    attention = torch.tensor([[[0.9, 0.0, 0.0, 0.1], [0.0, 0.5, 0.0, 0.3]]])
    assert kept(tp.build_strategy(name), view(attention=attention), [2]) == [[0, 1]]


def test_the_lower_index_wins_ties() -> None:
    attention = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 1.0]]])
    strategy = tp.build_strategy("fastv")
    assert kept(strategy, view(attention=attention), [2]) == [[1, 2]]
    assert kept(strategy, view(attention=attention), [4]) == [[0, 1, 2, 3]]
    # In float32: what half precision would merge stays apart.
    close = torch.tensor([[[0.1, 0.10001, 0.10002]]])
    assert kept(strategy, view(attention=close), [1]) == [[2]]


def test_rows_have_their_own_budgets_and_tokens() -> None:
    attention = torch.tensor([[[3.0, 1.0, 2.0]], [[1.0, 9.0, 9.0]]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    seen = view(attention=attention, valid=valid)
    assert kept(tp.build_strategy("fastv"), seen, [2, 0]) == [[0, 2], []]
    assert kept(tp.build_strategy("fastv"), seen, [5, 5]) == [[0, 1, 2], [0]]


def test_random_keeps_what_the_engine_drew() -> None:
    numbers = torch.tensor([[0.1, 0.9, 0.5]])
    assert kept(tp.build_strategy("random"), view(random=numbers), [2]) == [[1, 2]]


# ----------------------------------------------------------------------------------------- uniform


def cells(seen: tp.TokenView, keep: int) -> set[tuple[int, int]]:
    (chosen,) = kept(tp.build_strategy("uniform"), seen, [keep])
    return {tuple(seen.places[0, index, 2:].tolist()) for index in chosen}


def test_uniform_is_an_even_stride_over_the_grid() -> None:
    seen = view(places=grid(12, 12)[None])
    assert cells(seen, 72) == {(r, c) for r in range(12) for c in range(12) if (r + c) % 2 == 0}
    assert cells(seen, 36) == {(r, c) for r in range(0, 12, 2) for c in range(0, 12, 2)}
    assert cells(seen, 9) == {(r, c) for r in range(0, 12, 4) for c in range(0, 12, 4)}


def test_uniform_is_as_even_after_an_earlier_cut() -> None:
    full = view(places=grid(12, 12)[None])
    (first,) = kept(tp.build_strategy("uniform"), full, [72])
    again = view(places=grid(12, 12)[None, first])
    assert cells(again, 36) == cells(full, 36)


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), share=st.floats(0, 1))
def test_uniform_keeps_exactly_and_evenly(rows: int, columns: int, share: float) -> None:
    budget = int(rows * columns * share)
    chosen = cells(view(places=grid(rows, columns)[None]), budget)
    assert len(chosen) == budget
    # No half of the grid is favoured by more than a row and a column of cells.
    top = sum(r < rows / 2 for r, _ in chosen)
    assert abs(2 * top - budget) <= rows + columns + 2


def test_uniform_splits_the_budget_over_images_by_size() -> None:
    places = torch.cat([grid(4, 4, image=0), grid(8, 8, image=1), grid(2, 3, image=2)])[None]
    (chosen,) = kept(tp.build_strategy("uniform"), view(places=places), [43])
    images = [int(places[0, i, 0]) for i in chosen]
    # 43 of 86: 8, 32, 3 exactly; 20 of 86: 3.72, 14.88, 1.39 go to 4, 15, 1.
    assert [images.count(i) for i in range(3)] == [8, 32, 3]
    (chosen,) = kept(tp.build_strategy("uniform"), view(places=places), [20])
    images = [int(places[0, i, 0]) for i in chosen]
    assert [images.count(i) for i in range(3)] == [4, 15, 1]


@given(count=st.integers(1, 200), share=st.floats(0, 1))
def test_uniform_without_a_grid_strides_over_the_sequence(count: int, share: float) -> None:
    unknown = torch.full((1, count, 4), -1)
    budget = int(count * share)
    (chosen,) = kept(tp.build_strategy("uniform"), view(places=unknown), [budget])
    assert len(chosen) == budget
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_uniform_ragged_rows() -> None:
    places = torch.stack([grid(4, 4), torch.cat([grid(2, 4), torch.full((8, 4), -1)])])
    valid = torch.arange(16) < torch.tensor([[16], [8]])
    both = kept(tp.build_strategy("uniform"), view(places=places, valid=valid), [4, 2])
    alone = kept(tp.build_strategy("uniform"), view(places=grid(2, 4)[None]), [2])
    assert both[1] == alone[0]
    assert len(both[0]) == 4


# ---------------------------------------------------------------------------------------- registry


def test_registry() -> None:
    assert {"fastv", "pyramiddrop", "random", "uniform"} <= set(tp.available())
    assert "none" not in tp.available()
    assert tp.available() == sorted(tp.available())
    fastv = tp.build_strategy("fastv", queries="all")
    assert (fastv.queries, fastv.source) == ("all", "previous")
    with pytest.raises(FrozenInstanceError):
        fastv.queries = "last"


def test_unknown_names_and_fields() -> None:
    with pytest.raises(KeyError, match=r"expected one of .*'pyramiddrop'.* got 'piramiddrop'. Did"):
        tp.build_strategy("piramiddrop")
    with pytest.raises(ValueError, match=r"expected fields among \['queries', 'source'\], got 'k'"):
        tp.build_strategy("fastv", k=2)
    with pytest.raises(ValueError, match=r"DecoderRows.queries: expected one of .* got 'first'"):
        tp.build_strategy("fastv", queries="first")
    with pytest.raises(ValueError, match=r"queries: expected one of \['last', 'all'\], got 'text'"):
        tp.build_strategy("fastv", queries="text")
    with pytest.raises(ValueError, match=r"DecoderRows.source: expected one of .* got 'own'"):
        tp.build_strategy("pyramiddrop", source="own")


def test_registration_refuses_what_cannot_work() -> None:
    @dataclass(frozen=True)
    class Mine(tp.ScoreStrategy):
        def score(self, view):
            return view.positions

    class Loose(tp.ScoreStrategy):
        def score(self, view):
            return view.positions

    with pytest.raises(ValueError, match="expected a new name, got 'fastv'"):
        tp.register("fastv")(Mine)
    with pytest.raises(ValueError, match="lower-case identifier"):
        tp.register("My Strategy")(Mine)
    with pytest.raises(ValueError, match="other than 'none'"):
        tp.register("none")(Mine)
    with pytest.raises(ValueError, match="expected a frozen dataclass, got"):
        tp.register("loose")(Loose)
    with pytest.raises(ValueError, match="expected a subclass of PruningStrategy"):
        tp.register("dictionary")(dict)
    assert "loose" not in tp.available()


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files count as strategies of the package."""
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    monkeypatch.setattr("tokenprune.strategy.registry._REGISTRY", dict(strategy.registry._REGISTRY))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


MINE = """
import torch
from dataclasses import dataclass
from tokenprune.strategy import ScoreStrategy, register

@register("NAME")
@dataclass(frozen=True)
class Mine(ScoreStrategy):
    def score(self, view):
        return torch.zeros_like(view.positions)
"""


def test_a_file_is_a_strategy_of_its_name(shipped: Path) -> None:
    (shipped / "mine.py").write_text(MINE.replace("NAME", "mine"))
    assert "mine" in tp.available()
    assert tp.build_strategy("mine").name == "mine"
    assert tp.strategies.mine.Mine is strategy_class("mine")


def test_a_file_of_another_name_is_told(shipped: Path) -> None:
    (shipped / "mine.py").write_text(MINE.replace("NAME", "yours"))
    with pytest.raises(ValueError, match=r"strategies/mine.py: expected @register\('mine'\)"):
        tp.build_strategy("mine")


def test_a_broken_file_breaks_itself_only(shipped: Path) -> None:
    (shipped / "broken.py").write_text("import no_such_package")
    assert {"broken", "fastv"} <= set(tp.available())
    assert tp.build_strategy("fastv").name == "fastv"
    with pytest.raises(KeyError, match="Did you mean 'fastv'"):
        tp.build_strategy("fastw")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        tp.build_strategy("broken")


def test_strategies_of_your_own(shipped: Path) -> None:
    """A module that registers one, whatever it imports, before anything else is asked."""
    (shipped / "elsewhere").mkdir()
    (shipped / "elsewhere" / "__init__.py").write_text(MINE.replace("NAME", "own"))
    importlib.import_module("elsewhere")
    assert tp.build_strategy("own").name == "own"
    (shipped / "twice.py").write_text(MINE.replace("NAME", "uniform"))
    with pytest.raises(ValueError, match="expected a new name, got 'uniform', which is Uniform"):
        importlib.import_module("twice")


def test_strategies_are_listed_and_priced_without_torch() -> None:
    code = (
        "import sys, tokenprune as tp\n"
        "for name in tp.available():\n"
        "    tp.build_strategy(name).needs(), tp.published(name, 32)\n"
        "    assert 'torch' not in sys.modules, f'strategies/{name}.py loads torch: import types '"
        "        'under TYPE_CHECKING, and torch in the method that uses it'"
    )
    run([sys.executable, "-c", code])


@pytest.mark.parametrize("name", tp.available())
def test_every_strategy_is_documented_and_published(name: str) -> None:
    cls = strategy_class(name)
    assert cls.name == name
    assert cls.__doc__
    strategy, schedule, positions = tp.published(name, num_layers=32)
    assert type(strategy.at(0)) is cls
    assert schedule.stages
    assert positions in ("original", "renumbered")
    assert hash(strategy.at(0)) == hash(tp.build_strategy(name))


def test_published_runs() -> None:
    strategy, schedule, positions = tp.published("pyramiddrop", num_layers=32)
    assert (strategy.queries, strategy.source, positions) == ("last", "next", "renumbered")
    assert schedule == tp.Schedule.pyramid(num_layers=32, num_stages=4, lam=0.5)
    _, thirteen, _ = tp.published("pyramiddrop", num_layers=40)
    assert [stage.layer for stage in thirteen.stages] == [8, 16, 24]
    strategy, schedule, positions = tp.published("fastv", num_layers=32)
    assert (strategy.queries, strategy.source, positions) == ("last", "previous", "original")
    assert schedule == tp.Schedule.one_shot(layer=2, keep=0.5)
    for name, layers, counts, positions in (
        ("divprune", [0], [56], "renumbered"),
        ("cdpruner", [0], [64], "renumbered"),
        ("dart", [2], [132], "original"),
        ("vtw", [15], [0], "original"),
        ("sparsevlm", [3, 7, 16], [309, 204, 113], "renumbered"),
    ):
        _, schedule, policy = tp.published(name, num_layers=32)
        assert [stage.layer for stage in schedule.stages] == layers
        assert [schedule.count(cut, 576) for cut in range(len(layers))] == counts
        assert policy == positions
    with pytest.raises(KeyError, match="Did you mean 'fastv'"):
        tp.published("fastw", num_layers=32)
    with pytest.raises(ValueError, match="expected layers below 2"):
        tp.published("fastv", num_layers=2)
