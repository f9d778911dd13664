"""docs/compatibility.csv says what the code does, for every model type and attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from compatibility import DOCS, EXACT, OTHERS, cells, page, read, refused_rows, rows
from zoo import REFUSED, ZOO

TABLE = read()


@pytest.fixture(autouse=True)
def no_compiler():
    """flex_attention without torch.compile, which takes minutes on a CPU."""
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.mark.matrix
@pytest.mark.parametrize(("model_type", "attention"), cells())
def test_outcomes_are_those_of_the_table(model_type, attention) -> None:
    known = [row for row in TABLE if row[:2] == (model_type, attention)]
    assert rows(model_type, attention) == known, "renew it: python tests/compatibility.py"


@pytest.mark.parametrize("model_type", REFUSED)
def test_refusals_name_their_reason(model_type) -> None:
    if not hasattr(transformers, REFUSED[model_type].model_class):
        pytest.skip("not in this transformers")
    assert REFUSED[model_type].phrase in REFUSED[model_type].reason()


def test_the_page_is_that_of_the_table() -> None:
    assert (DOCS / "compatibility.md").read_text().splitlines()[2].startswith(f"{len(ZOO)} model")
    if transformers.__version__.startswith("5.23"):
        assert (DOCS / "compatibility.md").read_text() == page(TABLE)
        assert [row for row in TABLE if row[1] == "any"] == refused_rows()


def test_the_table_is_worth_having() -> None:
    """At least 30 types, nothing untold, and only `renumbered` refused for several positions."""
    assert {row[0] for row in TABLE if row[1] != "any"} == set(ZOO)
    assert len(ZOO) >= 30
    for _, _, mode, outcome in TABLE:
        assert outcome.startswith((EXACT, "refused: expected", "impossible unpruned: "))
        if mode in ("identity", "drop_is_mask", "batch_is_alone", "greedy", "no_cache"):
            assert outcome == EXACT
    assert all(name in ZOO for names in OTHERS.values() for name in names)
