"""Published methods on made-up views, beside a second, slow implementation of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import second
import torch
from made_views import made

import tokenprune as tp

CASES = 300
METHODS: dict[str, tuple[tp.PruningStrategy, Callable[..., second.Row]]] = {
    "cdpruner": (tp.build_strategy("cdpruner"), second.cdpruner),
    "dart": (tp.build_strategy("dart"), second.dart),
    "dart-exact": (tp.build_strategy("dart", exact_budget=True), partial(second.dart, exact=True)),
    "divprune": (tp.build_strategy("divprune"), second.divprune),
    "divprune-again": (
        tp.build_strategy("divprune", exact_reference=True),
        partial(second.divprune, again=True),
    ),
    "pool": (tp.build_strategy("pool"), second.pool),
    "sparsevlm": (tp.build_strategy("sparsevlm"), second.sparsevlm),
    "sparsevlm-2": (tp.build_strategy("sparsevlm", version="2.0"), second.sparsevlm_2),
    "vtw": (tp.build_strategy("vtw"), second.vtw),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_picks_and_the_same_mixes(name: str) -> None:
    strategy, slow = METHODS[name]
    for seed in range(CASES):
        batch = made(seed)
        selection = strategy.select(batch.view, batch.keep)
        assert selection.kept.dtype == torch.bool
        for row, count in enumerate(batch.counts):
            seats, mixes = slow(batch, row)
            where = f"made({seed}), row {row}"
            assert selection.kept[row].nonzero()[:, 0].tolist() == seats, where
            if strategy.keeps_exactly:
                assert len(seats) == min(count, int(batch.keep[row])), where
            assert (selection.weights is None) == (mixes is None), where
            if mixes is None:
                continue
            expected = torch.zeros(len(seats), batch.view.valid.shape[1])
            for survivor, mix in enumerate(mixes):
                for token, weight in mix.items():
                    expected[survivor, token] = float(weight)
            assert selection.weights.shape[1] == batch.view.max_keep
            ours = selection.weights[row, : len(seats)]
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6, msg=where)


@pytest.mark.parametrize("name", METHODS)
def test_who_keeps_all_changes_nothing(name: str) -> None:
    strategy, _ = METHODS[name]
    for seed in range(60):
        batch = made(seed)
        keep = torch.tensor(batch.counts)
        view = tp.TokenView(**{**vars(batch.view), "max_keep": max(batch.counts)})
        selection = strategy.select(view, keep)
        if name == "divprune-again":  # duplicates are picked again
            assert (selection.kept <= view.valid).all()
            continue
        assert torch.equal(selection.kept, view.valid)
        if selection.weights is not None:
            for row, count in enumerate(batch.counts):
                assert torch.equal(selection.weights[row, :count, :count], torch.eye(count))
