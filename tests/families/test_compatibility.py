"""docs/compatibility.csv says what the code does, for every model type and attention."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from compatibility import (
    DOCS,
    EXACT,
    FACTS,
    OTHERS,
    cells,
    page,
    proven_types,
    read,
    refused_rows,
    rows,
)
from zoo import REFUSED, ZOO
from zoo.refused import REFUSED_SIZES
from zoo.tower import TOWER_CHECKS

from tokenprune.families.anatomy import examine, final_norm

TABLE = read()


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")  # models warn of much that is their own affair
@pytest.mark.parametrize(("model_type", "attention"), cells())
def test_outcomes_are_those_of_the_table(model_type, attention) -> None:
    known = [row for row in TABLE if row[:2] == (model_type, attention)]
    assert rows(model_type, attention) == known, "renew it: python tests/compatibility.py"


@pytest.mark.parametrize("model_type", REFUSED)
@pytest.mark.share(3)
def test_refusals_name_their_reason(model_type) -> None:
    if not hasattr(transformers, REFUSED[model_type].model_class):
        pytest.skip("not in this transformers")
    assert REFUSED[model_type].reason in REFUSED[model_type].said()


@pytest.mark.parametrize("model_type", REFUSED_SIZES)
def test_some_sizes_of_a_type_are_refused(model_type) -> None:
    assert REFUSED_SIZES[model_type].reason in REFUSED_SIZES[model_type].said()


def test_the_page_is_that_of_the_table() -> None:
    if not transformers.__version__.startswith("5.23"):
        pytest.skip("the page is that of transformers 5.23")
    assert (DOCS / "compatibility.md").read_text() == page(TABLE)
    assert [row for row in TABLE if row[1] == "any"] == refused_rows()


def test_the_table_is_worth_having() -> None:
    """At least 30 types are exact in a forward pass and in generation, and nothing is inexact."""
    table = {row[:3]: row[3] for row in TABLE if row[1] != "any"}
    assert {name for name, _, _ in table} == set(ZOO)
    for (_, _, mode), outcome in table.items():
        if mode in TOWER_CHECKS and outcome in FACTS:
            continue
        assert outcome.startswith((EXACT, "refused: expected", "impossible unpruned: "))
    assert len(proven_types(TABLE)) >= 30
    heard = {name for (name, _, mode), outcome in table.items()
            if mode == "tower_signals" and outcome == EXACT}  # fmt: skip
    assert len(heard) >= 40
    for name in set(ZOO) - heard:  # the reason is said, not that nobody has looked
        said = table[name, "sdpa", "tower_signals"]
        assert re.search(rf"\({name}\): .+\. Choose", said), said
    assert all(name in ZOO for names in OTHERS.values() for name in names)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ZOO)
def test_the_last_norm_makes_the_last_hidden_state(name: str) -> None:
    model = ZOO[name].build("sdpa")
    decoder, given = examine(model).decoder, []
    norm = final_norm(decoder)
    assert norm is not None
    norm.register_forward_hook(lambda module, args, output: given.append(output))
    decoder.register_forward_hook(lambda module, args, output: given.append(output[0]))
    with torch.no_grad():
        model(**ZOO[name].batch(model, [(3, "image", 5)]))
    normed, last = given
    assert torch.equal(normed, last)
